"""A score of samples while training goes on: cheap, of few samples, and of the averaged weights."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from src.build import refusals
from src.diffusion.samplers import Sampler
from src.evaluation.extraction import extract
from src.evaluation.features import Features
from src.evaluation.reference import Reference, reference
from src.evaluation.scores import Frechet
from src.processes import WORK
from src.training.drawing import draw_samples
from src.training.units import Steps, in_a_step


class SampleScore(Callback):
    """Logs score/fd_<features>, the Frechet distance of samples to the training images, every so many steps.

    Samples are those of fixed noise, so that two values differ by what was learned in between; the number of samples
    biases all values alike. With callbacks.checkpoint.monitor=score/fd_<features>, best.ckpt is the best by it.

    Args:
        image_shape: (C, H, W).
        features: what images are compared by.
        sampler: how samples are drawn.
        every_n_steps: optimiser steps between two scores; there is one at the end, too.
        num_samples: more than the features have dimensions.
        batch_size: images sampled together.
        cache: folder of references; None for the usual one.

    Attributes:
        scored_step: when the score was computed last.
        name, value: of the score; all ranks have it.

    Raises:
        ValueError: when a number is less than 1, there are too few samples, or the features do not suit the images.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        features: Features,
        sampler: Sampler,
        every_n_steps: Steps = 5000,
        num_samples: int = 1000,
        batch_size: int = 64,
        cache: str | None = None,
    ) -> None:
        if min(every_n_steps, num_samples, batch_size) < 1:
            raise ValueError("every_n_steps, num_samples and batch_size must be at least 1")
        features.check(image_shape)
        self.frechet = Frechet()
        self.frechet.refuse(num_samples, num_samples, features, image_shape)
        self.image_shape = image_shape
        self.features = features
        self.sampler = sampler
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.cache = None if cache is None else Path(cache)
        self.name = f"score/{self.frechet.names(features.name)[0]}"
        self.scored_step = -1
        self.value = float("inf")
        self._reference: Reference | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Features of a million images take longer than the patience of the group in which gradients are shared.
        patient: Any = dist.new_group(backend="gloo", timeout=WORK) if trainer.world_size > 1 else None
        if trainer.is_global_zero:
            self.features.to(pl_module.device)
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            with refusals("callbacks.score"):
                self._reference = reference(self.features, data.train.levels.cpu(), self.cache)
        if patient is not None:
            dist.barrier(patient)
            dist.destroy_process_group(patient)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if in_a_step(trainer):
            return
        if (step % self.every_n_steps == 0 or step == trainer.max_steps) and step != self.scored_step:
            self.scored_step = step
            self.score(trainer, pl_module)

    def score(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sizes = (self.image_shape, self.num_samples, self.batch_size)
        images = draw_samples(trainer, pl_module, self.sampler, *sizes)
        if images:
            assert self._reference is not None
            with refusals("callbacks.score"):
                extracted = extract(self.features, images, self.num_samples)
                (score,) = self.frechet(extracted, self._reference).values()
            self.value = score.value
        self.value = float(trainer.strategy.broadcast(self.value))
        pl_module.log(self.name, torch.tensor(self.value), logger=False)
        for logger in trainer.loggers:
            logger.log_metrics({self.name: self.value}, step=trainer.global_step)
