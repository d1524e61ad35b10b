"""Several processes that do one job: what a launcher tells them, and how all end when one fails."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import src.start
from src.errors import UserError
from src.processes import ALONE, Group, count, joined, on_devices
from src.start import start
from tests.warm import call, join, running, wait_for

MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def main() -> None:
    """One of three processes: hands out seven items, among them a failure of the kind that the command line names."""
    (failure,) = sys.argv[1:]
    with joined() as group:
        with group.agreement():
            if failure == "error" and group.rank == 2:
                raise UserError("the third is broken")
            if failure == "crash" and group.rank == 1:
                [][0]
            if failure == "kill" and group.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if failure in ("kill", "sleep"):
                print(os.getpid(), flush=True)
                time.sleep(60)
        print(group.gather([f"{k} of {group.rank}" for k in group.share(range(7))]))


def start_three(failure: str, ended: Path) -> None:
    """In a process of its own, which is killed when it does not end."""
    if failure == "kill":
        src.start.GRACE = 1.0
    try:
        start([sys.executable, "-m", __name__, failure], 3)
    except (UserError, SystemExit) as error:
        ended.write_text(f"{type(error).__name__}: {error}")


@pytest.fixture
def several(tmp_path):
    """Runs `main` in three processes of one group, with what is to fail: how that ended, and what was printed."""

    def run(failure: str = "nothing") -> tuple[str, str]:
        ended, output = tmp_path / "ended", tmp_path / "output"
        process = call(start_three, failure, ended, output=output)
        join(process, output, timeout=60)
        assert process.exitcode == 0, output.read_text()
        return ended.read_text() if ended.exists() else "", output.read_text()

    return run


def test_what_all_have_made_comes_to_the_first_in_order(several):
    made = "['0 of 0', '1 of 1', '2 of 2', '3 of 0', '4 of 1', '5 of 2', '6 of 0']\n"
    assert several() == ("", made)


def test_an_error_of_one_is_the_error_of_all_and_told_once(several):
    assert several("error") == ("UserError: the third is broken", "")


def test_a_crash_of_one_ends_all_and_shows_its_traceback(several):
    ended, output = several("crash")
    assert ended == "SystemExit: 1"
    assert output.count("IndexError: list index out of range") == 1
    assert output.startswith("Traceback")


def test_one_that_is_killed_ends_all(several):
    """The others have a second here, and would sleep for a minute."""
    ended, _ = several("kill")
    assert ended.startswith("UserError: process 1 of 3 was ended by signal 9 (Killed)")


def test_all_end_with_the_process_that_started_them(tmp_path):
    output = tmp_path / "output"
    process = call(start_three, "sleep", tmp_path / "ended", output=output)
    wait_for(lambda: output.exists() and output.read_text().endswith("\n"), process)
    first = int(output.read_text())
    assert running(first)
    process.kill()
    process.join()
    deadline = time.monotonic() + 30
    while running(first):
        assert time.monotonic() < deadline, "the first process has outlived its parent"
        time.sleep(0.01)


def test_one_that_is_alone_joins_nothing(monkeypatch):
    for name in (*MASTER, "RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    with joined() as group:
        assert group == ALONE
        assert group.gather(group.share([3, 1, 4])) == [3, 1, 4]
        assert not torch.distributed.is_initialized()


def test_devices_are_gpus_where_gpus_are_meant(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (count("auto", "auto"), count("auto", "cuda"), count(3, "auto")) == (4, 4, 3)
    assert (count("auto", "cpu"), count(9, "cpu")) == (1, 9)
    with pytest.raises(UserError, match="devices=5 asks for 5 GPUs and this machine has 4"):
        count(5, "cuda")
    with pytest.raises(UserError, match="devices=0 must be at least 1, or auto"):
        count(0, "cpu")


def test_a_launcher_has_counted_already(monkeypatch):
    monkeypatch.setattr("src.processes.launched", lambda: None)
    started = []
    monkeypatch.setattr("src.processes.start", lambda command, processes: started.append((command, processes)))
    on_devices(lambda group: None, lambda: ["again"], 2, "cpu")
    assert started == [(["again"], 2)]
    done: list[Group] = []
    on_devices(done.append, lambda: ["again"], 1, "cpu")
    assert done == [ALONE]


if __name__ == "__main__":
    main()
