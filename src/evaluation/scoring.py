"""All scores of a run: what is asked for, what each needs, and the file that they end in.

metrics.json holds an entry a score: its value and standard error, its protocol, which is all that two numbers must
share to be compared, and details. It is written anew after each score, the cheap ones first. `stamp` tells of what was
scored.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from src.build import build, refusals
from src.data.augmentation import NOTHING
from src.data.sources import ImageSet
from src.diffusion.schedules import DiscreteSchedule
from src.errors import UserError
from src.evaluation.accuracy import Accuracy
from src.evaluation.extraction import extract
from src.evaluation.features import Extracted, Features
from src.evaluation.given import Given, load_samples
from src.evaluation.likelihood import Subject
from src.evaluation.memorisation import save_pairs, save_strip
from src.evaluation.reference import Reference, reference
from src.evaluation.sampling import Setup, draw_shards, samples_key, set_up
from src.evaluation.scores import Score
from src.evaluation.shards import Shards
from src.evaluation.stamp import of_images, of_network, of_samples, subject_stamp
from src.files import replacing, sha256
from src.processes import Group
from src.runs import Run

OVER_FEATURES = ("fd", "kd", "inception_score", "prdc", "sfid")  # scorers over the features of samples
NEEDS_FEATURES = {*OVER_FEATURES, "accuracy", "memorisation"}
OF_SAMPLES = (*OVER_FEATURES, "accuracy", "memorisation", "colour")
OF_NETWORK = ("loss", "vlb", "ode")
NAMES = (*OF_SAMPLES, *OF_NETWORK)
MANY_DIMENSIONS = 1000  # features of so many want the papers' number of samples
BATCH = 256
FEW = 64  # images that networks are asked about, unless it is said how many


@dataclass
class Evaluation:
    """A run under evaluation; made of a configuration by `prepare`, in each process of a group.

    Attributes:
        setup: draws its samples.
        given: samples that were drawn elsewhere, in their place.
        subject: its network on real images.
        n: samples.
    """

    config: dict[str, Any]
    out: Path
    group: Group
    run: Run
    train: ImageSet
    val: ImageSet
    subject: Subject
    setup: Setup
    given: Given | None
    features: Features | None
    n: int
    scorers: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @cached_property
    def reference(self) -> Reference:
        """Of all training images, as they are."""
        assert self.features is not None
        cache = None if self.config["cache"] is None else Path(self.config["cache"])
        with refusals("features"), _bar(len(self.train), f"reference, {self.features.name}") as update:
            return reference(self.features, self.train.levels, cache, update)

    @cached_property
    def images(self) -> Tensor:
        """The samples, (n, C, H, W) uint8, drawn before or now; all processes ask for them together."""
        if self.given is not None:
            return self.given.images
        return drawn(self.setup, self.config, self.n, self.out, self.group)

    @property
    def labels(self) -> Tensor | None:
        """(n,) of the samples, or None."""
        return self.setup.labels if self.given is None else self.given.labels

    @cached_property
    def extracted(self) -> Extracted:
        """Their features."""
        return features_of(self.features, self.images)

    def compute(self, name: str) -> dict[str, Score]:
        """The scores of one scorer by their full names; in processes other than the first, whatever falls to them."""
        scorer = self.scorers[name]
        if name in OF_NETWORK:
            return scorer(self.subject)
        images = self.images  # a share of them is this process's
        if name == "colour":
            return self._colour(scorer, images)
        if not self.group.first:
            return {}
        if name == "memorisation":
            return self._memorisation(scorer, images)
        if name == "accuracy":
            return scorer(self.extracted, self.labels, self.reference.name)
        return scorer(self.extracted, self.reference)

    def _colour(self, scorer: Any, images: Tensor) -> dict[str, Score]:
        sets = {self.config["weights"]: images}
        n = min(scorer.raw_samples, self.n)
        if n and self.given is None and self.config["weights"] != "raw":
            config = {**self.config, "weights": "raw"}
            sets["raw"] = drawn(set_up(config, n), config, n, self.out, self.group)
        return scorer(sets, self.train.levels) if self.group.first else {}

    def _memorisation(self, scorer: Any, images: Tensor) -> dict[str, Score]:
        held_out, trained = self.val.levels[: scorer.limit], self.train.levels
        # a training image that was mirrored is one, too
        augment = build(self.run.config.get("augment", NOTHING), "augment")
        mirrored = bool(self.run.config["data"].get("flip")) or augment.mirrors
        compared = scorer.compare(images, held_out, trained, mirrored=mirrored)
        save_pairs(compared, images, trained, self.out / "memorisation.png")
        save_strip(compared, images, trained, self.out / "neighbours.png")
        scores = scorer.scores(compared, "pixels")
        if self.features is not None and self.features.name != "pixels":
            spaces = (self.extracted.features, features_of(self.features, held_out).features)
            ours = features_of(self.features, trained) if self.reference.number > len(self.reference.features) else None
            real = self.reference.features if ours is None else ours.features
            scores |= scorer.scores(scorer.compare(*spaces, real), self.features.name)
        return scores

    def protocol(self, name: str) -> dict[str, Any]:
        """What a number must share with another one to be compared with it."""
        scorer = {"scorer": self.config[name]}
        if name in OF_NETWORK:
            together = {"batch_size": self.config["batch_size"]} if name == "ode" else {}  # images that share steps
            return {**of_network(self.config, self.subject), **together, **scorer}
        protocol = {**self._of_samples(), **self.compared_with, **scorer}
        if name == "memorisation":
            protocol["held_out"] = of_images(self.val[: self.scorers[name].limit], "validation")
        if name not in (*OVER_FEATURES, "accuracy", "memorisation"):
            protocol.pop("features", None)
        return protocol

    @property
    def compared_with(self) -> dict[str, Any]:
        """The part of a protocol of samples that tells of real images and features."""
        return {
            "reference": of_images(self.train, "train"),
            "features": None if self.features is None else self.features.stamp(),
        }

    def _of_samples(self) -> dict[str, Any]:
        if self.given is not None:
            path = Path(self.config["samples"])
            return {
                "num_samples": self.n,
                "samples": path.name,
                "samples_sha256": sha256(path),
                "quantisation": "uint8",
            }
        return of_samples(self.config, self.setup, self.n)


def prepare(config: dict[str, Any], out: Path, group: Group) -> Evaluation:
    """Builds and checks everything that a configuration asks for, before anything is computed.

    Raises:
        UserError: for whatever the user can mend.
    """
    with group.agreement():
        names = _names(config["scores"])
        for key in ("batch_size", "num_samples"):
            if config[key] is not None and config[key] < 1:
                raise UserError(f"{key}={config[key]} must be at least 1")
        run = Run(config["run"])
        features = build(config["features"], "features") if {*names} & {*OF_SAMPLES} else None
        over_features = bool({*names} & {*OVER_FEATURES, "accuracy"})
    data = group.in_turn(lambda: _data(run))
    with group.agreement():
        shape = tuple(data.train.images.shape[1:])
        config = {**config, "labels": _labels(config["labels"], run)}
        given = None if config["samples"] is None else load_samples(Path(config["samples"]), shape)
        if given is not None and config["num_samples"] not in (None, len(given.images)):
            raise UserError(f"num_samples={config['num_samples']} and {config['samples']} holds {len(given.images)}")
        n = config["num_samples"] or (
            _usual(features if over_features else None, shape) if given is None else len(given.images)
        )
        setup = set_up(config, n)
        if features is not None:
            features.to(setup.device)
        torch.backends.cudnn.allow_tf32 = False  # three digits would be the solver's error
        few = slice(_num_images(config["num_images"], data.val))
        trained = data.train[few]
        subject = Subject(
            setup.diffusion, setup.net, data.val[few], config["batch_size"], config["seed"], group, trained
        )
        evaluation = Evaluation(config, out, group, run, data.train, data.val, subject, setup, given, features, n)
        for name in names:
            scorer = build(config[name], name)
            try:
                _refuse(scorer, name, evaluation, shape)
            except ValueError as error:
                chain = isinstance(setup.diffusion.schedule, DiscreteSchedule)
                applies = name in OF_NETWORK and (name != "vlb" or chain)
                applies = applies and (name == "loss" or subject.data.num_levels is not None)
                if config["scores"] is not None or applies:
                    raise UserError(f"{name}: {error}") from error
                evaluation.left_out[name] = str(error)
                continue
            evaluation.scorers[name] = scorer
        if not evaluation.scorers:
            raise UserError(f"no score can be had: {'; '.join(evaluation.left_out.values())}")
        if group.first and features is not None and {*evaluation.scorers} & NEEDS_FEATURES:
            with refusals("features"):
                features.load()  # what is missing is missed before any sample is drawn
    return evaluation


def write(path: Path, metrics: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def entry(score: Score, protocol: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A score as metrics.json holds it.

    Raises:
        UserError: when it is NaN or infinite.
    """
    if score.value != score.value or abs(score.value) == float("inf"):
        raise UserError(f"the score is {score.value}; the weights are broken")
    plain = {"value": score.value, "standard_error": score.standard_error, "better": score.better}
    return {**plain, **score.details, "seconds": seconds, "protocol": protocol}


