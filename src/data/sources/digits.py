"""The images that need no download."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from src.data.images import ImageSet


class Digits:
    """The 1,797 handwritten digits of 8x8 pixels that scikit-learn bundles (Alpaydin & Kaynak 1998); 17 grey levels."""

    def load(self, dir: Path) -> tuple[ImageSet, ImageSet | None]:
        table = torch.from_numpy(_table())  # (1797, 65): 64 pixels from 0 to 16, and the digit
        images = (table[:, :64] * (255 / 16)).round().to(torch.uint8).view(-1, 1, 8, 8)
        return ImageSet(images, table[:, 64].long(), classes=tuple("0123456789")), None


def _table() -> np.ndarray:
    """The file itself: importing scikit-learn takes a second."""
    spec = find_spec("sklearn")
    if spec is not None and spec.submodule_search_locations is not None:
        path = Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return np.loadtxt(path, dtype=np.uint8, delimiter=",")
    from sklearn.datasets import load_digits  # of a version that keeps it elsewhere

    digits = load_digits()
    return np.column_stack([digits.data, digits.target]).astype(np.uint8)
