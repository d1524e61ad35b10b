"""Images that are decoded, in memory or in a file that is mapped into it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from src.errors import printable
from src.pictures import to_uint8


class Chosen(Sequence[str]):
    """Those of many names that have the given numbers, which are looked up one by one."""

    def __init__(self, names: Sequence[str], numbers: Tensor) -> None:
        self._names, self._numbers = names, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: Any) -> Any:
        found = self._numbers[i]
        return [self._names[n] for n in found.tolist()] if found.ndim else self._names[int(found)]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their classes; a part of a set may be a choice of its rows, which copies nothing.

    Attributes:
        store: (M, C, H, W), uint8, uint16, or float32 in [-1, 1]; possibly a mapped file, which is never copied whole.
        labels: (N,) int64.
        names: one an image, or None where images have no name but their number.
        classes: the classes' names; none where they have no name but their number.
        rows: (N,) int64, which of the store's images these are; None for all of them.
        mapped: whether the store lies in a file, whose pages are read when they are looked at.
    """

    store: Tensor
    labels: Tensor
    names: Sequence[str] | None = None
    classes: Sequence[str] = ()
    rows: Tensor | None = None
    mapped: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "ImageSet":
        """These images, copied where the index is a tensor."""
        whole = isinstance(index, slice) and self.rows is None
        images = self.store[index] if whole else self.take(self._numbers(index))
        return replace(self.part(index), store=images, rows=None, mapped=self.mapped and whole)

    @cached_property
    def images(self) -> Tensor:
        """(N, C, H, W); the store itself, or the copy of a choice of its rows: `take` a few of those instead."""
        return self.store if self.rows is None else self.store.index_select(0, self.rows)

    @cached_property
    def levels(self) -> Tensor:
        """(N, C, H, W) uint8: the images in the nearest of 256 levels, as samples are, to be compared with these."""
        if self.store.dtype == torch.uint8:
            return self.images
        made = torch.empty(len(self), *self.store.shape[1:], dtype=torch.uint8)
        for part in torch.arange(len(self)).split(4096):
            values = self.take(part).float()
            made[part] = to_uint8(values / 32767.5 - 1 if self.store.dtype == torch.uint16 else values)
        return made

    @property
    def num_levels(self) -> int | None:
        """How many values a pixel can have; None of floats."""
        return {torch.uint8: 2**8, torch.uint16: 2**16}.get(self.store.dtype)

    @property
    def nbytes(self) -> int:
        """Of the pixels of these images alone."""
        return len(self) * self.store[:1].nbytes

    def to(self, device: torch.device) -> "ImageSet":
        """A copy there, which takes no more memory here than a few images do."""
        store = torch.empty(len(self), *self.store.shape[1:], dtype=self.store.dtype, device=device)
        for part in torch.arange(len(self)).split(4096):
            store[part[0] : part[-1] + 1] = self.take(part).to(device)
        return replace(self, store=store, labels=self.labels.to(device), rows=None, mapped=False)

    def take(self, index: Tensor) -> Tensor:
        """The images with these numbers, (B,) int64, copied: (B, C, H, W)."""
        return self.store.index_select(0, index if self.rows is None else self.rows[index])

    def part(self, index: Tensor | slice) -> "ImageSet":
        """These images as a choice of rows; nothing is copied."""
        numbers = self._numbers(index)
        names = None if self.names is None else Chosen(self.names, numbers)
        rows = numbers if self.rows is None else self.rows[numbers]
        return replace(self, labels=self.labels[index], names=names, rows=rows)

    def _numbers(self, index: Tensor | slice) -> Tensor:
        return torch.arange(*index.indices(len(self))) if isinstance(index, slice) else index

    def name(self, i: int) -> str:
        """Of image number i, in one line: its own, or its number in the store."""
        if self.names is None:
            return str(i if self.rows is None else int(self.rows[i]))
        return printable(self.names[i])
