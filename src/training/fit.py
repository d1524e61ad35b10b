"""One training run from its configuration: build everything, then write, then train.

What a user can get wrong is found before anything is written to the run's folder.
"""

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from src.build import build, locate, refusals
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.levels import TERMINAL_ALPHA
from src.errors import UserError
from src.files import replacing, shown
from src.overrides import as_override
from src.runs import BEST, CONFIG, LAST, Run, build_diffusion, build_net, check_architecture, image_shape, net_state
from src.training.loggers import finish_wandb, log_config, log_summary
from src.training.metrics import MetricsCSV, TrainMetrics
from src.training.module import DiffusionModule
from src.training.progress import Progress
from src.training.stop import Stop
from src.training.summary import summarize, write
from src.training.trainer import TrainerSettings, refuse_ddp_sweep
from src.training.units import in_steps

# What may change when a run is continued; everything else is the experiment.
FREE_ON_RESUME = (
    *(f"trainer.{name}" for name in ("accelerator", "devices", "num_nodes", "strategy", "precision", "max_steps")),
    *(f"trainer.{name}" for name in ("val_every_n_steps", "log_every_n_steps", "compile", "channels_last")),
    *("trainer.deterministic", "callbacks.checkpoint", "callbacks.samples", "logger", "sampler", "data.dir"),
)


def fit(config: dict[str, Any], run_dir: Path, sweep: str | None = None) -> float:
    """Trains in `run_dir`, or continues the run that config["run"] names in its own folder.

    Args:
        config: conf/train.yaml, composed, resolved and checked.
        run_dir: an existing folder.
        sweep: the name of the sweep that this run belongs to.

    Returns:
        val/loss_ema at the end; the best so far where nothing was left to train.

    Raises:
        UserError: for whatever the user can mend, before anything is written; and when training diverges.
        Stopped: after a signal, with the last checkpoint saved.
    """
    run, resume = None, None
    if config["run"] is not None:
        run = Run(config["run"])
        run_dir, config, resume = run.folder, _continued(config, run), _resume_point(run)
    written, config = config, _counted_in_steps(config)
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
    if not 0 <= config["label_dropout"] < 1:
        raise UserError(f"label_dropout={config['label_dropout']} must lie in [0, 1)")
    if config["offset_noise"] < 0:
        raise UserError(f"offset_noise={config['offset_noise']} must not be negative; 0 is none, 0.1 its author's")
    with refusals("model"):
        diffusion.check(net)
    stop = Stop()
    callbacks = _build_callbacks({**written, "callbacks": config["callbacks"]}, run_dir, stop)
    module = DiffusionModule(
        settings.prepare(net),
        diffusion,
        _build_optimizer(config, settings),
        build(config["lr_schedule"], "lr_schedule"),
        settings.gradient_clip_norm,
        callbacks["ema"],
        config["seed"],
        config["label_dropout"],
        config["offset_noise"],
    )
    samplers = {"sampler": build(config["sampler"], "sampler")}
    if "samples" in callbacks:
        samplers["callbacks.samples"] = callbacks["samples"].sampler
    for path, sampler in samplers.items():
        with refusals(path):
            sampler.path(diffusion.schedule)
            sampler.check(net)
    data = build(config["data"], "data")
    data.setup()
    if module.num_classes is not None and module.num_classes < data.num_classes:
        raise UserError(
            f"model.num_classes={module.num_classes} is less than data.num_classes={data.num_classes}, and every label "
            "needs its place; set model.num_classes='${data.num_classes}'"
        )
    devices = settings.num_devices * settings.num_nodes
    if data.batch_size * devices > len(data.train):
        raise UserError(
            f"{devices} devices of data.batch_size={data.batch_size} take more than the {len(data.train)} training "
            "images a step; choose a smaller batch"
        )
    metrics = TrainMetrics(settings.log_every_n_steps)
    # After a step: average first; then measure, stop, and whatever else conf/callbacks names; save last.
    own = [callbacks.pop("ema"), metrics, stop, Progress()]
    last = callbacks.pop("checkpoint")
    trainer = settings.make(run_dir, [*own, *callbacks.values(), last])

    _claim(run_dir, written, continued=run is not None)
    exit_code = 1
    try:
        trainer.loggers = _loggers(written, run_dir, sweep, resume["global_step"] if resume else 0)
        for logger in trainer.loggers:
            log_config(logger, written)
        parameters = sum(p.numel() for p in net.parameters())
        _say(f"{config['name']}: {parameters:,} parameters, {_device(trainer)}, in {shown(run_dir)}")
        _warn_of_terminal_signal(diffusion)
        trainer.fit(module, data, ckpt_path=run.checkpoint if run and resume else None, weights_only=True)
        summary = summarize(
            trainer,
            net,
            image_shape(config),
            config,
            train_loss=metrics.last_loss,
            images_seen=metrics.images_seen,
            images_per_second=metrics.mean_images_per_second,
            wall_seconds=metrics.wall_seconds,
        )
        if trainer.is_global_zero:
            write(summary, run_dir / "summary.json")
            for logger in trainer.loggers:
                log_summary(logger, summary)
        _report(run_dir, summary)
        exit_code = 0
    finally:
        finish_wandb(exit_code)
    return summary["metrics"]["val/loss_ema"]


