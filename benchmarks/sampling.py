"""Sampling throughput: the same network, sampler and number of evaluations here and in diffusers' pipelines.

  ours        what src.sample does: batches side by side, one thread each, over the solver's steps; on a GPU one batch
              after the other, with the network's kernels recorded
  diffusers   the loop of DDPMPipeline: scheduler.set_timesteps, then network and scheduler.step in turns, all threads
              on one batch; in float32 as it comes, under autocast to bfloat16, and with its weights in bfloat16

A step costs what it costs however many there are: a turn draws `--images` images in few steps (on a GPU in 50, or in
all where there are fewer), and images a second are of the number that the row names. What a contender's name does not
say is its default.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.networks import LARGE, SIZES, SMALL, Called, facts_of, peers_network
from benchmarks.timing import arguments, spread, write_report
from benchmarks.turns import DEVICE, ON_GPU, Contender, Turns, race

SAMPLERS: dict[str, dict[str, Any]] = {  # steps of the row, steps of a turn
    "DDPM": {"steps": 1000, "few": 2, "scheduler": "DDPMScheduler"},
    "DDIM": {"steps": 50, "few": 2, "scheduler": "DDIMScheduler"},
    "Heun": {"steps": 18, "few": 2, "scheduler": "HeunDiscreteScheduler"},
}
OURS = "ours, bf16-mixed"
if ON_GPU:  # where what a batch costs once is not small beside a step
    SAMPLERS = {name: {**of, "few": min(of["steps"], 50)} for name, of in SAMPLERS.items()}
ROWS = ((LARGE, "DDIM"), (SMALL, "DDPM"), (SMALL, "DDIM"), (SMALL, "Heun"))
ROWS_ON_GPU = ((LARGE, "DDPM"), (LARGE, "DDIM"), (LARGE, "Heun"))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch-size", type=int, default=64 if ON_GPU else 16)
    parser.add_argument("--images", type=int, default=64 if ON_GPU else 32, help="a turn")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--sizes", nargs="+", choices=(LARGE, SMALL), default=(LARGE, SMALL))
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=tuple(SAMPLERS))
    args = parser.parse_args()
    tables, results = [], {}
    for size, sampler in ROWS_ON_GPU if ON_GPU else ROWS:
        if size not in args.sizes or sampler not in args.samplers:
            continue
        contenders = contenders_of(size, sampler, args.batch_size, args.images)
        result = race(contenders, OURS, args.rounds, warmup=2 if ON_GPU else 1)
        steps, few = SAMPLERS[sampler]["steps"], SAMPLERS[sampler]["few"]
        rows = []
        for name in result.rounds.values:
            seconds = result.rounds.median(name) * evaluations(sampler, steps) / evaluations(sampler, few)
            known = result.contender(name)
            ratio = (
                "" if known == result.rounds.control == name else spread(result.rounds.ratios(name, "ours, bf16-mixed"))
            )
            rows.append([name, f"{args.images / seconds:.3g}", ratio, f"{result.peak_bytes[known] / 2**30:.2f}"])
        caption = (
            f"{sampler}, {steps} steps, {result.facts['ours']['parameters'] / 1e6:.1f}M parameters, batch "
            f"{args.batch_size}, {'' if ON_GPU else f'{torch.get_num_threads()} threads, '}{args.rounds} rounds"
        )
        tables.append((caption, ["", "images/s", f"{OURS}, times as fast", "peak GiB"], rows))
        results[f"{size} {sampler}"] = {"seconds_a_turn": result.rounds.values, "peak_bytes": result.peak_bytes}
    write_report(args, tables, DEVICE, results=results)


def evaluations(sampler: str, steps: int) -> int:
    """Of the network; Heun's last step has one."""
    return 2 * steps - 1 if sampler == "Heun" else steps


def contenders_of(size: str, sampler: str, batch: int, images: int) -> dict[str, Contender]:
    def of(function: str, **options: Any) -> Contender:
        shared = {"size": size, "sampler": sampler, "batch": batch, "images": images}
        return Contender(f"benchmarks.sampling:{function}", {**shared, **options})

    on_gpu = {
        "diffusers, bf16 weights, channels_last, compiled": of(
            "diffusers", bf16=True, channels_last=True, compiled=True
        )
    }
    return {
        OURS: of("ours", bf16=True),
        "ours": of("ours"),
        "diffusers": of("diffusers"),
        "diffusers, autocast": of("diffusers", autocast=True),
        "diffusers, bf16 weights": of("diffusers", bf16=True),
        "diffusers, bf16 weights, channels_last": of("diffusers", bf16=True, channels_last=True),
        **(on_gpu if ON_GPU else {}),
    }


def ours(turns: Turns, size: str, sampler: str, batch: int, images: int, bf16: bool = False) -> None:
    from benchmarks.ours import configuration
    from src.diffusion.samplers import DDIM, DDPM, generate
    from src.diffusion.solvers import Heun
    from src.evaluation.sampling import placed
    from src.runs import build_diffusion, build_net
    from src.threads import in_threads

    shape = SIZES[size]["shape"]
    config = configuration(
        f"data.channels={shape[0]}", f"data.image_size={shape[1]}", "model=unet", *SIZES[size]["ours"]
    )
    net, diffusion = build_net(config).eval(), build_diffusion(config)
    facts = facts_of(net, shape)
    net = placed(net, DEVICE)
    few = SAMPLERS[sampler]["few"]
    made: Any = {"DDPM": DDPM, "DDIM": DDIM, "Heun": Heun}[sampler](few)
    parts = [range(low, min(low + batch, images)) for low in range(0, images, batch)]

    def work(indices: range, _: object) -> None:
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16) if bf16 else nullcontext():
            denoise = diffusion.denoiser(net)
            for _step in generate(denoise, made, diffusion.schedule, shape, 0, indices, DEVICE):
                pass

    while True:
        in_threads(work, parts, DEVICE)
        turns.step(facts)


def diffusers(
    turns: Turns,
    size: str,
    sampler: str,
    batch: int,
    images: int,
    autocast: bool = False,
    bf16: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
) -> None:
    from diffusers import schedulers

    shape = SIZES[size]["shape"]
    net = Called(peers_network(size), shape[0]).eval()
    facts = facts_of(net, shape)
    dtype = torch.bfloat16 if bf16 else torch.float32
    net.to(DEVICE, dtype)
    if channels_last:
        net.to(memory_format=torch.channels_last)
    if compiled:
        net.compile(mode="reduce-overhead")
    scheduler = getattr(schedulers, SAMPLERS[sampler]["scheduler"])(1000, 1e-4, 0.02, "linear")

    def draw(number: int) -> Tensor:
        scheduler.set_timesteps(SAMPLERS[sampler]["few"])
        x = torch.randn(number, *shape, dtype=dtype, device=DEVICE)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x).prev_sample.to(dtype)
        return x

    while True:
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16) if autocast else nullcontext():
            for low in range(0, images, batch):
                draw(min(batch, images - low))
        turns.step(facts)


if __name__ == "__main__":
    main()
