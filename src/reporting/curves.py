"""The curves of runs as rows of a table: losses against images and time, losses by noise level, schedules."""

import json
import math
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from src.errors import UserError
from src.reporting.folders import RunFolder
from src.reporting.metrics_file import thin
from src.reporting.settings import Comparison, Setting, shown

if TYPE_CHECKING:
    from src.diffusion.levels import Schedule

Row = dict[str, Any]
POINTS = 12_000  # of all curves of a chart together,
MOST = 1000  # of one,
LEAST = 100  # and of one where there are many
LATE = 0.9  # the share of the steps after which training's losses by level count as its last
SCHEDULE_POINTS = 201


def progress(comparison: Comparison, column: str) -> list[Row]:
    """A column of metrics.csv against images seen and wall time: of each run, thinned by means, see `thin`.

    Rows have setting, run, seed, images, seconds, value (None for a gap) and mean_of, the number of rows in a mean.
    """
    runs = [(setting, run) for setting in comparison.settings for run in setting.runs]
    most = max(LEAST, min(MOST, POINTS // max(1, len(runs))))
    rows = []
    for setting, run in runs:
        steps, values = run.metrics.curve(column)
        points = list(zip(images(run, steps), seconds(run, steps), values, strict=True))
        size = max(1, math.ceil(len(points) / most))
        for image, second, value in thin(points, most):
            rows.append({**_of(setting, run), "images": image, "seconds": second, "value": value, "mean_of": size})
    return rows


def images(run: RunFolder, steps: list[float]) -> list[float]:
    """Images seen after each step."""
    return [step * run.images_per_step for step in steps]


def seconds(run: RunFolder, steps: list[float]) -> list[float]:
    """Wall time after each step, by the straight line between the rows that have it; NaN for a run without any."""
    at, known = run.metrics.curve("system/wall_seconds")
    if not at:
        at, known = _estimated(run)
    if not at:
        return [math.nan] * len(steps)
    xs, ys = [0.0, *at], [0.0, *known]
    return [_between(step, xs, ys) for step in steps]


def is_estimated(run: RunFolder) -> bool:
    """Whether metrics.csv, of an older version, has no wall time: training's own time then stands for it."""
    return "system/wall_seconds" not in run.metrics.cells


def _estimated(run: RunFolder) -> tuple[list[float], list[float]]:
    """The time that the images took at the speed of their row: validation, sampling and saving are not in it."""
    at, speeds = run.metrics.curve("images_per_second")
    total, before, known = 0.0, 0.0, []
    for step, speed in zip(at, speeds, strict=True):
        total += (step - before) * run.images_per_step / speed if speed > 0 else math.nan
        before = step
        known.append(total)
    return at, known


def _between(x: float, xs: list[float], ys: list[float]) -> float:
    """At x, the straight lines through points whose x rise; beyond the last, on at its slope."""
    right = min(max(1, bisect_left(xs, x)), len(xs) - 1)
    x0, x1, y0, y1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def by_level(comparison: Comparison, notes: list[str]) -> list[Row]:
    """Training's loss of the last tenth of the steps by noise level: the mean of the rows' means in each bin.

    Rows have setting, run, seed, log_snr (ln alpha^2 / sigma^2 in the middle of the bin), u (its place on the schedule)
    and value.
    """
    from src.training.by_level import BINS

    rows = []
    for setting in comparison.settings:
        levels = None
        for run in setting.runs:
            late = [i for i, step in enumerate(run.metrics.steps) if step > LATE * run.metrics.steps[-1]]
            if "train/loss_by_level/00" not in run.metrics.cells:
                continue
            levels = levels or _middles(run, BINS, notes)
            for i, log_snr in enumerate(levels):
                cells = run.metrics.cells.get(f"train/loss_by_level/{i:02}", [])
                values = [value for row in late if (value := cells[row]) is not None] if cells else []
                if values and all(map(math.isfinite, values)) and math.isfinite(log_snr):
                    value = math.fsum(values) / len(values)
                    rows.append({**_of(setting, run), "u": (i + 0.5) / BINS, "log_snr": log_snr, "value": value})
    return rows


def _middles(run: RunFolder, bins: int, notes: list[str]) -> list[float]:
    """ln SNR in the middle of equal bins of the schedule; none of a schedule that cannot be built."""
    import torch

    try:
        schedule = _schedule(run)
    except UserError as error:
        _note(notes, f"{run.name}: {error}; its losses by level are left out")
        return []
    alpha, sigma = schedule.level(schedule.time((torch.arange(bins) + 0.5) / bins))
    found: list[float] = (2 * (alpha.double() / sigma.double()).log()).tolist()
    return found


def quarters(comparison: Comparison) -> list[Row]:
    """The last held-out loss of averaged weights in each quarter of the schedule, the cleanest first."""
    rows = []
    for setting in comparison.settings:
        for run in setting.runs:
            for quarter in range(1, 5):
                value = run.metrics.last(f"val/loss_ema_q{quarter}")
                if value is not None and math.isfinite(value):
                    rows.append({**_of(setting, run), "quarter": quarter, "value": value})
    return rows


def schedules(comparison: Comparison, notes: list[str]) -> list[Row]:
    """Each different schedule at shares u of its length, once: its label, u, alpha_bar and log_snr.

    alpha_bar is alpha^2 / (alpha^2 + sigma^2), also of schedules that do not preserve the variance; log_snr is
    ln(alpha^2 / sigma^2), None where it is infinite.
    """
    found: dict[str, list[Setting]] = {}
    for setting in comparison.settings:
        found.setdefault(json.dumps(setting.runs[0].config["schedule"], sort_keys=True), []).append(setting)
    rows = []
    for settings in found.values():
        run = settings[0].runs[0]
        try:
            alpha, sigma = _schedule(run).table()
        except UserError as error:
            _note(notes, f"{run.name}: {error}; its schedule is not drawn")
            continue
        label, last = _schedule_label(comparison, settings, len(found)), len(alpha) - 1
        n = min(SCHEDULE_POINTS, len(alpha))
        for i in dict.fromkeys(round(j * last / max(1, n - 1)) for j in range(n)):
            a, s = float(alpha[i]), float(sigma[i])
            log_snr = 2 * math.log(a / s) if a > 0 and s > 0 else None
            u = (i + 0.5) / len(alpha)
            rows.append({"setting": label, "u": u, "alpha_bar": a**2 / (a**2 + s**2), "log_snr": log_snr})
    return rows


def _schedule_label(comparison: Comparison, settings: list[Setting], number: int) -> str:
    if number == 1:
        return "all runs"
    names = zip(comparison.keys, comparison.short, settings[0].values, strict=True)
    own = [f"{short} = {shown(value)}" for key, short, value in names if key.partition(".")[0] == "schedule"]
    return ", ".join(own) if own else settings[0].label


def _schedule(run: RunFolder) -> "Schedule":
    from src.build import build

    schedule: Schedule = build(run.config["schedule"], "schedule")
    return schedule


def _of(setting: Setting, run: RunFolder) -> Row:
    return {"setting": setting.label, "run": run.name, "seed": run.config.get("seed")}


def _note(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)
