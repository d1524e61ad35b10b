"""A sampler's own work: microseconds a step, besides the network, beside the same sampler in diffusers.

The network is a constant: it returns one and the same eps, 64 x 3 x 32 x 32 in float32, at no cost. All start from the
same noisy images, take as many steps over the linear schedule, and must arrive at the same images before any clock
starts.

  function   ours: for step in sampler(diffusion.denoiser(net), schedule, x, noise): with the path of levels that it
             computes first, eps -> x0, and the (B,) times that the denoiser makes for the network
  module     ours with the network as an nn.Module, which the denoiser asks in parts of the batch on a CPU
  diffusers  for t in scheduler.timesteps: scale_model_input, net, step; `set_timesteps` has gone before, unclocked. The
             scheduler's scalar t is as good as a (B,) for this network

Clipping is the same on both sides, except where a row says that ours clips: diffusers does so there only when it is
told to, by a threshold. DDIM's peer keeps the
network's eps where ours derives it from the clipped x0: less work for the peer. Noise is what DDPM draws: ours from one
generator a sample, theirs from one for all; "z given" leaves the drawing out on both sides. Heun takes two evaluations
a step; diffusers calls each of them one.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from diffusers import schedulers
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor, nn

from benchmarks.timing import Rounds, arguments, interleave, spread, write_report
from src.diffusion import weightings
from src.diffusion.densities import Uniform
from src.diffusion.gaussian import GaussianDiffusion, Network
from src.diffusion.objectives import Eps
from src.diffusion.samplers import DDIM, DDPM, Sampler, state_dtype
from src.diffusion.schedules import Linear
from src.diffusion.solvers import DPMSolverPP, Heun, UniPC
from src.randomness import NoiseStream

SHAPE = (3, 32, 32)
TOLERANCE = 0.02  # of the final images in [-1, 1]; diffusers' float32 tables alone move a chain by 1e-3


class Constant:
    """A float32 network that has its answer ready, also to parts of a batch that are asked one after the other."""

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer
        self.parts = {rows: answer.split(rows) for rows in range(1, len(answer) + 1)}
        self.asked = 0  # images so far

    def __call__(self, x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        if x.dtype != self.answer.dtype:
            x.to(self.answer.dtype)  # what a float32 network must do with its input
        rows = len(x)
        part = self.asked % len(self.answer) // rows
        self.asked += rows
        return self.parts[rows][part]


class ConstantModule(nn.Module):
    """The same as a module of one parameter."""

    def __init__(self, constant: Constant) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.constant = constant

    def forward(self, x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        return self.constant(x, t)


@dataclass(frozen=True)
class Pair:
    """One row: a sampler of ours and its peer.

    Attributes:
        sampler: ours.
        scheduler: theirs, by class name.
        options: of theirs.
        in_sigma: whether the state of theirs is x / alpha.
        drawn: whether noise is drawn; false gives both sides one that is ready.
    """

    sampler: Sampler
    scheduler: str
    options: dict[str, Any] = field(default_factory=dict)
    in_sigma: bool = False
    drawn: bool = False


def pairs(steps: int) -> dict[str, Pair]:
    karras = {"use_karras_sigmas": True}
    heun = partial(Pair, scheduler="HeunDiscreteScheduler", in_sigma=True)
    dpm = {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_lu_lambdas": True}
    return {
        "DDPM": Pair(DDPM(steps, "leading"), "DDPMScheduler", drawn=True),
        "DDPM, z given": Pair(DDPM(steps, "leading"), "DDPMScheduler"),
        "DDIM": Pair(DDIM(steps, "leading"), "DDIMScheduler"),
        "DDIM, no clipping": Pair(DDIM(steps, "leading", clip=False), "DDIMScheduler", {"clip_sample": False}),
        "Euler, no clipping": Pair(DDIM(steps, "karras", clip=False), "EulerDiscreteScheduler", karras, in_sigma=True),
        "DPM-Solver++ 2M, no clipping": Pair(
            DPMSolverPP(steps, "log_snr", clip=False), "DPMSolverMultistepScheduler", dpm
        ),
        "DPM-Solver++ 2M, ours clips": Pair(DPMSolverPP(steps, "log_snr"), "DPMSolverMultistepScheduler", dpm),
        "UniPC, no clipping": Pair(UniPC(steps, "linspace", clip=False), "UniPCMultistepScheduler"),
        "UniPC, ours clips": Pair(UniPC(steps, "linspace"), "UniPCMultistepScheduler"),
        "Heun with its state in float64": heun(
            Heun(steps, "karras", double=True), options={**karras, "clip_sample": True}
        ),
        "Heun, no clipping": heun(Heun(steps, "karras", clip=False), options=karras),
        "Heun": heun(Heun(steps, "karras"), options={**karras, "clip_sample": True}),
    }


class Bench:
    """Both sides of the pairs, on one batch.

    Args:
        batch: images.
        loops: from noise to images, of which a turn reports the mean.
    """

    def __init__(self, batch: int, loops: int) -> None:
        self.loops = loops
        self.schedule = Linear()
        self.diffusion = GaussianDiffusion(self.schedule, Eps(), weightings.Constant(), Uniform())
        g = torch.Generator().manual_seed(0)
        # eps is the true one of images that clipping leaves alone: every solver of the ODE must find them
        self.images = torch.rand(batch, *SHAPE, generator=g) * 1.8 - 0.9
        self.eps = torch.randn(batch, *SHAPE, generator=g)
        self.z = torch.randn(batch, *SHAPE, generator=g)
        self.net = Constant(self.eps)
        self.module = ConstantModule(self.net)

    def start(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """The noisy images, as each side keeps them."""
        first = pair.sampler.path(self.schedule)[0]
        x = first.alpha * self.images + first.sigma * self.eps
        return x.to(state_dtype(pair.sampler, x.device)), x / first.alpha if pair.in_sigma else x

    def ours(self, pair: Pair, loops: int, net: Network) -> tuple[float, Tensor]:
        """(seconds, the last images)."""
        start, _ = self.start(pair)
        seconds = 0.0
        for _ in range(loops):
            noise = NoiseStream(0, range(len(start)), SHAPE) if pair.drawn else lambda: self.z
            started = time.perf_counter()
            for step in pair.sampler(self.diffusion.denoiser(net), self.schedule, start, noise):
                last = step
            seconds += time.perf_counter() - started
        return seconds, last.x

    def theirs(self, pair: Pair, loops: int, net: Network) -> tuple[float, Tensor]:
        """(seconds, the last images)."""
        _, start = self.start(pair)
        scheduler = getattr(schedulers, pair.scheduler)(1000, 1e-4, 0.02, "linear", **pair.options)
        draws = {"generator": torch.Generator().manual_seed(0)} if pair.drawn else {}
        seconds = 0.0
        with contextlib.nullcontext() if pair.drawn else self._given():
            for _ in range(loops):
                scheduler.set_timesteps(pair.sampler.steps)
                started = time.perf_counter()
                x = start
                for t in scheduler.timesteps:
                    x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x, **draws).prev_sample
                seconds += time.perf_counter() - started
        return seconds, x

    @contextlib.contextmanager
    def _given(self) -> Iterator[None]:
        with mock.patch.object(scheduling_ddpm, "randn_tensor", return_value=self.z):
            yield

    def sides(self) -> dict[str, Callable[[Pair, int], tuple[float, Tensor]]]:
        """What the rows compare: (pair, loops) -> (seconds, the last images)."""
        return {
            "function": lambda pair, loops: self.ours(pair, loops, self.net),
            "module": lambda pair, loops: self.ours(pair, loops, self.module),
            "diffusers": lambda pair, loops: self.theirs(pair, loops, self.module),
        }

    def check(self, name: str, pair: Pair) -> None:
        """Fails unless all sides do the same work: as many images asked for, and the same images at the end."""
        asked, images = [], []
        for side in self.sides().values():
            self.net.asked = 0
            images.append(side(pair, 1)[1])
            asked.append(self.net.asked)
        apart = max(float((x - images[-1]).abs().max()) for x in images)
        if len(set(asked)) > 1 or (not pair.drawn and apart > TOLERANCE):
            raise SystemExit(f"{name}: asked for {asked} images, which are up to {apart} apart")

    def measure(self, pair: Pair, rounds: int) -> Rounds:
        """Microseconds a step."""
        assert pair.sampler.steps is not None
        per_step = 1e6 / (self.loops * pair.sampler.steps)

        def turn(side: Callable[[Pair, int], tuple[float, Tensor]]) -> float:
            side(pair, 1)
            return side(pair, self.loops)[0] * per_step

        return interleave({name: partial(turn, side) for name, side in self.sides().items()}, "function", rounds)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch-size", type=int, default=64, help="a multiple of 4")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--loops", type=int, default=3, help="from noise to images, a turn, after one that is not timed"
    )
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args.batch_size, args.loops)
    chosen = {name: pair for name, pair in pairs(args.steps).items() if args.only in name}
    results = {}
    gc.freeze()  # the libraries' own objects need no looking through before each turn
    with torch.no_grad():
        for name, pair in chosen.items():
            bench.check(name, pair)
        for name, pair in chosen.items():
            results[name] = bench.measure(pair, args.rounds)

    rows = [
        (
            name,
            *(f"{result.median(side):.0f}" for side in bench.sides()),
            spread(result.ratios("function", "diffusers")),
            spread(result.ratios("module", "diffusers")),
            spread(result.control_ratios()),
        )
        for name, result in results.items()
    ]
    header = ("", "function", "module", "diffusers", "function / diffusers", "module / diffusers", "function again")
    caption = (
        f"batch {args.batch_size} of 3x32x32, {args.steps} steps, threads: {args.threads}, microseconds a step, "
        f"{args.rounds} rounds of {args.loops} loops; ratios: median (least to most of the rounds)"
    )
    write_report(
        args,
        [(caption, header, rows)],
        us_a_step={name: result.values for name, result in results.items()},
        ratios={
            side: {name: result.ratios(side, "diffusers") for name, result in results.items()}
            for side in ("function", "module")
        },
    )


if __name__ == "__main__":
    main()