def run_scores(evaluation: Evaluation, say: Callable[[str, dict[str, Any]], None]) -> dict[str, Any]:
    """Computes all scores, in all processes; the first writes metrics.json after each, and tells `say` of them."""
    metrics: dict[str, Any] = {}
    for name in evaluation.scorers:
        start = time.perf_counter()
        with evaluation.group.agreement(), refusals(name):
            scores = evaluation.compute(name)
            if evaluation.group.first:
                seconds, protocol = time.perf_counter() - start, evaluation.protocol(name)
                entries = {full: entry(score, protocol, seconds) for full, score in scores.items()}
                metrics |= entries
                stamp = subject_stamp(evaluation.config, evaluation.run, evaluation.subject.device)
                write(evaluation.out / "metrics.json", {**metrics, "stamp": stamp})
                for full, made in entries.items():
                    say(full, made)
    return metrics


def drawn(setup: Setup, config: dict[str, Any], n: int, out: Path, group: Group) -> Tensor:
    """n samples, (n, C, H, W) uint8, in the first process; in the others none, of whose share it has had its own.

    They stay in <run>/evaluation/samples, where the next evaluation that wants the same finds them.
    """
    with group.agreement():
        key = samples_key(config, setup)
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        folder = setup.run.folder / "evaluation" if setup.run.in_folder else out
        shards = Shards(folder / "samples" / name, key)
    draw_shards(setup, config["seed"], n, config["batch_size"], shards, group)
    if not group.first:
        return torch.empty(0)
    images = np.empty((n, *setup.shape), np.uint8)
    done = 0
    for part in shards.read("images", n):
        images[done : done + len(part)] = part
        done += len(part)
    return torch.from_numpy(images)


