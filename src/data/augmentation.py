"""What is done to training images on the device, an image each for itself; never to those that validate or score.

An augmentation has `draw`, which makes the parameters of n images on the CPU, from a generator that belongs to their
place in the stream of training; `__call__`, which applies them to a batch; and `label_dim`, how many numbers it tells
the network of what it did. New augmentation: one class here, one YAML in conf/augment.
"""

from dataclasses import dataclass
from math import log, pi
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from src.data.warp import rotation, scaling, translation, warp

BLACK = -1.0
NOTHING = {"_target_": "src.data.augmentation.Nothing"}  # of runs that were started before there were others


class Augmentation(Protocol):
    """Attributes:
    label_dim: numbers that tell what was done to an image; 0 where nothing is told.
    mirrors: images may be mirrored left to right without the network being told, and then samples may be, too.
    """

    label_dim: int
    mirrors: bool

    def draw(self, n: int, g: torch.Generator) -> Tensor:
        """Parameters of n images, (n, k) float32 on the CPU."""
        ...

    def __call__(self, x0: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The images, (B, C, H, W) in [-1, 1], augmented, and what is told of them, (B, label_dim).

        Args:
            parameters: (B, k), on the images' device.
        """
        ...


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirrors those images, (B, C, H, W), left to right that `mirrored`, (B,) bool, says.

    Selecting rows from images and mirror images is three times as fast as `torch.where` with a mask on bytes.
    """
    both = torch.cat([images, images.flip(-1)])
    return both.index_select(0, torch.arange(len(images), device=images.device) + len(images) * mirrored)


@dataclass(frozen=True)
class Nothing:
    """Leaves images as they are."""

    label_dim = 0
    mirrors = False

    def draw(self, n: int, g: torch.Generator) -> Tensor:
        return torch.empty(n, 0)

    def __call__(self, x0: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return x0, parameters


@dataclass(frozen=True)
class Flip:
    """Mirrors left to right with probability 1/2, as data.flip=true does."""

    label_dim = 0
    mirrors = True

    def draw(self, n: int, g: torch.Generator) -> Tensor:
        return torch.rand(n, 1, generator=g)

    def __call__(self, x0: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        return flip(x0, parameters[:, 0] < 0.5), parameters[:, :0]


@dataclass(frozen=True)
class Dihedral:
    """One of the square's 8 symmetries, all equally likely, for images without an up and a down.

    Those that swap height and width are possible for square images only; others get one of the rectangle's 4.
    """

    label_dim = 0
    mirrors = True

    def draw(self, n: int, g: torch.Generator) -> Tensor:
        return torch.rand(n, 1, generator=g)

    def __call__(self, x0: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        which = (parameters[:, 0] * 8).long()
        if x0.shape[-1] == x0.shape[-2]:
            x0 = torch.where(_mask(which & 4, x0), x0.transpose(-1, -2), x0)
        x0 = torch.where(_mask(which & 2, x0), x0.flip(-2), x0)
        return torch.where(_mask(which & 1, x0), x0.flip(-1), x0), parameters[:, :0]


@dataclass(frozen=True)
class Crop:
    """A border of black pixels, and then a window of the image's size at any place of it, all equally likely.

    Args:
        padding: pixels of border on each side, at least 1; 4 is usual at 32x32.

    Raises:
        ValueError: when padding is less than 1.
    """

    padding: int = 4
    label_dim = 0
    mirrors = False

    def __post_init__(self) -> None:
        if self.padding < 1:
            raise ValueError(f"padding={self.padding} must be at least 1; 4 is usual at 32x32, augment=none for none")

    def draw(self, n: int, g: torch.Generator) -> Tensor:
        return torch.rand(n, 2, generator=g)

    def __call__(self, x0: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        b, c, height, width = x0.shape
        device = x0.device
        padded = F.pad(x0, [self.padding] * 4, value=BLACK)
        top, left = (parameters * (2 * self.padding + 1)).long().unbind(1)
        y = (top[:, None] + torch.arange(height, device=device))[:, None, :, None]
        x = (left[:, None] + torch.arange(width, device=device))[:, None, None, :]
        image = torch.arange(b, device=device)[:, None, None, None]
        channel = torch.arange(c, device=device)[None, :, None, None]
        return padded[image, channel, y, x], parameters[:, :0]


@dataclass(frozen=True)
class Edm:
    """The non-leaky augmentation of Karras et al. 2022 (Appendix F.2, Table 6).

    Mirroring, scaling, rotation, anisotropic scaling and translation, each with a parameter of its own or, where the
    dice leave it out, none; mirroring left to right is always possible. They make one matrix, by which the image is
    resampled once (see `src.data.warp`), and nine numbers, all zero of an image as it was, which the network is told:
    so it learns the images as they are beside the others, and draws them when it is told zeros. Images that are only
    mirrored are not resampled: they are exact. What resampling overshoots is clipped to [-1, 1].

    Told: a0, a1, a2, cos a3 - 1, sin a3, a5 cos a4, a5 sin a4, a6, a7.

    Args:
        probability: of each augmentation but mirroring left to right; 0.12 for CIFAR-10, 0.15 for FFHQ and AFHQv2.
        log2_scale: standard deviation of the scale, in powers of two.
        log2_anisotropy: the same of the scale along one axis, and its inverse across it.
        tilted: share of the anisotropic scalings whose axis is turned by a4; of the others it is the image's width.
            Table 6 turns all, the authors' code, which made their figures, half of them.
        translation: standard deviation of the shift, as a share of the image's width and height.

    Raises:
        ValueError: when probability or tilted is outside [0, 1], or a standard deviation is negative.
    """

    probability: float = 0.12
    log2_scale: float = 0.2
    log2_anisotropy: float = 0.2
    tilted: float = 1.0
    translation: float = 0.125
    label_dim = 9
    mirrors = False

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability={self.probability} must lie in [0, 1]; Karras et al. use 0.12 and 0.15")
        if not 0 <= self.tilted <= 1:
            raise ValueError(f"tilted={self.tilted} must lie in [0, 1]; Karras et al. use 0.5")
        for name in ("log2_scale", "log2_anisotropy", "translation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 is none")

    def draw(self, n: int, g: torch.Generator) -> Tensor:
        """a0 to a7 of Table 6, (n, 8)."""
        mirror_y, scale, rotate, stretch, shift = (torch.rand(n, 5, generator=g) < self.probability).float().unbind(1)
        coins = (torch.rand(n, 2, generator=g) < 0.5).float()
        angles = (torch.rand(n, 2, generator=g) * 2 - 1) * pi
        normal = torch.randn(n, 4, generator=g)
        tilted = (torch.rand(n, generator=g) < self.tilted).float()
        return torch.stack(
            [
                coins[:, 0],
                coins[:, 1] * mirror_y,
                normal[:, 0] * scale,
                angles[:, 0] * rotate,
                angles[:, 1] * stretch * tilted,
                normal[:, 1] * stretch,
                normal[:, 2] * shift,
                normal[:, 3] * shift,
            ],
            dim=1,
        )

    def told(self, a: Tensor) -> Tensor:
        """(B, 8) to (B, 9)."""
        a0, a1, a2, a3, a4, a5, a6, a7 = a.unbind(1)
        return torch.stack([a0, a1, a2, a3.cos() - 1, a3.sin(), a5 * a4.cos(), a5 * a4.sin(), a6, a7], dim=1)

    def inverse(self, a: Tensor, height: int, width: int) -> Tensor:
        """The matrices that tell where a pixel comes from, (B, 3, 3): the inverses of Table 6's, in reverse order.

        They are of positions (x, y, 1) in pixels, x to the right, y down, the image's centre at (0, 0).
        """
        a0, a1, a2, a3, a4, a5, a6, a7 = a.unbind(1)
        scale, stretch = (a2 * (self.log2_scale * log(2))).exp(), (a5 * (self.log2_anisotropy * log(2))).exp()
        return (
            scaling(1 - 2 * a0, 1 - 2 * a1)
            @ scaling(1 / scale, 1 / scale)
            @ rotation(a3)
            @ rotation(a4)
            @ scaling(1 / stretch, stretch)
            @ rotation(-a4)
            @ translation(-self.translation * width * a6, -self.translation * height * a7)
        )

    def __call__(self, x0: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        moved = (parameters[:, [2, 3, 5, 6, 7]] != 0).any(1)
        mirrored = torch.where(_mask(parameters[:, 1], x0), x0.flip(-2), x0)
        mirrored = torch.where(_mask(parameters[:, 0], x0), mirrored.flip(-1), mirrored)
        inverse = self.inverse(parameters, *x0.shape[2:])
        if x0.device.type == "cpu":
            mirrored[moved] = warp(x0[moved], inverse[moved]).clamp_(-1, 1)
        else:  # a GPU that had to say which are moved would be waited for
            mirrored = torch.where(_mask(moved, x0), warp(x0, inverse).clamp_(-1, 1), mirrored)
        return mirrored, self.told(parameters)


def _mask(values: Tensor, like: Tensor) -> Tensor:
    """(B,) to booleans that go with (B, C, H, W)."""
    return (values != 0).view(-1, *[1] * (like.ndim - 1))
