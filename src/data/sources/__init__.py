"""Where images come from.

A source has one of three methods. `load(dir)` returns the training images, decoded, and where the set comes with a test
split, the images to validate on; it is for sets whose images are of one size and fit into memory.
`catalogues(dir, labels)` returns the same not decoded yet, for all others: the datamodule packs them once, and maps
what it packed. `open(dir)` maps what was packed before: that is `src.data.packed.Packed`.
New source: one class with either, one YAML in conf/data.
"""

from pathlib import Path
from typing import Protocol

from src.data.catalogue import Catalogue
from src.data.catalogues.folder import Folder
from src.data.catalogues.hub import Hub
from src.data.catalogues.npz import Npz
from src.data.catalogues.parquet import Parquet
from src.data.catalogues.photographs import CelebA, Flowers102
from src.data.catalogues.zipped import Zip
from src.data.images import ImageSet
from src.data.sources.digits import Digits
from src.data.sources.downloads import CIFAR10, CIFAR100, MNIST, STL10, SVHN, read_zip

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "STL10",
    "SVHN",
    "CatalogueSource",
    "CelebA",
    "Digits",
    "Flowers102",
    "Folder",
    "Hub",
    "ImageSet",
    "Npz",
    "Parquet",
    "Source",
    "Zip",
    "read_zip",
]


class Source(Protocol):
    def load(self, dir: Path) -> tuple[ImageSet, ImageSet | None]: ...


class CatalogueSource(Protocol):
    def catalogues(self, dir: Path, labels: str | None = None) -> tuple[Catalogue, Catalogue | None]: ...
