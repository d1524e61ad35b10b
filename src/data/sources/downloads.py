"""Image sets of torchvision that fit into memory; downloaded where they are not there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from src.data.catalogues.fetching import fetched
from src.data.catalogues.zipped import Zip
from src.data.images import ImageSet
from src.data.reading import read_all


@dataclass(frozen=True)
class MNIST:
    """MNIST (LeCun et al. 1998) or a set in its format, 28x28, through torchvision; validates on the test split.

    Args:
        name: torchvision's class, "MNIST" or "FashionMNIST".
    """

    name: str = "MNIST"

    def load(self, dir: Path) -> tuple[ImageSet, ImageSet | None]:
        folder = dir / self.name / "raw"
        files = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
        return both(self.name, dir, folder, files, f"its four *-ubyte files in {folder}", TRAIN, self._convert)

    @staticmethod
    def _convert(split: Any) -> ImageSet:
        images, labels = split.data, split.targets
        if images.ndim != 3 or len(images) != len(labels):
            raise ValueError(f"holds {tuple(images.shape)} pixels and {len(labels)} labels")
        return ImageSet(images[:, None].contiguous(), labels.long(), classes=_words(split.classes))


@dataclass(frozen=True)
class CIFAR10:
    """CIFAR-10 (Krizhevsky 2009), 32x32: 50,000 to train, 10,000 to validate.

    Taken from `<dir>/cifar10-32x32.zip` in the layout of EDM's dataset tool (and cifar10-32x32-test.zip beside it), or
    else from torchvision's files, which are downloaded if they are not there.
    """

    def load(self, dir: Path) -> tuple[ImageSet, ImageSet | None]:
        train, test = dir / "cifar10-32x32.zip", dir / "cifar10-32x32-test.zip"
        if train.exists():
            return self._named(read_zip(train)), self._named(read_zip(test)) if test.exists() else None
        where = f"cifar-10-batches-py in {dir}, or cifar10-32x32.zip as EDM's dataset tool writes it"
        files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        return both("CIFAR10", dir, dir / "cifar-10-batches-py", files, where, TRAIN, _cifar)

    @staticmethod
    def _named(data: ImageSet) -> ImageSet:
        classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
        return replace(data, classes=classes) if int(data.labels.max()) < len(classes) else data


@dataclass(frozen=True)
class CIFAR100:
    """CIFAR-100 (Krizhevsky 2009), 32x32, in its 100 fine classes: 50,000 to train, 10,000 to validate."""

    def load(self, dir: Path) -> tuple[ImageSet, ImageSet | None]:
        folder = dir / "cifar-100-python"
        return both("CIFAR100", dir, folder, ["train", "test", "meta"], f"its folder {folder}", TRAIN, _cifar)


@dataclass(frozen=True)
class SVHN:
    """Street View House Numbers (Netzer et al. 2011), 32x32: 73,257 to train, 26,032 to validate."""

    def load(self, dir: Path) -> tuple[ImageSet, ImageSet | None]:
        files = ["train_32x32.mat", "test_32x32.mat"]
        splits = [{"split": "train"}, {"split": "test"}]
        return both("SVHN", dir, dir, files, f"{' and '.join(files)} in {dir}", splits, self._convert)

    @staticmethod
    def _convert(split: Any) -> ImageSet:
        labels = torch.from_numpy(split.labels).long()
        return ImageSet(torch.from_numpy(split.data), labels, classes=tuple("0123456789"))


@dataclass(frozen=True)
class STL10:
    """STL-10 (Coates et al. 2011), 96x96, ten classes: 5,000 to train, 8,000 to validate."""

    def load(self, dir: Path) -> tuple[ImageSet, ImageSet | None]:
        folder = dir / "stl10_binary"
        files = [f"{split}_{kind}.bin" for split in ("train", "test") for kind in ("X", "y")]
        files.append("unlabeled_X.bin")  # which torchvision wants to see
        splits = [{"split": "train"}, {"split": "test"}]
        return both("STL10", dir, folder, files, f"its folder {folder}", splits, self._convert)

    @staticmethod
    def _convert(split: Any) -> ImageSet:
        labels = torch.from_numpy(split.labels).long()
        return ImageSet(torch.from_numpy(split.data), labels, classes=_words(split.classes))


def read_zip(path: Path) -> ImageSet:
    """All images of a zip in the layout of EDM's dataset tool: of one size, and dataset.json with [name, label] pairs.

    Raises:
        UserError: when the archive or an image in it is damaged, or the images differ in shape.
    """
    return read_all(Zip(gaps=True).catalogues(path)[0])


TRAIN = ({"train": True}, {"train": False})


def both(
    name: str,
    root: Path,
    folder: Path,
    files: Sequence[str],
    where: str,
    splits: Sequence[dict[str, Any]],
    convert: Callable[[Any], ImageSet],
) -> tuple[ImageSet, ImageSet]:
    """Both splits of a torchvision set; see `fetched`.

    Args:
        splits: the arguments that choose each.
        convert: what is made of a split.
    """

    def make(cls: Any) -> tuple[ImageSet, ImageSet]:
        train, test = (convert(cls(str(root), **split, download=True)) for split in splits)
        return train, test

    return fetched(name, root, folder, files, where, make)


def _cifar(split: Any) -> ImageSet:
    images = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(split.targets), classes=tuple(split.classes))


def _words(classes: Sequence[str]) -> tuple[str, ...]:
    """torchvision calls MNIST's classes "0 - zero"."""
    return tuple(name.split(" - ")[0] for name in classes)
