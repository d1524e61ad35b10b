"""Random numbers as pure functions of what they belong to: nothing here depends on what was drawn before.

Torch's CPU generator takes 32 bits of seed. Seeds are therefore a scrambled start plus a counter: hashes of
(seed, counter) would collide (among 50,000 samples, one in four sets would hold a twin), consecutive numbers cannot.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def mix(*numbers: int) -> int:
    """A 32-bit seed from any integers; neighbours differ in about half of their bits (splitmix64's finaliser)."""
    z = 0
    for number in numbers:
        z = (z + number + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
    return z % 2**32


def another(seed: int, times: int) -> int:
    """The seed of training after it has gone back so many times: the run's own at first, then others."""
    return mix(seed, times) if times else seed


def generator(start: int, counter: int) -> torch.Generator:
    """A CPU generator for one item of a series that `mix` has started."""
    return torch.Generator().manual_seed((start + counter) % 2**32)


def seed_device(device: torch.device, seed: int) -> None:
    """Seeds torch's global generators of the CPU and of one device.

    `torch.manual_seed` asks every backend that was compiled in, 0.3 ms a call; this takes microseconds.
    """
    torch.default_generator.manual_seed(seed % 2**32)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed % 2**32)
    elif device.type == "mps":
        torch.mps.manual_seed(seed % 2**32)


GOLDEN = 0x9E3779B9 - 2**32  # 2^32 over the golden ratio, as int32: multiples of it are spread evenly


def scramble(x: Tensor) -> Tensor:
    """int32 numbers so mixed that neighbours share no more bits than strangers; one to one, on any device.

    Two rounds of multiplication and shifted exclusive or, the form of MurmurHash3's finaliser, with the constants of
    lowest bias that Wellons found by search (2018, "Prospecting for Hash Functions").
    """
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


class RowNoise:
    """Normal numbers for rows of a step's batch, such that row i depends on (seed, step, i) alone.

    The batch may be split over processes and accumulated parts in any way: blocks of `BLOCK` rows have a seed each, and
    whoever needs a row draws its block.

    Args:
        seed: any integer; other series of the same step need others.
        device: where the numbers are drawn; the CPU and a GPU draw different ones.
    """

    BLOCK = 64

    def __init__(self, seed: int, device: torch.device) -> None:
        self.start = mix(seed)
        self.device = device
        self.generator = torch.Generator(device)

    def __call__(self, step: int, rows: range, total: int, shape: Sequence[int]) -> Tensor:
        """(len(rows), *shape) for those rows of the `total` of step `step`."""
        blocks = -(-total // self.BLOCK)
        drawn = []
        first = rows.start // self.BLOCK
        for block in range(first, -(-rows.stop // self.BLOCK)):
            self.generator.manual_seed((self.start + step * blocks + block) % 2**32)
            size = min(self.BLOCK, total - block * self.BLOCK)
            drawn.append(torch.randn(size, *shape, generator=self.generator, device=self.device))
        whole = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        return whole[rows.start - first * self.BLOCK :][:: rows.step][: len(rows)]


class NoiseStream:
    """Noise for the samples with the given indices, such that sample i depends on (seed, i) alone.

    Each sample owns a generator, so neither the batch nor the device changes what it draws: noise is made on the CPU,
    for a few steps at a time. `first` is drawn before: all samplers start from the same latents. The series of two
    seeds are stretches of 2^32 numbers that may overlap, shifted, with a chance of about N / 2^31 for N samples.

    Args:
        seed: any integer.
        indices: the samples' numbers.
        shape: (C, H, W) of one sample.
        device: where the noise is wanted.
    """

    BLOCK = 2**14  # numbers a generator draws at a time, about

    def __init__(
        self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> None:
        start = mix(seed)
        self.generators = [generator(start, i) for i in indices]
        self.shape = shape
        self.device = torch.device(device)
        self.first = self._draw(1)[:, 0]
        self._steps = max(1, self.BLOCK // max(1, self.first[0].numel()))
        self._block = self.first[:, None][:, :0]  # (B, steps, C, H, W), of which `_used` are given away
        self._used = 0

    def __call__(self) -> Tensor:
        """The next z, (B, C, H, W)."""
        if self._used == self._block.shape[1]:
            self._block, self._used = self._draw(self._steps), 0
        self._used += 1
        return self._block[:, self._used - 1]

    def _draw(self, steps: int) -> Tensor:
        """(B, steps, C, H, W), sample i from its generator alone."""
        pinned = self.device.type == "cuda"
        draws = torch.empty(len(self.generators), steps, *self.shape, pin_memory=pinned)
        for row, source in zip(draws, self.generators, strict=True):
            row.normal_(generator=source)
        return draws.to(self.device, non_blocking=True)
