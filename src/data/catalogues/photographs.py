"""Image sets of torchvision that are files of many or of large sizes; downloaded where they are not there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.data.catalogue import Catalogue
from src.data.catalogues.fetching import fetched
from src.data.catalogues.folder import FolderCatalogue
from src.data.labels import Labels, no_labels
from src.errors import UserError
from src.lock import is_locked


@dataclass(frozen=True)
class CelebA:
    """CelebA, aligned and cropped (Liu et al. 2015), 218x178: 162,770 to train, 19,867 (its "valid") to validate."""

    def catalogues(self, dir: Path, labels: str | None = None) -> tuple[Catalogue, Catalogue | None]:
        """The images of both splits.

        Args:
            labels: one of the 40 attributes, such as Smiling, which makes two classes; None or "none" for none.

        Raises:
            UserError: when the files are missing and cannot be downloaded, or are damaged.
        """
        root = dir / "celeba"
        tables = ["list_eval_partition.txt", "list_attr_celeba.txt"]
        where = f"{' and '.join(tables)} and the folder img_align_celeba in {root}"
        files = [*tables, "img_align_celeba"]
        if any(not (root / file).exists() for file in files) or is_locked(dir):
            fetched("CelebA", dir, root, files, where, lambda cls: cls(str(dir), split="all", download=True))
        split = _rows(root / tables[0], 0, where)
        names = sorted(split)
        found = (
            no_labels(len(names)) if labels in (None, "none") else _attribute(root / tables[1], labels, names, where)
        )
        parts = []
        for number in ("0", "1"):
            chosen = [i for i, name in enumerate(names) if split[name][0] == number]
            parts.append(
                FolderCatalogue(
                    root / "img_align_celeba", [names[i] for i in chosen], found.numbers[chosen], found.classes
                )
            )
        if not parts[0].names:
            raise _damaged(root / tables[0], "it names no images to train on", where)
        return parts[0], parts[1] if parts[1].names else None


@dataclass(frozen=True)
class Flowers102:
    """Oxford's 102 kinds of flowers (Nilsback & Zisserman 2008), of many sizes: 8,189 images.

    Args:
        train: the splits to train on: train (1,020 images), test (6,149) or both.
    """

    train: tuple[str, ...] = ("train", "test")

    def __post_init__(self) -> None:
        if not self.train or not set(self.train) <= {"train", "test"} or len(set(self.train)) < len(self.train):
            raise ValueError(f"train={list(self.train)} must be [train], [test] or [train, test]")

    def catalogues(self, dir: Path, labels: str | None = None) -> tuple[Catalogue, Catalogue | None]:
        """The images to train on, and the 1,020 of the split "val".

        Args:
            labels: None for the kinds of flowers, or "none".

        Raises:
            UserError: when the files are missing and cannot be downloaded, or are damaged.
        """
        if labels not in (None, "none"):
            raise UserError(f"data.labels={labels} is not null, for the kinds of flowers, or none")
        root = dir / "flowers-102"
        tables = ["setid.mat", "imagelabels.mat"]
        where = f"{' and '.join(tables)} and the folder jpg in {root}"
        files = [*tables, "jpg"]
        if any(not (root / file).exists() for file in files) or is_locked(dir):
            fetched("Flowers102", dir, root, files, where, lambda cls: cls(str(dir), download=True))
        splits, numbers = _mat(root / tables[0], where), _mat(root / tables[1], where)
        keys = {"train": "trnid", "val": "valid", "test": "tstid"}
        parts = []
        for wanted in (self.train, ("val",)):
            try:
                ids = sorted(int(i) for name in wanted for i in np.atleast_1d(splits[keys[name]]))
                own = np.atleast_1d(numbers["labels"])[[i - 1 for i in ids]].astype(np.int64) - 1
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise _damaged(root, str(error), where) from error
            found = no_labels(len(ids)) if labels == "none" else Labels(own, _flowers())
            names = [f"image_{i:05d}.jpg" for i in ids]
            parts.append(FolderCatalogue(root / "jpg", names, found.numbers, found.classes))
        return parts[0], parts[1]


def _rows(path: Path, header: int, where: str) -> dict[str, list[str]]:
    """The words after the first of each line, by the first; after so many lines."""
    try:
        lines = path.read_text().splitlines()[header:]
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error), where) from error
    return {words[0]: words[1:] for words in map(str.split, lines) if len(words) > 1}


def _attribute(path: Path, attribute: str, names: Sequence[str], where: str) -> Labels:
    rows = _rows(path, 1, where)  # after the number of images, a line of attributes and one a image
    if not rows:
        raise _damaged(path, "it is empty", where)
    first, rest = next(iter(rows.items()))
    attributes = [first, *rest]
    if attribute not in attributes:
        raise UserError(f"data.labels={attribute} is no attribute of CelebA; there are {', '.join(attributes)}")
    column = attributes.index(attribute)
    try:
        numbers = np.array([int(rows[name][column]) > 0 for name in names], np.int64)
    except (KeyError, IndexError, ValueError) as error:
        raise _damaged(path, f"no {attribute} of {error}", where) from error
    return Labels(numbers, (f"not {attribute}", attribute))


def _mat(path: Path, where: str) -> dict[str, Any]:
    from scipy.io import loadmat

    try:
        return loadmat(path, squeeze_me=True)
    except Exception as error:  # SciPy meets damage with whatever its parser happens to raise
        raise _damaged(path, str(error), where) from error


def _flowers() -> tuple[str, ...]:
    from torchvision.datasets import Flowers102 as Described

    return tuple(Described.classes)


def _damaged(path: Path, reason: str, where: str) -> UserError:
    return UserError(f"{path} is damaged ({' '.join(reason.split())[:120]}); provide {where} anew")
