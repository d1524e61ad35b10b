"""diffusers' folders: a pipeline of a network and a scheduler, or a network alone.

    model_index.json    scheduler/scheduler_config.json    unet/config.json    unet/diffusion_pytorch_model.safetensors

Old folders have the files of all parts side by side, as google/ddpm-cifar10-32 has. Files that this project writes hold
the run's configuration in the metadata of the tensors, which diffusers does not look at.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from src.errors import UserError
from src.interop import diffusers_dit, diffusers_scheduler, diffusers_unet, own
from src.interop.source import HYBRID, Source

if TYPE_CHECKING:
    from torch import Tensor, nn

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"
NETWORKS = {diffusers_unet.CLASS: "unet", diffusers_dit.CLASS: "transformer"}  # and the folder that they lie in
BEYOND = ("vae", "vqvae", "text_encoder", "movq")  # parts of pipelines that work on latents


def is_folder(path: Path) -> bool:
    """Whether it is one of diffusers', or says so."""
    return any((path / name).is_file() for name in (INDEX, CONFIG, *(f"{part}/{CONFIG}" for part in NETWORKS.values())))


def read(path: Path) -> Source:
    """The model in a folder.

    Raises:
        UserError: naming what cannot be read.
    """
    index = _json(path / INDEX) if (path / INDEX).is_file() else {}
    beyond = [name for name in BEYOND if name in index]
    if beyond:
        raise UserError(f"{path} is a pipeline with a {beyond[0]}, whose network sees no pixels; give one without")
    folder = next((path / name for name in NETWORKS.values() if (path / name / CONFIG).is_file()), path)
    theirs = _json(folder / CONFIG)
    kind = theirs.get("_class_name")
    if kind not in NETWORKS:
        raise UserError(f"{folder / CONFIG} describes a {kind}; {' and '.join(NETWORKS)} can be read")
    weights = _weights(folder)
    config = own.configuration(_metadata(weights), weights)
    reader = diffusers_unet if kind == diffusers_unet.CLASS else diffusers_dit
    model = reader.read_config(theirs, folder / CONFIG) if config is None else config["model"]
    parts = {"model": model}
    if model.get("learned_variance"):
        parts["loss"] = HYBRID
    scheduler = next((p for p in (path / "scheduler" / SCHEDULER, path / SCHEDULER) if p.is_file()), None)
    if scheduler is not None and config is None:
        parts |= diffusers_scheduler.read_scheduler(_json(scheduler), scheduler)
    if config is not None:
        from src.interop.table import infers, without_memory

        with infers(weights):
            said = _described(without_memory(config["model"]), config)
        for file in (folder / CONFIG, scheduler):
            if file is not None:
                _compare(_json(file), next(text for name, text in said.items() if name.name == file.name), file)

    def state(model: dict[str, Any]) -> "dict[str, Tensor]":
        return _state(model, weights, with_none=config is not None)

    return Source(parts, weights, state, config, has_none=kind == diffusers_dit.CLASS)


def write(net: "nn.Module", config: dict[str, Any], path: Path) -> None:
    """A folder with the network and its scheduler; of a U-Net, one that DDPMPipeline.from_pretrained takes.

    Raises:
        UserError: for what diffusers cannot express, before anything is written.
    """
    from src.files import replacing
    from src.interop.table import write_table
    from src.interop.weights import write_safetensors
    from src.models.dit import DiT
    from src.models.unet import UNet

    texts = _described(net, config)
    table: Any = diffusers_unet.entries(net) if isinstance(net, UNet) else diffusers_dit.entries(cast(DiT, net))
    state = write_table(table, net.state_dict())
    if isinstance(net, DiT):
        state |= {key: state[first].clone() for key, first in diffusers_dit.repeated(net).items()}
    for name, content in texts.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    file = path / next(name.parent for name in texts if name.name == CONFIG) / f"{WEIGHTS}.safetensors"
    write_safetensors(state, file, {own.CONFIG: json.dumps(config)})


