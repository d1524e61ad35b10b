"""From a sample of a shard to its image and label."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from src.data.catalogue import BrokenImageError
from src.data.decoding import Array, FloatRange, decode
from src.data.geometry import DistortedError, Geometry
from src.data.lanes import Decoded
from src.data.preparing import with_channels
from src.data.shards import Sample


@dataclass(frozen=True)
class Decode:
    """From a sample to its image, (H, W, C) uint8, uint16 or float32, and its label.

    Args:
        shape: (C, H, W) that all images get.
        num_classes: labels run from 0 to num_classes - 1; with 1 they are not looked for.
        geometry: how images get their size.
        float_range: see `decode`.
        dtype: the type that all must have; None for any.
    """

    shape: tuple[int, int, int]
    num_classes: int
    geometry: Geometry
    float_range: FloatRange
    dtype: np.dtype[Any] | None = None

    def __call__(self, sample: Sample) -> Decoded:
        image, label = self.read(sample)
        return self.fitted(image, sample.name), label

    def read(self, sample: Sample) -> Decoded:
        """The image in the size that it has, and its label.

        Raises:
            BrokenImageError: when it cannot be read or is unlike the others.
        """
        if sample.image is None:
            raise BrokenImageError(sample.name, "has no image file that is read here: PNG, JPEG, WebP, TIFF, BMP, .npy")
        try:
            image = decode(sample.image, sample.name, self.float_range)
        except BrokenImageError as error:  # the range is a setting of the data, which have no source
            raise BrokenImageError(error.name, error.reason.replace("data.source.", "data.")) from error
        image = with_channels(image, self.shape[0], sample.name)
        if self.dtype is not None and image.dtype != self.dtype:
            raise BrokenImageError(
                sample.name, f"is of {image.dtype}, and the first image to validate on of {self.dtype}; make them alike"
            )
        return image, self._label(sample)

    def fitted(self, image: Array, name: str) -> Array:
        """The image in the size that all get.

        Raises:
            BrokenImageError: when that would distort it.
        """
        try:
            return self.geometry(image, 0)
        except DistortedError as error:
            raise BrokenImageError(name, str(error)) from error

    def _label(self, sample: Sample) -> int:
        if self.num_classes == 1:
            return 0
        if sample.label is None:
            raise BrokenImageError(sample.name, 'has no label: neither a .cls nor a .json with "label"')
        try:
            label = int(sample.label)
        except (TypeError, ValueError):
            label = -1
        if not 0 <= label < self.num_classes or isinstance(sample.label, float):
            raise BrokenImageError(
                sample.name,
                f"has the label {sample.label!r}; data.num_classes={self.num_classes} allows 0 to "
                f"{self.num_classes - 1}",
            )
        return label
