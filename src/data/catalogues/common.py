"""What folders and archives of image files have in common."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.data.catalogue import Catalogue
from src.data.decoding import SUFFIXES, FloatRange, check_float_range
from src.data.labels import Find, labels_of_files
from src.errors import UserError

Make = Callable[[Sequence[str], NDArray[np.int64], Sequence[str]], Catalogue]


@dataclass(frozen=True)
class FileSource:
    """What sources of image files take.

    Args:
        float_range: what the values of .npy and TIFF files of floats span; mapped to [-1, 1].
        val_folder: a top-level folder whose images validate. Those of the folder `train` train, or all others where
            there is none, and classes are the folders one level below. None: images are held out of all.
        gaps: whether labels may skip numbers, as those of a part of a larger set do.
    """

    float_range: tuple[float, float] = (-1.0, 1.0)
    val_folder: str | None = None
    gaps: bool = False

    def __post_init__(self) -> None:
        check_float_range(self.float_range)


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def is_hidden(part: str) -> bool:
    """Whether a part of a path says that what follows is not for the user: .git, ._x.png, macOS's copies in zips."""
    return part.startswith(".") or part == "__MACOSX"


def catalogues(
    names: Iterable[str],
    labels: str | None,
    val_folder: str | None,
    where: str,
    find: Find,
    make: Make,
    gaps: bool = False,
) -> tuple[Catalogue, Catalogue | None]:
    """The catalogue of the images to train on, and that of those to validate on where a folder holds them.

    Args:
        names: of all images, paths with slashes.
        labels: see `labels_of_files`; of both together, so that a class may be missing in one.
        val_folder: see `FileSource`.
        where: the place, for messages.
        find: see `labels_of_files`.
        make: a catalogue of names, labels and classes.
        gaps: see `FileSource`.

    Raises:
        UserError: when there are no images, or the labels do not fit.
    """
    names = sorted(names)
    if not names:
        raise UserError(f"{where} holds no images: no file in it ends in {', '.join(SUFFIXES)}")
    train, val = _split(names, val_folder, where)
    chosen = train + val
    short = chosen
    if val_folder is not None and labels == "folder":
        tops = ("train/", f"{val_folder}/") if train[0].startswith("train/") else (f"{val_folder}/",)
        short = [next((name.removeprefix(top) for top in tops if name.startswith(top)), name) for name in chosen]
    found = labels_of_files(short, labels, where, find, known=names, gaps=gaps)
    n = len(train)
    first = make(train, found.numbers[:n], found.classes)
    return first, make(val, found.numbers[n:], found.classes) if val else None


def _split(names: list[str], val_folder: str | None, where: str) -> tuple[list[str], list[str]]:
    if val_folder is None:
        return names, []
    val = [name for name in names if name.startswith(f"{val_folder}/")]
    train = [name for name in names if name.startswith("train/")]
    train = train or [name for name in names if not name.startswith(f"{val_folder}/")]
    if not val:
        raise UserError(f"data.source.val_folder={val_folder}, but {where} holds no images in a folder of this name")
    if not train or val_folder == "train":
        raise UserError(f"data.source.val_folder={val_folder} leaves no images of {where} to train on")
    return train, val


def digest(kind: str, files: Iterable[tuple[Any, ...]], catalogue: Catalogue, float_range: FloatRange) -> str:
    """The fingerprint of a catalogue: of what tells one state of its files from another, its labels and classes."""
    sha = hashlib.sha256(f"{kind} 1 {tuple(map(float, float_range))}\n".encode())
    for file in files:
        sha.update(repr(file).encode("utf-8", "surrogateescape") + b"\n")
    sha.update(np.ascontiguousarray(catalogue.labels).tobytes())
    sha.update(repr(list(catalogue.classes)).encode("utf-8", "surrogateescape"))
    return sha.hexdigest()
