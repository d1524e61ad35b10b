"""A stretch of a catalogue, decoded and in its size: what the processes do that decode. Without torch."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from src.data.catalogue import BrokenImageError, Catalogue
from src.data.geometry import DistortedError, Geometry, lost

CROPPED = 0.2  # an image that loses more than this share to cropping is counted
DTYPES = ("uint8", "uint16", "float32")


@dataclass
class Chunk:
    """What became of some images in a row.

    Attributes:
        read: how many they were.
        pixels: (n, C, H, W), contiguous, of those that could be read.
        broken: number, name and reason of the others.
        sums, squares: of each channel, as stored; Python's whole numbers where the type has whole numbers.
        sizes: "HxW" before cropping, and how many.
        cropped, lost, enlarged: see `packing.Progress`.
    """

    read: int
    pixels: NDArray[np.generic]
    broken: list[tuple[int, str, str]] = field(default_factory=list)
    sums: list[Any] = field(default_factory=list)
    squares: list[Any] = field(default_factory=list)
    lowest: float = 0.0
    highest: float = 0.0
    sizes: dict[str, int] = field(default_factory=dict)
    cropped: int = 0
    lost: float = 0.0
    enlarged: int = 0


@dataclass(frozen=True)
class Preparation:
    """Makes chunks of a catalogue; can be pickled.

    Args:
        channels, dtype: of all images.
    """

    catalogue: Catalogue
    geometry: Geometry
    channels: int
    dtype: str

    def __call__(self, numbers: range) -> Chunk:
        height, width = self.geometry.size
        kept = np.empty((len(numbers), self.channels, height, width), self.dtype)
        chunk = Chunk(len(numbers), kept[:0])
        sizes: Counter[str] = Counter()
        n = 0
        for number in numbers:
            try:
                image = read(self.catalogue, number)
                pixels, share = self._fitted(image, number)
            except BrokenImageError as error:
                chunk.broken.append((number, error.name, error.reason))
                continue
            kept[n] = pixels.transpose(2, 0, 1)
            n += 1
            sizes[f"{image.shape[0]}x{image.shape[1]}"] += 1
            chunk.lost += share
            chunk.cropped += share > CROPPED
            chunk.enlarged += image.shape[0] < height or image.shape[1] < width
        chunk.pixels, chunk.sizes = kept[:n], dict(sizes)
        if n:
            _measure(chunk)
        return chunk

    def _fitted(self, image: NDArray[np.generic], number: int) -> tuple[NDArray[np.generic], float]:
        """The image as all must be, and the share of it that was cut away."""
        name = self.catalogue.names[number]
        if image.dtype != self.dtype:
            raise BrokenImageError(name, f"holds {image.dtype} values, and the first image {self.dtype}")
        image = with_channels(image, self.channels, name)
        try:
            share = lost(image.shape[0], image.shape[1], self.geometry.box(image.shape[0], image.shape[1], number))
            return self.geometry(image, number), share
        except DistortedError as error:
            raise BrokenImageError(name, str(error)) from error


def read(catalogue: Catalogue, number: int) -> NDArray[np.generic]:
    """An image that is what a catalogue promises.

    Raises:
        BrokenImageError: when it cannot be read, or is not.
    """
    name = catalogue.names[number]
    try:
        image = catalogue.read(number)
    except OSError as error:  # a file that has gone, a disk that fails
        raise BrokenImageError(name, f"cannot be read ({error})") from error
    except MemoryError as error:
        raise BrokenImageError(name, "does not fit into memory") from error
    if image.ndim != 3 or not image.size or str(image.dtype) not in DTYPES:
        raise BrokenImageError(name, f"holds {image.dtype} of shape {image.shape}, not height x width x channels")
    if image.dtype == np.float32 and not np.isfinite(image).all():
        raise BrokenImageError(name, "holds values that are not finite")
    return image


def with_channels(image: NDArray[np.generic], channels: int, name: str) -> NDArray[np.generic]:
    """(H, W, channels): the image itself, a grey one whose channel is repeated, or one without what tells nothing:
    alpha that is opaque everywhere, colour that is grey everywhere.

    Raises:
        BrokenImageError: for any other number of channels.
    """
    there = image.shape[2]
    if there == channels:
        return image
    if there == 1 and channels == 3:
        return np.broadcast_to(image, (*image.shape[:2], 3))
    opaque = 1.0 if image.dtype == np.float32 else np.iinfo(image.dtype).max  # type: ignore[type-var]
    if (there, channels) == (4, 3) and (image[..., 3] == opaque).all():
        return image[..., :3]
    if (there, channels) == (4, 1) and (image[..., 3] == opaque).all():
        image, there = image[..., :3], 3
    if (there, channels) == (3, 1) and (image == image[..., :1]).all():
        return image[..., :1]
    mend = {
        (3, 1): "it is in colour: set data.channels=3, and grey images become colour, too",
        (4, 3): "parts of it are transparent: save it without, or set data.channels=4 where all images have it",
    }
    what = f"has {there} channel{'s' * (there > 1)}, and {channels} {'are' if channels > 1 else 'is'} wanted"
    other = "make all images alike"
    if image.shape[0] == channels:
        other = "it may be channels x height x width: store it as height x width x channels"
    raise BrokenImageError(name, f"{what}; {mend.get((there, channels), other)}")


def _measure(chunk: Chunk) -> None:
    """Sums, squares and range. Exact for whole numbers: a chunk's squares are far below 2^63."""
    by_channel = chunk.pixels.transpose(1, 0, 2, 3).reshape(chunk.pixels.shape[1], -1)
    for values in by_channel:
        if values.dtype == np.float32:
            wide = values.astype(np.float64)
            chunk.sums.append(float(wide.sum()))
            chunk.squares.append(float(wide @ wide))
        else:
            counts = np.bincount(values)
            levels = np.arange(len(counts))
            chunk.sums.append(int(counts @ levels))
            chunk.squares.append(int(counts @ levels**2))
    chunk.lowest, chunk.highest = float(chunk.pixels.min()), float(chunk.pixels.max())
