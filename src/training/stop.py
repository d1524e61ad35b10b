"""When training stops: at its last step, and at the end of the step in which it is asked to."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):  # noqa: N818 (it is no error)
    """Training was asked to stop, and its last checkpoint is saved.

    Attributes:
        step: optimiser steps taken.
        signum: the signal that asked.
        requeue: what a scheduler's plugin had set up to be called at the signal, such as submitit's requeueing.
    """

    def __init__(self, step: int, signum: int, requeue: Callable[[int, Any], Any] | None) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.step = step
        self.signum = signum
        self.requeue = requeue


class Stop(Callback):
    """Lets Lightning validate the last weights, and turns a signal into a stop at the step's end.

    SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGUSR2 (of schedulers, before time is up) ask to stop; a second SIGINT ends
    the process at once, which loses the steps since the last checkpoint and nothing else. The handlers are those of the
    main thread, and only while it trains.

    Several processes stop at the same step, whichever of them got a signal: each step's end hands what is known to the
    others by a reduction in the background, which is read at the next step's end, so that nobody waits.

    Attributes:
        signum: the signal that asked for a stop; None while none has.
    """

    _listening: "ClassVar[Stop | None]" = None  # whose handlers are set

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}
        self._group: Any = None
        self._told: Any = None  # the reduction on its way
        self._number = torch.zeros(1, dtype=torch.int32)

    def asked(self, trainer: Trainer) -> bool:
        """Whether to stop at the end of this step; every process asks once a step."""
        if self._group is None:
            return self.signum is not None
        if self._told is not None:
            self._told.wait()
            if self._number.item():
                self._told = None
                self.signum = int(self._number)
                return True
        self._number.fill_(self.signum or 0)
        self._told = dist.all_reduce(self._number, dist.ReduceOp.MAX, self._group, async_op=True)
        return False

    def stopped(self, step: int) -> Stopped:
        """What to raise when the last checkpoint of a stop is saved."""
        assert self.signum is not None
        before = self._before.get(self.signum)
        scheduler = self.signum in (signal.SIGUSR1, signal.SIGUSR2)
        return Stopped(step, self.signum, before if scheduler and callable(before) else None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))  # a slow process is not a dead one
        if threading.current_thread() is threading.main_thread():
            Stop.give_back()
            Stop._listening = self
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}

    @classmethod
    def give_back(cls) -> None:
        """Gives the signals back to whom they were before: a training that ends by an exception does not, lest a second
        signal end the process while it still says and writes why it stops."""
        if cls._listening is not None:
            for number, handler in cls._listening._before.items():
                signal.signal(number, handler)
            cls._listening._before = {}
            cls._listening = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if Stop._listening is self:
            Stop.give_back()
        self._group = self._told = None

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == signal.SIGINT == signum:
            print("\nstopped at once; what was saved last stands", file=sys.stderr, flush=True)
            os._exit(128 + signum)
        self.signum = signum

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._told is not None:
            self._told.wait()
