"""The kernel distance of one pair of subsets."""

from torch import Tensor


def mmd2(x: Tensor, y: Tensor) -> float:
    """The unbiased square of the maximum mean discrepancy of as many x as y, (n, D) (Eq. 4, Bińkowski et al. 2018)."""
    n, d = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T).div_(d).add_(1).pow_(3)

    own = sum(float(k.sum() - k.trace()) for k in (kernel(x, x), kernel(y, y)))
    return own / (n * (n - 1)) - 2 * float(kernel(x, y).mean())
