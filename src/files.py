"""Files that appear whole or not at all."""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_folder(name: str) -> Path:
    """$XDG_CACHE_HOME or ~/.cache, diffusion-lab/<name> in it: what can be made again at any time."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "diffusion-lab" / name


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, which takes the place of `path` when the block ends well, or vanishes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Removes what writers that were killed have left in a folder and those in it; nobody else may be writing there."""
    for path in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")):
        path.unlink(missing_ok=True)


_SAID: set[Path] = set()


@contextmanager
def tolerated(path: Path) -> Iterator[None]:
    """Lets training go on when a file cannot be written that it does not need, and says so once for each path."""
    try:
        yield
    except OSError as error:
        if path not in _SAID:
            _SAID.add(path)
            print(f"{shown(path)} could not be written ({error}); training goes on", flush=True)


def link_or_copy(path: Path, name: Path) -> None:
    """Gives a file another name, which keeps its content when the first is replaced; a copy where links are unknown."""
    try:
        os.link(path, name)
    except OSError:
        shutil.copyfile(path, name)


def save(content: Any, path: Path) -> None:
    """Writes plain containers and tensors as torch.save does, on the disk when it returns."""
    import torch

    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def check_sums(path: Path) -> None:
    """Compares what torch.save has written with its checksums: a CRC-32 of each part, which torch.load does not check.

    Raises:
        ValueError: when one is wrong; an error of zipfile's when the file is no archive, or not whole.
    """
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"the checksum of {broken} is wrong")


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def shown(path: Path) -> Path:
    """The path as a reader wants it: relative when it lies below the working directory."""
    absolute = path.resolve()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path
