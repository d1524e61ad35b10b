"""Data whose denoiser is known in closed form: a Gaussian, a mixture of Gaussians, a finite set of images.

For x0 from the mixture sum_k w_k N(mu_k, s^2), a noisy image at the level (alpha, sigma) has the density

    p(x) = sum_k w_k N(x; alpha mu_k, V),    V = alpha^2 s^2 + sigma^2

and with r_k(x) the probability that it came from k,

    E[x0 | x] = sum_k r_k(x) (alpha s^2 x + sigma^2 mu_k) / V

One component is a Gaussian; s = 0 is a finite set, for which this is the denoiser that a network would learn from these
images if it could learn everything (Eq. 3 and App. B.3, Karras et al. 2022).
"""

from math import log, pi

import torch
from torch import Tensor

from src.diffusion.levels import Level


class Mixture:
    """A mixture of Gaussians with one standard deviation of each number.

    Args:
        means: (K, *shape) float64.
        std: s, a number or a tensor that broadcasts to `shape`; 0 for a finite set.
        weights: (K,) positive, they need not sum to 1; None for equal ones.
    """

    def __init__(self, means: Tensor, std: Tensor | float = 0.0, weights: Tensor | None = None) -> None:
        self.shape = means.shape[1:]
        self.means = means.flatten(1)
        self.variance = (torch.as_tensor(std, dtype=means.dtype) ** 2).expand(self.shape).flatten().to(means.device)
        weights = torch.ones(len(means), dtype=means.dtype) if weights is None else weights.to(means.dtype)
        self.log_weights = (weights / weights.sum()).log().to(means.device)

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """E[x0 | x], (B, *shape), at one level: what samplers ask."""
        return self.denoise(x, *self._level(x, level))

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor, among: Tensor | None = None) -> Tensor:
        """E[x0 | x], (B, *shape), at the levels (B,).

        Args:
            among: (B, K) bool, the components that each image can have come from; None for all.
        """
        flat, a, s = self._flat(x, alpha, sigma)
        V = a**2 * self.variance + s**2
        logits = self._log_joint(flat, a, V)
        if among is not None:
            logits = logits.masked_fill(~among, -torch.inf)
        mean = logits.softmax(1) @ self.means
        x0 = (a * self.variance * flat + s**2 * mean) / V
        return x0.to(x.dtype).view(x.shape)

    def log_density(self, x: Tensor, level: Level) -> Tensor:
        """ln p(x), (B,) in nats, of noisy images (B, *shape) at a level."""
        flat, a, s = self._flat(x, *self._level(x, level))
        V = a**2 * self.variance + s**2
        normalizer = 0.5 * (V.log() + log(2 * pi)).sum(1)
        return self._log_joint(flat, a, V).logsumexp(1) - normalizer

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n images, (n, *shape)."""
        k = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return (self.means[k] + self.variance.sqrt() * z).view(n, *self.shape)

    def _level(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """alpha and sigma, (B,), in the precision of the means: small sigmas have none to lose."""
        alpha, sigma = (x.new_full((len(x),), v, dtype=self.means.dtype) for v in (level.alpha, level.sigma))
        return alpha, sigma

    def _flat(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.means.dtype
        return x.flatten(1).to(dtype), alpha.to(dtype)[:, None], sigma.to(dtype)[:, None]

    def _log_joint(self, x: Tensor, alpha: Tensor, V: Tensor) -> Tensor:
        """ln w_k - |x - alpha mu_k|^2 / (2 V), (B, K), by two products instead of B K differences."""
        cross = (alpha * x / V) @ self.means.T
        own = (alpha**2 / V) @ (self.means**2).T
        return self.log_weights - 0.5 * ((x**2 / V).sum(1, keepdim=True) - 2 * cross + own)
