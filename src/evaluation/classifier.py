"""The features of a classifier that this project has trained: for data sets that no large network knows."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from src.data.loader import normalize
from src.errors import UserError
from src.evaluation.features import Extracted, Features, Shape, Sizes, describe
from src.evaluation.weights import digest
from src.runs import Run, image_shape

if TYPE_CHECKING:
    pass

TRAIN = "train one with python -m src.train experiment=features_mnist, or features_digits, and give its folder"


class Classifier(Features):
    """The penultimate layer, and the logits, of a run of task=classify.

    A distance over it compares only with others over the same classifier: the stamp has the SHA-256 of its weights.

    Args:
        run: its folder, or a checkpoint.
        weights: which of the checkpoint's: ema, raw, or the name of another average.
        name: of the features.

    Raises:
        ValueError: for no run.
    """

    def __init__(self, run: str | None = None, weights: str = "ema", name: str = "classifier") -> None:
        super().__init__(name)
        if run is None:
            raise ValueError(f"run=null names no classifier; {TRAIN} with features.run=<folder>")
        self.run = run
        self.weights = weights
        self._sha256: str | None = None
        self._shape: Shape = (0, 0, 0)

    def load(self) -> None:
        if self._net is not None:
            return
        try:
            run = Run(self.run)
            with torch.random.fork_rng(devices=[]):
                net: Any = run.load_net(self.weights)
        except UserError as error:
            raise UserError(str(error).replace("run=", "features.run=")) from error
        if not getattr(net, "classifies", False):
            raise UserError(f"features.run={self.run} is no classifier but {run.config['name']}; {TRAIN}")
        self._shape = image_shape(run.config)
        self._sha256 = digest(net.state_dict())
        self._net = net.requires_grad_(False).to(self.device)

    def check(self, shape: Shape) -> None:
        self.load()
        if shape != self._shape:
            raise ValueError(
                f"{self.name} was trained on images of {describe(self._shape)} and these are {describe(shape)}; train "
                "one on the same data"
            )

    def sizes(self, shape: Shape) -> Sizes:
        self.load()
        assert self._net is not None
        return Sizes(self._net.num_features, self._net.num_classes)

    def stamp(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": "classifier of this project, penultimate layer",
            "weights_sha256": self._sha256,
            "weights": self.weights,
            "input": f"{describe(self._shape)}, float32 in [-1, 1]" if self._net is not None else None,
        }

    def _compute(self, images: Tensor) -> Extracted:
        assert self._net is not None
        features = self._net.embed(normalize(images))
        return Extracted(features, self._net.head(features))
