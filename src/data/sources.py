"""Image sets, decoded once into memory as uint8.

A source has `load(dir)`, which returns the training images and, where the set comes with a test split, the images to
validate on. New source: one class with `load`, one YAML in conf/data.
"""

import io
import json
import socket
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from src.errors import UserError


@dataclass(frozen=True)
class ImageSet:
    """Images and their classes.

    Args:
        images: (N, C, H, W) of uint8, uint16, or float32 in [-1, 1].
        labels: (N,) int64.
        mapped: the images lie in a file, whose pages are read when they are looked at.
    """

    images: Tensor
    labels: Tensor
    mapped: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor | slice) -> "ImageSet":
        return ImageSet(self.images[index], self.labels[index], self.mapped and isinstance(index, slice))


class Source(Protocol):
    def load(self, dir: Path) -> tuple[ImageSet, ImageSet | None]: ...


class Digits:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn bundles (Alpaydin & Kaynak 1998); 17 grey levels."""

    def load(self, dir: Path) -> tuple[ImageSet, ImageSet | None]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        levels = torch.from_numpy(digits.images)  # (1797, 8, 8), 0 to 16
        images = (levels * (255 / 16)).round().to(torch.uint8)[:, None]
        return ImageSet(images, torch.from_numpy(digits.target).long()), None


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
        return _torchvision(self.name, folder, files, f"its four *-ubyte files in {folder}", self._convert)

    @staticmethod
    def _convert(split: Any) -> ImageSet:
        images, labels = split.data, split.targets
        if images.ndim != 3 or len(images) != len(labels):
            raise ValueError(f"holds {tuple(images.shape)} pixels and {len(labels)} labels")
        return ImageSet(images[:, None].contiguous(), labels.long())


@dataclass(frozen=True)
class CIFAR10:
    """CIFAR-10 (Krizhevsky 2009), 32x32: 50,000 to train, 10,000 to validate.

    Taken from `<dir>/cifar10-32x32.zip` in the layout of EDM's dataset tool (and cifar10-32x32-test.zip beside it), or
    else from torchvision's files, which are downloaded if they are not there.
    """

    def load(self, dir: Path) -> tuple[ImageSet, ImageSet | None]:
        train, test = dir / "cifar10-32x32.zip", dir / "cifar10-32x32-test.zip"
        if train.exists():
            return read_zip(train), read_zip(test) if test.exists() else None
        where = f"cifar-10-batches-py in {dir}, or cifar10-32x32.zip as EDM's dataset tool writes it"
        files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        return _torchvision("CIFAR10", dir / "cifar-10-batches-py", files, where, self._convert)

    @staticmethod
    def _convert(split: Any) -> ImageSet:
        images = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        return ImageSet(images, torch.tensor(split.targets))


def read_zip(path: Path) -> ImageSet:
    """Reads a zip in the layout of EDM's dataset tool: images of one size, and dataset.json with [name, label] pairs.

    Raises:
        UserError: when the archive or an image in it is damaged, or the images differ in shape.
    """
    from PIL import Image

    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if n.lower().endswith((".png", ".jpg", ".jpeg")))
            if not names:
                raise UserError(f"{path} holds no images; make it anew with EDM's dataset tool")
            arrays = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]
            shapes = {array.shape for array in arrays}
            if len(shapes) > 1:
                raise UserError(f"{path} holds images of different shapes: {sorted(shapes)[:3]}; make them one size")
            labels = (
                json.loads(archive.read("dataset.json")).get("labels") if "dataset.json" in archive.namelist() else None
            )
            by_name = dict(labels) if labels else dict.fromkeys(names, 0)
            y = torch.tensor([by_name[name] for name in names])
    except (
        zipfile.BadZipFile,
        OSError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        SyntaxError,
    ) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged or not what it says ({error}); delete it and make it anew") from error
    x = torch.from_numpy(np.stack(arrays))
    x = x[..., None] if x.ndim == 3 else x
    return ImageSet(x.permute(0, 3, 1, 2).contiguous(), y)


def _torchvision(
    name: str, folder: Path, files: list[str], where: str, convert: Callable[[Any], ImageSet]
) -> tuple[ImageSet, ImageSet]:
    """Both splits of a torchvision set, downloaded where they are not there.

    Args:
        name: torchvision's class.
        folder: where torchvision keeps the files, below the root that it is given.
        files: what must be there.
        where: the same for a reader.
        convert: makes an ImageSet of a split.

    Raises:
        UserError: when the files are missing and cannot be downloaded, or are damaged.
    """
    import torchvision.datasets

    root = folder.parent.parent if folder.name == "raw" else folder.parent
    missing = [file for file in files if not (folder / file).exists()]
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # a download that stalls ends
    try:
        cls = getattr(torchvision.datasets, name)
        splits = [cls(str(root), train=train, download=True) for train in (True, False)]
        train, test = (convert(split) for split in splits)
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
    return train, test
