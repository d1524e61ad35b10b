"""DINOv2's features (Oquab et al. 2023), nearer to people's judgement than Inception's (Stein et al. 2023)."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from src.errors import UserError, reason
from src.evaluation.features import Extracted, Features, Shape, Sizes, as_rgb, check_colours
from src.evaluation.weights import digest, fit_state, read_state
from src.files import sha256

if TYPE_CHECKING:
    from torch import nn

SIDE = 224  # that images are resized to, as Stein et al. do
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class DinoV2(Features):
    """The class token of a DINOv2 vision transformer after its last norm; ViT-L/14 in Stein et al. 2023.

    Images are resized to 224x224, bicubic with antialiasing, and clamped to [0, 1] before they are normalised.
    The position embedding is resampled to that size as its authors' code does, which Stein et al. run: see `_resized`.

    Args:
        weights: a file with the state dict, .safetensors or torch.save's, as timm or its authors publish it; None for
            timm's own, which it keeps in its cache and downloads.
        model: timm's name.
        name: of the features.

    Raises:
        ValueError: for a model that timm does not have.
    """

    rows = 4

    def __init__(
        self, weights: str | None = None, model: str = "vit_large_patch14_dinov2.lvd142m", name: str = "dinov2"
    ) -> None:
        super().__init__(name)
        if not model.startswith("vit_") or "dinov2" not in model:
            raise ValueError(f"model={model} is none of timm's DINOv2, such as vit_base_patch14_dinov2.lvd142m")
        self.weights = weights
        self.model = model
        self._sha256: str | None = None

    def load(self) -> None:
        if self._net is not None:
            return
        with torch.random.fork_rng(devices=[]):
            net: Any = self._pretrained() if self.weights is None else self._make()
        if self.weights is not None:
            from timm.models.vision_transformer import checkpoint_filter_fn

            state = read_state(self.weights)
            with suppress(Exception):  # what it cannot convert does not fit, and is named below
                state = checkpoint_filter_fn(state, net)
            fit_state(net, state, self.weights, f"timm's {self.model}")
        self._sha256 = digest(net.state_dict()) if self.weights is None else sha256(Path(self.weights))
        self._net = _resized(net).eval().requires_grad_(False).to(self.device)

    def check(self, shape: Shape) -> None:
        check_colours(self.name, shape)

    def sizes(self, shape: Shape) -> Sizes:
        if self._net is not None:
            return Sizes(int(self._net.num_features))
        with torch.device("meta"):
            return Sizes(int(self._make().num_features))  # type: ignore[arg-type]

    def stamp(self) -> dict[str, Any]:
        if self._sha256 is None and self.weights is not None and Path(self.weights).is_file():
            self._sha256 = sha256(Path(self.weights))
        return {
            "name": self.name,
            "kind": f"timm's {self.model}",
            "weights_sha256": self._sha256,
            "input": f"{SIDE}x{SIDE}, bicubic, antialiased, clamped; ImageNet's mean and deviation",
            "positions": "bicubic, not antialiased, as DINOv2's authors resample them",
            "grey": "repeated to 3 channels",
            "features": "class token after the last norm",
        }

    def _make(self, pretrained: bool = False) -> "nn.Module":
        import timm

        try:
            return timm.create_model(self.model, pretrained=pretrained, num_classes=0)
        except RuntimeError as error:
            raise ValueError(f"timm has no model={self.model} ({reason(error)})") from error

    def _pretrained(self) -> "nn.Module":
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each of its attempts
        try:
            return self._make(pretrained=True)
        except ValueError:
            raise
        except Exception as error:  # of whatever downloads
            raise UserError(
                f"the weights of {self.model} are not in timm's cache and could not be downloaded ({reason(error)}); "
                "give the file with features.weights=<file>"
            ) from error

    def _compute(self, images: Tensor) -> Extracted:
        assert self._net is not None
        x = as_rgb(images).float().div_(255)
        x = torch.nn.functional.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False)
        mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
        return Extracted(self._net((x.clamp_(0, 1) - mean) / std))


def _resized(net: Any) -> Any:
    """For images of SIDE x SIDE: position embeddings of 37x37 patches become 16x16, bicubic without antialiasing, at a
    scale of 16.1 / 37, as in `interpolate_pos_encoding` of DINOv2's code; timm's own way gives other features."""
    positions = net.pos_embed.detach()
    grid, patches = net.patch_embed.grid_size[0], SIDE // net.patch_embed.patch_size[0]
    prefix = positions.shape[1] - grid**2  # the class token's, which networks with registers do not have
    square = positions[:, prefix:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    scale = (patches + 0.1) / grid
    square = torch.nn.functional.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
    net.set_input_size(SIDE)
    net.pos_embed.data = torch.cat([positions[:, :prefix], square.flatten(2).mT], dim=1)
    return net
