"""A lesson, from its experiment to plain results: trains the sweep and scores its runs, all through the commands.

Whatever was done is kept in the sweep's folder, outputs/multirun/lessons/<name>/<date>_<time>: a lesson that was
stopped goes on, and one that is finished is read.
"""

import csv
import importlib
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks.lessons.facts import guess_of_time, of_schedule, training_images
from benchmarks.timing import environment
from src.cli import CONF
from src.files import replacing
from src.runs import CONFIG, Run, build_diffusion

NAMES = ("schedule", "skips", "time", "steps", "objective")
ROOT = Path("outputs/multirun/lessons")
STATE = "lesson.json"
SAMPLES = 500  # that the distance is taken of
SHOWN = 12  # in the picture
SAMPLERS, STEPS = ("ddpm", "ddim", "dpmpp_2m"), (5, 10, 20, 50, 100)  # of the lesson on steps
LONG = ("ddpm", 1000)  # the tutorial's
SHOWN_STEPS = (5, 10, 50)

Results = dict[str, Any]


def call(name: str, *arguments: str) -> None:
    """python -m src.<name> <arguments>, in this process.

    Raises:
        SystemExit: when it fails, after it has said why.
    """
    print(f"python -m src.{name} {' '.join(arguments)}", flush=True)
    before, sys.argv = sys.argv, [f"src.{name}", *arguments]
    try:
        importlib.import_module(f"src.{name}").main()
    finally:
        sys.argv = before


def learn(name: str, overrides: Sequence[str] = (), fresh: bool = False, root: Path = ROOT) -> Results:
    """The results of a lesson, read or made.

    Args:
        overrides: for src.train, beside the experiment's own.
        fresh: begin anew.

    Returns:
        plain values: `name`, `folder`, `jobs`, `seconds`, `stamp`, `levels` (the times that losses are of), `facts`,
        and `settings`, one a point of the sweep: `values` (what it sets), `facts`, `samples` (an .npz file), and, one a
        seed, `seeds`, `fd`, `eps` (the mean square error of eps at each of the levels) and `loss`. Settings of the
        lesson on steps are a sampler and its steps, and have no losses.
    """
    folder = _folder(root / name, overrides, fresh)
    state = json.loads((folder / STATE).read_text())
    if state["results"] is not None:
        return state["results"]
    started = time.perf_counter()
    call("train", f"experiment=lessons/{name}", *overrides, "resume=auto", f"hydra.sweep.dir={folder}")
    runs = sorted((path.parent for path in folder.glob(f"*/{CONFIG}")), key=lambda run: int(run.name))
    results = _samplers(runs) if name == "steps" else _settings(name, runs)
    seconds = time.perf_counter() - started + state["seconds"]
    about = {"name": name, "folder": folder.as_posix(), "jobs": len(runs), "seconds": seconds, "stamp": environment()}
    _write(folder, {**state, "seconds": seconds, "results": {**about, **results}})
    return {**about, **results}


def _folder(parent: Path, overrides: Sequence[str], fresh: bool) -> Path:
    """The newest folder of the lesson with these overrides, or a new one."""
    for path in [] if fresh else sorted(parent.glob(f"*/{STATE}"), reverse=True):
        if json.loads(path.read_text())["overrides"] == list(overrides):
            return path.parent
    folder = parent / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    folder.mkdir(parents=True)
    _write(folder, {"overrides": list(overrides), "seconds": 0.0, "results": None})
    return folder


def _write(folder: Path, state: dict[str, Any]) -> None:
    with replacing(folder / STATE) as temporary:
        temporary.write_text(json.dumps(state, indent=2) + "\n")


