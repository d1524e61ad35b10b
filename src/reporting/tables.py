"""The tables of a report, for the page and as CSV: settings with their scores, and runs with what they cost."""

import csv
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from src.overrides import training_command
from src.reporting import markup
from src.reporting.folders import RunFolder
from src.reporting.jobs import Job
from src.reporting.scores import Column
from src.reporting.settings import MISSING, Comparison, Setting, is_number, shown
from src.reporting.text import amount, decimals, duration, error, number

COSTS = {  # of summary.json: title, and how a value is said
    "images_per_second": ("images/s", lambda v: number(v, 0 if v >= 100 else 1)),
    "wall_seconds": ("wall time", duration),
    "peak_memory_bytes": ("peak memory", lambda v: amount(v, "B")),
    "parameters": ("parameters", lambda v: amount(v)),
    "flops_per_image": ("FLOPs an image", lambda v: amount(v)),
}


def scores_table(comparison: Comparison, columns: Sequence[Column]) -> str:
    """A row a setting: what was varied, how many runs, and each score with its error, the best marked."""
    labelled = any(s.label.startswith("setting ") for s in comparison.settings)
    names = ["setting", *comparison.short] if labelled or not comparison.short else list(comparison.short)
    numeric = [False] * (len(names) - len(comparison.short)) + [
        all(is_number(s.values[i]) or s.values[i] == MISSING for s in comparison.settings)
        for i in range(len(comparison.short))
    ]
    heads = [markup.Head(names[0])]
    heads += [markup.Head(n, "num" if is_num else "") for n, is_num in list(zip(names, numeric, strict=True))[1:]]
    heads.append(markup.Head("runs", "num"))
    heads += [markup.Head(c.title, "num", f"{c.better} is better" if c.better and c.ranked else "") for c in columns]
    places = [decimals([(c.mean, c.error) for c in column.cells.values() if c.mean is not None]) for column in columns]
    rows = []
    for setting in comparison.settings:
        own = [setting.label] if len(names) > len(comparison.short) else []
        cells = [markup.text_cell(name) for name in own]
        for value in setting.values:
            cells.append(_value(value, numeric[len(cells)], bool(cells)))
        finished = sum(run.state == "finished" for run in setting.runs)
        count = str(len(setting.runs)) if finished == len(setting.runs) else f"{finished} of {len(setting.runs)}"
        cells.append(markup.number_cell(count, float(len(setting.runs))))
        cells += [
            _score(setting, c, p, any(column.best for column in columns)) for c, p in zip(columns, places, strict=True)
        ]
        rows.append(cells)
    return markup.table("table-scores", _caption(columns), heads, rows)


def _value(value: Any, numeric: bool, later: bool) -> markup.Cell:
    if numeric:
        return markup.number_cell(shown(value), float(value) if is_number(value) else None, "num" if later else "")
    return markup.text_cell(shown(value))


def _score(setting: Setting, column: Column, places: int | None, marks: bool) -> markup.Cell:
    cell = column.cells[setting.label]
    star = '\u2605<span class="unseen">best</span>' if setting.label in column.best else ""
    mark = f'<span class="mark">{star}</span>' if column.best and marks else ""
    if cell.mean is None:
        return markup.number_cell(f'<span class="faint">\u2014</span>{mark}', None)
    html = number(cell.mean, places)
    if cell.error is not None:
        html += f' <span class="error" title="over {escape(cell.of)}">\u00b1 {escape(error(cell.error, places))}</span>'
    if cell.n < cell.expected:
        html += f' <span class="error">({cell.n} of {cell.expected} runs)</span>'
    return markup.number_cell(html + mark, cell.mean, "num best" if setting.label in column.best else "num")


def _caption(columns: Sequence[Column]) -> str:
    of = {cell.of for column in columns for cell in column.cells.values() if cell.error is not None}
    said = []
    if "training seeds" in of:
        said.append("Means over training seeds \u00b1 their standard error.")
    if "sampling seeds" in of:
        said.append("Of one run: the mean over sampling seeds \u00b1 its standard error.")
    if "the score" in of:
        said.append("Of one number: \u00b1 the standard error that the score itself tells.")
    said = said or ["One number each; without repeats there is no error to tell."]
    return " ".join([*said, *(["\u2605 marks the best."] if any(column.best for column in columns) else [])])


