"""A model that lies in a file or a folder of another kind than a run's, as a run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.overrides import plain_value
from src.shapes import as_pair

if TYPE_CHECKING:
    from torch import Tensor

# What a configuration names where a file does not say it.
PLAIN: dict[str, dict[str, Any]] = {
    "schedule": {"_target_": "src.diffusion.schedules.Linear"},
    "objective": {"_target_": "src.diffusion.objectives.Eps"},
    "weighting": {"_target_": "src.diffusion.weightings.Constant"},
    "density": {"_target_": "src.diffusion.densities.Uniform"},
    "loss": {"_target_": "src.diffusion.losses.Simple"},
}
STATES = (".safetensors", ".pt", ".pth")
CONF = Path(__file__).resolve().parents[2] / "conf"
DATA = {(3, 32, 32): "cifar10", (1, 28, 28): "mnist", (1, 8, 8): "digits"}
HYBRID = {"_target_": "src.diffusion.losses.Hybrid"}  # of a network with a learned variance
OPTIONS = {  # of the groups of conf, by the class that they build
    "Linear": "linear",
    "ScaledLinear": "scaled_linear",
    "Cosine": "cosine",
    "Tabulated": "tabulated",
    "Karras": "karras",
    "Eps": "eps",
    "X0": "x0",
    "V": "v",
    "Edm": "edm",
    "Simple": "simple",
    "Hybrid": "hybrid",
    "LogNormal": "log_normal",
    "DDPM": "ddpm",
    "DDIM": "ddim",
    "Heun": "heun",
    "UNet": "unet",
    "DiT": "dit",
}


@dataclass(frozen=True)
class Source:
    """A model of others.

    Attributes:
        parts: the nodes of a configuration that it says: model, and more of schedule, objective, loss, sampler.
        weights: the file that the weights are in.
        state: reads them, as the state of the network that a node of conf/model describes.
        config: the whole configuration, where the file holds one.
        has_none: whether a network with labels was trained without them, too, and has weights for that.
    """

    parts: dict[str, dict[str, Any]]
    weights: Path
    state: "Callable[[dict[str, Any]], dict[str, Tensor]]"
    config: dict[str, Any] | None = None
    has_none: bool = False

    @property
    def label_dropout(self) -> float:
        """As a training has it that drops labels as often as theirs did, or not at all."""
        return 0.1 if self.has_none else 0.0

    def as_run(self) -> dict[str, Any]:
        """The configuration of a run that could have made it."""
        if self.config is not None:
            return self.config
        model = self.parts["model"]
        parts = {**PLAIN, "sampler": {"_target_": "src.diffusion.samplers.DDIM", "steps": None}, **self.parts}
        chosen = choices(parts)
        return {
            "name": self.weights.parent.name,
            "seed": 0,
            "overrides": [*([f"data={data}"] if (data := data_option(model)) else []), *as_overrides(parts, chosen)],
            "choices": chosen,
            "label_dropout": self.label_dropout,
            **parts,
            "data": data_for(model, seed=0),
        }


def data_for(model: dict[str, Any], seed: int) -> dict[str, Any]:
    """The data set of conf/data that has images as the network has; without one, their shape alone."""
    from omegaconf import OmegaConf

    option = data_option(model)
    if option is None:
        images = {"channels": model["channels"], "image_size": model["image_size"]}
        return {**images, "num_classes": model.get("num_classes") or 1}
    node: Any = OmegaConf.to_container(OmegaConf.load(CONF / "data" / f"{option}.yaml"), resolve=False)
    return {**node, "seed": seed}


def data_option(model: dict[str, Any]) -> str | None:
    """The data set of conf/data that has images as the network has."""
    return DATA.get((model["channels"], *as_pair(model["image_size"])))


def choices(parts: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The option of each group, of nodes that are of an option."""
    names = {part: node["_target_"].rpartition(".")[2] for part, node in parts.items()}
    return {part: OPTIONS[name] for part, name in names.items() if name in OPTIONS}


def as_overrides(config: dict[str, Any], chosen: dict[str, str]) -> list[str]:
    """What makes a training's configuration of this one: the options, and all that they set."""
    found = []
    for part, option in chosen.items():
        found.append(f"{part}={option}")
        found += [f"++{part}.{k}={plain_value(v)}" for k, v in config[part].items() if k != "_target_"]
    return found


def find(path: Path) -> Source | None:
    """What lies at a path, when it is a folder of diffusers, a .safetensors file or EDM's; None for anything else.

    Raises:
        UserError: when it is one of them, and cannot be read.
    """
    from src.interop import diffusers, own

    if path.is_dir() and diffusers.is_folder(path):
        return diffusers.read(path)
    if not path.is_file() or path.suffix not in STATES:
        return None
    from src.interop import edm
    from src.interop.weights import read_header, read_tensors

    own_kind = path.suffix == ".safetensors"
    if edm.is_one(read_header(path) if own_kind else read_tensors(path)):
        return edm.read(path)
    return own.read(path) if own_kind else None
