"""Exponential moving average of the weights: shadow = decay shadow + (1 - decay) weights, after each optimiser step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn


class EMA(Callback):
    """Averages the inner network's weights in float32, whatever precision trains; buffers are copied.

    Every rank averages the same weights, so nothing is communicated. The average has a key of its own in checkpoints,
    "ema", with the names of the network's state_dict; raw weights are never replaced by it on disk.

    Args:
        decay: of the average, in [0, 1); Ho et al. 2020 use 0.9999.
        warmup: use min(decay, (1 + n) / (10 + n)) after n steps, so that the average forgets the initial weights.

    Raises:
        ValueError: when decay is outside [0, 1).
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must lie in [0, 1)")
        self.decay = decay
        self.warmup = warmup
        self._net: nn.Module | None = None
        self._weights: list[Tensor] = []
        self._shadow: list[Tensor] = []
        self._loaded: dict[str, Tensor] | None = None
        self._step = 0

    def decay_at(self, step: int) -> float:
        """The decay of the update that follows optimiser step `step`, counted from 1."""
        return min(self.decay, step / (9 + step)) if self.warmup else self.decay

    def attach(self, net: nn.Module) -> None:
        """Starts from the network's present weights, or from those that a checkpoint brought."""
        self._net = net
        named = dict(net.named_parameters())
        self._weights = [p.detach() for p in named.values()]
        source = named if self._loaded is None else self._loaded
        self._shadow = [source[name].detach().to(p.device, torch.float32, copy=True) for name, p in named.items()]
        self._loaded = None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average after optimiser step `step`, counted from 1."""
        weights = self._weights
        if weights[0].dtype != torch.float32:
            weights = [w.float() for w in weights]
        torch._foreach_lerp_(self._shadow, weights, 1 - self.decay_at(step))

    @contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """The network computes with the average inside, with its own weights again after, also after an exception."""
        own = [w.clone() for w in self._weights]
        torch._foreach_copy_(self._weights, self._shadow)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, own)

    def state_dict_of_net(self) -> dict[str, Tensor]:
        """The average under the names of the network's state_dict, buffers as they are."""
        assert self._net is not None
        averaged = dict(zip((name for name, _ in self._net.named_parameters()), self._shadow, strict=True))
        return {name: averaged.get(name, value) for name, value in self._net.state_dict().items()}

    # What Lightning calls.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.attach(pl_module.net)  # type: ignore[arg-type]
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > self._step:  # not while gradients accumulate
            self._step = trainer.global_step
            self.update(self._step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema"] = self.state_dict_of_net()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint["ema"]