def runs_table(comparison: Comparison) -> str:
    """A row a run: its setting, how it ended, and what it cost; what is the same of all stands above."""
    runs = [(setting, run) for setting in comparison.settings for run in setting.runs]
    told = {name: [_told(run, name) for _, run in runs] for name in (*COSTS, "device", "precision")}
    told = {name: cells for name, cells in told.items() if any(cell.value for cell in cells)}
    known = {name: list(dict.fromkeys(cell.html for cell in cells if cell.value)) for name, cells in told.items()}
    same = [name for name in known if name in SAME and len(known[name]) == 1 and len(runs) > 1]
    several = len(comparison.settings) > 1
    heads = [markup.Head(name) for name in (["run", "setting"] if several else ["run"])]
    heads += [markup.Head("seed", "num"), markup.Head("state"), markup.Head("steps", "num")]
    heads += [markup.Head(_title(name), cells[0].kind) for name, cells in told.items() if name not in same]
    rows = []
    for i, (setting, run) in enumerate(runs):
        seed = run.config.get("seed")
        cells = [markup.text_cell(run.name), *([markup.text_cell(setting.label, "short")] if several else [])]
        cells.append(markup.number_cell(escape(shown(seed)), float(seed) if isinstance(seed, int | float) else None))
        cells.append(markup.text_cell(run.state, f"state {run.state}"))
        cells.append(markup.number_cell(f"{run.steps:,}", float(run.steps)))
        rows.append([*cells, *(found[i] for name, found in told.items() if name not in same)])
    shared = "".join(f" {_title(name)[0].upper()}{_title(name)[1:]}: {known[name][0]}." for name in same)
    caption = f"Times and speeds of finished runs; memory is what one device held at most.{shared}"
    return markup.table("table-runs", caption, heads, rows)


SAME = ("parameters", "flops_per_image", "device", "precision")  # need no column where they are the same of all runs


def _title(name: str) -> str:
    return COSTS[name][0] if name in COSTS else name


def _told(run: RunFolder, name: str) -> markup.Cell:
    value = run.summary.get(name)
    if name in COSTS:
        return markup.number_cell(COSTS[name][1](value) if is_number(value) else "\u2014", value)
    if value is None:
        return markup.Cell("\u2014")
    count = run.summary.get("world_size", 1)
    return markup.text_cell(f"{count} x {value}" if name == "device" and count != 1 else str(value))


def ended_table(runs: Sequence[RunFolder], jobs: Sequence[Job]) -> str:
    """A row for each run and job without a final result: how it ended and why; nothing when there is none."""
    ended: list[tuple[str, str, str, list[str]]]
    ended = [(r.name, r.state, r.reason, r.overrides) for r in runs if r.state != "finished"]
    ended += [(job.name, job.state, job.reason, job.overrides) for job in jobs]
    if not ended:
        return ""
    rows = [
        [
            markup.text_cell(name),
            markup.text_cell(state, f"state {state}"),
            markup.text_cell(reason, "said"),
            markup.Cell(f"<code>{escape(' '.join(overrides))}</code>", " ".join(overrides), "said"),
        ]
        for name, state, reason, overrides in ended
    ]
    heads = [markup.Head(name) for name in ("run", "state", "why", "started with")]
    return markup.table("table-ended", "Their numbers, if any, are not in the means.", heads, rows)


def scores_csv(comparison: Comparison, columns: Sequence[Column]) -> str:
    """report.csv: the table of scores with all digits; of each score its error, what it is over, and how many runs."""
    heads = ["setting", *comparison.keys, "runs", "finished"]
    for column in columns:
        heads += [
            column.title,
            f"{column.title}: standard error",
            f"{column.title}: error over",
            f"{column.title}: runs",
        ]
        heads += [f"{column.title}: best"]
    rows = []
    for setting in comparison.settings:
        finished = sum(run.state == "finished" for run in setting.runs)
        row: list[Any] = [setting.label, *map(shown, setting.values), len(setting.runs), finished]
        for column in columns:
            cell = column.cells[setting.label]
            best = ("yes" if setting.label in column.best else "no") if column.best else ""
            row += [_exact(cell.mean), _exact(cell.error), cell.of, cell.n, best]
        rows.append(row)
    return _csv(heads, rows)


def runs_csv(comparison: Comparison, columns: Sequence[Column], jobs: Sequence[Job]) -> str:
    """runs.csv: a row a run, also one that failed, with its scores, its cost and the command that repeats it."""
    heads = ["run", "folder", "state", "reason", "setting", *comparison.keys, "seed", "steps"]
    for column in columns:
        heads += [column.title, f"{column.title}: standard error"]
    heads += [*COSTS, "device", "world_size", "precision", "git_commit", "command"]
    rows = []
    for setting in comparison.settings:
        for run in setting.runs:
            place = [run.name, str(run.folder), run.state, run.reason, setting.label, *map(shown, setting.values)]
            row: list[Any] = [*place, shown(run.config.get("seed")), run.steps]
            for column in columns:
                mean, error = column.by_run.get(run.name, (None, None))
                row += [_exact(mean), _exact(error)]
            row += [_exact(run.summary.get(key)) for key in COSTS]
            row += [run.summary.get(key) or "" for key in ("device", "world_size", "precision", "git_commit")]
            rows.append([*row, training_command(run.overrides)])
    for job in jobs:
        row = [job.name, "", job.state, job.reason]
        rows.append([*row, *[""] * (len(heads) - len(row) - 1), training_command(job.overrides)])
    return _csv(heads, rows)


def _exact(value: Any) -> str:
    return "" if value is None else repr(value)


def _csv(heads: list[str], rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    return text.getvalue()
