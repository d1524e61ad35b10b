"""Steps that would ruin the weights are left out; when they come in a row, training goes back to where it was good."""

import math
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from src.training.diagnosis import diagnose
from src.training.units import in_a_step

WARMUP = 100  # good steps before a loss can be called exploded, and over which the usual loss is averaged
LINES = 10  # of skipped steps that are named, of one process


class Diverged(Exception):  # noqa: N818 (fit decides whether it is an error)
    """So many steps in a row were bad that the weights are not worth going on with.

    Attributes:
        step: the last of them.
        where: what was found wrong at the first.
    """

    def __init__(self, step: int, where: str) -> None:
        super().__init__(f"training has diverged by step {step}: {where}")
        self.step = step
        self.where = where


class Guard(Callback):
    """Leaves out a step whose loss or gradient is not finite, or whose loss is `explosion` times the usual one.

    The module asks `inspect` when a step's gradients are there. All processes decide alike, from the mean of their
    losses and the norm of the whole gradient. Nothing is read from the device before the optimiser runs where that can
    skip a step by itself, as torch's fused ones can.

    Args:
        explosion: a loss so many times the mean size of the last hundred is left out; null for none.
        patience: so many bad steps in a row, and training goes back to its last checkpoint, with another order.
        max_restores: so many times in a row without a new checkpoint between them; then training ends.

    Attributes:
        skipped: steps that were left out since the run began.
        restores: times that training went back.
        futile: of these, the latest ones that led no further than to where they had gone back to.

    Raises:
        ValueError: when a number is out of range.
    """

    def __init__(self, explosion: float | None = 100.0, patience: int = 10, max_restores: int = 3) -> None:
        if explosion is not None and explosion <= 1:
            raise ValueError(f"explosion={explosion} must be more than 1, or null")
        if patience < 1:
            raise ValueError(f"patience={patience} must be at least 1")
        if max_restores < 0:
            raise ValueError(f"max_restores={max_restores} must not be negative")
        self.explosion = math.inf if explosion is None else explosion
        self.patience = patience
        self.max_restores = max_restores
        self.restores = 0
        self.futile = 0
        self._state = torch.zeros(4)  # steps left out, of these in a row, good steps, the usual loss
        self._where = ""
        self._lines = 0

    @property
    def skipped(self) -> int:
        return int(self._state[0])

    def left_out(self) -> Tensor:
        """Whether the last step was, as a bool on the device."""
        return self._state[1] > 0

    def in_trouble(self) -> bool:
        """Whether the last step was left out; waits for the device."""
        return bool(self.left_out())

    def begin_anew(self) -> None:
        """Forgets what was usual, for a training that goes back to its first step; not what was left out."""
        self._state = torch.cat([self._state[:1], torch.zeros_like(self._state[1:])])

    @torch.no_grad()
    def inspect(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the step is to be left out, as a bool on the device.

        Args:
            loss: the step's, the mean over all processes.
            norm: of the whole gradient.
        """
        skipped, in_a_row, good, usual = self._state.unbind()
        exploded = (good >= WARMUP) & (loss > self.explosion * usual)  # usual is of |loss|: some losses fall below 0
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm)) | exploded
        good = good + ~bad
        moved = usual + (loss.abs() - usual) / good.clamp(1, WARMUP)
        self._state = torch.stack([skipped + bad, (in_a_row + 1) * bad, good, torch.where(bad, usual, moved)])
        return bad

    @staticmethod
    def leave_out(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], bad: Tensor) -> None:
        """Makes the optimiser's next step do nothing to its parameters and its state, if it is bad."""
        if optimizer.param_groups[0].get("fused"):  # the device itself skips
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        elif bad:
            for parameter in parameters:
                parameter.grad = None

    # What Lightning calls.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._state = self._state.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reads the count: after each step on the CPU, now and then on a device that would have to wait for it.

        Raises:
            Diverged: after `patience` bad steps in a row.
        """
        if in_a_step(trainer):
            return
        if pl_module.device.type != "cpu" and trainer.global_step % self.patience:
            return
        in_a_row = int(self._state[1])
        if in_a_row and not self._where:
            self._where = diagnose(pl_module, batch, batch_idx)
            if self._lines < LINES and trainer.is_global_zero:
                print(f"note: step {trainer.global_step} was left out: {self._where}", flush=True)
            self._lines += 1
        if not in_a_row:
            self._where = ""
        if in_a_row >= self.patience:
            raise Diverged(trainer.global_step, self._where)

    def state_dict(self) -> dict[str, Any]:
        return {"state": self._state.cpu(), "restores": self.restores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict["state"]
        self.restores = max(self.restores, state_dict["restores"])  # a restore may go back to before one
