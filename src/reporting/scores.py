"""The columns of the table of scores: numbers that may be compared, each with its error.

Numbers of one score stand in one column when their protocols are the same, and in columns of their own when they are
not. Losses are the exception: what a network learns is part of the experiment, so that the losses of a
sweep over schedules are of different things; they stay in one column, which says so and marks no best.

A setting's number is the mean over its training seeds, and its error their standard deviation over the root of their
number; of one training seed, the same over its sampling seeds; of one number alone, the error that the score itself
tells. The smallest of several is never shown as the setting's.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from src.reporting.evaluations import Score
from src.reporting.folders import RunFolder
from src.reporting.settings import Comparison, Setting, knows_its_images, leaves, shown
from src.reporting.text import listed

LOSSES = {"val/loss_ema": "held-out loss", "val/loss_raw": "held-out loss (raw)"}
OF_EVALUATION = ("loss", "gap")  # losses, too
LEARNED = ("schedule", "objective", "weighting", "loss")  # what a loss depends on, beside the images
# Of the data, what a held-out loss depends on, and what a score against training images does besides.
IMAGES = (
    *("source", "channels", "image_size", "val_images", "pad", "_target_"),
    *("classes", "crop", "resize", "shards", "val_shards", "val_list", "val_seed"),
)
TRAINED = ("limit",)
OWN_CALLBACKS = ("checkpoint", "guard", "ema", "samples")  # those that measure nothing
HIGHER = ("is_", "precision", "recall", "density", "coverage", "accuracy")
LOWER = ("fd_", "kd_", "sfid_", "fid", "kid", "memorised", "vlb", "ode", "loss", "colour_drift")
Values = dict[str, list[tuple[float | None, float | None]]]  # of each run's name: numbers and their own errors


class Cell(NamedTuple):
    """A setting's number in a column.

    Attributes:
        mean: None where no run has a number.
        error: standard error of the mean; None where it cannot be told.
        of: what the error is over: "training seeds", "sampling seeds" or "the score".
        n: seeds whose number went in; of several runs with one seed, their mean.
        expected: seeds that the setting has; one that failed is among them.
    """

    mean: float | None
    error: float | None
    of: str
    n: int
    expected: int


@dataclass(frozen=True)
class Column:
    """One score under one protocol.

    Attributes:
        name: of the score.
        title: the name, with what tells it from other columns of the name.
        better: "lower", "higher" or None.
        ranked: whether its numbers may be compared with each other.
        note: why they may not, or what else a reader must know; empty when nothing.
        protocol: what all its numbers share.
        cells: of each setting, by its label.
        best: labels of the settings whose mean is the best; none where they are not ranked.
        by_run: of each run, by its name, its mean and error.
    """

    name: str
    title: str
    better: str | None
    ranked: bool
    note: str
    protocol: dict[str, Any]
    cells: dict[str, Cell]
    best: tuple[str, ...]
    by_run: dict[str, tuple[float, float | None]]


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean, and its standard error, sqrt(sum (x - mean)^2 / (n - 1) / n); None of a single value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def columns(comparison: Comparison, evaluations: dict[str, list[Score]]) -> list[Column]:
    """All columns: scores of evaluations, those that training computed, and the held-out losses."""
    runs = [run for setting in comparison.settings for run in setting.runs]
    return [*_of_evaluations(comparison, evaluations), *_of_training(comparison, runs), *_of_losses(comparison, runs)]


def _of_evaluations(comparison: Comparison, evaluations: dict[str, list[Score]]) -> list[Column]:
    runs = [run for setting in comparison.settings for run in setting.runs]
    found: dict[str, dict[str, list[tuple[str, Score]]]] = {}
    for run, scores in evaluations.items():
        for score in scores:
            place = json.dumps([score.protocol, score.checkpoint[0]], sort_keys=True)
            found.setdefault(score.name, {}).setdefault(place, []).append((run, score))
    made = []
    for name, by_protocol in found.items():
        groups = list(by_protocol.values())
        protocols = [{**leaves(group[0][1].protocol), "checkpoint": group[0][1].checkpoint[0]} for group in groups]
        for group, protocol, title in zip(groups, protocols, _titles(name, protocols), strict=True):
            values: Values = {}
            for run, score in group:
                values.setdefault(run, []).append((score.value, score.error))
            directions = {score.better for _, score in group}
            better = directions.pop() if len(directions) == 1 else None
            note = _different_things([run for run in runs if run.name in values])[1] if name in OF_EVALUATION else ""
            made.append(_column(comparison, name, title, better, note, protocol, values, ranked=not note))
    return made


def _of_training(comparison: Comparison, runs: list[RunFolder]) -> list[Column]:
    """score/<name> of metrics.csv, whose protocol is what the run's own callback was told."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics.cells if name.startswith("score/")))
    made = []
    for full in names:
        by_protocol: dict[str, list[RunFolder]] = {}
        for run in runs:
            if run.summary and run.metrics.last(full) is not None:
                by_protocol.setdefault(json.dumps(_scored_by(run), sort_keys=True), []).append(run)
        name = full.removeprefix("score/")
        protocols = [leaves(_scored_by(members[0])) for members in by_protocol.values()]
        titles = _titles(f"{name}, in training", protocols)
        for members, protocol, title in zip(by_protocol.values(), protocols, titles, strict=True):
            values: Values = {run.name: [(_finite(_final(run, full)), None)] for run in members}
            made.append(_column(comparison, name, title, _direction(name), "", protocol, values))
    return made


