"""One command several times over, as one group of processes on this machine."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.errors import UserError

GRACE = 10.0  # seconds that processes have to end by themselves when one has failed
ERROR_FILE = "DIFFUSION_LAB_ERROR_FILE"  # where a process of `start` leaves the sentence of its error


def start(command: list[str], processes: int, handed_on: Sequence[int] = ()) -> None:
    """Runs a command several times over as one group, on this machine, and waits for all.

    Only the first prints. When one fails the others are ended; they also end with this process, however it ends.

    Args:
        handed_on: signals to this process that are for them, who know how to end well.

    Raises:
        UserError: with the sentence that one of them has failed with.
        SystemExit: with the exit code of one that has failed otherwise, and has said why, or of a signal.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC_")}
    children: list[subprocess.Popen[bytes]] = []

    asked: list[int] = []

    def hand_on(signum: int, frame: Any) -> None:
        asked.append(signum)
        for child in children:
            child.send_signal(signum)

    before = {number: signal.signal(number, hand_on) for number in handed_on}
    with tempfile.TemporaryDirectory() as folder:
        sentences, outputs = ([Path(folder, f"{kind}{r}") for r in range(processes)] for kind in ("error", "stderr"))
        try:
            for rank in range(processes):
                environ = {
                    **inherited,
                    **{"RANK": str(rank), "WORLD_SIZE": str(processes)},
                    **{"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)},
                    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), ERROR_FILE: str(sentences[rank])},
                }
                with outputs[rank].open("wb") as output:
                    children.append(
                        subprocess.Popen(
                            command,
                            env=environ,
                            stdin=subprocess.PIPE,  # see `src.processes.meet`
                            stdout=None if rank == 0 else subprocess.DEVNULL,
                            stderr=None if rank == 0 else output,
                            start_new_session=True,  # Ctrl-C is for this process alone
                        )
                    )
            _wait(children)
        finally:
            for child in children:
                child.terminate()
            codes = [_end(child) for child in children]
            for number, handler in before.items():
                signal.signal(number, handler)
        if codes[0] < 0:
            sys.stderr.write("\n")  # below its progress bar
        if asked and -asked[0] in codes:
            raise SystemExit(128 + asked[0])  # before they could handle it
        failed = [rank for rank, code in enumerate(codes) if code != 0]
        told = [sentence.read_text() for sentence in sentences if sentence.exists()]
        if told:
            raise UserError(told[0])
        for rank in sorted(
            failed, key=lambda rank: codes[rank] in (2, -signal.SIGTERM)
        ):  # the cause before its effects
            if codes[rank] < 0:
                raise UserError(
                    f"process {rank} of {processes} was ended by signal {-codes[rank]} "
                    f"({signal.strsignal(-codes[rank])}), perhaps for want of memory; try fewer devices"
                )
            sys.stderr.write(outputs[rank].read_text(errors="replace"))
            raise SystemExit(codes[rank])


def _wait(children: list["subprocess.Popen[bytes]"]) -> None:
    """Until all have ended; or, when one has failed, until the others have had time to."""
    deadline = float("inf")
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        if any(child.poll() for child in children):
            deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(0.05)


def _end(child: "subprocess.Popen[bytes]") -> int:
    """The exit code of one that was told to end."""
    try:
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
    if child.stdin is not None:
        child.stdin.close()
    return child.wait()
