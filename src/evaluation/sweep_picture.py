"""The picture of a sweep: quality against evaluations of the network, with the combinations that none beats in both."""

from pathlib import Path
from typing import Any

from src.files import replacing

COLOURS = ("#3b6ea8", "#d9822b", "#3f8f5b", "#b0413e", "#7a5ba6", "#5a5a5a", "#c2a000", "#2a9d9d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def save_sweep(rows: list[dict[str, Any]], score: str, higher: bool, floor: float | None, path: Path) -> None:
    """Draws rows of sweep.csv: one line a sampler and scale of guidance, and the Pareto front.

    Args:
        score: the column.
        higher: whether more of it is better.
        floor: what real images score.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["sampler"], row["guidance"]), []).append(row)
    samplers = list(dict.fromkeys(sampler for sampler, _ in lines))
    scales = list(dict.fromkeys(scale for _, scale in lines))
    for (sampler, scale), line in lines.items():
        line = sorted(line, key=lambda row: row["evaluations"])
        label = sampler if scale is None else f"{sampler}, guidance {scale:g}"
        axes.plot(
            [row["evaluations"] for row in line],
            [row[score] for row in line],
            color=COLOURS[samplers.index(sampler) % len(COLOURS)],
            marker=MARKERS[scales.index(scale) % len(MARKERS)],
            linewidth=1.6,
            markersize=5,
            label=label,
        )
    front = pareto(rows, score, higher)
    axes.plot(
        [row["evaluations"] for row in front],
        [row[score] for row in front],
        "o",
        markersize=12,
        markerfacecolor="none",
        markeredgecolor="#222222",
        markeredgewidth=1.1,
        linestyle=(0, (2, 3)),
        color="#888888",
        linewidth=1,
        label="not beaten in both",
    )
    values = [row[score] for row in rows]
    positive = min(values) > 0
    if floor is not None and floor > 0:
        axes.axhline(floor, color="#888888", linewidth=1, linestyle=(0, (5, 4)), label="two halves of the real images")
    axes.set_xscale("log")
    if positive:
        axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("evaluations of the network, an image")
    axes.set_ylabel(f"{score} ({'higher' if higher else 'lower'} is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.legend(frameon=False, fontsize=8.5)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def pareto(rows: list[dict[str, Any]], score: str, higher: bool = False) -> list[dict[str, Any]]:
    """Rows that no other beats: none has a better score for as few evaluations; in order of evaluations."""
    sign = -1 if higher else 1
    front: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["evaluations"], sign * row[score])):
        if not front or sign * row[score] < sign * front[-1][score]:
            front.append(row)
    return front
