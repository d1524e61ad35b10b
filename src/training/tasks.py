"""What a run trains. Each class here is an option of conf/task; everything else of training is the same for all."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from src.build import build, refusals
from src.data.datamodule import ImageDataModule
from src.diffusion.levels import BELOW_ONE, TERMINAL_ALPHA
from src.diffusion.losses import Vlb
from src.diffusion.weightings import Constant
from src.errors import UserError
from src.overrides import as_override
from src.runs import build_diffusion
from src.training.classify import ClassifierModule
from src.training.module import DiffusionModule
from src.training.step import TrainingModule

DEFAULT = {"_target_": "src.training.tasks.Diffusion"}  # of runs that were started before there were others
OF_DIFFUSION = ("schedule", "objective", "weighting", "density", "loss", "sampler", "label_dropout", "offset_noise")


class Task(Protocol):
    """Made from the whole configuration: conf/train.yaml, composed, resolved and checked."""

    def check(self, net: nn.Module) -> None:
        """Compares the network with the task.

        Raises:
            UserError: when they do not go together.
        """
        ...

    def check_callbacks(self, net: nn.Module, callbacks: dict[str, Any]) -> None:
        """The same of the callbacks, by name."""
        ...

    def check_data(self, net: nn.Module, data: ImageDataModule) -> None:
        """The same of the images."""
        ...

    def module(self, net: nn.Module, **shared: Any) -> TrainingModule:
        """The LightningModule, given what `TrainingModule` takes."""
        ...

    def notes(self, data: ImageDataModule) -> list[str]:
        """What the user should know before it begins, a line each."""
        ...

    def report(self, metrics: dict[str, float], folder: Path, step: int) -> list[str]:
        """What came out, and what to do with it, at the end: the first line is of results, the last a command."""
        ...


class Diffusion:
    """A diffusion model."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.diffusion = build_diffusion(config)
        if not 0 <= config["label_dropout"] < 1:
            raise UserError(f"label_dropout={config['label_dropout']} must lie in [0, 1)")
        if config["offset_noise"] < 0:
            raise UserError(f"offset_noise={config['offset_noise']} must not be negative; 0 is none, 0.1 its author's")

    def check(self, net: nn.Module) -> None:
        if getattr(net, "classifies", False):
            raise UserError("model=classifier tells labels and makes no images; use experiment=features_mnist")
        with refusals("model"):
            self.diffusion.check(net)

    def check_callbacks(self, net: nn.Module, callbacks: dict[str, Any]) -> None:
        samplers = {"sampler": build(self.config["sampler"], "sampler")}
        for name in ("samples", "score"):
            if name in callbacks:
                samplers[f"callbacks.{name}"] = callbacks[name].sampler
        for path, sampler in samplers.items():
            with refusals(path):
                sampler.path(self.diffusion.schedule)
                sampler.check(net)

    def check_data(self, net: nn.Module, data: ImageDataModule) -> None:
        num_classes: Any = getattr(net, "num_classes", None)
        if num_classes is not None and num_classes < data.num_classes:
            raise UserError(
                f"model.num_classes={num_classes} is less than data.num_classes={data.num_classes}, and every label "
                "needs its place; set model.num_classes='${data.num_classes}'"
            )
        there = data.val.num_levels
        levels = getattr(self.diffusion.loss, "levels", there)
        if levels != there:
            name = type(self.diffusion.loss).__name__.lower()
            raise UserError(
                f"loss={name} counts the bits of {levels} levels, and the images "
                + (
                    f"have {there}; set loss.levels={there}"
                    if there
                    else "are floats, which have none; use loss=simple"
                )
            )
        told, takes = data.augment.label_dim, getattr(net, "augment_dim", 0)
        if told and takes != told:
            raise UserError(
                f"{type(data.augment).__name__} tells the network what it did to an image in {told} numbers, without "
                f"which augmented images would be drawn too, and the network takes {takes}; choose a U-Net with "
                f"model.augment_dim={told}, or augment=flip, dihedral or crop"
            )

    def module(self, net: nn.Module, **shared: Any) -> TrainingModule:
        own = {name: self.config[name] for name in ("label_dropout", "offset_noise")}
        return DiffusionModule(net, self.diffusion, **own, **shared)

    def notes(self, data: ImageDataModule) -> list[str]:
        notes = []
        chosen = {"experiment": None, "data": None, **self.config.get("choices", {})}
        asked = any(override.startswith(("experiment=", "trainer.max_steps=")) for override in self.config["overrides"])
        if chosen["experiment"] == "digits" and chosen["data"] != "digits" and not asked:
            notes.append(
                f"note: what is not set is as in experiment=digits, {self.config['trainer']['max_steps']:,} steps and "
                "more; choose another, such as experiment=images, which is for sets of your own"
            )
        if data.flip and data.augment.label_dim and not data.augment.mirrors:
            notes.append(
                "note: data.flip=true mirrors images without telling the network, which will draw mirror images too, "
                f"and {type(data.augment).__name__} mirrors and tells it; set data.flip=false"
            )
        bounds, weighting = isinstance(self.diffusion.loss, Vlb), type(self.diffusion.weighting).__name__
        if bounds and not isinstance(self.diffusion.weighting, Constant):
            notes.append(
                f"note: loss=vlb weighs the noise levels itself, and the weighting {weighting} changes nothing"
            )
        if self.diffusion.density.weighs and (bounds or self.diffusion.over_log_snr):
            whole = "loss Vlb" if bounds else f"weighting {weighting}"
            notes.append(
                f"note: the {whole} is the whole weight of a noise level, and the density "
                f"{type(self.diffusion.density).__name__} weighs it once more; use density=uniform, stratified or "
                "importance"
            )
        noisiest = self.diffusion.schedule.time(torch.tensor([BELOW_ONE]))
        if not bounds and not self.diffusion.weight(noisiest, *self.diffusion.schedule.level(noisiest)).any():
            notes.append(
                f"note: the weighting {weighting} gives no weight to pure noise, which sampling starts from: what the "
                "network says of it is never trained; use weighting=constant"
            )
        alpha, sigma = (float(v[-1]) for v in self.diffusion.schedule.table())
        if alpha > TERMINAL_ALPHA * sigma:
            notes.append(
                f"note: the schedule ends with alpha / sigma = {alpha / sigma:.3f} of the image left, and sampling, "
                "which starts from pure noise, starts from the wrong distribution; raise beta_end, num_timesteps or "
                "sigma_max, or set zero_terminal_snr=true"
            )
        return notes

    def report(self, metrics: dict[str, float], folder: Path, step: int) -> list[str]:
        return [
            ", ".join(f"{name} {metrics[name]:.4f}" for name in ("val/loss_raw", "val/loss_ema")),
            f"  samples     {folder / 'samples' / f'step={step}.png'}",
            f"more samples: python -m src.sample {as_override('run', folder)}",
        ]


