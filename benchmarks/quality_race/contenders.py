"""The three frameworks, each with two methods: `train` on all of MNIST's training images until the clock or the steps
are over, and `draw` with EVALUATIONS evaluations of the network, in float32, from averaged weights.

None validates, saves or draws while the clock runs. All train on the CPU.
"""

import math
import shutil
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.networks import Called
from benchmarks.quality_race.clock import Clock
from benchmarks.quality_race.entries import (
    DIFFUSERS,
    DIFFUSERS_SAME,
    EVALUATIONS,
    LUCIDRAINS_SAME,
    OURS,
    Options,
    our_configuration,
)
from src.overrides import plain_value

SHAPE = (1, 28, 28)
SAMPLE_BATCH = 250


class Contender(Protocol):
    """Attributes: images a step, the network's parameters, and whether its learning rate must know the last step."""

    batch: int
    parameters: int
    plans: bool

    def train(self, clock: Clock, steps: int) -> None:
        """Begins anew."""
        ...

    def draw(self, sampler: str, number: int) -> Tensor:
        """(number, 1, 28, 28) uint8."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a contender works.

    Attributes:
        data: holds MNIST/raw.
        png: the same training images as PNG files.
        folder: of what it writes.
    """

    data: Path
    png: Path
    folder: Path
    seed: int


def contender(name: str, options: Options, overrides: list[str], place: Place) -> Contender:
    """The contender of an entry.

    Args:
        overrides: of ours, whose network the entries with the same network take.
    """
    if name == OURS:
        return Ours(options, place)
    same = overrides if name in (DIFFUSERS_SAME, LUCIDRAINS_SAME) else None
    return (Diffusers if name.startswith(DIFFUSERS) else Lucidrains)(options, same, place)


class Ours:
    """src.training.fit and src.sample with every default on."""

    plans = True

    def __init__(self, options: Options, place: Place) -> None:
        self.settings = [*options["overrides"], f"data.dir={plain_value(str(place.data))}", f"seed={place.seed}"]
        self.place, self.run = place, place.folder / "run"
        self.batch = our_configuration(self.settings)["data"]["batch_size"]
        self.parameters = count(our_network(self.settings))

    def train(self, clock: Clock, steps: int) -> None:
        from src.training import fit
        from src.training.stop import Stop, Stopped

        class Timed(Stop):
            def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
                super().on_train_batch_end(trainer, *rest)
                if clock.step() and trainer.global_step < trainer.max_steps:
                    self.signum = signal.SIGTERM  # saves and stops

        config = our_configuration(self.settings, due=steps)
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir(parents=True)
        with suppress(Stopped), mock.patch.object(fit, "Stop", Timed):
            fit.fit(config, self.run)

    def draw(self, sampler: str, number: int) -> Tensor:
        from src.evaluation.sampling import draw

        out = self.place.folder / "samples"
        out.mkdir(exist_ok=True)
        where = (f"out={plain_value(str(out))}", f"num_samples={number}", f"batch_size={SAMPLE_BATCH}")
        draw(self._sampling(sampler, self.steps(sampler), *where), out)
        return torch.from_numpy(np.load(out / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)

    def steps(self, sampler: str) -> int:
        """In which a sampler asks the network EVALUATIONS times at most."""
        from src.evaluation.sampling import set_up
        from src.evaluation.stamp import evaluations

        most = evaluations(set_up(self._sampling(sampler, EVALUATIONS), 1))
        return EVALUATIONS // math.ceil(most / EVALUATIONS)

    def _sampling(self, sampler: str, steps: int, *overrides: str) -> Any:
        from hydra import compose, initialize_config_dir
        from omegaconf import OmegaConf

        from src.cli import CONF

        asked = (f"run={plain_value(str(self.run))}", f"seed={self.place.seed}", f"sampler={sampler}", "device=cpu")
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("sample", [*asked, f"sampler.steps={steps}", *overrides])
        config: Any = OmegaConf.to_container(composed, resolve=True)
        return config


def our_network(overrides: list[str]) -> nn.Module:
    from src.runs import build_net

    return build_net(our_configuration(overrides))


def count(net: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in net.parameters())


class AsOurs(nn.Module):
    """Our network as lucidrains calls its own."""

    self_condition = False
    random_or_learned_sinusoidal_cond = False
    channels = out_dim = SHAPE[0]

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, *_: Any) -> Tensor:
        return self.net(x, t)


