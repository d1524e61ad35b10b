"""Which images of a set train, and which validate: some classes, a limit, a held-out split.

Everything here is a choice of rows: pixels are copied only where the set is small, so that the rows of a mapped file
stay in it.
"""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from src.data.images import ImageSet
from src.errors import UserError
from src.randomness import generator, mix

COPIED = 2**28  # bytes of a set, up to which a choice of it is copied, so that what is left out frees its memory


def unlabelled(data: ImageSet) -> ImageSet:
    """The same images in one class without a name."""
    return replace(data, labels=torch.zeros_like(data.labels), classes=("",))


def of_classes(data: ImageSet, wanted: Sequence[str | int]) -> ImageSet:
    """The images of some classes, which are numbered anew, in the order they are given in.

    Args:
        wanted: names or numbers; what is the name of a class is a name.

    Raises:
        UserError: for a class that is not there, or twice.
    """
    known = class_names(data)
    numbers = class_numbers(wanted, known)
    table = torch.full((len(known),), -1, dtype=torch.int64)
    table[torch.tensor(numbers)] = torch.arange(len(numbers))
    labels = table[data.labels]
    chosen = choose(data, (labels >= 0).nonzero()[:, 0])
    return replace(chosen, labels=labels[labels >= 0], classes=tuple(known[n] for n in numbers))


def class_numbers(wanted: Sequence[str | int], known: Sequence[str]) -> list[int]:
    """Of classes by their names or numbers, among all.

    Raises:
        UserError: see `of_classes`.
    """
    numbers = [_class_number(value, known) for value in wanted]
    twice = next((value for value, n in zip(wanted, numbers, strict=True) if numbers.count(n) > 1), None)
    if twice is not None or not numbers:
        raise UserError(f"data.classes={list(wanted)} names {'no class' if not numbers else f'{twice} twice'}")
    return numbers


def class_names(data: ImageSet) -> tuple[str, ...]:
    """Of a set; the numbers where classes have no names."""
    count = int(data.labels.max()) + 1 if len(data) else 0
    return tuple(data.classes) if len(data.classes) >= count else tuple(map(str, range(count)))


def held_out(data: ImageSet, number: int, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """All but so many images, and those, drawn by a seed; both in their order.

    Raises:
        UserError: when no image would be left to train on.
    """
    if number >= len(data):
        raise UserError(f"data.val_images={number} leaves nothing of {len(data)} images to train on")
    order = torch.randperm(len(data), generator=generator(mix(0x5917), seed))
    return choose(data, order[number:].sort().values), choose(data, order[:number].sort().values)


def listed(data: ImageSet, path: Path) -> tuple[ImageSet, ImageSet]:
    """All images but those that a file names, one a line, and those, in their order.

    Raises:
        UserError: when the file cannot be read or names what is not there, and when no image would be left.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"data.val_list={path} cannot be read ({reason})") from error
    wanted = {line for line in lines if line and not line.startswith("#")}
    names = [data.name(i) for i in range(len(data))]
    unknown = next((line for line in lines if line in wanted.difference(names)), None)
    if unknown is not None:
        raise UserError(
            f"data.val_list={path} names {unknown}, which is not among the {len(names)} images; they are called "
            f"{names[0]} and the like"
        )
    if not wanted or len(wanted) == len(names):
        raise UserError(f"data.val_list={path} names {'no' if not wanted else 'every'} image; it must name some")
    inside = torch.tensor([name in wanted for name in names])
    return choose(data, (~inside).nonzero()[:, 0]), choose(data, inside.nonzero()[:, 0])


def limited(data: ImageSet, limit: int) -> ImageSet:
    """At most so many images, drawn by a fixed seed, in their order; a smaller limit takes some of a larger one's."""
    if limit >= len(data):
        return data
    return choose(data, torch.randperm(len(data), generator=generator(mix(0x117117), 0))[:limit].sort().values)


def choose(data: ImageSet, index: Tensor) -> ImageSet:
    """These images, in this order; copied where the set is small."""
    return data[index] if data.store.nbytes <= COPIED else data.part(index)


def _class_number(value: str | int, known: Sequence[str]) -> int:
    if str(value) in known:
        return known.index(str(value))
    if str(value).isdecimal() and int(value) < len(known):
        return int(value)
    near = difflib.get_close_matches(str(value), known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known[:20])}"
    raise UserError(f"data.classes names {value}, which is no class of these images; {hint}")
