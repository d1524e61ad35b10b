"""What images are turned into before they are compared: their pixels, or what a network makes of them.

A features object takes uint8 images, (B, C, H, W), knows its name, which is in the name of every score over it, and its
stamp, which holds all that its numbers depend on. New features: one class with `_compute`, one YAML in conf/features.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src.evaluation.weights import digest, fit_state, read_state, text_digest

Shape = tuple[int, int, int]
ROWS = 16  # images that a network is asked for at once on the CPU, where other numbers of them round otherwise
MOST_PIXELS = 16


class Extracted(NamedTuple):
    """What features make of N images; float32 on the CPU.

    Attributes:
        features: (N, D).
        logits: (N, K) of a classifier, without its softmax; None where there is none.
        spatial: (N, S), a layer that still knows where in the image things are; None where there is none.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Extracted":
        """What `change` makes of each of the three that is there."""
        logits = None if self.logits is None else change(self.logits)
        return Extracted(change(self.features), logits, None if self.spatial is None else change(self.spatial))


class Sizes(NamedTuple):
    """D, K and S of `Extracted`."""

    features: int
    logits: int | None = None
    spatial: int | None = None


class Features(ABC):
    """What all features share.

    Args:
        name: small letters, digits and _; it becomes part of the scores' names.

    Attributes:
        rows: images that are computed at once on the CPU.

    Raises:
        ValueError: for another name.
    """

    rows = ROWS

    def __init__(self, name: str) -> None:
        if not re.fullmatch("[a-z0-9_]+", name):
            raise ValueError(f"name={name} must be of small letters, digits and _, as it is in the names of scores")
        self.name = name
        self.device = torch.device("cpu")
        self._net: Any = None

    def to(self, device: torch.device) -> "Features":
        """Computes there from now on."""
        self.device = device
        if self._net is not None:
            self._net.to(device)
        return self

    def load(self) -> None:  # noqa: B027 (of most features there is something to do, of others nothing)
        """Reads the weights, if there are any and they have not been read.

        Raises:
            UserError: when they are missing or are not what they should be.
        """

    @abstractmethod
    def check(self, shape: Shape) -> None:
        """Compares with the shape, (C, H, W), of images.

        Raises:
            ValueError: when these features cannot be had of them.
        """

    @abstractmethod
    def sizes(self, shape: Shape) -> Sizes:
        """How many numbers an image of the shape, (C, H, W), becomes."""

    @abstractmethod
    def stamp(self) -> dict[str, Any]:
        """What the numbers depend on, as plain values; of weights that are not there yet, None."""

    @abstractmethod
    def _compute(self, images: Tensor) -> Extracted:
        """The features of uint8 images on the device; the weights are loaded."""

    def __call__(self, images: Tensor) -> Extracted:
        """The features of images, (B, C, H, W) uint8; float32, whatever autocast or TF32 are allowed elsewhere.

        Raises:
            ValueError: for images of another type or shape.
            UserError: when the weights are missing or are not what they should be.
        """
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"{self.name} takes uint8 images (B, C, H, W), not {images.dtype} {tuple(images.shape)}")
        self.check((images.shape[1], images.shape[2], images.shape[3]))
        self.load()
        with torch.no_grad(), full_precision(self.device), untouched_randomness(self.device):
            return self._compute(images.to(self.device)).each(lambda part: part.float().cpu())


class Pixels(Features):
    """The pixels themselves, in [0, 1], flattened; for images so small that a Gaussian of them can be estimated."""

    def __init__(self, name: str = "pixels") -> None:
        super().__init__(name)

    def check(self, shape: Shape) -> None:
        if max(shape[1:]) > MOST_PIXELS:
            raise ValueError(
                f"{self.name} are for images up to {MOST_PIXELS}x{MOST_PIXELS} and these are {shape[1]}x{shape[2]}; "
                "use features=inception, or features=classifier"
            )

    def sizes(self, shape: Shape) -> Sizes:
        return Sizes(shape[0] * shape[1] * shape[2])

    def stamp(self) -> dict[str, Any]:
        return {"name": self.name, "kind": "pixels in [0, 1]", "weights_sha256": None}

    def _compute(self, images: Tensor) -> Extracted:
        return Extracted(images.flatten(1).float().div_(255))


