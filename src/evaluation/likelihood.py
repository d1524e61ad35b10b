"""Bits per dimension of a model on real images: the mean over images, its standard error, and what it is made of.

Noise, dequantisation and probes of image i depend on (seed, i) alone. A network with self-conditioning is given zeros:
its answer must depend on the noisy image alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from src.build import refusals
from src.data.loader import normalize
from src.data.sources import ImageSet
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.guidance import Denoiser
from src.diffusion.likelihood import (
    Bound,
    Variance,
    dequantized,
    dequantized_bits,
    ode_density,
    rademacher,
    stratified_times,
    unit_probes,
    vlb,
)
from src.diffusion.schedules import DiscreteSchedule
from src.errors import UserError
from src.evaluation.scores import Score
from src.processes import ALONE, Group
from src.randomness import NoiseStream, generator, mix
from src.threads import Tick, in_threads, share_out

T = TypeVar("T")
CHAIN, TIMES, ODE = 0xC4A1, 0x71E5, 0x0DE  # the series of random numbers


@dataclass(frozen=True)
class Subject:
    """What is scored: a network with its diffusion, on images with their labels, in batches on the network's device.

    `data` was held out from training; `trained` are as many images that were not.

    Each process of the group scores its share of the batches; the first has the result.
    """

    diffusion: GaussianDiffusion
    net: nn.Module
    data: ImageSet
    batch_size: int
    seed: int
    group: Group = ALONE
    trained: ImageSet | None = None

    def on_training_images(self) -> "Subject":
        assert self.trained is not None
        return replace(self, data=self.trained)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of everything but the network."""
        return torch.float32 if self.device.type == "mps" else torch.float64


def _levels(subject: Subject) -> int:
    """How many grey levels the images have.

    Raises:
        ValueError: when they are floats.
    """
    levels = subject.data.num_levels
    if levels is None:
        raise ValueError(
            "bits per dimension are those of whole numbers, and these images are floats; leave this score out, or "
            "score images of 8 or 16 bits"
        )
    return levels


class Part(NamedTuple):
    """One batch of a subject.

    Attributes:
        images: (B, C, H, W) uint8.
        indices: their numbers.
        denoise: the network's guess of x0, given the images' labels if it takes any.
        progress: takes the share of the batch that is done.
    """

    images: Tensor
    indices: range
    denoise: Denoiser
    progress: Callable[[float], object]


def each(subject: Subject, name: str, batches: list[range], work: Callable[[Part], T]) -> list[T]:
    """What `work` makes of each batch, in their order, in the first process, under a progress bar; [] in the others.

    Raises:
        UserError: for a ValueError of `work`, in all processes.
    """
    group = subject.group
    own = group.share(batches)
    subject.net.requires_grad_(False)
    labelled = getattr(subject.net, "num_classes", None) is not None
    layout = "{desc} {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}, {remaining} left, {rate_fmt}]"
    desc = name if group.size == 1 else f"{name}, the share of 1 of {group.size} processes"

    def of(indices: range, tick: Tick) -> T:
        part = subject.data[indices.start : indices.stop]
        y = part.labels.to(subject.device) if labelled else None
        before = 0.0

        def denoise(x: Tensor, level: Any) -> Any:
            return subject.diffusion.denoiser(subject.net, y)(x, level)  # a new one remembers nothing

        def progress(share: float) -> None:
            nonlocal before
            tick((share - before) * len(indices))
            before = share

        return work(Part(part.images, indices, denoise, progress))

    bar = tqdm(
        total=sum(map(len, own)),
        desc=desc,
        unit="image",
        dynamic_ncols=True,
        bar_format=layout,
        disable=not group.first,
    )

    def update(images: float) -> None:
        bar.update(min(images, bar.total - bar.n))  # shares may add up to a little more than 1

    with group.agreement(), refusals(name), bar:
        made = in_threads(of, own, subject.device, update)
    return group.gather(made)


