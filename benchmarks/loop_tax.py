"""What a training loop costs beside the network: milliseconds an optimiser step over a bare PyTorch loop.

One thread, 32-bit, the 8x8 digits, and a network so small that the loop shows. All contenders train the same network on
the same loss (p_losses) with the same fused Adam:

  bare        forward, backward, step, zero_grad on batches made beforehand: no clipping, no average, no log
  ours        src.training.fit as it is, with every default on: loader, seeding by step, clipping, EMA, learning-rate
              schedule, metrics.csv, progress bar; samples, checkpoints and validation are on, but due after the clock
              has stopped
  lightning   a plain Trainer with its default callbacks, CSVLogger, tqdm bar, self.log each step; no clipping, no EMA
  accelerate  the loop of diffusers' train_unconditional example: clipping, EMAModel, scheduler, tqdm bar, log each step

Lightning and accelerate draw from a DataLoader over float tensors, in this process, in one epoch that never ends. All
bars write to the null device. Each turn skips a few steps, then times `--steps`.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from benchmarks.ours import FOREVER, configuration
from benchmarks.peers import diffusers_example
from benchmarks.timing import arguments, interleave, spread, write_report
from src.build import build
from src.data.loader import normalize
from src.runs import build_diffusion, build_net
from src.training import fit
from src.training.stop import Stop
from src.training.trainer import quiet_lightning

SKIP = 30  # steps before the clock starts

Loss = Callable[[nn.Module, Tensor], Tensor]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps a turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    config = configuration(
        *(
            "trainer=cpu",
            "trainer.channels_last=false",
            "trainer.precision=32-true",
            f"data.batch_size={args.batch_size}",
        ),
        *("model.base_channels=8", "model.channel_mults=[1]", "model.attention_resolutions=[]"),
        "model.middle_attention=false",
        due=SKIP + args.steps + 1,
    )
    net = build_net(config)  # the one that accelerate trains
    size = {"parameters": sum(p.numel() for p in net.parameters()), "tensors": len(list(net.parameters()))}
    images = digits(config)
    diffusion = build_diffusion(config)

    def loss_of(net: nn.Module, x0: Tensor) -> Tensor:
        t = diffusion.schedule.time(diffusion.draw_u(len(x0), x0.device))
        return diffusion.p_losses(net, x0, t, torch.randn_like(x0)).mean()

    loader = DataLoader(
        TensorDataset(images), args.batch_size, sampler=RandomSampler(images, replacement=True, num_samples=FOREVER)
    )
    with Path(os.devnull).open("w") as null:
        accelerated = diffusers_example(net, loss_of, loader, adam(config, net), FOREVER, cpu=True, bar_file=null)
        contenders = {
            "bare": clock(bare(config, loss_of, images), args.steps),
            "ours": lambda: ours(config, args.steps),
            "lightning": lambda: lightning(config, loss_of, loader, args.steps),
            "accelerate": clock(accelerated, args.steps),
        }
        rounds = interleave(contenders, "bare", args.rounds)
        accelerated.close()

    over = {name: rounds.differences(name, "bare") for name in rounds.values}
    rows = [
        (name, f"{rounds.median(name):.3f}", spread(over[name]), spread(rounds.ratios(name, "bare"))) for name in over
    ]
    caption = (
        f"batch {args.batch_size}, {size['parameters']:,} parameters in {size['tensors']} tensors, 1 thread, "
        f"{args.rounds} rounds of {args.steps} steps; median (least to most of the rounds)"
    )
    tables = [(caption, ("", "ms a step", "ms over bare", "times bare"), rows)]
    write_report(args, tables, network=size, ms_a_step=rounds.values, ms_over_bare=over)


def digits(config: dict[str, Any]) -> Tensor:
    """The training images, (N, 1, 8, 8) in [-1, 1]."""
    data = build(config["data"], "data")
    data.setup()
    return normalize(data.train.images)


def adam(config: dict[str, Any], net: nn.Module) -> torch.optim.Optimizer:
    return build(config["optimizer"], "optimizer", fused=True)(net.parameters())


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


def clock(loop: Iterator[Any], steps: int) -> Callable[[], float]:
    """A turn of a loop that runs from turn to turn, in ms a step."""

    def turn() -> float:
        for _ in range(SKIP):
            next(loop)
        started = time.perf_counter()
        for _ in range(steps):
            next(loop)
        return (time.perf_counter() - started) * 1000 / steps

    return turn


class Clock(Stop):
    """Times the steps after the first `SKIP` of a Lightning fit, which stops at its last step after that."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.ms_a_step = float("nan")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == SKIP:
            self.started = time.perf_counter()
        elif trainer.global_step == SKIP + self.steps:
            self.ms_a_step = (time.perf_counter() - self.started) * 1000 / self.steps
        super().on_train_batch_end(trainer, *args)


def bare(config: dict[str, Any], loss_of: Loss, images: Tensor) -> Iterator[None]:
    net = build_net(config)
    optimizer = adam(config, net)
    batches = list(images.split(config["data"]["batch_size"]))[:-1]
    while True:
        for x0 in batches:
            loss_of(net, x0).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield


def ours(config: dict[str, Any], steps: int) -> float:
    """A whole run, with a clock where the callback stands that stops it."""
    timer = Clock(steps)
    with (
        tempfile.TemporaryDirectory() as folder,
        silence(),
        mock.patch.object(fit, "Stop", return_value=timer),
    ):
        fit.fit(config, Path(folder))
    return timer.ms_a_step


class Plain(LightningModule):
    def __init__(self, config: dict[str, Any], loss_of: Loss) -> None:
        super().__init__()
        self.net = build_net(config)
        self.optimizer_of = lambda: adam(config, self.net)
        self.loss_of = loss_of

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss_of(self.net, batch[0])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer_of()


def lightning(config: dict[str, Any], loss_of: Loss, loader: DataLoader, steps: int) -> float:
    timer = Clock(steps)
    with tempfile.TemporaryDirectory() as folder, silence():
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=SKIP + steps + 1,
            logger=CSVLogger(folder),
            callbacks=[TQDMProgressBar(), timer],
            default_root_dir=folder,
        )
        trainer.fit(Plain(config, loss_of), loader)
    return timer.ms_a_step


if __name__ == "__main__":
    main()
