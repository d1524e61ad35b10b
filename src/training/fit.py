"""One training run from its configuration: build everything, then write, then train.

What a user can get wrong is found before anything is written to the run's folder.
"""

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from src.build import build, locate, refusals
from src.errors import UserError
from src.files import replacing, shown
from src.runs import CONFIG, LAST, Run, build_diffusion, build_net, check_architecture, image_shape, net_state
from src.training.loggers import finish_wandb, log_config, log_summary
from src.training.metrics import MetricsCSV, TrainMetrics
from src.training.module import DiffusionModule
from src.training.progress import Progress
from src.training.summary import summarize, write
from src.training.trainer import StopAtLastStep, TrainerSettings, refuse_ddp_sweep

# What may differ when a run is continued; everything else is the experiment.
FREE_ON_RESUME = ("trainer", "callbacks", "logger", "sampler", "data.dir", "data.val_images")


def fit(config: dict[str, Any], run_dir: Path, sweep: str | None = None) -> float:
    """Trains in `run_dir`, or continues the run that config["run"] names in its own folder.

    Args:
        config: conf/train.yaml, composed, resolved and checked.
        run_dir: an existing folder.
        sweep: the name of the sweep that this run belongs to.

    Returns:
        val/loss_ema at the end.

    Raises:
        UserError: for whatever the user can mend, before anything is written.
    """
    run, resume = None, None
    if config["run"] is not None:
        run = Run(config["run"])
        run_dir = run.folder
        config = _continued(config, run.config)
        resume = run.load_checkpoint() if run.checkpoint.is_file() else None
    settings: TrainerSettings = build(config["trainer"], "trainer")
    if sweep is not None:
        refuse_ddp_sweep(settings)
    if resume is not None and resume["global_step"] >= settings.max_steps:
        print(f"{run_dir} has trained {resume['global_step']} steps already; to go on, raise trainer.max_steps")
        return float(resume["callbacks"]["Checkpoint"]["best"])

    diffusion = build_diffusion(config)
    torch.manual_seed(config["seed"])
    net = build_net(config)
    if run is not None and resume is not None:
        check_architecture(net, net_state(resume["state_dict"]), run.checkpoint)
    runtime = {
        "checkpoint": {"run_dir": run_dir, "config": config},
        "samples": {"run_dir": run_dir, "image_shape": image_shape(config)},
    }
    if not 0 <= config["label_dropout"] < 1:
        raise UserError(f"label_dropout={config['label_dropout']} must lie in [0, 1)")
    callbacks = {
        name: build(node, f"callbacks.{name}", **runtime.get(name, {})) for name, node in config["callbacks"].items()
    }
    module = DiffusionModule(
        settings.prepare(net),
        diffusion,
        _build_optimizer(config, settings),
        build(config["lr_schedule"], "lr_schedule"),
        settings.gradient_clip_norm,
        callbacks["ema"],
        config["seed"],
        config["label_dropout"],
    )
    samplers = {"sampler": build(config["sampler"], "sampler"), "callbacks.samples": callbacks["samples"].sampler}
    for path, sampler in samplers.items():
        with refusals(path):
            sampler.path(diffusion.schedule)
    data = build(config["data"], "data")
    data.setup()

    _claim(run_dir, config, continued=run is not None)
    metrics = TrainMetrics(settings.log_every_n_steps)
    exit_code = 1
    try:
        loggers = _loggers(config, run_dir, sweep, resume["global_step"] if resume else 0)
        # After a step: average first; then measure, stop, and whatever else conf/callbacks names; save last.
        own = [callbacks.pop("ema"), metrics, StopAtLastStep(), Progress()]
        last = callbacks.pop("checkpoint")
        trainer = settings.make(run_dir, loggers, [*own, *callbacks.values(), last])
        for logger in loggers:
            log_config(logger, config)
        parameters = sum(p.numel() for p in net.parameters())
        _say(f"{config['name']}: {parameters:,} parameters, {_device(trainer)}, in {shown(run_dir)}")
        trainer.fit(module, data, ckpt_path=run.checkpoint if run and resume else None, weights_only=True)
        summary = summarize(
            trainer,
            net,
            image_shape(config),
            config,
            images_seen=metrics.images_seen,
            images_per_second=metrics.mean_images_per_second,
            wall_seconds=metrics.wall_seconds,
        )
        if trainer.is_global_zero:
            write(summary, run_dir / "summary.json")
            for logger in loggers:
                log_summary(logger, summary)
        _report(run_dir, summary)
        exit_code = 0
    finally:
        finish_wandb(exit_code)
    return summary["metrics"]["val/loss_ema"]


