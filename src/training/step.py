"""What LightningModules of this project share: one optimiser step, and what a checkpoint keeps of it."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn

from src.data.loader import Batch
from src.processes import mean
from src.runs import net_state
from src.training.by_level import LossByLevel
from src.training.ema import EMA
from src.training.guard import Guard
from src.training.lr import Constant
from src.training.masters import MasterWeights
from src.training.sharding import Shards


class TrainingModule(LightningModule):
    """Trains a network on a loss that a subclass knows; clips, leaves bad steps out, and keeps float32 weights.

    Args:
        net: what learns.
        loss: what learns with it and is part of the loss; None for nothing.
        optimizer: makes the optimiser from the parameters.
        lr_schedule: factor on the learning rate at (step, max_steps).
        gradient_clip_norm: largest norm of the whole gradient; None for no clipping.
        ema: the average to validate beside the raw weights.
        guard: says which steps to leave out.
        seed: all randomness of a step follows from (seed, step, row of its batch).
        masters: the weights of a network that computes in bfloat16.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: nn.Module | None,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        lr_schedule: Constant,
        gradient_clip_norm: float | None,
        ema: EMA,
        guard: Guard,
        seed: int,
        masters: MasterWeights | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.loss = loss
        self.make_optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.gradient_clip_norm = gradient_clip_norm
        self.ema = ema
        self.guard = guard
        self.masters: MasterWeights | Shards | None = masters
        self.seed = seed
        self.loss_by_level = LossByLevel()  # stays empty where there are no levels
        self.seen: list[Tensor] = []  # of each part of the step so far: its loss, losses and u, (3, B)
        self.grad_norm: Tensor | None = None

    @abstractmethod
    def losses(self, batch: Batch, part: int, step: int) -> tuple[Tensor, Tensor]:
        """The loss of each image, and where on the schedule it was asked for, (B,) both.

        Args:
            part: which of the step's accumulated batches this is.
            step: the step, counted from 0.
        """

    def mean_loss(self, losses: Tensor, u: Tensor) -> Tensor:
        """What is minimised."""
        return losses.mean()

    def learn(self, losses: Tensor, u: Tensor, bad: Tensor) -> None:
        """Called with all losses of a step, and whether it is left out."""

    @abstractmethod
    def worst(self, losses: Tensor, u: Tensor) -> str:
        """Where the largest of a batch's losses is, in words."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # of trainer=fsdp
            self.masters = Shards(self.net, self.device_mesh["data_parallel"], beside=self.loss)

    @property
    def accumulated(self) -> int:
        """Batches that make up a step."""
        return self.trainer.accumulate_grad_batches

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        part = batch_idx % self.accumulated
        losses, u = self.losses(batch, part, self.global_step)
        loss = self.mean_loss(losses, u)
        self.seen = (self.seen if part else []) + [torch.stack([loss.detach().expand_as(u), losses.detach(), u])]
        return loss

    def summed(self, sums: Tensor) -> Tensor:
        """The sum over all processes of float64 sums, on the CPU where the device knows no float64."""
        there = sums if self.device.type == "mps" else sums.to(self.device)
        return cast(Tensor, self.trainer.strategy.reduce(there, reduce_op="sum"))

    def log_validation(self, metrics: dict[str, float]) -> None:
        """Hands what validation found, the same in all processes, to callbacks and loggers."""
        self.log_dict(metrics, logger=False)
        for logger in self.loggers:  # Lightning would count this step as the one before
            logger.log_metrics(metrics, step=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if isinstance(self.masters, MasterWeights):
            checkpoint["state_dict"].update({f"net.{name}": weight for name, weight in self.masters.named()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        batches = checkpoint["global_step"] * self.accumulated  # which may be others than those of the saved run
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts.update(dict.fromkeys(counts, batches))
        if isinstance(self.masters, MasterWeights):
            self.masters.load(net_state(checkpoint["state_dict"]))
        # Whether the optimiser is fused is of this run's precision and not of the saved one's.
        implementation = self.implementation()
        for group in (group for state in checkpoint["optimizer_states"] for group in state["param_groups"]):
            group.update(implementation)

    def implementation(self) -> dict[str, bool | None]:
        """How the optimiser computes what it computes: `fused` and `foreach`, where it has them."""
        made = self.make_optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]
        return {key: made[key] for key in ("fused", "foreach") if key in made}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.masters is not None:  # before anything, such as an average, takes hold of their memory
            self.masters.to(self.device)
        weights: Iterable[Any] = self.net.parameters() if self.masters is None else self.masters.parameters
        of_loss = () if self.loss is None else self.loss.parameters()
        optimizer = self.make_optimizer(p for p in (*weights, *of_loss) if p.requires_grad)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        return optimizer

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clips by the total norm and keeps it for the log; Lightning's own refuses fused optimisers."""
        if self.masters is not None:
            self.masters.take_gradients()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if isinstance(self.masters, Shards):
            self.grad_norm = self.masters.norm()
        else:
            self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.gradient_clip_norm is not None and not self._within(self.gradient_clip_norm):
            torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip_norm, self.grad_norm)
        loss: Any = torch.stack([part[0, 0] for part in self.seen]).mean()
        bad = self.guard.inspect(mean(loss), self.grad_norm)
        self.guard.leave_out(optimizer, parameters, bad)
        _, losses, u = torch.cat(self.seen, dim=1)
        self.learn(losses, u, bad)

    def _within(self, norm: float) -> bool:
        """Whether clipping would multiply the gradient by one; nobody waits for a device to know."""
        assert self.grad_norm is not None
        return self.grad_norm.device.type == "cpu" and bool(self.grad_norm + 1e-6 <= norm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.masters is not None:
            self.masters.give_weights()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        factor = self.lr_schedule(self.global_step, self.trainer.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
