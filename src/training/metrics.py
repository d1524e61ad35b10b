"""What training logs: losses are means over the steps since the last row and over the devices."""

import time
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from src.data.loader import Batch
from src.training.by_level import BINS
from src.training.hardware import memory_bytes, peak_flops
from src.training.loggers import log_histogram
from src.training.metrics_csv import MetricsCSV
from src.training.summary import flops_per_image


class TrainMetrics(Callback):
    """Logs to every logger, every so many steps, and not through Lightning, whose `self.log` costs 0.3 ms a step.

    A last step that is no multiple of the interval gets a row too; the next regular row is then what it would have
    been without. A checkpoint keeps the sums of every device and all of metrics.csv, so that a run that was stopped
    logs what one logs that was not.

    Columns under `system/`: `memory_bytes`, see `hardware.memory_bytes`; `peak_share`, the operations of forward and
    backward passes (three forward passes' worth) a second over what the devices' matrix multiplications reach, measured
    at the start, and more than one where convolutions take fewer (`Conv3x3`); `checkpoint_seconds` and
    `checkpoint_bytes` of the latest checkpoint; `wall_seconds` since the run began. `train/loss_by_level/<i>` is the
    mean loss in bin i of `by_level.BINS`, of which trackers get a histogram.

    Args:
        every_n_steps: optimiser steps between two rows.
        image_shape: (C, H, W).
        precision: see `TrainerSettings.chosen_precision`.

    Attributes:
        images_seen: by all devices since the run began.
        images_per_second: of all devices, in the steps since the last row; validation, sampling and saving left out.
        last_loss: of the last row.
        flops_per_image: see `src.training.summary.flops_per_image`.
    """

    def __init__(self, every_n_steps: int, image_shape: tuple[int, int, int], precision: str) -> None:
        self.every_n_steps = every_n_steps
        self.image_shape = image_shape
        self.precision = precision
        self.images_seen = 0
        self.images_per_second = 0.0
        self.last_loss = float("nan")
        self.flops_per_image = 0
        self._batch_losses: list[Tensor] = []  # of the step that is not complete
        self._loss_sum: Tensor | None = None  # (2,) of good steps since the last regular row, and how many
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

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step
        net: Any = pl_module.net
        device = trainer.strategy.root_device
        self.flops_per_image = flops_per_image(net, self.image_shape, device)  # by all: the weights may be shared out
        flops = 3 * self.flops_per_image
        peak = peak_flops(device, self.precision) * trainer.world_size
        self._peak_images_per_second = peak / flops if flops else float("nan")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        if not self._started:
            self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        loss = outputs["loss"].detach()
        self._batch_losses.append(loss.float())
        self._images += len(batch.x0) * trainer.world_size
        self.images_seen += len(batch.x0) * trainer.world_size
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        step_loss = torch.stack(self._batch_losses).mean()
        both = torch.stack([step_loss, torch.ones_like(step_loss)]).masked_fill_(pl_module.guard.left_out(), 0.0)
        self._loss_sum = both if self._loss_sum is None else self._loss_sum + both
        self._batch_losses = []
        regular = self._step % self.every_n_steps == 0
        if regular or self._step >= trainer.max_steps:
            self._log(trainer, pl_module)
        if regular:
            self._loss_sum = None
            pl_module.loss_by_level.sums = None

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

    def _log(self, trainer: Trainer, pl_module: Any) -> None:
        self.pause_all(trainer)
        self.images_per_second = self._images / max(self._seconds, 1e-9)
        self._total_images += self._images
        self._total_seconds += self._seconds
        self._images, self._seconds = 0, 0.0
        sums = trainer.strategy.reduce(self._sums(pl_module), reduce_op="sum")
        good_steps = float(sums[1])
        if good_steps:
            self.last_loss = float(sums[0]) / good_steps
        metrics = {
            **({"train/loss": self.last_loss} if good_steps else {}),
            "train/grad_norm": float(pl_module.grad_norm),
            "train/lr": pl_module.optimizers().param_groups[0]["lr"],
            "images": self.images_seen,
            "images_per_second": self.images_per_second,
            "system/memory_bytes": memory_bytes(trainer.strategy.root_device),
            "system/peak_share": self.images_per_second / self._peak_images_per_second,
            "system/wall_seconds": self.wall_seconds,
            "train/skipped": float(pl_module.guard.skipped),
        }
        writer: Any = trainer.strategy.checkpoint_io
        if writer.last_seconds is not None:
            metrics["system/checkpoint_seconds"] = writer.last_seconds
            metrics["system/checkpoint_bytes"] = float(writer.last_bytes)
        losses, counts = sums[2:].reshape(2, BINS).cpu()
        bins = zip(losses.tolist(), counts.tolist(), strict=True)
        levels = {f"train/loss_by_level/{i:02}": loss / n for i, (loss, n) in enumerate(bins) if n}
        for logger in trainer.loggers:
            row = {**metrics, **levels} if isinstance(logger, MetricsCSV) else metrics
            logger.log_metrics(row, step=trainer.global_step)
            if counts.any():
                log_histogram(logger, "train/loss_by_level", losses / counts.clamp(min=1), trainer.global_step)

    def _sums(self, module: Any) -> Tensor:
        """What this device has summed up since the last regular row: loss, steps, and by level, (2 + 2 BINS,)."""
        assert self._loss_sum is not None
        levels = module.loss_by_level.sums
        if levels is None:
            levels = torch.zeros(2, BINS, device=self._loss_sum.device)
        return torch.cat([self._loss_sum, levels.flatten()])

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.pause_all(trainer)

    # On every process, for the sums of all of them; `state_dict` would not know the trainer.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.pause_all(trainer)
        state: dict[str, Any] = {
            "images_seen": self.images_seen,
            "total_images": self._total_images + self._images,
            "total_seconds": self._total_seconds + self._seconds,
            "wall_seconds": self.wall_seconds,
        }
        if self._loss_sum is not None:
            sums = self._sums(pl_module)
            gathered = trainer.strategy.all_gather(sums).reshape(-1, len(sums))  # (devices, 2 + 2 BINS)
            state["sums"] = gathered.cpu().clone()
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                state["table"] = logger.table()
        checkpoint["callbacks"][self.state_key] = state

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["callbacks"].get(self.state_key, {})
        self.images_seen = state.get("images_seen", 0)
        self._total_images = state.get("total_images", 0)
        self._total_seconds = state.get("total_seconds", 0.0)
        self._wall_before = state.get("wall_seconds", 0.0)
        if "sums" in state:
            sums: Tensor = state["sums"]
            same_devices = len(sums) == trainer.world_size
            mine = sums[trainer.global_rank] if same_devices else sums.double().mean(0).float()
            mine = mine.to(trainer.strategy.root_device)
            self._loss_sum = mine[:2].clone()
            pl_module.loss_by_level.sums = mine[2:].reshape(2, BINS).clone()
