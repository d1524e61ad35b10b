"""A run on disk: its folder, its configuration, and the network rebuilt from them."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.build import build, refusals
from src.errors import UserError, reason
from src.files import check_sums, sha256
from src.shapes import as_pair
from src.trust import check_known

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from src.diffusion.gaussian import GaussianDiffusion
    from src.interop.source import Source

CONFIG = "config.yaml"
SUMMARY = "summary.json"
METRICS = "metrics.csv"
ERROR = "error.txt"  # why a run ended before its time
PRUNED = "pruned.txt"  # why a search stopped it
LAST = Path("checkpoints", "last.ckpt")
PREVIOUS = Path("checkpoints", "previous.ckpt")
BEST = Path("checkpoints", "best.ckpt")
FORMAT = 1  # of the checkpoints that are written; those before it was counted have none
PARTS = {"name", "overrides", "schedule", "objective", "weighting", "density", "loss", "model", "sampler", "data"}


class Run:
    """What `run=` names: a run folder, a checkpoint, or a model in a folder of diffusers or a .safetensors file.

    Attributes:
        folder: the run's folder; of a checkpoint outside one, the folder that it lies in.
        checkpoint: the file with the weights; may not exist yet in a folder whose run has just begun. Of a folder, the
            last one.
        in_folder: whether the checkpoint belongs to the folder; one that was taken elsewhere brings its configuration.
        config: the resolved configuration, plain containers.

    Raises:
        UserError: when there is no run at the path.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        self.in_folder = True
        self._source: Source | None = None  # of a model that no training here wrote
        self._others: list[Path] = []  # to continue from when it is damaged, in this order
        from src.interop.diffusers import is_folder
        from src.interop.source import find

        if not (path / CONFIG).is_file():
            self._source = find(path)
        if self._source is not None:
            self.in_folder = False
            self.folder, self.checkpoint = self._source.weights.parent, self._source.weights
        elif path.is_dir():
            self.folder, self.checkpoint = path, path / LAST
            self._others = [path / PREVIOUS, path / BEST]
        elif path.is_file() and path.suffix == ".ckpt":
            parent = path.resolve().parent
            self.in_folder = parent.name == LAST.parent.name and (parent.parent / CONFIG).is_file()
            self.folder, self.checkpoint = (parent.parent if self.in_folder else parent), path
        else:
            raise UserError(
                f"run={path} is neither a run folder nor a .ckpt file, a .safetensors file or a folder of diffusers; "
                "runs lie in outputs/<experiment>/, and python -m src.convert makes one of other weights"
            )
        if self._source is not None:
            config: Any = self._source.as_run()
        else:
            config = self._read_config() if self.in_folder else self.load_checkpoint()["config"]
        if not isinstance(config, dict) or not config.keys() >= PARTS:
            raise UserError(
                f"run={path} is not a run: it has no {CONFIG} that a training wrote; runs lie in outputs/<experiment>/"
            )
        if not self.in_folder:
            check_known(config, self.checkpoint)
        elif is_folder(path):  # which somebody else may have made, config.yaml and all
            check_known(config, f"{path / CONFIG}, beside a model of diffusers,")
        self.config: dict[str, Any] = config

    def _read_config(self) -> Any:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        if (self.folder / CONFIG).is_file():
            try:
                return OmegaConf.to_container(OmegaConf.load(self.folder / CONFIG))
            except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
                raise UserError(f"{self.folder / CONFIG} cannot be read: {' '.join(str(error).split())}") from error
        return None

    @cached_property
    def sha256(self) -> str:
        """Of the checkpoint's bytes, as they are when it is first asked for; of an index, of what it names, too."""
        from src.interop.weights import INDEX, parts

        if not self.checkpoint.name.endswith(INDEX):
            return sha256(self.checkpoint)
        digests = [sha256(path) for path in (self.checkpoint, *parts(self.checkpoint))]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def load_checkpoint(self) -> dict[str, Any]:
        """The checkpoint, on the CPU; never executes what it holds.

        Raises:
            UserError: when it is missing, damaged, of a newer version, or not a checkpoint of this project.
        """
        if self._source is not None:
            return _as_checkpoint(self._source)
        if not self.checkpoint.is_file():
            raise UserError(f"{self.folder} holds no checkpoint yet: {self.checkpoint} does not exist; train it first")
        return _read(self.checkpoint)

    def load_newest(self) -> dict[str, Any] | None:
        """The checkpoint to continue from; None when there is none yet.

        Of a folder, the newest that is whole: what is missing or damaged is passed over, and said so. `checkpoint` is
        then the one that was loaded.

        Raises:
            UserError: when none is whole, or one is of a newer version.
        """
        candidates = [path for path in (self.checkpoint, *self._others) if path.is_file()]
        for path in candidates:
            self.checkpoint = path
            try:
                return _read(path)
            except UserError as error:
                if path == candidates[-1] or isinstance(error, NewerVersionError):
                    raise
                following = candidates[candidates.index(path) + 1]
                print(f"note: {error}; passed over for {following.name}", flush=True)
        return None

    def load_net(self, weights: str) -> "nn.Module":
        """The network with weights of the checkpoint, in eval mode on the CPU.

        Args:
            weights: "ema", "raw", or the name of another average that the checkpoint holds.

        Raises:
            UserError: when the checkpoint is missing, damaged, of another architecture or without these weights.
        """
        checkpoint = self.load_checkpoint()
        states = {
            "ema": checkpoint["ema"],
            "raw": net_state(checkpoint["state_dict"]),
            **checkpoint.get("averages", {}),
        }
        if weights not in states:
            raise UserError(f"weights={weights} is not one of {', '.join(states)}, which {self.checkpoint} holds")
        net = build_net(self.config)
        check_architecture(net, states[weights], self.checkpoint)
        net.load_state_dict(states[weights])
        return net.eval()


