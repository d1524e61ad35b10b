"""State dicts of EDM's networks (Karras et al. 2022): DDPM++ ("SongUNet") and ADM ("DhariwalUNet").

The keys and shapes say what the network is, the size of its images and its augmentation labels included. As EDM's own
files are pickles with code in them, a state dict has to be saved where that code is trusted:
torch.save(net.model.state_dict(), ...), or safetensors.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from src.errors import UserError
from src.interop.source import Source
from src.interop.table import Entry, Shapes, infers, permuted, places, read_table, renamed, same, without_memory
from src.interop.weights import read_tensors
from src.models.blocks import ResidualBlock, Stage
from src.models.unet import UNet

BLOCK = {"norm1": "norm0", "conv1": "conv0", "time": "affine", "norm2": "norm1", "conv2": "conv1", "shortcut": "skip"}
ATTENTION = {"norm": "norm2", "proj": "proj"}
QKV = (1, 2, 0)  # (heads, d, 3)
CHANNELS_PER_HEAD = 64  # of ADM; DDPM++ has one head
UNUSED = re.compile(r"(^|\.)resample_filter$")
PARTS: dict[str, dict[str, Any]] = {
    "schedule": {"_target_": "src.diffusion.continuous.Karras", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0},
    "objective": {"_target_": "src.diffusion.objectives.Edm", "sigma_data": 0.5},
    "density": {"_target_": "src.diffusion.densities.LogNormal", "mean": -1.2, "std": 1.2},
    "sampler": {"_target_": "src.diffusion.solvers.Heun", "steps": 18, "clip": False, "double": True},
}


def is_one(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is a state dict of EDM's networks."""
    return any("map_layer0." in key for key in keys)


def read(path: Path) -> Source:
    """A state dict in a file.

    Raises:
        UserError: when it is none of these networks'.
    """
    theirs = stripped(read_tensors(path))
    with infers(path):
        model = infer(theirs, path)

    def state(node: dict[str, Any]) -> dict[str, Tensor]:
        net = cast(UNet, without_memory(node))
        return read_table(entries(net, model["image_size"]), theirs, net, path)

    return Source({"model": model, **PARTS}, path, state)


