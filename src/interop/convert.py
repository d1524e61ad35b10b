"""Weights of others as a run's folder: whatever the source says, and for the rest what a training would be given."""

from pathlib import Path
from typing import Any, cast

from torch import Tensor

from src.build import check, refusals
from src.errors import UserError
from src.interop import diffusers, edm, openai, own
from src.interop.adopt import adopt, touched
from src.interop.source import HYBRID, PLAIN, Source, as_overrides, choices, data_for, data_option
from src.interop.table import infers, read_table, without_memory
from src.interop.weights import read_tensors
from src.models.unet import UNet
from src.runs import CONFIG, LAST, build_diffusion, check_architecture, image_shape, weights_alone

HYBRID_SAMPLER = {"_target_": "src.diffusion.samplers.DDPM", "steps": None, "variance": "learned"}


def assemble(
    config: dict[str, Any], overrides: list[str], settings: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """A run's configuration, the network's state, and the file that it came from.

    Args:
        config: conf/train.yaml, composed, resolved and checked.
        overrides: what the user gave of it.
        settings: source, format and qkv_order.

    Raises:
        UserError: for whatever the user can mend.
    """
    path = Path(settings["source"])
    if not path.exists():
        raise UserError(f"source={path} does not exist; give a folder of diffusers, or a file of weights")
    kind = settings["format"] or _seen(path)
    if settings["qkv_order"] is not None and kind != "guided_diffusion":
        raise UserError(f"qkv_order={settings['qkv_order']} is of format=guided_diffusion alone; leave it out")
    source = _open(path, kind, config, overrides, settings["qkv_order"] or "legacy")
    if source.config is None:
        merged = adopt(config, _with_plain(source.parts, overrides), overrides)
        merged["data"] = _data(merged, overrides)
        if not touched(overrides, "label_dropout"):
            merged["label_dropout"] = source.label_dropout
        merged["overrides"] = overrides
    elif overrides:
        raise UserError(
            f"source={path} brings all of its settings along, so {' '.join(overrides)} would change nothing; leave "
            "them out, and set them for a training with init_from="
        )
    else:
        merged = dict(source.config)
    check(merged, "")
    state = source.state(merged["model"])
    net = without_memory(merged["model"])
    check_architecture(net, state, source.weights)
    with refusals("model"):
        build_diffusion(merged).check(net)
    groups = ("schedule", "objective", "loss", "density", "sampler", "model")
    chosen = choices({part: merged[part] for part in groups})
    if source.config is None:
        merged["choices"] = {k: v for k, v in merged["choices"].items() if not k.startswith("hydra/")} | chosen
        data = data_option(merged["model"])
        named = [] if data is None or touched(overrides, "data") else [f"data={data}"]
        merged["overrides"] = [*overrides, *named, *as_overrides(merged, chosen)]
    return {**merged, "run": None, "resume": None}, state, source.weights


def write(config: dict[str, Any], state: dict[str, Tensor], folder: Path) -> None:
    """The folder of a run that has weights and has not trained."""
    from omegaconf import OmegaConf

    from src.files import replacing, save

    if (folder / CONFIG).exists():
        raise UserError(f"{folder} already holds a run; choose another folder with out=")
    (folder / LAST).parent.mkdir(parents=True, exist_ok=True)
    save(weights_alone(state, config), folder / LAST)
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(OmegaConf.to_yaml(config))


def _with_plain(parts: dict[str, dict[str, Any]], overrides: list[str]) -> dict[str, dict[str, Any]]:
    """The parts of a source, and what its kind always has, unless the user said otherwise; prints what was assumed."""
    assumed = {
        "schedule": "its schedule of noise, taken for linear with T = 1000",
        "objective": "what it predicts, taken for eps",
    }
    missing = [part for part in assumed if part not in parts and not touched(overrides, part)]
    if not missing or any(override.startswith("experiment=") for override in overrides):
        return parts
    settings = " and ".join(f"{part}=" for part in missing)
    print(f"note: the file does not say {', nor '.join(assumed[part] for part in missing)}; set {settings} otherwise")
    return {"objective": PLAIN["objective"], **parts} if "objective" in missing else parts


def _seen(path: Path) -> str:
    """The format of a source that shows it."""
    if path.is_dir() and diffusers.is_folder(path):
        return "diffusers"
    if path.is_file():
        keys = set(read_tensors(path))
        if edm.is_one(keys):
            return "edm_state_dict"
        if path.suffix == ".safetensors" and not any(key.startswith("input_blocks.") for key in keys):
            return "safetensors"
    raise UserError(
        f"source={path} does not show what it is; say so with format=diffusers, improved_diffusion, guided_diffusion, "
        "edm_state_dict or safetensors"
    )


def _open(path: Path, kind: str, config: dict[str, Any], overrides: list[str], order: openai.Order) -> Source:
    if kind == "diffusers":
        if not path.is_dir() or not diffusers.is_folder(path):
            raise UserError(f"source={path} is no folder of diffusers: it has no {diffusers.CONFIG}; choose another")
        return diffusers.read(path)
    if not path.is_file():
        raise UserError(f"source={path} is a folder, and format={kind} is a file of weights; give that")
    if kind == "safetensors":
        return own.read(path)
    if kind == "edm_state_dict":
        return edm.read(path)
    return _openai(path, kind, config, overrides, order)


def _openai(path: Path, kind: str, config: dict[str, Any], overrides: list[str], order: openai.Order) -> Source:
    theirs = read_tensors(path)
    keys = [override.lstrip("+").partition("=")[0] for override in overrides]
    sizes = [config[part]["image_size"] for part in ("model", "data") if f"{part}.image_size" in keys]
    sizes += [config["data"]["image_size"]] if "data" in keys else []
    if not sizes:
        raise UserError(f"{path} does not say how large its images are; add data.image_size=64, or what they have")
    with infers(path):
        model = openai.infer(theirs, sizes[0], path)
    attends = any(key.endswith(".qkv.weight") for key in theirs)
    if attends and not any(key in keys for key in ("model.num_heads", "model.channels_per_head")):
        raise UserError(
            f"{path} does not say how many heads its attention has; add model.num_heads=4 or "
            "model.channels_per_head=64, or what it was trained with"
        )
    if kind == "improved_diffusion":
        T = config["schedule"].get("num_timesteps")
        if T is None:
            raise UserError("improved-diffusion has discrete steps; choose schedule=linear or cosine_4000")
        model["time_scale"] = 1000 / T

    def state(node: dict[str, Any]) -> dict[str, Tensor]:
        net = cast(UNet, without_memory(node))
        return read_table(openai.entries(net, order), theirs, net, path)

    parts: dict[str, dict[str, Any]] = {"model": model, "objective": PLAIN["objective"]}
    if model["learned_variance"]:
        parts |= {"loss": HYBRID, "sampler": HYBRID_SAMPLER}
    return Source(parts, path, state)


def _data(config: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The data of a run whose network is given: what the user named, or what has images of this shape,
    with the settings that the user gave.

    Raises:
        UserError: when the user named data of another shape.
    """
    model = config["model"]
    images = {"channels": model["channels"], "image_size": model["image_size"]}
    shape = image_shape({"data": images})
    if not any(override.startswith("data=") for override in overrides):
        return {**adopt(config, {"data": data_for(model, config["seed"])}, overrides)["data"], **images}
    if image_shape(config) != shape:
        given = "x".join(map(str, image_shape(config)))
        raise UserError(f"data has images of {given}, and the network's are {'x'.join(map(str, shape))}")
    return {**config["data"], **images}
