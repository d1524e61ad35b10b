"""What the runs of a report differ by, and what they share: the settings under comparison, each with its repeats.

Runs that differ by their seed alone are repeats of one setting. Of all settings that differ, those count that somebody
asked for (an override names them) and those that nothing else explains; what follows from them (with schedule=cosine
comes a beta_end that nobody set) is kept apart. Where a run lies, who tracks it and how often it is looked at is no
difference, nor is where the images lie that a source knows by name.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from src.reporting.folders import RunFolder

SEED = "seed"
NO_DIFFERENCE = (
    *("run", "resume", "overrides", "choices", "metric", "logger", "callbacks.samples", "callbacks.checkpoint"),
    *("trainer.val_every_n_steps", "trainer.log_every_n_steps", "trainer.requeue_code"),
)
LONG = 44  # characters: where a label is longer, settings are numbered
NAMED_SOURCES = ("Digits", "MNIST", "CIFAR10")  # whose images are the same in whatever folder
MISSING = "\u2014"  # of a run whose configuration does not have the key


@dataclass(frozen=True)
class Setting:
    """One place in what was varied, and the runs that were started there, which differ by their seed alone.

    Attributes:
        values: of the varied keys, in their order.
        label: names the setting in a table or a legend; no other has it.
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
    settings: list[Setting] = []
    for members in places.values():
        values = tuple(flat[members[0]].get(key, MISSING) for key in chosen)
        said = [f"{name} = {shown(value)}" for name, value in zip(short, values, strict=True)]
        label = ", ".join(said) or (runs[0].name if len(runs) == 1 else "all runs")
        label += "" if all(label != s.label for s in settings) else f" ({len(settings) + 1})"
        ordered = sorted(members, key=lambda i: (_order(flat[i].get(SEED)), i))
        settings.append(Setting(values, label, tuple(runs[i] for i in ordered)))
    settings.sort(key=lambda s: [_order(value) for value in s.values])
    if any(len(s.label) > LONG for s in settings) and len(settings) > 1:
        settings = [replace(s, label=f"setting {n}") for n, s in enumerate(settings, 1)]
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
        settings=tuple(settings),
    )


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration by dotted keys; a group's option stands under the group's name, as an override has it."""
    flat = {k: v for k, v in config.get("choices", {}).items() if k not in NO_DIFFERENCE}
    for key, value in leaves(config).items():
        same_as_other = (
            any(key == name or key.startswith(f"{name}.") for name in NO_DIFFERENCE)
            or (key == "name" and value == flat.get("experiment"))
            or (key.endswith(".seed") and value == config.get(SEED))
            or (key == "data.dir" and knows_its_images(config["data"]))
        )
        if not same_as_other:
            flat[key] = value
    return flat


def knows_its_images(data: dict[str, Any]) -> bool:
    """Whether the images of a data set are the same in whatever folder they lie."""
    source = data.get("source")
    return isinstance(source, dict) and str(source.get("_target_")).rpartition(".")[2] in NAMED_SOURCES


def shown(value: Any) -> str:
    """A value as an override has it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def leaves(node: dict[str, Any], path: str = "") -> dict[str, Any]:
    """What nested plain values hold, by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        full = f"{path}.{key}" if path else str(key)
        found |= leaves(value, full) if isinstance(value, dict) and value else {full: value}
    return found


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