class NewerVersionError(UserError):
    """A checkpoint that only a later version of this project can read."""


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint whose every byte is as it was written.

    Raises:
        UserError: when it is not.
    """
    import torch

    try:
        check_sums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises anything
        raise UserError(f"{path} is damaged or not a checkpoint ({reason(error)}); use another one") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "ema", "config"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint that src.train wrote; use one from <run>/checkpoints")
    written = checkpoint.setdefault("format", 0)
    if not isinstance(written, int) or written > FORMAT:
        raise NewerVersionError(
            f"{path} was written by a newer version (format {written}; this one reads up to {FORMAT}); update this "
            "project"
        )
    return checkpoint


def _as_checkpoint(source: "Source") -> dict[str, Any]:
    config = source.as_run()
    return weights_alone(source.state(config["model"]), config)


def weights_alone(state: dict[str, "Tensor"], config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without a training: raw and averaged weights are the same."""
    raw = {f"net.{key}": value for key, value in state.items()}
    return {"state_dict": raw, "ema": state, "config": config, "format": FORMAT, "global_step": 0}


def build_net(config: dict[str, Any]) -> "nn.Module":
    """The network that a configuration describes, freshly initialised."""
    return build(config["model"], "model")


def build_diffusion(config: dict[str, Any]) -> "GaussianDiffusion":
    """Schedule, objective, weighting, density and loss that a configuration describes.

    Raises:
        UserError: when it describes a classifier, or parts that do not go together.
    """
    refuse_classifier(config)
    from src.diffusion.gaussian import GaussianDiffusion

    parts = [build(config[part], part) for part in ("schedule", "objective", "weighting", "density", "loss")]
    with refusals("diffusion"):
        return GaussianDiffusion(*parts)


def refuse_classifier(config: dict[str, Any]) -> None:
    """Refuses a configuration of task=classify where a diffusion model is wanted."""
    if config["schedule"] is None:
        raise UserError(
            f"{config['name']} trains a classifier, which makes no images; it scores those of other runs, with "
            "features=classifier features.run=<its folder>"
        )


def cycled_labels(net: "nn.Module", indices: range, device: "torch.device") -> "Tensor | None":
    """Labels 0, 1, ... over and over for the samples with these numbers; None for a network without labels."""
    import torch

    num_classes = getattr(net, "num_classes", None)
    if num_classes is None:
        return None
    return torch.tensor([i % num_classes for i in indices], device=device)


def image_shape(config: dict[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of the images of a run."""
    return config["data"]["channels"], *as_pair(config["data"]["image_size"])


def net_state(state_dict: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """The network's part of the LightningModule's state."""
    return {key.removeprefix("net."): value for key, value in state_dict.items() if key.startswith("net.")}


def check_architecture(net: "nn.Module", state: dict[str, "Tensor"], checkpoint: Path) -> None:
    """Compares names and shapes before anything is loaded.

    Raises:
        UserError: naming the first difference.
    """
    expected = net.state_dict()
    for key in [*expected, *state]:
        if key not in state or key not in expected:
            where = "the network that the configuration describes" if key in state else "the checkpoint"
            raise UserError(
                f"{checkpoint} is of another architecture: {where} has no {key}; use the configuration it was trained "
                f"with"
            )
        if state[key].shape != expected[key].shape:
            raise UserError(
                f"{checkpoint} is of another architecture: {key} is {list(state[key].shape)} there and "
                f"{list(expected[key].shape)} in the configuration; use the configuration it was trained with"
            )
