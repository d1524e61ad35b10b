"""Batches straight from one tensor of images: one index_select a batch, all else on the whole batch, on the device."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from src.data.augmentation import Augmentation, Nothing, flip
from src.data.images import ImageSet
from src.data.order import Balanced, Order, Shuffled
from src.data.prefetch import ahead
from src.randomness import generator, mix

AHEAD = 3  # batches that are fetched ahead
SHARE_OF_CACHE = 0.5  # of the machine's memory, where a mapped file is taken to stay once it was read
LEVELS = {torch.uint8: 255, torch.uint16: 65535}


class Batch(NamedTuple):
    """What a step gets.

    Attributes:
        x0: (B, C, H, W) float32 in [-1, 1].
        label: (B,) int64.
        index: (B,) int64, the images' numbers in their set.
        augment: (B, A) float32, what was done to the image, in the numbers that its augmentation tells; zeros for
            nothing, and A = 0 of an augmentation that tells nothing.
    """

    x0: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]
    augment: Tensor


def normalize(images: Tensor) -> Tensor:
    """uint8 in [0, 255] or uint16 in [0, 65535] to float32 in [-1, 1]; float32 stays as it is."""
    if images.dtype == torch.float32:
        return images
    if images.dtype == torch.uint16:  # which few kernels know
        images = images.view(torch.int16).int().bitwise_and_(0xFFFF)
        return images.float().mul_(2 / LEVELS[torch.uint16]).sub_(1)
    return images.float().mul_(2 / 255).sub_(1)


class TrainLoader:
    """An endless stream of shuffled batches; training counts steps, and epochs are only a number it can report.

    The stream is one permutation of all images after another, each with flips and augmentations of its own, a pure
    function of the seed: image number k is the same whatever the batch size and the number of processes (augmented by
    interpolation up to rounding, which kernels choose by the size of a batch). Each image comes exactly once an epoch;
    a batch may hold the end of one and the beginning of the next, so no remainder is dropped, repeated, or smaller.
    With `drop_last` each epoch ends with its last whole batch: what is left of its permutation, other images in each
    epoch, is left out, and the stream depends on the batch size, too.

    Images that a GPU has no room for are fetched ahead by a thread, into pinned memory; on a CPU those of a mapped file
    that is too large to stay in the system's cache, where a thread would otherwise take more than it gives.

    Args:
        data: the images, on the device that trains when they fit there.
        device: where batches are wanted.
        batch_size: images a batch, of all ranks together; a rank takes its part of each.
        flip: mirror each image left to right with probability 1/2.
        start: images of the stream that were seen before.
        augment: what else is done to images, on the device.
        balance: each class equally often; see `Balanced`.
        drop_last: see above.

    Raises:
        ValueError: when the ranks cannot share a batch evenly, or a batch holds more than all images.
    """

    def __init__(
        self,
        data: ImageSet,
        device: torch.device,
        batch_size: int,
        flip: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        augment: Augmentation | None = None,
        balance: bool = False,
        drop_last: bool = False,
    ) -> None:
        if batch_size > len(data):
            raise ValueError(f"{len(data)} images do not fill one batch of {batch_size}")
        check_shared(batch_size, world_size)
        self.data = data
        self.device = device
        self.batch_size = batch_size
        self.flip = flip
        self.augment = Nothing() if augment is None else augment
        self.seed = seed
        self.rank = rank
        self.share = batch_size // world_size
        self.start = start
        self.order: Order = Balanced(data.labels, mix(seed, 0xBA1A)) if balance else Shuffled(len(data))
        n = self.order.length
        self.length = n - n % batch_size if drop_last else n  # images an epoch
        self.pinned = device.type == "cuda" and data.store.device.type == "cpu"
        self.ahead = self.pinned or (data.mapped and data.nbytes > SHARE_OF_CACHE * _memory())
        images = data.store.view(torch.int16) if data.store.dtype == torch.uint16 else data.store
        self.channels_last = not images.is_contiguous() and images.permute(0, 2, 3, 1).is_contiguous()
        self.rows = images.permute(0, 2, 3, 1) if self.channels_last else images  # as they lie: a row is one stretch
        self._epoch = -1
        self._drawn: tuple[Tensor, ...] = ()

    def __iter__(self) -> Iterator[Batch]:
        parts = self._parts()
        for part in ahead(parts, AHEAD) if self.ahead else parts:
            yield self._batch(*part)

    def _parts(self) -> Iterator[tuple[Tensor, ...]]:
        low = self.start + self.rank * self.share
        while True:
            index, *drawn = self._draw(low, low + self.share)
            images = self._select(self.rows, index if self.data.rows is None else self.data.rows[index])
            yield (images, self._select(self.data.labels, index), index, *drawn)
            low += self.batch_size

    def _draw(self, low: int, high: int) -> tuple[Tensor, ...]:
        """Images, flips and parameters of augmentation, number low to high of the stream."""
        n = self.length
        epoch, first = divmod(low, n)
        if epoch != self._epoch:
            g = generator(mix(self.seed, 0xDA7A), epoch)
            order = self.order(epoch, g)[:n].to(self.data.store.device)
            mirrored = (torch.rand(n, generator=g) < 0.5).to(self.device)
            self._drawn = order, mirrored, self.augment.draw(n, g).to(self.device)
            self._epoch = epoch
        part = tuple(drawn[first : first + high - low] for drawn in self._drawn)
        if high <= (epoch + 1) * n:
            return part
        rest = self._draw((epoch + 1) * n, high)
        return tuple(torch.cat(pair) for pair in zip(part, rest, strict=True))

    def _select(self, values: Tensor, index: Tensor) -> Tensor:
        if not self.pinned:
            return values.index_select(0, index)
        rows = torch.empty(len(index), *values.shape[1:], dtype=values.dtype, pin_memory=True)
        return torch.index_select(values, 0, index, out=rows)

    def _batch(self, images: Tensor, label: Tensor, index: Tensor, mirrored: Tensor, parameters: Tensor) -> Batch:
        images = images.to(self.device, non_blocking=True)
        if self.channels_last:
            images = images.permute(0, 3, 1, 2).contiguous()
        if self.data.store.dtype == torch.uint16:
            images = normalize(images.view(torch.uint16))
        if self.flip:
            images = flip(images, mirrored)  # of bytes where they are bytes: a quarter of the work
        x0, told = self.augment(normalize(images), parameters)
        return Batch(x0, label.to(self.device, non_blocking=True), index, told)


class EvalLoader:
    """All images once, in order, never augmented; rank r takes the images r, r + world_size, ...

    All ranks have equally many batches, though some images fewer: a sharded network must be called equally often.
    """

    def __init__(
        self, data: ImageSet, device: torch.device, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.data = data
        self.device = device
        self.index = torch.arange(rank, len(data), world_size)
        self.batches = -(-len(data) // (world_size * batch_size))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        for index in self.index.tensor_split(self.batches):
            part = self.data[index]
            x0, label = normalize(part.images.to(self.device)), part.labels.to(self.device)
            yield Batch(x0, label, index, x0.new_empty(len(x0), 0))


def _memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_shared(batch_size: int, world_size: int) -> None:
    """Refuses a batch that the ranks cannot share evenly.

    Raises:
        ValueError: naming both.
    """
    if batch_size % world_size:
        raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {world_size} processes")
