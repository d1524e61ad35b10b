"""Exponential moving averages of the weights: shadow = decay shadow + (1 - decay) weights after each optimiser step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from src.errors import UserError
from src.files import tolerated
from src.launch import rank
from src.training.averages import Average, Constant, HalfLife, Power
from src.training.masters import MasterWeights, full_precision
from src.training.sharding import Shards, local, shard, whole
from src.training.snapshots import FOLDER, POSTHOC, write_snapshot
from src.training.units import Images, Steps

PRIMARY = "ema"
RESERVED = (PRIMARY, "raw")  # what weights= calls the primary average and the weights themselves


class EMA(Callback):
    """Averages the inner network's weights in float32, whatever precision trains; buffers are copied.

    One average is the primary: validation and the sample grids use it, and checkpoints have it under "ema". Others go
    along by name, and checkpoints have them under "averages". All have the names of the network's state_dict; raw
    weights are never replaced by them on disk. Every rank averages the same weights, or its own part of each where they
    are sharded, so nothing is communicated until they are saved.

    Args:
        decay, warmup: of the primary average, see `Constant`.
        half_life, ramp: of the primary average, see `HalfLife`; where half_life is given, it takes the place of decay.
        also: further averages by name; None for one that is left out.
        snapshot_every_n_steps: optimiser steps between two snapshots of the `Power` averages, with one more at the end
            (see `src.training.snapshots`); None for none.
        run_dir: the run's folder, for the snapshots.

    Raises:
        ValueError: when a number is out of range, a name is taken, or there is nothing to take snapshots of.
    """

    def __init__(
        self,
        decay: float = 0.9999,
        warmup: bool = True,
        half_life: int | Images | None = None,
        ramp: float | None = 0.05,
        also: Mapping[str, Average] | None = None,
        snapshot_every_n_steps: Steps | None = None,
        run_dir: Path | None = None,
    ) -> None:
        primary = Constant(decay, warmup) if half_life is None else HalfLife(half_life, ramp)
        also = {name: average for name, average in (also or {}).items() if average is not None}
        for name, average in also.items():
            if name in RESERVED:
                raise ValueError(f"also.{name}: the name is taken, weights={name} means something else; choose another")
            if not isinstance(average, Average):
                raise ValueError(
                    f"also.{name} is no average; give it _target_=src.training.ema.Power, HalfLife or Constant"
                )
        self.averages: dict[str, Average] = {PRIMARY: primary, **also}
        self.lengths = {name: average.length for name, average in also.items() if isinstance(average, Power)}
        if snapshot_every_n_steps is not None and snapshot_every_n_steps < 1:
            raise ValueError(f"snapshot_every_n_steps={snapshot_every_n_steps} must be at least 1, or null for none")
        if snapshot_every_n_steps is not None and (not self.lengths or run_dir is None):
            raise ValueError(
                f"snapshot_every_n_steps={snapshot_every_n_steps} takes snapshots of Power averages, and there are "
                "none; add averages=edm2"
            )
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self.run_dir = run_dir
        self._net: nn.Module | None = None
        self._weights: list[Tensor] = []  # what is averaged,
        self._own: list[Tensor] = []  # and what the network computes with: the same, or rounded
        self._shadows: dict[str, list[Tensor]] = {}
        self._loaded: dict[str, dict[str, Tensor]] = {}
        self._step = 0
        self._snapshot_step = -1

    def attach(self, net: nn.Module, masters: MasterWeights | Shards | None = None) -> None:
        """Starts each average from the one that a checkpoint brought, or else from the network's present weights."""
        self._net = net
        named = dict(full_precision(net, masters))
        self._weights = [p.detach() for p in named.values()]
        self._own = [local(p.detach()) for p in net.parameters()]
        for name in self.averages:
            source: Mapping[str, Tensor] = named
            if name in self._loaded:
                source = {key: shard(self._loaded[name][key], p) for key, p in net.named_parameters()}
            self._shadows[name] = [
                source[key].detach().to(p.device, torch.float32, copy=True) for key, p in named.items()
            ]
        self._loaded = {}

    @torch.no_grad()
    def update(self, step: int, images_per_step: int = 1) -> None:
        """Moves the averages after optimiser step `step`, counted from 1."""
        weights = self._weights
        if weights[0].dtype != torch.float32:
            weights = [w.float() for w in weights]
        for name, average in self.averages.items():
            torch._foreach_lerp_(self._shadows[name], weights, 1 - average.decay_at(step, images_per_step))

    @contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """The network computes with the primary average inside, with its own weights again after, whatever happens."""
        own = [w.clone() for w in self._own]
        torch._foreach_copy_(self._own, self._shadows[PRIMARY])
        try:
            yield
        finally:
            torch._foreach_copy_(self._own, own)

    def state_dict_of_net(self, name: str = PRIMARY) -> dict[str, Tensor]:
        """An average under the names of the network's state_dict, buffers as they are; see `whole` of a sharded one."""
        assert self._net is not None
        named = zip(self._net.named_parameters(), self._shadows[name], strict=True)
        averaged = {key: whole(shadow, p) for (key, p), shadow in named}
        return {key: averaged.get(key, value) for key, value in self._net.state_dict().items()}

    # What Lightning calls.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.attach(pl_module.net, pl_module.masters)  # type: ignore[arg-type]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step  # that of a continued run is known only now

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > self._step:  # not while gradients accumulate
            self._step = trainer.global_step
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            self.update(self._step, data.batch_size * trainer.accumulate_grad_batches)
            if self.snapshot_every_n_steps is not None and self._step % self.snapshot_every_n_steps == 0:
                self._snapshot()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.snapshot_every_n_steps is not None and self._step != self._snapshot_step:
            self._snapshot()

    def _snapshot(self) -> None:
        assert self.run_dir is not None
        self._snapshot_step = self._step
        weights = {name: self.state_dict_of_net(name) for name in self.lengths}
        if rank() == 0:
            with tolerated(self.run_dir / FOLDER):
                write_snapshot(self.run_dir, self._step, self.lengths, weights)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        primary, *others = self.averages
        checkpoint[PRIMARY] = self.state_dict_of_net(primary)
        checkpoint["averages"] = {name: self.state_dict_of_net(name) for name in others}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if POSTHOC in checkpoint:
            raise UserError(
                f"run={trainer.ckpt_path} holds an average that src.ema rebuilt, which training cannot go on from; "
                "continue with run=<folder>"
            )
        self._loaded = {PRIMARY: checkpoint[PRIMARY], **checkpoint.get("averages", {})}
        lacking = [name for name in self.averages if name not in self._loaded]
        if lacking and trainer.is_global_zero:
            names, step = ", ".join(lacking), checkpoint["global_step"]
            print(f"note: the checkpoint has no average {names}: started from the raw weights of step {step}")
