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
from src.training.hardware import memory_bytes, peak_flops
from src.training.loggers import log_histogram
from src.training.metrics_csv import MetricsCSV
from src.training.summary import flops_per_image

BINS = 20
TOLD = {  # by which attribute of which callback
    "system/checkpoint_seconds": ("Checkpoint", "last_seconds"),
    "system/checkpoint_bytes": ("Checkpoint", "last_bytes"),
    "train/skipped": ("Guard", "skipped"),
}


class LossByLevel:
    """Mean loss in 20 equal bins of u, the place on the schedule: a sum on the device, without a synchronisation.

    Attributes:
        sums: (2, BINS): the losses and how many they are; None before the first.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, u: Tensor, losses: Tensor) -> None:
        """Adds the losses, (B,), of images at u, (B,) in [0, 1)."""
        losses = losses.detach().float()
        if self.sums is None:
            self.sums = torch.zeros(2, BINS, device=losses.device)
        bins = (u * BINS).long().clamp_(max=BINS - 1)
        sums, counts = self.sums
        sums.index_add_(0, bins, losses)
        counts.index_add_(0, bins, torch.ones_like(losses))


class TrainMetrics(Callback):
    """Logs to every logger, every so many steps, and not through Lightning, whose `self.log` costs 0.3 ms a step.

    A last step that is no multiple of the interval gets a row too; the next regular row is then what it would have
    been without. A checkpoint keeps the sums of every device and all of metrics.csv, so that a run that was stopped
    logs what one logs that was not.

    Columns under `system/`: `memory_bytes`, see `hardware.memory_bytes`; `peak_share`, the operations of forward and
    backward passes (three forward passes' worth) a second over what the devices' matrix multiplications reach, measured
    at the start; `checkpoint_seconds` and `checkpoint_bytes` of the latest checkpoint. Trackers also get the loss by
    noise level.

    Args:
        every_n_steps: optimiser steps between two rows.
        image_shape: (C, H, W).

    Attributes:
        images_seen: by all devices since the run began.
        images_per_second: of all devices, in the steps since the last row; validation, sampling and saving left out.
        last_loss: of the last row.
    """

    def __init__(self, every_n_steps: int, image_shape: tuple[int, int, int]) -> None:
        self.every_n_steps = every_n_steps
        self.image_shape = image_shape
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
        self._peak_images_per_second = float("nan")  # of all devices, if they did nothing but multiply matrices

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
        net: Any = pl_module.net
        device = trainer.strategy.root_device
        flops = 3 * flops_per_image(net, self.image_shape, device)  # on every process: the weights may be shared out
        peak = peak_flops(device, str(trainer.precision)) * trainer.world_size
        self._peak_images_per_second = peak / flops if flops else float("nan")

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
            self._levels(pl_module).sums = None

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
        sums = trainer.strategy.reduce(self._sums(pl_module), reduce_op="sum")
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
            "system/memory_bytes": memory_bytes(trainer.strategy.root_device),
            "system/peak_share": self.images_per_second / self._peak_images_per_second,
            **self._from_callbacks(trainer),
        }
        losses, counts = sums[1:].reshape(2, BINS).cpu()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
            if counts.any():
                log_histogram(logger, "train/loss_by_level", losses / counts.clamp(min=1), trainer.global_step)

    @staticmethod
    def _from_callbacks(trainer: Trainer) -> dict[str, float]:
        """What other callbacks have to tell."""
        values = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            for column, (owner, attribute) in TOLD.items():
                if type(callback).__name__ == owner and getattr(callback, attribute, None) is not None:
                    values[column] = float(getattr(callback, attribute))
        return values

    @staticmethod
    def _levels(module: LightningModule) -> LossByLevel:
        levels = getattr(module, "loss_by_level", None)
        return levels if isinstance(levels, LossByLevel) else LossByLevel()

    def _sums(self, module: LightningModule) -> Tensor:
        """What this device has summed up since the last regular row: the loss, and by level, (1 + 2 BINS,)."""
        assert self._loss_sum is not None
        levels = self._levels(module).sums
        if levels is None:
            levels = torch.zeros(2, BINS, device=self._loss_sum.device)
        return torch.cat([self._loss_sum.float().reshape(1), levels.flatten()])

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
            sums = self._sums(pl_module)
            gathered = trainer.strategy.all_gather(sums).reshape(-1, len(sums))  # (devices, 1 + 2 BINS)
            state["sums"] = gathered.cpu().clone()
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
            mine = mine.to(trainer.strategy.root_device)
            self._loss_sum = mine[0].clone()
            self._levels(pl_module).sums = mine[1:].reshape(2, BINS).clone()
            self._batches = state["batches"]
