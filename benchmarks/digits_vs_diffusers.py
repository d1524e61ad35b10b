"""Quality on the 8x8 digits for the same seconds of training: this project's defaults against diffusers' example.

  ours       python -m src.train with its defaults, then python -m src.sample with its defaults
  diffusers  UNet2DModel of the same parameter count, trained as its train_unconditional example does (linear DDPM of
             1000 steps, eps loss, AdamW 1e-4, cosine with 500 warm-up steps, EMA), in full
             batches of 128 of the same images

diffusers gets all the seconds that src.train reports, which include validation, pictures and checkpoints, for its steps
alone. How many steps the budget holds, which its learning rate must know beforehand, is measured on a model that is
thrown away. Its samples come from its DDIMPipeline. Both take 50 DDIM steps a sample.

The score is the Fréchet distance between 1,000 samples and the 1,797 real digits in the space of their 64 pixels,
scaled to [0, 1]. It stands between the distance of two halves of the real set and that of uniform noise.
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers import diffusers_example
from benchmarks.timing import arguments, write_report
from src.data.loader import normalize
from src.data.sources import Digits
from src.evaluation.frechet import frechet_distance
from src.pictures import enlarge, grid, save_png

BATCH = 128
SAMPLE_BATCH = 250
SPLITS = 20


@dataclass(frozen=True)
class Trained:
    """A contender, and its samples, (N, 1, 8, 8) uint8."""

    samples: Tensor
    parameters: int
    steps: int
    images_seen: int
    seconds: float
    precision: str

    @property
    def facts(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "samples"}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, help="training time of diffusers; default: what src.train took")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=1000)
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the first 64 samples of each as PNG")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of diffusers")
    parser.add_argument("--warmup-steps", type=int, default=500, help="of diffusers")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no", help="of diffusers")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for src.train, such as trainer.max_steps=20")
    args = parser.parse_args()

    contenders = {"ours": train_ours(args)}
    contenders["diffusers"] = train_diffusers(args, args.seconds or contenders["ours"].seconds)
    scores = {name: distance_to_real(contender.samples) for name, contender in contenders.items()}
    scores["two halves of the real digits"] = halves(args.seed)
    scores["uniform noise"] = distance_to_real(torch.randint(0, 256, (args.num_samples, 1, 8, 8), dtype=torch.uint8))

    rows = []
    for name, score in scores.items():
        facts = contenders[name].facts.values() if name in contenders else [""] * 5
        rows.append(
            (name, f"{score:.3f}", *(f"{fact:,.0f}" if isinstance(fact, int | float) else fact for fact in facts))
        )
    header = ("", "Fréchet distance", "parameters", "steps", "images", "seconds", "precision")
    print(f"diffusers / ours: {scores['diffusers'] / scores['ours']:.2f} (one training each, seed {args.seed})")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, contender in contenders.items():
            save_png(grid(contender.samples[:64]), args.out / f"{name}.png", enlarge(8))
    write_report(
        args,
        [("", header, rows)],
        frechet_distance=scores,
        contenders={name: c.facts for name, c in contenders.items()},
    )


def train_ours(args: Namespace) -> Trained:
    """Two subprocesses, as a user would."""
    with tempfile.TemporaryDirectory() as temporary:
        run, out = Path(temporary, "run"), Path(temporary, "samples")
        command("train", f"seed={args.seed}", f"hydra.run.dir={run}", *args.overrides)
        command("sample", f"run={run}", f"out={out}", f"seed={args.seed}", f"num_samples={args.num_samples}")
        summary = json.loads((run / "summary.json").read_text())
        samples = torch.from_numpy(np.load(out / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
    return Trained(
        samples,
        summary["parameters"],
        summary["steps"],
        summary["images_seen"],
        summary["wall_seconds"],
        summary["precision"],
    )


def command(name: str, *overrides: str) -> None:
    print(f"python -m src.{name} {' '.join(overrides)}", flush=True)
    subprocess.run([sys.executable, "-m", f"src.{name}", *overrides], check=True)


def train_diffusers(args: Namespace, seconds: float) -> Trained:
    steps = estimate_steps(args, seconds)
    print(f"diffusers: {seconds:.1f} s, about {steps:,} steps", flush=True)
    torch.manual_seed(args.seed)
    model = unet()
    training = loop(args, model, steps)
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        ema = next(training)
        done += 1
    training.close()
    ema.copy_to(model.parameters())
    pipeline: Any = DDIMPipeline(model.eval(), DDIMScheduler.from_config(ddpm().config))
    pipeline.set_progress_bar_config(desc="diffusers, sampling")
    generator = torch.Generator().manual_seed(args.seed)
    samples = []
    for low in range(0, args.num_samples, SAMPLE_BATCH):
        size = min(SAMPLE_BATCH, args.num_samples - low)
        batch = pipeline(size, generator, num_inference_steps=50, output_type="np")
        samples.append(torch.from_numpy((batch.images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2))
    parameters = sum(p.numel() for p in model.parameters())
    return Trained(torch.cat(samples), parameters, done, done * BATCH, spent, args.mixed_precision)


def estimate_steps(args: Namespace, seconds: float, skip: int = 5, count: int = 25) -> int:
    """How many steps fit into `seconds`."""
    steps = loop(args, unet(), skip + count)
    for _ in range(skip):
        next(steps)
    started = time.perf_counter()
    for _ in range(count):
        next(steps)
    rate = count / (time.perf_counter() - started)
    steps.close()
    return max(1, round(seconds * rate))


def loop(args: Namespace, model: nn.Module, max_steps: int) -> Generator[EMAModel, None, None]:
    """The example's training; yields the EMA after each step."""
    batch = getattr(args, "batch_size", BATCH)
    train = normalize(real()[128:])  # as many as ours trains on
    scheduler = ddpm()

    def loss_of(model: nn.Module, x0: Tensor) -> Tensor:
        noise = torch.randn_like(x0)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),), device=x0.device)
        return F.mse_loss(model(scheduler.add_noise(x0, noise, t), t).sample.float(), noise)

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    loader = DataLoader(TensorDataset(train), batch, shuffle=True, drop_last=True)
    return diffusers_example(
        model, loss_of, loader, optimizer, max_steps, args.warmup_steps, mixed_precision=args.mixed_precision
    )


def ddpm() -> Any:
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")


def unet() -> Any:
    """Two levels of 64 and 128 channels, attention at 4x4: 2,793,281 parameters, as many as ours."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def pixels(images: Tensor) -> Tensor:
    """(N, 64) in [0, 1]."""
    return images.flatten(1).double() / 255


def real() -> Tensor:
    return Digits().load(Path())[0].images


def distance_to_real(images: Tensor) -> float:
    return frechet_distance(pixels(images), pixels(real()))


def halves(seed: int) -> float:
    """Mean over random splits of the real digits."""
    digits = pixels(real())
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(SPLITS):
        order = torch.randperm(len(digits), generator=generator)
        one, other = order.chunk(2)
        distances.append(frechet_distance(digits[one], digits[other]))
    return sum(distances) / SPLITS


if __name__ == "__main__":
    main()