def stripped(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their state without the prefix of the preconditioning around it, and without what is not needed."""
    prefix = "model." if all(key.startswith("model.") for key in theirs) else ""
    return {key.removeprefix(prefix): v for key, v in theirs.items() if not UNUSED.search(key)}


def infer(theirs: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The node of conf/model that the keys and shapes describe.

    Args:
        theirs: see `stripped`.

    Raises:
        UserError: when the keys are not those of these networks, or are NCSN++'s.
    """
    shape = Shapes(theirs, path)
    sizes = sorted({int(n) for key in shape for n in re.findall(r"^enc\.(\d+)x\1_", key)}, reverse=True)
    if not sizes or "map_layer0.weight" not in shape:
        raise UserError(
            f"{path} is no state dict of EDM's networks: it has {', '.join(list(shape)[:3])}, and they have "
            "map_layer0.weight and enc.32x32_conv.weight"
        )
    if "map_noise.freqs" in shape or any(re.match(r"enc\.\d+x\d+_aux", key) for key in shape):
        raise UserError(f"{path} is an NCSN++, whose encoder has inputs at every level; DDPM++ and ADM can be read")
    size, low = sizes[0], sizes[-1]
    song = f"dec.{size}x{size}_aux_norm.weight" in shape
    base = shape["map_layer0.weight"][1]
    stem, channels = shape[f"enc.{size}x{size}_conv.weight"][:2]
    widths = [shape[f"enc.{n}x{n}_block0.conv0.weight"][0] for n in sizes]
    blocks = sum(f"enc.{size}x{size}_block{i}.conv0.weight" in shape for i in range(1000))
    attending = [n for n in sizes if f"enc.{n}x{n}_block0.qkv.weight" in shape]
    last = any(f"dec.{n}x{n}_block0.qkv.weight" not in shape for n in attending)
    rows = shape[f"dec.{low}x{low}_in1.affine.weight"][0]
    return {
        "_target_": "src.models.unet.UNet",
        "channels": channels,
        "image_size": size,
        "base_channels": base,
        "channel_mults": [w // base if w % base == 0 else w / base for w in widths],
        "num_res_blocks": blocks,
        "attention_resolutions": attending,
        "num_heads": 1,
        "channels_per_head": None if song else CHANNELS_PER_HEAD,
        "up_attention": "last" if last else "all",
        "dropout": 0.0,
        "norm_eps": 1e-6 if song else 1e-5,
        "min_group_channels": 4,
        "num_classes": shape["map_label.weight"][1] if "map_label.weight" in shape else None,
        "early_labels": song,
        "scale_shift_norm": rows == 2 * widths[-1],
        "resampling": "residual_projected" if song else "residual",
        "skip_scale": math.sqrt(0.5) if song else 1.0,
        "wide_stem": stem == widths[0] and stem != base,
        "cosine_first": not song,
        "endpoint": song,
        "augment_dim": shape["map_augment.weight"][1] if "map_augment.weight" in shape else 0,
    }


def entries(net: UNet, size: int) -> list[Entry]:
    """The table of its weights.

    Args:
        size: height and width of its images.
    """
    song = net.early_labels
    out = (f"dec.{size}x{size}_aux_norm", f"dec.{size}x{size}_aux_conv") if song else ("out_norm", "out_conv")
    found = [
        *same("time_embedding.1", "map_layer0"),
        *same("time_embedding.3", "map_layer1"),
        *same("conv_in", f"enc.{size}x{size}_conv"),
        *same("norm_out", out[0]),
        *same("conv_out", out[1]),
    ]
    if net.num_classes is not None:
        found.append(_labels(net.num_classes, song))
    if net.augment_dim:
        found.append(Entry("augment_embedding.weight", ("map_augment.weight",), lambda v: v, lambda v: (v,)))
    down, up = places(net)
    for side, layers in (("enc", down), ("dec", up)):
        for place in layers:
            n = size // 2**place.level
            if isinstance(place.layer, Stage):
                found += _stage(place.name, place.layer, f"{side}.{n}x{n}_block{place.number}")
            elif isinstance(place.layer, ResidualBlock):
                n = n // 2 if side == "enc" else 2 * n  # named after where it leads
                found += renamed(place.name, place.layer, f"{side}.{n}x{n}_{'down' if side == 'enc' else 'up'}", BLOCK)
    n = size // 2 ** up[0].level
    for i, stage in enumerate(net.middle):
        assert isinstance(stage, Stage)
        found += _stage(f"middle.{i}", stage, f"dec.{n}x{n}_in{i}")
    return found


def _stage(ours: str, stage: Stage, theirs: str) -> list[Entry]:
    found = renamed(f"{ours}.block", stage.block, theirs, BLOCK)
    if stage.attention is not None:
        found += renamed(f"{ours}.attention", stage.attention, theirs, ATTENTION)
        found += permuted(same(f"{ours}.attention.qkv", f"{theirs}.qkv"), stage.attention.num_heads, QKV)
    return found


def _labels(num_classes: int, song: bool) -> Entry:
    """Theirs is a layer over one-hot vectors, in DDPM++ times sqrt(num_classes) and with a bias; "none" is zeros."""
    key = "label_embedding.table.weight"
    scale = math.sqrt(num_classes)

    def read(weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat([weight.T * scale + bias, bias[None]])

    def write(v: Tensor) -> tuple[Tensor, ...]:
        return ((v[:-1] - v[-1:]).T / scale, v[-1])

    if song:
        return Entry(key, ("map_label.weight", "map_label.bias"), read, write)
    return Entry(
        key, ("map_label.weight",), lambda v: torch.cat([v.T, torch.zeros_like(v.T[:1])]), lambda v: (v[:-1].T,)
    )
