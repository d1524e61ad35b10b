"""Which charts a report has, and how each asks its question."""

import hashlib
from collections import Counter
from typing import Any

import altair as alt

from src.reporting.charts import Chart, colour, curves, specification, zoom
from src.reporting.curves import by_level, is_estimated, progress, quarters, schedules
from src.reporting.scores import Column
from src.reporting.settings import Comparison, is_number, shown

MOST_SCORES = 8  # that get a chart
FAR = 25.0  # in ln SNR
LONGEST = 60  # characters of a name
Rows = list[dict[str, Any]]


def figures(comparison: Comparison, columns: list[Column], notes: list[str]) -> dict[str, list[Chart]]:
    """The charts of each section: scores, progress, levels, schedules; what cannot be drawn is said in notes."""
    labels = [setting.label for setting in comparison.settings]
    ordered = is_ordered(comparison)
    return {
        "scores": [chart for column in columns[:MOST_SCORES] if (chart := _score(comparison, column, len(columns)))],
        "progress": _progress(comparison, labels, ordered),
        "levels": _levels(comparison, labels, ordered, notes),
        "schedules": _schedules(comparison, labels, ordered, notes),
    }


def is_ordered(comparison: Comparison) -> bool:
    """Whether the settings differ by one number, of which there are several."""
    values = [setting.values for setting in comparison.settings]
    return len(comparison.keys) == 1 and len(values) > 2 and all(is_number(v[0]) for v in values)


def _score(comparison: Comparison, column: Column, number: int) -> Chart | None:
    """A score against what was swept, with error bars; without two settings that have it, none."""
    settings = [s for s in comparison.settings if column.cells[s.label].mean is not None]
    if len(settings) < 2:
        return None
    key, numeric, coloured = _axis(comparison)
    rows, single = [], []
    for setting in settings:
        cell = column.cells[setting.label]
        mean, error = cell.mean, cell.error
        assert mean is not None
        x = setting.label if key is None else setting.values[key]
        place = {
            "x": float(x) if numeric else shown(x),
            "setting": setting.label if coloured is None else _named(comparison, setting, coloured),
        }
        span = {"low": mean - error, "high": mean + error} if error is not None else {}
        rows.append({**place, "label": setting.label, "mean": mean, "error": error, "runs": cell.n, **span})
        single += [
            {**place, "run": run.name, "value": column.by_run[run.name][0]}
            for run in setting.runs
            if cell.n > 1 and run.name in column.by_run
        ]
    title = comparison.short[key] if key is not None else "setting"
    spec = _dots(rows, single, title, column.title, numeric, coloured is not None, is_ordered(comparison))
    better = {"lower": "Lower is better. ", "higher": "Higher is better. "}.get(column.better or "", "")
    if not column.ranked:
        better = "Not to be ranked: the runs differ in what is learned. "
    several = len(comparison.keys) > 2
    many = f"{len(comparison.keys)} things were swept; each setting stands for itself. " if several else ""
    of = {row["error"] is None for row in rows}
    bars = "" if of == {True} else "Bars: one standard error either way. "
    dots = "Small dots: single runs." if single else ""
    question = (
        f"How does {column.title} depend on {title}?"
        if key is not None
        else f"How do the settings compare in {column.title}?"
    )
    safe = "".join(c if c.isalnum() or c in "_-" else "_" for c in column.title)
    if len(safe) > LONGEST:  # titles of one score under several protocols begin alike
        safe = f"{safe[: LONGEST - 9]}_{hashlib.sha256(column.title.encode()).hexdigest()[:8]}"
    return Chart(
        f"score_{safe}", question, f"{better}{many}{bars}{dots}".strip(), spec, {"means": rows, "runs": single}
    )


def _axis(comparison: Comparison) -> tuple[int | None, bool, int | None]:
    """The key of the x axis, whether it is a number, and the key of the colours; None for the settings as they are."""
    numeric = [all(is_number(s.values[i]) for s in comparison.settings) for i in range(len(comparison.keys))]
    if len(comparison.keys) == 1:
        return 0, numeric[0], None
    if len(comparison.keys) == 2:
        x = numeric.index(True) if any(numeric) else 0
        return x, numeric[x], 1 - x
    return None, False, None


def _named(comparison: Comparison, setting: Any, key: int) -> str:
    return f"{comparison.short[key]} = {shown(setting.values[key])}"


