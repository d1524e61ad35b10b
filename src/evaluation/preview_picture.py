"""The picture of a preview: images dissolving, and below each what its noise level means.

Everything in it stands above or below the same axis, the share of the schedule's length.
"""

import math
import textwrap
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from src.diffusion.levels import TERMINAL_ALPHA
from src.evaluation.preview import BINS, COLUMNS, Curves, Finite, Training, columns, percent, time
from src.files import replacing
from src.pictures import enlarge, grid

INK, FAINT, BLUE, ORANGE, GREEN, RED = "#222222", "#8a8a8a", "#1f6fb4", "#d9731a", "#2c8a4b", "#c0392b"
WIDTH, LEFT, RIGHT = 12.0, 0.8, 0.25  # of the picture, in inches
PANEL, GAP, LINE = 1.75, 0.32, 0.21
FOOTNOTE = (
    "known: share of the images' variance that x_t tells. intact: at least 99% of it. wasted: sampling could as well "
    "begin after it. weight: of the error in what the network learns, whose variance is about one. least loss: of a "
    "perfect network. All but the dots is in closed form for Gaussian images with the mean and covariance of these: "
    "of all images with this covariance theirs is the largest, and of the training images alone the least. x_t is "
    "shown at alpha^2 + sigma^2 = 1."
)


