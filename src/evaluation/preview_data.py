"""What a set of images is, before any training: in numbers, in a picture and in words that say what looks wrong."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.data.datamodule import ImageDataModule
from src.data.first import FirstImages
from src.data.images import ImageSet
from src.data.loader import normalize
from src.data.packed import Manifest
from src.data.webdataset import WebDataModule
from src.randomness import generator, mix

LOOKED_AT = 2**31  # bytes of pixels, at most; of larger sets images that are spread evenly
BLOCK = 1024  # images that are looked at together
BINS = 64  # of the histogram of values,
HISTOGRAM_IMAGES = 4096  # which is of about so many images
HISTOGRAM_NUMBERS = 2**26  # and of no more numbers than these
SHOWN = 40  # images in the picture
EXAMPLES = 3  # that a sentence names

# What looks wrong.
CONSTANT = 0.02  # standard deviation of each channel, of values in [-1, 1]: two and a half levels of 256
FEW = 10  # images of a class, or
FEW_SHARE = 0.05  # of what the median class has
CROPPED = 0.2  # share of an image that is cut away
USED = 0.25  # share of [-1, 1] that all values lie in

Data = ImageDataModule | WebDataModule


@dataclass(frozen=True)
class Look:
    """What was found.

    Attributes:
        train, val: number of images; looked_at: of those to train on, how many the rest was found out from. Of a
            stream, all that was looked at counts as the images to train on.
        counts: of the images to train on, by class.
        lowest, highest, mean, std: of values as the network sees them, the last two (C,).
        histogram: (C, BINS) shares of values, between `edges`.
        constant: numbers of nearly constant images.
        copies: numbers of images that are another's exact copy, each with the first one's.
        contradictions: how many of the copies have another label.
        leaks: numbers of validation images, each with that of a training image which is the same.
        manifest: of the packed store, or a stream's first images; None for sets that come decoded.
    """

    train: int
    val: int
    looked_at: int
    counts: dict[str, int]
    lowest: float
    highest: float
    mean: list[float]
    std: list[float]
    edges: Tensor
    histogram: Tensor
    constant: list[int]
    copies: list[tuple[int, int]]
    contradictions: int
    leaks: list[tuple[int, int]]
    manifest: Manifest | FirstImages | None


def look_at(data: Data) -> Look:
    """Looks at the images of a datamodule that is set up."""
    train = data.train
    numbers = _spread(train)
    first: dict[bytes, int] = {}
    constant: list[int] = []
    copies: list[tuple[int, int]] = []
    contradictions = 0
    channels = train.store.shape[1]
    total = torch.zeros(2, channels, dtype=torch.float64)
    lowest, highest = float("inf"), float("-inf")
    seen, shown = [], max(1, min(HISTOGRAM_IMAGES, HISTOGRAM_NUMBERS // train.store[0].numel()))
    for part in numbers.split(BLOCK):
        images = train.take(part)
        x = normalize(images).double()  # (B, C, H, W)
        total += torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
        lowest, highest = min(lowest, float(x.min())), max(highest, float(x.max()))
        flat = x.flatten(2).std(2, correction=0).amax(1) < CONSTANT
        constant += part[flat].tolist()
        for i, digest in zip(part.tolist(), _digests(images), strict=True):
            other = first.setdefault(digest, i)
            if other != i:
                copies.append((i, other))
                contradictions += bool(train.labels[i] != train.labels[other])
        seen.append(x[:: max(1, len(numbers) // shown)].transpose(0, 1).flatten(1))
    values = torch.cat(seen, 1)  # (C, about shown H W)
    edges = torch.linspace(min(-1.0, lowest), max(1.0, highest), BINS + 1, dtype=torch.float64)
    counted = torch.stack([torch.histogram(channel, edges)[0] for channel in values])
    leaks = [
        (i, first[digest])
        for part in torch.arange(len(data.val)).split(BLOCK)
        for i, digest in zip(part.tolist(), _digests(data.val.take(part)), strict=True)
        if digest in first
    ]
    pixels = len(numbers) * train.store[0, 0].numel()
    mean = total[0] / pixels
    names = list(data.class_names)
    by_class = torch.bincount(train.labels, minlength=len(names)).tolist()
    return Look(
        train=len(train),
        val=len(data.val),
        looked_at=len(numbers),
        counts={name or "images": n for name, n in zip(names, by_class, strict=False)},
        lowest=lowest,
        highest=highest,
        mean=mean.tolist(),
        std=(total[1] / pixels - mean**2).clamp_min(0).sqrt().tolist(),
        edges=edges,
        histogram=counted / counted.sum(1, keepdim=True),
        constant=constant,
        copies=copies,
        contradictions=contradictions,
        leaks=leaks,
        manifest=_manifest(data),
    )


def _manifest(data: Data) -> Manifest | FirstImages | None:
    if isinstance(data, WebDataModule):
        return data.first
    return data.stores[0].manifest if data.stores and data.stores[0] is not None else None


def words_on(found: Look, data: Data) -> list[dict[str, Any]]:
    """What was looked at where that is not all, and what looks wrong, each with its name and the numbers behind it; one
    sentence when nothing does."""
    said = (
        list(_on_values(found, data))
        + list(_on_classes(found, data))
        + list(_on_shapes(found, data))
        + list(_on_copies(found, data))
    )
    part = list(_on_number(found, data))
    if said:
        return part + said
    low, high = found.lowest, found.highest
    sentence = (
        f"Nothing looks wrong with the images: {found.train:,} to train and {found.val:,} to validate on, values from "
        f"{low:.2f} to {high:.2f}, no exact copies, none nearly constant"
    )
    if part:
        sentence = sentence.replace("the images", "these")
    if len(found.counts) > 1:
        sentence += f", and at least {min(found.counts.values()):,} images of each of {len(found.counts)} classes"
    right = _said("images_look_right", sentence + ".", train=found.train, val=found.val, lowest=low, highest=high)
    return [*part, right]


def _on_number(found: Look, data: Data) -> Iterator[dict[str, Any]]:
    number = found.looked_at
    if isinstance(data, WebDataModule):
        yield _said(
            "first_images",
            f"Looked at: the first {_images(number)} that training would see, from {len(data.shards):,} shards; what "
            f"is counted is counted among these. data.shuffle={data.shuffle} says how many, up to one epoch.",
            number=number,
            shards=len(data.shards),
        )
    elif number < found.train:
        yield _said(
            "some_images",
            f"Looked at: {_images(number)} of {found.train:,}, spread evenly; copies, nearly constant images and "
            "values are those of these.",
            number=number,
            of=found.train,
        )


def _on_values(found: Look, data: Data) -> Iterator[dict[str, Any]]:
    low, high = found.lowest, found.highest
    numbers = {"lowest": low, "highest": high}
    if low < -1.000001 or high > 1.000001:
        yield _said(
            "outside_range",
            f"Outside the range: the network would see values from {low:.3g} to {high:.3g}, and samples are clamped to "
            "[-1, 1]; state what floats span with data.source.float_range.",
            **numbers,
        )
    elif high - low < 2 * USED:
        yield _said(
            "narrow_range",
            f"Narrow range: all values lie between {low:.3f} and {high:.3f}, {(high - low) / 2:.1%} of [-1, 1] (less "
            f"than {USED:.0%}), as when 12 bits are stored as 16; stretch the images to the range of their type.",
            **numbers,
        )
    if found.constant:
        number, share = len(found.constant), len(found.constant) / found.looked_at
        names = _listed([data.train.name(i) for i in found.constant])
        yield _said(
            "constant_images",
            f"Nearly constant: {_images(number)} ({share:.2%}) {_have(number)} one colour all over (a standard "
            f"deviation below {CONSTANT}), such as {names}; take them away, unless they are meant.",
            number=number,
            share=share,
            limit=CONSTANT,
        )


def _on_classes(found: Look, data: Data) -> Iterator[dict[str, Any]]:
    if len(found.counts) < 2:
        return
    median = sorted(found.counts.values())[len(found.counts) // 2]
    limit = max(FEW, FEW_SHARE * median)
    mend = "add some, leave the class out with data.classes, or draw all classes equally often with data.balance=true"
    if isinstance(data, WebDataModule):
        mend = "look at more images with data.shuffle, or add some to the shards"
    few = sorted(((n, name) for name, n in found.counts.items() if n < limit), key=lambda pair: pair[0])
    if few:
        listed = ", ".join(f"{name} {n}" for n, name in few[:EXAMPLES]) + (", ..." if len(few) > EXAMPLES else "")
        yield _said(
            "small_classes",
            f"Few images: {len(few)} of {len(found.counts)} classes {_have(len(few))} fewer than {limit:.0f} images "
            f"({listed}; the median class {median:,}); {mend}.",
            classes={name: n for n, name in few},
            limit=limit,
            median=median,
        )


def _on_shapes(found: Look, data: Data) -> Iterator[dict[str, Any]]:
    if found.manifest is None:
        return
    count, cut = found.manifest.count, found.manifest.cropped["by_more_than_a_fifth"]
    other = "" if isinstance(data, WebDataModule) else ", or crop=random, which shows other parts of other images"
    if cut:
        yield _said(
            "cropped",
            f"Cropped: {_images(cut)} of {count:,} {'lose' if cut > 1 else 'loses'} more than {CROPPED:.0%} to "
            f"cropping, on average all lose {found.manifest.cropped['mean']:.0%}; they come as "
            f"{_listed(list(found.manifest.sizes))}. Choose an image_size of their proportions"
            f"{_fitting(found.manifest)}{other}.",
            number=cut,
            mean=found.manifest.cropped["mean"],
            limit=CROPPED,
        )
    if found.manifest.enlarged:
        height, width = found.manifest.shape[1:]
        yield _said(
            "enlarged",
            f"Enlarged: {_images(found.manifest.enlarged)} of {count:,} {_have(found.manifest.enlarged)} fewer pixels "
            f"than {height}x{width} and became soft; choose a smaller image_size, or take them away.",
            number=found.manifest.enlarged,
        )
    if found.manifest.skipped:
        name, reason = found.manifest.skipped[0]
        yield _said(
            "skipped",
            f"Left out: {_images(len(found.manifest.skipped))} could not be used, the first, {name}, {reason}.",
            number=len(found.manifest.skipped),
        )


def _fitting(manifest: Manifest | FirstImages) -> str:
    """A size about as large as the one there is, of the proportions of the commonest images that lose much."""
    _, height, width = manifest.shape
    for size in manifest.sizes:
        h, w = map(int, size.split("x"))
        if 1 - min(w * height / (h * width), h * width / (w * height)) > CROPPED:
            short = min(height, width)
            scale = short / min(h, w)
            return f", such as [{round(h * scale)},{round(w * scale)}]"
    return ""


def _on_copies(found: Look, data: Data) -> Iterator[dict[str, Any]]:
    if found.copies:
        number, share = len(found.copies), len(found.copies) / found.looked_at
        pairs = " and ".join(data.train.name(i) for i in reversed(found.copies[0]))
        other = f"; {found.contradictions:,} of them with another label" if found.contradictions else ""
        yield _said(
            "copies",
            f"Copies: {_images(number)} ({share:.2%}) {'are' if number > 1 else 'is'} the same as another to the "
            f"bit{other}, such as {pairs}; what comes several times is learned by heart first.",
            number=number,
            share=share,
            contradictions=found.contradictions,
        )
    if found.leaks:
        number = len(found.leaks)
        yield _said(
            "leaks",
            f"In both sets: {number:,} of {found.val:,} validation images {'are' if number > 1 else 'is'} also among "
            f"the training images, such as {data.val.name(found.leaks[0][0])}; the validation loss will look too good.",
            number=number,
        )


def chosen(data: Data, seed: int) -> Tensor:
    """Numbers of training images for a picture: of each class in turn, as many as there is room for."""
    order = torch.randperm(len(data.train), generator=generator(mix(seed, 4), 0))
    labels = data.train.labels[order]
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        of = labels == label
        rank[of] = torch.arange(int(of.sum()))
    return order[(rank * (int(labels.max()) + 1) + labels).argsort(stable=True)][:SHOWN]


def described(found: Look) -> dict[str, Any]:
    """All of it but the histogram of values, as plain values; long lists are cut."""
    kept = {key: value for key, value in vars(found).items() if key not in ("edges", "histogram", "manifest")}
    for key in ("constant", "copies", "leaks"):
        kept[f"{key}_number"], kept[key] = len(kept[key]), kept[key][:100]
    manifest = found.manifest
    packed = None
    if manifest is not None:
        names = ("source", "settings", "sizes", "other_sizes", "cropped", "enlarged", "skipped")
        packed = {name: getattr(manifest, name) for name in names}
    return {**kept, "packed": packed}


def _spread(data: ImageSet) -> Tensor:
    """The numbers of all images, or of so many that are spread evenly."""
    limit = max(1, LOOKED_AT // data.store[:1].nbytes)
    if len(data) <= limit:
        return torch.arange(len(data))
    return torch.linspace(0, len(data) - 1, limit, dtype=torch.float64).long()


def _digests(images: Tensor) -> list[bytes]:
    return [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in images]


def _said(name: str, sentence: str, **numbers: Any) -> dict[str, Any]:
    return {"name": name, "sentence": sentence, "numbers": numbers}


def _images(number: int) -> str:
    return f"{number:,} image{'s' * (number != 1)}"


def _have(number: int) -> str:
    return "have" if number != 1 else "has"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:EXAMPLES]) + (" and others" if len(names) > EXAMPLES else "")
