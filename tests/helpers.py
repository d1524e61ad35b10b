"""What several test files read."""

import csv
from pathlib import Path


def rows(run: Path, without: tuple[str, ...] = ("images_per_second", "system/")) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, without the columns (and what begins like them) that no two runs share."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith(without)} for row in csv.DictReader(file)]
