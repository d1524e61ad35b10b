"""A picture a lesson: samples of all settings from the same noise, and the curves that explain them."""

from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.lessons.compare import estimate
from benchmarks.lessons.facts import training_images
from benchmarks.lessons.run import Results
from benchmarks.lessons.words import eps_error, label
from src.files import replacing
from src.pictures import grid, to_uint8
from src.runs import Run, build_diffusion

COLOURS = ("#1f6fb4", "#d9731a", "#2c8a4b", "#c0392b", "#7a5ba6")
INK, FAINT = "#222222", "#8a8a8a"
STYLE = {
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
WIDTH, LEFT, RIGHT, PANEL, GAP = 9.0, 1.85, 0.1, 2.2, 0.45  # inches
LEGEND = 1.6  # to the right of a panel
TIMES = (0, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999)  # of a dissolving digit


def draw(results: Results, path: Path) -> None:
    """Writes the picture of a lesson as PNG."""
    shown = [setting for setting in results["settings"] if "samples" in setting]
    names = [label(results, setting) for setting in shown]
    samples = _tiled([_samples(setting["samples"]) for setting in shown])
    dissolving = _tiled(_dissolving(results)) if results["name"] == "schedule" else None
    across = WIDTH - LEFT - RIGHT
    high = [across * picture.shape[0] / picture.shape[1] for picture in (samples, dissolving) if picture is not None]
    below = high[1] if len(high) == 2 else PANEL
    height = 0.3 + high[0] + GAP + below + (0.1 if len(high) == 2 else 0.5)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=90, facecolor="white")
        FigureCanvasAgg(figure)

        def place(top: float, high: float, right: float = RIGHT) -> Axes:
            width = WIDTH - LEFT - right
            return figure.add_axes((LEFT / WIDTH, 1 - (top + high) / height, width / WIDTH, high / height))

        _show(place(0.3, high[0]), samples, names, "samples, those of a column from the same noise")
        top = 0.3 + high[0] + GAP
        if dissolving is not None:
            _show(place(top, below), dissolving, names, f"a digit at t = {', '.join(map(str, TIMES))}")
        elif results["name"] == "steps":
            _by_steps(place(top, below, LEGEND), results)
        else:
            _by_level(place(top, below, LEGEND + 0.6), results)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def _tiled(strips: list[Tensor]) -> Tensor:
    """Strips of images, (N, C, H, W) uint8, one below the other: (H', W')."""
    return grid(torch.cat(strips), columns=len(strips[0]), gap=1)[0]


def _show(axes: Axes, picture: Tensor, names: list[str], title: str) -> None:
    """Rows of images with their names to the left."""
    pitch = (picture.shape[0] - 1) / len(names)
    axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
    axes.set_yticks([pitch * (row + 0.5) for row in range(len(names))], names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=9, color=FAINT)


def _by_level(axes: Axes, results: Results) -> None:
    for setting, colour in zip(results["settings"], COLOURS, strict=False):
        errors = [eps_error(setting, k) for k in range(len(results["levels"]))]
        axes.plot(results["levels"], errors, color=colour, linewidth=1.8, label=label(results, setting))
    axes.set(yscale="log", xlabel="t, from image to noise", ylabel="error in the noise")
    _finish(axes)


def _by_steps(axes: Axes, results: Results) -> None:
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for setting in results["settings"]:
        distance = estimate(setting["fd"])
        point = (setting["values"]["steps"], distance.value, distance.error or 0.0)
        lines.setdefault(setting["values"]["sampler"], []).append(point)
    for (sampler, points), colour in zip(lines.items(), COLOURS, strict=False):
        x, y, error = zip(*sorted(points), strict=True)
        axes.errorbar(x, y, yerr=error, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=sampler)
    axes.axhline(results["facts"]["floor"], color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="distance (dashed: real halves)")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _samples(path: str) -> Tensor:
    return torch.from_numpy(np.load(path)["arr_0"]).permute(0, 3, 1, 2)


def _dissolving(results: Results) -> list[Tensor]:
    """One training image at TIMES, under the schedule of each setting, with one noise."""
    strips = []
    for setting in results["settings"]:
        config = Run(Path(setting["samples"]).parents[2]).config
        image = training_images(config)[:1].expand(len(TIMES), -1, -1, -1)
        noise = torch.randn(1, *image.shape[1:], generator=torch.Generator().manual_seed(0)).expand_as(image)
        strips.append(to_uint8(build_diffusion(config).q_sample(image, torch.tensor(TIMES), noise)))
    return strips
