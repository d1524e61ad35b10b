"""Scores of generated images over features. Each is called with the features of samples and with the reference.

A score says beforehand, in `refuse`, what it cannot be computed of, so that nobody draws samples for nothing; called,
it looks again. The name of the features is part of each score's name: fd_inception is no fd_pixels.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from src.evaluation.features import Extracted, Features, Shape
from src.evaluation.frechet import Moments, distance, moments
from src.evaluation.kernel import mmd2
from src.evaluation.neighbours import members
from src.evaluation.reference import Reference
from src.randomness import generator, mix
from src.threads import in_threads

CPU = torch.device("cpu")
BLOCK = 4096  # vectors whose numbers are looked through at a time


class Score(NamedTuple):
    """One number.

    Attributes:
        standard_error: of the value, where it can be told; each score says of what.
        better: which values are.
        details: plain values that a reader may want to know.
    """

    value: float
    standard_error: float | None
    better: Literal["lower", "higher"] | None
    details: dict[str, Any]


class Scorer(Protocol):
    """What all scores share."""

    def names(self, features: str) -> list[str]:
        """Of the scores that a call returns, given the name of the features."""
        ...

    def refuse(self, num_samples: int, num_reference: int, features: Features, shape: Shape) -> None:
        """Looks before any sample is drawn.

        Args:
            shape: (C, H, W) of the images.

        Raises:
            ValueError: when the score cannot be had of so many samples and reference images, or of these features.
        """
        ...

    def __call__(self, generated: Extracted, reference: Reference) -> dict[str, Score]:
        """The scores by name.

        Raises:
            ValueError: as `refuse` does; and when features are NaN or infinite, or not the reference's.
        """
        ...


@dataclass(frozen=True)
class Frechet:
    """The Fréchet distance, FID over Inception's pool features (Heusel et al. 2017); the square, as everybody has it.

    `details` has its two parts, and the floor: the same distance between two random halves of the reference.

    Args:
        force: computes it also of too few samples, where it is mostly a measure of their number.
    """

    force: bool = False
    prefix: ClassVar[str] = "fd"

    def names(self, features: str) -> list[str]:
        return [f"{self.prefix}_{features}"]

    def refuse(self, num_samples: int, num_reference: int, features: Features, shape: Shape) -> None:
        self._refuse(num_samples, num_reference, features.sizes(shape).features, features.name)

    def __call__(self, generated: Extracted, reference: Reference) -> dict[str, Score]:
        return self._score(generated.features, reference.moments, reference.floor, reference.name)

    def _refuse(self, num_samples: int, num_reference: int, dimensions: int, features: str) -> None:
        few = min(num_samples, num_reference)
        if few < 2:
            raise ValueError(f"{self.names(features)[0]} needs at least 2 samples, not {few}")
        if few > dimensions or self.force:
            return
        what = "samples" if num_samples == few else "reference images"
        way_out = f"draw at least {dimensions + 1}" if num_samples == few else "take a larger data set"
        raise ValueError(
            f"{self.names(features)[0]} has {dimensions} dimensions and there are {few} {what}: a covariance of so few "
            f"is singular and the distance means nothing; {way_out}, use features with fewer dimensions, or force=true"
        )

    def _score(self, x: Tensor, of: Moments, floor: float | None, features: str) -> dict[str, Score]:
        _check(x, len(of.mean), features)
        self._refuse(len(x), of.number, x.shape[1], features)
        found = distance(moments(x), of)
        details = {
            "of_means": found.of_means,
            "of_covariances": found.of_covariances,
            "floor": floor,
            "floor_images": of.number // 2,
            "dimensions": x.shape[1],
            "samples": len(x),
            "reference_images": of.number,
            "too_few": min(len(x), of.number) <= x.shape[1],
        }
        return {self.names(features)[0]: Score(found.value, None, "lower", details)}


@dataclass(frozen=True)
class Spatial(Frechet):
    """The Fréchet distance over features that know where things are, sFID (Nash et al. 2021); its floor as `Frechet`'s.

    Args:
        force: as `Frechet`'s.
    """

    prefix: ClassVar[str] = "sfid"

    def refuse(self, num_samples: int, num_reference: int, features: Features, shape: Shape) -> None:
        size = features.sizes(shape).spatial
        if size is None:
            raise ValueError(_lacks(self.names(features.name)[0], "spatial features", features.name))
        self._refuse(num_samples, num_reference, size, features.name)

    def __call__(self, generated: Extracted, reference: Reference) -> dict[str, Score]:
        if generated.spatial is None or reference.spatial is None:
            raise ValueError(_lacks(self.names(reference.name)[0], "spatial features", reference.name))
        return self._score(generated.spatial, reference.spatial, reference.spatial_floor, reference.name)


@dataclass(frozen=True)
class Kernel:
    """The kernel distance, KID over Inception's pool features (Bińkowski et al. 2018): an unbiased MMD^2.

    The kernel is ((x . y) / D + 1)^3. The value is the mean over subsets, each drawn without repetition; they are cut
    one after another from permutations, so that the first are disjoint. The standard error is their standard deviation
    over the root of how many can be disjoint; None where that is one.

    Args:
        subsets: how many.
        subset_size: samples, and reference images, in each.
        seed: of the draws.

    Raises:
        ValueError: for no subsets, or fewer than two samples in one.
    """

    subsets: int = 100
    subset_size: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.subsets < 1 or self.subset_size < 2:
            raise ValueError(
                f"subsets={self.subsets} must be at least 1 and subset_size={self.subset_size} at least 2; 100 and "
                "1000 are usual"
            )

    def names(self, features: str) -> list[str]:
        return [f"kd_{features}"]

    def refuse(self, num_samples: int, num_reference: int, features: Features, shape: Shape) -> None:
        self._refuse(num_samples, num_reference, features.name)

    def _refuse(self, num_samples: int, num_reference: int, features: str) -> None:
        few = min(num_samples, num_reference)
        if few < self.subset_size:
            what = "samples" if num_samples == few else "reference images"
            raise ValueError(
                f"{self.names(features)[0]} draws subsets of subset_size={self.subset_size} and there are {few} "
                f"{what}; lower subset_size, or draw more"
            )

    def __call__(self, generated: Extracted, reference: Reference) -> dict[str, Score]:
        x, y = generated.features, reference.features
        _check(x, y.shape[1], reference.name)
        self._refuse(len(x), len(y), reference.name)
        draws = list(zip(self._draws(len(x), 1), self._draws(len(y), 2), strict=True))
        found = in_threads(lambda pair, _: mmd2(x[pair[0]].double(), y[pair[1]].double()), draws, CPU)
        values = torch.tensor(found, dtype=torch.float64)
        disjoint = min(self.subsets, min(len(x), len(y)) // self.subset_size)
        error = float(values.std() / disjoint**0.5) if disjoint > 1 else None
        details = {
            "deviation_of_subsets": float(values.std(correction=0)),
            "subsets": self.subsets,
            "subset_size": self.subset_size,
            "seed": self.seed,
            "samples": len(x),
            "reference_images": len(y),
        }
        return {self.names(reference.name)[0]: Score(float(values.mean()), error, "lower", details)}

    def _draws(self, n: int, series: int) -> list[Tensor]:
        """The numbers of the members of each subset."""
        each = n // self.subset_size
        start = mix(self.seed, 0x6B64, series)
        orders = [torch.randperm(n, generator=generator(start, i)) for i in range(-(-self.subsets // each))]
        return [part for order in orders for part in order.split(self.subset_size)[:each]][: self.subsets]


@dataclass(frozen=True)
class InceptionScore:
    """exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016): the mean over splits in sample order, and its standard error.

    Args:
        splits: parts of equal size whose score is averaged; 10 in the papers, which give the deviation of the splits
            and not the error of their mean: `details` has it.

    Raises:
        ValueError: for no splits.
    """

    splits: int = 10

    def __post_init__(self) -> None:
        if self.splits < 1:
            raise ValueError(f"splits={self.splits} must be at least 1; 10 is usual")

    def names(self, features: str) -> list[str]:
        return [f"is_{features}"]

    def refuse(self, num_samples: int, num_reference: int, features: Features, shape: Shape) -> None:
        if features.sizes(shape).logits is None:
            raise ValueError(_lacks(self.names(features.name)[0], "logits", features.name))
        self._refuse(num_samples, features.name)

    def _refuse(self, num_samples: int, features: str) -> None:
        if num_samples < self.splits:
            name = self.names(features)[0]
            raise ValueError(f"{name} cannot cut {num_samples} samples into splits={self.splits}; lower splits")

    def __call__(self, generated: Extracted, reference: Reference) -> dict[str, Score]:
        name, logits = self.names(reference.name)[0], generated.logits
        if logits is None:
            raise ValueError(_lacks(name, "logits", reference.name))
        _check(logits, logits.shape[1], reference.name)
        self._refuse(len(logits), reference.name)
        n = len(logits)
        bounds = [i * n // self.splits for i in range(self.splits + 1)]
        parts = [logits[low:high] for low, high in pairwise(bounds)]
        values = torch.tensor(in_threads(lambda part, _: _inception_score(part), parts, CPU), dtype=torch.float64)
        error = float(values.std() / self.splits**0.5) if self.splits > 1 else None
        details = {"deviation_of_splits": float(values.std(correction=0)), "splits": self.splits, "samples": n}
        return {name: Score(float(values.mean()), error, "higher", details)}


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020); see `neighbours`.

    Standard errors are those of the means over the points that are looked at, the balls taken as given.

    Args:
        neighbours: k of precision and recall.
        density_neighbours: k of density and coverage.
        limit: so many samples and reference images are drawn by the seed where there are more.
        seed: of the draws.

    Raises:
        ValueError: for a k less than 1, or a limit that leaves no neighbours.
    """

    neighbours: int = 3
    density_neighbours: int = 5
    limit: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.neighbours, self.density_neighbours) < 1:
            raise ValueError(
                f"neighbours={self.neighbours} and density_neighbours={self.density_neighbours} must be at least 1; "
                "3 and 5 are the papers'"
            )
        if self.limit <= max(self.neighbours, self.density_neighbours):
            raise ValueError(f"limit={self.limit} must be more than the number of neighbours; 10000 is usual")

    def names(self, features: str) -> list[str]:
        return [f"{kind}_{features}" for kind in ("precision", "recall", "density", "coverage")]

    def refuse(self, num_samples: int, num_reference: int, features: Features, shape: Shape) -> None:
        self._refuse(num_samples, num_reference, features.name)

    def _refuse(self, num_samples: int, num_reference: int, features: str) -> None:
        few, most = min(num_samples, num_reference), max(self.neighbours, self.density_neighbours)
        if few <= most:
            raise ValueError(f"{self.names(features)[0]} looks at {most} neighbours of each of {few} points; draw more")

    def __call__(self, generated: Extracted, reference: Reference) -> dict[str, Score]:
        _check(generated.features, reference.features.shape[1], reference.name)
        self._refuse(len(generated.features), len(reference.features), reference.name)
        x, y = self._drawn(generated.features, 1), self._drawn(reference.features, 2)
        found = members(x, y, self.neighbours, self.density_neighbours)
        ks = (self.neighbours, self.neighbours, self.density_neighbours, self.density_neighbours)
        scores = {}
        for name, points, k in zip(self.names(reference.name), found, ks, strict=True):
            details = {"neighbours": k, "samples": len(x), "reference_images": len(y), "seed": self.seed}
            error = float(points.std() / len(points) ** 0.5)
            scores[name] = Score(float(points.mean()), error, "higher", details)
        return scores

    def _drawn(self, x: Tensor, series: int) -> Tensor:
        if len(x) <= self.limit:
            return x
        order = torch.randperm(len(x), generator=generator(mix(self.seed, 0x9E16, series), 0))
        return x[order[: self.limit].sort().values]


def _inception_score(logits: Tensor) -> float:
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    log_q = p.mean(0, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny).log()  # p log 0 is 0
    return float((p * (log_p - log_q)).sum(1).mean().exp())


def _lacks(score: str, what: str, features: str) -> str:
    return f"{score} needs {what}, which features={features} do not have; leave it out, or use features=inception"


def _check(x: Tensor, dimensions: int, features: str) -> None:
    """Refuses what would become a wrong number."""
    if x.ndim != 2 or x.shape[1] != dimensions:
        raise ValueError(f"{features} of {tuple(x.shape)} are compared with {dimensions} dimensions of the reference")
    if not all(torch.isfinite(block).all() for block in x.split(BLOCK)):
        raise ValueError(f"{features} of some samples are NaN or infinite, and so would be every score")
