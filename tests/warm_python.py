"""An interpreter for `python -m` that begins at once: a program that has a fork run in its place.

Programs that start others by a command line, such as srun, need a program. This one hands its arguments, folder,
environment and streams to a server, passes on the signals that it gets, and ends as the fork does.
"""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.warm import Fork, call

CLIENT = """#!{python} -SE
import json, os, signal, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    pid = int.from_bytes(server.recv(4), "big")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int.from_bytes(server.recv(4), "big", signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextlib.contextmanager
def interpreter(folder: Path) -> Iterator[Path]:
    """The program `python` in a folder, which works for as long as the block lasts."""
    folder.mkdir()
    path, log = folder / "python", folder / "log"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
        server.listen()
        path.write_text(CLIENT.format(python=sys.executable, address=str(folder / "socket")))
        path.chmod(0o755)
        process = call(_serve, server, path, output=log)
        try:
            yield path
        finally:
            process.kill()
            process.join()


def _serve(server: socket.socket, path: Path) -> None:
    """Forks a process for each client, which waits for the fork that is the client's."""
    sys.executable = str(path)
    while True:
        client, _ = server.accept()
        if os.fork() == 0:
            try:
                _attend(client, path)
            finally:
                os._exit(0)
        client.close()
        with contextlib.suppress(ChildProcessError):  # collects those that have ended
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _attend(client: socket.socket, path: Path) -> None:
    start, streams, _, _ = socket.recv_fds(client, 4, 3)
    request = b""
    while len(request) < int.from_bytes(start, "big"):
        request += client.recv(65536)
    arguments, cwd, env = json.loads(request)
    names: Any = dict(zip(("stdin", "stdout", "stderr"), streams, strict=True))
    process = Fork([str(path), *arguments], cwd=cwd, env=env, **names)
    for stream in streams:
        os.close(stream)
    client.sendall(process.pid.to_bytes(4, "big"))
    client.sendall(process.wait().to_bytes(4, "big", signed=True))
