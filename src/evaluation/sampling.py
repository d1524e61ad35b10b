"""Samples of a trained run, as files: grid.png, samples.npz, and the trajectory that led to them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from src.build import build, refusals
from src.diffusion.gaussian import GaussianDiffusion
from src.diffusion.guidance import Autoguidance, Denoiser, Guidance
from src.diffusion.samplers import Sampler, StepSampler, generate
from src.errors import UserError
from src.evaluation.graphs import recorded
from src.evaluation.shards import Shards
from src.evaluation.weights import text_digest
from src.files import replacing
from src.files import shown as shown_path
from src.launch import rank
from src.memory import keep_freed
from src.models.norm import faster_channels_last
from src.pictures import enlarge, grid, save_gif, save_png, to_uint8
from src.processes import ALONE, Group
from src.runs import Run, build_diffusion, cycled_labels, image_shape
from src.threads import Tick, in_threads, share_out

DEFAULT_SAMPLES = 64
NO_LABELS = "was trained without labels; train with model.num_classes, as experiment=digits_conditional does"
FRAMES = 50  # of an animation, at most
COLUMNS = 10  # of a strip
GRID = 400  # samples in grid.png, at most
TRAJECTORIES = 8  # samples that a trajectory shows, at most


@dataclass(frozen=True)
class Setup:
    """What turns noise into images: a run's network, with the sampler and the guidance that were asked for.

    Attributes:
        steps: of the sampler.
        shape: (C, H, W) of the run's images.
        labels: (N,) int64, one a sample, or None.
        guide: diffusion and network of the weaker model, of autoguidance.
        autocast: to bfloat16.
    """

    run: Run
    device: torch.device
    diffusion: GaussianDiffusion
    net: nn.Module
    sampler: Sampler
    steps: int
    shape: tuple[int, int, int]
    labels: Tensor | None
    guidance: Guidance
    guide: tuple[GaussianDiffusion, nn.Module] | None
    autocast: bool

    @property
    def path_sha256(self) -> str:
        """Of the levels that samples walk and the noise that they start from, to five digits."""
        schedule = self.diffusion.schedule
        path = self.sampler.path(schedule)
        numbers = [schedule.prior_std(path[0]), *(value for level in path for value in level)]
        return text_digest(" ".join(f"{number:.5g}" for number in numbers))

    @property
    def precision(self) -> AbstractContextManager[Any]:
        """A context that networks are asked in, for one thread."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def denoiser(self, indices: range) -> Denoiser:
        """The guided denoiser of the samples with these numbers; it serves one batch on its way."""
        y = None if self.labels is None else self.labels[indices.start : indices.stop].to(self.device)
        weak = self.diffusion.denoiser(self.net) if self.guide is None else self.guide[0].denoiser(self.guide[1], y)
        return self.guidance(self.diffusion.denoiser(self.net, y), weak)

    def finite(self, x: Tensor) -> Tensor:
        """x.

        Raises:
            UserError: when it holds NaN or infinity.
        """
        if not torch.isfinite(x).all():
            raise UserError(f"the samples hold NaN or infinity; the weights in {self.run.checkpoint} are broken")
        return x


def set_up(config: dict[str, Any], num_samples: int, loaded: tuple[Run, nn.Module] | None = None) -> Setup:
    """What the keys that conf/sample.yaml and conf/edit.yaml share ask for, to draw `num_samples` images.

    Args:
        loaded: the run and its network, if they are there.

    Raises:
        UserError: for whatever the user can mend.
    """
    if num_samples < 1 or config["batch_size"] < 1:
        raise UserError("num_samples and batch_size must be at least 1")
    run = loaded[0] if loaded else Run(config["run"])
    device = choose_device(config["device"])
    diffusion = build_diffusion(run.config)
    sampler = build(config["sampler"], "sampler")
    with refusals("sampler"):
        steps = len(sampler.path(diffusion.schedule)) - 1
    net = loaded[1] if loaded else placed(run.load_net(config["weights"]), device)
    labels = _labels(config["labels"], net, num_samples, run.checkpoint)
    conditional = getattr(net, "num_classes", None) is not None
    if loaded is None and rank() == 0 and labels is None and conditional and run.config.get("label_dropout") == 0:
        print("note: the network never learned to do without labels, and was given none; labels=all draws each class")
    guidance = build(config["guidance"], "guidance")
    with refusals("sampler"):
        sampler.check(net)
    if guidance.needs_steps and not isinstance(sampler, StepSampler):
        raise UserError(
            f"guidance {type(guidance).__name__} keeps the noise of another model, which {type(sampler).__name__} "
            "cannot; choose sampler=ddim, euler or ddpm"
        )
    if labels is None and guidance.active and guidance.needs_labels:
        asked = "no labels were given; add labels=all or labels=[...]"
        reason = asked if conditional else f"{run.checkpoint} {NO_LABELS}"
        raise UserError(f"guidance.scale={guidance.scale} needs labels to guide towards: {reason}")
    num_classes = None if labels is None else net.num_classes
    guide = _guide(guidance, run, config["weights"], device, num_classes)
    autocast = config["precision"] != "32-true"
    return Setup(
        run, device, diffusion, net, sampler, steps, image_shape(run.config), labels, guidance, guide, autocast
    )


