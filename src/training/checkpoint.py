"""When checkpoints are saved, and which are kept."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from src.errors import UserError
from src.files import shown
from src.overrides import as_override
from src.processes import mean
from src.runs import BEST, FORMAT, LAST
from src.training.guard import Guard
from src.training.masters import full_precision
from src.training.score import SampleScore
from src.training.stop import Stop
from src.training.units import Steps, in_a_step
from src.training.writer import CheckpointWriter

VALIDATION = "val/loss_ema"


class Checkpoint(Callback):
    """Keeps checkpoints/last.ckpt, every so many steps and at the end, previous.ckpt, and best.ckpt, by `monitor`.

    It is the last of the callbacks: what the others do after a step is in the checkpoint of that step.

    Args:
        run_dir: the run's folder.
        config: the resolved configuration, kept in the checkpoint so that the file alone rebuilds the model.
        stop: says whether a signal has asked to stop; then last.ckpt is saved and `Stopped` raised at the step's end.
        guard: says whether the steps are good; in a row of bad ones nothing is saved but at a stop and at the end.
        writer: writes the files.
        every_n_steps: optimiser steps between two saves of last.ckpt.
        keep_every_n_steps: steps between two saves of checkpoints/step=<n>.ckpt, which stay; None for none.
        monitor: the metric whose smallest value is the best: val/loss_ema, or that of callbacks.score.
        on_failure: what follows when a file cannot be written, as on a full disk: training stops, or goes on without.

    Raises:
        ValueError: when a number is less than 1.
    """

    def __init__(
        self,
        run_dir: Path,
        config: dict[str, Any],
        stop: Stop,
        guard: Guard,
        writer: CheckpointWriter,
        every_n_steps: Steps = 1000,
        keep_every_n_steps: Steps | None = None,
        monitor: str = VALIDATION,
        on_failure: Literal["stop", "continue"] = "stop",
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        if keep_every_n_steps is not None and keep_every_n_steps < 1:
            raise ValueError(f"keep_every_n_steps={keep_every_n_steps} must be at least 1, or null to keep none")
        self.run_dir = run_dir
        self.config = config
        self.stop = stop
        self.guard = guard
        self.writer = writer
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self.monitor = monitor
        self.on_failure = on_failure
        self.best = float("inf")
        self._best_on_disk = float("inf")
        self._saved_step = -1
        self._stopping = False  # once the validation that follows is over

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if in_a_step(trainer):
            return
        if self.writer.failed():
            self._settle()
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1  # Lightning's own count of when to validate
        every = trainer.val_check_batch
        validation_follows = trainer.should_stop or (isinstance(every, int) and batches % every == 0)
        asked = self.stop.asked(trainer)
        if not validation_follows and (names := self._due(trainer.global_step) + self._best(trainer)):
            self._settle()
            self._save(trainer, names)
        if asked and not validation_follows:
            self._stop(trainer)
        if asked:
            self._save_at_the_end(trainer)
            self._stopping = True  # after the validation, which a continued run would not make up for

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what is due at the step after its validation, so that it knows the best so far."""
        self._settle()  # training waits for the save before; it may have been the best
        names = self._due(trainer.global_step) + self._best(trainer, validated=True)
        if self._stopping and LAST not in names:
            names = [LAST, *names]
        self._save(trainer, names)
        if self._stopping and trainer.global_step < trainer.max_steps:
            self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_at_the_end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # which Lightning calls after a training that ended well

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        with suppress(UserError):  # something else has gone wrong before, and is being said
            self._settle()

    def _best(self, trainer: Trainer, validated: bool = False) -> list[Path]:
        """BEST, when the metric that is monitored is new at this step, and the smallest so far."""
        scores = [c for c in trainer.callbacks if isinstance(c, SampleScore)]  # type: ignore[attr-defined]
        new = validated if self.monitor == VALIDATION else scores[0].scored_step == trainer.global_step
        value = float(trainer.callback_metrics[self.monitor]) if new else float("inf")
        if value >= self.best or self.guard.in_trouble():  # when nothing is saved
            return []
        self.best = value
        return [BEST]

    def _due(self, step: int) -> list[Path]:
        names = [LAST] if step % self.every_n_steps == 0 and step != self._saved_step else []
        if self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0:
            names.append(LAST.with_name(f"step={step}.ckpt"))
        return names

    def _stop(self, trainer: Trainer) -> None:
        self._save_at_the_end(trainer)
        trainer.strategy.barrier("stopped")  # all go on until the first has saved
        raise self.stop.stopped(trainer.global_step)

    def _save_at_the_end(self, trainer: Trainer) -> None:
        self._settle(final=trainer.global_step == self._saved_step)
        if trainer.global_step != self._saved_step:
            self._save(trainer, [LAST], last=True)
            self._settle(final=True)

    def _save(self, trainer: Trainer, names: list[Path], last: bool = False) -> None:
        """Saves under all names at once; while steps are bad what was saved before stays where it is.

        Args:
            last: nothing follows; steps that were left out have changed no weights, and those before them count.
        """
        if not names or (self.guard.in_trouble() and not (last and _finite(trainer.lightning_module))):
            return
        if LAST in names:
            self._saved_step = trainer.global_step
        first, *others = [self.run_dir / name for name in names]
        trainer.save_checkpoint(first, storage_options=others)

    def _settle(self, final: bool = False) -> None:
        """Waits for the file on its way.

        Raises:
            UserError: when it could not be written, and training shall stop or is at its end.
        """
        try:
            self.writer.wait()
            self._best_on_disk = self.best
        except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of some
            sentence = f"a checkpoint could not be written to {shown(self.run_dir)} ({error}); the one before it stands"
            if final or self.on_failure == "stop":
                way_on = as_override("run", shown(self.run_dir))
                raise UserError(f"{sentence}; make room and go on with python -m src.train {way_on}") from error
            self._saved_step, self.best = -1, self._best_on_disk
            print(f"note: {sentence}, and training goes on", flush=True)

    # The best loss so far survives a resume; the configuration goes along for readers of the file.

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "monitor": self.monitor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("monitor", self.monitor) == self.monitor:  # or else another metric's numbers
            self.best = self._best_on_disk = state_dict["best"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config
        checkpoint["format"] = FORMAT


def _finite(module: Any) -> bool:
    """Whether all weights are, in all processes."""
    weights = [weight for _, weight in full_precision(module.net, module.masters)]
    return bool(mean(torch.stack([weight.detach().isfinite().all() for weight in weights]).all().float()) == 1)
