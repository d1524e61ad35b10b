"""Trains a diffusion model, or a classifier that scores: python -m src.train [group=option] [key=value] ..."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from src.cli import command
from src.launch import is_named, rank
from src.overrides import as_override, plain_value


@dataclass
class TrainConfig:
    """The keys at the root of conf/train.yaml."""

    name: str
    seed: int
    label_dropout: float
    offset_noise: float
    run: str | None
    resume: Literal["auto"] | None
    init_from: str | None
    metric: Literal["val/loss_ema"] | None
    overrides: list[str]
    choices: dict
    task: dict
    schedule: dict | None
    objective: dict | None
    weighting: dict | None
    density: dict | None
    loss: dict | None
    model: dict
    sampler: dict | None
    data: dict
    augment: dict
    optimizer: dict
    lr_schedule: dict
    trainer: dict
    callbacks: dict
    logger: dict


def train(config: dict[str, Any], run_dir: Path) -> float:
    """Trains in `run_dir`, or continues the run that config["run"] names in its own folder.

    With resume=auto, a run that `run_dir` holds already is continued: the same command, started again, goes on.
    With init_from, a new run begins with the weights of another, and with its network, schedule, objective and loss.

    Returns:
        val/loss_ema at the end: the number that a sweep compares.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from src.files import shown
    from src.runs import CONFIG, Run
    from src.training.fit import fit
    from src.training.init import adopted
    from src.training.stop import Stopped

    config["choices"] = {k: v for k, v in config["choices"].items() if not k.startswith("hydra/")}
    hydra = HydraConfig.get()
    sweep = hydra.mode == RunMode.MULTIRUN
    if config["resume"] == "auto" and config["run"] is None:
        if (run_dir / CONFIG).is_file():
            config["run"] = str(run_dir)
        elif not any(o.startswith("hydra.") for o in hydra.overrides.hydra) and not is_named():
            print("note: resume=auto finds nothing in a new folder; name one with hydra.run.dir=<folder>", flush=True)
    if config["init_from"] is not None and config["run"] is None:
        config = adopted(config)
    try:
        return fit(config, run_dir, sweep=Path(hydra.sweep.dir).name if sweep else None)
    except Stopped as stopped:
        folder = Run(config["run"]).folder if config["run"] is not None else run_dir
        if rank() == 0:
            print(f"{stopped}; go on with python -m src.train {as_override('run', shown(folder))}", flush=True)
        if stopped.requeue is not None:
            stopped.requeue(stopped.signum, None)
        if stopped.signum == signal.SIGINT:
            raise SystemExit(128 + signal.SIGINT) from None
        code = config["trainer"]["requeue_code"]
        raise SystemExit(128 + signal.SIGTERM if code is None else code) from None


def inherit(run: dict[str, Any], overrides: list[str]) -> list[str]:
    """A continued run starts from the overrides that it was started with, in its own folder, and alone."""
    return [*run["overrides"], "hydra.mode=RUN", f"hydra.run.dir={plain_value(run['run_dir'])}"]


main = command("train", TrainConfig, train, inherit)

if __name__ == "__main__":
    main()
