"""Checkpoint files: written beside training, whole or not at all, and never in place of the only good one."""

import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from src.files import link_or_copy, replacing
from src.runs import LAST, PREVIOUS


class CheckpointWriter(TorchCheckpointIO):
    """Copies a checkpoint to memory, and writes the copy in a thread while training goes on.

    The file is written under a temporary name in its folder, flushed to the disk, and renamed; a last.ckpt that stood
    there becomes previous.ckpt, so that at every moment one whole checkpoint at least is there under its name. Files of
    the same checkpoint are copies, so that damage to one is not damage to all. One checkpoint is written at a time: a
    save that comes while the one before is still on its way waits for it.

    torch's format keeps a CRC-32 of everything it holds; see `src.runs.Run` for who checks it.

    Attributes:
        last_seconds: that the latest whole file took to write; None before the first.
        last_bytes: its size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last_seconds: float | None = None
        self.last_bytes: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Begins to write; `storage_options` are further paths that get the same checkpoint.

        Raises:
            OSError: when the save before could not be written.
        """
        self.wait()
        paths = [Path(path), *map(Path, storage_options or ())]
        self._pending = self._thread.submit(self._write, _in_memory(checkpoint), paths)

    def wait(self) -> None:
        """Waits for the write on its way.

        Raises:
            OSError: when it, or an earlier one that nobody has waited for, has failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def failed(self) -> bool:
        """Whether the write on its way has ended in an error, which `wait` will raise."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def _write(self, checkpoint: dict[str, Any], paths: Sequence[Path]) -> None:
        start = time.perf_counter()
        first, *others = paths
        first.parent.mkdir(parents=True, exist_ok=True)
        with replacing(first) as temporary:
            with temporary.open("wb") as file:
                self.dump(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            size = temporary.stat().st_size
            for path in others:
                with replacing(path) as copy:
                    shutil.copyfile(temporary, copy)
                    _flush(copy)
            if first.name == LAST.name and first.exists():
                with replacing(first.with_name(PREVIOUS.name)) as link:
                    link_or_copy(first, link)
        _flush(first.parent)  # the renames, too
        self.last_seconds, self.last_bytes = time.perf_counter() - start, size

    @staticmethod
    def dump(checkpoint: dict[str, Any], file: Any) -> None:
        """Writes the checkpoint into an open file."""
        torch.save(checkpoint, file)


def _flush(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in_memory(node: Any) -> Any:
    """A copy on the CPU that training cannot change."""
    if isinstance(node, Tensor):
        return node.detach().to("cpu", copy=True)
    if isinstance(node, dict):
        return {key: _in_memory(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_in_memory(value) for value in node]
    return tuple(map(_in_memory, node)) if type(node) is tuple else node
