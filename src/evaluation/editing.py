"""Edits of image files by a trained run, as files: grid.png (before, mask or noise, after), samples.npz, edit*.png."""

import json
from collections.abc import Iterator
from math import hypot
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from src.build import check_seed, refusals
from src.data.loader import normalize
from src.diffusion.editing import adds_noise, inpaint, invert, no_noise, noised, slerp
from src.diffusion.guidance import as_guess
from src.diffusion.levels import Level, Schedule
from src.diffusion.samplers import Sampler, Step, StepSampler, state_dtype
from src.errors import UserError
from src.evaluation.sampling import Setup, save_npz, set_up
from src.files import replacing
from src.pictures import enlarge, grid, save_png, to_uint8
from src.randomness import NoiseStream

MASK = "white is painted anew, black is kept"
THRESHOLD = 128  # of a mask's grey levels: from here on it is white
FRAME = 128  # grey around each image of the picture: masks are white and black, and so may images be
ROWS = 16  # of the picture, at most
INPUTS = {"image": "<file>", "mask": "<file>", "images": "[a.png,b.png]", "seeds": "[0,1]"}  # keys, as one gives them
NEEDS = {  # of the inputs, one of these sets and no more
    "inpaint": [["image", "mask"]],
    "translate": [["image"]],
    "interpolate": [["images"], ["seeds"]],
    "invert": [["image"]],
}
MODES = {1: "L", 3: "RGB"}  # Pillow's names, by channels


class Edit(NamedTuple):
    """What a verb made.

    Attributes:
        after: (N, C, H, W) uint8.
        picture: (M, C, H, W) uint8, the images of the picture row by row, `columns` in a row.
        metrics: of what was inverted, else empty: the error of the reconstruction in grey levels, and latent_std, the
            latents' standard deviation over that of an image with the first level's noise: 1 if they look like noise.
    """

    after: Tensor
    picture: Tensor
    columns: int
    metrics: dict[str, float]


