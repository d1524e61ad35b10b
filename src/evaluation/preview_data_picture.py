"""The picture of a set of images: some of them with their labels, classes, sizes and values."""

import textwrap
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from src.data.loader import normalize
from src.evaluation.preview_data import Data, Look
from src.evaluation.preview_picture import BLUE, FAINT, GREEN, INK, LINE, ORANGE, RED
from src.files import replacing
from src.pictures import to_uint8

WIDTH, MARGIN = 12.0, 0.45  # of the picture, in inches
COLUMNS = 10  # of images
PANEL, GAP = 2.3, 1.1
CAPTION = 0.24
BARS = 12  # classes, and sizes, at most
COLOUR_OF = {
    "images_look_right": GREEN,
    "first_images": INK,
    "some_images": INK,
}  # of sentences; else something is wrong
COLOURS = (RED, GREEN, BLUE, ORANGE)


def draw(
    title: str, sentences: list[dict[str, Any]], found: Look, data: Data, numbers: torch.Tensor, path: Path
) -> None:
    """One PNG: the sentences, the images with these numbers, and below them three panels."""
    text = [textwrap.wrap(sentence["sentence"], 132) for sentence in sentences]
    head = 0.62 + sum(LINE * len(lines) + 0.12 for lines in text)
    cell = (WIDTH - 2 * MARGIN) / COLUMNS
    _, tall, wide = data.image_shape
    high = 0.94 * cell * min(1.5, tall / wide) + CAPTION
    rows = -(-len(numbers) // COLUMNS)
    bars = max(
        1, *(min(BARS, n) for n in (len(found.counts), 0 if found.manifest is None else len(found.manifest.sizes)))
    )
    panel = max(PANEL, 0.24 * bars)
    height = head + rows * high + GAP + panel + 0.6
    style: dict[Any, Any] = {"font.size": 9.5, "axes.edgecolor": FAINT, "text.color": INK}
    with rc_context({**style, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(WIDTH, height), dpi=120, facecolor="white")
        FigureCanvasAgg(figure)

        def place(left: float, top: float, width: float, high: float) -> Axes:
            return figure.add_axes((left / WIDTH, 1 - (top + high) / height, width / WIDTH, high / height))

        figure.text(MARGIN / WIDTH, 1 - 0.22 / height, title, fontsize=14, weight="bold", va="top")
        y = 0.62
        for sentence, lines in zip(sentences, text, strict=True):
            colour = COLOUR_OF.get(sentence["name"], RED)
            figure.text((MARGIN - 0.2) / WIDTH, 1 - y / height, "\u25cf", color=colour, va="top", fontsize=11)
            figure.text(MARGIN / WIDTH, 1 - y / height, "\n".join(lines), va="top", fontsize=10.5, linespacing=1.3)
            y += LINE * len(lines) + 0.12
        _images(place, found, data, numbers, head, cell, high)
        top = head + rows * high + GAP
        third = (WIDTH - 2 * MARGIN) / 3
        left = MARGIN + 1.0
        _bars(place(left, top, third - 1.5, panel), found.counts, "images by class")
        sizes = {"x".join(map(str, data.image_shape[1:])): found.train} if found.manifest is None else _sizes(found)
        _bars(place(left + third, top, third - 1.5, panel), sizes, "sizes found, before cropping")
        _values(place(MARGIN + 2 * third, top, third - 0.1, panel), found)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")


def _images(place: Any, found: Look, data: Data, numbers: torch.Tensor, top: float, cell: float, high: float) -> None:
    names, several = list(data.class_names), len(found.counts) > 1
    for k, (image, number) in enumerate(zip(data.train.take(numbers), numbers.tolist(), strict=True)):
        axes = place(MARGIN + (k % COLUMNS) * cell, top + (k // COLUMNS) * high, 0.94 * cell, high - CAPTION)
        pixels = to_uint8(normalize(image))
        pixels = pixels if len(pixels) in (1, 3, 4) else pixels[:1]
        shown = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
        axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_axis_off()
        label = names[int(data.train.labels[number])] if several else data.train.name(number)
        axes.set_title(_short(label.rpartition("/")[2], 18), fontsize=8, pad=2, color=INK, y=-0.17)


def _sizes(found: Look) -> dict[str, int]:
    assert found.manifest is not None
    return {**found.manifest.sizes, **({"others": found.manifest.other_sizes} if found.manifest.other_sizes else {})}


def _bars(axes: Axes, counts: dict[str, int], title: str) -> None:
    """The largest, and the smallest where there are more than fit."""
    items = sorted(counts.items(), key=lambda item: -item[1])
    if len(items) > BARS:
        left_out = len(items) - BARS + 1
        half = BARS // 2
        items = [*items[:half], (f"({left_out} more)", 0), *items[half - BARS + 1 :]]
    axes.barh(range(len(items)), [n for _, n in items], color=BLUE, height=0.7)
    axes.set_yticks(range(len(items)), [_short(name, 14) for name, _ in items])
    axes.invert_yaxis()
    for row, (_, n) in enumerate(items):
        if n:
            axes.text(n, row, f" {n:,}", va="center", fontsize=8.5)
    axes.set_xlim(0, 1.25 * max(1, *(n for _, n in items)))
    axes.set_ylim(max(len(items), 4) - 0.5, -0.5)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(title, loc="left", fontsize=10)


def _values(axes: Axes, found: Look) -> None:
    for c, shares in enumerate(found.histogram):
        colour = INK if len(found.histogram) == 1 else COLOURS[c % len(COLOURS)]
        label = f"channel {c}: mean {found.mean[c]:.3f}, std {found.std[c]:.3f}"
        axes.stairs(100 * shares, found.edges, color=colour, linewidth=1.3, label=label.replace("-", "\u2212"))
    for limit in (-1, 1):
        axes.axvline(limit, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yscale("log")
    axes.locator_params(axis="x", nbins=5)
    axes.set_title(
        "values that the network sees, % a bin", loc="left", fontsize=10, pad=8 + 13 * min(4, len(found.mean))
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[:4], labels[:4], loc="lower left", bbox_to_anchor=(0, 1.0), borderpad=0, fontsize=8.5)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"
