"""Scores a trained model: python -m src.evaluate run=<run folder or .ckpt> [features=...] [key=value] ..."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from src.cli import command
from src.errors import UserError
from src.overrides import plain_value, same_job
from src.sample import inherit as inherit_sampler

if TYPE_CHECKING:
    from src.processes import Group

Name = Literal[
    "fd", "kd", "inception_score", "prdc", "sfid", "accuracy", "memorisation", "colour", "loss", "vlb", "ode"
]
SMALL = 16  # images up to this size are compared by their pixels where no features are asked for


@dataclass
class EvaluateConfig:
    """The keys at the root of conf/evaluate.yaml."""

    run: str
    out: str
    scores: list[Name] | None
    features: dict
    sampler: dict
    guidance: dict
    labels: str | list[int] | None
    num_samples: int | None
    num_images: int | Literal["auto"] | None
    batch_size: int
    seed: int
    weights: str
    device: Literal["auto", "cpu", "cuda", "mps"]
    devices: int | Literal["auto"]
    precision: Literal["32-true", "bf16-mixed"]
    cache: str | None
    samples: str | None
    sweep: dict
    fd: dict
    kd: dict
    inception_score: dict
    prdc: dict
    sfid: dict
    accuracy: dict
    memorisation: dict
    colour: dict
    loss: dict
    vlb: dict
    ode: dict


def evaluate(config: dict[str, Any], out: Path) -> None:
    """Writes metrics.json into `out`: for each score its value, error, protocol and time, and the stamp.

    Raises:
        UserError: for whatever the user can mend, before anything is written.
    """
    from src.processes import on_devices

    on_devices(
        lambda group: score(config, out, group), lambda: same_job("evaluate", out), config["devices"], config["device"]
    )


def score(config: dict[str, Any], out: Path, group: "Group") -> None:
    """`evaluate`, in each process of a group; the first has the scores, prints and writes."""
    from src.evaluation.scoring import prepare, run_scores
    from src.evaluation.sweep import sweep

    if any(value is not None for value in config["sweep"].values()):
        sweep(config, out, group)
        return
    evaluation = prepare(config, out, group)
    if group.first:
        device = evaluation.subject.device.type
        print(
            f"{evaluation.run.checkpoint}, {config['weights']} weights, "
            f"{device if group.size == 1 else f'{group.size} x {device}'}"
        )
        for name, why in evaluation.left_out.items():
            print(f"  without {name}: {why}")
    run_scores(evaluation, _print)
    if group.first:
        print(f"  {out / 'metrics.json'}")


def _print(name: str, made: dict[str, Any]) -> None:
    """A line a score, as it comes."""
    digits = ".4f" if abs(made["value"]) >= 0.01 else ".2e"
    error = "" if made["standard_error"] is None else f" +- {made['standard_error']:{digits}}"
    print(f"  {name:24} {made['value']:{digits}}{error:12}  {_detail(name, made)}".rstrip(), flush=True)


def _detail(name: str, made: dict[str, Any]) -> str:
    if name == "vlb":
        T = f"{len(made['terms'])} terms, {made['variance']} variance, prior {made['prior']:.1e}"
        detail = f"bits/dim; {T}, t={made['times'][0]}: {made['terms'][0]:.4f}"
        if len(made["times"]) < made["num_timesteps"]:
            detail += f"; of {made['num_timesteps']} times, whose choice is not in the error"
        return detail
    if name == "ode":
        evaluations = made["evaluations"]
        mean = sum(evaluations) / len(evaluations)
        probes = made["num_probes"] or "all"
        return f"bits/dim; {mean:.0f} evaluations, rtol={made['rtol']:g} atol={made['atol']:g}, {probes} probes"
    if made.get("floor") is not None:
        return f"two halves of the training images: {made['floor']:.4f}"
    if name.startswith("memorised"):
        return f"{made['expected']:g} expected of new real images"
    if name == "gap":
        return f"{made['held_out']:.4f} held out, {made['trained']:.4f} on training images"
    return ""


def inherit(run: dict[str, Any], overrides: list[str]) -> list[str]:
    """The run's own sampler, features that suit the size of its images, and its folder, where none are asked for.

    Raises:
        UserError: for settings of one sampler beside sweep.samplers, which takes several as they are.
    """
    given = [override.lstrip("+~") for override in overrides]
    swept = any(key.startswith("sweep.samplers=") and key != "sweep.samplers=null" for key in given)
    ignored = next((key for key in given if key.startswith(("sampler=", "sampler."))), None)
    if swept and ignored is not None:
        raise UserError(
            f"{ignored} has no effect on sweep.samplers, which takes each sampler as it is; leave one of them out, or "
            "vary the number of steps with sweep.steps"
        )

    def asked(key: str) -> bool:
        return any(override.startswith(f"{key}=") for override in overrides)

    settings = inherit_sampler(run, overrides)
    if not asked("features"):
        size = run["data"]["image_size"]
        small = max(size if isinstance(size, list) else [size]) <= SMALL
        settings.append(f"features={'pixels' if small else 'inception'}")
    if not asked("out") and run["in_folder"]:
        settings.append(f"out={plain_value(run['run_dir'] + '/evaluation/${stamp:%Y-%m-%d_%H-%M-%S-%f}')}")
    return settings


main = command("evaluate", EvaluateConfig, evaluate, inherit)

if __name__ == "__main__":
    main()
