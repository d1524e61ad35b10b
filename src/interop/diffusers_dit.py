"""diffusers' DiTTransformer2DModel: its configuration and its keys against those of `DiT`."""

import inspect
from typing import Any

from src.build import check_value
from src.errors import UserError
from src.interop.table import Entry, labels, pointwise, same, split
from src.models.dit import DiT

CLASS = "DiTTransformer2DModel"
# What of its configuration can be only so here.
FIXED: dict[str, Any] = {
    "dropout": 0.0,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
EPS = (1e-5, 1e-6)  # of every second norm; DiT's own code has 1e-6, its published configuration there 1e-5

DEFAULTS: dict[str, Any] = {
    **FIXED,
    "norm_eps": 1e-5,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "norm_num_groups": 32,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
}
TYPES: dict[str, Any] = {
    "num_attention_heads": int,
    "attention_head_dim": int,
    "in_channels": int,
    "out_channels": int | None,
    "num_layers": int,
    "sample_size": int,
    "patch_size": int,
    "num_embeds_ada_norm": int,
}


def read_config(theirs: dict[str, Any], path: Any) -> dict[str, Any]:
    """The node of conf/model that is the same network.

    Raises:
        UserError: for what `DiT` does not have.
    """
    given = {**DEFAULTS, **{k: v for k, v in theirs.items() if not k.startswith("_")}}
    for key, hint in TYPES.items():
        check_value(f"{path}: {key}", given[key], hint)
    for key, value in FIXED.items():
        if given[key] != value:
            raise UserError(f"{path}: {key}={given[key]} cannot be read; it must be {value}")
    if given["norm_eps"] not in EPS:
        raise UserError(f"{path}: norm_eps={given['norm_eps']} cannot be read; it must be 1e-6")
    channels, out = given["in_channels"], given["out_channels"] or given["in_channels"]
    if out not in (channels, 2 * channels):
        raise UserError(f"{path}: out_channels={out} must be in_channels={channels}, or twice as many")
    return {
        "_target_": "src.models.dit.DiT",
        "channels": channels,
        "image_size": given["sample_size"],
        "patch_size": given["patch_size"],
        "hidden_dim": given["num_attention_heads"] * given["attention_head_dim"],
        "depth": given["num_layers"],
        "num_heads": given["num_attention_heads"],
        "num_classes": given["num_embeds_ada_norm"],
        "learned_variance": out == 2 * channels,
        "endpoint": True,
    }


def write_config(node: dict[str, Any], net: DiT) -> dict[str, Any]:
    """DiTTransformer2DModel's configuration of the same network.

    Raises:
        UserError: for what it does not have.
    """
    defaults = {k: p.default for k, p in inspect.signature(DiT).parameters.items()}
    ours: dict[str, Any] = {**defaults, **{k: v for k, v in node.items() if k != "_target_"}}
    must = {"mlp_ratio": 4, "self_conditioning": False, "time_scale": 1, "endpoint": True}
    wrong = [f"model.{key}={ours[key]}" for key, value in must.items() if ours[key] != value]
    size = ours["image_size"]
    if not isinstance(size, int):
        wrong += [] if size[0] == size[1] else [f"model.image_size={list(size)}"]
        size = size[0]
    if ours["num_classes"] is None:
        wrong.append("a DiT without labels")
    if wrong:
        raise UserError(
            f"{wrong[0]} has no place in diffusers' {CLASS}; use format=safetensors, which holds any network"
        )
    return {
        **DEFAULTS,
        "norm_eps": EPS[1],
        "_class_name": CLASS,
        "_diffusers_version": "0.30.0",
        "num_attention_heads": ours["num_heads"],
        "attention_head_dim": ours["hidden_dim"] // ours["num_heads"],
        "in_channels": ours["channels"],
        "out_channels": ours["channels"] * (1 + ours["learned_variance"]),
        "num_layers": ours["depth"],
        "sample_size": size,
        "patch_size": ours["patch_size"],
        "num_embeds_ada_norm": ours["num_classes"],
    }


def entries(net: DiT) -> list[Entry]:
    """The table of its weights; each of its blocks holds the layers that embed time and label anew, see `repeated`."""
    patches = net.patch_size
    found = _patches("patches_in", "pos_embed.proj", patches)
    found += [*same("modulation_out", "proj_out_1"), *same("patches_out", "proj_out_2")]
    for name, ours in (("timestep_embedder.linear_1", "1"), ("timestep_embedder.linear_2", "3")):
        found += same(f"time_embedding.{ours}", f"{_embedding(0)}.{name}")
    found += labels("label_embedding", f"{_embedding(0)}.class_embedder.embedding_table", with_none=True)
    for i in range(len(net.blocks)):
        block = f"transformer_blocks.{i}"
        found += split(f"blocks.{i}.qkv", (f"{block}.attn1.{name}" for name in ("to_q", "to_k", "to_v")))
        found += same(f"blocks.{i}.proj", f"{block}.attn1.to_out.0")
        found += same(f"blocks.{i}.mlp.0", f"{block}.ff.net.0.proj")
        found += same(f"blocks.{i}.mlp.2", f"{block}.ff.net.2")
        found += same(f"blocks.{i}.modulation", f"{block}.norm1.linear")
    return found


def repeated(net: DiT) -> dict[str, str]:
    """Keys of the embeddings that blocks after the first hold, with those of the first that they must equal."""
    keys = [key for entry in entries(net) for key in entry.theirs if key.startswith(_embedding(0))]
    return {key.replace(_embedding(0), _embedding(i), 1): key for i in range(1, len(net.blocks)) for key in keys}


def _embedding(block: int) -> str:
    return f"transformer_blocks.{block}.norm1.emb"


def _patches(ours: str, theirs: str, p: int) -> list[Entry]:
    """Our linear layer over a patch's numbers, there a convolution."""
    weight, bias = pointwise(ours, theirs, ndim=2)
    return [
        weight._replace(read=lambda v: v.flatten(1), write=lambda v: (v.reshape(len(v), -1, p, p),)),
        bias,
    ]
