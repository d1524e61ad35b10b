"""Averages of any length after training (EDM2, Karras et al. 2024, Sec. 3.2, App. C.3 and Algorithm 3).

The power-function average of exponent gamma at time t is the integral of the weights against the profile

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)   for 0 <= tau <= t, and 0 after.

Averaging is linear, so a weighted sum of stored averages has the same weighted sum of their profiles. The best
coefficients x are those whose sum is nearest to the wanted profile q: they minimise || sum_i x_i p_i - q ||^2 in L2,
with A_ij = <p_i, p_j> and b_i = <p_i, q>.

Algorithm 3 solves A x = b. Here the coefficients must also add up to 1, so that what is rebuilt is an average and a
weight that never moved comes back as it is: EDM2's networks take the length of their weights away, others do not. With
a Lagrange multiplier m that is A x + m = b and sum_i x_i = 1. It costs 2% of the residual with 32 snapshots, at most.
"""

import torch
from torch import Tensor


def inner_products(gamma_a: Tensor, t_a: Tensor, gamma_b: Tensor, t_b: Tensor) -> Tensor:
    """<p_a, p_b> for each pair of profiles, in closed form.

    With the earlier time l and the later time h, whose exponent is gamma_h, the integral from 0 to l is

        (gamma_a + 1)(gamma_b + 1) / (gamma_a + gamma_b + 1) (l / h)^gamma_h / h.

    Args:
        gamma_a, t_a: (N,) exponents and times of the profiles a, float64.
        gamma_b, t_b: (M,) those of the profiles b.

    Returns:
        (N, M) float64.
    """
    gamma_a, t_a = gamma_a[:, None], t_a[:, None]
    low, high = torch.minimum(t_a, t_b), torch.maximum(t_a, t_b)
    gamma_high = torch.where(t_a > t_b, gamma_a, gamma_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (low / high) ** gamma_high / high


def coefficients(gammas: Tensor, times: Tensor, wanted: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """The weighted sum of stored averages that is nearest to each wanted one.

    Args:
        gammas, times: (N,) exponents and times of the stored averages, float64; times are at most `time`.
        wanted: (M,) exponents of the wanted averages.
        time: at which they are wanted.

    Returns:
        (N, M) float64: the coefficients of each wanted average in a column, which add up to 1.
        (M,) float64: || sum_i x_i p_i - q || / || q ||, how far each is from what was wanted; 1e-8 is as good as 0.
    """
    q = wanted, torch.full_like(wanted, time)
    A = inner_products(gammas, times, gammas, times)
    b = inner_products(gammas, times, *q)
    qq = inner_products(*q, *q).diagonal()
    scale = A.diagonal().rsqrt()[:, None]  # profiles of norm 1: the condition of A falls tenfold
    ones = scale / scale.max()
    bordered = torch.cat([torch.cat([scale * A * scale.T, ones], 1), torch.cat([ones.T, ones.new_zeros(1, 1)], 1)])
    right = torch.cat([scale * b, (1 / scale.max()).expand(1, len(wanted))])
    # gelsd takes two stored averages of the same length, for which A is singular, in its stride.
    x = scale * torch.linalg.lstsq(bordered, right, driver="gelsd").solution[:-1]
    squared = (qq - 2 * (x * b).sum(0) + (x * (A @ x)).sum(0)) / qq
    return x, squared.clamp(min=0).sqrt()
