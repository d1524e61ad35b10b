"""What a score depends on.

A protocol is what two numbers must share to be compared. The stamp tells of what was scored, and where: it may differ.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from src.data.sources import ImageSet
from src.diffusion.samplers import generate
from src.evaluation.likelihood import Subject
from src.evaluation.reference import images_digest
from src.evaluation.sampling import Setup
from src.runs import Run
from src.training.summary import git_commit, versions


def of_samples(config: dict[str, Any], setup: Setup, n: int) -> dict[str, Any]:
    """The protocol of n samples."""
    return {
        "num_samples": n,
        "sampler": config["sampler"],
        "steps": setup.steps,
        "path_sha256": setup.path_sha256,
        "evaluations": evaluations(setup),
        "guidance": config["guidance"],
        "labels": config["labels"],
        "weights": config["weights"],
        "seed": config["seed"],
        "precision": config["precision"],
        "quantisation": "uint8, rounded",
    }


def of_network(config: dict[str, Any], subject: Subject) -> dict[str, Any]:
    """The protocol of a network that is asked for images that exist."""
    return {
        "images": of_images(subject.data, "validation"),
        "weights": config["weights"],
        "seed": config["seed"],
        "precision": "32-true",
    }


def of_images(data: ImageSet, split: str) -> dict[str, Any]:
    """The identity of real images."""
    return {"split": split, "number": len(data), "sha256": _digest(data.images)}


@lru_cache(maxsize=8)
def _digest(images: torch.Tensor) -> str:
    return images_digest(images)


def subject_stamp(config: dict[str, Any], run: Run, device: torch.device) -> dict[str, Any]:
    """What was scored, and where."""
    return {
        "run": config["run"],
        "checkpoint": str(run.checkpoint),
        "checkpoint_sha256": run.sha256,
        "weights": config["weights"],
        "data": run.config["data"],
        "seed": config["seed"],
        "device": str(device),
        "git_commit": git_commit(),
        "versions": versions(),
    }


class _Counter:
    """A network that returns zeros, and counts the rows that it is asked for."""

    def __init__(self, net: Any) -> None:
        self.rows = 0
        self.self_conditioning = getattr(net, "self_conditioning", False)
        self.learned_variance = getattr(net, "learned_variance", False)
        self.num_classes = getattr(net, "num_classes", None)

    def __call__(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        self.rows += len(x)
        x = x.chunk(2, dim=1)[0] if self.self_conditioning else x
        return torch.cat([torch.zeros_like(x)] * (2 if self.learned_variance else 1), dim=1)


def evaluations(setup: Setup) -> int:
    """How often a sample asks networks, guidance and a guiding network included; counted with one that is free."""
    counter: Any = _Counter(setup.net)
    guide = None if setup.guide is None else (setup.guide[0], counter)
    cpu = torch.device("cpu")
    silent = replace(setup, net=counter, guide=guide, device=cpu, shape=(setup.shape[0], 1, 1))
    with torch.no_grad():
        for _ in generate(
            silent.denoiser(range(1)), setup.sampler, setup.diffusion.schedule, silent.shape, 0, range(1), cpu
        ):
            pass
    return counter.rows
