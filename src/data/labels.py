"""Which class an image belongs to: from its folder, from EDM's dataset.json, or from a table."""

import csv
import io
import json
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from src.errors import UserError

JSON = "dataset.json"
Find = Callable[[str], bytes | None]


class Labels(NamedTuple):
    """The classes of a catalogue's images.

    Attributes:
        numbers: (N,) int64, 0 to len(classes) - 1.
        classes: their names; one, empty, where there are no classes.
    """

    numbers: NDArray[np.int64]
    classes: tuple[str, ...]


def no_labels(n: int) -> Labels:
    return Labels(np.zeros(n, np.int64), ("",))


def labels_of_files(
    names: Sequence[str],
    how: str | None,
    where: str,
    find: Find,
    known: Sequence[str] = (),
    gaps: bool = False,
) -> Labels:
    """Labels of files with these names, paths with slashes from the top of their folder or archive.

    Args:
        how: "none"; "folder", the top-level folder; the name of a .json or .csv file, there or anywhere; or None, for
            dataset.json where there is one that has labels, and none otherwise.
        where: the place, for messages.
        find: the content of another file of the place, or None where there is none of this name.
        known: other images of the place, which a table may name.
        gaps: whether numbers in a table may skip some.

    Raises:
        UserError: when an image has no label, a label no image, or the labels do not number classes.
    """
    if how == "none":
        return no_labels(len(names))
    if how == "folder":
        return _from_folders(names, where)
    content = find(how or JSON)
    if content is None and how is not None:
        content = _from_disk(how, where)
    if content is None:
        return no_labels(len(names))
    title = how or JSON
    pairs = _pairs(content, title, f"{title} in {where}")
    if pairs is None:  # a dataset.json without labels
        if how is not None:
            raise UserError(f"{title} in {where} holds no labels; set data.labels=none")
        return no_labels(len(names))
    return _matched(names, {*names, *known}, pairs, f"{title} of {where}", gaps)


def numbered(
    values: Sequence[Any] | NDArray[Any], title: str, classes: Sequence[str] = (), gaps: bool = False
) -> Labels:
    """Labels that are numbers already.

    Args:
        values: whole numbers, one an image.
        title: what holds them, for messages.
        classes: the names of all classes, where they have some; otherwise every number must occur, or `gaps` is true.

    Raises:
        UserError: when they do not run from 0 without a gap.
    """
    numbers = np.asarray(values)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        shape = "x".join(map(str, numbers.shape))
        raise UserError(f"{title} holds {shape} {numbers.dtype} values, not a whole number an image")
    numbers = numbers.astype(np.int64)
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0:
        raise UserError(f"{title} holds the label {low}; number the classes from 0, or set data.labels=none")
    if classes:
        if high >= len(classes):
            raise UserError(f"{title} holds the label {high}, but names {len(classes)} classes; give it all names")
        return Labels(numbers, tuple(map(str, classes)))
    present = np.unique(numbers)
    if len(present) <= high and not (gaps and high < 10**6):
        skipped = int(np.flatnonzero(np.append(present, -1) != np.arange(len(present) + 1))[0])
        raise UserError(
            f"{title} holds labels from {low} to {high} but no {skipped}; number the classes from 0 without a gap, or "
            f"give names instead of numbers, or set data.source.gaps=true where this is a part of a larger set"
        )
    return Labels(numbers, tuple(map(str, range(high + 1))))


def named(values: Iterable[str]) -> Labels:
    """Labels that are names; numbered in the order of the alphabet, or of the numbers where all names are numbers."""
    values = list(values)
    classes = ordered(set(values))
    number = {name: i for i, name in enumerate(classes)}
    return Labels(np.array([number[value] for value in values], np.int64), tuple(classes))


def ordered(names: Iterable[str]) -> list[str]:
    """Sorted: 2 before 10 where all are numbers."""
    names = list(names)
    return sorted(names, key=int) if all(re.fullmatch(r"0|[1-9]\d*", name) for name in names) else sorted(names)


def _from_folders(names: Sequence[str], where: str) -> Labels:
    flat = next((name for name in names if "/" not in name), None)
    if flat is not None:
        raise UserError(
            f"data.labels=folder, but {flat} lies in no folder of {where}; put each class into a folder of its own, "
            f"or set data.labels=none"
        )
    return named(name.split("/", 1)[0] for name in names)


def _from_disk(how: str, where: str) -> bytes:
    if not how.endswith((".json", ".csv")):
        raise UserError(f"data.labels={how} is not none, folder, or a .json or .csv file")
    try:
        return Path(how).read_bytes()
    except OSError as error:
        raise UserError(
            f"data.labels={how} is neither in {where} nor a file that can be read ({error.strerror})"
        ) from None


def _pairs(content: bytes, file: str, title: str) -> list[tuple[str, Any]] | None:
    """Names and labels, as the file has them."""
    try:
        if file.endswith(".json"):
            found = json.loads(content)
            labels = found.get("labels") if isinstance(found, Mapping) and "labels" in found else found
            if isinstance(labels, Mapping):
                return [(str(name), label) for name, label in labels.items()] if labels else None
            return [(_text(name), label) for name, label in labels] if labels else None
        rows = [row for row in csv.reader(io.StringIO(content.decode("utf-8-sig"))) if row]
        wrong = next((row for row in rows if len(row) != 2), None)
        if wrong is not None:
            raise ValueError(f"the row {','.join(wrong)[:60]!r} is not a name and a label")
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise UserError(f"{title} is not a table of names and labels ({error})") from error
    pairs: list[tuple[str, Any]] = [(name.strip(), label.strip()) for name, label in rows]
    if pairs and [word.lower() for word in pairs[0]] in (["name", "label"], ["file", "label"], ["filename", "label"]):
        pairs = pairs[1:]
    if pairs and all(re.fullmatch(r"-?\d+", label) for _, label in pairs):
        pairs = [(name, int(label)) for name, label in pairs]
    return pairs


def _text(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is no name")
    return name


def _matched(names: Sequence[str], there: Set[str], pairs: Sequence[tuple[str, Any]], title: str, gaps: bool) -> Labels:
    by_name: dict[str, Hashable] = {}
    for name, label in pairs:
        name = name.replace("\\", "/").removeprefix("./")
        if name not in there:
            raise UserError(f"{title} names {name}, which is not there; make the table anew, or set data.labels=none")
        if not isinstance(label, int | str) or isinstance(label, bool):
            raise UserError(f"{title} gives {name} the label {label!r}, which is neither a whole number nor a name")
        if by_name.setdefault(name, label) != label:
            raise UserError(f"{title} gives {name} two labels, {by_name[name]!r} and {label!r}")
    bare = next((name for name in names if name not in by_name), None)
    if bare is not None:
        raise UserError(f"{title} has no label for {bare}; add it, or set data.labels=none")
    values = [by_name[name] for name in names]
    if all(isinstance(value, int) for value in values):
        return numbered(values, title, gaps=gaps)
    return named(map(str, values))
