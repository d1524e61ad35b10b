"""State dicts of improved-diffusion and guided-diffusion (ADM), which share their names.

The keys and shapes say what the network is, but for the size of its images, its heads, the order of q, k and v, and
the schedule. Both feed [cos, sin] of half as many frequencies, normalise with eps 1e-5 in 32 groups, and pad strided
convolutions by one pixel on each side. improved-diffusion tells its networks 1000 t / T.
"""

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from src.errors import UserError
from src.interop.table import Entry, Shapes, labels, permuted, places, pointwise, renamed, same
from src.models.attention import Attention
from src.models.blocks import Downsample, ResidualBlock, Stage, Upsample
from src.models.unet import UNet

Order = Literal["legacy", "new"]
# Output channels of qkv: legacy has each head's q, k and v together, new has all heads' q first, as here.
ORDERS: dict[Order, tuple[int, int, int]] = {"legacy": (1, 0, 2), "new": (0, 1, 2)}
BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
}


def infer(theirs: dict[str, Tensor], image_size: int | list[int], path: Path) -> dict[str, Any]:
    """The node of conf/model that the keys and shapes describe, without its heads.

    Raises:
        UserError: when the keys are not those of these networks.
    """
    shape = Shapes(theirs, path)
    blocks = ("input_blocks.0.0", "middle_block.0.in_layers.2", "output_blocks.0.0.in_layers.2")
    needed = [f"{name}.weight" for name in ("time_embed.0", *blocks, "out.2")]
    missing = [key for key in needed if key not in shape]
    if missing:
        raise UserError(
            f"{path} is no state dict of improved-diffusion or guided-diffusion: it lacks {', '.join(missing)}, and "
            f"has {', '.join(list(shape)[:3])}"
        )
    base = shape["time_embed.0.weight"][1]
    stem, channels = shape["input_blocks.0.0.weight"][:2]
    if channels == 6:
        raise UserError(
            f"{path} sees 6 channels, a noisy image and a smaller one that it enlarges; networks for super-resolution "
            "cannot be read"
        )
    outputs = 1 + max(int(key.split(".")[1]) for key in shape if key.startswith("output_blocks."))

    def resamples(block: str) -> tuple[bool, bool]:
        """Whether what comes after a block's residual block doubles the resolution: by a convolution, by a block."""
        after = [f"{block}.{i}" for i in (1, 2)]
        return any(f"{a}.conv.weight" in shape for a in after), any(f"{a}.in_layers.2.weight" in shape for a in after)

    ups = [resamples(f"output_blocks.{i}") for i in range(outputs)]
    levels = 1 + sum(conv or block for conv, block in ups)
    each = outputs // levels  # residual blocks a level on the way up
    first = [1 + level * each for level in range(levels)]  # of each level, among the input blocks
    widths = [shape.get(f"input_blocks.{i}.0.out_layers.3.weight", (0,))[0] for i in first]
    if outputs % levels or 0 in widths:
        raise UserError(f"{path} has {outputs} output blocks and {levels} levels, which fit no network of this kind")
    height = image_size if isinstance(image_size, int) else image_size[0]
    attending = [level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in shape]
    out = shape["out.2.weight"][0]
    middle = "middle_block.0"
    node: dict[str, Any] = {
        "_target_": "src.models.unet.UNet",
        "channels": channels,
        "image_size": image_size,
        "base_channels": base,
        "channel_mults": [w // base if w % base == 0 else w / base for w in widths],
        "num_res_blocks": each - 1,
        "attention_resolutions": [height // 2**level for level in attending],
        "dropout": 0.0,
        "norm_eps": 1e-5,
        "min_group_channels": 1,
        "num_classes": shape["label_emb.weight"][0] if "label_emb.weight" in shape else None,
        "learned_variance": out == 2 * channels,
        "scale_shift_norm": shape[f"{middle}.emb_layers.1.weight"][0] == 2 * shape[f"{middle}.in_layers.2.weight"][0],
        "resampling": "residual" if any(block for _, block in ups) else "conv",
        "padding": "symmetric",
        "wide_stem": stem == widths[0],
        "cosine_first": True,
        "endpoint": False,
    }
    return node


def entries(net: UNet, order: Order = "legacy") -> list[Entry]:
    """The table of its weights."""
    found = [
        *same("time_embedding.1", "time_embed.0"),
        *same("time_embedding.3", "time_embed.2"),
        *same("conv_in", "input_blocks.0.0"),
        *same("norm_out", "out.0"),
        *same("conv_out", "out.2"),
    ]
    if net.label_embedding is not None:
        found += labels("label_embedding", "label_emb", with_none=False)
    down, up = places(net)
    for i, place in enumerate(down, 1):
        prefix = f"input_blocks.{i}"
        if isinstance(place.layer, Stage):
            found += _stage(place.name, place.layer, prefix, order)
        elif isinstance(place.layer, ResidualBlock):
            found += renamed(place.name, place.layer, f"{prefix}.0", BLOCK)
        elif isinstance(place.layer, Downsample):
            found += same(f"{place.name}.conv", f"{prefix}.0.op")
    number, parts = -1, 0
    for place in up:  # what doubles the resolution stands behind the last block of a level, in its sequence
        if isinstance(place.layer, Stage):
            number, parts = number + 1, 1 + (place.layer.attention is not None)
            found += _stage(place.name, place.layer, f"output_blocks.{number}", order)
        elif isinstance(place.layer, ResidualBlock):
            found += renamed(place.name, place.layer, f"output_blocks.{number}.{parts}", BLOCK)
        elif isinstance(place.layer, Upsample):
            found += same(f"{place.name}.conv", f"output_blocks.{number}.{parts}.conv")
    before, after = net.middle
    assert isinstance(before, Stage)
    assert isinstance(after, Stage)
    found += _stage("middle.0", before, "middle_block", order)
    return found + renamed("middle.1.block", after.block, f"middle_block.{1 + (before.attention is not None)}", BLOCK)


def _stage(ours: str, stage: Stage, theirs: str, order: Order) -> list[Entry]:
    found = renamed(f"{ours}.block", stage.block, f"{theirs}.0", BLOCK)
    return found if stage.attention is None else found + _attention(ours, stage.attention, f"{theirs}.1", order)


def _attention(ours: str, attention: Attention, theirs: str, order: Order) -> list[Entry]:
    qkv = pointwise(f"{ours}.attention.qkv", f"{theirs}.qkv", ndim=3)
    return [
        *renamed(f"{ours}.attention", attention, theirs, {"norm": "norm"}),
        *permuted(qkv, attention.num_heads, ORDERS[order]),
        *pointwise(f"{ours}.attention.proj", f"{theirs}.proj_out", ndim=3),
    ]
