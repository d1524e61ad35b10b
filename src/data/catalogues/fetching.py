"""Files of torchvision's image sets, which torchvision downloads."""

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

from src.errors import UserError
from src.lock import Lock, is_locked

T = TypeVar("T")


def fetched(name: str, root: Path, folder: Path, files: Sequence[str], where: str, make: Callable[[type], T]) -> T:
    """What is made of a torchvision set, downloaded where it is not there.

    Args:
        name: torchvision's class.
        root: the folder that it is given.
        folder: where it keeps the files.
        files: what must be there.
        where: the same for a reader.
        make: builds it with `download=True`, given the class.

    Raises:
        UserError: when the files are missing and cannot be downloaded, or are damaged.
    """
    import torchvision.datasets

    missing = [file for file in files if not (folder / file).exists()]
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # a download that stalls ends
    try:
        with _alone(root) if missing or is_locked(root) else nullcontext():
            return make(getattr(torchvision.datasets, name))
    except Exception as error:  # torchvision meets damage with whatever its parser happens to raise
        reason = " ".join(str(error).split())
        if not missing:
            raise UserError(f"{name} in {root} is damaged ({reason}); replace it by {where}") from error
        for parent in made:  # by torchvision, for files that did not come
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
        raise UserError(
            f"{name} is not in {root} ({', '.join(missing)} missing) and could not be downloaded ({reason}); "
            f"provide {where}, or set data.dir"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One process at a time downloads, and the others find what it brought."""
    root.mkdir(parents=True, exist_ok=True)
    lock = Lock(root, wait=True)
    try:
        yield
    finally:
        lock.release()
