"""A small classifier, whose features score images that no larger network was trained on."""

from itertools import pairwise

from torch import Tensor, nn

from src.models.norm import group_norm


class Classifier(nn.Module):
    """A convolution and half the resolution at each level, the mean over the image, and a hidden layer: the features.

    Called as net(x), x (B, C, H, W) in [-1, 1] of any size, it returns logits (B, num_classes). Each image is normed by
    itself, so that its features do not depend on the others of its batch, and an average of weights is a network.

    Args:
        channels: image channels.
        num_classes: how many different labels there are.
        base_channels: of the first level; each of the next has twice as many; a multiple of 8.
        num_levels: halvings.
        num_features: of the layer that `embed` returns.

    Raises:
        ValueError: for a number that is too small, or base_channels that 8 does not divide.
    """

    classifies = True

    def __init__(
        self,
        channels: int = 1,
        num_classes: int = 10,
        base_channels: int = 32,
        num_levels: int = 3,
        num_features: int = 128,
    ) -> None:
        super().__init__()
        if base_channels < 8 or base_channels % 8:
            raise ValueError(f"base_channels={base_channels} must be a multiple of 8")
        for name, value, least in (("num_levels", num_levels, 1), ("num_features", num_features, 1)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes} leaves nothing to tell apart; the data must have labels")
        self.num_classes = num_classes
        self.num_features = num_features
        widths = [channels, *(base_channels * 2**level for level in range(num_levels))]
        layers: list[nn.Module] = []
        for below, above in pairwise(widths):
            layers += [
                nn.Conv2d(below, above, 3, padding=1),
                group_norm(above, 8, eps=1e-5),
                nn.SiLU(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        self.levels = nn.Sequential(*layers)
        self.hidden = nn.Linear(widths[-1], num_features)
        self.act = nn.SiLU()
        self.head = nn.Linear(num_features, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        """The features, (B, num_features)."""
        return self.act(self.hidden(self.levels(x).mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))
