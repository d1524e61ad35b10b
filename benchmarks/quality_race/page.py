"""The section of the page, from whatever records there are, and the picture."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.__main__ import section, write_section
from benchmarks.quality_race.entries import OURS, TABLES, folder_name
from benchmarks.quality_race.judges import JUDGES
from benchmarks.quality_race.records import Kept, records
from benchmarks.timing import Table
from src.files import replacing
from src.pictures import grid

GIB = 2**30
SHOWN = 12  # samples of a row
HEADER = (
    "",
    "Fréchet distance",
    "of a second classifier",
    "parameters",
    "images a step",
    "steps",
    "images",
    "training s",
    "peak GiB",
    "sampler",
    "sampling s",
)
MISSING = "not run yet"


def write(kept: Kept, seeds: Sequence[int], page: Path) -> None:
    """Rewrites the section of a page.

    Args:
        seeds: that a full table has.
    """
    write_section("quality", text(kept, seeds), page)


def text(kept: Kept, seeds: Sequence[int]) -> str:
    """The section as Markdown."""
    if kept["settings"] is None:
        return "Not measured yet."
    settings = kept["settings"]
    about = {"date": latest(kept), "device": settings["device"], "versions": settings["versions"]}
    return section({"tables": tables(kept, seeds), **about})


def latest(kept: Kept) -> str:
    """The date of the newest record or trial."""
    dates = [record["date"] for name in kept["entries"] for record in records(kept, name)]
    return max([*dates, *(trial["date"] for trial in kept["tried"])], default="")


def tables(kept: Kept, seeds: Sequence[int]) -> list[Table]:
    settings = kept["settings"]  # of which a trial has others
    common = f"{settings['minutes']:g} minutes of training, {settings['samples']:,} samples"
    made: list[Table] = []
    accuracies = " and ".join(f"{settings['judges'][judge]['accuracy']:.2%}" for judge in JUDGES)
    read = f"; the classifiers read {accuracies} of the test set right"
    for title, names in TABLES.items() if kept["entries"] else ():
        rows = [row(name, records(kept, name), len(seeds)) for name in names]
        rows.append(real_row(kept["real"]))
        made.append((f"{title}, {common}{memory(kept, names)}{'' if made else read}", HEADER, rows))
    if kept["tried"]:
        made.append(("tried", TRIED, [cells for trial in kept["tried"] for cells in tried_rows(trial)]))
    return made


def row(name: str, found: Sequence[dict[str, Any]], seeds: int) -> list[str]:
    """An entry's cells: means over seeds, and of distances the least and the most."""
    if not found:
        return [name, MISSING, *[""] * (len(HEADER) - 2)]
    best = [record["samplers"][record["sampler"]] for record in found]
    few = f", {len(found)} of {seeds} seeds" if len(found) < seeds else ""
    samplers = ", ".join(dict.fromkeys(record["sampler"] for record in found))
    stopped = any(record["steps"] < record["planned_steps"] for record in found)  # by the clock

    def average(key: str) -> float:
        return mean(record[key] for record in found)

    planned = f" of {average('planned_steps'):,.0f} planned" if stopped else ""
    return [
        name,
        *(spread([sampling[judge] for sampling in best]) + few for judge in JUDGES),
        f"{found[0]['parameters']:,}",
        str(found[0]["batch"]),
        f"{average('steps'):,.0f}{planned}",
        f"{average('images'):,.0f}",
        f"{average('seconds'):.0f}",
        f"{max(record['peak_bytes'] for record in found) / GIB:.2f}",
        samplers,
        f"{mean(sampling['seconds'] for sampling in best):.0f}",
    ]


def real_row(real: dict[str, list[float]] | None) -> list[str]:
    if real is None:
        return ["real images", MISSING, *[""] * (len(HEADER) - 2)]
    return ["real images", *(spread(real[judge]) for judge in JUDGES), *[""] * (len(HEADER) - 3)]


def spread(values: Sequence[float]) -> str:
    """The mean, and of several the least and the most."""
    few = f" ({digits(min(values))} to {digits(max(values))})" if len(values) > 1 else ""
    return f"{digits(mean(values))}{few}"


def digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def memory(kept: Kept, names: Sequence[str]) -> str:
    """Whether the peers stayed within our memory; nothing, where ours has not run."""
    peaks = {name: max(r["peak_bytes"] for r in records(kept, name)) for name in names if records(kept, name)}
    others = [name for name in peaks if name != OURS]
    if OURS not in peaks or not others:
        return ""
    above = [name for name in others if peaks[name] > peaks[OURS]]
    return f"; peak memory of {' and of '.join(above)} above ours" if above else "; no peer's peak memory is above ours"


TRIED = ("", "set", "minutes", "samples", "sampler", "Fréchet distance", "of a second classifier", "steps", "images")


def tried_rows(trial: dict[str, Any]) -> list[list[str]]:
    """A row for each sampler of a trial."""
    said = " ".join(trial["given"]) or "as it is"
    common = [f"{trial['steps']:,}", f"{trial['images']:,}"]
    return [
        [
            trial["entry"],
            said,
            f"{trial['minutes']:g}",
            f"{trial['samples']:,}",
            name,
            *(digits(sampling[judge]) for judge in JUDGES),
            *common,
        ]
        for name, sampling in trial["samplers"].items()
    ]


def draw(kept: Kept, seed: int, real: Tensor, work: Path, path: Path) -> None:
    """Writes the picture: of each entry with this seed a row of samples, and one of real digits.

    Args:
        real: (N, 1, 28, 28) uint8.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows: list[tuple[str, float, Tensor]] = []
    for name in dict.fromkeys(name for names in TABLES.values() for name in names):
        record = kept["entries"].get(name, {"seeds": {}})["seeds"].get(str(seed))
        if record is None:
            continue
        samples = work / folder_name(name) / f"seed={seed}" / f"{record['sampler']}.npz"
        if samples.is_file():
            images = torch.from_numpy(np.load(samples)["arr_0"][:SHOWN]).permute(0, 3, 1, 2)
            rows.append((name, record["samplers"][record["sampler"]]["first"], images))
    rows.append(("real images", mean(kept["real"]["first"]), real[:SHOWN]))
    picture = grid(torch.cat([images for _, _, images in rows]), columns=len(rows[0][2]), gap=1)[0].numpy()
    left, right, across = 1.9, 0.7, 6.4  # inches
    width, height = left + across + right, across * picture.shape[0] / picture.shape[1]
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((left / width, 0, across / width, 1))
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.axis("off")
    for i, (name, score, _) in enumerate(rows):
        y = 1 - (i + 0.5) / len(rows)
        figure.text(0.05 / width, y, name, va="center", fontsize=9, color="#222222")
        figure.text(1 - 0.05 / width, y, digits(score), va="center", ha="right", fontsize=9, color="#222222")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