def _settings(name: str, runs: list[Path]) -> Results:
    """Scores all runs; those that differ by their seed alone are one setting."""
    settings: dict[str, dict[str, Any]] = {}
    images = training_images(Run(runs[0]).config)
    for run in runs:
        config = Run(run).config
        values = _swept(name, config["overrides"])
        if str(values) not in settings:
            samples, facts = _draw(run, run / "lesson" / "samples"), of_schedule(config, images)
            numbers: dict[str, list[Any]] = {"seeds": [], "fd": [], "eps": [], "loss": []}
            settings[str(values)] = {"values": values, "facts": facts, "samples": samples, **numbers}
        setting, metrics = settings[str(values)], _score(run, config["seed"])
        levels = metrics["loss"]["levels"]
        setting["seeds"].append(config["seed"])
        setting["fd"].append(metrics["fd_pixels"]["value"])
        setting["loss"].append(metrics["loss"]["value"])
        setting["eps"].append([level["eps"] for level in levels])
    times = [int(level["t"]) for level in levels]
    guess = guess_of_time(build_diffusion(config).schedule, images, times)  # type: ignore[arg-type]
    facts = {"floor": metrics["fd_pixels"]["floor"], "guess": guess}
    return {"levels": times, "facts": facts, "settings": list(settings.values())}


def _samplers(runs: list[Path]) -> Results:
    """Scores every sampler at every number of steps, with each run."""
    settings: dict[tuple[str, int], dict[str, Any]] = {}
    for run in runs:
        seed = Run(run).config["seed"]
        for row in [*_sweep(run, seed, "sweep", SAMPLERS, STEPS), *_sweep(run, seed, "long", LONG[:1], LONG[1:])]:
            key = row["sampler"], int(row["steps"])
            values = {"sampler": key[0], "steps": key[1]}
            setting = settings.setdefault(key, {"values": values, "seeds": [], "fd": []})
            setting["seeds"].append(seed)
            setting["fd"].append(float(row["fd_pixels"]))
    for (sampler, steps), setting in settings.items():
        if steps in SHOWN_STEPS or (sampler, steps) == LONG:
            out = runs[0] / "lesson" / f"{sampler}_{steps}"
            setting["samples"] = _draw(runs[0], out, f"sampler={sampler}", f"sampler.steps={steps}")
    scores = json.loads((runs[0] / "lesson" / "sweep" / "metrics.json").read_text())
    floor = next(score["floor"] for score in scores.values() if "floor" in score)
    return {"levels": [], "facts": {"floor": floor}, "settings": list(settings.values())}


def _score(run: Path, seed: int) -> dict[str, Any]:
    """metrics.json of a run: the distance of its samples, drawn by its own sampler, and its loss by level."""
    path = run / "lesson" / "metrics.json"
    if not path.is_file() or not {"fd_pixels", "loss"} <= json.loads(path.read_text()).keys():
        _evaluate(run, seed, path.parent, "scores=[fd,loss]")
    return dict(json.loads(path.read_text()))


def _sweep(run: Path, seed: int, name: str, samplers: Sequence[Any], steps: Sequence[Any]) -> list[dict[str, str]]:
    """Rows of sweep.csv."""
    path = run / "lesson" / name / "sweep.csv"
    if not path.is_file() or len(_rows(path)) < len(samplers) * len(steps):
        lists = f"sweep.samplers=[{','.join(samplers)}]", f"sweep.steps=[{','.join(map(str, steps))}]"
        _evaluate(run, seed, path.parent, "scores=[fd]", *lists)
    return _rows(path)


def _evaluate(run: Path, seed: int, out: Path, *what: str) -> None:
    fixed = f"num_samples={SAMPLES}", "num_images=null", "batch_size=128"
    call("evaluate", f"run={run}", f"out={out}", f"seed={seed}", *what, *fixed)


def _draw(run: Path, out: Path, *sampler: str) -> str:
    """The first samples of a run, from the same noise as those of every other."""
    path = out / "samples.npz"
    if not path.is_file():
        call("sample", f"run={run}", f"out={out}", f"num_samples={SHOWN}", "seed=0", *sampler)
    return path.as_posix()


def _swept(name: str, overrides: list[str]) -> dict[str, str]:
    """What one job of a lesson's sweep sets, but for its seed."""
    params = OmegaConf.load(CONF / "experiment" / "lessons" / f"{name}.yaml").hydra.sweeper.params
    given = dict(override.split("=", 1) for override in overrides)
    return {str(key): given[str(key)] for key in params if key != "seed"}


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
