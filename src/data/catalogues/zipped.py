"""Images in one zip archive, read in place: the layout of EDM's and StyleGAN's dataset tools, and any other."""

import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.data.catalogue import BrokenImageError, Catalogue
from src.data.catalogues.common import FileSource, catalogues, digest, is_hidden, is_image
from src.data.decoding import Array, FloatRange, decode
from src.errors import UserError

MAX_BYTES = 2**31  # of one image's file


@dataclass(frozen=True)
class Zip(FileSource):
    """One zip of images; dataset.json in it gives their labels, as EDM's dataset tool writes it."""

    def catalogues(self, dir: Path, labels: str | None = None) -> tuple[Catalogue, Catalogue | None]:
        """The images to train on, and those to validate on where `val_folder` names them.

        Args:
            dir: the archive, or a folder that holds one.
            labels: see `src.data.labels.labels_of_files`.

        Raises:
            UserError: when the archive is damaged or not to be trusted, holds no images, or the labels do not fit.
        """
        path = only_file(dir, ".zip")
        archive = Archive(path)
        return catalogues(
            image_names(archive),
            labels,
            self.val_folder,
            str(path),
            archive.content,
            lambda names, numbers, classes: ZipCatalogue(archive, names, numbers, classes, self.float_range),
            self.gaps,
        )


@dataclass(frozen=True, eq=False)
class ZipCatalogue:
    """Images in an archive: a `Catalogue`."""

    archive: "Archive"
    names: Sequence[str]
    labels: NDArray[np.int64]
    classes: Sequence[str]
    float_range: FloatRange = (-1.0, 1.0)

    @property
    def where(self) -> str:
        return str(self.archive.path)

    def read(self, i: int) -> Array:
        name = self.names[i]
        try:
            data = self.archive.open().read(self._checked(name))
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise BrokenImageError(name, f"is damaged in the archive ({error})") from error
        return decode(data, name, self.float_range)

    def _checked(self, name: str) -> zipfile.ZipInfo:
        info = self.archive.open().getinfo(name)
        if info.flag_bits & 1:
            raise BrokenImageError(name, "is encrypted; unpack the archive, and make one without a password")
        if info.file_size > MAX_BYTES:
            raise BrokenImageError(name, f"claims {info.file_size:,} bytes, more than the {MAX_BYTES:,} that are read")
        return info

    def fingerprint(self) -> str:
        infos = map(self.archive.open().getinfo, self.names)
        return digest("zip", ((i.filename, i.file_size, i.CRC) for i in infos), self, self.float_range)


@dataclass(eq=False)
class Archive:
    """A zip that each process opens for itself when it reads first: processes that share a file share its position."""

    path: Path
    _open: tuple[int, zipfile.ZipFile] | None = field(default=None, repr=False)

    def open(self) -> zipfile.ZipFile:
        if self._open is None or self._open[0] != os.getpid():
            self._open = os.getpid(), zipfile.ZipFile(self.path)
        return self._open[1]

    def content(self, name: str) -> bytes | None:
        """Of one file; None where there is none.

        Raises:
            UserError: when it is damaged.
        """
        try:
            return self.open().read(name)
        except KeyError:
            return None
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{name} in {self.path} is damaged ({error}); make the archive anew") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_open": None}


def image_names(archive: Archive) -> list[str]:
    """The images in an archive.

    Raises:
        UserError: when it is damaged, holds a name twice, or names a path that leaves it.
    """
    try:
        infos = archive.open().infolist()
    except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{archive.path} is damaged or no zip ({getattr(error, 'strerror', None) or error}); make it anew"
        ) from error
    names: set[str] = set()
    for info in infos:
        name = info.orig_filename.replace("\\", "/")
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or name[1:2] == ":":
            raise UserError(f"{archive.path} holds the path {name!r}, which leaves the archive; do not trust it")
        if not is_image(name) or info.is_dir() or any(map(is_hidden, parts)):
            continue
        if info.filename in names:
            raise UserError(f"{archive.path} holds {name} twice; make it anew")
        names.add(info.filename)
    return list(names)


def only_file(path: Path, suffix: str) -> Path:
    """The file itself, or the only one with this suffix in a folder.

    Raises:
        UserError: when there is none, or more than one.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise UserError(f"data.dir={path} does not exist")
    found = sorted(file for file in path.iterdir() if file.suffix.lower() == suffix and not is_hidden(file.name))
    if len(found) != 1:
        raise UserError(f"data.dir={path} holds {len(found)} {suffix} files; set data.dir to the one to read")
    return found[0]