class Classify:
    """A classifier, for features=classifier.

    Raises:
        UserError: when a setting of diffusion models was given.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        given = [override for override in config["overrides"] if _key(override) in OF_DIFFUSION]
        if given:
            raise UserError(f"{given[0]} is of diffusion models, and task=classify trains a classifier; leave it out")

    def check(self, net: nn.Module) -> None:
        if not getattr(net, "classifies", False):
            raise UserError(
                f"task=classify trains model=classifier, and model is {type(net).__name__}; use "
                "experiment=features_mnist or features_digits"
            )

    def check_callbacks(self, net: nn.Module, callbacks: dict[str, Any]) -> None:
        for name in ("samples", "score"):
            if name in callbacks:
                raise UserError(f"callbacks.{name} draws images, which a classifier does not make; set it to null")

    def check_data(self, net: nn.Module, data: ImageDataModule) -> None:
        num_classes: Any = net.num_classes
        if num_classes < data.num_classes:
            raise UserError(
                f"model.num_classes={num_classes} is less than data.num_classes={data.num_classes}; leave it out"
            )

    def module(self, net: nn.Module, **shared: Any) -> TrainingModule:
        return ClassifierModule(net, None, **shared)

    def notes(self, data: ImageDataModule) -> list[str]:
        return []

    def report(self, metrics: dict[str, float], folder: Path, step: int) -> list[str]:
        classifier = as_override("features.run", folder)
        return [
            f"{metrics['val/accuracy_ema']:.2%} of the validation images right, val/loss_ema "
            f"{metrics['val/loss_ema']:.4f}",
            f"score with it: python -m src.evaluate run=<run> features=classifier {classifier}",
        ]


def _key(override: str) -> str:
    """schedule of schedule=cosine, schedule.beta_end=0.1 and ~schedule."""
    return override.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]