def draw(config: dict[str, Any], out: Path, group: Group = ALONE) -> None:
    """Draws config["num_samples"] samples of the run config["run"] into the folder `out`.

    Sample i depends on (weights, sampler, seed, i) alone. Each process of the group draws its share; the first writes.
    What an attempt that was killed has left in `out` is not drawn again.

    Raises:
        UserError: for whatever the user can mend, before anything is written.
    """
    asked = config["labels"]
    if config["num_samples"] is None:
        config = {**config, "num_samples": len(asked) if isinstance(asked, list) and asked else DEFAULT_SAMPLES}
    n = config["num_samples"]
    with group.agreement():
        setup = set_up(config, n)
        shown = min(TRAJECTORIES, n) if config["trajectory"] else 0
        shards = Shards(out / "shards", {**samples_key(config, setup), "trajectory": shown})
    if group.first:
        devices = setup.device.type if group.size == 1 else f"{group.size} x {setup.device.type}"
        print(f"{n} samples of {setup.run.checkpoint}, {config['weights']} weights, {setup.steps} steps, {devices}")
        if setup.guidance.active and setup.guidance.needs_labels and setup.run.config.get("label_dropout") == 0:
            print("note: the run was trained with label_dropout=0, and guidance leads away from what it never learned")
    draw_shards(setup, config["seed"], n, config["batch_size"], shards, group, shown)
    if not group.first:
        return

    images = torch.from_numpy(np.concatenate(list(shards.read("images", n))))
    save_npz(images, setup.labels, out / "samples.npz")
    save_png(grid(images[:GRID]), out / "grid.png", enlarge(setup.shape[1]))
    written = ["grid.png", "samples.npz"]
    if shown:
        states, guesses = (
            torch.from_numpy(np.concatenate(list(shards.read(name, shown)))).movedim(1, 0)
            for name in ("states", "guesses")
        )
        _save_trajectory(states, guesses, out)
        written += ["trajectory.png", "trajectory.gif"]
    shards.remove()
    for name in written:
        print(f"  {out / name}")


def samples_key(config: dict[str, Any], setup: Setup) -> dict[str, Any]:
    """What the samples that a configuration asks for depend on, their numbers aside."""
    guide = getattr(setup.guidance, "guide", None)
    return {
        "checkpoint_sha256": setup.run.sha256,
        "path_sha256": setup.path_sha256,
        **{name: config[name] for name in ("weights", "sampler", "guidance", "labels", "seed", "precision")},
        "guide_sha256": None if guide is None else Run(guide).sha256,
    }


def draw_shards(
    setup: Setup, seed: int, n: int, batch_size: int, shards: Shards, group: Group = ALONE, shown: int = 0
) -> None:
    """Draws those of n samples that are not in the shards yet, under a progress bar.

    A shard holds images, uint8 (B, C, H, W), and of the first `shown` samples the states and guesses, uint8
    (B, steps, C, H, W): x_t and x0 after each step.

    Raises:
        UserError: when samples hold NaN or infinity, or cannot be written, in all processes.
    """
    with group.agreement():
        missing = shards.missing(n)
        if group.first:
            shards.tidy()
    there = n - sum(map(len, missing))
    if there and group.first:
        print(f"  {there} of {n} samples are there already")
    batches = [
        range(gap.start + part.start, gap.start + part.stop)
        for gap in missing
        for part in share_out(len(gap), batch_size, setup.shape, setup.device, group)
    ]
    own = group.share(batches)
    bar = tqdm(
        total=sum(map(len, own)) * setup.steps,
        desc="sampling" if group.size == 1 else f"sampling, the share of 1 of {group.size} processes",
        unit="image step",
        dynamic_ncols=True,
        disable=not group.first or not own,
    )

    def work(indices: range, tick: Tick) -> None:
        arrays = _drawn(setup, seed, indices, shown, tick)
        with _writable(shards):
            shards.save(indices, arrays)

    with group.agreement(), bar:
        in_threads(work, own, setup.device, bar.update)