def _build_optimizer(config: dict[str, Any], settings: TrainerSettings) -> Any:
    node = config["optimizer"]
    fused = {"fused": settings.fused_optimizer} if node["_target_"] in ("torch.optim.Adam", "torch.optim.AdamW") else {}
    locate(node["_target_"], "optimizer")
    make = build(node, "optimizer", **(fused if "fused" not in node else {}))
    try:
        make([torch.nn.Parameter(torch.zeros(1))])  # its constructor is the check of its arguments
    except (ValueError, TypeError) as error:
        raise UserError(f"optimizer: {error}") from error
    return make


def _loggers(config: dict[str, Any], run_dir: Path, sweep: str | None, from_step: int) -> list[Logger]:
    """metrics.csv and the tracker that was asked for; only the first of several processes writes."""
    if getattr(rank_zero_only, "rank", 0):
        return []
    tracker = build(config["logger"], "logger", run_dir=run_dir, config=config, group=sweep)
    return [MetricsCSV(run_dir / "metrics.csv", from_step), *([] if tracker is None else [tracker])]


def _continued(config: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a continued run; prints what differs.

    Raises:
        UserError: when something differs that would make it another experiment.
    """
    before, now = _flat(saved), _flat(config)
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new or key.split(".")[0] in ("run", "overrides", "choices"):
            continue
        if not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME):
            raise UserError(
                f"{key}={new} is not what this run was started with ({key}={old}); a continued run keeps its experiment"
                f", start a new one to change it"
            )
        _say(f"continuing with {key}={new} instead of {old}")
    return {**config, "overrides": [o for o in config["overrides"] if not o.startswith("run=")]}


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{path}.{key}" if path else key).items()}


@rank_zero_only
def _claim(run_dir: Path, config: dict[str, Any], continued: bool) -> None:
    """Makes the folder this run's own by writing config.yaml into it.

    Raises:
        UserError: when it holds another run, or cannot be written to.
    """
    from omegaconf import OmegaConf

    path = run_dir / CONFIG
    if path.exists() and not continued:
        raise UserError(
            f"{run_dir} already holds a run; continue it with run={run_dir}, or choose another hydra.run.dir"
        )
    try:
        with replacing(path) as temporary:
            temporary.write_text(OmegaConf.to_yaml(config))
    except OSError as error:
        raise UserError(
            f"{run_dir} cannot be written to ({error}); choose another with hydra.run.dir=<folder>"
        ) from error


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    return f"{trainer.world_size} x {device.type}, {trainer.precision}"


@rank_zero_only
def _report(run_dir: Path, summary: dict[str, Any]) -> None:
    folder = shown(run_dir)
    minutes, seconds = divmod(round(summary["wall_seconds"]), 60)
    losses = ", ".join(f"{name} {summary['metrics'][name]:.4f}" for name in ("val/loss_raw", "val/loss_ema"))
    print(
        f"{summary['steps']:,} steps, {summary['images_seen']:,} images in {minutes} min {seconds} s; {losses}\n"
        f"  samples     {folder / 'samples' / 'step={}.png'.format(summary['steps'])}\n"
        f"  checkpoint  {folder / LAST}\n"
        f"  summary     {folder / 'summary.json'}\n"
        f"more samples: python -m src.sample run={folder}",
        flush=True,
    )
