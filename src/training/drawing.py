"""Samples of a network in training."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from src.diffusion.samplers import Sampler, generate
from src.pictures import to_uint8
from src.processes import Group
from src.runs import cycled_labels
from src.threads import Tick, cut, in_threads, share_out, untold
from src.training.compiling import not_compiled
from src.training.metrics import TrainMetrics
from src.training.sharding import Sharded


def draw_samples(
    trainer: Trainer,
    module: LightningModule,
    sampler: Sampler,
    shape: tuple[int, int, int],
    num_samples: int,
    batch_size: int,
) -> list[Tensor]:
    """Samples of the averaged weights from fixed noise: batches of uint8 images, (B, C, H, W) on the CPU.

    A share of them comes from each rank; in ranks above 0 there are none. Of a sharded network all ranks draw all: it
    computes only when each asks it for as much. No random number of training is touched, and its clock stands still.
    """
    diffusion: Any = module.diffusion
    net: Any = module.net
    ema: Any = module.ema
    device = module.device

    def sample(indices: range, tick: Tick) -> Tensor:
        denoise = diffusion.denoiser(net, cycled_labels(net, indices, device))
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            x = torch.empty(0)
            for step in generate(denoise, sampler, diffusion.schedule, shape, 0, indices, device):
                x = step.x
                tick(len(indices))
        return to_uint8(x).cpu()

    TrainMetrics.pause_all(trainer)
    training = module.training
    module.eval()
    with ema.swapped(), not_compiled():
        if isinstance(trainer.strategy, Sharded):
            drawn = [sample(indices, untold) for indices in cut(num_samples, batch_size)]
            images = drawn if trainer.is_global_zero else []
        else:
            group = Group(trainer.global_rank, trainer.world_size)
            own = group.share(share_out(num_samples, batch_size, shape, device, group))
            images = group.gather(in_threads(sample, own, device))
    module.train(training)
    return images
