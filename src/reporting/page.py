"""The page: one HTML file that needs nothing else, with its charts, pictures, styles and scripts inside."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from src.overrides import training_command
from src.reporting import markup
from src.reporting.charts import HEIGHT, Chart, config
from src.reporting.folders import RunFolder
from src.reporting.jobs import Job
from src.reporting.pictures import Grids, Picture
from src.reporting.scores import Column
from src.reporting.settings import Comparison, shown
from src.reporting.tables import ended_table, runs_table, scores_table
from src.reporting.text import listed

HERE = Path(__file__).parent
SMALL, LARGE = 330, 560  # pixels that a grid of samples may be wide
MAIN = ("experiment", "data", "model", "schedule", "objective", "weighting", "density", "loss", "optimizer", "sampler")
# Nothing may be fetched, from nowhere.
POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:"


@dataclass(frozen=True)
class Content:
    """All that the page shows.

    Attributes:
        standing, verdict, notes: sentences, of `verdict` and `provenance` and of what could not be read.
        charts: of each section, with the SVG that paper gets.
        left_out: sentences on pictures that are not in the page.
        same_noise: whether picture k of all grids starts from the same noise.
        pictures: run, file, what it shows, and the picture.
        made: when and of what, in a line.
    """

    title: str
    standing: str
    verdict: Sequence[str]
    notes: Sequence[str]
    comparison: Comparison
    columns: Sequence[Column]
    jobs: Sequence[Job]
    charts: dict[str, list[tuple[Chart, str]]]
    grids: Sequence[Grids]
    left_out: Sequence[str]
    same_noise: bool
    pictures: Sequence[tuple[str, str, str, Picture]]
    made: str


def page(content: Content) -> str:
    """The HTML."""
    runs = [run for setting in content.comparison.settings for run in setting.runs]
    sections = [
        ("summary", "Summary", _summary(content)),
        ("scores", "Final scores", _scores(content)),
        ("progress", "Training", _charts(content, "progress")),
        ("levels", "Noise levels", _charts(content, "levels")),
        ("samples", "Samples", _grids(content, runs)),
        ("schedules", "Schedules", _charts(content, "schedules")),
        ("cost", "Runs and cost", runs_table(content.comparison)),
        ("ended", "Without a result", ended_table(runs, content.jobs)),
        ("pictures", "Pictures", _pictures(content)),
        ("repeat", "Repeat", _commands(content)),
    ]
    there = [(name, title, html) for name, title, html in sections if html]
    links = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title, _ in there)
    data = json.dumps(_data(content), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(content.title)}</title>
<link rel="icon" href="data:,">
<style>
{(HERE / "page.css").read_text()}</style>
</head>
<body>
<header><h1>{escape(content.title)}</h1><p class="standing">{escape(content.standing)}</p></header>
<nav aria-label="Sections"><div><ul>{links}</ul><button type="button" id="theme">Dark</button></div></nav>
<main>
{"".join(markup.section(*entry) for entry in there)}
</main>
<footer>{escape(content.made)}</footer>
<script type="application/json" id="report">{data}</script>
<script>{_library()}</script>
<script>
{(HERE / "page.js").read_text()}</script>
</body>
</html>
"""


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed, with nothing in them that ends a script."""
    import vl_convert

    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _summary(content: Content) -> str:
    comparison = content.comparison
    verdict = f"<p>{escape(' '.join(content.verdict)).replace(' = ', '&nbsp;=&nbsp;')}</p>" if content.verdict else ""
    varied = [
        (key, ", ".join(dict.fromkeys(shown(s.values[i]) for s in comparison.settings)))
        for i, key in enumerate(comparison.keys)
    ]
    if comparison.seeds > 1:
        seeds = dict.fromkeys(shown(run.config.get("seed")) for s in comparison.settings for run in s.runs)
        varied.append(("seed", ", ".join(seeds)))
    same = [(key, shown(comparison.shared[key])) for key in MAIN if key in comparison.shared]
    blocks = []
    if varied:
        follows = [(key, ", ".join(map(shown, values))) for key, values in comparison.follows.items()]
        more = markup.fold(f"{len(follows)} settings that follow from these", markup.pairs(follows)) if follows else ""
        blocks.append(f"<div><h3>What varied</h3>{markup.pairs(varied)}{more}</div>")
    everything = [(key, shown(value)) for key, value in comparison.shared.items()]
    whole = markup.fold(f"All {len(everything)} settings", markup.pairs(everything))
    blocks.append(f"<div><h3>{'What did not' if varied else 'Settings'}</h3>{markup.pairs(same)}{whole}</div>")
    two = f'<div class="two">{"".join(blocks)}</div>'
    return f'<div class="verdict">{verdict}</div>{markup.notes(content.notes)}{two}'


def _scores(content: Content) -> str:
    if not content.columns:
        return '<p class="faint">No run has a final number yet.</p>'
    titles: dict[str, list[str]] = {}
    for column in content.columns:
        titles.setdefault(column.note, []).append(column.title)
    said = [f"{listed(names)}: {note}." for note, names in titles.items() if note]
    return scores_table(content.comparison, content.columns) + markup.notes(said) + _charts(content, "scores")


def _charts(content: Content, section: str) -> str:
    figures = []
    for chart, svg in content.charts.get(section, []):
        title, subtitle = escape(chart.title), escape(chart.subtitle)
        figures.append(
            f"<figure><figcaption><h3>{title}</h3><p>{subtitle}</p></figcaption>"
            f'<div class="chart" data-chart="{escape(chart.name)}" role="img" aria-label="{title}"></div>'
            f'<img class="still" alt="{title}" src="{_svg(svg)}"></figure>'
        )
    if not figures:
        return ""
    hint = ""
    if section == next(name for name, charts in content.charts.items() if charts):
        how = "In all charts Ctrl, Cmd or Shift with the wheel zooms, dragging moves, and a double click resets."
        hint = f'<p class="faint small hint">{how}</p>'
    return f'{hint}<div class="charts">{"".join(figures)}</div>'


def _svg(svg: str) -> str:
    import base64

    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _grids(content: Content, runs: Sequence[RunFolder]) -> str:
    if not content.grids:
        return ""
    steps = _steps(content)
    by_name = {run.name: run for run in runs}
    labels = {run.name: setting.label for setting in content.comparison.settings for run in setting.runs}
    large = len(content.grids) <= 2
    figures = [_grid(grids, by_name[grids.run], labels[grids.run]) for grids in content.grids]
    same = "Picture k of every grid starts from the same noise, so that what differs is the run. "
    said = (same if content.same_noise else "") if len(content.grids) > 1 else ""
    said += "Averaged weights; each pixel of a sample is a square of screen pixels."
    sizes = "".join(
        f'<button type="button" class="size" data-size="{size}" aria-pressed="{on}">{size.title()}</button>'
        for size, on in (("small", str(not large).lower()), ("large", str(large).lower()))
    )
    controls = (
        f'<div class="controls"><button type="button" id="play">Play</button><input type="range" id="time" min="0" '
        f'max="{len(steps) - 1}" value="{len(steps) - 1}" step="1" aria-label="Time of training">'
        f'<output id="now" for="time">step {steps[-1]:,}</output>{sizes}</div>'
    )
    css = "grids large" if large else "grids"
    said = escape(" ".join([said, *content.left_out]))
    return f'<p class="faint">{said}</p>{controls}<div class="{css}">{"".join(figures)}</div>'


def _grid(grids: Grids, run: RunFolder, label: str) -> str:
    images = []
    last = max(grids.frames)
    for step, picture in grids.frames.items():
        caption = f"step {step:,}, {step * run.images_per_step:,} images"
        hidden = "" if step == last else " hidden"
        alt = escape(f"samples of run {run.name} ({label}) at step {step:,}")
        images.append(
            f'<img alt="{alt}" data-step="{step}" data-caption="{caption}" width="{picture.size[0]}" '
            f'height="{picture.size[1]}" src="{picture.uri}"{hidden}>'
        )
    width = next(iter(grids.frames.values())).size[0]
    small, large = (max(1, limit // width) for limit in (SMALL, LARGE))
    style = f"--width: {width}; --small: {small}; --large: {large}"
    name = escape(label if label == run.name else f"{label}, run {run.name}")
    seed = escape(f", seed {shown(run.config.get('seed'))}")
    caption = f"<span>step {last:,}, {last * run.images_per_step:,} images</span>"
    return f'<figure style="{style}">{"".join(images)}<figcaption>{name}{seed}<br>{caption}</figcaption></figure>'


def _steps(content: Content) -> list[int]:
    return sorted({step for grids in content.grids for step in grids.frames})


def _pictures(content: Content) -> str:
    figures = [
        f'<figure><img alt="{escape(f"{title}, run {run}")}" width="{picture.size[0]}" height="{picture.size[1]}" '
        f'src="{picture.uri}"><figcaption>{escape(title)}<br><span class="faint">{escape(f"{run}: {where}")}</span>'
        "</figcaption></figure>"
        for run, where, title, picture in content.pictures
    ]
    return f'<div class="pictures">{"".join(figures)}</div>' if figures else ""


def _commands(content: Content) -> str:
    started = [
        (f"run {run.name}: {setting.label}, seed {shown(run.config.get('seed'))}", run.overrides)
        for setting in content.comparison.settings
        for run in setting.runs
    ]
    started += [(f"run {job.name}, {job.state}", job.overrides) for job in content.jobs]
    items = [
        f'<li><span class="small faint">{escape(name)}</span><pre><code>{escape(training_command(overrides))}'
        "</code></pre></li>"
        for name, overrides in started
    ]
    return f'<p class="faint hint">A click selects a command.</p><ol class="commands">{"".join(items)}</ol>'


def _data(content: Content) -> dict[str, Any]:
    """What the script reads: configs of both themes, charts, and the data of each once, as columns and rows."""
    labels = [setting.label for setting in content.comparison.settings]
    names: dict[int, str] = {}
    data: dict[str, Any] = {}
    charts = {}
    for chart, _ in (pair for pairs in content.charts.values() for pair in pairs):
        sources = {}
        for source, rows in chart.data.items():
            if id(rows) not in names:
                names[id(rows)] = f"{chart.name}.{source}"
                data[names[id(rows)]] = _columnar(rows)
            sources[source] = names[id(rows)]
        shown_labels = {str(row["setting"]) for rows in chart.data.values() for row in rows if "setting" in row}
        width = 34 + math.ceil(6.6 * max(map(len, shown_labels), default=10))
        charts[chart.name] = {"spec": chart.spec, "sources": sources, "label": width}
    return {
        "config": {theme: config(theme, len(labels)) for theme in ("light", "dark")},
        "charts": charts,
        "data": data,
        "steps": _steps(content),
        "height": HEIGHT,
    }


def _columnar(rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {"columns": columns, "rows": [[_rounded(row.get(key)) for key in columns] for row in rows]}


def _rounded(value: Any) -> Any:
    """Seven digits, which is more than a screen shows; none of what is not finite."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