def edit(config: dict[str, Any], out: Path) -> None:
    """Does config["verb"] with the run config["run"] and writes what came of it into the folder `out`.

    Edit i depends on (weights, sampler, files, seed, i) alone.

    Raises:
        UserError: for whatever the user can mend, before anything is written.
    """
    verb = config["verb"]
    _check_inputs(config)
    setup = set_up(config, {"interpolate": config["num_frames"], "invert": 1}.get(verb, config["num_samples"]))
    reason = refusal(verb, config["images"] is not None, setup.sampler, setup.diffusion.schedule)
    if reason:
        raise UserError(reason)
    print(
        f"{verb} with {setup.run.checkpoint}, {config['weights']} weights, {type(setup.sampler).__name__}, "
        f"{setup.steps} steps, {setup.device.type}"
    )
    with torch.no_grad(), setup.precision, refusals(verb):
        made = VERBS[verb](setup, config)

    names = ["edit.png"] if len(made.after) == 1 else [f"edit-{i}.png" for i in range(len(made.after))]
    for image, name in zip(made.after, names, strict=True):
        save_png(image, out / name)
    save_npz(made.after, setup.labels, out / "samples.npz")
    height = made.after.shape[2]
    framed = torch.nn.functional.pad(made.picture, [max(1, height // 28)] * 4, value=FRAME)
    save_png(grid(framed, made.columns, gap=0), out / "grid.png", enlarge(height))
    written = ["grid.png", "samples.npz", names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"]
    if made.metrics:
        with replacing(out / "metrics.json") as temporary:
            temporary.write_text(json.dumps(made.metrics, indent=2) + "\n")
        written.append("metrics.json")
        print("  " + ", ".join(f"{key} {value:.4g}" for key, value in made.metrics.items()))
    for name in written:
        print(f"  {out / name}")


def refusal(verb: str, images: bool, sampler: Sampler, schedule: Schedule) -> str | None:
    """Why a sampler cannot do a verb, in a sentence; None if it can.

    Args:
        images: whether the verb starts from several images.
    """
    if (verb in ("inpaint", "invert") or images) and not isinstance(sampler, StepSampler):
        return (
            f"{verb} goes step by step, which {type(sampler).__name__} does not; choose sampler=ddim or sampler=euler"
        )
    if verb in ("interpolate", "invert") and adds_noise(sampler, schedule):
        return (
            f"{verb} needs images to be a function of their latents, and this {type(sampler).__name__} adds noise; "
            "choose sampler=ddim sampler.eta=0"
        )
    return None


def read_image(key: str, path: str, channels: int) -> Tensor:
    """A picture, (C, H, W) uint8, upright, with the channels of the model.

    Raises:
        UserError: when it cannot be read, or has more than 8 bits a number; `key` names the setting.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if channels not in MODES:
        raise UserError(f"{key}={path}: pictures have 1 or 3 channels, and the model's images {channels}")
    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":
                raise UserError(f"{key}={path} has more than 8 bits a pixel ({picture.mode}); save it with 8")
            converted = ImageOps.exif_transpose(picture).convert(MODES[channels])
    except UnidentifiedImageError as error:
        raise UserError(f"{key}={path} is not a picture that Pillow can read; give a PNG or JPEG file") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{key}={path} cannot be read: {reason}; give a PNG or JPEG file") from error
    flat = torch.frombuffer(bytearray(converted.tobytes()), dtype=torch.uint8)
    return flat.view(converted.height, converted.width, channels).permute(2, 0, 1).contiguous()


def read_mask(path: str, size: tuple[int, ...]) -> Tensor:
    """(1, H, W) bool, true where the file is white: to be painted anew.

    Raises:
        UserError: when it cannot be read, is of another size, or keeps everything.
    """
    mask = read_image("mask", path, 1)
    if mask.shape[1:] != size:
        raise UserError(f"mask={path} is {_size(mask.shape)} and the image {_size(size)}, height x width; {MASK}")
    white = mask >= THRESHOLD
    if not white.any():
        raise UserError(f"mask={path} keeps every pixel, so there is nothing to paint: {MASK}")
    return white


def _check_inputs(config: dict[str, Any]) -> None:
    verb = config["verb"]
    given = [key for key in INPUTS if config[key] is not None]
    if given not in NEEDS[verb]:
        wants = " or ".join(" and ".join(f"{key}={INPUTS[key]}" for key in keys) for keys in NEEDS[verb])
        about = f" ({MASK})" if verb == "inpaint" else ""
        raise UserError(f"verb={verb} needs {wants}{about}; given: {', '.join(given) or 'nothing'}")
    if verb == "interpolate":
        if len(config[given[0]]) != 2:
            raise UserError(f"{given[0]}={config[given[0]]} must be two, to interpolate between")
        for seed in config["seeds"] or []:
            check_seed("seeds", seed)
        if config["num_frames"] < 2:
            raise UserError(f"num_frames={config['num_frames']} must be at least 2: both ends are frames")


def _check_size(setup: Setup, key: str, path: str, image: Tensor) -> None:
    """Asks the network for an image of this size, unless it is the run's own.

    Raises:
        UserError: naming both sizes when it cannot take it.
    """
    if image.shape == setup.shape:
        return
    zeros = torch.zeros(1, *image.shape, device=setup.device)
    try:
        fits = as_guess(setup.diffusion.denoiser(setup.net)(zeros, _path(setup)[0])).x0.shape == zeros.shape
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):  # how a network refuses is its own
        fits = False
    if not fits:
        raise UserError(
            f"{key}={path} is {_size(image.shape)}, height x width, and the run's network, made for "
            f"{_size(setup.shape)}, cannot take that; resize or crop it"
        )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[-2]}x{shape[-1]}"


def _inpaint(setup: Setup, config: dict[str, Any]) -> Edit:
    before = _read(setup, "image", config["image"])
    white = read_mask(config["mask"], before.shape[1:])
    assert isinstance(setup.sampler, StepSampler)
    known, mask = _normalized(setup, before), white.to(setup.device)
    schedule, n = setup.diffusion.schedule, config["num_samples"]
    after = []
    with _bar("inpainting", n * setup.steps * config["resample"]) as bar:
        for indices in _batches(n, config["batch_size"]):
            noise = NoiseStream(config["seed"], indices, before.shape, setup.device)
            x = noise.first.to(known.dtype) * schedule.prior_std(_path(setup)[0])
            steps = inpaint(
                setup.denoiser(indices),
                setup.sampler,
                schedule,
                x,
                known,
                mask,
                noise,
                config["resample"],
                config["jump"],
            )
            after.append(_images(_last(setup, steps, bar, len(indices))))
    middle = (white * 255).to(torch.uint8).expand_as(before)
    return _rows(before, middle.expand(n, *before.shape), torch.cat(after))


def _translate(setup: Setup, config: dict[str, Any]) -> Edit:
    before = _read(setup, "image", config["image"])
    known, path, n = _normalized(setup, before), _path(setup), config["num_samples"]
    _, skip = noised(path, known, known, config["strength"])
    middle, after = [], []
    with _bar("translating", n * (setup.steps - skip)) as bar:
        for indices in _batches(n, config["batch_size"]):
            noise = NoiseStream(config["seed"], indices, before.shape, setup.device)
            x, _ = noised(path, known, noise.first, config["strength"])
            middle.append(_visible(x, path[skip]))
            steps = setup.sampler(setup.denoiser(indices), setup.diffusion.schedule, x, noise, skip)
            after.append(_images(_last(setup, steps, bar, len(indices))))
    return _rows(before, torch.cat(middle), torch.cat(after))


def _interpolate(setup: Setup, config: dict[str, Any]) -> Edit:
    if setup.labels is not None and len(setup.labels.unique()) > 1:
        raise UserError(f"labels={config['labels']}: all frames of an interpolation have one label; give labels=[3]")
    n, schedule = config["num_frames"], setup.diffusion.schedule
    shares = torch.linspace(0, 1, n, dtype=torch.float64)
    before = None
    if config["seeds"] is not None:
        a, b = (NoiseStream(seed, range(1), setup.shape, setup.device).first[0] for seed in config["seeds"])
        dtype, scale = state_dtype(setup.sampler, setup.device), schedule.prior_std(_path(setup)[0])
        latents = slerp(a, b, shares).to(dtype) * scale
    else:
        before = torch.stack(_pair(setup, config["images"]))
        a, b = _inverted(setup, config, before)
        latents = slerp(a, b, shares)
    after = []
    with _bar("interpolating", n * setup.steps) as bar:
        for indices in _batches(n, config["batch_size"]):
            x = latents[indices.start : indices.stop]
            steps = setup.sampler(setup.denoiser(indices), schedule, x, no_noise)
            after.append(_images(_last(setup, steps, bar, len(indices))))
    frames = torch.cat(after)
    if before is None:
        return Edit(frames, frames, n, {})
    picture = torch.cat([before[:1], frames, before[1:]])
    return Edit(frames, picture, n + 2, _errors(before, frames[[0, -1]]))


def _invert(setup: Setup, config: dict[str, Any]) -> Edit:
    before = _read(setup, "image", config["image"])[None]
    first = _path(setup)[0]
    latents = _inverted(setup, config, before)
    with _bar("reconstructing", setup.steps) as bar:
        steps = setup.sampler(setup.denoiser(range(1)), setup.diffusion.schedule, latents, no_noise)
        after = _images(_last(setup, steps, bar, 1))
    std = float(latents.std()) / hypot(first.alpha * float(_normalized(setup, before).std()), first.sigma)
    return _rows(before[0], _visible(latents, first), after)._replace(
        metrics={**_errors(before, after), "latent_std": std}
    )


VERBS = {"inpaint": _inpaint, "translate": _translate, "interpolate": _interpolate, "invert": _invert}


def _inverted(setup: Setup, config: dict[str, Any], images: Tensor) -> Tensor:
    """The latents, (B, C, H, W), of uint8 images."""
    assert isinstance(setup.sampler, StepSampler)
    iterations = config["inversion_iterations"]
    x, denoise = _normalized(setup, images), setup.denoiser(range(len(images)))
    with _bar("inverting", len(images) * setup.steps) as bar:
        return _last(setup, invert(denoise, setup.sampler, setup.diffusion.schedule, x, iterations), bar, len(images))


def _errors(before: Tensor, after: Tensor) -> dict[str, float]:
    """How far uint8 images are from their reconstructions, in grey levels of 255."""
    difference = after.double() - before.double()
    return {"rmse_of_255": float(difference.square().mean().sqrt()), "max_of_255": float(difference.abs().max())}


def _read(setup: Setup, key: str, path: str) -> Tensor:
    image = read_image(key, path, setup.shape[0])
    _check_size(setup, key, path, image)
    return image


def _pair(setup: Setup, paths: list[str]) -> list[Tensor]:
    a, b = (_read(setup, "images", path) for path in paths)
    if a.shape != b.shape:
        raise UserError(f"images={paths} are {_size(a.shape)} and {_size(b.shape)}, height x width: give one size")
    return [a, b]


def _normalized(setup: Setup, images: Tensor) -> Tensor:
    """uint8 images as the sampler's states."""
    return normalize(images).to(setup.device, state_dtype(setup.sampler, setup.device))


def _path(setup: Setup) -> list[Level]:
    return setup.sampler.path(setup.diffusion.schedule)


def _batches(n: int, size: int) -> Iterator[range]:
    return (range(n)[low : low + size] for low in range(0, n, size))


def _last(setup: Setup, steps: Iterator[Step], bar: "tqdm[Any]", n: int) -> Tensor:
    """The states, (B, C, H, W), after the last step of n images."""
    x = torch.empty(0)
    for step in steps:
        x = step.x
        bar.update(n)
    return setup.finite(x)


def _bar(name: str, total: int) -> "tqdm[Any]":
    return tqdm(total=total, desc=name, unit="image step", dynamic_ncols=True)


def _images(x: Tensor) -> Tensor:
    """uint8, on the CPU."""
    return to_uint8(x).cpu()


def _visible(x: Tensor, level: Level) -> Tensor:
    """Noisy images as uint8, in the scale of images."""
    return _images(x / hypot(level.alpha, level.sigma))


def _rows(before: Tensor, middle: Tensor, after: Tensor) -> Edit:
    """before | middle | after, a row for each of the first edits."""
    triples = torch.stack([before.expand_as(after), middle, after], dim=1)
    return Edit(after, triples[:ROWS].flatten(0, 1), 3, {})
