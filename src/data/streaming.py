"""Batches of an endless stream that is read as it goes: the loader of `src.data.lanes`."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from multiprocessing.synchronize import Event
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from src.data.augmentation import Augmentation, flip
from src.data.lanes import Failed, Lane, Place, Window, Windows, note
from src.data.loader import AHEAD, Batch, check_shared, normalize
from src.data.prefetch import ahead
from src.errors import UserError
from src.randomness import generator, mix

BLOCK = 1024  # images whose flips and augmentations are drawn together


class StreamLoader:
    """Batches of the images of all lanes in turn; a rank has the lanes rank, rank + world_size, ...

    Image number k of the stream, its flip and its augmentation are functions of the seed, whatever the batch size, the
    workers and the ranks.

    Args:
        lanes: all of them, as many for each rank.
        places: where they stood when `start` images had been seen, or before; see `places_at`.
        device: where batches are wanted.
        batch_size: images a batch, of all ranks together.
        flip: mirror each image left to right with probability 1/2.
        workers: processes that read and decode; 0 for this one.
        max_broken: so many samples and shards, of all lanes of this rank, may be skipped.
        start: images of the stream that were seen before.

    Raises:
        ValueError: when the ranks cannot share a batch, or the lanes, evenly.
        UserError: while it is iterated, when too much is broken.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        places: Sequence[Place],
        device: torch.device,
        batch_size: int,
        flip: bool,
        augment: Augmentation,
        seed: int,
        workers: int = 0,
        max_broken: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        check_shared(batch_size, world_size)
        if len(lanes) % world_size:
            raise ValueError(
                f"lanes={len(lanes)} cannot be shared evenly by {world_size} processes; choose a multiple of them"
            )
        self.own = range(rank, len(lanes), world_size)
        self.lanes = [lanes[i] for i in self.own]
        self.round = len(lanes) * lanes[0].size  # images of a window from each lane
        self.share = batch_size // world_size
        self.device = device
        self.flip = flip
        self.augment = augment
        self.seed = seed
        self.workers = max(n for n in range(workers + 1) if n == 0 or len(self.own) % n == 0)
        self.max_broken = max_broken
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self.places = {start // self.round: [places[i] for i in self.own]}  # of a few rounds, before them
        self.broken: list[str] = []
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    def __iter__(self) -> Iterator[Batch]:
        parts = self._parts()
        pinned = self.device.type == "cuda"
        for images, *others in ahead(parts, AHEAD) if pinned else parts:
            x0 = normalize(images.to(self.device, non_blocking=True)).permute(0, 3, 1, 2).contiguous()
            label, numbers, mirrored, parameters = (v.to(self.device, non_blocking=True) for v in others)
            if self.flip:
                x0 = flip(x0, mirrored)
            x0, told = self.augment(x0, parameters)
            yield Batch(x0, label, numbers, told)

    def places_at(self, images: int) -> list[tuple[int, Place]]:
        """Number and place of each lane of this rank before the window that image number `images` is in."""
        return list(zip(self.own, self.places[images // self.round], strict=True))

    def _parts(self) -> Iterator[tuple[Tensor, ...]]:
        """Images, labels, numbers, flips and parameters of a batch, on the CPU."""
        first = self.start // self.round
        rounds = self._rounds(first)
        low = (self.start % self.round) // self.world_size  # of this rank's images of the round
        number = self.start
        held: list[tuple[Tensor, Tensor]] = []
        while True:
            while sum(len(images) for images, _ in held) - low < self.share:
                held.append(next(rounds))
            images, labels = (torch.cat(v) if len(v) > 1 else v[0] for v in zip(*held, strict=True))
            held = [(images, labels)]
            high = low + self.share
            numbers = torch.arange(number + self.rank, number + self.share * self.world_size, self.world_size)
            part: tuple[Tensor, ...] = (images[low:high], labels[low:high], numbers, *self._draw(numbers))
            if self.device.type == "cuda":
                part = tuple(v.pin_memory() for v in part)
            yield part
            low, number = high, number + self.share * self.world_size
            if low == len(images):
                held, low = [], 0

    def _rounds(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images, (n, H, W, C), and labels of one round after another: image i is from lane i mod lanes."""
        number = first
        with closing(self._windows(first)) as windows:
            while True:
                found = [self._checked(next(windows)) for _ in self.lanes]
                number += 1
                self.places[number] = [window.after for window in found]
                for old in [n for n in self.places if n < number - self._kept]:
                    del self.places[old]
                images = torch.stack([torch.from_numpy(w.images) for w in found], 1).flatten(0, 1)
                yield images, torch.stack([torch.from_numpy(w.labels) for w in found], 1).flatten()

    @property
    def _kept(self) -> int:
        """Rounds whose places may still be asked for: batches are ahead of the step that a checkpoint is of."""
        return 2 + (AHEAD + 2) * self.share * self.world_size // self.round

    def _windows(self, first: int) -> Generator[Window | Failed, None, None]:
        windows = Windows(self.lanes, self.places[first], first)
        if not self.workers:
            yield from windows
        each = max(1, len(self.lanes) // self.workers)  # windows ahead: about a round
        over = multiprocessing.Event()
        atexit.register(over.set)  # before multiprocessing's own, which ends the workers that are left and waits
        loader = DataLoader(
            windows,
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            prefetch_factor=each,
            worker_init_fn=partial(_left_alone, over),
            generator=torch.Generator(),  # of seeds that nobody uses; else torch's own would be drawn from
        )
        read = iter(loader)
        try:
            while True:
                yield next(read)
        finally:
            del read  # now, and not when an exception that remembers it is forgotten: it ends the workers

    def _checked(self, window: Window | Failed) -> Window:
        if isinstance(window, Failed):
            raise UserError(window.sentence)
        for sentence in window.broken:
            if note(sentence, self.broken, self.max_broken):
                print(f"skipped: {sentence} ({len(self.broken)} of {self.max_broken})", flush=True)
        return window

    def _draw(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Flips and parameters of augmentation for those images of the stream."""
        first, last = int(numbers[0]) // BLOCK, int(numbers[-1]) // BLOCK
        blocks = {}
        for block in range(first, last + 1):
            if (drawn := self._blocks.get(block)) is None:
                g = generator(mix(self.seed, 0xDA7A), block)
                drawn = torch.rand(BLOCK, generator=g) < 0.5, self.augment.draw(BLOCK, g)
            blocks[block] = drawn
        self._blocks = blocks
        mirrored, parameters = (torch.cat(v) for v in zip(*blocks.values(), strict=True))
        rows = numbers - first * BLOCK
        return mirrored[rows], parameters[rows]


def _as_it_is(item: Any) -> Any:
    return item


def _left_alone(over: Event, worker: int) -> None:
    """Signals that stop training, which schedulers send to all processes, are for the one that trains, which goes on
    until it has saved; a worker ends when that one says so, or is gone, and by SIGTERM when it is `over`."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if over.is_set() else None)
