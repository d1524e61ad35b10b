"""A catalogue that lies in memory, or is slow, for tests; without torch, so that what decodes starts at once."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from src.data.catalogue import BrokenImageError


@dataclass
class Made:
    """Images in memory, those in `broken` unreadable.

    Args:
        delay: seconds that reading an image takes.
        noted: a folder in which each process that reads leaves its number.
    """

    images: list[NDArray]
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    classes: tuple[str, ...] = ("",)
    broken: tuple[int, ...] = ()
    delay: float = 0.0
    noted: Path | None = None
    where: str = "made"
    version: int = 0

    def __post_init__(self) -> None:
        self.names = [f"{i:05}.png" for i in range(len(self.images))]
        if len(self.labels) != len(self.images):
            self.labels = np.zeros(len(self.images), np.int64)

    def read(self, i: int) -> NDArray:
        if self.noted is not None:
            (self.noted / str(os.getpid())).touch()
        time.sleep(self.delay)
        if i in self.broken:
            raise BrokenImageError(self.names[i], "is cut short")
        return self.images[i]

    def fingerprint(self) -> str:
        return f"version {self.version}"


def noise(n: int, shape: tuple[int, ...] = (6, 5, 3), dtype: str = "uint8", seed: int = 0) -> list[NDArray]:
    """Images of uniform noise, (H, W, C)."""
    g = np.random.default_rng(seed)
    if dtype == "float32":
        return [g.uniform(-1, 1, shape).astype(np.float32) for _ in range(n)]
    return list(g.integers(0, np.iinfo(dtype).max, (n, *shape), dtype=dtype, endpoint=True))
