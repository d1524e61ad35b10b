"""Whether samples are copies of training images, measured against images that cannot be: those that were held out.

A sample counts as memorised when a training image is nearer to it than to all but a small share of the held-out images:
a model that has learned the distribution and no image has that share of its samples flagged. Distances are Euclidean,
in grey levels and between features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from src.evaluation.nearest import Neighbours, nearest
from src.evaluation.scores import Score
from src.pictures import enlarge, grid, save_png

PAIRS = 10  # of the picture
STRIP = 3  # neighbours that the strip shows of each sample


class Compared(NamedTuple):
    """What was found in one space.

    Attributes:
        samples, held_out: their nearest training images.
        threshold: distance up to which a sample is flagged.
    """

    samples: Neighbours
    held_out: Neighbours
    threshold: float

    @property
    def flagged(self) -> Tensor:
        """(N,) bool."""
        return self.samples.distances[:, 0] <= self.threshold  # copies, too, where real images have copies themselves

    @property
    def suspicion(self) -> Tensor:
        """(N,) the sample's distance over the threshold; the smaller, the more suspicious."""
        return self.samples.distances[:, 0] / max(self.threshold, 1e-12)


@dataclass(frozen=True)
class Memorisation:
    """The share of samples that are nearer to a training image than new real images are.

    Args:
        share: of the held-out images that are this near by themselves, in (0, 1).
        limit: samples, and held-out images, that are looked at, at most.

    Raises:
        ValueError: when one of them is out of its range.
    """

    share: float = 0.01
    limit: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share} must lie in (0, 1); 0.01 flags what one real image in a hundred is")
        if self.limit < 2:
            raise ValueError(f"limit={self.limit} must be at least 2")

    def compare(self, samples: Tensor, held_out: Tensor, trained: Tensor, mirrored: bool = False) -> Compared:
        """Finds what is nearest to each.

        Args:
            samples, held_out, trained: (N, ...), (V, ...) and (M, ...) vectors of one space.
            mirrored: they are images, and training saw the mirrored ones, too.
        """
        k = min(STRIP, len(trained))

        def found(queries: Tensor) -> Neighbours:
            straight = nearest(queries, trained, k)
            return _nearer(straight, nearest(queries.flip(-1), trained, k)) if mirrored else straight

        real = found(held_out[: self.limit])
        threshold = float(torch.quantile(real.distances[:, 0], self.share))
        return Compared(found(samples[: self.limit]), real, threshold)

    def scores(self, compared: Compared, space: str) -> dict[str, Score]:
        """`memorised_<space>`, the share flagged, and `nearest_ratio_<space>`: the median distance of samples to their
        nearest training image over that of held-out images; 1 when samples are as far as new real images."""
        flagged = compared.flagged.double()
        n, share = len(flagged), float(flagged.mean())
        ours, real = (found.distances[:, 0] for found in (compared.samples, compared.held_out))
        ratio = float(ours.median() / real.median()) if real.median() > 0 else float(ours.median() > 0)
        details = {"expected": self.share, "threshold": compared.threshold, "looked_at": n, "held_out": len(real)}
        quantiles = torch.tensor([0.01, 0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
        spread = {
            "quantiles": quantiles.tolist(),
            "samples": torch.quantile(ours, quantiles).tolist(),
            "held_out": torch.quantile(real, quantiles).tolist(),
        }
        return {
            f"memorised_{space}": Score(share, (share * (1 - share) / n) ** 0.5, "lower", details),
            f"nearest_ratio_{space}": Score(ratio, None, None, spread),
        }


def _nearer(a: Neighbours, b: Neighbours) -> Neighbours:
    """Of each query, the neighbours of that one of the two whose first is nearer."""
    other = (b.distances[:, :1] < a.distances[:, :1]).expand_as(a.distances)
    return Neighbours(torch.where(other, b.distances, a.distances), torch.where(other, b.indices, a.indices))


def save_pairs(compared: Compared, samples: Tensor, trained: Tensor, path: Path) -> None:
    """The most suspicious samples, in the upper row, above the training images that they are nearest to."""
    worst = compared.suspicion.argsort(stable=True)[:PAIRS]
    rows = [samples[worst], trained[compared.samples.indices[worst, 0]]]
    save_png(grid(torch.cat(rows), columns=len(worst)), path, enlarge(samples.shape[2]))


def save_strip(compared: Compared, samples: Tensor, trained: Tensor, path: Path) -> None:
    """The first samples, in the upper row, each above the training images that are nearest to it, nearest first."""
    first = min(PAIRS, len(compared.samples.indices))
    rows = [samples[:first], *(trained[column] for column in compared.samples.indices[:first].T)]
    save_png(grid(torch.cat(rows), columns=first), path, enlarge(samples.shape[2]))
