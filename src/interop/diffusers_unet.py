"""diffusers' UNet2DModel: its configuration and its keys against those of `UNet`."""

import inspect
from typing import Any, Literal

from torch import nn

from src.build import check_value
from src.errors import UserError
from src.interop.table import Entry, Place, labels, places, pointwise, renamed, same, split
from src.models.blocks import Downsample, ResidualBlock, Stage, Upsample
from src.models.unet import UNet

CLASS = "UNet2DModel"
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
TYPES: dict[str, Any] = {
    "sample_size": int | tuple[int, int] | None,
    "in_channels": int,
    "out_channels": int,
    "time_embedding_dim": int | None,
    "down_block_types": list[str],
    "up_block_types": list[str],
    "block_out_channels": list[int],
    "layers_per_block": int,
    "flip_sin_to_cos": bool,
    "downsample_type": Literal["conv", "resnet"],
    "upsample_type": Literal["conv", "resnet"],
    "dropout": float,
    "attention_head_dim": int | None,
    "norm_num_groups": int,
    "attn_norm_num_groups": int | None,
    "norm_eps": float,
    "add_attention": bool,
    "num_class_embeds": int | None,
}
# What of it can be only so here.
FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0, 1),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (0, 1),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
KINDS = {
    "DownBlock2D": "conv",
    "UpBlock2D": "conv",
    "ResnetDownsampleBlock2D": "resnet",
    "ResnetUpsampleBlock2D": "resnet",
}
ATTENDING = ("AttnDownBlock2D", "AttnUpBlock2D")
BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # before diffusers 0.16


