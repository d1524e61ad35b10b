"""An endless stream of shards' images, shuffled, which can be gone on with from anywhere.

The stream has `lanes`, a fixed number of them, whatever processes and workers there are. In each epoch the shards are
shuffled and dealt out to the lanes, so that each comes once; a lane reads its shards one after another, an epoch after
the other, in windows of a fixed number of images, and shuffles each window. Image number k of the stream is from lane
k mod lanes: neighbours are from different shards. A process has every world_size-th lane, and its part of a batch
comes from these; workers have a process's lanes among them. The stream is a function of seed, shards, lanes and window.

A lane's place is three numbers, and its windows' order depends on their number alone: to go on, a lane passes over the
part of one shard that it has read, decodes one window anew, and is where it was.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from src.data.catalogue import BrokenImageError
from src.data.shards import Sample, samples
from src.errors import UserError
from src.randomness import generator, mix

Decoded = tuple[np.ndarray, int]  # (H, W, C), and the label


class Place(NamedTuple):
    """Where a lane stands: epoch, which of its shards of that epoch, and how many of that one's samples are behind."""

    epoch: int = 0
    shard: int = 0
    sample: int = 0


class Window(NamedTuple):
    """Images of one lane, shuffled.

    Attributes:
        images: (n, H, W, C).
        labels: (n,) int64.
        after: where the lane stands after them.
        broken: what could not be read, in words, a sentence each.
    """

    images: np.ndarray
    labels: np.ndarray
    after: Place
    broken: list[str]


@dataclass
class Lane:
    """Args:
    number, lanes: which of how many.
    shards: all shards.
    size: images a window.
    decode: makes an image and its label of a sample; raises BrokenImageError.
    max_broken: so many samples and shards may be skipped.
    """

    number: int
    lanes: int
    shards: Sequence[str]
    size: int
    decode: Callable[[Sample], Decoded]
    seed: int
    max_broken: int = 0
    broken: list[str] = field(default_factory=list)

    def of_epoch(self, epoch: int) -> list[str]:
        """This lane's shards in that epoch."""
        order = torch.randperm(len(self.shards), generator=generator(mix(self.seed, 0x5AAD), epoch))
        return [self.shards[i] for i in order[self.number :: self.lanes].tolist()]

    def windows(self, place: Place, first: int) -> Iterator[Window]:
        """The windows from `place` on, of which the first is number `first`.

        Raises:
            UserError: when more is broken than may be, an epoch has no image, or a shard cannot be read.
        """
        number, images, labels, broken = first, [], [], []
        for after, sample in self.samples(place):
            try:
                if isinstance(sample, BrokenImageError):
                    raise sample
                image, label = self.decode(sample)
            except BrokenImageError as error:
                broken.append(str(error))
                note(str(error), self.broken, self.max_broken)
                continue
            images.append(image)
            labels.append(label)
            if len(images) == self.size:
                order = torch.randperm(self.size, generator=generator(mix(self.seed, self.number), number)).numpy()
                yield Window(np.stack(images)[order], np.array(labels, dtype=np.int64)[order], after, broken)
                number, images, labels, broken = number + 1, [], [], []

    def samples(self, place: Place) -> Generator[tuple[Place, Sample | BrokenImageError], None, None]:
        """The samples from `place` on, and where the lane stands after each; a shard that is damaged is one, too.

        Raises:
            UserError: when an epoch has no sample, or a shard cannot be read.
        """
        epoch, start, skip = place
        while True:
            found = start > 0 or skip > 0
            for i, shard in enumerate(self.of_epoch(epoch)[start:], start):
                n = skip
                try:
                    for sample in samples(shard, skip):
                        n, found = n + 1, True
                        yield Place(epoch, i, n), sample
                except BrokenImageError as error:
                    yield Place(epoch, i + 1), error
                skip = 0
            if not found:
                raise UserError(f"{self.of_epoch(epoch)[0]} holds no samples: files such as 000017.jpg and 000017.cls")
            epoch, start = epoch + 1, 0


def note(sentence: str, broken: list[str], most: int) -> bool:
    """Adds what is broken to what was before, and says whether it is new.

    Raises:
        UserError: when there is more than may be skipped.
    """
    if sentence in broken:  # in an epoch before
        return False
    broken.append(sentence)
    if len(broken) > most:
        before = f" ({most} were skipped before)" if most else ""
        raise UserError(
            f"{sentence}{before}; mend or remove it, or skip what is broken with data.max_broken={most + 1}"
        )
    return True


class Failed(NamedTuple):
    """What a worker hands over in the place of a window when it cannot go on."""

    sentence: str


class Windows(IterableDataset[Any]):
    """The windows of lanes in turn, of a worker those of its lanes: in all, the same as without workers.

    Args:
        lanes: as many for each worker.
        places: where they stand.
        first: the number of their first windows.
    """

    def __init__(self, lanes: Sequence[Lane], places: Sequence[Place], first: int) -> None:
        self.lanes = lanes
        self.places = places
        self.first = first

    def __iter__(self) -> Iterator[Window | Failed]:
        worker = get_worker_info()
        own = slice(None) if worker is None else slice(worker.id, None, worker.num_workers)
        pairs = zip(self.lanes[own], self.places[own], strict=True)
        streams = [lane.windows(place, self.first) for lane, place in pairs]
        while True:
            for stream in streams:
                try:
                    yield next(stream)
                except UserError as error:  # which would come through a worker's queue with its traceback as text
                    yield Failed(str(error))
                    return
