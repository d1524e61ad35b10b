"""What a job has of the machine: a callback that writes it into the job's folder."""

import json
import os
from pathlib import Path

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