def read_config(theirs: dict[str, Any], path: Any) -> dict[str, Any]:
    """The node of conf/model that is the same network.

    Raises:
        UserError: for what `UNet` does not have.
    """
    given = {**DEFAULTS, **{k: v for k, v in theirs.items() if not k.startswith("_")}}
    for key in given:
        if key not in DEFAULTS:
            raise UserError(f"{path}: {key}={given[key]} is not a setting of {CLASS} that this project knows")
    for key, allowed in FIXED.items():
        if given[key] not in allowed:
            raise UserError(f"{path}: {key}={given[key]} cannot be read; it must be {' or '.join(map(str, allowed))}")
    for key, hint in TYPES.items():
        check_value(f"{path}: {key}", given[key], hint)
    widths, channels, out = given["block_out_channels"], given["in_channels"], given["out_channels"]
    down, up = given["down_block_types"], given["up_block_types"]
    if not widths or min(widths) < 1 or len(down) != len(widths) or len(up) != len(widths):
        raise UserError(
            f"{path}: block_out_channels={widths}, {len(down)} down_block_types and {len(up)} up_block_types must be "
            "as many, and at least one, each of a channel or more"
        )
    if out not in (channels, 2 * channels):
        raise UserError(f"{path}: out_channels={out} must be in_channels={channels}, or twice as many")
    if given["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise UserError(f"{path}: time_embedding_dim={given['time_embedding_dim']} must be {4 * widths[0]}")
    if given["sample_size"] is None:
        raise UserError(f"{path}: sample_size is missing, the height and width of the images; write it there")
    size = given["sample_size"]
    height = size if isinstance(size, int) else size[0]
    attend = [kind in ATTENDING for kind in down]
    for side, kinds in (("Down", down), ("Up", up)):
        known = [kind for kind in (*KINDS, *ATTENDING) if side in kind]
        if unknown := [kind for kind in kinds if kind not in known]:
            raise UserError(
                f"{path}: {side.lower()}_block_types with {unknown[0]} cannot be read; {', '.join(known)} can"
            )
    if [kind in ATTENDING for kind in reversed(up)] != attend:
        raise UserError(f"{path}: up_block_types must have attention at the levels where down_block_types have it")
    steps = [KINDS.get(kind, given["downsample_type"]) for kind in down[:-1]]
    steps += [KINDS.get(kind, given["upsample_type"]) for kind in up[:-1]]
    if len(set(steps)) > 1:
        raise UserError(f"{path}: some levels resample by convolutions and some by residual blocks; it must be one")
    groups = given["attn_norm_num_groups"]  # of the attention in the middle; with scale_shift, None is none
    if groups not in (None, given["norm_num_groups"]):
        raise UserError(f"{path}: attn_norm_num_groups must be norm_num_groups={given['norm_num_groups']}")
    scale_shift = given["resnet_time_scale_shift"] == "scale_shift"
    return {
        "_target_": "src.models.unet.UNet",
        "channels": channels,
        "image_size": size if isinstance(size, int) else list(size),
        "base_channels": widths[0],
        "channel_mults": [w // widths[0] if w % widths[0] == 0 else w / widths[0] for w in widths],
        "num_res_blocks": given["layers_per_block"],
        "attention_resolutions": [height // 2**level for level, attends in enumerate(attend) if attends],
        "channels_per_head": given["attention_head_dim"],
        "middle_attention": given["add_attention"],
        "middle_norm": groups is not None or not scale_shift,
        "dropout": given["dropout"],
        "norm_groups": given["norm_num_groups"],
        "norm_eps": given["norm_eps"],
        "min_group_channels": 1,
        "num_classes": given["num_class_embeds"],
        "learned_variance": out == 2 * channels,
        "scale_shift_norm": scale_shift,
        "resampling": "residual" if steps[:1] == ["resnet"] else "conv",
        "padding": "tensorflow" if given["downsample_padding"] == 0 else "symmetric",
        "cosine_first": given["flip_sin_to_cos"],
        "endpoint": given["freq_shift"] == 1,
    }


def write_config(node: dict[str, Any], net: UNet) -> dict[str, Any]:
    """UNet2DModel's configuration of the same network.

    Args:
        node: of conf/model.

    Raises:
        UserError: for what UNet2DModel does not have.
    """
    defaults = {k: p.default for k, p in inspect.signature(UNet).parameters.items()}
    ours: dict[str, Any] = {**defaults, **{k: v for k, v in node.items() if k != "_target_"}}
    must: dict[str, Any] = {"patch_size": 1, "self_conditioning": False, "skip_scale": 1, "time_scale": 1}
    must |= {"early_labels": False, "augment_dim": 0}
    for key, value in must.items():
        if ours[key] != value:
            raise _inexpressible(f"model.{key}={ours[key]}")
    unnormed = ours["middle_attention"] and not ours["middle_norm"]
    if unnormed and not ours["scale_shift_norm"]:
        raise _inexpressible("model.middle_norm=false without model.scale_shift_norm=true")
    if ours["resampling"] == "residual_projected":
        raise _inexpressible("model.resampling=residual_projected")
    groups = {m.num_groups for m in net.modules() if isinstance(m, nn.GroupNorm)}
    if len(groups) > 1:
        raise _inexpressible(f"a network whose group norms have {' or '.join(map(str, sorted(groups)))} groups")
    widths = [round(ours["base_channels"] * mult) for mult in ours["channel_mults"]]
    if widths[0] != ours["base_channels"]:
        raise _inexpressible(f"model.channel_mults={list(ours['channel_mults'])}, whose first is not 1,")
    stages_down, stages_up = places(net)
    attend = _attending(stages_down, len(widths))
    if ours["up_attention"] == "last" and any(attend):
        raise _inexpressible("model.up_attention=last")
    heads = {place.layer.attention for place in [*stages_down, *stages_up] if isinstance(place.layer, Stage)}
    heads.add(net.middle[0].attention)  # type: ignore[arg-type]
    dims = {a.proj.in_channels // a.num_heads for a in heads if a is not None}
    one_head = all(a.num_heads == 1 for a in heads if a is not None)
    if len(dims) > 1 and not one_head:
        raise _inexpressible(f"model.num_heads={ours['num_heads']} at levels of different widths")
    residual = ours["resampling"] == "residual"
    kinds = {side: ["ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"][side == "Up"] for side in ("Down", "Up")}
    names = [[f"Attn{s}Block2D" if a else kinds[s] if residual else f"{s}Block2D" for a in attend] for s in kinds]
    size = ours["image_size"]
    return {
        **DEFAULTS,
        "_class_name": CLASS,
        "_diffusers_version": "0.30.0",
        "sample_size": size if isinstance(size, int) else list(size),
        "in_channels": ours["channels"],
        "out_channels": ours["channels"] * (1 + ours["learned_variance"]),
        "freq_shift": int(ours["endpoint"]),
        "flip_sin_to_cos": ours["cosine_first"],
        "down_block_types": names[0],
        "up_block_types": names[1][::-1],
        "block_out_channels": widths,
        "layers_per_block": ours["num_res_blocks"],
        "downsample_padding": 0 if ours["padding"] == "tensorflow" else 1,
        "downsample_type": "resnet" if residual else "conv",
        "upsample_type": "resnet" if residual else "conv",
        "dropout": ours["dropout"],
        "attention_head_dim": None if one_head else dims.pop(),
        "norm_num_groups": groups.pop(),
        "attn_norm_num_groups": None if unnormed else net.norm_out.num_groups,
        "norm_eps": ours["norm_eps"],
        "resnet_time_scale_shift": "scale_shift" if ours["scale_shift_norm"] else "default",
        "add_attention": ours["middle_attention"],
        "num_class_embeds": None if ours["num_classes"] is None else ours["num_classes"] + 1,
    }


def entries(net: UNet, with_none: bool = True, old: bool = False) -> list[Entry]:
    """The table of its weights.

    Args:
        with_none: its labels hold "none", as those that this project writes do.
        old: attention has its names of before diffusers 0.16.
    """
    found = [
        *same("conv_in", "conv_in"),
        *same("time_embedding.1", "time_embedding.linear_1"),
        *same("time_embedding.3", "time_embedding.linear_2"),
        *same("norm_out", "conv_norm_out"),
        *same("conv_out", "conv_out"),
    ]
    if net.label_embedding is not None:
        found += labels("label_embedding", "class_embedding", with_none)
    down, up = places(net)
    for side, layers in (("down", down), ("up", up)):
        for place in layers:
            block = place.level if side == "down" else up[0].level - place.level
            prefix = f"{side}_blocks.{block}"
            if isinstance(place.layer, Stage):
                found += _stage(place.name, place.layer, prefix, place.number, old)
            elif isinstance(place.layer, Downsample | Upsample):
                found += same(f"{place.name}.conv", f"{prefix}.{side}samplers.0.conv")
            elif isinstance(place.layer, ResidualBlock):
                found += renamed(place.name, place.layer, f"{prefix}.{side}samplers.0", BLOCK)
    for i, stage in enumerate(net.middle):
        assert isinstance(stage, Stage)
        found += _stage(f"middle.{i}", stage, "mid_block", i, old)
    return found


def _stage(ours: str, stage: Stage, prefix: str, index: int, old: bool) -> list[Entry]:
    found = renamed(f"{ours}.block", stage.block, f"{prefix}.resnets.{index}", BLOCK)
    if stage.attention is not None:
        theirs = f"{prefix}.attentions.{index}"
        q, k, v, out = (OLD_ATTENTION[name] if old else name for name in OLD_ATTENTION)
        found += renamed(f"{ours}.attention", stage.attention, theirs, {"norm": "group_norm"})
        found += split(f"{ours}.attention.qkv", (f"{theirs}.{name}" for name in (q, k, v)), linear=True)
        found += pointwise(f"{ours}.attention.proj", f"{theirs}.{out}", ndim=2)
    return found


def _attending(down: list[Place], levels: int) -> list[bool]:
    """Whether a level has attention."""
    stages = [(place.level, place.layer) for place in down if isinstance(place.layer, Stage)]
    return [any(at == level and stage.attention is not None for at, stage in stages) for level in range(levels)]


def _inexpressible(what: str) -> UserError:
    return UserError(f"{what} has no place in diffusers' {CLASS}; use format=safetensors, which holds any network")
