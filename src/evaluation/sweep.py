"""Samplers against steps, over shared noise: which quality how many evaluations of the network buy.

All combinations start from the same latents and are compared with the same reference. What is drawn stays in the run's
folder; a sweep that was killed goes on.
"""

import csv
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from src.build import check
from src.errors import UserError
from src.evaluation.sampling import Setup, set_up
from src.evaluation.scoring import OVER_FEATURES, Evaluation, drawn, entry, features_of, prepare, write
from src.evaluation.stamp import evaluations, of_samples, subject_stamp
from src.evaluation.sweep_picture import save_sweep
from src.files import replacing
from src.overrides import option
from src.processes import Group

MAIN = ("fd", "kd")  # the score of the picture: the first of these that is asked for


def sweep(config: dict[str, Any], out: Path, group: Group) -> None:
    """Scores every combination of config["sweep"]; the first process writes sweep.csv, sweep.png and metrics.json.

    Raises:
        UserError: for whatever the user can mend, before anything is drawn.
    """
    names = [name for name in OVER_FEATURES if config["scores"] is None or name in config["scores"]]
    others = [name for name in config["scores"] or [] if name not in names]
    if others:
        raise UserError(f"a sweep scores samples over features; leave {', '.join(others)} out of scores")
    if config["samples"] is not None:
        raise UserError(
            f"samples={config['samples']} are drawn already, and a sweep draws its own; leave one of them out"
        )
    evaluation = prepare({**config, "scores": config["scores"] and names}, out, group)
    scorers = {name: scorer for name, scorer in evaluation.scorers.items() if name in names}
    if not scorers:
        raise UserError(f"no score can be had: {'; '.join(evaluation.left_out.values())}")
    with group.agreement():
        cells = [(cell, _setup(evaluation, cell)) for cell in _cells(evaluation.config)]
    if group.first:
        print(f"{evaluation.run.checkpoint}, {config['weights']} weights, {len(cells)} combinations")
    rows: list[dict[str, Any]] = []
    metrics: dict[str, Any] = {}
    for cell, setup in cells:
        images = drawn(setup, cell, evaluation.n, out, group)
        with group.agreement():
            if group.first:
                row = _row(cell, setup)
                extracted = features_of(evaluation.features, images)
                protocol = {**of_samples(cell, setup, evaluation.n), **evaluation.compared_with}
                for name, scorer in scorers.items():
                    for full, score in scorer(extracted, evaluation.reference).items():
                        row[full], row[f"{full}_error"] = score.value, score.standard_error
                        where = f"{full} {row['sampler']} {row['steps']}" + (
                            f" {row['guidance']}" * bool(row["guidance"])
                        )
                        metrics[where] = entry(score, {**protocol, "scorer": config[name]}, 0.0)
                rows.append(row)
                _save(rows, out)
                stamp = subject_stamp(config, evaluation.run, evaluation.subject.device)
                write(out / "metrics.json", {**metrics, "stamp": stamp})
                print("  " + "  ".join(f"{key} {_shown(value)}" for key, value in row.items() if "error" not in key))
    if group.first:
        main = next(name for name in (*MAIN, *scorers) if name in scorers)
        column = scorers[main].names(evaluation.reference.name)[0]
        better = next(metrics[name]["better"] for name in metrics if name.startswith(f"{column} "))
        floor = evaluation.reference.floor if main == "fd" else None
        save_sweep(rows, column, better == "higher", floor, out / "sweep.png")
        for name, why in evaluation.left_out.items():
            if name in names:
                print(f"  {name} is left out: {why}")
        for name in ("sweep.csv", "sweep.png", "metrics.json"):
            print(f"  {out / name}")


def _cells(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The configuration of each combination.

    Raises:
        UserError: for an unknown sampler, or a list that is empty.
    """
    asked = config["sweep"]
    for name, values in asked.items():
        if values is not None and (not isinstance(values, list) or not values):
            raise UserError(f"sweep.{name}={values} must be a list such as [5,10], or null")
    samplers = [config["sampler"]] if asked["samplers"] is None else [option("sampler", n) for n in asked["samplers"]]
    names = asked["samplers"] or [None]
    scales = asked["guidance"] or [None]
    cells = []
    for (name, sampler), steps, scale in itertools.product(
        zip(names, samplers, strict=True), asked["steps"] or [None], scales
    ):
        cell = {**config, "sampler": dict(sampler), "cell": (name, scale)}
        if steps is not None:
            cell["sampler"]["steps"] = steps
        if scale is not None:
            cell["guidance"] = {**config["guidance"], "scale": scale}
        cells.append(cell)
    return cells


def _setup(evaluation: Evaluation, cell: dict[str, Any]) -> Setup:
    check({"sampler": cell["sampler"], "guidance": cell["guidance"]}, "")
    assert evaluation.setup is not None
    made = set_up(cell, evaluation.n, loaded=(evaluation.setup.run, evaluation.setup.net))
    return replace(made, device=evaluation.setup.device)


def _row(cell: dict[str, Any], setup: Setup) -> dict[str, Any]:
    name, scale = cell["cell"]
    return {
        "sampler": name or type(setup.sampler).__name__.lower(),
        "steps": setup.steps,
        "guidance": scale,
        "evaluations": evaluations(setup),
    }


def _save(rows: list[dict[str, Any]], out: Path) -> None:
    with replacing(out / "sweep.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
