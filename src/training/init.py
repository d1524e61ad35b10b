"""Fine-tuning: a new run that begins with the weights of another, or of others."""

from typing import Any

from torch import nn

from src.errors import UserError
from src.interop.adopt import adopt
from src.runs import Run, check_architecture, image_shape

PARTS = ("model", "schedule", "objective", "loss")  # without which the weights would mean something else


def adopted(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with what config["init_from"] was trained with, where the user asks for nothing else.

    Data is taken over too, from a source that has images, unless the user chooses some with data=.

    Raises:
        UserError: when there is nothing to begin with, or its images are of another shape.
    """
    source = _source(config)
    overrides = config["overrides"]
    parts = {part: source.config[part] for part in PARTS}
    if "_target_" in source.config["data"]:
        parts["data"] = source.config["data"]
    merged = adopt(config, parts, overrides)
    chosen = {part: source.config["choices"][part] for part in parts if part in source.config.get("choices", {})}
    merged["choices"] = {**config["choices"], **{p: o for p, o in chosen.items() if merged[p] != config[p]}}
    model = merged["model"]
    if "channels" in model and "image_size" in model and image_shape({"data": model}) != image_shape(merged):
        names = ["x".join(map(str, shape)) for shape in (image_shape({"data": model}), image_shape(merged))]
        raise UserError(
            f"init_from={config['init_from']} is a network for images of {names[0]} (channels x height x width) and "
            f"data has {names[1]}; choose data that fits, or set model.image_size where the network takes any"
        )
    return merged


def initialize(net: nn.Module, config: dict[str, Any]) -> None:
    """Gives a network the averaged weights of config["init_from"].

    Raises:
        UserError: when they are of another architecture.
    """
    source = _source(config)
    state = source.load_checkpoint()["ema"]
    check_architecture(net, state, source.checkpoint)
    net.load_state_dict(state)


def _source(config: dict[str, Any]) -> Run:
    try:
        return Run(config["init_from"])
    except UserError as error:
        raise UserError(str(error).replace("run=", "init_from=", 1)) from error
