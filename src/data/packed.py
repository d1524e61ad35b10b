"""The packed store: images that are decoded and in one size, mapped into memory rather than read.

A folder with

    images.bin      (N, C, H, W) of uint8, uint16 or float32, little-endian, nothing else
    labels.npy      (N,) int64
    names.json      of each image, as its source called it
    manifest.json   see `Manifest`; written last: without it the folder is no store
    val             a store of the images to validate on, where the source has some

Processes that map a store share its pages, and those of a store that is larger than memory come and go as they are
needed.
"""

import json
import mmap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.errors import UserError
from src.files import sha256, shown

if TYPE_CHECKING:
    from torch import Tensor

    from src.data.images import ImageSet

FORMAT = 1
IMAGES, LABELS, NAMES, MANIFEST = "images.bin", "labels.npy", "names.json", "manifest.json"
VAL = "val"
ITEM_BYTES = {"uint8": 1, "uint16": 2, "float32": 4}
AROUND = 2**16  # bytes that the kernel maps around one that is touched
KINDS_OF_SIZES = 100  # that the manifest lists; photographs come in thousands
KEPT = 2**29  # bytes of a store that a process holds mapped at a time


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes:
        key: what its content depends on.
        count, shape, dtype: (C, H, W) of each of so many images.
        mean, std: of each channel's values as they are stored.
        lowest, highest: of all values.
        classes: their names; none where there are none.
        sha256: of images.bin.
        source, settings, fingerprint: where the images came from, how they were made, and of which files.
        skipped: name and reason of those that could not be read.
        sizes, other_sizes: how many images there are of each "HxW" before cropping, commonest first.
        cropped: how many lost more than a fifth of their pixels to cropping, and the mean share lost.
        enlarged: images that were smaller than they are now.
    """

    key: dict[str, Any]
    count: int
    shape: list[int]
    dtype: str
    mean: list[float]
    std: list[float]
    lowest: float
    highest: float
    classes: list[str]
    sha256: str
    source: str
    settings: dict[str, Any]
    fingerprint: str
    skipped: list[list[str]]
    sizes: dict[str, int]
    other_sizes: int
    cropped: dict[str, Any]
    enlarged: int

    @property
    def nbytes(self) -> int:
        channels, height, width = self.shape
        return self.count * channels * height * width * ITEM_BYTES[self.dtype]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the store in a folder; costs no reading of images.

    Raises:
        UserError: when there is none, it is damaged, of a newer version, or the images are not of the size it says.
    """
    path = folder / MANIFEST
    if not path.is_file():
        half = (folder / IMAGES).exists()
        why = "is packed only in part; run the same src.prepare again" if half else "is no packed store"
        raise UserError(f"{shown(folder)} {why}; data=packed wants data.dir=<the out= of python -m src.prepare>")
    try:
        content = json.loads(path.read_text())
        if content["key"]["format"] > FORMAT:
            raise UserError(
                f"{shown(path)} was written by a newer version; update this project, or pack the images anew"
            )
        manifest = Manifest(**{f.name: content[f.name] for f in fields(Manifest)})
        nbytes = manifest.nbytes
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"{shown(path)} is damaged ({error}); pack the images anew with src.prepare") from error
    there = (folder / IMAGES).stat().st_size if (folder / IMAGES).exists() else 0
    if there != nbytes:
        raise UserError(
            f"{shown(folder / IMAGES)} has {there:,} bytes and not the {nbytes:,} that {MANIFEST} says; "
            "pack the images anew with src.prepare"
        )
    return manifest


def described(dir: str | None, key: str) -> Any:
    """What a configuration takes from the manifest in a folder: channels, image_size (one number of a square) or
    num_classes. Costs no import of torch."""
    if dir is None:
        raise UserError("data.dir names no packed store; set it to the out= of python -m src.prepare")
    manifest = read_manifest(Path(dir))
    channels, height, width = manifest.shape
    if key == "channels":
        return channels
    if key == "image_size":
        return height if height == width else [height, width]
    return max(1, len(manifest.classes))


