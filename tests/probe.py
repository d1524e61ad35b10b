"""What a job has of the machine: a callback that writes it into the job's folder."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Probe(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seen = {
            "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "threads": torch.get_num_threads(),
            "world_size": trainer.world_size,
            "rank": trainer.global_rank,
        }
        Path(trainer.default_root_dir, f"probe-{trainer.global_rank}.json").write_text(json.dumps(seen))


class TimeIsUp(Callback):
    """Sends its own process the signal that a scheduler sends before it takes the machine away: once in a run's life.

    Args:
        step: after which the signal comes.
        seed: of the run that gets it.
        number: of the signal.
    """

    def __init__(self, step: int, number: int, seed: int = 0) -> None:
        self.step = step
        self.number = number
        self.seed = seed

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        sent = Path(trainer.default_root_dir, "time-is-up")
        now = trainer.is_global_zero and trainer.global_step == self.step and pl_module.seed == self.seed
        if now and not sent.exists():
            sent.touch()
            os.kill(os.getpid(), self.number)
