"""Precision, recall, density and coverage: whose neighbourhoods generated and real features fall into.

Distances are exact, in float64, a block of rows at a time and each block in one thread. A ball has its border: a point
counts that is as far from the centre as the neighbour that sets the radius, up to the rounding of both.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from src.threads import in_threads

ROWS = 512  # whose distances to as many others are held at a time
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


def members(
    generated: Tensor, real: Tensor, k: int, k_density: int, chosen: tuple[Tensor, Tensor] | None = None
) -> Members:
    """Compares two sets of features, (N, D) and (M, D).

    Args:
        k: a ball of precision and recall reaches to its centre's k-th neighbour in the same set.
        k_density: the same for density and coverage.
        chosen: which vectors of each to look at, (N,) and (M,) int64; None for all.

    Raises:
        ValueError: for a set that has no k neighbours for each point.
    """
    centre = real[:ROWS].double().mean(0)  # wherever it is, it only keeps squares small
    x = _Points(generated, centre, None if chosen is None else chosen[0])
    y = _Points(real, centre, None if chosen is None else chosen[1])
    most = max(k, k_density)
    if min(x.number, y.number) <= most:
        raise ValueError(f"sets of {x.number} and {y.number} points do not have {most} neighbours for each")
    slack = SLACK * max(x.largest_norm(), y.largest_norm())
    wide_x = x.radii([k])[0] * (1 + ROUNDING) + slack
    wide_y, wide_y_density = (r * (1 + ROUNDING) + slack for r in y.radii([k, k_density]))

    def look(rows: slice, _: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = x.block(rows)
        within, balls = torch.zeros(len(own), dtype=torch.bool), torch.zeros(len(own), dtype=torch.int64)
        recalled, covered = torch.zeros(2, y.number, dtype=torch.bool)
        for columns in y.blocks:
            squares = _squares(own, y.block(columns))
            near = squares <= wide_y_density[columns]
            within |= (squares <= wide_y[columns]).any(1)
            balls += near.sum(1)
            recalled[columns] = (squares <= wide_x[rows, None]).any(0)
            covered[columns] = near.any(0)
        return within, recalled, balls.double() / k_density, covered

    precision, recall, density, coverage = zip(*in_threads(look, x.blocks, CPU), strict=True)
    return Members(
        torch.cat(precision).double(),
        torch.stack(recall).any(0).double(),
        torch.cat(density),
        torch.stack(coverage).any(0).double(),
    )


class _Points:
    """Some vectors of a set less a centre, of which only blocks are ever float64."""

    def __init__(self, x: Tensor, centre: Tensor, chosen: Tensor | None) -> None:
        self.x, self.centre = x, centre
        self.chosen = torch.arange(len(x)) if chosen is None else chosen
        self.number = len(self.chosen)
        self.blocks = [slice(low, min(low + ROWS, self.number)) for low in range(0, self.number, ROWS)]

    def block(self, rows: slice) -> Tensor:
        return self.x[self.chosen[rows]].double().sub_(self.centre)

    def largest_norm(self) -> float:
        """The square of it."""
        return max(float(self.block(rows).square_().sum(1).max()) for rows in self.blocks)

    def radii(self, ks: list[int]) -> list[Tensor]:
        """For each k the squared distance, (N,), of each point to its k-th neighbour; it is not its own neighbour."""

        def nearest(rows: slice, _: object) -> Tensor:
            own = self.block(rows)
            found = torch.empty(len(own), 0, dtype=torch.float64)
            for columns in self.blocks:
                squares = _squares(own, self.block(columns))
                if columns == rows:
                    squares.fill_diagonal_(math.inf)
                found = torch.cat([found, squares], 1)
                found = found.topk(min(max(ks), found.shape[1]), dim=1, largest=False).values
            return found

        nearby = torch.cat(in_threads(nearest, self.blocks, CPU))
        return [nearby[:, k - 1] for k in ks]


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances, (n, m)."""
    products = torch.addmm(y.square().sum(1), x, y.T, alpha=-2)
    return products.add_(x.square().sum(1, keepdim=True)).clamp_(min=0)
