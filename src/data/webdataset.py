"""The LightningDataModule of shards: images that are read as they are trained on, for data that fits no disk."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule

from src.data.augmentation import Augmentation, Nothing
from src.data.catalogue import BrokenImageError
from src.data.decoding import check_float_range
from src.data.first import FirstImages, first_images
from src.data.geometry import Crop, Geometry, Resize
from src.data.images import ImageSet
from src.data.lanes import Lane, Place, note
from src.data.loader import EvalLoader
from src.data.sampled import Decode
from src.data.shards import Sample, expand, samples
from src.data.streaming import StreamLoader
from src.errors import UserError
from src.randomness import another
from src.shapes import as_pair

MOST_LANES = 16  # of those that are chosen here


class WebDataModule(LightningDataModule):
    """Shards of tar files in the layout of the webdataset library, read while training goes on.

    See `src.data.lanes` for the order, and for what going on costs: each lane opens one shard, passes over what it has
    read of it (of a URL: downloads it again), and decodes one window again.

    Args:
        shards: paths or URLs; {000..127} and {a,b} stand for each of these, * and ? for what is there.
        val_shards: the same of those to validate on, from which training takes none.
        dir: where relative paths begin.
        channels, image_size: what images are, and the size that they get.
        num_classes: how many different labels there are; 1 for images without.
        batch_size: images a batch, of all devices together.
        flip: mirror each training image with probability 1/2.
        val_images: validation uses the first so many.
        shuffle: images that are shuffled together, about, of all processes; memory holds them about three times.
        lanes: shards that are read side by side, of all processes; null for a power of two up to 16.
        workers: processes, of each that trains, that read and decode; 0 for none.
        max_broken: so many samples and shards may be skipped by each process.
        crop, resize: see `Geometry`.
        float_range: what the values of .npy files of floats span.
        seed: of the training order.
        augment: what else is done to training images.

    Attributes:
        images_done: images of the training stream that were seen before.
        restores: how often training went back to a checkpoint because it diverged; each time the order is another.
        val: the images to validate on, in memory.
        first: the images that the stream begins with, of a preview.

    Raises:
        UserError: when there are no such shards, or what is read of them cannot be used.
    """

    interleaved = True  # process r has the images r, r + world_size, ... of a batch

    def __init__(
        self,
        shards: str | Sequence[str] | None,
        val_shards: str | Sequence[str] | None,
        dir: str,
        channels: int,
        image_size: int | tuple[int, int],
        num_classes: int,
        batch_size: int,
        flip: bool,
        val_images: int,
        shuffle: int = 4096,
        lanes: int | None = None,
        workers: int = 2,
        max_broken: int = 0,
        crop: Crop = "center",
        resize: Resize = "lanczos",
        float_range: tuple[float, float] = (-1.0, 1.0),
        seed: int = 0,
        augment: Augmentation | None = None,
    ) -> None:
        super().__init__()
        least = {"batch_size": 1, "val_images": 1, "shuffle": 1, "num_classes": 1, "workers": 0, "max_broken": 0}
        for name, smallest in least.items():
            if locals()[name] < smallest:
                raise ValueError(f"{name}={locals()[name]} must be at least {smallest}")
        if lanes is not None and lanes < 1:
            raise ValueError(f"lanes={lanes} must be at least 1, or null")
        check_float_range(float_range)
        if crop == "random":
            raise ValueError("crop=random is of src.prepare, which numbers its images; choose center or none")
        self.patterns = shards, val_shards
        self.dir = Path(dir)
        self.image_shape = (channels, *as_pair(image_size))
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.flip = flip
        self.val_images = val_images
        self.shuffle = shuffle
        self.num_lanes = lanes
        self.workers = workers
        self.max_broken = max_broken
        self.decode = Decode(self.image_shape, num_classes, Geometry(as_pair(image_size), crop, resize), float_range)
        self.seed = seed
        self.augment: Augmentation = Nothing() if augment is None else augment
        self.images_done = 0
        self.restores = 0
        self.places: list[Place] = []
        self.val: ImageSet
        self.first: FirstImages | None = None
        self._loader: StreamLoader | None = None
        self._loaded = False

    def setup(self, stage: str | None = None) -> None:
        """Finds the shards, and reads the images to validate on, once.

        Args:
            stage: "preview" for the first images of the stream, too.
        """
        if self._loaded:
            return
        for key, patterns in zip(("shards", "val_shards"), self.patterns, strict=True):
            if not patterns:
                raise UserError(f"data.{key} names no shards; set data.{key}=\"'train-{{0000..0127}}.tar'\" or URLs")
        self.shards, val_shards = (expand(patterns, self.dir) for patterns in self.patterns if patterns)
        if both := sorted(set(self.shards) & set(val_shards)):
            raise UserError(f"{both[0]} is among data.shards and data.val_shards; validate on shards of their own")
        if self.num_lanes is None:
            self.num_lanes = max(2**i for i in range(MOST_LANES.bit_length()) if 2**i <= min(len(self.shards), 16))
        if self.num_lanes > len(self.shards):
            raise UserError(
                f"data.lanes={self.num_lanes} is more than the {len(self.shards)} shards of data.shards; a lane reads "
                "shards of its own: choose fewer, or make more and smaller shards"
            )
        self.val = self._held_out(val_shards)
        if stage == "preview":
            self.first = first_images(
                self._lanes(self.seed), self.decode, self.class_names, str(self.patterns[0]), self.max_broken
            )
        self._loaded = True

    def _held_out(self, shards: list[str]) -> ImageSet:
        broken: list[str] = []
        images, labels = [], []
        for sample in _all(shards):
            try:
                if isinstance(sample, BrokenImageError):
                    raise sample
                image, label = self.decode(sample)
            except BrokenImageError as error:
                note(str(error), broken, self.max_broken)
                continue
            self.decode = replace(self.decode, dtype=image.dtype)
            images.append(image)
            labels.append(label)
            if len(images) == self.val_images:
                break
        if not images:
            raise UserError(f"data.val_shards={self.patterns[1]} holds no images")
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return ImageSet(pixels, torch.tensor(labels))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Numbers; one name, empty, for images without classes."""
        return tuple(map(str, range(self.num_classes))) if self.num_classes > 1 else ("",)

    @property
    def train(self) -> ImageSet:
        """The first images of the stream, for a preview.

        Raises:
            UserError: for all who want to see all of them.
        """
        if self.first is not None:
            return self.first.images
        raise UserError(
            "data=webdataset has no set of training images to look at, only a stream of them; what compares with all "
            "of them (src.evaluate, callbacks.score, model=oracle) needs them packed or in a folder"
        )

    def _lanes(self, seed: int) -> list[Lane]:
        assert self.num_lanes is not None
        size = max(1, self.shuffle // self.num_lanes)
        return [
            Lane(i, self.num_lanes, self.shards, size, self.decode, seed, self.max_broken)
            for i in range(self.num_lanes)
        ]

    def train_dataloader(self) -> StreamLoader:
        trainer: Any = self.trainer
        seed = another(self.seed, self.restores)
        lanes = self._lanes(seed)
        try:
            self._loader = StreamLoader(
                lanes,
                self.places if self.images_done else [Place()] * len(lanes),
                trainer.strategy.root_device,
                self.batch_size,
                self.flip,
                self.augment,
                seed,
                self.workers,
                self.max_broken,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
                start=self.images_done,
            )
        except ValueError as error:
            raise UserError(f"data: {error}") from error
        return self._loader

    def val_dataloader(self) -> EvalLoader:
        trainer: Any = self.trainer
        device, ranks = trainer.strategy.root_device, (trainer.global_rank, trainer.world_size)
        return EvalLoader(self.val, device, self.batch_size, *ranks)

    def state_dict(self) -> dict[str, Any]:
        """Images that training has seen, and the place of each lane; all ranks must ask together."""
        trainer: Any = self.trainer
        assert self._loader is not None
        done = trainer.global_step * trainer.accumulate_grad_batches * self.batch_size
        own = self._loader.places_at(done)
        everyone: list[Any] = [own]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, own)
        places = dict(place for places in everyone for place in places)
        return {
            "images_done": done,
            "shards": len(self.shards),
            "places": [list(places[i]) for i in range(len(places))],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (len(self.shards), self.num_lanes) != (state_dict["shards"], len(state_dict["places"])):
            raise UserError(
                f"the run was trained on {state_dict['shards']} shards in {len(state_dict['places'])} lanes, and now "
                f"there are {len(self.shards)} in {self.num_lanes}; give it the same, or start a new run"
            )
        self.images_done = state_dict["images_done"]
        self.places = [Place(*place) for place in state_dict["places"]]


def _all(shards: list[str]) -> Iterator[Sample | BrokenImageError]:
    for shard in shards:
        try:
            yield from samples(shard)
        except BrokenImageError as error:
            yield error
