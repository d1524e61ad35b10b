"""When training stops: at its last step, and at the end of the step in which it is asked to."""

import signal
import threading
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Stopped(Exception):  # noqa: N818 (it is no error)
    """Training was asked to stop, and its last checkpoint is saved.

    Attributes:
        step: optimiser steps taken.
        signum: the signal that asked.
    """

    def __init__(self, step: int, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.step = step
        self.signum = signum


class Stop(Callback):
    """Lets Lightning validate the last weights, and turns SIGINT and SIGTERM into a stop at the step's end.

    A second SIGINT interrupts at once. The handlers are those of the main thread, and only while it trains.

    Attributes:
        signum: the signal that asked for a stop; None while none has.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self.signum = signum

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True
