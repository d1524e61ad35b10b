"""What training logs: losses are means over the steps since the last row and over the devices."""

import math
import time
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from src.data.loader import Batch
from src.errors import UserError
from src.training.metrics_csv import MetricsCSV


class TrainMetrics(Callback):
    """Logs to every logger, every so many steps, and not through Lightning, whose `self.log` costs 0.3 ms a step.

    A last step that is no multiple of the interval gets a row too; the next regular row is then what it would have
    been without. A checkpoint keeps the sums of every device and all of metrics.csv, so that a run that was stopped
    logs what one logs that was not.

    Args:
        every_n_steps: optimiser steps between two rows.

    Attributes:
        images_seen: by all devices since the run began.
        images_per_second: of all devices, in the steps since the last row; validation, sampling and saving left out.
        last_loss: of the last row.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.images_seen = 0
        self.images_per_second = 0.0
        self.last_loss = float("nan")
        self._loss_sum: Tensor | None = None  # of this device's batches since the last regular row
        self._batches = 0
        self._images = 0  # by all devices while the clock of `images_per_second` ran
        self._seconds = 0.0
        self._total_seconds = 0.0
        self._total_images = 0
        self._started = 0.0
        self._wall_start = time.perf_counter()
        self._wall_before = 0.0
        self._step = 0

    @property
    def mean_images_per_second(self) -> float:
        """Of the whole training, also before a resume."""
        return self._total_images / self._total_seconds if self._total_seconds else 0.0

    @property
    def wall_seconds(self) -> float:
        """Since the run began, the time between a stop and its resume left out."""
        return self._wall_before + time.perf_counter() - self._wall_start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if not self._started:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach()
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
        self._batches += 1
        self._images += len(batch.x0) * trainer.world_size
        self.images_seen += len(batch.x0) * trainer.world_size
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        regular = self._step % self.every_n_steps == 0
        if regular or self._step >= trainer.max_steps:
            self._log(trainer, pl_module)
        if regular:
            self._loss_sum, self._batches = None, 0

    @staticmethod
    def pause_all(trainer: Trainer) -> None:
        """Stops the clocks of a trainer's metrics until the next batch: for work between steps that is not training."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, TrainMetrics):
                callback._pause()

    def _pause(self) -> None:
        if self._started:
            self._seconds += time.perf_counter() - self._started
            self._started = 0.0

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pause_all(trainer)
        self.images_per_second = self._images / max(self._seconds, 1e-9)
        self._total_images += self._images
        self._total_seconds += self._seconds
        self._images, self._seconds = 0, 0.0
        sums = trainer.strategy.reduce(self._sums(), reduce_op="sum")
        loss = float(sums[0]) / (self._batches * trainer.world_size)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} in the {self._batches} batches before step {trainer.global_step}: training has "
                "diverged; lower optimizer.lr, or set trainer.gradient_clip_norm"
            )
        self.last_loss = loss
        metrics = {
            "train/loss": loss,
            "train/grad_norm": float(pl_module.grad_norm),  # type: ignore[arg-type]
            "train/lr": pl_module.optimizers().param_groups[0]["lr"],  # type: ignore[union-attr]
            "images": self.images_seen,
            "images_per_second": self.images_per_second,
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _sums(self) -> Tensor:
        """What this device has summed up since the last regular row, (1,)."""
        assert self._loss_sum is not None
        return self._loss_sum.float().reshape(1).clone()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pause_all(trainer)

    # On every process, for the sums of all of them; `state_dict` would not know the trainer.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.pause_all(trainer)
        state: dict[str, Any] = {
            "images_seen": self.images_seen,
            "total_images": self._total_images + self._images,
            "total_seconds": self._total_seconds + self._seconds,
            "wall_seconds": self.wall_seconds,
            "batches": self._batches,
        }
        if self._batches:
            sums = self._sums()
            state["sums"] = trainer.strategy.all_gather(sums).reshape(-1, len(sums)).cpu().clone()  # (devices, 1)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                state["table"] = logger.table()
        checkpoint["callbacks"][self.state_key] = state

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["callbacks"].get(self.state_key, {})
        self.images_seen = state.get("images_seen", 0)
        self._total_images = state.get("total_images", 0)
        self._total_seconds = state.get("total_seconds", 0.0)
        self._wall_before = state.get("wall_seconds", 0.0)
        if state.get("batches"):
            sums: Tensor = state["sums"]
            same_devices = len(sums) == trainer.world_size
            mine = sums[trainer.global_rank] if same_devices else sums.double().mean(0).float()
            self._loss_sum = mine[0].to(trainer.strategy.root_device)
            self._batches = state["batches"]
