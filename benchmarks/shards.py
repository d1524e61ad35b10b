"""How fast shards are read: images a second of data=webdataset, against reading the same tar files alone.

  ours     src.data.streaming.StreamLoader: read, decoded, shuffled, batched, flipped and normalised
  samples  every file of the tar files, read one after another in one process and thrown away
  bytes    the tar files as files, in blocks of a megabyte

Random smooth pictures, a .cls beside each, as JPEGs and as .npy, which need no decoding, from the system's cache: a
disk or a network is slower than that, and what is compared here is the most that ours can cost.
"""

import io
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import Rounds, arguments, interleave, rates, write_report
from src.data.shards import samples
from src.data.webdataset import WebDataModule
from tests.data.test_webdataset import write


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--images", type=int, default=1000, help="a shard")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="a turn")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    tables, results = [], {}
    for suffix in ("jpg", "npy"):
        rounds, caption = measure(suffix, args)
        comparisons = {f"ours / {name}": rounds.ratios("ours", name) for name in ("samples", "bytes")}
        comparisons["samples again / samples"] = rounds.control_ratios()
        tables += rates(caption, rounds, comparisons)
        results[suffix] = {"images_per_second": rounds.values, "ratios": comparisons}
    write_report(args, tables, results=results)


def measure(suffix: str, args: Namespace) -> tuple[Rounds, str]:
    """Images a second, and what they were."""
    with tempfile.TemporaryDirectory() as folder:
        shards = make(Path(folder), suffix, args)
        each = sum(Path(shard).stat().st_size for shard in shards) / (args.shards * args.images)
        streams = {"ours": ours(folder, args), "samples": read(shards), "bytes": raw(shards, each)}

        def turn(name: str) -> float:
            """Images a second; first what was fetched ahead is taken."""
            stream, seen = streams[name], 0
            fetched = 2 * 4096 if name == "ours" else 0
            while fetched > 0:
                fetched -= next(stream)
            started = time.perf_counter()
            while time.perf_counter() - started < args.seconds:
                seen += next(stream)
            return seen / (time.perf_counter() - started)

        rounds = interleave({name: lambda name=name: turn(name) for name in streams}, "samples", args.rounds)
    files = f"{args.size}x{args.size} .{suffix} files of {each:,.0f} bytes"
    return rounds, f"{files}, batch {args.batch_size}, {args.workers} workers"


def make(folder: Path, suffix: str, args: Namespace) -> list[str]:
    for i in range(args.shards):
        coarse = torch.randint(0, 256, (args.images, 8, 8, 3), dtype=torch.uint8)
        files = {}
        for j, pixels in enumerate(coarse):
            file = io.BytesIO()
            image = Image.fromarray(pixels.numpy()).resize((args.size, args.size), Image.Resampling.BICUBIC)
            if suffix == "jpg":
                image.save(file, "JPEG")
            else:
                np.save(file, np.asarray(image))
            files |= {f"{i}_{j}.{suffix}": file.getvalue(), f"{i}_{j}.cls": b"0"}
        write(folder / f"{i:03d}.tar", files)
    write(folder / "val.tar", dict(list(files.items())[:200]))
    return [str(folder / f"{i:03d}.tar") for i in range(args.shards)]


def ours(folder: str, args: Namespace) -> Iterator[int]:
    sizes = {"channels": 3, "image_size": args.size, "num_classes": 10, "batch_size": args.batch_size}
    names = {"shards": f"{{000..{args.shards - 1:03d}}}.tar", "val_shards": "val.tar", "dir": folder}
    data = WebDataModule(**names, **sizes, flip=True, val_images=100, workers=args.workers)
    data.setup()
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1)
    return (len(batch.x0) for batch in data.train_dataloader())


def read(shards: list[str]) -> Iterator[int]:
    return (1 for shard in cycle(shards) for _ in samples(shard))


def raw(shards: list[str], each: float) -> Iterator[float]:
    for shard in cycle(shards):
        with Path(shard).open("rb") as file:
            while block := file.read(2**20):
                yield len(block) / each


if __name__ == "__main__":
    main()