@contextmanager
def _writable(shards: Shards) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"samples could not be written to {shown_path(shards.folder)} ({error}); make room and give the same "
            "command again, which goes on from what is there"
        ) from error


def _drawn(setup: Setup, seed: int, indices: range, shown: int, tick: Tick) -> dict[str, np.ndarray]:
    kept = min(max(0, shown - indices.start), len(indices))  # of this batch, the first so many
    states, guesses = [], []
    denoise, schedule = setup.denoiser(indices), setup.diffusion.schedule
    with torch.no_grad(), setup.precision:
        for step in generate(denoise, setup.sampler, schedule, setup.shape, seed, indices, setup.device):
            if kept:
                states.append(to_uint8(step.x[:kept]).cpu())
                guesses.append(to_uint8(step.x0[:kept]).cpu())
            tick(len(indices))
        arrays = {"images": to_uint8(setup.finite(step.x)).cpu().numpy()}
    if kept:
        arrays |= {"states": torch.stack(states, 1).numpy(), "guesses": torch.stack(guesses, 1).numpy()}
    return arrays


def _guide(
    guidance: Guidance, run: Run, weights: str, device: torch.device, num_classes: Any
) -> tuple[GaussianDiffusion, nn.Module] | None:
    """Diffusion and network of the weaker model, of autoguidance; num_classes is that of the labels, if there are."""
    if not isinstance(guidance, Autoguidance):
        return None
    try:
        guide = Run(guidance.guide)
    except UserError as error:
        raise UserError(str(error).replace("run=", "guidance.guide=")) from error
    if guide.config["schedule"] != run.config["schedule"]:
        raise UserError(f"guidance.guide={guidance.guide} has another schedule than the run; use one with the same")
    if image_shape(guide.config) != image_shape(run.config):
        raise UserError(f"guidance.guide={guidance.guide} makes images of another shape than the run")
    net = guide.load_net(weights)
    if num_classes is not None and getattr(net, "num_classes", None) != num_classes:
        raise UserError(f"guidance.guide={guidance.guide} has other labels than the run; use one with as many classes")
    return build_diffusion(guide.config), placed(net, device)


def placed(net: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, in the memory format that is faster there; on a GPU its kernels are recorded."""
    if device.type == "cpu":
        keep_freed()
    options: Any = {"memory_format": torch.channels_last} if faster_channels_last(device) else {}
    net = net.to(device, **options)
    return recorded(net) if device.type == "cuda" else net


def _labels(asked: Any, net: nn.Module, num_samples: int, checkpoint: Path) -> Tensor | None:
    """The label of each sample, (N,) int64; None for samples without labels."""
    if asked is None:
        return None
    num_classes = getattr(net, "num_classes", None)
    if num_classes is None:
        raise UserError(f"labels={asked} are asked for, and {checkpoint} {NO_LABELS}")
    if asked == "all":
        return cycled_labels(net, range(num_samples), torch.device("cpu"))
    if not isinstance(asked, list) or not asked or not all(type(y) is int and 0 <= y < num_classes for y in asked):
        raise UserError(f"labels={asked} must be all, or a list of whole numbers from 0 to {num_classes - 1}")
    return torch.tensor([asked[i % len(asked)] for i in range(num_samples)])


def save_npz(images: Tensor, labels: Tensor | None, path: Path) -> None:
    """arr_0 uint8 (N, H, W, C) in sample order, and arr_1 int64 labels: the layout of guided-diffusion's evaluator."""
    arrays = [images.permute(0, 2, 3, 1).contiguous().numpy()]
    if labels is not None:
        arrays.append(labels.numpy())
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, *arrays)


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


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name]:
        raise UserError(f"device={name} asks for a GPU and this machine has none; use device=cpu")
    return torch.device(name)
