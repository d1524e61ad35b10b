"""What samples are compared with: the features of a data set's images, computed once and kept.

A file in the cache is named by its key: SHA-256 of the images, their shape, and the stamp of the features. It is read
only when its checksums are right and its stamp is the one that is asked for.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.errors import reason
from src.evaluation.extraction import GROUP, joined, stream
from src.evaluation.features import Extracted, Features
from src.evaluation.frechet import Moments, distance, merged, moments
from src.files import cache_folder, check_sums, save
from src.randomness import generator, mix
from src.threads import Tick, untold

FORMAT = 1
KEPT = 50_000  # vectors that are kept one by one; means and covariances are of all
PIECE = 8192  # images whose features are joined before they are summed up
BATCH = 1024  # images that are handed over at a time


@dataclass(frozen=True)
class Reference:
    """The features of all images of a set.

    Attributes:
        features: (K, D) float32, of all images, or of 50,000 of them that are drawn by a fixed seed.
        moments: of all.
        spatial: moments of the spatial features, or None.
        floor, spatial_floor: the Fréchet distance between two random halves of the set, which is how good "good" is;
            None where a half has too few images for its dimensions.
        number: of images.
        stamp: of the features, the images and what is above: plain values.
    """

    features: Tensor
    moments: Moments
    spatial: Moments | None
    floor: float | None
    spatial_floor: float | None
    number: int
    stamp: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the features."""
        return str(self.stamp["features"]["name"])


def reference(features: Features, images: Tensor, cache: Path | None = None, update: Tick = untold) -> Reference:
    """The reference of images, from the cache where it is there and whole; otherwise computed, and put there.

    Args:
        images: (N, C, H, W) uint8, as they are: not augmented.
        cache: a folder; None for `cache_folder("reference")`.
        update: is told how many images are done, when they have to be.

    Raises:
        ValueError: for images that the features cannot be had of, or fewer than 4.
        UserError: when the features' weights are missing or are not what they should be.
    """
    if len(images) < 4:
        raise ValueError(f"{len(images)} images are too few to compare with; 4 are the least")
    features.check((images.shape[1], images.shape[2], images.shape[3]))
    features.load()
    stamp = {
        "features": features.stamp(),
        "images_sha256": images_digest(images),
        "shape": list(images.shape),
        "kept": min(KEPT, len(images)),
        "format": FORMAT,
    }
    folder = cache_folder("reference") if cache is None else cache
    path = folder / f"{features.name}-{hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:32]}.pt"
    found = _read(path, stamp) if path.exists() else None
    if found is not None:
        return found
    made = _compute(features, images, stamp, update)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save(_plain(made), path)
    except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of some
        print(f"note: the reference could not be kept in {folder} ({reason(error)}); it goes on without", flush=True)
    return made


def images_digest(images: Tensor) -> str:
    """SHA-256 of uint8 images, (N, C, H, W), byte by byte."""
    sha = hashlib.sha256()
    for block in images.split(BATCH):
        sha.update(block.cpu().contiguous().numpy().data)
    return sha.hexdigest()


def _plain(made: Reference) -> dict[str, Any]:
    """Containers that a safe reader takes."""
    spatial = None if made.spatial is None else tuple(made.spatial)
    return {**vars(made), "moments": tuple(made.moments), "spatial": spatial}


def _read(path: Path, stamp: dict[str, Any]) -> Reference | None:
    """What the file holds; None, and said so, when it is not what it should be."""
    try:
        check_sums(path)
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if held["stamp"] != stamp:
            raise ValueError("its stamp is another")
        held["moments"] = Moments(*held["moments"])
        held["spatial"] = None if held["spatial"] is None else Moments(*held["spatial"])
        return Reference(**held)
    except Exception as error:  # damaged bytes raise anything
        print(f"note: {path} is damaged ({reason(error)}) and is computed again", flush=True)
        return None


def _compute(features: Features, images: Tensor, stamp: dict[str, Any], update: Tick) -> Reference:
    n = len(images)
    order = torch.randperm(n, generator=generator(mix(0x4EF5), 0))
    half = torch.zeros(n, dtype=torch.long)
    half[order[: n // 2]] = 1
    chosen = torch.zeros(n, dtype=torch.bool)
    chosen[order[:KEPT]] = True
    kept = torch.empty(0)
    pools, spatial = _Halves(), _Halves()
    seen = held = 0
    for piece in _pieces(features, images, update):
        rows = slice(seen, seen + len(piece.features))
        seen = rows.stop
        if not len(kept):
            kept = torch.empty(stamp["kept"], piece.features.shape[1])
        own = piece.features[chosen[rows]]
        kept[held : held + len(own)] = own
        held += len(own)
        pools.add(piece.features, half[rows])
        if piece.spatial is not None:
            spatial.add(piece.spatial, half[rows])
    whole = pools.whole()
    assert whole is not None
    return Reference(kept, whole, spatial.whole(), pools.floor(), spatial.floor(), n, stamp)


class _Halves:
    """Moments of a set in two halves, whose distance is the floor."""

    def __init__(self) -> None:
        self.of: list[Moments | None] = [None, None]

    def add(self, x: Tensor, half: Tensor) -> None:
        """Vectors, (N, D), and to which half each belongs, (N,)."""
        for k, before in enumerate(self.of):
            rows = x[half == k]
            if len(rows):
                new = moments(rows)
                self.of[k] = new if before is None else merged(before, new)

    def whole(self) -> Moments | None:
        first, second = self.of
        return None if first is None or second is None else merged(first, second)

    def floor(self) -> float | None:
        first, second = self.of
        if first is None or second is None or min(first.number, second.number) <= len(first.mean):
            return None
        return distance(first, second).value


def _pieces(features: Features, images: Tensor, update: Tick) -> Iterator[Extracted]:
    """The features of all images, PIECE of them at a time."""
    waiting: list[Extracted] = []
    for group in stream(features, images.split(BATCH), update):
        waiting.append(group)
        if len(waiting) * GROUP >= PIECE:
            yield joined(waiting)
            waiting = []
    if waiting:
        yield joined(waiting)
