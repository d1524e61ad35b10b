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
