"""Who scores: Fréchet distances over the features of two classifiers that were trained on the real MNIST.

The first is this project's experiment=features_mnist; the second has another architecture, seed and training, and is a
check of the first. The reference are REFERENCE training images, and what it is to be as good as real are the distances
of other training images, as many as there are samples, in DRAWS disjoint sets.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.mnist_quality import Classifier, embed, fit, probabilities
from src.data.sources import MNIST
from src.evaluation import classifier as ours
from src.evaluation.extraction import extract
from src.evaluation.frechet import Moments, distance, moments
from src.evaluation.weights import digest
from src.files import save
from src.overrides import plain_value
from src.runs import SUMMARY

REFERENCE = 10_000
DRAWS = 3
EPOCHS = 4  # of the second
JUDGES = ("first", "second")


class Judges:
    """Both classifiers, trained in `work` if they are not there yet.

    Args:
        data: folder that holds MNIST/raw.
        work: folder of the race.

    Attributes:
        about: of each judge, its accuracy on the 10,000 test images, and the SHA-256 of its weights.
    """

    def __init__(self, data: Path, work: Path) -> None:
        train, test = MNIST().load(data)
        assert test is not None
        self.first = ours.Classifier(name="first", run=_first(data, work / "classifier").as_posix())
        self.second = _second(train, work / "classifier_2.pt")
        logits = extract(self.first, test.images.split(1000), len(test)).logits
        assert logits is not None
        guesses = {"first": logits, "second": probabilities(self.second, test.images)}
        weights = {"first": self.first.stamp()["weights_sha256"], "second": digest(self.second.state_dict())}
        self.about = {
            judge: {
                "accuracy": float((guess.argmax(1) == test.labels).float().mean()),
                "sha256": weights[judge],
            }
            for judge, guess in guesses.items()
        }
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        self._others = train.images[order[REFERENCE:]]
        self._reference = self._moments(train.images[order[:REFERENCE]])

    def score(self, images: Tensor) -> dict[str, float]:
        """The distance of images, (N, 1, 28, 28) uint8, to the reference, by judge."""
        return {judge: distance(m, self._reference[judge]).value for judge, m in self._moments(images).items()}

    def real(self, number: int) -> tuple[dict[str, list[float]], Tensor]:
        """The distances of DRAWS sets of so many real images, by judge, and the first set."""
        sets = self._others.split(number)[:DRAWS]
        scores = [self.score(images) for images in sets]
        return {judge: [score[judge] for score in scores] for judge in JUDGES}, sets[0]

    def _moments(self, images: Tensor) -> dict[str, Moments]:
        features = extract(self.first, images.split(1000), len(images)).features
        return {"first": moments(features), "second": moments(embed(self.second, images))}


def _first(data: Path, work: Path) -> Path:
    if not (work / SUMMARY).is_file():
        where = f"data.dir={plain_value(str(data))}", f"hydra.run.dir={plain_value(str(work))}"
        settings = ("experiment=features_mnist", *where, "resume=auto")
        subprocess.run([sys.executable, "-m", "src.train", *settings, "trainer=cpu"], check=True)
    return work


def _second(train: Any, path: Path) -> Classifier:
    net = Classifier()
    if path.is_file():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    torch.manual_seed(1)
    net = fit(train, EPOCHS)
    save(net.state_dict(), path)
    return net
