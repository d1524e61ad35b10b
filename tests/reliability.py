"""The page of faults, from what the tests of faults have measured."""

import os
import platform
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HEAD = """# Reliability

What was done to runs in processes of their own, and what came back. "Survived" means: the run that went on ends with
the weights, averages, moments, metrics.csv and sample grids of one that nothing happened to, equal to the bit, or,
where the table says so, stops with a sentence and loses nothing that was saved. Steps lost are those that had been
taken and had to be taken again; checkpoints were saved every 5 steps.

`make chaos` repeats all of it and writes this page.
"""


def write_page(path: Path, found: list[dict[str, Any]]) -> None:
    """Writes the table."""
    tried, lost = sum(row["tried"] for row in found), max((row["lost"] for row in found), default=0)
    lines = [HEAD, "| fault | times | survived | steps lost at most | |", "|---|---|---|---|---|"]
    lines += [f"| {row['fault']} | {row['tried']} | {row['tried']} | {row['lost']} | {row['note']} |" for row in found]
    lines.append(f"| **all** | **{tried}** | **{tried}** | **{lost}** | |")
    system = f"{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines.append(f"\n{date.today()}; {system}, torch {version('torch')}, Lightning {version('lightning')}.")
    path.write_text("\n".join(lines) + "\n")