def _of_losses(comparison: Comparison, runs: list[RunFolder]) -> list[Column]:
    shared, note = _different_things(runs)
    made = []
    for name, title in LOSSES.items():
        values: Values = {run.name: [(_finite(_final(run, name)), None)] for run in runs if run.summary}
        if any(value is not None for found in values.values() for value, _ in found):
            made.append(_column(comparison, name, title, "lower", note, shared, values, ranked=not note))
    return made


def _different_things(runs: list[RunFolder]) -> tuple[dict[str, Any], str]:
    """What the losses of all these runs depend on alike, and in what they differ, in words; empty for nothing."""
    learned = [_learned(run) for run in runs]
    differing = {key for f in learned for key in f if len({_text(g.get(key)) for g in learned}) > 1}
    groups = list(dict.fromkeys(key.partition(".")[0] for key in sorted(differing)))
    note = f"the runs differ in {listed(groups)}, so that their losses are of different things" if groups else ""
    return {key: value for key, value in (learned[0] if learned else {}).items() if key not in differing}, note


def _column(
    comparison: Comparison,
    name: str,
    title: str,
    better: str | None,
    note: str,
    protocol: dict[str, Any],
    values: Values,
    ranked: bool = True,
) -> Column:
    """Args: values: of each run, by its name, a value and its own error for each sampling seed."""
    by_run: dict[str, tuple[float, float | None]] = {}
    of_error: dict[str, str] = {}
    for run, found in values.items():
        finite = [(value, error) for value, error in found if value is not None]
        if len(finite) < len(found) or not finite:
            continue  # a run with a number that is none has no mean
        mean, error = mean_and_error([value for value, _ in finite])
        of_error[run] = "sampling seeds" if len(finite) > 1 else "the score"
        by_run[run] = mean, (finite[0][1] if len(finite) == 1 else error)
    counted = _counted(comparison)
    early = [name for name in by_run if name not in counted]
    notes = [note, f"{listed(early)}, not trained to the end, not counted" if early else ""]
    final = {run: number for run, number in by_run.items() if run in counted}
    cells = {s.label: _cell(s, final, of_error) for s in comparison.settings}
    best, ahead = _best(cells, better) if ranked else ((), "")
    said = "; ".join(filter(None, [*notes, ahead]))
    return Column(name, title, better, ranked, said, protocol, cells, best, by_run)


