"""The progress bar: loss, images a second and time left, without a host synchronisation a step."""

import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from src.data.loader import Batch


class Progress(ProgressBar):
    """Redraws twice a second on a terminal, every ten seconds in a log; the loss is read from the device only then."""

    def __init__(self) -> None:
        super().__init__()
        self.refresh = 0.5 if sys.stderr.isatty() else 10.0
        self._bar: tqdm | None = None
        self._drawn = 0.0
        self._images = 0

    def disable(self) -> None:
        self.refresh = float("inf")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.refresh == float("inf") or not trainer.is_global_zero:
            return
        self._bar = tqdm(
            total=trainer.max_steps,
            initial=trainer.global_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            mininterval=float("inf"),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]",
        )
        self._drawn = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if self._bar is None:
            return
        self._images += len(batch.x0) * trainer.world_size
        now = time.monotonic()
        if now - self._drawn < self.refresh and trainer.global_step < trainer.max_steps:
            return
        rate = self._images / (now - self._drawn) if self._drawn else 0.0
        self._drawn, self._images = now, 0
        self._bar.n = trainer.global_step
        speed = f", {rate:,.0f} images/s" if rate else ""
        self._bar.set_postfix_str(f"loss {float(outputs['loss']):.4f}{speed}", refresh=False)
        self._bar.refresh()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # which Lightning calls after a training that ended well

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
