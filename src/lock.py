"""One process at a time works in a folder."""

import fcntl
import os
import socket
import time
from pathlib import Path

from src.errors import UserError


class Lock:
    """A lock on a folder that its holder takes with it when it dies, however it dies.

    The file <folder>/.lock names the holder; what locks is the kernel's lock on it (flock), so a file that is left
    behind after a kill -9 locks nobody out.

    Args:
        folder: exists.
        doing: what its holder does, in words that go on after "<folder> is ".
        wait: for its holder to let go, rather than to refuse.

    Raises:
        UserError: when another process holds it.
    """

    def __init__(self, folder: Path, doing: str = "being trained in", wait: bool = False) -> None:
        self.path = folder / ".lock"
        while True:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(self._file, 200).decode(errors="replace").strip() or "another process"
                os.close(self._file)
                if wait:
                    time.sleep(0.1)
                    continue
                raise UserError(
                    f"{folder} is {doing} by {holder}; wait for it, stop it, or choose another folder"
                ) from error
            if self._is_there():
                break
            os.close(self._file)  # its last holder has just taken it away
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Takes the file away and lets go."""
        self.path.unlink(missing_ok=True)
        os.close(self._file)


def is_locked(folder: Path) -> bool:
    """Whether a living process works in the folder; looks only, and leaves no lock or file."""
    try:
        file = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:  # nobody does, or it cannot be known
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