def _counted(comparison: Comparison) -> set[str]:
    """Names of the runs whose numbers are final: those that were trained to the end, or all when none was."""
    runs = [run for setting in comparison.settings for run in setting.runs]
    return {run.name for run in runs if run.state == "finished"} or {run.name for run in runs}


def _cell(setting: Setting, by_run: dict[str, tuple[float, float | None]], of_error: dict[str, str]) -> Cell:
    of_seed: dict[str, list[str]] = {}  # runs of one seed are repeats of one training, and tell of no other
    for run in setting.runs:
        of_seed.setdefault(_text(run.config.get("seed")), []).append(run.name)
    numbers = {seed: [by_run[name] for name in names if name in by_run] for seed, names in of_seed.items()}
    means = [sum(mean for mean, _ in own) / len(own) for own in numbers.values() if own]
    if not means:
        return Cell(None, None, "", 0, len(of_seed))
    mean, error = mean_and_error(means)
    of = "training seeds"
    if len(means) == 1:
        (name, *_) = [run.name for run in setting.runs if run.name in by_run]
        error, of = by_run[name][1], of_error[name]
    return Cell(mean, error, of if error is not None else "", len(means), len(of_seed))


def _best(cells: dict[str, Cell], better: str | None) -> tuple[tuple[str, ...], str]:
    """The best of several settings, and a note when one that lacks some of its runs would have been."""
    sign = {"lower": 1.0, "higher": -1.0}.get(better or "")
    given = {label: sign * cell.mean for label, cell in cells.items() if cell.mean is not None and sign is not None}
    whole = {label: value for label, value in given.items() if cells[label].n == cells[label].expected}
    if len(given) < 2 or not whole:
        return (), ""
    best = tuple(label for label, value in whole.items() if value == min(whole.values()))
    ahead = [label for label, value in given.items() if value < min(whole.values())]
    return best, f"{listed(ahead)} would be better, but not all of its runs have a number" if ahead else ""


def _titles(name: str, protocols: list[dict[str, Any]]) -> list[str]:
    """The name with what tells its columns apart."""
    keys = list(dict.fromkeys(key for protocol in protocols for key in protocol))
    differing = [key for key in keys if len({_text(protocol.get(key)) for protocol in protocols}) > 1]
    said = [", ".join(_said(key, p[key]) for key in differing if key in p) for p in protocols]
    return [f"{name} ({text})" if text else name for text in said]


def _said(key: str, value: Any) -> str:
    """A part of a protocol, short: of a class its name, of a digest its beginning."""
    if key.rpartition(".")[2] == "_target_":
        return f"{key.removesuffix('._target_')} = {str(value).rpartition('.')[2]}"
    return f"{key} = {value[:8] if isinstance(value, str) and len(value) >= 40 else shown(value)}"


def protocols_differ(columns: Iterable[Column]) -> list[str]:
    """Names of scores that have several columns."""
    names = [column.name for column in columns if column.name not in LOSSES]
    return [name for name in dict.fromkeys(names) if names.count(name) > 1]


def _scored_by(run: RunFolder) -> dict[str, Any]:
    callbacks = {k: v for k, v in run.config.get("callbacks", {}).items() if v is not None and k not in OWN_CALLBACKS}
    return {"callbacks": callbacks, "data": _images(run, TRAINED)}


def _learned(run: RunFolder) -> dict[str, Any]:
    """What a loss of the run depends on, by dotted keys."""
    parts = {key: run.config.get(key) for key in LEARNED}
    return {**leaves(parts), **leaves({"data": _images(run)})}


def _images(run: RunFolder, more: tuple[str, ...] = ()) -> dict[str, Any]:
    data = run.config["data"]
    keys = (*IMAGES, *more) if knows_its_images(data) else (*IMAGES, *more, "dir")
    return {key: data.get(key) for key in keys}


def _final(run: RunFolder, name: str) -> float | None:
    value = run.summary.get("metrics", {}).get(name)
    return value if value is not None else run.metrics.last(name)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _direction(name: str) -> str | None:
    return "higher" if name.startswith(HIGHER) else "lower" if name.startswith(LOWER) else None


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
