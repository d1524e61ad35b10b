"""The features of many images, a few at a time: in bounded memory, and whatever batches the images come in.

On the CPU a network is asked for one number of images at once, in one thread: other numbers of images or threads
would round otherwise. No bit of an image's features depends on which images come with it.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from src.evaluation.features import Extracted, Features, untouched_randomness
from src.threads import Tick, in_threads, untold

GROUP = 256  # images whose features are under way at a time


def extract(features: Features, batches: Iterable[Tensor], number: int, update: Tick = untold) -> Extracted:
    """The features of all images; on the CPU they do not depend, to the bit, on how the images come in batches.

    Args:
        batches: uint8 images, (B, C, H, W), any number of them at a time.
        number: of images that will come; what their features need is allocated once.
        update: is told how many images are done, now and then.

    Raises:
        ValueError: for images of a wrong shape, another number of them, or features that are NaN or infinite.
        UserError: when the weights are missing or are not what they should be.
    """
    made: Extracted | None = None
    done = 0
    for group in stream(features, batches, update):
        count = len(group.features)
        if done + count > number:
            raise ValueError(f"more images came than the {number} that were announced")
        if made is None:
            made = group.each(lambda part: part.new_empty(number, part.shape[1]))
        for whole, part in zip(made, group, strict=True):
            if whole is not None and part is not None:
                whole[done : done + count] = part
        done += count
    if made is None or done < number:
        raise ValueError(f"{done} images came, and {number} were announced")
    return made


def stream(features: Features, batches: Iterable[Tensor], update: Tick = untold) -> Iterator[Extracted]:
    """As `extract`, the features of GROUP images at a time, in order."""
    features.load()
    rows = features.rows if features.device.type == "cpu" else GROUP

    def work(part: Tensor, tick: Tick) -> Extracted:
        made = _padded(features, part, rows)
        tick(len(part))
        return made

    for group in _grouped(batches):
        features.check((group.shape[1], group.shape[2], group.shape[3]))
        with untouched_randomness(features.device):
            made = in_threads(work, group.split(rows), features.device, update)
        whole = joined(made)
        for part in whole:
            if part is not None and not torch.isfinite(part).all():
                raise ValueError(f"{features.name} of some images are NaN or infinite; the weights are broken")
        yield whole


def joined(parts: Sequence[Extracted]) -> Extracted:
    """Those of several batches as one."""
    first = parts[0]
    logits = None if first.logits is None else torch.cat([part.logits for part in parts if part.logits is not None])
    spatial = None if first.spatial is None else torch.cat([part.spatial for part in parts if part.spatial is not None])
    return Extracted(torch.cat([part.features for part in parts]), logits, spatial)


def _padded(features: Features, part: Tensor, rows: int) -> Extracted:
    """Of fewer images than are computed at once, with copies of the last, whose features are dropped."""
    missing = rows - len(part)
    if missing and features.device.type == "cpu":
        full = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])
        return features(full).each(lambda made: made[: len(part)])
    return features(part)


def _grouped(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same images, GROUP at a time."""
    waiting: list[Tensor] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        while count >= GROUP:
            together = torch.cat(waiting) if len(waiting) > 1 else waiting[0]
            yield together[:GROUP]
            waiting, count = [together[GROUP:]], count - GROUP
    if count:
        yield torch.cat(waiting)
