"""The grid of samples from fixed noise, so that the pictures of a run can be flicked through."""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from src.diffusion.samplers import Sampler
from src.files import tolerated
from src.pictures import enlarge, grid, save_png
from src.training.drawing import draw_samples
from src.training.loggers import log_image
from src.training.units import Steps, in_a_step


class SampleGrid(Callback):
    """Writes samples/step=<n>.png from the averaged weights, every so many steps and at the end.

    Args:
        run_dir: the run's folder.
        image_shape: (C, H, W).
        every_n_steps: optimiser steps between two grids.
        num_samples: images in a grid.
        batch_size: images sampled together.
        sampler: how; fewer steps than the final samples deserve are enough to watch.

    Raises:
        ValueError: when a number is less than 1.
    """

    def __init__(
        self,
        run_dir: Path,
        image_shape: tuple[int, int, int],
        sampler: Sampler,
        every_n_steps: Steps = 1000,
        num_samples: int = 64,
        batch_size: int = 64,
    ) -> None:
        if min(every_n_steps, num_samples, batch_size) < 1:
            raise ValueError("every_n_steps, num_samples and batch_size must be at least 1")
        self.run_dir = run_dir
        self.image_shape = image_shape
        self.sampler = sampler
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.batch_size = batch_size
        self._drawn_step = -1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if in_a_step(trainer):
            return
        if (step % self.every_n_steps == 0 or step == trainer.max_steps) and step != self._drawn_step:
            self._drawn_step = step
            self.draw(trainer, pl_module)

    def draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        images = draw_samples(trainer, pl_module, self.sampler, self.image_shape, self.num_samples, self.batch_size)
        if not images:
            return
        picture = grid(torch.cat(images))
        folder = self.run_dir / "samples"
        with tolerated(folder):
            folder.mkdir(exist_ok=True)
            save_png(picture, folder / f"step={trainer.global_step}.png", enlarge(self.image_shape[1]))
        for logger in trainer.loggers:
            log_image(logger, "samples", picture, trainer.global_step)
