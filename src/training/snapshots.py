"""Snapshots of the power-function averages, <run>/ema/step=<n>.pt, from which src.ema makes averages of any length.

Each is {"step": n, "lengths": {average: length}, "weights": {average: the network's state_dict}}: plain containers and
float32 tensors, safe to load with weights_only=True.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.errors import UserError, reason
from src.files import check_sums, save
from src.training.averages import Power

FOLDER = "ema"
POSTHOC = "posthoc"  # the key of checkpoints whose average src.ema made: how it did


def write_snapshot(run_dir: Path, step: int, lengths: dict[str, float], weights: dict[str, dict[str, Tensor]]) -> None:
    """Writes the snapshot of a step, in the place of one that is there.

    Raises:
        OSError: when it cannot be written.
    """
    path = run_dir / FOLDER / f"step={step}.pt"
    path.parent.mkdir(exist_ok=True)
    on_cpu = {average: {name: w.cpu() for name, w in state.items()} for average, state in weights.items()}
    try:
        save({"step": step, "lengths": lengths, "weights": on_cpu}, path)
    except RuntimeError as error:  # what torch's writer makes of a full disk
        raise OSError(str(error)) from error


def find_snapshots(run_dir: Path) -> dict[int, Path]:
    """The snapshots of a run by their step, in order."""
    files = (run_dir / FOLDER).glob("step=*.pt")
    return dict(sorted((int(path.stem[5:]), path) for path in files if re.fullmatch(r"step=\d+", path.stem)))


def read_snapshot(path: Path, whole: bool = True) -> dict[str, Any]:
    """A snapshot, whose weights stay on the disk until they are used; never executes what it holds.

    Args:
        whole: read all of it once, to compare it with its checksums; not needed for its head alone.

    Raises:
        UserError: when it is damaged, or no snapshot.
    """
    try:
        if whole:
            check_sums(path)
        snapshot = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        lengths = {average: Power(length) for average, length in snapshot["lengths"].items()}
        if not lengths or lengths.keys() != snapshot["weights"].keys() or snapshot["step"] != int(path.stem[5:]):
            raise ValueError("its parts do not belong together")
    except Exception as error:  # unpickling damaged bytes raises anything
        raise UserError(
            f"{path} is damaged or not a snapshot ({reason(error)}); take it away, and the others will do without it"
        ) from error
    return snapshot
