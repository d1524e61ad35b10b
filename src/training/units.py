"""Steps that a configuration counts in images: "10Mimg" is as many steps as show a network 10,000,000 of them.

An experiment that says 10Mimg stays the same on more devices, with larger batches, or with accumulated gradients.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


class Images(str):
    """A number of images as text: 50000img, 500kimg, 0.5Mimg, 1Gimg.

    Raises:
        ValueError: when the text is something else.
    """

    described = "a number of images such as 500kimg"

    def __new__(cls, text: str) -> "Images":
        if not isinstance(text, str) or not re.fullmatch(r"(\d+|\d*\.\d+)[kMG]?img", text):
            raise ValueError(f"{text!r} is not {cls.described}")
        return super().__new__(cls, text)

    @property
    def number(self) -> int:
        number, factor = re.fullmatch(r"([\d.]+)([kMG]?)img", self).groups()  # type: ignore[union-attr]
        return round(float(number) * FACTORS[factor])


def in_a_step(trainer: "Trainer") -> bool:
    """Whether the batch that has just been seen is one of several whose gradients make up a step, and not the last."""
    return (trainer.fit_loop.epoch_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches != 0


if TYPE_CHECKING:
    from lightning import Trainer

    Steps = int  # what a constructor gets
else:
    Steps = int | Images  # what a configuration may say; `in_steps` makes the one of the other


def in_steps(node: Any, images_per_step: int) -> Any:
    """A copy of a configuration in which each setting that is named ...steps is a number of steps, rounded, at least 1.

    Args:
        images_per_step: of all devices and accumulated batches together.
    """
    if not isinstance(node, Mapping):
        return node
    return {key: _steps(key, value, images_per_step) for key, value in node.items()}


def _steps(key: str, value: Any, images_per_step: int) -> Any:
    if key.endswith("steps") and isinstance(value, str):
        images = Images(value).number
        return max(1, round(images / images_per_step)) if images else 0
    return in_steps(value, images_per_step)


def share(steps: Any, parts: int) -> Any:
    """One of so many parts of a number of steps or images, 1 at least: ${share:${trainer.max_steps},32} in YAML.

    What is neither stays as it is, to be refused where it stands.
    """
    if isinstance(steps, int):
        return max(1, steps // parts)
    try:
        return f"{max(1, Images(steps).number // parts)}img"
    except ValueError:
        return steps