def draw(
    title: str,
    sentences: list[dict[str, Any]],
    strip: Tensor,
    curves: Curves,
    finite: Finite,
    training: Training,
    path: Path,
) -> None:
    """One PNG: the sentences, the images, and below them, against the same share of the length, the curves.

    Args:
        strip: of `dissolve`.
    """
    pitch = 1 / (COLUMNS - 1)  # of the columns of images, as a share of the length
    across = WIDTH - LEFT - RIGHT
    picture, left, right, rows = _strip(strip, pitch)
    high = across * (right - left) / (1 + pitch) * picture.shape[1] / picture.shape[2]
    text = [textwrap.wrap(sentence["sentence"], 128) for sentence in sentences]
    lines = sum(map(len, text))
    head = 0.62 + LINE * lines + 0.12 * len(text)
    height = head + 0.52 + high + 4 * (GAP + PANEL) + 1.2

    style: dict[Any, Any] = {
        "font.size": 9.5,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
    }
    with rc_context({**style, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(WIDTH, height), dpi=120, facecolor="white")
        FigureCanvasAgg(figure)

        def place(top: float, high: float) -> Axes:
            axes = figure.add_axes((LEFT / WIDTH, 1 - (top + high) / height, across / WIDTH, high / height))
            axes.set_xlim(-pitch / 2, 1 + pitch / 2)
            return axes

        x = LEFT / WIDTH
        figure.text(x, 1 - 0.22 / height, title, fontsize=14, weight="bold", va="top")
        y = 0.62
        for sentence, wrapped in zip(sentences, text, strict=True):
            colour = GREEN if sentence["name"] == "nothing_wrong" else RED
            figure.text(x - 0.018, 1 - y / height, "\u25cf", color=colour, va="top", fontsize=11)
            figure.text(x, 1 - y / height, "\n".join(wrapped), va="top", fontsize=10.5, linespacing=1.3)
            y += LINE * len(wrapped) + 0.12
        top = head + 0.52
        axes = place(top, high)
        shown = picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)
        axes.imshow(shown, cmap="gray", vmin=0, vmax=255, extent=(left, right, 0, rows), aspect="auto")
        axes.set_xlim(-pitch / 2, 1 + pitch / 2)
        axes.set_axis_off()
        for column, row in enumerate(columns(curves)):
            t, log_snr, known = (float(v[row]) for v in (curves.t, curves.log_snr, curves.known))
            label = f"t = {time(t)}\nln SNR {log_snr:.1f}\nknown {percent(known)}"
            label = label.replace("-inf", "\u2212\u221e").replace("-", "\u2212")
            axes.text(column * pitch, rows, label, ha="center", va="bottom", fontsize=8.5, linespacing=1.25)
        top += high

        panels = [place(top + GAP + i * (GAP + PANEL), PANEL) for i in range(4)]
        _draw_levels(panels[0], curves)
        _draw_log_snr(panels[1], curves)
        _draw_training(panels[2], training)
        _draw_loss(panels[3], curves, finite)
        _shade(panels, curves)
        for axes in panels:
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="lower right", bbox_to_anchor=(1, 0.97), ncols=3, borderpad=0, fontsize=9)
            axes.set_xticks(torch.linspace(0, 1, 11).tolist())
            axes.grid(color="#e4e4e4", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(length=3, labelbottom=axes is panels[-1])
        panels[-1].set_xlabel("share of the schedule's length, from image to noise")
        note = "\n".join(textwrap.wrap(FOOTNOTE, 165))
        figure.text(x, 0.12 / height, note, color=FAINT, va="bottom", fontsize=8.5, linespacing=1.35)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def _strip(strip: Tensor, pitch: float) -> tuple[Tensor, float, float, int]:
    """The grid of images, (C, H, W) uint8, its left and right end where columns are at 0, pitch, 2 pitch, ..., rows."""
    rows, columns, channels, _, _ = strip.shape
    images = strip.flatten(0, 1)[:, : channels if channels in (1, 3) else 1]
    scale, gap = enlarge(images.shape[2]), 3
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    width = images.shape[3]
    margin = pitch / 2 + pitch * gap / (width + gap) / 2
    return grid(images, columns, gap), -margin, (columns - 1) * pitch + margin, rows


def _draw_levels(axes: Axes, curves: Curves) -> None:
    axes.plot(curves.u, curves.alpha, color=BLUE, linewidth=2, label="alpha, signal", marker=_marker(curves))
    axes.plot(curves.u, curves.sigma, color=ORANGE, linewidth=2, label="sigma, noise", marker=_marker(curves))
    if curves.sigma.max() > 2:
        axes.set_yscale("log")
    axes.set_ylabel("level")


def _draw_log_snr(axes: Axes, curves: Curves) -> None:
    finite = torch.where(curves.log_snr.isfinite(), curves.log_snr, torch.nan)
    axes.plot(curves.u, finite, color=INK, linewidth=2, marker=_marker(curves))
    limit = 2 * math.log(TERMINAL_ALPHA)
    axes.axhline(limit, color=RED, linewidth=1, linestyle=(0, (4, 3)))
    low, high = min(float(finite[~finite.isnan()].min()), limit), float(finite[~finite.isnan()].max())
    axes.set_ylim(low - 0.15 * (high - low), high + 0.05 * (high - low))
    axes.text(0, limit - 0.02 * (high - low), "the end must lie below", color=RED, fontsize=8.5, va="top")
    axes.set_ylabel("ln SNR")


def _draw_training(axes: Axes, training: Training) -> None:
    edges = torch.linspace(0, 1, BINS + 1)
    axes.stairs(100 * training.draws, edges, fill=True, color="#c9dcee", label="draws")
    axes.stairs(100 * training.weighted, edges, color=BLUE, linewidth=1.6, label="draws x weight")
    axes.stairs(100 * training.loss, edges, color=ORANGE, linewidth=1.6, label="draws x least loss")
    axes.set_ylabel(f"% of training\nper {100 // BINS}% of length")
    axes.set_ylim(bottom=0)


def _draw_loss(axes: Axes, curves: Curves, finite: Finite) -> None:
    loss = torch.where(curves.loss.isfinite() & (curves.loss > 0), curves.loss, torch.nan)
    axes.plot(curves.u, loss, color=INK, linewidth=2, label="Gaussian, closed form", marker=_marker(curves))
    points = [(float(curves.u[row]), v) for row, v in zip(finite.rows, finite.loss, strict=True) if v > 0]
    if points:
        axes.plot(*zip(*points, strict=True), "o", color=GREEN, markersize=4, label="the training images alone")
    axes.set_yscale("log")
    largest = float(loss[~loss.isnan()].max()) if (~loss.isnan()).any() else 1.0
    axes.set_ylim(1e-5 * largest, 3 * largest)
    axes.set_ylabel("least loss")


def _shade(panels: list[Axes], curves: Curves) -> None:
    """Marks the levels at which an image is intact, and those that are wasted."""
    for there, colour, name in ((curves.intact, GREEN, "intact"), (curves.wasted, RED, "wasted")):
        if not there.any():
            continue
        first, last = (float(curves.u[there][i]) for i in (0, -1))
        for axes in panels:
            axes.axvspan(first, last, color=colour, alpha=0.07, linewidth=0)
        # above the panel that has no legend there
        where = panels[1].get_xaxis_transform()
        panels[1].text((first + last) / 2, 1.02, name, color=colour, ha="center", va="bottom", transform=where)


def _marker(curves: Curves) -> str | None:
    return "." if len(curves.u) < 20 else None