class Diffusers:
    """The loop of its train_unconditional example; images lie in memory, which is more than the example does."""

    plans = True

    def __init__(self, options: Options, same: list[str] | None, place: Place) -> None:
        from diffusers import DDPMScheduler

        from src.data.sources import MNIST

        self.options, self.same, self.seed = options, same, place.seed
        self.batch = options["batch"]
        self.images = MNIST().load(place.data)[0].images
        self.scheduler: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.net = nn.Module()
        self.parameters = count(self.network())

    def network(self) -> nn.Module:
        from diffusers import UNet2DModel

        if self.same is not None:
            return our_network(self.same)
        channels = tuple(self.options["channels"])
        plain = len(channels) - 1  # attention is at the lowest level
        net: Any = UNet2DModel(
            sample_size=SHAPE[1],
            in_channels=1,
            out_channels=1,
            block_out_channels=channels,
            layers_per_block=self.options["blocks"],
            norm_num_groups=self.options["groups"],
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        )
        return Called(net, SHAPE[0])

    def train(self, clock: Clock, steps: int) -> None:
        from benchmarks.peers import diffusers_example

        scheduler = self.scheduler

        def loss_of(model: nn.Module, images: Tensor) -> Tensor:
            x0 = images.float() / 127.5 - 1
            noise = torch.randn_like(x0)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x0),))
            return F.mse_loss(model(scheduler.add_noise(x0, noise, t), t).float(), noise)

        net = self.network()
        optimizer = torch.optim.AdamW(
            net.parameters(), lr=self.options["lr"], betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        loader = DataLoader(TensorDataset(self.images), self.batch, shuffle=True, drop_last=True)
        loop = diffusers_example(
            net, loss_of, loader, optimizer, steps, self.options["warmup"], cpu=True, mixed_precision=precision()
        )
        while True:
            ema = next(loop)
            if clock.step() or clock.done == steps:
                break
        loop.close()
        self.net = self.network()  # the one that was trained is wrapped in autocast
        ema.copy_to(self.net.parameters())
        self.net.eval()

    @torch.no_grad()
    def draw(self, sampler: str, number: int) -> Tensor:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

        name, _, clipped = sampler.partition("_")  # clipped: x0 is, to [-1, 1], and what follows goes on from there
        kind: Any = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}[name]
        settings = {"thresholding": True, "sample_max_value": 1.0} if clipped and name != "ddim" else {}
        further = {"use_clipped_model_output": True} if clipped and name == "ddim" else {}
        generator = torch.Generator().manual_seed(self.seed)
        samples = []
        for low in range(0, number, SAMPLE_BATCH):
            scheduler = kind.from_config(self.scheduler.config, **settings)
            scheduler.set_timesteps(EVALUATIONS)
            x = torch.randn(min(SAMPLE_BATCH, number - low), *SHAPE, generator=generator) * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                x = scheduler.step(self.net(x, t.expand(len(x))), t, x, **further).prev_sample
            samples.append(as_pixels(x / 2 + 0.5))
        return torch.cat(samples)


class Lucidrains:
    """GaussianDiffusion and Trainer; reads PNG files with a worker a core, as its Trainer does."""

    plans = False

    def __init__(self, options: Options, same: list[str] | None, place: Place) -> None:
        self.options, self.same, self.place = options, same, place
        self.batch = options["batch"]
        self.average = nn.Module()
        self.parameters = count(self.network())

    def network(self) -> nn.Module:
        from denoising_diffusion_pytorch import Unet

        if self.same is not None:
            return AsOurs(our_network(self.same))
        return Unet(self.options["dim"], dim_mults=tuple(self.options["mults"]), channels=1)

    def train(self, clock: Clock, steps: int) -> None:
        from denoising_diffusion_pytorch import GaussianDiffusion, Trainer

        trainer = Trainer(
            GaussianDiffusion(self.network(), image_size=SHAPE[1], sampling_timesteps=EVALUATIONS),
            self.place.png.as_posix(),
            train_batch_size=self.batch,
            train_lr=self.options["lr"],
            train_num_steps=steps,
            ema_update_every=self.options["ema_every"],
            augment_horizontal_flip=False,  # digits are not symmetric
            save_and_sample_every=10**9,
            results_folder=(self.place.folder / "results").as_posix(),
            calculate_fid=False,
            amp=precision() == "bf16",
            mixed_precision_type="bf16",
        )
        update = trainer.ema.update

        def updated() -> None:
            update()
            if clock.step():
                trainer.train_num_steps = trainer.step  # which it compares with before each step

        trainer.ema.update = updated
        trainer.train()
        self.average = trainer.ema.ema_model.eval()

    def draw(self, sampler: str, number: int) -> Tensor:
        torch.manual_seed(self.place.seed)
        average: Any = self.average
        sizes = [min(SAMPLE_BATCH, number - low) for low in range(0, number, SAMPLE_BATCH)]
        return torch.cat([as_pixels(average.sample(batch_size=size)) for size in sizes])


def as_pixels(x: Tensor) -> Tensor:
    """[0, 1] to the nearest of {0, ..., 255}, values outside clamped."""
    return x.clamp(0, 1).mul(255).round().to(torch.uint8)


def precision() -> str:
    """As accelerate calls it: bf16 where the hardware multiplies in it, as our trainer=auto chooses."""
    from src.training.trainer import TrainerSettings

    return "bf16" if TrainerSettings(accelerator="cpu").chosen_precision == "bf16-mixed" else "no"