class Module(Features):
    """Any torch module that maps float32 images, (B, C, H, W), to features, (B, D).

    Args:
        module: what `_target_` makes; it is put into eval mode.
        name: say what it is.
        weights: a file with its state dict, .safetensors or torch.save's; None where its constructor loads them.
        low, high: what 0 and 255 become on the way in.

    Raises:
        ValueError: when the target is no module, or low and high are the same.
        UserError: when the weights do not fit it.
    """

    def __init__(
        self, module: nn.Module, name: str = "module", weights: str | None = None, low: float = 0.0, high: float = 1.0
    ) -> None:
        super().__init__(name)
        if not isinstance(module, nn.Module):
            raise ValueError(f"module is {type(module).__name__}; give module._target_ a class of torch modules")
        if low == high:
            raise ValueError(f"low={low} and high={high} must differ; 0 and 1, or -1 and 1")
        if weights is not None:
            fit_state(module, read_state(weights), weights, type(module).__name__)
        self.module = module.eval()
        self.low, self.high = low, high
        self._probed: dict[Shape, int] = {}

    def to(self, device: torch.device) -> "Features":
        self.module.to(device)
        return super().to(device)

    def check(self, shape: Shape) -> None:
        self.sizes(shape)

    def sizes(self, shape: Shape) -> Sizes:
        if shape not in self._probed:
            self._probed[shape] = self._probe(shape)
        return Sizes(self._probed[shape])

    def _probe(self, shape: Shape) -> int:
        images = torch.zeros(2, *shape, dtype=torch.uint8, device=self.device)
        kind = type(self.module).__name__
        try:
            with torch.no_grad(), full_precision(self.device), untouched_randomness(self.device):
                made = self.module(self._scaled(images))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            text = " ".join(str(error).split())[:200]
            raise ValueError(f"{kind} does not take images of {describe(shape)}: {text}") from error
        if not isinstance(made, Tensor) or made.ndim != 2 or len(made) != 2:
            what = f"{tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(f"{kind} makes {what} of 2 images; features are a tensor (2, D), one row an image")
        return made.shape[1]

    def stamp(self) -> dict[str, Any]:
        kind = type(self.module)
        return {
            "name": self.name,
            "kind": f"{kind.__module__}.{kind.__qualname__}",
            "architecture_sha256": text_digest(repr(self.module)),
            "weights_sha256": digest(self.module.state_dict()),
            "input": f"float32 in [{self.low:g}, {self.high:g}]",
        }

    def _scaled(self, images: Tensor) -> Tensor:
        return images.float().mul_((self.high - self.low) / 255).add_(self.low)

    def _compute(self, images: Tensor) -> Extracted:
        return Extracted(self.module(self._scaled(images)))


def describe(shape: Shape) -> str:
    """A shape, (C, H, W), in words."""
    return f"{shape[1]}x{shape[2]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"


def check_colours(name: str, shape: Shape) -> None:
    """For networks of colour images, which are shown a grey one in all three channels.

    Raises:
        ValueError: for neither.
    """
    if shape[0] not in (1, 3):
        raise ValueError(f"{name} sees images of 1 or 3 channels and these have {shape[0]}; use features=module")


def as_rgb(images: Tensor) -> Tensor:
    """Grey images, (B, 1, H, W), with their channel three times; others as they are."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 is float32 inside: no autocast, no TF32."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
            stack.callback(torch.set_float32_matmul_precision, products)
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", convolutions)
            torch.backends.cudnn.allow_tf32 = False
            torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def untouched_randomness(device: torch.device) -> Iterator[None]:
    """Global random state is after the block what it was before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
