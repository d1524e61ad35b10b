"""Images that lie somewhere, not decoded yet: what folders, archives and tables have in common."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from src.errors import printable


class BrokenImageError(Exception):
    """An image that cannot be read.

    Args:
        name: of the image, as its catalogue calls it.
        reason: in words that go on after "<name> ".
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # as they are, for pickle
        self.name = printable(name)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


class Catalogue(Protocol):
    """All images of a place, in an order that depends on their names alone.

    It can be pickled, for the processes that decode: files are opened when they are first read.

    Attributes:
        where: the place, as the user called it.
        names: one an image, unique.
        labels: (N,) int64, 0 to len(classes) - 1.
        classes: the names of the classes; one, empty, where there are none.
    """

    @property
    def where(self) -> str: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def labels(self) -> NDArray[np.int64]: ...
    @property
    def classes(self) -> Sequence[str]: ...

    def read(self, i: int) -> NDArray[np.generic]:
        """Image number i, (H, W, C) of uint8, uint16 or float32.

        Raises:
            BrokenImageError: when it cannot be read.
        """
        ...

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or written anew; costs no reading of pixels."""
        ...
