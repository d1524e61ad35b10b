"""Compares runs on one page: python -m src.report sweep=<multirun folder> or run=<run folder> [key=value] ..."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from src.cli import command
from src.errors import UserError


@dataclass
class ReportConfig:
    """The keys at the root of conf/report.yaml."""

    sweep: str | int | list[str | int] | None
    run: str | list[str | int] | None
    evaluations: str | list[str] | None
    out: str


def report(config: dict[str, Any], out: Path) -> None:
    """Writes report.html, report.csv, runs.csv and figures/*.png into `out`.

    Raises:
        UserError: when there is nothing to report; before anything is written.
    """
    from src.reporting.report import make

    make(_folders(config["sweep"], config["run"]), [Path(path) for path in _listed(config["evaluations"])], out)


def _listed(value: Any) -> list[str]:
    """One or several names as a list; a folder may be called 2026."""
    if value is None or value == "":
        return []
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return [str(name) for name in value] if several else [str(value)]


def _folders(sweep: Any, run: Any) -> list[Path]:
    folders = [Path(name) for name in (*_listed(sweep), *_listed(run))]
    if not folders:
        raise UserError("name what to report on: sweep=<multirun folder> or run=<run folder>, or several: run=[a,b]")
    return folders


def _out(sweep: Any, run: Any, stamp: str) -> str:
    """${report_out:...} of conf/report.yaml: <folder>/report; of several folders a new one in outputs/report.

    Raises:
        UserError: when nothing is named, or it is no folder, in which none shall be made.
    """
    folders = _folders(sweep, run)
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give that of a sweep or of a run")
    return str(folders[0] / "report") if len(folders) == 1 else f"outputs/report/{stamp}"


OmegaConf.register_new_resolver("report_out", _out, replace=True)
main = command("report", ReportConfig, report, None)

if __name__ == "__main__":
    main()
