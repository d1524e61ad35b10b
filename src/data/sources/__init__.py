"""Where images come from.

A source has one of two methods. `load(dir)` returns the training images, decoded, and where the set comes with a test
split, the images to validate on; it is for sets whose images are of one size and fit into memory.
`catalogues(dir, labels)` returns the same not decoded yet, for all others: the datamodule decodes them once.
New source: one class with either, one YAML in conf/data.
"""

from pathlib import Path
from typing import Protocol

from src.data.catalogue import Catalogue
from src.data.images import ImageSet
from src.data.sources.digits import Digits
from src.data.sources.downloads import CIFAR10, CIFAR100, MNIST, STL10, SVHN, read_zip
from src.data.sources.folder import Folder
from src.data.sources.zipped import Zip

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "STL10",
    "SVHN",
    "CatalogueSource",
    "Digits",
    "Folder",
    "ImageSet",
    "Source",
    "Zip",
    "read_zip",
]


class Source(Protocol):
    def load(self, dir: Path) -> tuple[ImageSet, ImageSet | None]: ...


class CatalogueSource(Protocol):
    def catalogues(self, dir: Path, labels: str | None = None) -> tuple[Catalogue, Catalogue | None]: ...