def _dots(
    rows: Rows, single: Rows, x_title: str, y_title: str, numeric: bool, coloured: bool, ordered: bool
) -> dict[str, Any]:
    xs = [row["x"] for row in rows]
    if numeric:
        kind: Any = "log" if min(xs) > 0 and max(xs) / min(xs) > 100 else "linear"
        x = alt.X("x", type="quantitative", title=x_title, scale=alt.Scale(type=kind, zero=False, padding=24))
    else:
        x = alt.X("x", type="nominal", title=x_title, sort=list(dict.fromkeys(xs)), axis=alt.Axis(labelAngle=0))
    ends = [row[end] for row in (*rows, *single) for end in ("mean", "low", "high", "value") if end in row]
    scale = _scale(ends, padding=12)
    y = alt.Y("mean", type="quantitative", title=y_title, scale=scale)
    labels = list(dict.fromkeys(row["setting"] for row in rows))
    look: dict[str, Any] = {"color": colour(labels, ordered, legend=coloured)}
    line: dict[str, Any] = look if coloured else {"color": alt.value(_NEUTRAL)}
    if coloured and not numeric:  # beside each other, not on top
        look["xOffset"] = alt.XOffset("setting", type="nominal", sort=labels)
    means = alt.Chart(alt.NamedData(name="means"))
    tooltip = [
        *(
            alt.Tooltip("label", type="nominal", title="setting"),
            alt.Tooltip("mean", type="quantitative", format=".6g"),
        ),
        alt.Tooltip("error", type="quantitative", title="standard error", format=".3g"),
        alt.Tooltip("runs", type="quantitative"),
    ]
    layers = []
    if any(row["error"] is not None for row in rows):
        low = alt.Y("low", type="quantitative", title=y_title, scale=scale)
        layers.append(means.mark_rule(clip=True, strokeWidth=1.6).encode(x=x, y=low, y2="high:Q", **look))
    if numeric:
        layers.append(means.mark_line(clip=True, strokeWidth=1.2, opacity=0.5).encode(x=x, y=y, **line))
    layers.append(
        means.mark_point(clip=True, filled=True, size=80, opacity=1).encode(x=x, y=y, tooltip=tooltip, **look)
    )
    if single:
        runs = alt.Chart(alt.NamedData(name="runs")).mark_point(clip=True, size=26, opacity=0.55)
        tip = [alt.Tooltip("run", type="nominal"), alt.Tooltip("value", type="quantitative", format=".6g")]
        layers.append(runs.encode(x=x, y=alt.Y("value", type="quantitative"), tooltip=tip, **look))
    if numeric:
        layers[0] = layers[0].add_params(zoom())
    return specification(alt.layer(*layers))


def _progress(comparison: Comparison, labels: list[str], ordered: bool) -> list[Chart]:
    """Training and held-out loss, and scores that training computes, against images seen and against wall time."""
    runs = [run for setting in comparison.settings for run in setting.runs]
    scores = list(dict.fromkeys(name for run in runs for name in run.metrics.cells if name.startswith("score/")))
    what = [
        ("train/loss", "training loss", "train"),
        ("val/loss_ema", "held-out loss", "held_out"),
        *((name, name.removeprefix("score/"), name.replace("/", "_")) for name in scores),
    ]
    charts = []
    estimated = any(is_estimated(run) and run.metrics.steps for run in runs)
    for column, title, name in what:
        rows = progress(comparison, column)
        if not any(count > 1 for count in Counter(row["run"] for row in rows if row["value"] is not None).values()):
            continue  # a point is no curve
        seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
        unit, size = _unit(max(seconds, default=0.0))
        for row in rows:
            row["time"] = None if row["seconds"] is None else row["seconds"] / size
        thinned = max(row["mean_of"] for row in rows)
        means = f"Each point is a mean over up to {thinned} rows of metrics.csv. " if thinned > 1 else ""
        late = "Wall time is estimated from images/s; validation and sampling are left out. " if estimated else ""
        one = "A line a run; click the legend to single out a setting." if len(labels) > 1 else ""
        y = _y(rows, title)
        for axis, unit_title, question in (
            ("images", "images seen", f"How does the {title} develop with the images seen?"),
            ("time", f"wall time, {unit}", f"How does the {title} develop with wall time?"),
        ):
            if axis == "time" and not seconds:
                continue
            x = alt.X(
                axis,
                type="quantitative",
                title=unit_title,
                axis=_SHORT if axis == "images" else alt.Axis(),
            )
            tooltip = [
                *(alt.Tooltip("setting", type="nominal"), alt.Tooltip("run", type="nominal")),
                *(alt.Tooltip("seed", type="nominal"), alt.Tooltip("images", type="quantitative", format=",.0f")),
                alt.Tooltip("time", type="quantitative", title=f"wall time, {unit}", format=".3g"),
                alt.Tooltip("value", type="quantitative", title=title, format=".5g"),
            ]
            subtitle = f"{means}{late if axis == 'time' else ''}{one}".strip()
            spec = curves(name, x, y, labels, ordered, tooltip, points=len(rows) < 12 * len(runs))
            charts.append(Chart(f"{name}_{axis}", question, subtitle, spec, {name: rows}))
    return charts


