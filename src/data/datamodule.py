"""The LightningDataModule of every image set."""

from pathlib import Path

import torch
from lightning import LightningDataModule

from src.data.augmentation import Augmentation, Nothing
from src.data.loader import EvalLoader, TrainLoader
from src.data.sources import ImageSet, Source
from src.errors import UserError
from src.launch import rank
from src.randomness import another, generator, mix
from src.shapes import as_pair

SHARE_OF_MEMORY = 0.25  # of what is free, for images; the rest is for the network and what it keeps


class ImageDataModule(LightningDataModule):
    """Images of one size, on the training device when they fit; see `TrainLoader` for order and flips.

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
        balance: train on each class equally often; see `Balanced`.
        augment: what else is done to training images; see src/data/augmentation.py.

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
        balance: bool = False,
        augment: Augmentation | None = None,
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
        self.balance = balance
        self.augment: Augmentation = Nothing() if augment is None else augment
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
        return TrainLoader(
            self._placed(device),
            device,
            self.batch_size,
            self.flip,
            another(self.seed, self.restores),
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            start=self.images_done,
            augment=self.augment,
            balance=self.balance,
        )

    def _placed(self, device: torch.device) -> ImageSet:
        """The training images on the device, when they take at most a quarter of the memory that is free there."""
        data = self.train
        if device.type != "cuda":
            return data
        size, free = data.images.nbytes, torch.cuda.mem_get_info(device)[0]
        fits = size < SHARE_OF_MEMORY * free
        if rank() == 0:
            place = "on the GPU" if fits else "fetched ahead into pinned memory, a batch at a time"
            print(f"{len(data):,} training images, {size / 1e9:.2f} GB of {free / 1e9:.2f} free: {place}", flush=True)
        return ImageSet(data.images.to(device), data.labels.to(device)) if fits else data

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
