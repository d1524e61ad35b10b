"""How fast batches reach the device: images a second, 32x32 RGB, as shuffled, flipped and normalised floats.

  ours    src.data.loader.TrainLoader over one uint8 tensor
  mapped  the same over a file that is mapped into memory
  PIL     a torchvision-style data set (Image.fromarray, RandomHorizontalFlip, ToTensor, Normalize) behind a DataLoader
          with persistent workers and the default prefetch
  floor   index_select, flip and normalisation alone, with indices and flips chosen beforehand

All draw from the same 50,000 random images, for ever. A turn of PIL first takes what its workers have fetched ahead, so
that the clock sees their pace and not their stock, and waits after it until they have restocked.
"""

import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, ToTensor

from benchmarks.timing import arguments, interleave, rates, write_report
from src.data.augmentation import flip
from src.data.images import ImageSet
from src.data.loader import TrainLoader, normalize

PREFETCH = 2  # batches a worker, DataLoader's default


class PILImages(Dataset):
    """As torchvision's CIFAR10 does it: arrays of (H, W, C) uint8, an Image each."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.transform = Compose([RandomHorizontalFlip(), ToTensor(), Normalize([0.5] * 3, [0.5] * 3)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), 0


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batches", type=int, default=780, help="batches a turn of ours and of the floor")
    parser.add_argument("--pil-batches", type=int, default=100, help="batches a turn of PIL")
    parser.add_argument("--workers", type=int, default=2, help="of PIL")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    images = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8)

    def turn(batches: Iterator[Tensor], count: int) -> float:
        """Images a second over so many batches."""
        started = time.perf_counter()
        for _ in range(count):
            next(batches)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return args.batch_size * count / (time.perf_counter() - started)

    resident = images.to(device)  # where ImageDataModule puts a set of this size
    loader = TrainLoader(
        ImageSet(resident, torch.zeros(len(resident), dtype=torch.int64, device=device)),
        device,
        args.batch_size,
        flip=True,
        seed=0,
    )
    ours = (batch.x0 for batch in loader)
    mapped = (batch.x0 for batch in TrainLoader(on_disk(images), device, args.batch_size, flip=True, seed=0))
    floor = bare(resident, args.batch_size)
    pil = pil_batches(images, args.batch_size, args.workers, device)

    def pil_turn() -> float:
        for _ in range(PREFETCH * args.workers):
            next(pil)
        rate = turn(pil, args.pil_batches)
        time.sleep(2 * PREFETCH * args.workers * args.batch_size / rate)
        return rate

    contenders: dict[str, Callable[[], float]] = {
        "ours": lambda: turn(ours, args.batches),
        "mapped": lambda: turn(mapped, args.batches),
        "PIL": pil_turn,
        "floor": lambda: turn(floor, args.batches),
    }
    rounds = interleave(contenders, "ours", args.rounds)

    comparisons = {
        "ours / PIL": rounds.ratios("ours", "PIL"),
        "floor / ours": rounds.ratios("floor", "ours"),
        "floor / mapped": rounds.ratios("floor", "mapped"),
        "ours again / ours": rounds.control_ratios(),
    }
    where = f"{device}, batch {args.batch_size}, {torch.get_num_threads()} threads, PIL with {args.workers} workers"
    tables = rates(where, rounds, comparisons)
    write_report(args, tables, device, images_per_second=rounds.values, ratios=comparisons)


def on_disk(images: Tensor) -> ImageSet:
    with tempfile.NamedTemporaryFile() as file:  # gone with the last that has it mapped
        images.numpy().tofile(file.name)
        stored = torch.from_file(file.name, shared=True, size=images.numel(), dtype=images.dtype).view(images.shape)
    return ImageSet(stored, torch.zeros(len(images), dtype=torch.int64), mapped=True)


def bare(images: Tensor, batch_size: int) -> Iterator[Tensor]:
    order = torch.randperm(len(images), device=images.device)
    mirrored = torch.rand(len(images), device=images.device) < 0.5
    full = len(images) // batch_size
    parts = list(zip(order.split(batch_size)[:full], mirrored.split(batch_size)[:full], strict=True))
    while True:
        for index, mirror in parts:
            yield normalize(flip(images.index_select(0, index), mirror))


def pil_batches(images: Tensor, batch_size: int, workers: int, device: torch.device) -> Iterator[Tensor]:
    loader = DataLoader(
        PILImages(images.permute(0, 2, 3, 1).contiguous().numpy()),
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )
    while True:
        for batch, _ in loader:
            yield batch.to(device, non_blocking=True)


if __name__ == "__main__":
    main()
