"""Samples on disk in shards by their numbers, so that a job that was killed goes on where it was.

A shard is a file <first>-<last>.npz with all that was made of those samples. Who draws which, and how many at once, may
differ from one attempt to the next: what is there counts, what is damaged does not.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from src.errors import UserError
from src.files import remove_temporaries, replacing, shown

KEY = "key.json"


class Shards:
    """A folder of shards, all of samples that depend on the same things.

    Args:
        folder: made when the first shard is written.
        key: what the samples depend on, plain values; kept in the folder.

    Raises:
        UserError: when the folder holds a part of other samples.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self.key = json.dumps(key, indent=2, sort_keys=True)
        self._lock = Lock()
        there = folder / KEY
        if there.exists() and there.read_text() != self.key:
            others = [name for name in key if _read(there).get(name) != json.loads(self.key)[name]]
            raise UserError(
                f"{shown(folder)} holds a part of other samples ({', '.join(others) or 'its key is damaged'} differ); "
                "choose another out=, or delete that folder"
            )

    def tidy(self) -> None:
        """Removes what writers that were killed have left, while nobody writes."""
        remove_temporaries(self.folder)

    def missing(self, n: int) -> list[range]:
        """The stretches of 0 to n - 1 of which there is no whole shard, in order."""
        gaps, reached = [], 0
        for there, path in self._shards():
            if reached >= n:
                break
            if there.stop <= reached or _damaged(path):
                continue
            if there.start > reached:
                gaps.append(range(reached, min(there.start, n)))
            reached = there.stop
        return gaps if reached >= n else [*gaps, range(reached, n)]

    def save(self, indices: range, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes the shard of these samples; in each array they are the first axis."""
        with self._lock:  # of threads: temporary names are a process's own
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / KEY).exists():
                with replacing(self.folder / KEY) as temporary:
                    temporary.write_text(self.key)
        path = self.folder / f"{indices.start:07}-{indices.stop - 1:07}.npz"
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    def read(self, name: str, n: int) -> Iterator[np.ndarray]:
        """The array of that name of the samples 0 to n - 1, which are all there, in order and in parts."""
        reached = 0
        for there, path in self._shards():
            if reached >= n:
                return
            if there.stop > reached:
                with np.load(path) as arrays:
                    yield arrays[name][reached - there.start : n - there.start]
                reached = there.stop

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _shards(self) -> list[tuple[range, Path]]:
        found = []
        for path in self.folder.glob("*.npz"):
            name = re.fullmatch(r"(\d+)-(\d+)\.npz", path.name)
            if name:
                found.append((range(int(name[1]), int(name[2]) + 1), path))
        return sorted(found, key=lambda shard: (shard[0].start, shard[0].stop))


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except ValueError:
        return {}


def _damaged(path: Path) -> bool:
    """Whether a shard is not what was written, by its checksums; it is then removed."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() is not None
    except (OSError, zipfile.BadZipFile, EOFError):
        damaged = True
    if damaged:
        path.unlink(missing_ok=True)
    return damaged
