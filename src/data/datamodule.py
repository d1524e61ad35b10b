"""The LightningDataModule of every image set."""

from pathlib import Path

import torch
from lightning import LightningDataModule

from src.data.images import ImageSet
from src.data.loader import EvalLoader, TrainLoader
from src.data.sources import Source
from src.errors import UserError
from src.randomness import another, generator, mix
from src.shapes import as_pair


class ImageDataModule(LightningDataModule):
    """Images in memory as uint8, on the training device when they fit; see `TrainLoader` for order and flips.

    Args:
        source: where the images come from.
        dir: folder of the image files.
        channels, image_size: what the images must be; networks are built from these before any image is read.
        num_classes: how many different labels there are.
        batch_size: images a batch, of all devices together.
        flip: mirror each training image with probability 1/2.
        val_images: validation uses the first so many of the test split, or holds out so many training images, chosen
            by a fixed seed, where there is none.
        pad: pixels of black border on each side.
        seed: of the training order.

    Attributes:
        images_done: images of the training stream that were seen before.
        restores: how often training went back to a checkpoint because it diverged; each time the order is another.

    Raises:
        UserError: when the images cannot be read, are not of the stated shape, or do not fill a batch.
    """

    def __init__(
        self,
        source: Source,
        dir: str,
        channels: int,
        image_size: int | tuple[int, int],
        num_classes: int,
        batch_size: int,
        flip: bool,
        val_images: int,
        pad: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("val_images", val_images, 1), ("pad", pad, 0)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.source = source
        self.dir = Path(dir)
        self.image_shape = (channels, *as_pair(image_size))
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.flip = flip
        self.val_images = val_images
        self.pad = pad
        self.seed = seed
        self.images_done = 0
        self.restores = 0
        self._loaded = False

    def setup(self, stage: str | None = None) -> None:
        """Reads the images, once."""
        if self._loaded:
            return
        train, val = self.source.load(self.dir)
        if val is None:
            if self.val_images >= len(train):
                raise UserError(f"data.val_images={self.val_images} leaves nothing of {len(train)} images to train on")
            order = torch.randperm(len(train), generator=generator(mix(0x5917), 0))
            train, val = train[order[self.val_images :].sort().values], train[order[: self.val_images].sort().values]
        else:
            val = val[: self.val_images]
        self.train, self.val = self._finish(train), self._finish(val)
        if self.batch_size > len(self.train):
            raise UserError(
                f"data.batch_size={self.batch_size} is more than the {len(self.train)} training images; "
                f"choose a smaller batch"
            )
        self._loaded = True

    def _finish(self, data: ImageSet) -> ImageSet:
        images = torch.nn.functional.pad(data.images, [self.pad] * 4) if self.pad else data.images
        if tuple(images.shape[1:]) != self.image_shape:
            raise UserError(
                f"the images are {_shape(tuple(images.shape[1:]))}, not {_shape(self.image_shape)} as data.channels "
                f"and data.image_size say; set those to what the images are"
            )
        if not 0 <= int(data.labels.min()) <= int(data.labels.max()) < self.num_classes:
            raise UserError(
                f"the labels run from {int(data.labels.min())} to {int(data.labels.max())}, which data.num_classes="
                f"{self.num_classes} does not allow; they must be 0 to data.num_classes - 1"
            )
        return ImageSet(images, data.labels)

    def train_dataloader(self) -> TrainLoader:
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        data = self.train
        if device.type == "cuda" and data.images.nbytes < 0.25 * torch.cuda.mem_get_info(device)[0]:
            data = ImageSet(data.images.to(device), data.labels.to(device))
        return TrainLoader(
            data,
            device,
            self.batch_size,
            self.flip,
            another(self.seed, self.restores),
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            start=self.images_done,
        )

    def val_dataloader(self) -> EvalLoader:
        assert self.trainer is not None
        return EvalLoader(
            self.val,
            self.trainer.strategy.root_device,
            self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def state_dict(self) -> dict[str, int]:
        """The loader's position: images that training has seen."""
        assert self.trainer is not None
        return {"images_done": self.trainer.global_step * self.trainer.accumulate_grad_batches * self.batch_size}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.images_done = state_dict["images_done"]


def _shape(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"
