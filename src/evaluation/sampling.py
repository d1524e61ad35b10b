"""Samples of a trained run, as files: grid.png, samples.npz, and the trajectory that led to them."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from src.build import build, refusals
from src.diffusion.samplers import generate
from src.errors import UserError
from src.files import replacing
from src.pictures import enlarge, grid, save_gif, save_png, to_uint8
from src.runs import Run, build_diffusion, image_shape

FRAMES = 50  # of an animation, at most
COLUMNS = 10  # of a strip
TRAJECTORIES = 8  # samples that a trajectory shows, at most


def draw(config: dict[str, Any], out: Path) -> None:
    """Draws config["num_samples"] samples of the run config["run"] into the folder `out`.

    Sample i depends on (weights, sampler, seed, i) alone.

    Raises:
        UserError: for whatever the user can mend, before anything is written.
    """
    if config["num_samples"] < 1 or config["batch_size"] < 1:
        raise UserError("num_samples and batch_size must be at least 1")
    run = Run(config["run"])
    device = _device(config["device"])
    diffusion = build_diffusion(run.config)
    sampler = build(config["sampler"], "sampler")
    with refusals("sampler"):
        steps = len(sampler.path(diffusion.schedule)) - 1
    net = run.load_net(config["weights"]).to(device)
    shape = image_shape(run.config)

    weights = config["weights"]
    print(f"{config['num_samples']} samples of {run.checkpoint}, {weights} weights, {steps} steps, {device.type}")
    kept = range(min(TRAJECTORIES, config["num_samples"])) if config["trajectory"] else range(0)
    samples, states, guesses = [], [], []
    numbers = range(config["num_samples"])
    bar = tqdm(total=len(numbers) * steps, desc="sampling", unit="image step", dynamic_ncols=True)
    with torch.no_grad(), _precision(config["precision"], device), bar:
        for low in numbers[:: config["batch_size"]]:
            indices = numbers[low : low + config["batch_size"]]
            shown = len(kept[low : low + len(indices)])  # of this batch, the first so many
            denoise = diffusion.denoiser(net)
            batch_states, batch_guesses = [], []
            for step in generate(denoise, sampler, diffusion.schedule, shape, config["seed"], indices, device):
                if shown:
                    batch_states.append(to_uint8(step.x[:shown]).cpu())
                    batch_guesses.append(to_uint8(step.x0[:shown]).cpu())
                bar.update(len(indices))
            if not torch.isfinite(step.x).all():
                raise UserError(f"the samples hold NaN or infinity; the weights in {run.checkpoint} are broken")
            samples.append(to_uint8(step.x).cpu())
            if shown:
                states.append(torch.stack(batch_states))
                guesses.append(torch.stack(batch_guesses))

    images = torch.cat(samples)
    _save_npz(images, out / "samples.npz")
    save_png(grid(images), out / "grid.png", enlarge(shape[1]))
    written = ["grid.png", "samples.npz"]
    if config["trajectory"]:
        _save_trajectory(torch.cat(states, dim=1), torch.cat(guesses, dim=1), out)
        written += ["trajectory.png", "trajectory.gif"]
    for name in written:
        print(f"  {out / name}")


def _save_npz(images: Tensor, path: Path) -> None:
    """arr_0 uint8 (N, H, W, C) in sample order, as guided-diffusion's evaluator reads it."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, images.permute(0, 2, 3, 1).contiguous().numpy())


def _save_trajectory(states: Tensor, guesses: Tensor, out: Path) -> None:
    """A strip, for each sample x_t in a row above the predicted x0, and an animation of both side by side.

    Args:
        states, guesses: (steps, N, C, H, W) uint8, after each step.
    """
    steps, n, _, height, _ = states.shape
    columns = torch.linspace(0, steps - 1, min(COLUMNS, steps)).round().long()
    rows = torch.stack([states[columns], guesses[columns]]).permute(2, 0, 1, 3, 4, 5)  # (N, 2, columns, C, H, W)
    save_png(grid(rows.flatten(0, 2), columns=len(columns)), out / "trajectory.png", enlarge(height))
    times = torch.linspace(0, steps - 1, min(FRAMES, steps)).round().long()
    frames = [grid(torch.cat([states[k], guesses[k]]), columns=n) for k in times]
    save_gif(frames, out / "trajectory.gif", seconds=4, scale=enlarge(height))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise UserError(f"device={name} asks for a GPU and this machine has none; use device=cpu")
    return torch.device(name)


def _precision(name: str, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if name == "32-true" else torch.autocast(device.type, torch.bfloat16)
