"""The images that a stream of shards gives first, for a look at some of them before training."""

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from src.data.catalogue import BrokenImageError
from src.data.geometry import Array, lost
from src.data.images import ImageSet
from src.data.lanes import Lane, Place, note
from src.data.packed import KINDS_OF_SIZES
from src.data.preparing import CROPPED
from src.data.sampled import Decode
from src.errors import UserError


@dataclass(frozen=True)
class FirstImages:
    """What the first window of each lane holds, in whole images; no more than one epoch of it.

    Attributes:
        images: in the order of the lanes, not shuffled.
        count, shape, source, settings, skipped, sizes, other_sizes, cropped, enlarged: see `src.data.packed.Manifest`.
    """

    images: ImageSet
    count: int
    shape: list[int]
    source: str
    settings: dict[str, Any]
    skipped: list[list[str]]
    sizes: dict[str, int]
    other_sizes: int
    cropped: dict[str, Any]
    enlarged: int


def first_images(
    lanes: Sequence[Lane], decode: Decode, classes: Sequence[str], source: str, max_broken: int
) -> FirstImages:
    """Reads them, in this process.

    Args:
        lanes: all of them.
        classes: the names of all classes.
        source: what the user called the shards.
        max_broken: so many samples and shards, of all lanes, may be skipped.

    Raises:
        UserError: when more is broken, or there are no images.
    """
    images: list[Array] = []
    labels: list[int] = []
    names: list[str] = []
    sizes: Counter[str] = Counter()
    broken: list[str] = []
    skipped: list[list[str]] = []
    shares, enlarged = [], 0
    geometry = decode.geometry
    height, width = geometry.size
    for lane in lanes:
        taken = len(images)
        with closing(lane.samples(Place())) as samples:
            for place, sample in samples:
                if place.epoch:
                    break
                try:
                    if isinstance(sample, BrokenImageError):
                        raise sample
                    image, label = decode.read(sample)
                    fitted = decode.fitted(image, sample.name)
                except BrokenImageError as error:
                    note(str(error), broken, max_broken)
                    skipped.append([error.name, error.reason])
                    continue
                h, w = image.shape[:2]
                sizes[f"{h}x{w}"] += 1
                shares.append(lost(h, w, geometry.box(h, w, 0)))
                enlarged += h < height or w < width
                images.append(fitted)
                labels.append(label)
                names.append(_short(sample.name))
                if len(images) - taken == lane.size:
                    break
    if not images:
        raise UserError(f"data.shards={source} holds no images")
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    common = sizes.most_common()
    return FirstImages(
        images=ImageSet(pixels, torch.tensor(labels), names, tuple(classes)),
        count=len(images),
        shape=list(pixels.shape[1:]),
        source=source,
        settings={"size": list(geometry.size), "crop": geometry.crop, "resize": geometry.resize},
        skipped=skipped,
        sizes=dict(common[:KINDS_OF_SIZES]),
        other_sizes=sum(n for _, n in common[KINDS_OF_SIZES:]),
        cropped={"by_more_than_a_fifth": sum(s > CROPPED for s in shares), "mean": sum(shares) / len(shares)},
        enlarged=enlarged,
    )


def _short(name: str) -> str:
    """Of a sample, with its shard's name in place of its path."""
    key, of, shard = name.rpartition(" of ")
    return key + of + shard.rpartition("/")[2]