class Store:
    """A store that is opened.

    Attributes:
        manifest: what it holds.
        images: (N, C, H, W) over the memory map; read-only, writing to it ends the process.
        labels: (N,) int64, in memory.

    Args:
        folder: of the store.
        verify: compare images.bin with its SHA-256, which reads all of it.

    Raises:
        UserError: when it is not whole.
    """

    def __init__(self, folder: Path, verify: bool = False) -> None:
        import numpy as np
        import torch

        self.folder = folder
        self.manifest = manifest = read_manifest(folder)
        try:
            labels = np.load(folder / LABELS, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{shown(folder / LABELS)} cannot be read ({error}); pack the images anew") from error
        if labels.shape != (manifest.count,) or labels.dtype != np.int64:
            raise UserError(
                f"{shown(folder / LABELS)} holds {labels.dtype} of shape {labels.shape}, not a label for each of "
                f"{manifest.count:,} images; pack the images anew"
            )
        if verify and sha256(folder / IMAGES) != manifest.sha256:
            raise UserError(f"{shown(folder / IMAGES)} is not what was packed, by its SHA-256; pack the images anew")
        with (folder / IMAGES).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot be written to
            flat = torch.frombuffer(self._map, dtype=getattr(torch, manifest.dtype))
        self.images: Tensor = flat.view(manifest.count, *manifest.shape)
        self.labels: Tensor = torch.from_numpy(labels)
        self._touched = 0

    def image_set(self) -> "ImageSet":
        """The images with their labels and names."""
        from src.data.images import ImageSet

        return ImageSet(
            self.images, self.labels, Names(self.folder, self.manifest.count), tuple(self.manifest.classes), mapped=True
        )

    def check_range(self) -> None:
        """Compares floats with the range that networks are trained in; whole numbers cannot leave it.

        Raises:
            UserError: when they leave [-1, 1].
        """
        low, high = self.manifest.lowest, self.manifest.highest
        if self.manifest.dtype == "float32" and not -1 <= low <= high <= 1:
            raise UserError(
                f"{shown(self.folder)} holds values from {low:g} to {high:g}, and networks are trained on [-1, 1]; "
                "pack the images anew, and state with data.source.float_range what they span"
            )

    def touched(self, images: int) -> None:
        """Says that so many images were read. Every half GiB or so the pages that this process holds are let go of,
        which leaves them in the system's cache: its resident memory stays small, whatever the size of the store."""
        each = self.images[0].nbytes
        self._touched += images * (each + AROUND)
        if self._touched < KEPT or self.manifest.nbytes < KEPT or not hasattr(mmap, "MADV_DONTNEED"):
            return
        self._map.madvise(mmap.MADV_DONTNEED)
        self._touched = 0


class Names(Sequence[str]):
    """The names of a store's images, read when one is asked for.

    Raises:
        UserError: then, when the file is damaged.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._path, self._count = folder / NAMES, count

    @cached_property
    def _all(self) -> list[str]:
        try:
            names = json.loads(self._path.read_text())
            if not isinstance(names, list) or len(names) != self._count:
                raise ValueError(f"it does not name {self._count:,} images")
        except (OSError, ValueError) as error:
            raise UserError(f"{shown(self._path)} cannot be read ({error}); pack the images anew") from error
        return names

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        return self._all[i]


@dataclass(frozen=True)
class Packed:
    """A store that `python -m src.prepare` wrote.

    Args:
        verify: compare the images with their SHA-256 at each start, which reads all of them.
    """

    verify: bool = False

    def open(self, dir: Path) -> tuple[Store, Store | None]:
        """The store in the folder `dir`, and that of its images to validate on, where it has some."""
        val = dir / VAL
        return Store(dir, self.verify), Store(val, self.verify) if val.exists() else None