def features_of(features: Features | None, images: Tensor) -> Extracted:
    assert features is not None
    with refusals("features"), _bar(len(images), features.name) as update:
        return extract(features, images.split(BATCH), len(images), update)


class _bar:
    """A progress bar, as the function that is told how many images are done."""

    def __init__(self, total: int, name: str) -> None:
        self.bar = tqdm(total=total, desc=name, unit="image", dynamic_ncols=True, delay=1)

    def __enter__(self) -> Callable[[float], object]:
        return self.bar.update

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _names(asked: list[str] | None) -> list[str]:
    if asked == []:
        raise UserError(f"scores=[] names nothing to compute; choose of {', '.join(NAMES)}, or null for all that apply")
    return [name for name in NAMES if asked is None or name in asked]


def _data(run: Run) -> Any:
    data = build(run.config["data"], "data")
    data.setup()
    return data


def _num_images(asked: int | str | None, val: ImageSet) -> int:
    n = len(val) if asked is None else min(FEW, len(val)) if isinstance(asked, str) else asked
    if not 1 <= n <= len(val):
        raise UserError(f"num_images={n} is not between 1 and the {len(val)} images that this run validates on")
    return n


def _labels(asked: Any, run: Run) -> Any:
    """auto: all labels in turn, of a network that takes any."""
    if asked != "auto":
        return asked
    return "all" if run.config["model"].get("num_classes") is not None else None


def _usual(features: Features | None, shape: Any) -> int:
    """1,000 samples; 50,000, the papers' number, over features of so many dimensions that fewer would tell nothing."""
    if features is None:
        return 1000
    with refusals("features"):
        features.check(shape)
        return 1000 if features.sizes(shape).features < MANY_DIMENSIONS else 50_000


def _refuse(scorer: Any, name: str, evaluation: Evaluation, shape: Any) -> None:
    if name in OF_NETWORK:
        scorer.refuse(evaluation.subject)
    elif name in OVER_FEATURES:
        assert evaluation.features is not None
        scorer.refuse(evaluation.n, len(evaluation.train), evaluation.features, shape)
    elif isinstance(scorer, Accuracy):
        assert evaluation.features is not None
        scorer.refuse(evaluation.features, shape, evaluation.labels, evaluation.run.config["data"]["num_classes"])
