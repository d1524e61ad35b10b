"""Nearest neighbours by Euclidean distance, exact, in bounded memory."""

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 512  # queries at a time, and 16 times as many candidates, while they are no more than
NUMBERS = 2**26  # of them


class Neighbours(NamedTuple):
    """Of N queries the k nearest of M candidates, nearest first.

    Attributes:
        distances: (N, k) float64.
        indices: (N, k) of the candidates.
    """

    distances: Tensor
    indices: Tensor


def nearest(queries: Tensor, candidates: Tensor, k: int) -> Neighbours:
    """The k nearest candidates, (M, D), of each query, (N, D); any dtype.

    They are found through |q|^2 + |c|^2 - 2 q.c in float32, a few more than k, whose distances are then computed anew
    as |q - c| in float64: the first formula cannot tell a copy from an image that is merely near.

    Raises:
        ValueError: when there are fewer than k candidates.
    """
    if not 1 <= k <= len(candidates):
        raise ValueError(f"{len(candidates)} images have no {k} nearest")
    kept = min(k + 4, len(candidates))
    D = candidates[0].numel()
    block = max(kept, min(16 * ROWS, NUMBERS // D))
    found = []
    for rows in queries.split(max(1, min(ROWS, NUMBERS // (kept * D)))):
        q = rows.float().flatten(1)
        best = (torch.empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64))
        for start in range(0, len(candidates), block):
            c = candidates[start : start + block].float().flatten(1)
            # centred, so that what all have in common costs no digits
            centre = c.mean(0)
            c, shifted = c - centre, q - centre
            squares = shifted.square().sum(1, keepdim=True) + c.square().sum(1) - 2 * shifted @ c.T
            values, indices = squares.topk(min(kept, squares.shape[1]), dim=1, largest=False)
            joined = torch.cat([best[0], values], 1), torch.cat([best[1], indices + start], 1)
            best_values, order = joined[0].topk(min(kept, joined[0].shape[1]), dim=1, largest=False)
            best = best_values, joined[1].gather(1, order)
        exact = (rows.double().flatten(1)[:, None] - candidates[best[1]].double().flatten(2)).square().sum(2).sqrt()
        distances, order = exact.sort(dim=1, stable=True)
        found.append(Neighbours(distances[:, :k], best[1].gather(1, order)[:, :k]))
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))
