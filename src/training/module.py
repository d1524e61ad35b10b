"""The LightningModule: the network, the diffusion, and one optimiser step."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from src.data.loader import Batch
from src.diffusion.gaussian import GaussianDiffusion
from src.randomness import NoiseStream, mix, seed_device
from src.training.ema import EMA
from src.training.lr import Constant

GOLDEN_RATIO = 0.6180339887498949
QUARTERS = 4


class DiffusionModule(LightningModule):
    """Trains a network on p_losses; validates raw and averaged weights on fixed images, noise and times.

    Args:
        net: called as net(x_t, t).
        diffusion: schedule, objective, weighting and density.
        optimizer: makes the optimiser from the parameters.
        lr_schedule: factor on the learning rate at (step, max_steps).
        gradient_clip_norm: largest norm of the whole gradient; None for no clipping.
        ema: the average to validate beside the raw weights.
        label_dropout: probability that an image trains without its label, which is what classifier-free guidance needs;
            of no account for a network without labels.
        seed: all randomness of a step follows from (seed, step, rank).
        offset_noise: standard deviation of what is added to a whole channel's noise (Guttenberg 2023, "Diffusion with
            Offset Noise", who uses 0.1); 0 for none.
    """

    def __init__(
        self,
        net: nn.Module,
        diffusion: GaussianDiffusion,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        lr_schedule: Constant,
        gradient_clip_norm: float | None,
        ema: EMA,
        seed: int,
        label_dropout: float = 0.1,
        offset_noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.net = net
        self.diffusion = diffusion
        self.loss = diffusion.loss if isinstance(diffusion.loss, nn.Module) else None  # it learns with the network
        self.make_optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.gradient_clip_norm = gradient_clip_norm
        self.ema = ema
        self.seed = seed
        self.label_dropout = label_dropout
        self.offset_noise = offset_noise
        self.num_classes: int | None = getattr(net, "num_classes", None)
        self.self_conditioning: bool = getattr(net, "self_conditioning", False)
        self.grad_norm: Tensor | None = None

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """See `GaussianDiffusion.q_sample`."""
        return self.diffusion.q_sample(x0, t, noise)

    def p_losses(
        self, x0: Tensor, t: Tensor, noise: Tensor, y: Tensor | None = None, self_condition: bool = True
    ) -> Tensor:
        """See `GaussianDiffusion.p_losses`: the loss of each image, (B,)."""
        return self.diffusion.p_losses(self.net, x0, t, noise, y, self_condition)

    def drop_labels(self, y: Tensor) -> Tensor | None:
        """Each image's own label, or "none" with probability label_dropout (Algorithm 1, Ho & Salimans 2022)."""
        if self.num_classes is None:
            return None
        dropped = torch.rand(len(y), device=y.device) < self.label_dropout
        return y.masked_fill(dropped, self.num_classes)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        accumulate = self.trainer.accumulate_grad_batches
        micro_step = self.global_step * accumulate + batch_idx % accumulate
        seed_device(self.device, mix(self.seed, self.global_rank) + micro_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x0 = batch.x0
        density = self.diffusion.density
        u = self.diffusion.draw_u(len(x0), x0.device)
        t = self.diffusion.schedule.time(u)
        self_condition = self.self_conditioning and bool(torch.rand(()) < 0.5)  # a coin a batch, drawn on the CPU
        losses = self.p_losses(x0, t, self.draw_noise(x0), self.drop_labels(batch.label), self_condition)
        loss = density.correct(losses, u).mean()
        if density.learns:
            both: Any = self.all_gather(torch.stack([losses.detach().float(), u]))  # (2, B), or (processes, 2, B)
            density.learn(*both.movedim(-2, 0).flatten(1))
        return loss

    def draw_noise(self, x0: Tensor) -> Tensor:
        """Standard normal noise like x0; with offset_noise, plus that much of one number an image and channel."""
        noise = torch.randn_like(x0)
        if self.offset_noise:
            noise += self.offset_noise * torch.randn(*x0.shape[:2], 1, 1, device=x0.device)
        return noise

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(2, 1 + QUARTERS, dtype=torch.float64)  # loss of raw and EMA: in all, by quarter of t
        self._counts = torch.zeros(1 + QUARTERS, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x0 = batch.x0
        index = batch.index.tolist()
        noise = NoiseStream(0, index, tuple(x0.shape[1:]), x0.device).first
        # Image i is asked at u_i = frac(i phi): fixed, and evenly spread over t however many images there are.
        u = torch.tensor([(i + 0.5) * GOLDEN_RATIO % 1.0 for i in index], dtype=torch.float32)
        t = self.diffusion.schedule.time(u).to(x0.device)
        y = None if self.num_classes is None else batch.label
        bins = torch.nn.functional.one_hot((u * QUARTERS).long(), QUARTERS).double()
        bins = torch.cat([torch.ones(len(index), 1, dtype=torch.float64), bins], dim=1)
        self._counts += bins.sum(0)
        raw: AbstractContextManager[None] = nullcontext()
        for row, weights in enumerate((raw, self.ema.swapped())):
            with weights:
                self._sums[row] += self.p_losses(x0, t, noise, y).double().cpu() @ bins

    def on_validation_epoch_end(self) -> None:
        reduce = self.trainer.strategy.reduce
        sums = reduce(self._sums.to(self.device), reduce_op="sum")
        counts = reduce(self._counts.to(self.device), reduce_op="sum")
        raw, ema = (sums / counts).tolist()
        quarters = {f"val/loss_ema_q{i + 1}": loss for i, loss in enumerate(ema[1:]) if loss == loss}
        metrics = {"val/loss_raw": raw[0], "val/loss_ema": ema[0], **quarters}
        self.log_dict(metrics, logger=False)
        for logger in self.loggers:  # Lightning would count this step as the one before
            logger.log_metrics(metrics, step=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["density"] = self.diffusion.density.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.diffusion.density.load_state_dict(checkpoint.get("density", {}))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.make_optimizer(p for p in self.parameters() if p.requires_grad)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        return optimizer

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clips by the total norm and keeps it for the log; Lightning's own refuses fused optimisers."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.gradient_clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip_norm, self.grad_norm)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        factor = self.lr_schedule(self.global_step, self.trainer.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
