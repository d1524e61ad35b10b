"""What the runs of a report differ by, and what they share: the settings under comparison, each with its repeats.

Runs that differ by their seed alone are repeats of one setting. Of all settings that differ, those count that somebody
asked for (an override names them) and those that nothing else explains; what follows from them (with schedule=cosine
comes a beta_end that nobody set) is kept apart. Where a run lies and who tracks it is no difference.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from src.reporting.folders import RunFolder

SEED = "seed"
NO_DIFFERENCE = ("run", "resume", "overrides", "metric", "logger", "data.dir", "data.seed")
MISSING = "\u2014"  # of a run whose configuration does not have the key


@dataclass(frozen=True)
class Setting:
    """One place in what was varied, and the runs that were started there, which differ by their seed alone.

    Attributes:
        values: of the varied keys, in their order.
        label: names the setting in a table or a legend.
    """

    values: tuple[Any, ...]
    label: str
    runs: tuple[RunFolder, ...]


@dataclass(frozen=True)
class Comparison:
    """The settings of a report.

    Attributes:
        keys: what the settings differ by, the seed left out.
        short: the same, as short as they are clear.
        follows: what differs as a consequence: of each key, the values.
        seeds: how many there are.
        shared: what no run differs by.
        settings: in the order of their values.
    """

    keys: tuple[str, ...]
    short: tuple[str, ...]
    follows: dict[str, list[Any]]
    seeds: int
    shared: dict[str, Any]
    settings: tuple[Setting, ...]


def compare(runs: Iterable[RunFolder]) -> Comparison:
    """Finds what varied among runs, and groups them by it."""
    runs = list(runs)
    flat = [flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for f in flat for key in f))
    differing = [key for key in keys if len({_hashable(f.get(key, MISSING)) for f in flat}) > 1]
    asked = {_named(override) for run in runs for override in run.overrides}
    chosen = [key for key in differing if key in asked and key != SEED]
    for key in differing:
        if key not in chosen and key != SEED and not _follows(key, chosen, flat):
            chosen.append(key)
    short = _shorten(chosen)
    places: dict[tuple[str, ...], list[int]] = {}
    for i, f in enumerate(flat):
        places.setdefault(tuple(_hashable(f.get(key, MISSING)) for key in chosen), []).append(i)
    settings = []
    for members in places.values():
        values = tuple(flat[members[0]].get(key, MISSING) for key in chosen)
        said = [f"{name} = {shown(value)}" for name, value in zip(short, values, strict=True)]
        label = ", ".join(said) or (runs[0].name if len(runs) == 1 else "all runs")
        ordered = sorted(members, key=lambda i: (_order(flat[i].get(SEED)), i))
        settings.append(Setting(values, label, tuple(runs[i] for i in ordered)))
    follows = {
        key: sorted({_hashable(f.get(key, MISSING)): f.get(key, MISSING) for f in flat}.values(), key=_order)
        for key in differing
        if key not in chosen and key != SEED
    }
    return Comparison(
        keys=tuple(chosen),
        short=tuple(short),
        follows=follows,
        seeds=len({_hashable(f.get(SEED)) for f in flat}),
        shared={key: flat[0][key] for key in keys if key not in differing and flat},
        settings=tuple(sorted(settings, key=lambda s: [_order(value) for value in s.values])),
    )


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration by dotted keys; a group's option stands under the group's name, as an override has it."""
    flat = {k: v for k, v in config.get("choices", {}).items() if k not in NO_DIFFERENCE}
    for key, value in _leaves({k: v for k, v in config.items() if k != "choices"}):
        parts = key.split(".")
        if any(".".join(parts[:n]) in NO_DIFFERENCE for n in range(1, len(parts) + 1)):
            continue
        if key == "name" and value == flat.get("experiment"):
            continue
        flat[key] = value
    return flat


def shown(value: Any) -> str:
    """A value as an override has it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _leaves(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, dict) or not node:
        return [(path, node)]
    return [leaf for key, value in node.items() for leaf in _leaves(value, f"{path}.{key}" if path else str(key))]


def _named(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def _follows(key: str, chosen: list[str], flat: list[dict[str, Any]]) -> bool:
    """Whether the key's value is a function of those of the chosen."""
    found: dict[tuple[str, ...], str] = {}
    for f in flat:
        place = tuple(_hashable(f.get(k, MISSING)) for k in chosen)
        if found.setdefault(place, _hashable(f.get(key, MISSING))) != _hashable(f.get(key, MISSING)):
            return False
    return True


def _hashable(value: Any) -> str:
    """1 and 1.0 are one value, and true is none of them."""
    return json.dumps(float(value) if is_number(value) else value, sort_keys=True, default=str)


def _order(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if is_number(value) else (1, 0.0, str(value))


def _shorten(keys: list[str]) -> list[str]:
    """The last parts of dotted keys, as many as tell them apart."""
    short = []
    for key in keys:
        parts = key.split(".")
        lengths = range(1, len(parts) + 1)
        own = [".".join(parts[-n:]) for n in lengths]
        others = [".".join(other.split(".")[-n:]) for other in keys if other != key for n in lengths]
        short.append(next((name for name in own if name not in others), key))
    return short
