"""What a run's folder says of the run, however it ended: read once, and never written to."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from src.errors import UserError
from src.reporting.metrics_file import Metrics, read_metrics
from src.runs import CONFIG, ERROR, LAST, METRICS, PRUNED, SUMMARY, Run

State = Literal["finished", "running", "stopped", "failed", "pruned", "unfinished"]
DEPTH = 4  # of folders below a sweep's in which runs are looked for


@dataclass(frozen=True)
class RunFolder:
    """A run as its folder tells of it.

    Attributes:
        name: short, and no other run of the report has it.
        config: the resolved configuration.
        state: "unfinished" when nobody trains in it and nothing says why.
        reason: why it is not finished, in a sentence; empty when it is.
        steps: optimiser steps taken.
        max_steps: of the configuration; None when it says none that can be read.
        summary: summary.json of a finished run; empty of others, whose numbers are not final.
        samples: the grids of samples by step.
        notes: what could not be read, in sentences.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    state: State
    reason: str
    steps: int
    max_steps: int | None
    metrics: Metrics
    summary: dict[str, Any]
    samples: dict[int, Path]
    notes: tuple[str, ...]

    @property
    def overrides(self) -> list[str]:
        """What the run was started with."""
        return list(self.config["overrides"])

    @property
    def images_per_step(self) -> int:
        from src.training.resume import images_per_step

        return images_per_step(self.config)


def find_runs(folder: Path, depth: int = DEPTH) -> list[Path]:
    """The folder itself if it is a run's, or else all below it that are, in natural order."""
    if (folder / CONFIG).is_file():
        return [folder]
    if depth == 0:
        return []
    below = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return [run for path in sorted(below, key=natural) for run in find_runs(path, depth - 1)]


def natural(path: Path) -> list[tuple[int, int, str]]:
    """A key by which job 10 comes after job 9."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def read_run(folder: Path, name: str) -> RunFolder:
    """Reads a run's folder.

    Raises:
        UserError: when its configuration cannot be read, without which nothing can be said of it.
    """
    config = Run(folder).config
    metrics = read_metrics(folder / METRICS)
    notes = list(metrics.notes)
    summary = _summary(folder / SUMMARY, notes)
    max_steps = _max_steps(config)
    steps = max([int(summary.get("steps", 0)), *metrics.steps[-1:]])
    state, reason = _state(folder, summary, steps, max_steps)
    samples = {int(path.stem.removeprefix("step=")): path for path in (folder / "samples").glob("step=*.png")}
    return RunFolder(
        folder=folder,
        name=name,
        config=config,
        state=state,
        reason=reason,
        steps=steps,
        max_steps=max_steps,
        metrics=metrics,
        summary=summary if state == "finished" else {},
        samples=dict(sorted(samples.items())),
        notes=tuple(notes),
    )


def _state(folder: Path, summary: dict[str, Any], steps: int, max_steps: int | None) -> tuple[State, str]:
    from src.lock import is_locked

    progress = f"after step {steps:,}" + (f" of {max_steps:,}" if max_steps else "")
    if is_locked(folder):
        return "running", f"still training, {progress}"
    if (folder / PRUNED).is_file():
        return "pruned", _first_line(folder / PRUNED)
    if summary and max_steps is not None and int(summary.get("steps", 0)) >= max_steps:
        return "finished", ""
    if (folder / ERROR).is_file():
        said = _first_line(folder / ERROR)
        return ("stopped", said) if said.startswith("stopped by ") else ("failed", said)
    if steps == 0 and not (folder / METRICS).is_file() and _is_of_others(folder / LAST):
        return "finished", ""
    return "unfinished", f"ended without a word {progress}: killed, or the machine went down"


def _is_of_others(checkpoint: Path) -> bool:
    """Whether it holds weights that no training here made, as src.convert writes them."""
    import torch

    try:
        return "optimizer_states" not in torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # it is not there, or damaged: unpickling raises anything
        return False


def _summary(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        summary = None
    if not isinstance(summary, dict) or not isinstance(summary.get("steps"), int):
        notes.append(f"{path.name} cannot be read, and the run counts as unfinished")
        return {}
    return summary


def _max_steps(config: dict[str, Any]) -> int | None:
    from src.training.resume import images_per_step
    from src.training.units import in_steps

    try:
        steps = in_steps(config["trainer"], images_per_step(config))["max_steps"]
    except (KeyError, TypeError, ValueError):
        return None
    return steps if isinstance(steps, int) else None


def _first_line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip().split("\n")[0] or "it is not said why"
    except OSError as error:
        return f"{path.name} cannot be read: {error}"


def read_runs(folders: list[Path]) -> tuple[list[RunFolder], list[str]]:
    """Reads several, each named by what its path has beyond the others'; and notes on those that cannot be read."""
    runs, notes = [], []
    for folder, name in zip(folders, short_names(folders), strict=True):
        try:
            runs.append(read_run(folder, name))
        except UserError as error:
            notes.append(f"{name} is left out: {error}")
    return runs, notes


def short_names(folders: list[Path]) -> list[str]:
    """Of each folder the end of its path, as long as all need to differ."""
    parts = [folder.absolute().parts for folder in folders]
    length = next((n for n in range(1, 99) if len({p[-n:] for p in parts}) == len(parts)), 99)
    return ["/".join(p[-length:]) for p in parts]
