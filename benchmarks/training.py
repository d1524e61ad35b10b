"""Training throughput: the same network, batch and number of threads in this project's loop and in those of others.

  ours        src.training.fit with every default on (trainer=auto): loader, seeding by step, clipping, EMA, guard,
              learning-rate schedule, metrics.csv, progress bar
  diffusers   the loop of its train_unconditional example, with accelerate: clipping, EMAModel, scheduler, AdamW
  lucidrains  the Trainer of denoising-diffusion-pytorch: clipping, ema-pytorch, Adam, its own DataLoader
  bare        a plain loop with fused AdamW: no clipping, no average, no log

All train diffusers' or our network of the same parameters and operations, on random images. Each lives in a process of
its own. What a contender's name does not say is its default: float32 for all but ours. On a GPU where there is one.
"""

import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.networks import LARGE, SIZES, SMALL, Called, facts_of, peers_network
from benchmarks.peaks import peaks
from benchmarks.timing import arguments, spread, write_report
from benchmarks.turns import DEVICE, ON_GPU, Contender, Turns, race

HELD_OUT = 32
IMAGES = (16384 if ON_GPU else 480) + HELD_OUT
FILES_OF_BATCHES = 256  # for lucidrains' loader, or it begins an epoch, with new workers, in every turn
FOREVER = 10**9
GIB = 2**30


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=(LARGE, SMALL), default=(LARGE,) if ON_GPU else (LARGE, SMALL))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=(128, 512) if ON_GPU else (16,))
    parser.add_argument("--steps", type=int, help="a turn; on a CPU 1 of the large network and 8 of the small one")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the contenders")
    args = parser.parse_args()
    tables, results = [], {}
    for size, batch in itertools.product(args.sizes, args.batch_sizes):
        contenders = {k: v for k, v in contenders_of(size, batch).items() if not args.only or k in args.only}
        before = peaks(DEVICE)
        steps = args.steps or (20 if ON_GPU else 1 if size == LARGE else 8)
        result = race(contenders, "ours", args.rounds, warmup=3, steps=steps)
        best = {name: max(rate, before[name]) for name, rate in peaks(DEVICE).items()}
        tables.append((caption(size, batch, result.facts["ours"], args.rounds), *table(result, batch, best)))
        tables.append(("this machine's peaks in the same run", *of_peaks(best)))
        results[f"{size}, batch {batch}"] = {
            "seconds_a_step": result.rounds.values,
            "facts": result.facts,
            "peak_bytes": result.peak_bytes,
            "peaks": best,
        }
    write_report(args, tables, DEVICE, results=results)


def contenders_of(size: str, batch: int) -> dict[str, Contender]:
    def of(function: str, **options: Any) -> Contender:
        return Contender(f"benchmarks.training:{function}", {"size": size, "batch": batch, **options})

    compiled = {
        "ours, compiled": of("ours", overrides=["trainer.compile=true"]),
        "diffusers, bf16, compiled": of("diffusers", precision="bf16", compiled=True),
        "bare, bf16, compiled": of("bare", bf16=True, compiled=True),
    }
    if ON_GPU:
        return {
            "ours": of("ours", overrides=[]),
            "ours, not compiled": of("ours", overrides=["trainer.compile=false"]),
            "diffusers": of("diffusers"),
            "diffusers, bf16": of("diffusers", precision="bf16"),
            "diffusers, bf16, channels_last": of("diffusers", precision="bf16", channels_last=True),
            "diffusers, bf16, compiled": compiled["diffusers, bf16, compiled"],
            "diffusers, bf16, channels_last, compiled": of(
                "diffusers", precision="bf16", channels_last=True, compiled=True
            ),
            "lucidrains": of("lucidrains"),
            "lucidrains, bf16": of("lucidrains", bf16=True),
            "bare, bf16, compiled": compiled["bare, bf16, compiled"],
        }
    return {
        "ours": of("ours", overrides=[]),
        "ours, 32-true": of("ours", overrides=["trainer.precision=32-true"]),
        "diffusers": of("diffusers"),
        "diffusers, bf16": of("diffusers", precision="bf16"),
        "diffusers, bf16, channels_last": of("diffusers", precision="bf16", channels_last=True),
        "lucidrains": of("lucidrains"),
        "lucidrains, bf16": of("lucidrains", bf16=True),
        "bare, bf16": of("bare", bf16=True),
        **(compiled if size == SMALL else {}),
    }


def caption(size: str, batch: int, facts: Any, rounds: int) -> str:
    channels, height, width = SIZES[size]["shape"]
    return (
        f"{facts['parameters'] / 1e6:.1f}M parameters, {facts['flops'] / 1e9:.2f} GFLOPs an image of "
        f"{height}x{width}x{channels}, batch {batch}, "
        f"{'' if ON_GPU else f'{torch.get_num_threads()} threads, '}{rounds} rounds"
    )


