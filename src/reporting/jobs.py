"""Jobs of a sweep that left no run: those that were refused, and those that have not begun."""

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from src.failures import FAILED
from src.reporting.folders import natural
from src.runs import CONFIG


class Job(NamedTuple):
    """A job without a run's folder: its number, what it was started with, and what is known of it."""

    name: str
    overrides: list[str]
    state: str
    reason: str


def jobs_without_run(sweep: Path) -> list[Job]:
    """Those of one sweep's folder, by number; none where the folder is not of a sweep."""
    refused = [job for path in sorted((sweep / FAILED).glob("*.json"), key=natural) if (job := _refused(path))]
    known = {job.name for job in refused}
    others = [
        _without_folder(sweep / str(number), overrides)
        for number, overrides in enumerate(_planned(sweep))
        if str(number) not in known and not (sweep / str(number) / CONFIG).is_file()
    ]
    return sorted(refused + others, key=lambda job: natural(Path(job.name)))


def _without_folder(folder: Path, overrides: list[str]) -> Job:
    if folder.is_dir():
        return Job(folder.name, overrides, "unfinished", "its folder holds no run: it has just begun, or was killed")
    return Job(folder.name, overrides, "not begun", "has not begun: the sweep goes on, or ended before it")


def _refused(path: Path) -> Job | None:
    try:
        content = json.loads(path.read_text())
        return Job(path.stem, [str(o) for o in content["overrides"]], "failed", str(content["error"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Job(path.stem, [], "failed", "it is not said why")


def _planned(sweep: Path) -> list[list[str]]:
    """The overrides of each job that Hydra's own sweeper makes of a command line; none of a search, which decides late.

    They are the products of all lists, the last the fastest.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(sweep / "multirun.yaml"))
        hydra = config["hydra"]
        if "BasicSweeper" not in hydra["sweeper"]["_target_"] or hydra["sweep"]["subdir"] != "${hydra.job.num}":
            return []
        overrides = OverridesParser.create().parse_overrides(hydra["overrides"]["task"])
    except (OSError, YAMLError, OmegaConfBaseException, HydraException, KeyError, TypeError):
        return []
    choices = [
        [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
        if o.is_sweep_override()
        else [str(o.input_line)]
        for o in overrides
    ]
    return [list(job) for job in itertools.product(*choices)]
