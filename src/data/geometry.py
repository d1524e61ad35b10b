"""From an image of any size to one of the wanted size: what is cut away, and how the rest is resized.

Without torch: this runs in the processes that decode.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from src.shapes import as_pair

Crop = Literal["center", "none", "random"]
Resize = Literal["lanczos", "area"]
Array = NDArray[Any]  # (H, W, C) of uint8, uint16 or float32


class Box(NamedTuple):
    """A part of an image, in whole pixels."""

    top: int
    left: int
    height: int
    width: int


class Size(str):
    """A size in a configuration, such as 48x64: height by width.

    Raises:
        ValueError: for another form.
    """

    described = "height by width, such as 48x64"

    def __new__(cls, text: str) -> "Size":
        height, _, width = str(text).partition("x")
        if not isinstance(text, str) or not (height.isdigit() and width.isdigit() and height.isascii()):
            raise ValueError(f"size={text} is not {cls.described}")
        return super().__new__(cls, text)


def parse_size(size: int | str | Sequence[int]) -> tuple[int, int]:
    """(height, width) of 64, "48x64" or [48, 64].

    Raises:
        ValueError: for another form, or a number less than 1.
    """
    if isinstance(size, str):
        height, _, width = Size(size).partition("x")
        size = (int(height), int(width))
    if not isinstance(size, int) and len(size) != 2:
        raise ValueError(f"size={list(size)} is not one number, or height and width, such as [48,64]")
    height_, width_ = (size, size) if isinstance(size, int) else tuple(size)
    if min(height_, width_) < 1:
        raise ValueError(f"size={size} must be at least 1")
    return height_, width_


class DistortedError(ValueError):
    """An image whose shape the wanted size would distort."""


@dataclass(frozen=True)
class Geometry:
    """How images come to their size.

    Args:
        size: (height, width) that all images get.
        crop: what is cut away before resizing.
            center: all outside the largest box of the target's proportions in the middle; its sides are rounded to
            whole pixels, and of an odd remainder the right and the bottom lose the pixel more.
            random: all outside such a box at a place drawn evenly from all that there are, from the image's number
            and the seed alone; an image of the target's proportions has one place only.
            none: nothing. An image of other proportions would be distorted, and is refused.
        resize: how the box gets its size; one that has it already keeps every pixel.
            lanczos: Pillow's Lanczos filter (a = 3, widened by the factor of a reduction), each channel by itself: of
            uint8 in its fixed-point arithmetic, of uint16 and float32 in float32.
            area: each pixel is the mean of the box's pixels over the area that it covers, those at its edge counted
            by the part that lies inside; of an enlargement, each pixel of the box as it is, mixed only across edges.
            Both round to the nearest level of uint8 and uint16, and what Lanczos overshoots is clamped: to the range
            of the type, of float32 to the range of the image.
        seed: of crop=random.

    Raises:
        ValueError: for a size less than 1, or an unknown name.
    """

    size: tuple[int, int]
    crop: Crop = "center"
    resize: Resize = "lanczos"
    seed: int = 0

    def __post_init__(self) -> None:
        as_pair(self.size)
        if self.crop not in ("center", "none", "random"):
            raise ValueError(f"crop={self.crop} is not one of center, none, random")
        if self.resize not in ("lanczos", "area"):
            raise ValueError(f"resize={self.resize} is not one of lanczos, area")

    def box(self, height: int, width: int, number: int) -> Box:
        """What is kept of image `number`, of this height and width.

        Raises:
            DistortedError: with crop=none, of other proportions than the target's.
        """
        h, w = self.size
        if width * h > height * w:
            kept = Box(0, 0, height, max(1, _nearest(height * w, h)))
        else:
            kept = Box(0, 0, max(1, _nearest(width * h, w)), width)
        free = height - kept.height, width - kept.width
        if free == (0, 0):
            return kept
        if self.crop == "none":
            raise DistortedError(f"is {height}x{width}, which {h}x{w} would distort; use crop=center or crop=random")
        if self.crop == "center":
            return kept._replace(top=free[0] // 2, left=free[1] // 2)
        at = np.random.default_rng([self.seed, number])
        return kept._replace(top=int(at.integers(free[0] + 1)), left=int(at.integers(free[1] + 1)))

    def __call__(self, image: Array, number: int) -> Array:
        """Image `number`, (H, W, C), in its size: (h, w, C) of the same type.

        Raises:
            DistortedError: see `box`.
        """
        box = self.box(image.shape[0], image.shape[1], number)
        part = image[box.top : box.top + box.height, box.left : box.left + box.width]
        if part.shape[:2] == self.size:
            return part
        return _lanczos(part, self.size) if self.resize == "lanczos" else _area(part, self.size)


def _nearest(a: int, b: int) -> int:
    """a / b to the nearest whole number, halves up."""
    return (2 * a + b) // (2 * b)


def _lanczos(image: Array, size: tuple[int, int]) -> Array:
    from PIL import Image

    width_height = size[::-1]
    channels = image.shape[2]
    if image.dtype == np.uint8 and channels in (1, 3, 4):
        # of four bands as RGBX: RGBA would mix each pixel by its alpha
        raw = np.ascontiguousarray(image)
        mode = {1: "L", 3: "RGB", 4: "RGBX"}[channels]
        picture = Image.frombuffer(mode, (raw.shape[1], raw.shape[0]), raw.tobytes(), "raw", mode, 0, 1)
        resized = np.asarray(picture.resize(width_height, Image.Resampling.LANCZOS))
        return resized.reshape(*size, channels)
    made = np.empty((*size, channels), image.dtype)
    for c in range(channels):
        band = np.ascontiguousarray(image[..., c])
        if image.dtype == np.uint8:
            made[..., c] = np.asarray(Image.fromarray(band).resize(width_height, Image.Resampling.LANCZOS))
            continue
        resized = np.asarray(Image.fromarray(band.astype(np.float32)).resize(width_height, Image.Resampling.LANCZOS))
        made[..., c] = _as_type(resized, image)
    return made


def _area(image: Array, size: tuple[int, int]) -> Array:
    height, width, channels = image.shape
    rows = _overlaps(height, size[0]) @ image.reshape(height, -1).astype(np.float32)  # (h, W C)
    columns = _overlaps(width, size[1]) @ rows.reshape(size[0], width, channels)  # (h, w, C)
    return _as_type(columns, image)


@lru_cache(maxsize=64)
def _overlaps(old: int, new: int) -> NDArray[np.float32]:
    """(new, old): the part of each new pixel's length that lies in each old one; rows sum to 1."""
    edges = np.arange(new + 1) * (old / new)
    low, high = edges[:-1, None], edges[1:, None]
    pixels = np.arange(old)[None]
    inside = np.minimum(high, pixels + 1) - np.maximum(low, pixels)
    return (np.maximum(inside, 0) * (new / old)).astype(np.float32)


def _as_type(values: NDArray[np.float32], image: Array) -> Array:
    """To the image's own type: rounded and clamped to its range, of floats to the image's."""
    if image.dtype == np.float32:
        return np.clip(values, image.min(), image.max())
    return np.clip(np.rint(values), 0, np.iinfo(image.dtype).max).astype(image.dtype)


def lost(height: int, width: int, box: Box) -> float:
    """The share of an image that lies outside the box."""
    return 1 - box.height * box.width / (height * width)
