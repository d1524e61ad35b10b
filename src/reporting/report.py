"""A report from folders: reads runs, compares them, draws the charts, and writes page, tables and pictures."""

import time
from collections.abc import Sequence
from pathlib import Path

from src.errors import UserError
from src.files import replacing, shown
from src.reporting.charts import draw
from src.reporting.evaluations import gather
from src.reporting.figures import figures
from src.reporting.folders import RunFolder, find_runs, read_runs
from src.reporting.jobs import Job, jobs_without_run
from src.reporting.page import Content, page
from src.reporting.pictures import grids, others
from src.reporting.provenance import provenance, same_images
from src.reporting.scores import columns
from src.reporting.settings import compare
from src.reporting.tables import runs_csv, scores_csv
from src.reporting.text import counted, grouped
from src.reporting.verdict import standing, verdict

PAGE, SCORES, RUNS, FIGURES = "report.html", "report.csv", "runs.csv", "figures"


def make(folders: Sequence[Path], evaluations: Sequence[Path], out: Path) -> None:
    """Writes report.html, report.csv, runs.csv and figures/*.png into `out`, and prints where, and what came out.

    Args:
        folders: of sweeps and runs.
        evaluations: metrics.json files beside those in the runs' folders.

    Raises:
        UserError: when a folder is none, or holds no run; before anything is written.
    """
    runs, jobs, notes = _read(folders)
    scores, left_out = gather(runs, list(evaluations))
    comparison = compare(runs)
    runs = [run for setting in comparison.settings for run in setting.runs]
    table = columns(comparison, scores)
    notes += [f"{note}." for note in grouped((run.name, note) for run in runs for note in run.notes)]
    charts = figures(comparison, table, left_out)
    not_shown: list[str] = []
    samples, pictures = grids(runs, not_shown), others(runs, left_out)
    notes += [f"{note}." for note in (*left_out, *([] if samples else not_shown))]
    settings = len(comparison.settings)
    pairs = {name: [(chart, *draw(chart, settings)) for chart in of] for name, of in charts.items()}
    said = verdict(comparison, table)
    content = Content(
        title=_title(folders, len(runs)),
        standing=standing(comparison, jobs),
        verdict=said,
        notes=[*provenance(runs, scores, table), *notes],
        comparison=comparison,
        columns=table,
        jobs=jobs,
        charts={name: [(chart, svg) for chart, svg, _ in of] for name, of in pairs.items()},
        grids=samples,
        left_out=[f"{note}." for note in not_shown],
        same_noise=same_images(runs),
        pictures=pictures,
        made=f"Made {time.strftime('%Y-%m-%d %H:%M')} by src.report of {', '.join(str(shown(f)) for f in folders)}",
    )
    html = page(content)
    _write(out / SCORES, scores_csv(comparison, table).encode())
    _write(out / RUNS, runs_csv(comparison, table, jobs).encode())
    _write_figures(out / FIGURES, {chart.name: png for of in pairs.values() for chart, _, png in of})
    _write(out / PAGE, html.encode())
    print(content.standing)
    for sentence in said:
        print(f"  {sentence}")
    for name in (PAGE, SCORES, RUNS, FIGURES):
        print(f"  {shown(out / name)}")


def _read(folders: Sequence[Path]) -> tuple[list[RunFolder], list[Job], list[str]]:
    """The runs in the folders, jobs without one, and notes on what could not be read."""
    paths: list[Path] = []
    jobs: list[Job] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give a sweep's, a run's, or several: sweep=[a,b]")
        found = find_runs(folder)
        refused = jobs_without_run(folder)
        if not found and not refused:
            raise UserError(f"{folder} holds no run; runs lie in outputs/<experiment>/, sweeps in outputs/multirun/")
        if not found:
            raise UserError(f"none of the {counted(len(refused), 'job')} in {folder} has a run: {refused[0].reason}")
        paths += [path for path in found if path.resolve() not in {p.resolve() for p in paths}]
        jobs += [job._replace(name=f"{folder.name}/{job.name}") if len(folders) > 1 else job for job in refused]
    runs, notes = read_runs(paths)
    if not runs:
        raise UserError(f"no run can be read: {notes[0]}")
    return runs, jobs, [f"{note}." for note in notes]


def _title(folders: Sequence[Path], runs: int) -> str:
    if len(folders) == 1:
        folder = folders[0].resolve()
        return f"{folder.parent.name}/{folder.name}"
    return f"{counted(runs, 'run')} of {len(folders)} folders"


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _write_figures(folder: Path, figures: dict[str, bytes]) -> None:
    """Writes the figures, and takes away those of an earlier report that this one does not have."""
    folder.mkdir(exist_ok=True)
    own = folder.parent / ".figures"  # the names of those that reports have written; other pictures are not theirs
    earlier = own.read_text().splitlines() if own.is_file() else []
    for name in {*earlier} - {*figures}:
        (folder / f"{name}.png").unlink(missing_ok=True)
    _write(own, "\n".join(sorted(figures)).encode())
    for name, png in figures.items():
        _write(folder / f"{name}.png", png)
