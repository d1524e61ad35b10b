"""The LightningDataModule of every image set."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lightning import LightningDataModule

from src.build import check_seed, refusals
from src.data.augmentation import Augmentation, Nothing
from src.data.catalogue import Catalogue
from src.data.geometry import Crop, Geometry, Resize
from src.data.images import ImageSet
from src.data.loader import Batch, EvalLoader, TrainLoader
from src.data.packed import Packed, Store
from src.data.packing import packed_once
from src.data.selection import COPIED, class_names, class_numbers, held_out, limited, listed, of_classes, unlabelled
from src.data.sources import CatalogueSource, Source
from src.errors import UserError
from src.launch import rank
from src.randomness import another
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
            by `val_seed`, where there is none.
        pad: pixels of black border on each side, which image_size includes; of sets that are small enough to be copied.
        seed: of the training order.
        labels: where classes are found, see the source; "none" for no classes.
        classes: names or numbers of the only classes to train on, which are numbered anew in this order.
        limit: at most so many training images, chosen by a fixed seed.
        val_list: a text file with the names of the images to validate on, one a line, in place of `val_images`.
        val_seed: of the choice of `val_images`.
        balance: train on each class equally often; see `Balanced`.
        drop_last: end each epoch with its last whole batch; see `TrainLoader`.
        augment: what else is done to training images; see src/data/augmentation.py.
        crop, resize: how images in files come to image_size; see `Geometry`.
        max_broken: so many images in files may be left out because they cannot be read.

    Attributes:
        images_done: images of the training stream that were seen before.
        stores: the packed images to train and to validate on, of a source that has such.
        restores: how often training went back to a checkpoint because it diverged; each time the order is another.

    Raises:
        UserError: when the images cannot be read, are not of the stated shape, or do not fill a batch.
    """

    def __init__(
        self,
        source: Source | CatalogueSource | Packed,
        dir: str,
        channels: int,
        image_size: int | tuple[int, int],
        num_classes: int,
        batch_size: int,
        flip: bool,
        val_images: int,
        pad: int = 0,
        seed: int = 0,
        labels: str | None = None,
        classes: Sequence[str | int] | None = None,
        limit: int | None = None,
        val_list: str | None = None,
        val_seed: int = 0,
        balance: bool = False,
        drop_last: bool = False,
        augment: Augmentation | None = None,
        crop: Crop = "center",
        resize: Resize = "lanczos",
        max_broken: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("val_images", val_images, 1), ("pad", pad, 0)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} must be at least 1, or null for all images")
        check_seed("data.val_seed", val_seed)
        self.source = source
        self.dir = Path(dir)
        self.image_shape = (channels, *as_pair(image_size))
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.flip = flip
        self.val_images = val_images
        self.pad = pad
        self.seed = seed
        self.labels = labels
        self.classes = classes
        self.limit = limit
        self.val_list = None if val_list is None else Path(val_list)
        self.val_seed = val_seed
        self.balance = balance
        self.drop_last = drop_last
        self.augment: Augmentation = Nothing() if augment is None else augment
        self.crop: Crop = crop
        self.resize: Resize = resize
        self.max_broken = max_broken
        self.images_done = 0
        self.restores = 0
        self._loaded = False
        self.stores: tuple[Store | None, ...] = ()

    def setup(self, stage: str | None = None) -> None:
        """Reads the images, once.

        Args:
            stage: "preview" for images that are only looked at: they may leave the range that networks are trained in.
        """
        if self._loaded:
            return
        train, val = self._split(*self._load())
        for store in self.stores:
            if store is not None and stage != "preview":
                store.check_range()
        self.train, self.val = self._finish(train), self._finish(val)
        if self.batch_size > len(self.train):
            raise UserError(
                f"data.batch_size={self.batch_size} is more than the {len(self.train)} training images; "
                f"choose a smaller batch"
            )
        self._loaded = True

    @property
    def class_names(self) -> Sequence[str]:
        """Of the classes that there are; one, empty, for images without classes."""
        return self.train.classes or tuple(map(str, range(self.num_classes)))

    def _load(self) -> tuple[ImageSet, ImageSet | None]:
        """The images to train on, and those to validate on where the source has some."""
        if hasattr(self.source, "load"):
            sets = self.source.load(self.dir)
        else:
            self.stores = self._opened()
            sets = [None if store is None else store.image_set() for store in self.stores]
        if self.labels not in (None, "none") and not hasattr(self.source, "catalogues"):
            raise UserError(
                f"data.labels={self.labels} is for images in files; these come with labels of their own: set null for "
                f"those, or none"
            )
        first, second = (data if data is None or self.labels != "none" else unlabelled(data) for data in sets)
        assert first is not None
        return first, second

    def _opened(self) -> tuple[Store, Store | None]:
        """The packed images of a source that has more of them than fit into memory, or does not know how many."""
        if isinstance(self.source, Packed):
            return self.source.open(self.dir)
        channels, *size = self.image_shape
        size = [side - 2 * self.pad for side in size]
        with refusals("data"):
            geometry = Geometry((size[0], size[1]), self.crop, self.resize)
        found = self.source.catalogues(self.dir, self.labels)  # type: ignore[union-attr]
        self._check_classes(found[0])  # before hours of decoding
        first, second = (None if c is None else packed_once(c, geometry, channels, self.max_broken) for c in found)
        assert first is not None
        return first, second

    def _split(self, train: ImageSet, val: ImageSet | None) -> tuple[ImageSet, ImageSet]:
        """Those of the chosen classes to train and to validate on, which share no image."""
        if self.classes is not None:
            names = class_names(train)
            train = of_classes(train, self.classes)
            val = None if val is None else of_classes(replace(val, classes=names), self.classes)
            if val is not None and not len(val):
                raise UserError(f"data.classes={list(self.classes)}: the test split holds no image of these classes")
        if self.val_list is not None:
            train, val = listed(train, self.val_list)
        elif val is None:
            train, val = held_out(train, self.val_images, self.val_seed)
        else:
            val = val[: self.val_images]
        return train if self.limit is None else limited(train, self.limit), val

    def _finish(self, data: ImageSet) -> ImageSet:
        if self.pad and self.stores and data.nbytes > COPIED:
            raise UserError(
                f"data.pad={self.pad} would copy {data.nbytes / 2**30:.1f} GiB of images into memory; pack them in the "
                "size that they are trained in"
            )
        if self.pad:
            data = replace(data, store=_padded(data.images, self.pad), rows=None, mapped=False)
        shape = tuple(data.store.shape[1:])
        if shape != self.image_shape:
            raise UserError(
                f"the images are {_shape(shape)}, not {_shape(self.image_shape)} as data.channels "
                f"and data.image_size say; set those to what the images are"
            )
        self._check_labels(int(data.labels.min()), int(data.labels.max()))
        return data

    def _check_classes(self, found: Catalogue) -> None:
        if self.classes is None:
            self._check_labels(int(found.labels.min()), int(found.labels.max()))
        else:
            class_numbers(self.classes, found.classes)
            self._check_labels(0, len(self.classes) - 1)

    def _check_labels(self, low: int, high: int) -> None:
        if not 0 <= low <= high < self.num_classes:
            raise UserError(
                f"the labels run from {low} to {high}, which data.num_classes={self.num_classes} does not allow; "
                f"set data.num_classes={high + 1}"
            )

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
            drop_last=self.drop_last,
        )

    def _placed(self, device: torch.device) -> ImageSet:
        """The training images on the device, when they take at most a quarter of the memory that is free there."""
        data = self.train
        if device.type != "cuda":
            return data
        size, free = data.nbytes, torch.cuda.mem_get_info(device)[0]
        fits = size < SHARE_OF_MEMORY * free
        if rank() == 0:
            place = "on the GPU" if fits else "fetched ahead into pinned memory, a batch at a time"
            print(f"{len(data):,} training images, {size / 1e9:.2f} GB of {free / 1e9:.2f} free: {place}", flush=True)
        return data.to(device) if fits else data

    def val_dataloader(self) -> EvalLoader:
        assert self.trainer is not None
        return EvalLoader(
            self.val,
            self.trainer.strategy.root_device,
            self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Lets a mapped file's pages go that were read some time ago."""
        for store in self.stores:
            if store is not None:
                store.touched(len(batch.index))
        return batch

    def state_dict(self) -> dict[str, int]:
        """The loader's position: images that training has seen."""
        assert self.trainer is not None
        return {"images_done": self.trainer.global_step * self.trainer.accumulate_grad_batches * self.batch_size}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.images_done = state_dict["images_done"]


def _padded(images: torch.Tensor, pad: int) -> torch.Tensor:
    """(N, C, H + 2 pad, W + 2 pad), in a border of the darkest value that the type has."""
    deep = images.dtype == torch.uint16  # which few kernels know
    black = -1.0 if images.dtype == torch.float32 else 0
    padded = torch.nn.functional.pad(images.view(torch.int16) if deep else images, [pad] * 4, value=black)
    return padded.view(torch.uint16) if deep else padded


def _shape(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"
