"""What all charts of a report share: their look in light and dark, hover and zoom, and pictures without a browser.

A chart is a Vega-Lite specification without data, which come beside it, so that several may read the same. The page
draws it with the browser's width; `draw` makes SVG and PNG of it at a fixed one, in light colours.
"""

from dataclasses import dataclass, field
from typing import Any

import altair as alt

WIDTH, HEIGHT = 720, 300  # of the pictures
FONT = "Helvetica Neue, Helvetica, Arial, sans-serif"
CATEGORIES = {  # told apart also by those who see few colours; after Okabe & Ito 2008, without yellow on white
    "light": ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#5b4ea3", "#7a7a7a"],
    "dark": ["#56a8e0", "#f0894a", "#35c29a", "#e39ac4", "#9ad4f5", "#e0b64a", "#a398e6", "#a8a8a8"],
}
RAMPS = {  # for settings in order, from cold to warm
    "light": ["#2c3e8f", "#2b7bba", "#2aa198", "#7a9b2e", "#c78a1b", "#c2452d"],
    "dark": ["#8fa3ff", "#5cb3f2", "#4fd0c0", "#b4d455", "#f2c14e", "#ff8568"],
}


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: of its files.
        title: the question that it answers.
        subtitle: how to read it.
        spec: Vega-Lite without data, whose sources are named.
        data: the rows of each source; the same list may be in several charts.
    """

    name: str
    title: str
    subtitle: str
    spec: dict[str, Any]
    data: dict[str, list[dict[str, Any]]] = field(repr=False)


def config(theme: str, settings: int) -> dict[str, Any]:
    """Vega-Lite's config for "light" or "dark": ink, grid and colours; no frame, and no more lines than are read.

    Args:
        settings: how many there are, over which the ramp is spread.
    """
    ink, faint, grid = ("#24292f", "#59636e", "#e6e8eb") if theme == "light" else ("#e6edf3", "#9198a1", "#2d333b")
    text = {"labelColor": faint, "titleColor": faint, "labelFontSize": 11, "titleFontSize": 11}
    return {
        "background": "transparent",
        "font": FONT,
        "view": {"stroke": None},
        "axis": {
            **text,
            **{"titleFontWeight": "normal", "gridColor": grid, "domainColor": grid, "tickColor": grid},
            **{"labelPadding": 6, "titlePadding": 10, "tickCount": 6, "labelOverlap": True},
        },
        "legend": {**text, "orient": "bottom", "title": None, "labelLimit": 320, "symbolStrokeWidth": 2.5},
        "title": {
            **{"color": ink, "subtitleColor": faint, "fontSize": 15, "subtitleFontSize": 11.5, "anchor": "start"},
            **{"fontWeight": 600, "offset": 14, "subtitlePadding": 5},
        },
        "line": {"strokeWidth": 1.8, "strokeJoin": "round"},
        "rule": {"color": ink},
        "range": {"category": CATEGORIES[theme], "ordinal": _spread(RAMPS[theme], settings)},
    }


def draw(chart: Chart, settings: int) -> tuple[str, bytes]:
    """The chart as SVG and as PNG at twice the size, white behind it, for as many settings as `config` is told."""
    import vl_convert

    subtitle = _wrapped(chart.subtitle, 112)
    spec = {
        **chart.spec,
        "layer": [_on_paper(layer) for layer in chart.spec["layer"] if layer["mark"].get("opacity") != 0],
        "width": WIDTH,
        "title": {"text": _wrapped(chart.title, 84), "subtitle": subtitle},
        "padding": 16,
        "datasets": chart.data,
        "config": {**config("light", settings), "background": "white"},
    }
    svg = vl_convert.vegalite_to_svg(spec)
    return svg, vl_convert.svg_to_png(svg, scale=2)


def _on_paper(layer: dict[str, Any]) -> dict[str, Any]:
    """Without what answers a pointer, and without what takes seconds to paint: an opacity for each of many lines, and
    a clip of each, which is only needed where an axis shows less than there is.
    """
    encoding = {k: v for k, v in layer["encoding"].items() if k not in ("opacity", "tooltip")}
    limited = any("domain" in (encoding.get(axis, {}).get("scale") or {}) for axis in ("x", "y"))
    return {**layer, "encoding": encoding, "mark": {**layer["mark"], "clip": limited}}


def _spread(ramp: list[str], number: int) -> list[str]:
    """So many colours, evenly from the first of the ramp to the last, between its own in straight lines of sRGB."""
    if number < 2:
        return ramp[:1]
    colours = []
    for i in range(number):
        place = i * (len(ramp) - 1) / (number - 1)
        left = min(int(place), len(ramp) - 2)
        a, b = (bytes.fromhex(hexed[1:]) for hexed in ramp[left : left + 2])
        mixed = [round(x + (y - x) * (place - left)) for x, y in zip(a, b, strict=True)]
        colours.append("#" + bytes(mixed).hex())
    return colours


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)


def colour(labels: list[str], ordered: bool, legend: bool = True) -> alt.Color:
    """Colours of settings, the same in all charts of a report: a ramp where they are in an order, or are many."""
    kind: Any = "ordinal" if ordered or len(labels) > len(CATEGORIES["light"]) else "nominal"
    shown = alt.Legend() if legend and len(labels) > 1 else None
    return alt.Color("setting", type=kind, scale=alt.Scale(domain=labels), legend=shown)


def zoom() -> alt.Parameter:
    """Ctrl, Cmd or Shift with the wheel zooms, dragging moves, a double click resets; a finger scrolls the page."""
    return alt.selection_interval(
        bind="scales",
        zoom="wheel![event.ctrlKey || event.metaKey || event.shiftKey]",
        translate="[pointerdown[event.pointerType !== 'touch'], window:pointerup] > window:pointermove!",
    )


def curves(
    source: str,
    x: alt.X,
    y: alt.Y,
    labels: list[str],
    ordered: bool,
    tooltip: list[alt.Tooltip],
    detail: str | None = "run",
    points: bool = False,
) -> dict[str, Any]:
    """Lines of a colour a setting, one a run; a click on the legend leaves one setting, a pointer finds the values.

    Args:
        source: name of the data.
        detail: the column that tells lines of one setting apart.
        points: whether the values are few, and seen.
    """
    picked = alt.selection_point(fields=["setting"], bind="legend")
    base = alt.Chart(alt.NamedData(name=source)).encode(
        x=x,
        y=y,
        color=colour(labels, ordered),
        detail=alt.Detail(detail, type="nominal") if detail else alt.Detail(),
        opacity=alt.condition(picked, alt.value(0.9), alt.value(0.08)),
    )
    if not detail:
        base.encoding.detail = alt.Undefined
    lines = base.mark_line(clip=True, point={"size": 28, "filled": True} if points else False)
    found = alt.Chart(alt.NamedData(name=source)).mark_point(clip=True, size=90, opacity=0, filled=True)
    dots = found.encode(x=x, y=y, tooltip=tooltip)
    return specification(alt.layer(lines.add_params(picked, zoom()), dots))


def specification(chart: Any) -> dict[str, Any]:
    """Altair's chart as a plain dict, as wide as its place."""
    spec: dict[str, Any] = chart.properties(width="container", height=HEIGHT).to_dict()
    for key in ("config", "datasets"):
        spec.pop(key, None)
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec
