"""One training run from its configuration: build everything, then write, then train.

What a user can get wrong is found before anything is written to the run's folder.
"""

import inspect
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.loggers import Logger
from torch import nn

from src.build import build, locate
from src.data.augmentation import NOTHING
from src.data.datamodule import ImageDataModule
from src.errors import UserError
from src.files import remove_temporaries, replacing, shown
from src.launch import is_restart, launched, rank
from src.lock import Lock
from src.overrides import as_override, same_job
from src.processes import meet, share_cores
from src.randomness import another
from src.runs import CONFIG, LAST, PREVIOUS, SUMMARY, Run, build_net, check_architecture, image_shape, net_state
from src.start import start
from src.training.checkpoint import VALIDATION
from src.training.ending import explained
from src.training.guard import Diverged, Guard
from src.training.init import initialize
from src.training.loggers import finish_wandb, log_config, log_summary
from src.training.metrics import TrainMetrics
from src.training.metrics_csv import MetricsCSV
from src.training.muon import Muon
from src.training.progress import Progress
from src.training.resume import continued, images_per_step, resume_point, say
from src.training.snapshots import find_snapshots
from src.training.step import TrainingModule
from src.training.stop import SIGNALS, Stop
from src.training.summary import summarize, write
from src.training.tasks import DEFAULT, Task
from src.training.trainer import TrainerSettings, refuse_ddp_sweep
from src.training.units import in_steps
from src.training.writer import CheckpointWriter


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
    Stop.give_back()  # of a training before this one in a sweep
    run, resume = None, None
    changes: list[str] = []
    went_back = False
    if config["run"] is not None:
        run = Run(config["run"])
        went_back = Path(config["run"]).is_file() and run.in_folder
        if went_back and is_restart():
            run, went_back = Run(run.folder), False
        run_dir = run.folder
        config, changes = continued(config, run)
    written, config = config, _counted_in_steps(config)
    settings: TrainerSettings = build(config["trainer"], "trainer")
    if sweep is not None:
        refuse_ddp_sweep(settings)
    launch = launched()
    if launch is None and settings.num_devices > 1:
        start(same_job("train", run_dir), settings.num_devices, SIGNALS)
        if not (run_dir / SUMMARY).is_file():  # nothing was left to train, of a run that was killed after its last step
            return float(Run(run_dir).load_checkpoint()["callbacks"]["Checkpoint"]["best"])
        loss = json.loads((run_dir / SUMMARY).read_text())["metrics"]["val/loss_ema"]
        return math.nan if loss is None else float(loss)

    for line in changes:
        say(line)
    if run is not None:
        resume = resume_point(run)
    if resume is not None and resume["global_step"] >= settings.max_steps:
        say(f"{run_dir} has trained {resume['global_step']} steps already; to go on, raise trainer.max_steps")
        return float(resume["callbacks"]["Checkpoint"]["best"])
    if launch is not None:
        share_cores(launch)
    augment = config.get("augment", NOTHING)  # which runs of older versions do not have
    data = build(config["data"], "data", augment=build(augment, "augment"))
    training = _assemble(config, written, run_dir, settings, data, resume)
    if run is not None and resume is not None:
        check_architecture(training.net, net_state(resume["state_dict"]), run.checkpoint)
    if launch is not None and launch.world_size > 1:  # Lightning takes the group as it is
        if settings.device_type == "cuda":
            torch.cuda.set_device(launch.local_rank)
        meet(launch, "nccl" if settings.device_type == "cuda" else "gloo")
    with _claimed(run_dir, written, continued=run is not None):
        if run is not None and resume is not None and went_back:
            _forget_later(run, run_dir, resume["global_step"])
        exit_code, loggers = 1, _loggers(written, run_dir, sweep)
        try:
            for logger in loggers:
                log_config(logger, written)
            parameters = sum(p.numel() for p in training.net.parameters())
            devices = f"{training.trainer.world_size} x {settings.device_type}, {settings.chosen}"
            devices += ", fused" if training.module.implementation().get("fused") else ""
            say(f"{config['name']}: {parameters:,} parameters, {devices}, in {shown(run_dir)}")
            for line in training.task.notes(data):
                say(line)
            while True:
                if training.trainer.global_rank == 0:
                    table = resume["callbacks"]["TrainMetrics"]["table"] if resume else None
                    training.trainer.loggers = [MetricsCSV(run_dir / "metrics.csv", table), *loggers]
                try:
                    checkpoint = run.checkpoint if run and resume else None
                    training.trainer.fit(training.module, data, ckpt_path=checkpoint, weights_only=True)
                    break
                except RuntimeError as error:
                    if training.trainer.world_size == 1 or not _is_of_a_peer(error):
                        raise
                    raise _lost(run_dir, training, error) from error
                except Diverged as diverged:
                    run, resume = _go_back(diverged, training.guard, run_dir, resume)
                    training = _assemble(config, written, run_dir, settings, data, resume, training.guard)
            summary = _finish(training, config, settings, run_dir)
            exit_code = 0
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        finally:
            finish_wandb(loggers, exit_code)
    return summary["metrics"]["val/loss_ema"]


@dataclass
class Training:
    """What one call of Lightning's `fit` needs."""

    net: nn.Module
    task: Task
    module: TrainingModule
    metrics: TrainMetrics
    guard: Guard
    writer: CheckpointWriter
    trainer: Trainer


def _assemble(
    config: dict[str, Any],
    written: dict[str, Any],
    run_dir: Path,
    settings: TrainerSettings,
    data: ImageDataModule,
    resume: dict[str, Any] | None,
    diverged: Guard | None = None,
) -> Training:
    """Builds and checks everything.

    Args:
        config, written: the configuration, with intervals in steps and as the user wrote them.
        data: reads its images if it has not.
        resume: the checkpoint that training will continue from.
        diverged: the guard of a training that went back to `resume`, or to the start.
    """
    task: Task = build(config.get("task", DEFAULT), "task", config=config)
    torch.manual_seed(config["seed"])
    net = build_net(config)
    task.check(net)
    if config.get("init_from") is not None and resume is None:
        initialize(net, config)
    stop, writer = Stop(), CheckpointWriter()
    guard: Guard = diverged or build(config["callbacks"]["guard"], "callbacks.guard")
    if diverged is None and resume is not None:
        guard.load_state_dict(resume["callbacks"]["Guard"])
    callbacks = _build_callbacks(
        config, run_dir, checkpoint={"config": written, "stop": stop, "guard": guard, "writer": writer}
    )
    masters = settings.prepare(net)
    module = task.module(
        net,
        optimizer=_build_optimizer(config, settings),
        lr_schedule=build(config["lr_schedule"], "lr_schedule"),
        gradient_clip_norm=settings.gradient_clip_norm,
        ema=callbacks["ema"],
        guard=guard,
        seed=another(config["seed"], guard.restores),
        masters=masters,
    )
    task.check_callbacks(net, callbacks)
    data.setup()
    data.restores, data.images_done = guard.restores, 0
    task.check_data(net, data)
    devices = settings.num_devices * settings.num_nodes
    if data.batch_size % devices:
        raise UserError(
            f"data.batch_size={data.batch_size} counts the images of all devices together, and {devices} devices "
            f"cannot share them evenly; choose a multiple of {devices}"
        )
    if len(data.val) < devices:
        raise UserError(
            f"data.val_images={len(data.val)} leaves some of {devices} devices without; choose {devices} or more"
        )
    metrics = TrainMetrics(settings.log_every_n_steps, image_shape(config), settings.chosen_precision)
    # After a step: average first; then judge, measure, stop, and whatever else conf/callbacks names; save last.
    own = [callbacks.pop("ema"), guard, metrics, stop, Progress()]
    last = callbacks.pop("checkpoint")
    trainer = settings.make(run_dir, writer, [*own, *callbacks.values(), last])
    return Training(net, task, module, metrics, guard, writer, trainer)


def _go_back(
    diverged: Diverged, guard: Guard, run_dir: Path, before: dict[str, Any] | None
) -> tuple[Run | None, dict[str, Any] | None]:
    """The last good checkpoint of a run that has diverged; none when there is none yet.

    Args:
        before: the checkpoint that the diverged training had started from.

    Raises:
        UserError: when training has come no further since it last went back, `guard.max_restores` times.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the first process may still have been writing
    run = Run(run_dir)
    resume = run.load_newest()
    if resume and resume["callbacks"]["Guard"]["state"][1] > 0 and (run_dir / PREVIOUS).is_file():
        run = Run(run_dir / PREVIOUS)  # a stop saved the last one among steps that were left out
        resume = run.load_newest()
    step = resume["global_step"] if resume else 0
    guard.futile = guard.futile + 1 if step == (before["global_step"] if before else 0) else 1
    if guard.futile > guard.max_restores:
        raise UserError(
            "training has diverged; lower optimizer.lr, or set trainer.gradient_clip_norm: after step "
            f"{step}, which it went back to {guard.max_restores} times, {guard.patience} steps in a row were left out; "
            f"{diverged.where}"
        )
    guard.restores += 1
    if resume is None:
        guard.begin_anew()
    say(f"note: {diverged}; going back to step {step}, with another order of images and noise")
    return (run if resume else None), resume


def _forget_later(run: Run, run_dir: Path, step: int) -> None:
    """Makes the checkpoint that the user goes back to the last one: what came after it must not return by itself.

    Raises:
        UserError: when it cannot be copied.
    """
    if rank() != 0 or run.checkpoint.name == LAST.name:
        return
    try:
        with replacing(run_dir / LAST) as temporary:
            shutil.copyfile(run.checkpoint, temporary)
        if run.checkpoint.name != PREVIOUS.name:
            (run_dir / PREVIOUS).unlink(missing_ok=True)
        for later, path in find_snapshots(run_dir).items():
            if later > step:
                path.rename(path.with_suffix(".left"))
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    say(f"note: {run.checkpoint.name} is the last checkpoint now; those of later steps are left behind")


def _is_of_a_peer(error: RuntimeError) -> bool:
    """Whether it says that another process has gone."""
    return isinstance(error, torch.distributed.DistError) or re.search("gloo|by peer|NCCL", str(error)) is not None


def _lost(run_dir: Path, training: Training, error: RuntimeError) -> UserError:
    """What to say when another process has gone; on a GPU it is said, and the process ends, at once.

    There, a kernel may wait for the lost process forever, and everything that waits for the device with it.
    """
    reason = " ".join(str(error).split())[:200]
    sentence = (
        f"another process of this run has ended ({reason}); go on from the last checkpoint with python -m src.train "
        f"{as_override('run', shown(run_dir))}, or with the same command and resume=auto"
    )
    if training.trainer.strategy.root_device.type == "cuda":
        with suppress(OSError, RuntimeError):
            training.writer.wait()
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        os._exit(2)
    return UserError(sentence)


def _counted_in_steps(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the intervals that it counts in images as steps."""
    parts = ("trainer", "lr_schedule", "callbacks")
    return {**config, **{part: in_steps(config[part], images_per_step(config)) for part in parts}}


