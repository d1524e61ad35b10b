"""metrics.csv as it was found: also while it is being written, and after whatever happened to it.

A row counts when it is whole: its line ends, it has as many cells as there are columns, and each is a number or empty.
Whatever else the file holds is left out and counted, never guessed at. A cell may hold NaN, which is not empty.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

Curve = tuple[list[float], list[float]]  # x and y, as long as each other


@dataclass(frozen=True)
class Metrics:
    """The whole rows of a metrics.csv.

    Attributes:
        steps: of each row, rising.
        cells: of each column, a value or None a row.
        notes: what was left out, in sentences.
    """

    steps: list[int] = field(default_factory=list)
    cells: dict[str, list[float | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def curve(self, name: str) -> Curve:
        """The steps at which a column has a value, and the values, among which may be NaN; empty without the column."""
        given = [(step, v) for step, v in zip(self.steps, self.cells.get(name, []), strict=False) if v is not None]
        return [float(step) for step, _ in given], [v for _, v in given]

    def last(self, name: str) -> float | None:
        """The last value of a column."""
        values = self.curve(name)[1]
        return values[-1] if values else None


def read_metrics(path: Path) -> Metrics:
    """Reads what is whole of a metrics.csv; nothing where there is no file, or no header."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Metrics()
    *lines, torn = text.split("\n")  # a line that does not end may be a number that does not end
    notes = ["the last line of metrics.csv is torn, and left out"] if torn else []
    if not lines or lines[0].split(",")[0] != "step":
        return Metrics(notes=tuple(notes or ["metrics.csv has no header, and is left out"]) if text else ())
    columns = lines[0].split(",")[1:]
    steps: list[int] = []
    rows: list[list[float | None]] = []
    for line in lines[1:]:
        row = _row(line, len(columns))
        if row is not None and (not steps or row[0] > steps[-1]):
            steps.append(row[0])
            rows.append(row[1])
    left_out = len(lines) - 1 - len(rows)
    if left_out:
        notes.append(f"{left_out} damaged line{'s' * (left_out > 1)} of metrics.csv {_be(left_out)} left out")
    cells = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
    bad = sorted(
        name
        for name, values in cells.items()
        if (name == "train/loss" or name.startswith(("val/", "score/")))
        and any(v is not None and not math.isfinite(v) for v in values)
    )
    if bad:
        notes.append(f"{', '.join(bad)} {_be(len(bad))} not a finite number at some steps, where curves have a gap")
    return Metrics(steps, cells, tuple(notes))


def thin(points: Sequence[tuple[float, ...]], most: int) -> list[tuple[float | None, ...]]:
    """At most so many points of a curve: means over runs of neighbouring points, none picked and none dropped.

    Args:
        points: each of as many coordinates; x first, in order.

    Returns:
        The same coordinates; where one of them is not finite in all points of a mean, None, a gap.
    """
    size = max(1, math.ceil(len(points) / most))
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [tuple(_mean(coordinate) for coordinate in zip(*part, strict=True)) for part in parts]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else None


def _row(line: str, columns: int) -> tuple[int, list[float | None]] | None:
    step, *cells = line.split(",")
    if len(cells) != columns:
        return None
    try:
        return int(step), [float(cell) if cell else None for cell in cells]
    except ValueError:
        return None


def _be(count: int) -> str:
    return "is" if count == 1 else "are"
