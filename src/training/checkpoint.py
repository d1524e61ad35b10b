"""Checkpoints: plain containers and tensors, written so that a reader sees the old file or the new one, never half."""

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from src.files import save
from src.runs import BEST, LAST
from src.training.stop import Stop, Stopped
from src.training.units import Steps


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary in the same folder, flushes it to the disk, and renames it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(checkpoint, path)


class Checkpoint(Callback):
    """Keeps checkpoints/last.ckpt, every so many steps and at the end, and checkpoints/best.ckpt, by val/loss_ema.

    It is the last of the callbacks: what the others do after a step is in the checkpoint of that step.

    Args:
        run_dir: the run's folder.
        config: the resolved configuration, kept in the checkpoint so that the file alone rebuilds the model.
        stop: says whether a signal has asked to stop; then last.ckpt is saved and `Stopped` raised at the step's end.
        every_n_steps: optimiser steps between two saves of last.ckpt.
        keep_every_n_steps: steps between two saves of checkpoints/step=<n>.ckpt, which stay; None for none.

    Raises:
        ValueError: when a number is less than 1.
    """

    MONITOR = "val/loss_ema"

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        stop: Stop,
        every_n_steps: Steps = 1000,
        keep_every_n_steps: Steps | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        if keep_every_n_steps is not None and keep_every_n_steps < 1:
            raise ValueError(f"keep_every_n_steps={keep_every_n_steps} must be at least 1, or null to keep none")
        self.run_dir = run_dir
        self.config = config
        self.stop = stop
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self.best = float("inf")
        self._saved_step = -1
        self._kept_step = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.stop.signum is not None and self._at_step_end(trainer):
            self._save_last(trainer)
            raise Stopped(trainer.global_step, self.stop.signum)
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1  # Lightning's own count of when to validate
        every = trainer.val_check_batch
        validation_follows = trainer.should_stop or (isinstance(every, int) and batches % every == 0)
        if not validation_follows:
            self._save_last_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = float(trainer.callback_metrics[self.MONITOR])
        if loss < self.best:
            self.best = loss
            trainer.save_checkpoint(self.run_dir / BEST)
        self._save_last_if_due(trainer)  # after the validation of its step, so that it knows the best so far

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self._save_last(trainer)

    @staticmethod
    def _at_step_end(trainer: Trainer) -> bool:
        """Whether the gradients of all batches of the step are in."""
        return (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0

    def _save_last_if_due(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._saved_step:
            self._save_last(trainer)
        if self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0 and step != self._kept_step:
            self._kept_step = step
            trainer.save_checkpoint(self.run_dir / LAST.with_name(f"step={step}.ckpt"))

    def _save_last(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.run_dir / LAST)
        self._saved_step = trainer.global_step

    # The best loss so far survives a resume; the configuration goes along for readers of the file.

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config
