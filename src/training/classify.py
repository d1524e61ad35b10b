"""The LightningModule of a classifier, whose features score images."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from src.data.loader import Batch
from src.training.compiling import not_compiled
from src.training.step import TrainingModule


class ClassifierModule(TrainingModule):
    """Trains a network on the cross-entropy of labels; validates loss and accuracy of raw and averaged weights.

    Logs val/loss_raw, val/loss_ema, val/accuracy_raw and val/accuracy_ema; accuracies are shares from 0 to 1.
    """

    def losses(self, batch: Batch, part: int, step: int) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(self.net(batch.x0).float(), batch.label, reduction="none")
        return losses, torch.zeros_like(losses.detach())

    def worst(self, losses: Tensor, u: Tensor) -> str:
        row = int(losses.nan_to_num(nan=torch.inf).argmax())
        return f"the largest loss, {float(losses[row]):.3g}, is of image {row} of the batch"

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(2, 2, dtype=torch.float64)  # loss and right answers, of raw and averaged weights
        self._count = torch.zeros((), dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._count += len(batch.x0)
        raw: AbstractContextManager[None] = nullcontext()
        for row, weights in enumerate((raw, self.ema.swapped())):
            with weights, not_compiled():
                logits = self.net(batch.x0).float()
            losses = F.cross_entropy(logits, batch.label, reduction="none").cpu().double()
            right = (logits.argmax(1) == batch.label).cpu().double()
            self._sums[row] += torch.stack([losses.sum(), right.sum()])

    def on_validation_epoch_end(self) -> None:
        sums, count = self.summed(self._sums), self.summed(self._count)
        (raw, raw_right), (ema, ema_right) = (sums / count).tolist()
        accuracies = {"val/accuracy_raw": raw_right, "val/accuracy_ema": ema_right}
        self.log_validation({"val/loss_raw": raw, "val/loss_ema": ema, **accuracies})