def _y(rows: Rows, title: str) -> alt.Y:
    """Logarithmic where the values span more than a decade."""
    values = [row["value"] for row in rows if row["value"] is not None]
    log = min(values) > 0 and max(values) / min(values) > 10
    scale = alt.Scale(type="log", nice=False) if log else _scale(values)
    return alt.Y("value", type="quantitative", title=title, scale=scale)


def _scale(values: list[float], **further: Any) -> alt.Scale:
    """Linear, about the values, also where they are all the same, of which Vega makes an axis of its own."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = 0.05 * abs(low) or 1.0
        return alt.Scale(zero=False, domain=[low - room, low + room])
    return alt.Scale(zero=False, **{"padding": 8, **further})


def _unit(seconds: float) -> tuple[str, float]:
    return ("hours", 3600.0) if seconds > 7200 else ("minutes", 60.0) if seconds > 120 else ("seconds", 1.0)


def _levels(comparison: Comparison, labels: list[str], ordered: bool, notes: list[str]) -> list[Chart]:
    charts = []
    common = [alt.Tooltip("setting", type="nominal"), alt.Tooltip("run", type="nominal")]
    value = alt.Tooltip("value", type="quantitative", title="loss", format=".4g")
    rows = by_level(comparison, notes)
    if rows:
        scale = _of_log_snr(rows, reverse=True)
        x = alt.X("log_snr", type="quantitative", title="ln SNR (from clean to noise)", scale=scale)
        place = [
            alt.Tooltip("log_snr", type="quantitative", title="ln SNR", format=".2f"),
            alt.Tooltip("u", type="quantitative", title="share of the schedule", format=".3f"),
        ]
        spec = curves("levels", x, _y(rows, "training loss"), labels, ordered, [*common, *place, value], points=True)
        how = "The mean of the last tenth of training in 20 equal parts of each run's schedule. Where the runs learn "
        how += "different things, their losses are different things too."
        charts.append(Chart("loss_by_level", "At which noise levels does the loss lie?", how, spec, {"levels": rows}))
    rows = quarters(comparison)
    if rows:
        x = alt.X("quarter", type="ordinal", title="quarter of the schedule (1: cleanest)", axis=alt.Axis(labelAngle=0))
        quarter = alt.Tooltip("quarter", type="ordinal")
        spec = curves("quarters", x, _y(rows, "held-out loss"), labels, ordered, [*common, quarter, value], points=True)
        spec = {**spec, "params": [p for p in spec.get("params", []) if p.get("bind") != "scales"]}
        how = "The last held-out loss of averaged weights in each quarter."
        charts.append(
            Chart(
                "held_out_by_quarter",
                "In which quarter of the schedule is the held-out loss?",
                how,
                spec,
                {"quarters": rows},
            )
        )
    return charts


def _schedules(comparison: Comparison, labels: list[str], ordered: bool, notes: list[str]) -> list[Chart]:
    rows = schedules(comparison, notes)
    if not rows:
        return []
    own = list(dict.fromkeys(row["setting"] for row in rows))
    same = own == labels
    x = alt.X("u", type="quantitative", title="t, as a share of the schedule's length", scale=alt.Scale(zero=True))
    tooltip = [
        *(alt.Tooltip("setting", type="nominal"), alt.Tooltip("u", type="quantitative", title="t", format=".3f")),
        alt.Tooltip("alpha_bar", type="quantitative", title="alpha bar", format=".4g"),
        alt.Tooltip("log_snr", type="quantitative", title="ln SNR", format=".3f"),
    ]
    charts = []
    for name, title, question, how in (
        *(("alpha_bar", "alpha bar", "How much of the image is left at each time?", _ALPHA_BAR),),
        *(("log_snr", "ln SNR", "How do the schedules compare by signal-to-noise ratio?", _LOG_SNR),),
    ):
        scale = alt.Scale(zero=True) if name == "alpha_bar" else _of_log_snr(rows)
        y = alt.Y(name, type="quantitative", title=title, scale=scale)
        spec = curves("schedules", x, y, own, ordered and same, tooltip, detail=None)
        charts.append(Chart(f"schedule_{name}", question, how, spec, {"schedules": rows}))
    return charts


def _of_log_snr(rows: Rows, **further: Any) -> alt.Scale:
    """From the least ln SNR to the largest, as far as a network could tell the difference; the rest is a zoom away."""
    values = [row["log_snr"] for row in rows if row["log_snr"] is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low >= -FAR and high <= FAR:
        return alt.Scale(zero=False, **further)
    return alt.Scale(domain=[max(low, -FAR), min(high, FAR)], nice=True, **further)


_NEUTRAL = "#8b949e"  # a line that joins settings, on light and on dark
_SHORT = alt.Axis(labelExpr="datum.value ? format(datum.value, '~s') : '0'")
_ALPHA_BAR = "α² / (α² + σ²), the signal's share of the variance, from the configuration of each run."
_LOG_SNR = "ln(α² / σ²): between schedules the only clock that means the same."
