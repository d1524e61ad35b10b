"""What training logs: loss, gradient norm, learning rate and speed, each the mean of the steps since the last row."""

import csv
import io
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor

from src.data.loader import Batch
from src.errors import UserError
from src.files import replacing


class MetricsCSV(Logger):
    """metrics.csv: one row a step, one column a metric, on disk as soon as it is logged.

    Metrics logged twice for one step share its row. Values are written with all their digits.

    Args:
        path: of the file; one that exists is continued.
        from_step: rows of later steps are dropped: they belong to a continuation that this one replaces.
    """

    def __init__(self, path: Path, from_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.columns = ["step"]
        self.rows: dict[int, dict[str, str]] = {}
        self._last_start = 0  # where the last step's line begins, to be rewritten when more of it comes
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    step = row.pop("step", "") or ""
                    if step.isdigit() and int(step) <= from_step and None not in row:  # a torn line is no row
                        self.rows[int(step)] = {k: v for k, v in row.items() if v}
            for row in self.rows.values():
                self.columns += [k for k in row if k not in self.columns]
            self._rewrite()
        self._last = max(self.rows, default=-1)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        new = {k: repr(float(v)) for k, v in metrics.items() if k != "epoch"}
        row = self.rows.setdefault(step, {})
        row.update(new)
        unknown = [k for k in new if k not in self.columns]
        if unknown or step < self._last or not self.path.exists():
            self.columns += unknown
            self._last = max(self._last, step)
            self._rewrite()
            return
        with self.path.open("r+b") as file:
            if step > self._last:
                self._last, self._last_start = step, file.seek(0, os.SEEK_END)
            file.seek(self._last_start)
            file.write(self._line(step).encode())
            file.truncate()

    def _line(self, step: int) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow([step, *(self.rows[step].get(k, "") for k in self.columns[1:])])
        return text.getvalue()

    def _rewrite(self) -> None:
        lines = [",".join(self.columns) + "\n", *(self._line(step) for step in sorted(self.rows))]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(lines))
        self._last_start = sum(len(line.encode()) for line in lines[:-1])


class TrainMetrics(Callback):
    """Logs to every logger, every so many steps, and not through Lightning, whose `self.log` costs 0.3 ms a step.

    Attributes:
        images_seen: by all devices since the run began.
        images_per_second: of all devices, in the steps since the last log, validation and sampling left out.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.images_seen = 0
        self.images_per_second = 0.0
        self.loss: Tensor | None = None  # mean since the last log
        self.last_loss = float("nan")  # the last that was logged
        self._steps = 0
        self._images = 0
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
        self.loss = loss if self.loss is None else self.loss + loss
        self._steps += 1
        self._images += len(batch.x0) * trainer.world_size
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self.every_n_steps and self._step < trainer.max_steps:
            return
        self._log(trainer, pl_module)

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
        assert self.loss is not None
        self.pause_all(trainer)
        self.images_seen += self._images
        self._total_images += self._images
        self._total_seconds += self._seconds
        self.images_per_second = self._images / max(self._seconds, 1e-9)
        loss = float(self.loss) / self._steps
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} in the {self._steps} batches before step {trainer.global_step}: training has "
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
        self.loss, self._steps, self._images, self._seconds = None, 0, 0, 0.0
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pause_all(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "images_seen": self.images_seen + self._images,
            "total_images": self._total_images,
            "total_seconds": self._total_seconds,
            "wall_seconds": self.wall_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.images_seen = state_dict["images_seen"]
        self._total_images = state_dict["total_images"]
        self._total_seconds = state_dict["total_seconds"]
        self._wall_before = state_dict["wall_seconds"]
