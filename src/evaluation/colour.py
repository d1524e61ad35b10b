"""Colour drift: the mean and the spread of each channel, of samples against data."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from src.evaluation.scores import Score


@dataclass(frozen=True)
class Colour:
    """How far the mean of a channel is from that of the data, at worst, in grey levels.

    Samples that have drifted are too bright, too dark or tinted, which the loss hardly shows. An average of the weights
    removes it, so raw weights are looked at as well.

    Args:
        raw_samples: samples that are drawn from the raw weights, at most.

    Raises:
        ValueError: when raw_samples is negative.
    """

    raw_samples: int = 256

    def __post_init__(self) -> None:
        if self.raw_samples < 0:
            raise ValueError(f"raw_samples={self.raw_samples} must be at least 0, which leaves the raw weights out")

    def __call__(self, samples: Mapping[str, Tensor], data: Tensor) -> dict[str, Score]:
        """`colour_drift_<weights>` for each of the sets of samples.

        Args:
            samples: uint8 (N, C, H, W), by the name of their weights.
            data: uint8 (M, C, H, W), training images.
        """
        real = channels(data)
        scores = {}
        for weights, images in samples.items():
            ours = channels(images)
            difference = ours["mean"] - real["mean"]
            worst = int(difference.abs().argmax())
            error = float((ours["error"][worst] ** 2 + real["error"][worst] ** 2).sqrt()) if len(images) > 1 else None
            details = {
                "mean": ours["mean"].tolist(),
                "std": ours["std"].tolist(),
                "data_mean": real["mean"].tolist(),
                "data_std": real["std"].tolist(),
                "num_samples": len(images),
            }
            scores[f"colour_drift_{weights}"] = Score(float(difference.abs()[worst]), error, "lower", details)
        return scores


def channels(images: Tensor) -> dict[str, Tensor]:
    """Of uint8 images, (N, C, H, W): mean and standard deviation of each channel's pixels, (C,) float64 in grey levels,
    and the standard error of the mean over images."""
    count, total, square, of_means = 0, 0.0, 0.0, []
    for part in images.split(4096):
        x = part.flatten(2).double()
        total, square = total + x.sum((0, 2)), square + x.square().sum((0, 2))
        count += len(x) * x.shape[2]
        of_means.append(x.mean(2))
    mean = torch.as_tensor(total) / count
    std = (torch.as_tensor(square) / count - mean.square()).clamp_min(0).sqrt()
    means = torch.cat(of_means)
    error = means.std(0) / len(means) ** 0.5 if len(means) > 1 else torch.zeros_like(mean)
    return {"mean": mean, "std": std, "error": error}
