"""In which order training sees images: an endless stream, cut into epochs, each a pure function of seed and number."""

from typing import Protocol

import torch
from torch import Tensor

from src.randomness import generator, mix


class Order(Protocol):
    """Attributes:
    length: images an epoch.
    """

    length: int

    def __call__(self, epoch: int, g: torch.Generator) -> Tensor:
        """The images' numbers in their set, (length,) int64, of one epoch, whose generator is `g`."""
        ...


class Shuffled:
    """Each image exactly once an epoch."""

    def __init__(self, images: int) -> None:
        self.length = images

    def __call__(self, epoch: int, g: torch.Generator) -> Tensor:
        return torch.randperm(self.length, generator=g)


class Balanced:
    """Each class equally often, whatever its size; within a class, each image once before any comes again.

    The stream is made of rounds that hold each class once, in an order of their own. An epoch is as many rounds as make
    it about as long as the set. So a class of 10 images is seen 100 times as often an image as one of 1,000: what is
    learned is p(x | y) with all y equally likely, and not the distribution of the set.

    Args:
        labels: (N,) int64; classes without images do not count.
        seed: of the orders within classes.
    """

    def __init__(self, labels: Tensor, seed: int) -> None:
        labels = labels.cpu()
        by_class = labels.argsort(stable=True)
        sizes: list[int] = labels.unique(return_counts=True)[1].tolist()
        self.members = by_class.split(sizes)
        self.rounds = -(-len(labels) // len(self.members))
        self.length = self.rounds * len(self.members)
        self.seed = seed

    def __call__(self, epoch: int, g: torch.Generator) -> Tensor:
        classes = torch.rand(self.rounds, len(self.members), generator=g).argsort(1)
        turns = [self._turns(c, epoch * self.rounds, self.rounds) for c in range(len(self.members))]
        return torch.stack(turns, 1).gather(1, classes).flatten()

    def _turns(self, c: int, first: int, count: int) -> Tensor:
        """Images number first to first + count of the endless stream of class c: one permutation after another."""
        n = len(self.members[c])
        parts = []
        for lap in range(first // n, -(-(first + count) // n)):
            parts.append(torch.randperm(n, generator=generator(mix(self.seed, c), lap)))
        return self.members[c][torch.cat(parts)[first % n :][:count]]
