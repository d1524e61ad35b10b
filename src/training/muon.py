"""Muon: the momentum of each matrix, made orthogonal (Jordan et al. 2024, "Muon: an optimizer for hidden layers")."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Of the odd polynomial a s + b s^3 + c s^5, which lifts small singular values fast and leaves large ones near 1
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST = 16  # rows and columns; what writes pixels has fewer, and often what reads them
AT_ONCE = 32  # matrices whose Gram matrices are in memory together


class Muon(torch.optim.AdamW):
    """Muon for matrices and kernels of at least 16 rows and columns, AdamW for all else: biases, norms, few channels.

    A kernel (O, I, h, w) is the matrix (O, I h w). The orthogonal update is scaled by 0.2 sqrt(max(O, I h w)) to the
    size of Adam's, so that `lr` and `weight_decay` are AdamW's (Liu et al. 2025, "Muon is scalable for LLM training",
    Eq. 4).

    Shapes alone decide: a table of 16 labels is a matrix, and so is an output of 16 channels.

    Args:
        params, lr, weight_decay: as AdamW's.
        momentum: of matrices, share of the past in the average of gradients, in [0, 1); it looks one step ahead
            (Nesterov).
        betas, eps: of all else.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 2e-4,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be in [0, 1)")
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for parameter in params:
            (matrices if is_matrix(parameter) else others).append(parameter)
        groups: list[dict[str, Any]] = [{"params": matrices, "momentum": momentum}, {"params": others}]
        super().__init__([group for group in groups if group["params"]], lr, betas, eps, weight_decay, foreach=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        hidden: list[tuple[Tensor, Tensor]] = []  # matrices and their gradients, of which Adam sees nothing
        for group in self.param_groups:
            if "momentum" in group and (found := [(p, p.grad) for p in group["params"] if p.grad is not None]):
                self._step_matrices(group, *map(list, zip(*found, strict=True)))
                hidden += found
        for parameter, _ in hidden:
            parameter.grad = None
        super().step()
        for parameter, gradient in hidden:
            parameter.grad = gradient
        return loss

    def _step_matrices(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:  # named as Adam's, which looks for both on loading
                self.state[parameter].update(step=torch.zeros(()), exp_avg=torch.zeros_like(parameter))
        averages = [self.state[p]["exp_avg"] for p in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"])
        updates = orthogonal([update.flatten(1) for update in ahead])
        torch._foreach_mul_(updates, [0.2 * max(update.shape) ** 0.5 for update in updates])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        shaped = [update.reshape(p.shape) for update, p in zip(updates, parameters, strict=True)]
        torch._foreach_add_(parameters, shaped, alpha=-group["lr"])


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon updates it."""
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= SMALLEST


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Of each matrix U S V^T about U V^T: every singular value that is not tiny lands between 0.7 and 1.2.

    X -> a X + b (X X^T) X + c (X X^T)^2 X, five times, from X of Frobenius norm 1. Each factor is a polynomial of the
    first Gram matrix X X^T, of the smaller side: they are multiplied up by themselves, and meet X once. Rounding that
    makes an eigenvalue negative is lifted 20,000 times, which float32 can bear and TF32 cannot.

    Args:
        matrices: (R, C) each, float32.
    """
    wide = [x.mT if x.shape[0] > x.shape[1] else x for x in matrices]
    wide = [x / (x.norm() + 1e-7) for x in wide]
    sides = defaultdict(list)
    for i, x in enumerate(wide):
        sides[x.shape[0]].append(i)
    with _in_float32():
        for alike in (side[i : i + AT_ONCE] for side in sides.values() for i in range(0, len(side), AT_ONCE)):
            factors = _factors(torch.stack([wide[i] @ wide[i].mT for i in alike]))
            for i, factor in zip(alike, factors, strict=True):
                wide[i] = factor @ wide[i]
    return [x.mT if of.shape[0] > of.shape[1] else x for x, of in zip(wide, matrices, strict=True)]


@contextmanager
def _in_float32() -> Iterator[None]:
    """Matrix products without TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _factors(grams: Tensor) -> Tensor:
    """What the iterations multiply a matrix by, from its Gram matrix: (N, R, R) both."""
    a, b, c = COEFFICIENTS
    product = torch.eye(grams.shape[1], device=grams.device).expand_as(grams)
    for _ in range(ITERATIONS):
        factor = torch.baddbmm(grams, grams, grams, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor @ product
        grams = factor @ grams @ factor
    return product
