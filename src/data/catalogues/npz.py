"""Arrays of images in one .npz: the batches of guided-diffusion, and the samples that `python -m src.sample` writes."""

import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.data.catalogue import BrokenImageError, Catalogue
from src.data.catalogues.common import digest
from src.data.catalogues.zipped import only_file
from src.data.decoding import Array, FloatRange, check_float_range, finished, npy_header
from src.data.labels import Labels, no_labels, numbered
from src.errors import UserError

IMAGES, CLASSES = "arr_0", "arr_1"


@dataclass(frozen=True)
class Npz:
    """One .npz: arr_0 holds the images, (N, H, W, C) or (N, H, W); arr_1, where there is one, their classes, (N,).

    Args:
        float_range, gaps: see `src.data.catalogues.common.FileSource`.
    """

    float_range: tuple[float, float] = (-1.0, 1.0)
    gaps: bool = False

    def __post_init__(self) -> None:
        check_float_range(self.float_range)

    def catalogues(self, dir: Path, labels: str | None = None) -> tuple[Catalogue, Catalogue | None]:
        """All images, to train on.

        Args:
            dir: the file, or a folder that holds one.
            labels: "none", or the name of an array; None for arr_1 where there is one.

        Raises:
            UserError: when the file is damaged, holds no images, or labels that are not theirs.
        """
        path = only_file(dir, ".npz")
        try:
            with zipfile.ZipFile(path) as archive:
                member = _member(archive, IMAGES, path)
                count = member.shape[0]
                found = self._labels(archive, labels, count, path)
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, BrokenImageError) as error:
            if isinstance(error, UserError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} is damaged or no .npz ({reason}); make it anew") from error
        names = [str(i) for i in range(count)]
        return NpzCatalogue(path, member, names, found.numbers, found.classes, self.float_range), None

    def _labels(self, archive: zipfile.ZipFile, labels: str | None, count: int, path: Path) -> Labels:
        there = f"{labels or CLASSES}.npy" in archive.namelist()
        if labels == "none" or (labels is None and not there):
            return no_labels(count)
        if not there:
            raise UserError(f"data.labels={labels} is no array of {path}; it holds {_arrays(archive)}")
        member = _member(archive, labels or CLASSES, path)
        with archive.open(member.info) as file:
            values = np.frombuffer(file.read()[member.start :], member.dtype).reshape(member.shape)
        if values.ndim == 0 or len(values) != count:
            number = str(len(values)) if values.ndim else f"one number in {labels or CLASSES} and no"
            raise UserError(f"{path} holds {count} images, but {number} labels")
        return numbered(values, f"{labels or CLASSES} of {path}", gaps=self.gaps)


@dataclass(frozen=True)
class Member:
    """An array in the archive.

    Attributes:
        start: of its numbers, in its file.
    """

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int


@dataclass(eq=False)
class NpzCatalogue:
    """Images of one array: a `Catalogue`. An array that is not compressed is mapped; others are read from the start.

    Args:
        path: the .npz.
        images: its array.
    """

    path: Path
    images: Member
    names: Sequence[str]
    labels: NDArray[np.int64]
    classes: Sequence[str]
    float_range: FloatRange = (-1.0, 1.0)
    _reader: tuple[int, Any] | None = field(default=None, repr=False)

    @property
    def where(self) -> str:
        return str(self.path)

    def read(self, i: int) -> Array:
        if self._reader is None or self._reader[0] != os.getpid():
            stored = self.images.info.compress_type == zipfile.ZIP_STORED
            self._reader = os.getpid(), (_Mapped if stored else _Unpacked)(self.path, self.images)
        try:
            data = self._reader[1].read(i)
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            self._reader = None
            raise BrokenImageError(self.names[i], f"cannot be read ({error})") from error
        array = np.frombuffer(data, self.images.dtype).reshape(self.images.shape[1:])
        return finished(array, self.names[i], self.float_range)

    def fingerprint(self) -> str:
        info = self.images.info
        return digest("npz", [(info.filename, info.file_size, info.CRC)], self, self.float_range)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


class _Mapped:
    def __init__(self, path: Path, member: Member) -> None:
        with path.open("rb") as file:
            file.seek(member.info.header_offset)
            name, extra = struct.unpack("<26xHH", file.read(30))  # a local header: its name and extra field follow
        self.size = _size(member)
        offset = member.info.header_offset + 30 + name + extra + member.start
        self.bytes = np.memmap(path, np.uint8, "r", offset, (member.shape[0] * self.size,))

    def read(self, i: int) -> bytes:
        return self.bytes[i * self.size : (i + 1) * self.size].tobytes()


class _Unpacked:
    """Unpacks as far as is asked for; from the start again for an image that was passed."""

    BLOCK = 2**20

    def __init__(self, path: Path, member: Member) -> None:
        self.archive = zipfile.ZipFile(path)
        self.member = member
        self.size = _size(member)
        self._rewind()

    def _rewind(self) -> None:
        self.file = self.archive.open(self.member.info)
        self.file.read(self.member.start)
        self.position = 0

    def read(self, i: int) -> bytes:
        if i * self.size < self.position:
            self._rewind()
        while skip := min(i * self.size - self.position, self.BLOCK):
            self.file.read(skip)
            self.position += skip
        self.position += self.size
        return self.file.read(self.size)


def _size(member: Member) -> int:
    """Bytes an image."""
    return prod(member.shape[1:]) * member.dtype.itemsize


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> Member:
    if f"{name}.npy" not in archive.namelist():
        raise UserError(f"{path} holds no {name}, but {_arrays(archive)}; images are (N, H, W, C) in {IMAGES}")
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        shape, fortran, dtype, start = npy_header(file, name)  # type: ignore[arg-type]
    size = prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise UserError(f"{name} of {path} holds Python objects, not numbers; they could run code, and are not opened")
    if fortran or (name == IMAGES and (len(shape) not in (3, 4) or not prod(shape))):
        order = " in Fortran's order" if fortran else ""
        raise UserError(f"{name} of {path} is {shape}{order}, not (N, H, W, C) images in C's order")
    if info.file_size - start != size:
        raise UserError(f"{name} of {path} is cut short: {info.file_size - start:,} bytes of {size:,} are there")
    return Member(info, shape, dtype, start)


def _arrays(archive: zipfile.ZipFile) -> str:
    return ", ".join(sorted(name.removesuffix(".npy") for name in archive.namelist())) or "nothing"
