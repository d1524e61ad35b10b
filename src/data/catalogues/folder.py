"""Folders of image files."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from src.data.catalogue import BrokenImageError, Catalogue
from src.data.catalogues.common import FileSource, catalogues, digest, is_hidden, is_image
from src.data.decoding import Array, FloatRange, decode
from src.errors import UserError


@dataclass(frozen=True)
class Folder(FileSource):
    """A folder of images, nested or not; what begins with a dot is not seen."""

    def catalogues(self, dir: Path, labels: str | None = None) -> tuple[Catalogue, Catalogue | None]:
        """The images to train on, and those to validate on where `val_folder` names them.

        Args:
            labels: see `src.data.labels.labels_of_files`.

        Raises:
            UserError: when there are no images, a folder cannot be read, or the labels do not fit.
        """
        return catalogues(
            scan(dir),
            labels,
            self.val_folder,
            f"the folder {dir}",
            lambda file: _content(dir / file),
            lambda names, numbers, classes: FolderCatalogue(dir, names, numbers, classes, self.float_range),
            self.gaps,
        )


@dataclass(frozen=True, eq=False)
class FolderCatalogue:
    """Images in files of a folder: a `Catalogue`.

    Args:
        root: the folder.
        names: the files' paths below it, with slashes.
        labels, classes: see `Catalogue`.
        float_range: see `decode`.
    """

    root: Path
    names: Sequence[str]
    labels: NDArray[np.int64]
    classes: Sequence[str]
    float_range: FloatRange = (-1.0, 1.0)

    @property
    def where(self) -> str:
        return str(self.root)

    def read(self, i: int) -> Array:
        name = self.names[i]
        try:
            data = (self.root / name).read_bytes()
        except OSError as error:
            raise BrokenImageError(name, f"cannot be read ({error.strerror})") from error
        return decode(data, name, self.float_range)

    def fingerprint(self) -> str:
        return digest("folder", map(self._state, self.names), self, self.float_range)

    def _state(self, name: str) -> tuple[str, int, int]:
        try:
            stat = (self.root / name).stat()
        except OSError:
            return name, -1, -1
        return name, stat.st_size, stat.st_mtime_ns


def scan(root: Path) -> Iterator[str]:
    """The images of a folder and all below it, as paths with slashes; links are followed, but never in a circle.

    Raises:
        UserError: when a folder cannot be read.
    """
    if not root.exists():
        raise UserError(f"data.dir={root} does not exist")
    if not root.is_dir():
        raise UserError(f"data.dir={root} is a file, not a folder; data=zip, npz and parquet read files")
    return _scan(root, "", ())


def _scan(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    try:
        stat = folder.stat()
        here = (stat.st_dev, stat.st_ino)
        if here in above:
            return
        with os.scandir(folder) as listing:
            entries = list(listing)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read ({error.strerror})") from error
    for entry in entries:
        if is_hidden(entry.name):
            continue
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link that leads to itself
            is_folder = False
        if is_folder:
            yield from _scan(folder / entry.name, f"{prefix}{entry.name}/", (*above, here))
        elif is_image(entry.name) and (entry.is_symlink() or entry.is_file()):
            yield f"{prefix}{entry.name}"


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
