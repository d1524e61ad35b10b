"""What a report says first: which setting is the best, by how much, and how sure that is."""

import math

from src.reporting.jobs import Job
from src.reporting.scores import LOSSES, Cell, Column
from src.reporting.settings import Comparison
from src.reporting.text import counted, decimals, error, listed, number


def verdict(comparison: Comparison, columns: list[Column]) -> list[str]:
    """Sentences on the first score that ranks the settings; or why none does."""
    if len(comparison.settings) < 2:
        return []
    ranked = [column for column in columns if column.best]
    if ranked:
        return _ranking(ranked[0])
    if any(column.name not in LOSSES for column in columns):
        return ["No score ranks these settings: too few of their runs have one under the same protocol."]
    losses = [column for column in columns if not column.ranked]
    if losses:
        return [
            f"The held-out losses cannot rank these settings: {losses[0].note}. A score of samples can: "
            "python -m src.evaluate run=<run folder> for each run, then this report again."
        ]
    return ["No run has a number yet."]


def _ranking(column: Column) -> list[str]:
    sign = 1 if column.better == "lower" else -1
    given = [(label, cell) for label, cell in column.cells.items() if cell.mean is not None]
    given.sort(key=lambda item: sign * (item[1].mean or 0.0))
    places = decimals([(cell.mean, cell.error) for _, cell in given if cell.mean is not None])
    extreme = "lowest" if column.better == "lower" else "highest"
    best = column.cells[column.best[0]]
    among = "" if len(given) == len(column.cells) else f", of the {len(given)} settings that have one,"
    said = [f"{_start(column.title)} is {extreme}{among} with {listed(list(column.best))}: {_number(best, places)}."]
    others = [(label, cell) for label, cell in given if label not in column.best]
    behind = [(label, cell) for label, cell in others if sign * (cell.mean or 0.0) > sign * (best.mean or 0.0)]
    if behind:
        label, second = behind[0]
        assert second.mean is not None
        assert best.mean is not None
        difference = abs(second.mean - best.mean)
        said.append(f"Next comes {label} with {_number(second, places)}.")
        if best.error is not None and second.error is not None:
            both = math.hypot(best.error, second.error)
            ratio = f", {difference / both:.1f} standard errors" if both else ""
            said.append(f"They differ by {_pm(difference, both, places)}{ratio}.")
            if min(best.n, second.n) == 2 and "training seeds" in (best.of, second.of):
                said.append("Two seeds are few: the errors themselves are known only roughly.")
        else:
            said.append(
                "With one number each, how much of the difference is chance is not known: repeat with seed=0,1,2."
            )
    return said


def standing(comparison: Comparison, jobs: list[Job]) -> str:
    """How many runs of how many settings there are, and how they ended, in one sentence."""
    runs = [run for setting in comparison.settings for run in setting.runs]
    states = [run.state for run in runs] + [job.state for job in jobs]
    said = counted(len(states), "run")
    if len(comparison.settings) > 1:
        said += f", {len(comparison.settings)} settings"
    if comparison.seeds > 1:
        said += f", {comparison.seeds} seeds"
    order = ("finished", "running", "stopped", "pruned", "failed", "unfinished", "not begun")
    ends = [f"{states.count(state)} {state}" for state in order if state in states]
    return f"{said}: {listed(ends)}"


def _number(cell: Cell, places: int | None) -> str:
    assert cell.mean is not None
    runs = f" ({counted(cell.n, 'seed')})" if cell.of == "training seeds" else ""
    return _pm(cell.mean, cell.error, places) + runs


def _pm(value: float, uncertainty: float | None, places: int | None) -> str:
    return number(value, places) + ("" if uncertainty is None else f" ± {error(uncertainty, places)}")


def _start(text: str) -> str:
    return text[0].upper() + text[1:] if text.startswith("held") else text
