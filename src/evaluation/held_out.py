"""The loss at each noise level, on images that the network has learned from and on others.

All runs are asked alike, for the same images with the same noise at the same places on the schedule, so that the
difference of two runs is not one of luck. Image i of either set is given noise that depends on (seed, i) alone, in the
middle of each of `num_levels` equal parts of the schedule. A network with self-conditioning is given zeros.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from src.data.loader import normalize
from src.diffusion.guidance import as_guess
from src.diffusion.levels import Level, Schedule
from src.evaluation.likelihood import Part, Subject, each, mean_and_error
from src.evaluation.scores import Score
from src.randomness import NoiseStream, mix
from src.threads import share_out

LOSS = 0x105E  # the series of random numbers


@dataclass(frozen=True)
class HeldOut:
    """The loss on images that were held out, and by how much it is more than that on training images.

    The loss is w mean((F - (a x0 + b eps))^2) with the run's own objective and weighting, comparable between runs that
    share both. `eps` is the mean square error of eps, comparable between all runs of one schedule.

    Args:
        num_levels: parts of the schedule.

    Raises:
        ValueError: when num_levels is less than 1.
    """

    num_levels: int = 20

    def __post_init__(self) -> None:
        if self.num_levels < 1:
            raise ValueError(f"num_levels={self.num_levels} must be at least 1; 20 shows where on the schedule loss is")

    def refuse(self, subject: Subject) -> None:
        """There is always a loss."""

    def __call__(self, subject: Subject) -> dict[str, Score]:
        """The scores `loss` and `gap`; {} in processes other than the first."""
        levels = self.levels(subject)
        held_out = self._errors(subject, levels, "held-out loss")
        trained = self._errors(subject.on_training_images(), levels, "training loss")
        if held_out is None or trained is None:
            return {}
        factors = self.factors(subject)
        loss, other = held_out @ factors / len(levels), trained @ factors / len(levels)
        eps = torch.tensor([(level.alpha / level.sigma) ** 2 for level in levels], dtype=torch.float64)
        rows = [
            {
                "t": level.t,
                "alpha": level.alpha,
                "sigma": level.sigma,
                "held_out": float(held_out[:, k].mean() * factors[k]),
                "trained": float(trained[:, k].mean() * factors[k]),
                "eps": float(held_out[:, k].mean() * eps[k]),
            }
            for k, level in enumerate(levels)
        ]
        difference = loss[: len(other)] - other[: len(loss)]  # of pairs that were given the same noise
        gap = mean_and_error(difference, {"held_out": float(loss.mean()), "trained": float(other.mean())})
        return {
            "loss": mean_and_error(loss, {"levels": rows, "eps": float((held_out @ eps).mean()) / len(levels)}),
            "gap": gap._replace(better=None),  # small where little was learned, and where nothing was learned by heart
        }

    def levels(self, subject: Subject) -> list[Level]:
        """K of them, in the middle of equal parts of the schedule."""
        schedule = subject.diffusion.schedule
        t = self._times(schedule)
        told, (alpha, sigma) = schedule.condition(t), schedule.level(t)
        return [Level(float(c), float(a), float(s)) for c, a, s in zip(told, alpha, sigma, strict=True)]

    def factors(self, subject: Subject) -> Tensor:
        """(K,) what makes the loss of a mean square error of x0: w (d / sigma)^2, as F's error is d / sigma of it."""
        diffusion = subject.diffusion
        t = self._times(diffusion.schedule)
        alpha, sigma = diffusion.schedule.level(t)
        d = diffusion.objective.determinant(alpha, sigma)
        return (diffusion.weight(t, alpha, sigma) * (d / sigma).square()).double()

    def _times(self, schedule: Schedule) -> Tensor:
        return schedule.time((torch.arange(self.num_levels) + 0.5) / self.num_levels)

    def _errors(self, subject: Subject, levels: list[Level], name: str) -> Tensor | None:
        """(N, K) float64, the mean square error of x0; None in processes other than the first."""

        def errors(part: Part) -> Tensor:
            x0 = normalize(part.images).to(subject.device)
            noise = NoiseStream(mix(subject.seed, LOSS), part.indices, tuple(x0.shape[1:]), subject.device)
            columns = []
            for k, level in enumerate(levels, 1):
                x_t = level.alpha * x0 + level.sigma * noise()
                with torch.no_grad():
                    guess = part.denoise(x_t, level)
                columns.append((as_guess(guess).x0 - x0).to(subject.dtype).square().flatten(1).mean(1).cpu().double())
                part.progress(k / len(levels))
            return torch.stack(columns, dim=1)

        shape = tuple(subject.data.images.shape[1:])
        batches = share_out(len(subject.data), subject.batch_size, shape, subject.device, subject.group)
        made = each(subject, name, batches, errors)
        return torch.cat(made) if made else None
