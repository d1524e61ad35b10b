"""The speed of src.prepare on a folder of small JPEGs, side by side with a plain loop: python -m benchmarks.prepare

  ours    catalogue, decoding in parallel, checks, statistics, SHA-256 and the store on the disk, from the start of the
          processes to the manifest
  plain   one process: open each file with Pillow, decode it, np.asarray; nothing is kept
  two     the same loop in two processes, each for half of the files

Memory is the largest that this process held, which has torch loaded, and that of one of the two, which has not.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image


def main() -> None:
    # here, so that the processes that decode, which import this file, do so without torch
    from benchmarks.timing import arguments, interleave, rates, write_report
    from src.data.catalogues.folder import Folder
    from src.data.geometry import Geometry
    from src.data.packing import pack

    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--side", type=int, default=32, help="of the JPEGs, in pixels")
    parser.add_argument("--size", type=int, default=32, help="of what is packed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary, "jpegs"), Path(temporary, "store")
        make(folder, args.images, args.side)
        files = sorted(folder.rglob("*.jpg"))
        pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
        list(pool.map(plain, [files[:1], files[:1]]))  # started before the clock

        def ours() -> float:
            shutil.rmtree(out, ignore_errors=True)
            started = time.perf_counter()
            catalogue, _ = Folder().catalogues(folder, "folder")
            pack(catalogue, Geometry((args.size, args.size)), out, 3, processes=args.processes)
            return args.images / (time.perf_counter() - started)

        def alone() -> float:
            return args.images / plain(files)

        def two() -> float:
            started = time.perf_counter()
            list(pool.map(plain, [files[::2], files[1::2]]))
            return args.images / (time.perf_counter() - started)

        contenders: dict[str, Callable[[], float]] = {"ours": ours, "plain": alone, "two": two}
        rounds = interleave(contenders, "ours", args.rounds)
        decoding = max(pool.map(peak, [0, 0]))
        pool.shutdown()
    memory = {"this process": peak(), "one of two": decoding}
    comparisons = {
        "ours / plain": rounds.ratios("ours", "plain"),
        "ours / two": rounds.ratios("ours", "two"),
        "ours again / ours": rounds.control_ratios(),
    }
    caption = f"{args.images:,} JPEGs of {args.side}x{args.side}, {args.processes} processes"
    most = ("largest memory", ("", "GiB"), [(name, f"{gib:.2f}") for name, gib in memory.items()])
    tables = [*rates(caption, rounds, comparisons), most]
    write_report(args, tables, images_per_second=rounds.values, ratios=comparisons, memory_gib=memory)


def peak(_: int = 0) -> float:
    """The most memory that this process has held since it began its own program, in GiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def plain(files: list[Path]) -> float:
    """Seconds of decoding each."""
    started = time.perf_counter()
    for file in files:
        with Image.open(file) as image:
            np.asarray(image)
    return time.perf_counter() - started


def make(folder: Path, count: int, side: int) -> None:
    """JPEGs of blurred noise, as large as a photograph's of this side, in ten folders."""
    g = np.random.default_rng(0)
    for i in range(10):
        (folder / str(i)).mkdir(parents=True)
    for i in range(count):
        coarse = Image.fromarray(g.integers(0, 256, (max(2, side // 4), max(2, side // 4), 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / str(i % 10) / f"{i:06}.jpg", quality=90)


if __name__ == "__main__":
    main()
