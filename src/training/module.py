"""The LightningModule of a diffusion model: noise, times and labels of a step, and its losses."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from src.data.loader import Batch
from src.diffusion.gaussian import GaussianDiffusion
from src.models.dropout import Dropout, give_keys
from src.randomness import GOLDEN, NoiseStream, RowNoise, mix, scramble, seed_device
from src.training.compiling import not_compiled
from src.training.ema import EMA
from src.training.guard import Guard
from src.training.lr import Constant
from src.training.masters import MasterWeights
from src.training.step import TrainingModule

GOLDEN_RATIO = 0.6180339887498949
QUARTERS = 4


class DiffusionModule(TrainingModule):
    """Trains a network on p_losses; validates raw and averaged weights on fixed images, noise and times.

    Args:
        net: called as net(x_t, t).
        diffusion: schedule, objective, weighting and density.
        label_dropout: probability that an image trains without its label, which is what classifier-free guidance needs;
            of no account for a network without labels.
        offset_noise: standard deviation of what is added to a whole channel's noise (Guttenberg 2023, "Diffusion with
            Offset Noise", who uses 0.1); 0 for none.
        optimizer, lr_schedule, gradient_clip_norm, ema, guard, seed, masters: see `TrainingModule`.
    """

    def __init__(
        self,
        net: nn.Module,
        diffusion: GaussianDiffusion,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        lr_schedule: Constant,
        gradient_clip_norm: float | None,
        ema: EMA,
        guard: Guard,
        seed: int,
        label_dropout: float = 0.1,
        offset_noise: float = 0.0,
        masters: MasterWeights | None = None,
    ) -> None:
        loss = diffusion.loss if isinstance(diffusion.loss, nn.Module) else None  # it learns with the network
        super().__init__(net, loss, optimizer, lr_schedule, gradient_clip_norm, ema, guard, seed, masters)
        self.diffusion = diffusion
        self.label_dropout = label_dropout
        self.offset_noise = offset_noise
        self.num_classes: int | None = getattr(net, "num_classes", None)
        self.self_conditioning: bool = getattr(net, "self_conditioning", False)
        self.augment_dim: int = getattr(net, "augment_dim", 0)
        self.dropouts = [layer for layer in net.modules() if isinstance(layer, Dropout)]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.noise = RowNoise(mix(self.seed, 3), self.device)
        self.channel_noise = RowNoise(mix(self.seed, 4), self.device)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """See `GaussianDiffusion.q_sample`."""
        return self.diffusion.q_sample(x0, t, noise)

    def p_losses(
        self,
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        y: Tensor | None = None,
        self_condition: bool = True,
        augment: Tensor | None = None,
    ) -> Tensor:
        """See `GaussianDiffusion.p_losses`: the loss of each image, (B,)."""
        return self.diffusion.p_losses(self.net, x0, t, noise, y, self_condition, augment)

    def drop_labels(self, y: Tensor, u: Tensor) -> Tensor | None:
        """Each image's own label, or "none" where u < label_dropout (Algorithm 1, Ho & Salimans 2022).

        Args:
            y: (B,) int64.
            u: (B,) uniform in [0, 1).
        """
        if self.num_classes is None:
            return None
        return y.masked_fill(u < self.label_dropout, self.num_classes)

    def mean_loss(self, losses: Tensor, u: Tensor) -> Tensor:
        return self.diffusion.density.correct(losses, u).mean()

    def learn(self, losses: Tensor, u: Tensor, bad: Tensor) -> None:
        self.loss_by_level.add(u, losses, bad)
        if self.diffusion.density.learns and not bad:
            seen: Any = self.all_gather(torch.stack(self.seen))  # (parts, 3, B), or (processes, parts, 3, B)
            process = -1 if self.interleaved and seen.ndim == 4 else -2
            in_rows = seen.movedim(-2, 0).movedim(1, process).flatten(1)  # (3, rows of the step), in their order
            self.diffusion.density.learn(*in_rows[1:])

    def worst(self, losses: Tensor, u: Tensor) -> str:
        row = int(losses.nan_to_num(nan=torch.inf).argmax())
        t = self.diffusion.schedule.time(u[row : row + 1])
        alpha, sigma = (float(v) for v in self.diffusion.schedule.level(t))
        at = f"noise level t={float(t):g} (alpha {alpha:.3g}, sigma {sigma:.3g})"
        return f"the largest loss, {float(losses[row]):.3g}, is at {at}"

    @property
    def interleaved(self) -> bool:
        """Whether process r has the rows r, r + world_size, ... of a batch, as of a stream, and not a stretch of it."""
        return getattr(getattr(self.trainer, "datamodule", None), "interleaved", False)

    def losses(self, batch: Batch, part: int, step: int) -> tuple[Tensor, Tensor]:
        """The loss of each image, and the u that it was asked at, (B,) both.

        What is random is a function of (seed, step, row of the step's batch), whatever processes and parts share it.

        Args:
            part: which of the step's accumulated batches this is.
            step: the step, counted from 0.
        """
        x0 = batch.x0
        parts = self.trainer.world_size * self.accumulated
        total = len(x0) * parts
        size, rank = self.trainer.world_size, self.global_rank
        whole = range(part * size * len(x0), (part + 1) * size * len(x0))
        rows = whole[rank::size] if self.interleaved else whole[rank * len(x0) :][: len(x0)]
        own = slice(rows.start, rows.stop, rows.step)
        seed_device(x0.device, mix(self.seed, 1) + step)
        u = self.diffusion.draw_u(total, x0.device)[own]
        label_u = torch.rand(total, device=x0.device)[own]
        self_condition = self.self_conditioning and bool(torch.rand(()) < 0.5)  # a coin a step, drawn on the CPU
        seed_device(x0.device, mix(self.seed, 5, self.global_rank) + step * parts + part)  # for what networks draw
        numbers = torch.arange(rows.start, rows.stop, rows.step, device=x0.device, dtype=torch.int32)
        give_keys(self.dropouts, scramble(numbers * GOLDEN ^ (mix(self.seed, 2, step) - 2**31)))
        t = self.diffusion.schedule.time(u)
        noise = self.draw_noise(step, rows, total, x0)
        y = self.drop_labels(batch.label, label_u)
        return self.p_losses(x0, t, noise, y, self_condition, self._augment(batch)), u

    def _augment(self, batch: Batch) -> Tensor | None:
        """What augmentation did, for a network that is told; zeros, for its gradient's sake, where there is none."""
        if not self.augment_dim:
            return None
        return batch.augment if batch.augment.shape[1] else batch.x0.new_zeros(len(batch.x0), self.augment_dim)

    def draw_noise(self, step: int, rows: range, total: int, like: Tensor) -> Tensor:
        """Standard normal noise of those rows of a step's batch; with offset_noise, plus that much of one number an
        image and channel."""
        noise = self.noise(step, rows, total, like.shape[1:])
        if self.offset_noise:
            noise += self.offset_noise * self.channel_noise(step, rows, total, (like.shape[1], 1, 1))
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
            with weights, not_compiled():
                self._sums[row] += self.p_losses(x0, t, noise, y).cpu().double() @ bins

    def on_validation_epoch_end(self) -> None:
        sums, counts = self.summed(self._sums), self.summed(self._counts)
        raw, ema = (sums / counts).tolist()
        quarters = {f"val/loss_ema_q{i + 1}": loss for i, loss in enumerate(ema[1:]) if loss == loss}
        metrics = {"val/loss_raw": raw[0], "val/loss_ema": ema[0], **quarters}
        self.log_validation(metrics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["density"] = self.diffusion.density.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.diffusion.density.load_state_dict(checkpoint.get("density", {}))