def _build_callbacks(config: dict[str, Any], run_dir: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The callbacks of conf/callbacks by name; one that was set to null is left out, unless training needs it."""
    nodes = {name: node for name, node in config["callbacks"].items() if node is not None}
    for name in ("ema", "checkpoint", "guard"):
        if name not in nodes:
            raise UserError(f"callbacks.{name} cannot be left out; set it as conf/callbacks/default.yaml does")
    del nodes["guard"]
    runtime: dict[str, dict[str, Any]] = {
        "ema": {"run_dir": run_dir},
        "checkpoint": {"run_dir": run_dir, **checkpoint},
        "samples": {"run_dir": run_dir, "image_shape": image_shape(config)},
        "score": {"image_shape": image_shape(config)},
    }
    callbacks = {name: build(node, f"callbacks.{name}", **runtime.get(name, {})) for name, node in nodes.items()}
    monitor, score = callbacks["checkpoint"].monitor, callbacks.get("score")
    if monitor not in (VALIDATION, score and score.name):
        with_score = f", or {score.name}" if score else ", or add callbacks=scored, whose score it may be"
        raise UserError(
            f"callbacks.checkpoint.monitor={monitor} is not computed in this run; choose {VALIDATION}{with_score}"
        )
    return callbacks


def _build_optimizer(config: dict[str, Any], settings: TrainerSettings) -> Any:
    node = config["optimizer"]
    parameters = inspect.signature(locate(node.get("_target_", ""), "optimizer")).parameters
    fused = {"fused": settings.fused_optimizer} if "fused" in parameters and "fused" not in node else {}
    make = build(node, "optimizer", **fused)
    try:
        made = make([torch.nn.Parameter(torch.zeros(1))])  # its constructor is the check of its arguments
    except (ValueError, TypeError) as error:
        raise UserError(f"optimizer: {error}") from error
    if settings.strategy == "fsdp" and isinstance(made, Muon):
        raise UserError(
            "optimizer=muon needs whole matrices, which strategy=fsdp cuts; use trainer.strategy=ddp or optimizer=adamw"
        )
    return make


def _loggers(config: dict[str, Any], run_dir: Path, sweep: str | None) -> list[Logger]:
    """The tracker that was asked for, beside metrics.csv; only the first of several processes writes."""
    if rank() != 0:
        return []
    tracker = build(config["logger"], "logger", run_dir=run_dir, config=config, group=sweep)
    return [] if tracker is None else [tracker]


@contextmanager
def _claimed(run_dir: Path, config: dict[str, Any], continued: bool) -> Iterator[None]:
    """Makes the folder this run's own, by a lock and by writing config.yaml into it, until the block ends.

    Raises:
        UserError: when another process trains in it, it holds another run, or cannot be written to.
    """
    if rank() != 0:
        yield
        return
    from omegaconf import OmegaConf

    path = run_dir / CONFIG
    try:
        lock = Lock(run_dir)
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    try:
        if path.exists() and not continued:
            raise UserError(
                f"{run_dir} already holds a run; continue it with {as_override('run', run_dir)}, let resume=auto do "
                "so, or choose another hydra.run.dir"
            )
        try:
            remove_temporaries(run_dir)
            with replacing(path) as temporary:
                temporary.write_text(OmegaConf.to_yaml(config))
            (run_dir / LAST).parent.mkdir(exist_ok=True)  # fails now, where something else has the name
        except OSError as error:
            raise _unwritable(run_dir, error) from error
        with explained(run_dir):
            yield
    finally:
        lock.release()


def _unwritable(run_dir: Path, error: OSError) -> UserError:
    return UserError(f"{run_dir} cannot be written to ({error}); choose another with hydra.run.dir=<folder>")


def _finish(training: Training, config: dict[str, Any], settings: TrainerSettings, run_dir: Path) -> dict[str, Any]:
    """Writes summary.json, and says what was done and where it lies."""
    trainer, metrics = training.trainer, training.metrics
    summary = summarize(
        trainer,
        training.net,
        metrics.flops_per_image,
        config,
        precision=settings.chosen_precision,
        train_loss=metrics.last_loss,
        images_seen=metrics.images_seen,
        images_per_second=metrics.mean_images_per_second,
        wall_seconds=metrics.wall_seconds,
    )
    if trainer.is_global_zero:
        write(summary, run_dir / SUMMARY)
        for logger in trainer.loggers:
            log_summary(logger, summary)
    folder = shown(run_dir)
    minutes, seconds = divmod(round(summary["wall_seconds"]), 60)
    result, *where, way_on = training.task.report(summary["metrics"], folder, summary["steps"])
    say(f"{summary['steps']:,} steps, {summary['images_seen']:,} images in {minutes} min {seconds} s; {result}")
    for line in (*where, f"  checkpoint  {folder / LAST}", f"  summary     {folder / SUMMARY}", way_on):
        say(line)
    return summary
