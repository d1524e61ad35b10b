"""How much memory training takes from a store that is larger than memory: python -m benchmarks.mapped

Makes a packed store of 64x64 RGB images of the given size, as a sparse file that takes no room on the disk, trains from
it, and then draws batches from it without a network until a part of it is read; the process's resident memory is
watched from outside: all of it, and the part that is its own and not the system's copy of the file.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import arguments, write_report
from src.data.packed import FORMAT, IMAGES, LABELS, MANIFEST, NAMES

SHAPE = (3, 64, 64)
DRAW = """
import sys, torch
from pathlib import Path
from src.data.datamodule import ImageDataModule
from src.data.loader import TrainLoader
from src.data.packed import Packed

data = ImageDataModule(Packed(), sys.argv[1], 3, 64, 1, 128, True, 1024)
data.setup()
for i, batch in enumerate(TrainLoader(data.train, torch.device("cpu"), 128, True, seed=0)):
    data.on_after_batch_transfer(batch, 0)
    if i == int(sys.argv[2]):
        break
"""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument(
        "--steps",
        type=int,
        default=30,
        help="of training, of 16 images: a network keeps more than the data path for larger ones",
    )
    parser.add_argument("--read", type=float, default=0.5, help="share of the store that is drawn without a network")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store, run = Path(folder, "store"), Path(folder, "run")
        count = sparse(store, args.gigabytes * 1e9)
        settings = [
            *("experiment=smoke", "data=packed", f"data.dir={store}", "data.batch_size=16", "data.val_images=128"),
            *(f"trainer.max_steps={args.steps}", "trainer.val_every_n_steps=1000", "callbacks.samples.num_samples=1"),
            f"hydra.run.dir={run}",
        ]
        found = {
            "training": watch([sys.executable, "-m", "src.train", *settings]),
            "drawing": watch([sys.executable, "-c", DRAW, str(store), str(int(args.read * count / 128))]),
        }
    rows = [[n, *(f"{f[k]:,.2f}" for k in ("resident", "own", "seconds"))] for n, f in found.items()]
    caption = f"a store of {args.gigabytes} GB, {count:,} images of 64x64"
    tables = [(caption, ["", "resident, GiB", "of it its own", "seconds"], rows)]
    write_report(args, tables, images=count, peaks=found)


def sparse(folder: Path, nbytes: float) -> int:
    """A store of black images of about so many bytes, and how many images they are."""
    folder.mkdir(parents=True)
    count = int(nbytes // np.prod(SHAPE))
    with (folder / IMAGES).open("wb") as file:
        file.truncate(count * int(np.prod(SHAPE)))
    np.save(folder / LABELS, np.zeros(count, np.int64))
    (folder / NAMES).write_text("[]")
    manifest: dict[str, Any] = {
        "key": {"format": FORMAT},
        "count": count,
        "shape": list(SHAPE),
        "dtype": "uint8",
        "mean": [0.0] * 3,
        "std": [0.0] * 3,
        "lowest": 0.0,
        "highest": 0.0,
        "classes": [""],
        "sha256": "",
        "source": "nothing",
        "settings": {},
        "fingerprint": "",
        "skipped": [],
        "sizes": {"64x64": count},
        "other_sizes": 0,
        "cropped": {"by_more_than_a_fifth": 0, "mean": 0.0},
        "enlarged": 0,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return count


def watch(command: list[str]) -> dict[str, float]:
    """Runs it; the most memory that it held, in GiB, and how long it took."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks = {"VmRSS": 0.0, "RssAnon": 0.0}
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) / 2**20)
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{command[:3]} ended with {process.returncode}")
    return {"resident": peaks["VmRSS"], "own": peaks["RssAnon"], "seconds": time.monotonic() - started}


if __name__ == "__main__":
    main()