@dataclass(frozen=True)
class Vlb:
    """The variational bound of the whole chain (Eq. 5, Ho et al. 2020).

    Args:
        num_times: None for all T terms; fewer for an unbiased estimate from so many times, the same for all images, so
            that the standard error over images does not cover their choice.
        variance: of the reverse steps; auto is learned for networks that learn it, otherwise posterior.
        clip: clip the guess of x0 to [-1, 1].

    Raises:
        ValueError: when num_times is less than 1.
    """

    num_times: int | None = None
    variance: Literal["auto", "posterior", "beta", "learned"] = "auto"
    clip: bool = True

    def __post_init__(self) -> None:
        if self.num_times is not None and self.num_times < 1:
            raise ValueError(f"num_times={self.num_times} must be at least 1, or null for all")

    def refuse(self, subject: Subject) -> None:
        """Before anything is computed.

        Raises:
            ValueError: where this bound does not exist.
        """
        schedule, learned = subject.diffusion.schedule, getattr(subject.net, "learned_variance", False)
        if not isinstance(schedule, DiscreteSchedule):
            raise ValueError(
                f"the variational bound is that of a chain of discrete steps, which {type(schedule).__name__} is not; "
                "take scores=[ode]"
            )
        if self.variance == "learned" and not learned:
            raise ValueError("variance=learned needs a network that learns it; choose posterior or beta")
        _levels(subject)
        self._times(subject)

    def __call__(self, subject: Subject) -> dict[str, Score]:
        """The score, in bits per dimension; {} in processes other than the first."""
        learned = getattr(subject.net, "learned_variance", False)
        auto: Variance = "learned" if learned else "posterior"
        variance = auto if self.variance == "auto" else self.variance
        times = self._times(subject)
        schedule, levels = subject.diffusion.schedule, _levels(subject)

        def bound(part: Part) -> Bound:
            x0 = normalize(part.images).to(subject.device, subject.dtype)
            noise = NoiseStream(mix(subject.seed, CHAIN), part.indices, tuple(x0.shape[1:]), subject.device)
            with torch.no_grad():
                rows = vlb(part.denoise, schedule, x0, noise, variance, self.clip, times, part.progress, levels)
            return Bound(*(row.cpu().double() for row in rows))

        shape = tuple(subject.data.images.shape[1:])
        batches = share_out(len(subject.data), subject.batch_size, shape, subject.device, subject.group)
        bounds = each(subject, "vlb", batches, bound)
        if not bounds:
            return {}
        total, terms, prior = (torch.cat(rows) for rows in zip(*bounds, strict=True))
        details = {
            "prior": float(prior.mean()),
            "terms": terms.mean(0).tolist(),
            "times": list(range(terms.shape[1])) if times is None else times,
            "num_times": self.num_times,
            "num_timesteps": subject.diffusion.schedule.chain_length,
            "variance": variance,
            "clip": self.clip,
            "levels": levels,
        }
        return {"vlb": mean_and_error(total, details)}

    def _times(self, subject: Subject) -> list[int] | None:
        if self.num_times is None:
            return None
        T = subject.diffusion.schedule.chain_length
        return stratified_times(T, self.num_times, generator(mix(subject.seed, TIMES), 0))


@dataclass(frozen=True)
class Ode:
    """The likelihood of the probability-flow ODE, of uniformly dequantised images (App. D.2, Song et al. 2021).

    Args:
        rtol, atol: tolerances of the solver.
        num_probes: Hutchinson's, an image; None for the exact trace, with a derivative for each number of an image.

    Raises:
        ValueError: when one of them is not positive.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    num_probes: int | None = 1

    def __post_init__(self) -> None:
        if self.rtol <= 0 or self.atol <= 0:
            raise ValueError(f"rtol={self.rtol} and atol={self.atol} must be positive; Song et al. use 1e-5")
        if self.num_probes is not None and self.num_probes < 1:
            raise ValueError(f"num_probes={self.num_probes} must be at least 1, or null for the exact trace")

    def refuse(self, subject: Subject) -> None:
        """Before anything is computed.

        Raises:
            ValueError: where there is no ODE, or images are floats.
        """
        _levels(subject)
        subject.diffusion.schedule.levels(2, "linspace")

    def __call__(self, subject: Subject) -> dict[str, Score]:
        """The score, in bits per dimension; evaluations are those of the network, a batch.

        The images of a batch share their steps: batches are those of batch_size, whoever computes them. {} in processes
        other than the first.
        """

        levels = _levels(subject)

        def solve(part: Part) -> tuple[Tensor, int]:
            shape = tuple(part.images.shape[1:])
            v, probes = self.draws(subject.seed, part.indices, shape)
            y = dequantized(part.images, v, levels).to(subject.device, subject.dtype)
            density = ode_density(
                part.denoise, subject.diffusion.schedule, y, probes.to(y), self.rtol, self.atol, part.progress
            )
            return dequantized_bits(density.log_p, y[0].numel(), levels).cpu().double(), density.evaluations

        indices = range(len(subject.data))
        solved = each(
            subject, "ode", [indices[low : low + subject.batch_size] for low in indices[:: subject.batch_size]], solve
        )
        if not solved:
            return {}
        bits, evaluations = zip(*solved, strict=True)
        details = {
            "evaluations": list(evaluations),
            "rtol": self.rtol,
            "atol": self.atol,
            "num_probes": self.num_probes,
            "dequantisation": "uniform",
            "levels": levels,
        }
        return {"ode": mean_and_error(torch.cat(bits), details)}

    def draws(self, seed: int, indices: range, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """v in [0, 1), (B, C, H, W), and the probes."""
        generators = [generator(mix(seed, ODE), i) for i in indices]
        v = torch.stack([torch.rand(shape, generator=g) for g in generators])
        if self.num_probes is None:
            return v, unit_probes(shape)
        return v, torch.stack([rademacher(shape, self.num_probes, g) for g in generators], dim=1)


def mean_and_error(values: Tensor, details: dict[str, Any]) -> Score:
    """Mean over images (N,), the smaller the better, and its standard error, which a single image does not have.

    Raises:
        UserError: when they are not finite.
    """
    if not values.isfinite().all():
        raise UserError("the score of some images is NaN or infinity; the weights are broken")
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return Score(float(values.mean()), error, "lower", details)
