"""Whether a classifier reads in a sample the label that it was drawn for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from src.evaluation.features import Extracted, Features, Shape
from src.evaluation.scores import Score


@dataclass(frozen=True)
class Accuracy:
    """The share of samples whose label a classifier of the data's labels finds (Ravuri & Vinyals 2019 train on samples
    instead; this is the cheaper direction)."""

    def refuse(self, features: Features, shape: Shape, labels: Tensor | None, num_classes: int) -> None:
        """Before anything is drawn.

        Raises:
            ValueError: without labels, or without a classifier of them.
        """
        if labels is None:
            raise ValueError(
                "the samples have no labels to find; use a model that was trained with labels, and labels=all"
            )
        classes = features.sizes(shape).logits
        if classes != num_classes:
            has = "gives no classes" if classes is None else f"knows {classes} classes"
            raise ValueError(f"features={features.name} {has}, and the data has {num_classes}; use features=classifier")

    def __call__(self, generated: Extracted, labels: Tensor | None, features: str) -> dict[str, Score]:
        """`accuracy_<features>`, and its standard error, of a share."""
        assert generated.logits is not None
        assert labels is not None
        right = generated.logits.argmax(1) == labels.cpu()
        share, n = float(right.double().mean()), len(right)
        each = {int(y): float(right[labels == y].double().mean()) for y in torch.unique(labels)}
        error = (share * (1 - share) / n) ** 0.5
        return {f"accuracy_{features}": Score(share, error, "higher", {"by_label": each})}