def _described(net: "nn.Module", config: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """A folder's texts: of the network, its scheduler and, of a U-Net, the pipeline.

    Raises:
        UserError: for what diffusers cannot express.
    """
    from src.models.dit import DiT
    from src.models.unet import UNet

    if isinstance(net, UNet):
        kind, theirs = diffusers_unet.CLASS, diffusers_unet.write_config(config["model"], net)
    elif isinstance(net, DiT):
        kind, theirs = diffusers_dit.CLASS, diffusers_dit.write_config(config["model"], net)
    else:
        raise UserError(
            f"a {type(net).__name__} has no place in diffusers; use format=safetensors, which holds any network"
        )
    scheduler = diffusers_scheduler.write_scheduler(config, getattr(net, "learned_variance", False))
    texts = {Path(NETWORKS[kind], CONFIG): theirs, Path("scheduler", SCHEDULER): scheduler}
    if isinstance(net, UNet):  # there is no pipeline of a DiT without a VAE
        texts[Path(INDEX)] = {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": theirs["_diffusers_version"],
            "scheduler": ["diffusers", scheduler["_class_name"]],
            NETWORKS[kind]: ["diffusers", kind],
        }
    return texts


def _compare(theirs: dict[str, Any], said: dict[str, Any], path: Path) -> None:
    """Refuses what was changed beside weights that hold the configuration they were exported with."""
    for key, value in json.loads(json.dumps(said)).items():
        if key in theirs and not _alike(theirs[key], value) and not key.startswith("_"):
            raise UserError(
                f"{path}: {key}={theirs[key]} is not the {value} that the weights beside it were exported with; put it "
                "back, or load the folder with diffusers and save it again, which leaves their own configuration out"
            )


def _alike(a: Any, b: Any) -> bool:
    """Whether two values of a JSON file are the same, of lists of numbers but for rounding."""
    if not isinstance(a, list) or not isinstance(b, list) or isinstance((*b, "")[0], str):
        return bool(a == b)
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-9) for x, y in zip(a, b, strict=True))


def _state(model: dict[str, Any], weights: Path, with_none: bool) -> "dict[str, Tensor]":
    import torch

    from src.interop.table import read_table, without_memory
    from src.interop.weights import read_tensors
    from src.models.dit import DiT
    from src.models.unet import UNet

    theirs = read_tensors(weights)
    net = without_memory(model)
    if isinstance(net, UNet):
        old = any(key.endswith(".query.weight") for key in theirs)
        return read_table(diffusers_unet.entries(net, with_none, old), theirs, net, weights)
    assert isinstance(net, DiT)
    for key, first in diffusers_dit.repeated(net).items():
        if key in theirs and first in theirs and not torch.equal(theirs.pop(key), theirs[first]):
            raise UserError(f"{weights}: {key} is not {first}; a DiT whose blocks embed time otherwise cannot be read")
    return read_table(diffusers_dit.entries(net), theirs, net, weights)


def _weights(folder: Path) -> Path:
    """The file of a folder's weights, or the index of several; of weights in another precision alone, those."""
    kinds = ("safetensors", "bin")
    for name in (f"{WEIGHTS}.{kind}{end}" for kind in kinds for end in ("", ".index.json")):
        if (folder / name).is_file():
            return folder / name
    for kind in kinds:
        variants = sorted(folder.glob(f"{WEIGHTS}.*.{kind}"))
        if len(variants) > 1:
            names = ", ".join(path.name for path in variants)
            raise UserError(f"{folder} has {names}, and none without a variant; leave one of them there")
        if variants:
            return variants[0]
    raise UserError(f"{folder} has no {WEIGHTS}.safetensors or .bin; download or export it again")


def _metadata(weights: Path) -> dict[str, str]:
    from src.interop.weights import TEXTS, read_header

    return read_header(weights).get(TEXTS, {}) if weights.suffix == ".safetensors" else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); download or export it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; download or export it again")
    return content