def table(result: Any, batch: int, best: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """A step does three times the operations of a forward pass; its share is of the convolution's peak."""
    rows = []
    for name in result.rounds.values:
        images = batch / result.rounds.median(name)
        ratio = "" if name == "ours" else spread(result.rounds.ratios(name, "ours"))
        known = result.contender(name)
        warm = f"{result.facts[known]['warmup_seconds']:.0f}"
        facts = result.facts[known]
        share = 3 * facts["flops"] * images / best["convolution, bf16" if facts["bf16"] else "convolution, fp32"]
        rows.append([name, f"{images:.2f}", ratio, f"{share:.0%}", f"{result.peak_bytes[known] / GIB:.2f}", warm])
    return ["", "images/s", "ours, times as fast", "share of peak", "peak GiB", "warm-up s"], rows


def of_peaks(best: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    return ["", "GFLOP/s"], [[name, f"{rate / 1e9:.0f}"] for name, rate in best.items()]


# What runs in the contenders' processes.


def ours(turns: Turns, size: str, batch: int, overrides: list[str]) -> None:
    from benchmarks.ours import configuration
    from src.build import build
    from src.runs import build_net
    from src.training import fit
    from src.training.stop import Stop

    config = configuration(
        "experiment=cifar10",
        "trainer=auto",
        *(["trainer.devices=1"] if ON_GPU else []),
        *SIZES[size]["ours"],
        *random_images(size),
        f"data.batch_size={batch}",
        *overrides,
    )
    bf16 = build(config["trainer"], "trainer").chosen_precision.startswith("bf16")
    facts = {**facts_of(build_net(config), SIZES[size]["shape"]), "bf16": bf16}

    class Turn(Stop):
        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_batch_end(*args, **kwargs)
            turns.step(facts)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(fit, "Stop", Turn):
        fit.fit(config, Path(folder))


class RandomImages:
    """A source of uint8 noise, for ours."""

    def __init__(self, shape: list[int]) -> None:
        self.shape = shape

    def load(self, dir: Path) -> Any:
        from src.data.images import ImageSet

        images = torch.randint(0, 256, (IMAGES, *self.shape), dtype=torch.uint8)
        return ImageSet(images, torch.zeros(IMAGES, dtype=torch.int64)), None


def random_images(size: str) -> list[str]:
    """What points ours at them."""
    channels, height, _ = SIZES[size]["shape"]
    return [
        "data.source._target_=benchmarks.training.RandomImages",
        f"+data.source.shape={list(SIZES[size]['shape'])}",
        f"data.channels={channels}",
        f"data.image_size={height}",
        f"data.val_images={HELD_OUT}",
    ]


def batches(size: str, batch: int) -> DataLoader:
    """Random images in [-1, 1] for the others, of little cost."""
    images = WholeBatches(torch.rand(IMAGES, *SIZES[size]["shape"]) * 2 - 1)
    return DataLoader(images, batch, shuffle=True, drop_last=True, collate_fn=lambda found: found, pin_memory=ON_GPU)


class WholeBatches(TensorDataset):
    """Gives a batch as one tensor, and not image by image."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [values[indices] for values in self.tensors]


def prepared(net: nn.Module, channels_last: bool = False, compiled: bool = False) -> nn.Module:
    if channels_last:
        net.to(memory_format=torch.channels_last)
    if compiled:
        net.compile()
    return net


def diffusers(
    turns: Turns, size: str, batch: int, precision: str = "no", channels_last: bool = False, compiled: bool = False
) -> None:
    from diffusers import DDPMScheduler

    from benchmarks.peers import diffusers_example

    net = peers_network(size)
    facts = {**facts_of(Called(net, SIZES[size]["shape"][0]), SIZES[size]["shape"]), "bf16": precision == "bf16"}
    prepared(net, channels_last, compiled)
    scheduler: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")

    def loss_of(model: nn.Module, x0: Tensor) -> Tensor:
        noise = torch.randn_like(x0)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),), device=x0.device)
        noisy = scheduler.add_noise(x0, noise, t)
        if channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        return F.mse_loss(model(noisy, t).sample.float(), noise)

    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    loop = diffusers_example(
        net, loss_of, batches(size, batch), optimizer, FOREVER, cpu=not ON_GPU, mixed_precision=precision
    )
    for _ in loop:
        turns.step(facts)


def lucidrains(turns: Turns, size: str, batch: int, bf16: bool = False) -> None:
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer
    from torchvision.utils import save_image

    shape = SIZES[size]["shape"]
    net = Called(peers_network(size), shape[0])
    facts = {**facts_of(net, shape), "bf16": bf16}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        for i in range(IMAGES):
            save_image(torch.rand(shape), images / f"{i}.png")
        for i in range(IMAGES, FILES_OF_BATCHES * batch):
            (images / f"{i}.png").hardlink_to(images / f"{i % IMAGES}.png")
        trainer = Trainer(
            GaussianDiffusion(net, image_size=shape[1]),
            images.as_posix(),
            train_batch_size=batch,
            train_num_steps=FOREVER,
            save_and_sample_every=FOREVER,
            results_folder=Path(folder, "results").as_posix(),
            calculate_fid=False,
            amp=bf16,
            mixed_precision_type="bf16",
        )
        update = trainer.ema.update

        def updated() -> None:
            update()
            turns.step(facts)

        trainer.ema.update = updated
        trainer.train()


def bare(turns: Turns, size: str, batch: int, bf16: bool = False, compiled: bool = False) -> None:
    net = Called(peers_network(size), SIZES[size]["shape"][0])
    facts = {**facts_of(net, SIZES[size]["shape"]), "bf16": bf16}
    prepared(net.to(DEVICE), channels_last=ON_GPU, compiled=compiled)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    alphas_cumprod = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0).float().to(DEVICE)
    for images in forever(batches(size, batch)):
        x0 = images.to(DEVICE, non_blocking=True)
        noise = torch.randn_like(x0)
        t = torch.randint(0, 1000, (len(x0),), device=DEVICE)
        a = alphas_cumprod[t][:, None, None, None]
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            loss = F.mse_loss(net(a.sqrt() * x0 + (1 - a).sqrt() * noise, t).float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        turns.step(facts)


def forever(loader: DataLoader) -> Iterator[Tensor]:
    while True:
        for (x0,) in loader:
            yield x0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
