"""The training loop of diffusers' examples/unconditional_image_generation/train_unconditional.py, as a generator."""

from collections.abc import Callable, Generator
from typing import TextIO

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm


def diffusers_example(
    model: nn.Module,
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    max_steps: int,
    warmup_steps: int = 500,
    cpu: bool = False,
    mixed_precision: str = "no",
    bar_file: TextIO | None = None,
) -> Generator[EMAModel, None, None]:
    """Trains without end, and yields the average of the weights after each optimiser step.

    As in the example: cosine learning rate after a warm-up, gradients clipped to norm 1, an EMA of power 3/4 and at
    most 0.9999, a tqdm bar with loss and rate, and accelerator.log (here with no tracker behind it) each step.

    Args:
        model: what is trained, in place.
        loss_of: the loss of (model, batch).
        loader: yields lists of one tensor, (B, C, H, W) in [-1, 1].
        max_steps: length of the learning rate's cosine, and of the bar.
        bar_file: where the bar is drawn; None for stderr.
    """
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed_precision)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=warmup_steps, num_training_steps=max_steps)
    model, optimizer, loader, lr_scheduler = accelerator.prepare(model, optimizer, loader, lr_scheduler)
    ema.to(accelerator.device)
    model.train()
    step = 0
    with tqdm(total=max_steps, desc="diffusers", unit="step", dynamic_ncols=True, file=bar_file) as bar:
        while True:
            for (images,) in loader:
                with accelerator.accumulate(model):
                    loss = loss_of(model, images)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    lr_scheduler.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    ema.step(model.parameters())
                    bar.update(1)
                    step += 1
                logs = {"loss": loss.detach().item(), "lr": lr_scheduler.get_last_lr()[0], "step": step}
                logs["ema_decay"] = ema.cur_decay_value
                bar.set_postfix(**logs)
                accelerator.log(logs, step=step)
                yield ema
