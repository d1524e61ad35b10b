"""Precision, recall, density and coverage: whose neighbourhoods generated and real features fall into.

Distances are exact, in float64, a block of rows at a time and each block in one thread. A ball has its border: a point
counts that is as far from the centre as the neighbour that sets the radius, up to the rounding of both.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from src.threads import in_threads

ROWS = 512  # whose distances to all others are held at a time
CPU = torch.device("cpu")
ROUNDING = 1e-9  # of a squared distance, relative
SLACK = 1e-12  # of a squared distance, relative to the largest squared norm


class Members(NamedTuple):
    """One number a point, float64.

    Attributes:
        precision: (N,) whether a generated point lies in the ball of any real one (Kynkäänniemi et al. 2019, Eq. 1).
        recall: (M,) whether a real point lies in the ball of any generated one.
        density: (N,) in how many real balls a generated point lies, over k (Naeem et al. 2020, Eq. 4).
        coverage: (M,) whether the ball of a real point holds any generated one (Eq. 6).
    """

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def members(generated: Tensor, real: Tensor, k: int, k_density: int) -> Members:
    """Compares two sets of features, (N, D) and (M, D).

    Args:
        k: a ball of precision and recall reaches to its centre's k-th neighbour in the same set.
        k_density: the same for density and coverage.

    Raises:
        ValueError: for a set that has no k neighbours for each point.
    """
    most = max(k, k_density)
    if min(len(generated), len(real)) <= most:
        raise ValueError(f"sets of {len(generated)} and {len(real)} points do not have {most} neighbours for each")
    centre = real.double().mean(0)
    x, y = generated.double() - centre, real.double() - centre
    slack = SLACK * float(max(x.square().sum(1).max(), y.square().sum(1).max()))
    wide_x = _radii(x, [k])[0] * (1 + ROUNDING) + slack
    wide_y, wide_y_density = (r * (1 + ROUNDING) + slack for r in _radii(y, [k, k_density]))

    def look(rows: Tensor, _: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        squares = _squares(x[rows], y)
        near = squares <= wide_y_density
        return (
            (squares <= wide_y).any(1),
            (squares <= wide_x[rows, None]).any(0),
            near.sum(1).double() / k_density,
            near.any(0),
        )

    parts = in_threads(look, torch.arange(len(x)).split(ROWS), CPU)
    precision, recall, density, coverage = zip(*parts, strict=True)
    return Members(
        torch.cat(precision).double(),
        torch.stack(recall).any(0).double(),
        torch.cat(density),
        torch.stack(coverage).any(0).double(),
    )


def _radii(x: Tensor, ks: list[int]) -> list[Tensor]:
    """For each k the squared distance, (N,), of each point to its k-th neighbour; it is not its own neighbour."""

    def nearest(rows: Tensor, _: object) -> Tensor:
        squares = _squares(x[rows], x)
        squares[torch.arange(len(rows)), rows] = -1.0  # itself comes first, whoever else is there
        return squares.topk(max(ks) + 1, dim=1, largest=False).values

    found = torch.cat(in_threads(nearest, torch.arange(len(x)).split(ROWS), CPU))
    return [found[:, k] for k in ks]


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances, (n, m)."""
    return torch.addmm(y.square().sum(1), x, y.T, alpha=-2).add_(x.square().sum(1, keepdim=True)).clamp_(min=0)
