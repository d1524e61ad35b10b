"""The best network there can be for a set of images, as a network: it runs wherever one runs."""

import torch
from torch import Tensor, nn

from src.data.datamodule import ImageDataModule
from src.data.loader import normalize
from src.diffusion.levels import Schedule
from src.diffusion.objectives import Objective
from src.diffusion.oracle import Mixture


class Oracle(nn.Module):
    """F = a E[x0 | x_t] + b E[eps | x_t], exactly, for the training images as the only images there are.

    It has nothing to learn; its loss is the least that any network can reach on these images, and its samples are
    these images. Its one parameter does nothing: optimisers want one.

    Args:
        schedule, objective: what the network would be trained with.
        data: where the images come from.
        num_images: use the first so many; None for all.
        std: standard deviation of a Gaussian around each image; 0 for the images themselves.
        num_classes: of an oracle that takes labels; None for one that does not.

    Raises:
        ValueError: when num_images is less than 1, std is negative, or a class has no image.
    """

    def __init__(
        self,
        schedule: Schedule,
        objective: Objective,
        data: ImageDataModule,
        num_images: int | None = None,
        std: float = 0.0,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if num_images is not None and num_images < 1:
            raise ValueError(f"num_images={num_images} must be at least 1, or null for all")
        if std < 0:
            raise ValueError(f"std={std} must not be negative; 0 is the images themselves")
        data.setup()
        self.schedule = schedule
        self.objective = objective
        self.num_classes = num_classes
        self.nothing = nn.Parameter(torch.zeros(()))
        images = normalize(data.train.images[:num_images]).double()
        self.labels = data.train.labels[:num_images]
        missing = set(range(num_classes or 0)) - set(self.labels.tolist())
        if missing:
            raise ValueError(f"num_classes={num_classes}: no image has the label {min(missing)}; use more images")
        self._mixture = Mixture(images, std)
        self._devices: dict[torch.device, Mixture] = {}
        self.std = std

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        alpha, sigma = (v.view(-1, *[1] * (x.ndim - 1)) for v in self.schedule.told(t))
        x_t = x.double() / self.objective.input_scale(alpha, sigma)
        among = None
        if y is not None and self.num_classes is not None:
            among = (y[:, None] == self.labels.to(y.device)) | (y[:, None] == self.num_classes)
        x0 = self._on(x.device).denoise(x_t, alpha.flatten(), sigma.flatten(), among)
        a, b = self.objective.row(alpha, sigma)
        return (a * x0 + b * (x_t - alpha * x0) / sigma).float() + 0 * self.nothing

    def _on(self, device: torch.device) -> Mixture:
        if device not in self._devices:
            means = self._mixture.means.view(-1, *self._mixture.shape).to(device)
            self._devices[device] = Mixture(means, self.std)
        return self._devices[device]

    def extra_repr(self) -> str:
        return f"{len(self._mixture.means)} images"
