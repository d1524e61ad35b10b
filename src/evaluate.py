"""Scores a trained model: python -m src.evaluate run=<run folder or .ckpt> [key=value] ..."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from src.cli import command
from src.overrides import same_job

if TYPE_CHECKING:
    from src.data.sources import ImageSet
    from src.evaluation.likelihood import Subject
    from src.processes import Group
    from src.runs import Run


@dataclass
class EvaluateConfig:
    """The keys at the root of conf/evaluate.yaml."""

    run: str
    out: str
    bits: list[Literal["vlb", "ode"]] | None
    num_images: int | None
    batch_size: int
    seed: int
    weights: str
    device: Literal["auto", "cpu", "cuda", "mps"]
    devices: int | Literal["auto"]
    precision: Literal["32-true"]
    vlb: dict
    ode: dict


def evaluate(config: dict[str, Any], out: Path) -> None:
    """Writes metrics.json into `out`: for each score its value, its settings and its time, and the stamp.

    Raises:
        UserError: for whatever the user can mend, before anything is written.
    """
    from src.processes import on_devices

    on_devices(
        lambda group: score(config, out, group), lambda: same_job("evaluate", out), config["devices"], config["device"]
    )


def score(config: dict[str, Any], out: Path, group: "Group") -> None:
    """`evaluate`, in each process of a group; the first has the scores, prints and writes."""
    import json
    import time

    from src.build import refusals
    from src.files import replacing

    run, subject, scores = _prepare(config, group)
    if group.first:
        devices = subject.device.type if group.size == 1 else f"{group.size} x {subject.device.type}"
        print(f"{len(subject.data)} validation images, {run.checkpoint}, {config['weights']} weights, {devices}")
    metrics: dict[str, Any] = {}
    for name, compute in scores.items():
        start = time.perf_counter()
        with refusals(name):
            metrics[name] = compute(subject)
        metrics[name]["seconds"] = time.perf_counter() - start
    if not group.first:
        return
    metrics["stamp"] = _stamp(config, run, len(subject.data), str(subject.device))
    print(_table(metrics))
    with replacing(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    print(f"  {out / 'metrics.json'}")


def _prepare(config: dict[str, Any], group: "Group") -> tuple["Run", "Subject", dict[str, Any]]:
    """The run, what is scored of it, and the scores by name, none of which refuses."""
    import torch

    from src.build import build, refusals
    from src.diffusion.schedules import DiscreteSchedule
    from src.errors import UserError
    from src.evaluation.likelihood import Subject
    from src.evaluation.sampling import choose_device
    from src.runs import Run, build_diffusion

    with group.agreement():
        if config["batch_size"] < 1:
            raise UserError(f"batch_size={config['batch_size']} must be at least 1")
        run, device = Run(config["run"]), choose_device(config["device"])
        torch.backends.cudnn.allow_tf32 = False  # three digits would be the solver's error
        diffusion = build_diffusion(run.config)
        net = run.load_net(config["weights"]).to(device)
    data = group.in_turn(lambda: _images(run, config["num_images"]))
    with group.agreement():
        names = config["bits"]
        if names == []:
            raise UserError("bits=[] names nothing to compute; choose [vlb], [ode], or null for both")
        if names is None:
            names = ["vlb", "ode"] if isinstance(diffusion.schedule, DiscreteSchedule) else ["ode"]
        scores = {name: build(config[name], name) for name in dict.fromkeys(names)}
        subject = Subject(diffusion, net, data, config["batch_size"], config["seed"], group)
        for name, compute in scores.items():
            with refusals(name):
                compute.refuse(subject)
    return run, subject, scores


def _images(run: "Run", num_images: int | None) -> "ImageSet":
    """The first so many images that the run validates on, with their labels."""
    from src.build import build
    from src.errors import UserError

    data = build(run.config["data"], "data")
    data.setup()
    n = len(data.val) if num_images is None else num_images
    if not 1 <= n <= len(data.val):
        raise UserError(f"num_images={n} is not between 1 and the {len(data.val)} images that this run validates on")
    return data.val[:n]


def _stamp(config: dict[str, Any], run: "Run", num_images: int, device: str) -> dict[str, Any]:
    """What a score depends on beside its own settings."""
    import hashlib
    import platform
    from importlib.metadata import version

    from src.training.summary import PACKAGES, git_commit

    return {
        "run": config["run"],
        "checkpoint": str(run.checkpoint),
        "checkpoint_sha256": hashlib.sha256(run.checkpoint.read_bytes()).hexdigest(),
        "weights": config["weights"],
        "data": run.config["data"],
        "split": "validation",
        "num_images": num_images,
        "batch_size": config["batch_size"],
        "seed": config["seed"],
        "precision": config["precision"],
        "device": device,
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _table(metrics: dict[str, Any]) -> str:
    lines = ["       bits/dim"]
    for name, m in metrics.items():
        if name == "stamp":
            continue
        error = "" if m["standard_error"] is None else f" +- {m['standard_error']:.4f}"
        if name == "vlb":
            T = f"{len(m['terms'])} terms, {m['variance']} variance, prior {m['prior']:.1e}"
            detail = f"{T}, t={m['times'][0]}: {m['terms'][0]:.4f}"
            if len(m["times"]) < m["num_timesteps"]:
                detail += f"; of {m['num_timesteps']} times, whose choice is not in the error"
        else:
            evaluations = m["evaluations"]
            mean = sum(evaluations) / len(evaluations)
            detail = f"{mean:.0f} evaluations, rtol={m['rtol']:g} atol={m['atol']:g}, {m['num_probes'] or 'all'} probes"
        lines.append(f"  {name:4} {m['bits_per_dim']:.4f}{error:12}  {detail}")
    return "\n".join(lines)


main = command("evaluate", EvaluateConfig, evaluate, lambda run, overrides: [])

if __name__ == "__main__":
    main()
