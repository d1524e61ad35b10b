"""What was measured, as one JSON file that grows by a record at a time, and never mixes what cannot be compared.

settings   what all records share: minutes, samples, device, versions, and both classifiers
real       the distances of real images
entries    by entry: its settings, and its records by seed
tried      trials, each with settings of its own
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.errors import UserError
from src.files import replacing

Kept = dict[str, Any]


def empty() -> Kept:
    return {"settings": None, "real": None, "entries": {}, "tried": []}


def read(path: Path) -> Kept:
    """What is kept in a file; nothing, where there is none.

    Raises:
        UserError: for a file that holds something else.
    """
    if not path.is_file():
        return empty()
    try:
        kept = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); name another with --json") from error
    if not isinstance(kept, dict) or kept.keys() != empty().keys():
        raise UserError(f"{path} holds no records of this race; name another with --json")
    return kept


def write(kept: Kept, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(kept, indent=1) + "\n")


def check(kept: Kept, settings: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares with what is about to be run.

    Args:
        entries: settings of those that will run.

    Raises:
        UserError: naming the first setting in which the records that are kept were made otherwise.
    """
    pairs = [("all records", kept["settings"], settings)] if kept["entries"] else []
    pairs += [
        (f"records of {name!r}", kept["entries"][name]["settings"], now)
        for name, now in entries.items()
        if _has(kept, name)
    ]
    for of, before, now in pairs:
        for key, (old, new) in differences(before, now).items():
            raise UserError(
                f"{of} were made with {key}={old}, and now it is {new}; set it as it was, name another file with "
                "--json, or throw away what differs with --redo"
            )


def without_others(kept: Kept, settings: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> Kept:
    """`kept` without the records that were made otherwise; with other common settings, without all but the trials."""
    if kept["settings"] is not None and differences(kept["settings"], settings):
        return {**empty(), "tried": kept["tried"]}
    stay = {n: e for n, e in kept["entries"].items() if n not in entries or not differences(e["settings"], entries[n])}
    return {**kept, "entries": stay}


def missing(kept: Kept, entries: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """What is to be run, seed by seed, so that whoever stops it half way has all entries of some seeds."""
    return [(name, seed) for seed in seeds for name in entries if str(seed) not in _seeds(kept, name)]


def records(kept: Kept, name: str) -> list[dict[str, Any]]:
    """Those of an entry, in the order of their seeds."""
    return [record for _, record in sorted(_seeds(kept, name).items(), key=lambda item: int(item[0]))]


def keep(kept: Kept, name: str, settings: Mapping[str, Any], seed: int, record: Mapping[str, Any]) -> None:
    """Adds a record, in place."""
    entry = kept["entries"].setdefault(name, {"settings": settings, "seeds": {}})
    entry["seeds"][str(seed)] = record


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The values that differ, before and now, by dotted keys; "nothing" for what is not there."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*before, *(key for key in now if key not in before)]:
        old, new = before.get(key, "nothing"), now.get(key, "nothing")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differences(old, new, f"{prefix}{key}.")
        elif _plain(old) != _plain(new):
            found[f"{prefix}{key}"] = (old, new)
    return found


def _plain(value: Any) -> Any:
    """As it comes back from a file."""
    return json.loads(json.dumps(value))


def _has(kept: Kept, name: str) -> bool:
    return name in kept["entries"]


def _seeds(kept: Kept, name: str) -> dict[str, Any]:
    return kept["entries"][name]["seeds"] if _has(kept, name) else {}
