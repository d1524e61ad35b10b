"""Sizes of images."""

from collections.abc import Sequence


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number for both.

    Raises:
        ValueError: when a number is less than 1.
    """
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    if min(height, width) < 1:
        raise ValueError(f"image_size={size} must be at least 1")
    return height, width
