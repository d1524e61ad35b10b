"""The images that need no download."""

from pathlib import Path

import torch

from src.data.images import ImageSet


class Digits:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn bundles (Alpaydin & Kaynak 1998); 17 grey levels."""

    def load(self, dir: Path) -> tuple[ImageSet, ImageSet | None]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        levels = torch.from_numpy(digits.images)  # (1797, 8, 8), 0 to 16
        images = (levels * (255 / 16)).round().to(torch.uint8)[:, None]
        return ImageSet(images, torch.from_numpy(digits.target).long(), classes=tuple("0123456789")), None