def _counted_in_steps(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the intervals that it counts in images as steps."""
    images_per_step = config["data"]["batch_size"] * config["trainer"]["accumulate_grad_batches"]
    parts = ("trainer", "lr_schedule", "callbacks")
    return {**config, **{part: in_steps(config[part], max(1, images_per_step)) for part in parts}}


def _build_callbacks(config: dict[str, Any], run_dir: Path, stop: Stop) -> dict[str, Any]:
    """The callbacks of conf/callbacks by name; one that was set to null is left out, unless training needs it."""
    nodes = {name: node for name, node in config["callbacks"].items() if node is not None}
    for name in ("ema", "checkpoint"):
        if name not in nodes:
            raise UserError(f"callbacks.{name} cannot be left out; set it as conf/callbacks/default.yaml does")
    runtime: dict[str, dict[str, Any]] = {
        "ema": {"run_dir": run_dir},
        "checkpoint": {"run_dir": run_dir, "config": config, "stop": stop},
        "samples": {"run_dir": run_dir, "image_shape": image_shape(config)},
    }
    return {name: build(node, f"callbacks.{name}", **runtime.get(name, {})) for name, node in nodes.items()}


def _resume_point(run: Run) -> dict[str, Any] | None:
    """The checkpoint to continue from; None for a run that was stopped before its first.

    Raises:
        UserError: when last.ckpt is gone and best.ckpt is not, which starting again would overwrite.
    """
    if not run.in_folder:
        raise UserError(f"{run.checkpoint} is not in a run's folder, which is what can be continued; give run=<folder>")
    if run.checkpoint.is_file():
        return run.load_checkpoint()
    if (run.folder / BEST).is_file():
        raise UserError(f"{run.checkpoint} does not exist; continue from the best with run={run.folder / BEST}")
    _say(f"{shown(run.folder)} has no checkpoint yet: starting again at step 0")
    return None


def _build_optimizer(config: dict[str, Any], settings: TrainerSettings) -> Any:
    node = config["optimizer"]
    parameters = inspect.signature(locate(node.get("_target_", ""), "optimizer")).parameters
    fused = {"fused": settings.fused_optimizer} if "fused" in parameters and "fused" not in node else {}
    make = build(node, "optimizer", **fused)
    try:
        make([torch.nn.Parameter(torch.zeros(1))])  # its constructor is the check of its arguments
    except (ValueError, TypeError) as error:
        raise UserError(f"optimizer: {error}") from error
    return make


def _warn_of_terminal_signal(diffusion: GaussianDiffusion) -> None:
    alpha, sigma = (float(v[-1]) for v in diffusion.schedule.table())
    if alpha > TERMINAL_ALPHA * sigma:
        _say(
            f"note: the schedule ends with alpha / sigma = {alpha / sigma:.3f} of the image left, and sampling, which "
            "starts from pure noise, starts from the wrong distribution; raise beta_end, num_timesteps or sigma_max, "
            "or set zero_terminal_snr=true"
        )


def _loggers(config: dict[str, Any], run_dir: Path, sweep: str | None, from_step: int) -> list[Logger]:
    """metrics.csv and the tracker that was asked for; only the first of several processes writes."""
    if getattr(rank_zero_only, "rank", 0):
        return []
    tracker = build(config["logger"], "logger", run_dir=run_dir, config=config, group=sweep)
    return [MetricsCSV(run_dir / "metrics.csv", from_step), *([] if tracker is None else [tracker])]


def _continued(config: dict[str, Any], run: Run) -> dict[str, Any]:
    """The configuration of a continued run: its own, with what the user changes now; prints what changes.

    Raises:
        UserError: when the user changes what would make it another experiment.
    """
    saved = run.config
    given = config["overrides"][len(saved["overrides"]) :]  # after those that the run was started with
    touched = [override.lstrip("+~").partition("=")[0] for override in given]
    before, now = _flat(saved), _flat(config)
    merged = copy.deepcopy(saved)
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        root = key.partition(".")[0]
        if old == new or root in ("run", "overrides", "choices") or not any(_below(key, t) for t in touched):
            continue  # a default that has changed since is not the run's
        if not any(_below(key, free) for free in FREE_ON_RESUME):
            raise UserError(
                f"{key}={new} is not what this run was started with ({key}={old}); a continued run keeps its experiment"
                f", start a new one to change it"
            )
        _say(f"continuing with {key}={new} instead of {old}")
        _set(merged, key, new, present=key in now)
    if merged["trainer"]["max_steps"] != saved["trainer"]["max_steps"] and "Cosine" in saved["lr_schedule"]["_target_"]:
        _say("note: the cosine of the learning rate now ends at the new max_steps: it jumps up where the run goes on")
    kept = [override for override in given if not override.startswith("run=")]
    return {**merged, "run": config["run"], "overrides": [*saved["overrides"], *kept]}


def _set(node: dict[str, Any], key: str, value: Any, present: bool) -> None:
    """Sets, or removes, the leaf with a dotted name."""
    *parents, name = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    if present:
        node[name] = value
    else:
        node.pop(name, None)


def _below(key: str, path: str) -> bool:
    return key == path or key.startswith(path + ".")


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
            f"{run_dir} already holds a run; continue it with {as_override('run', run_dir)}, or choose another "
            "hydra.run.dir"
        )
    try:
        with replacing(path) as temporary:
            temporary.write_text(OmegaConf.to_yaml(config))
            (run_dir / LAST).parent.mkdir(exist_ok=True)  # fails now, where something else has the name
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
        f"more samples: python -m src.sample {as_override('run', folder)}",
        flush=True,
    )
