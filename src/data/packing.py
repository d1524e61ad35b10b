"""The packed store's writer: all images of a catalogue, decoded once, in one size.

One process writes; others decode for it. Images are appended to `images.bin` in the catalogue's order, and now and then
`progress.json` says how far what is on the disk is good: a writer that was killed goes on from there. Once all are
there, labels and then the manifest are written: what has no manifest is no store.
"""

import errno
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from src.data.catalogue import BrokenImageError, Catalogue
from src.data.geometry import Geometry
from src.data.packed import (
    FORMAT,
    IMAGES,
    KINDS_OF_SIZES,
    LABELS,
    MANIFEST,
    NAMES,
    VAL,
    Manifest,
    Store,
    read_manifest,
)
from src.data.preparing import Chunk, Preparation, read
from src.data.workers import in_order
from src.errors import UserError
from src.files import cache_folder, remove_temporaries, replacing, shown
from src.lock import Lock

PROGRESS = "progress.json"
OWN = {IMAGES, LABELS, NAMES, MANIFEST, PROGRESS, VAL, ".lock"}
CHUNK_BYTES = 2**20  # of packed images that a process hands over at once, about
CHUNK = 256  # images, at most
SMALL = 1024  # so many are decoded here: processes would take longer to start
SYNC_SECONDS = 2.0  # between two notes of progress
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class Progress:
    """What is known of the images that are packed.

    Attributes:
        key: what they depend on.
        shape: (H, W, C), of each, and its type.
        done: images of the catalogue that were read, also those that were skipped.
        count: of them that are packed.
        sums, squares: of each channel's values as stored; whole numbers are exact.
        sizes: how many there are of each "HxW", before cropping.
        cropped: how many lost more than a fifth to cropping; lost: the shares that all of them lost, summed.
        enlarged: how many were smaller than they are now.
        skipped: name and reason of those that could not be read.
    """

    key: dict[str, Any]
    shape: list[int]
    dtype: str
    done: int = 0
    count: int = 0
    sums: list[Any] = field(default_factory=list)
    squares: list[Any] = field(default_factory=list)
    lowest: float | None = None
    highest: float | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    cropped: int = 0
    lost: float = 0.0
    enlarged: int = 0
    skipped: list[list[str]] = field(default_factory=list)
    skipped_numbers: list[int] = field(default_factory=list)

    @property
    def image_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def add(self, chunk: Chunk) -> None:
        self.done += chunk.read
        self.count += len(chunk.pixels)
        self.skipped += [[name, reason] for _, name, reason in chunk.broken]
        self.skipped_numbers += [number for number, _, _ in chunk.broken]
        if not len(chunk.pixels):
            return
        zeros = [0] * self.shape[2]
        self.sums = [a + b for a, b in zip(self.sums or zeros, chunk.sums, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares or zeros, chunk.squares, strict=True)]
        self.lowest = chunk.lowest if self.lowest is None else min(self.lowest, chunk.lowest)
        self.highest = chunk.highest if self.highest is None else max(self.highest, chunk.highest)
        for size, number in chunk.sizes.items():
            self.sizes[size] = self.sizes.get(size, 0) + number
        self.cropped += chunk.cropped
        self.lost += chunk.lost
        self.enlarged += chunk.enlarged


def identity(catalogue: Catalogue, geometry: Geometry, channels: int | None) -> dict[str, Any]:
    """What a store's content depends on, as plain values: images, their order and labels, and the settings."""
    sha = hashlib.sha256(np.ascontiguousarray(catalogue.labels, np.int64).tobytes())
    for name in catalogue.names:
        sha.update(name.encode(errors="surrogateescape") + b"\0")
    return {
        "format": FORMAT,
        "fingerprint": catalogue.fingerprint(),
        "images_and_labels": sha.hexdigest(),
        "classes": list(catalogue.classes),
        "settings": {
            "size": list(geometry.size),
            "crop": geometry.crop,
            "resize": geometry.resize,
            "seed": geometry.seed,
            "channels": channels,
        },
    }


def pack(
    catalogue: Catalogue,
    geometry: Geometry,
    out: Path,
    channels: int | None = None,
    max_broken: int = 0,
    processes: int | None = None,
    wait: bool = False,
) -> Manifest:
    """Packs all images into the folder `out`, or goes on where it was; nothing is done where all is there.

    Args:
        channels: that all images must have, grey ones being made colours of; None for those of the first image.
        max_broken: images that may be left out because they cannot be read; the manifest lists them.
        processes: that decode; None for one a core.
        wait: for another process that packs into this folder, rather than to refuse.

    Raises:
        UserError: when an image more than `max_broken` cannot be read, the disk is full, or `out` holds something else
            or is being packed into by another process; what was packed stays, and is gone on from.
    """
    if max_broken < 0:
        raise UserError(f"data.max_broken={max_broken} must not be negative")
    if not len(catalogue.names):
        raise UserError(f"{catalogue.where} holds no images")
    with _disk_in_words(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = Lock(out, "being packed into", wait)
        try:
            return _Packer(catalogue, geometry, out, channels, max_broken, processes).run()
        finally:
            lock.release()


def packed_once(catalogue: Catalogue, geometry: Geometry, channels: int, max_broken: int) -> Store:
    """The store of a catalogue in the cache: packed by whoever comes first, mapped by all.

    Raises:
        UserError: see `pack`.
    """
    key = json.dumps(identity(catalogue, geometry, channels), sort_keys=True)
    folder = cache_folder("data") / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not (folder / MANIFEST).exists():
        _say(f"packing {len(catalogue.names):,} images of {catalogue.where}, once, into {folder}")
    manifest = pack(catalogue, geometry, folder, channels, max_broken, wait=True)
    if len(manifest.skipped) > max_broken:  # of a packing that was allowed more
        name, reason = manifest.skipped[max_broken]
        raise UserError(
            f"{name} {reason}, and {len(manifest.skipped)} images of {catalogue.where} cannot be used; repair them, or "
            f"leave them out with data.max_broken={len(manifest.skipped)}"
        )
    return Store(folder)


class _Packer:
    def __init__(
        self,
        catalogue: Catalogue,
        geometry: Geometry,
        out: Path,
        channels: int | None,
        max_broken: int,
        processes: int | None,
    ) -> None:
        self.catalogue = catalogue
        self.geometry = geometry
        self.out = out
        self.channels = channels
        self.max_broken = max_broken
        self.processes = processes
        self.key = identity(catalogue, geometry, channels)

    def run(self) -> Manifest:
        self._refuse_others()
        if (self.out / MANIFEST).exists():
            manifest = read_manifest(self.out)
            if manifest.key != self.key:
                others = _differing(manifest.key, self.key)
                raise UserError(
                    f"{shown(self.out)} holds a store of other images or settings ({others} differ); choose another "
                    "out=, or delete that folder"
                )
            (self.out / PROGRESS).unlink(missing_ok=True)
            return manifest
        remove_temporaries(self.out)
        progress = self._resumed()
        try:
            with (self.out / IMAGES).open("r+b" if progress else "w+b") as file:
                if progress is None:
                    progress = self._begun()
                sha = _hash_of(file, progress.count * progress.image_bytes)
                self._append(file, progress, sha)
            return self._finish(progress, sha.hexdigest())
        finally:
            if not (self.out / PROGRESS).exists() and not (self.out / MANIFEST).exists():
                (self.out / IMAGES).unlink(missing_ok=True)  # too little to go on from

    def _refuse_others(self) -> None:
        foreign = [path.name for path in self.out.iterdir() if path.name not in OWN and not path.name.endswith(".tmp")]
        if foreign:
            raise UserError(
                f"{shown(self.out)} holds other files ({', '.join(sorted(foreign)[:3])}); choose a new folder with out="
            )

    def _resumed(self) -> Progress | None:
        path = self.out / PROGRESS
        if not path.exists():
            return None
        try:
            progress = Progress(**json.loads(path.read_text()))
            there = (self.out / IMAGES).stat().st_size
        except (ValueError, TypeError, OSError):
            progress, there = None, 0
        if progress is None or progress.key != self.key or there < progress.count * progress.image_bytes:
            _say(f"note: what {shown(self.out)} holds is a part of other images or settings; it is begun anew")
            path.unlink()
            return None
        _say(f"going on in {shown(self.out)}, which holds {progress.count:,} of {len(self.catalogue.names):,} images")
        self._allow(progress.skipped)
        return progress

    def _begun(self) -> Progress:
        """The first image that can be read says what all must be."""
        skipped: list[list[str]] = []
        for number in range(len(self.catalogue.names)):
            try:
                image = read(self.catalogue, number)
            except BrokenImageError as error:
                skipped.append([error.name, error.reason])
                self._allow(skipped)
                continue
            channels = self.channels or image.shape[2]
            return Progress(self.key, [*self.geometry.size, channels], str(image.dtype))
        raise UserError(f"{self.catalogue.where}: no image can be read; the first, {' '.join(skipped[0])}")

    def _append(self, file: BinaryIO, progress: Progress, sha: Any) -> None:
        total = len(self.catalogue.names)
        needed = (total - progress.done) * progress.image_bytes
        free = os.statvfs(self.out)
        if needed > free.f_bavail * free.f_frsize:
            have = free.f_bavail * free.f_frsize / 2**30
            _say(f"note: {needed / 2**30:.2f} GiB are to be written, and {have:.2f} GiB are free on the disk")
        size = max(1, min(CHUNK, CHUNK_BYTES // progress.image_bytes))
        chunks = [range(i, min(i + size, total)) for i in range(progress.done, total, size)]
        processes = self.processes or (1 if total - progress.done <= SMALL else _cores())
        work = Preparation(self.catalogue, self.geometry, progress.shape[2], progress.dtype)
        synced = time.monotonic()
        try:
            with _bar(total, progress.done) as bar:
                for _, chunk in in_order(work, chunks, processes):
                    file.write(chunk.pixels.data if len(chunk.pixels) else b"")
                    sha.update(chunk.pixels)
                    progress.add(chunk)
                    self._allow(progress.skipped)
                    bar.update(chunk.read)
                    if time.monotonic() - synced > SYNC_SECONDS:
                        self._note(file, progress)
                        synced = time.monotonic()
        except OSError:
            raise
        except BaseException:
            if progress.done >= SMALL or (self.out / PROGRESS).exists():
                self._note(file, progress)
            raise
        file.flush()
        os.fsync(file.fileno())

    def _allow(self, skipped: list[list[str]]) -> None:
        if len(skipped) <= self.max_broken:
            return
        name, reason = skipped[self.max_broken]
        if self.max_broken == 0:
            mend = "" if ";" in reason else "repair it or take it away, "
            raise UserError(f"{name} {reason}; {mend}or leave such images out with data.max_broken=100")
        raise UserError(
            f"{name} {reason}; with it {self.max_broken + 1} images cannot be used, more than data.max_broken="
            f"{self.max_broken}; the first is {skipped[0][0]}"
        )

    def _note(self, file: BinaryIO, progress: Progress) -> None:
        """Says on the disk that what is on the disk so far is good."""
        file.flush()
        os.fsync(file.fileno())
        _write_json(self.out / PROGRESS, asdict(progress))

    def _finish(self, progress: Progress, sha256: str) -> Manifest:
        if not progress.count:
            raise UserError(f"{self.catalogue.where}: no image can be used; the first, {' '.join(progress.skipped[0])}")
        kept = np.ones(len(self.catalogue.names), bool)
        kept[progress.skipped_numbers] = False
        labels = np.asarray(self.catalogue.labels, np.int64)[kept]
        with replacing(self.out / LABELS) as temporary, temporary.open("wb") as file:
            np.save(file, labels)
            file.flush()
            os.fsync(file.fileno())
        _write_json(self.out / NAMES, [name for name, keep in zip(self.catalogue.names, kept, strict=True) if keep])
        manifest = self._manifest(progress, sha256)
        _write_json(self.out / MANIFEST, asdict(manifest))
        (self.out / PROGRESS).unlink(missing_ok=True)
        return manifest

    def _manifest(self, progress: Progress, sha256: str) -> Manifest:
        height, width, channels = progress.shape
        pixels = progress.count * height * width
        mean = [s / pixels for s in progress.sums]
        whole = progress.dtype != "float32"
        # of whole numbers n sum x^2 - (sum x)^2 is exact
        std = [
            ((pixels * q - s * s if whole else pixels * (q - s * (s / pixels))) ** 0.5) / pixels
            if pixels * q > s * s
            else 0.0
            for s, q in zip(progress.sums, progress.squares, strict=True)
        ]
        assert progress.lowest is not None
        assert progress.highest is not None
        sizes = Counter(progress.sizes).most_common()
        return Manifest(
            key=progress.key,
            count=progress.count,
            shape=[channels, height, width],
            dtype=progress.dtype,
            mean=mean,
            std=std,
            lowest=progress.lowest,
            highest=progress.highest,
            classes=list(self.catalogue.classes),
            sha256=sha256,
            source=self.catalogue.where,
            settings=progress.key["settings"],
            fingerprint=progress.key["fingerprint"],
            skipped=progress.skipped,
            sizes=dict(sizes[:KINDS_OF_SIZES]),
            other_sizes=sum(number for _, number in sizes[KINDS_OF_SIZES:]),
            cropped={"by_more_than_a_fifth": progress.cropped, "mean": progress.lost / progress.count},
            enlarged=progress.enlarged,
        )


def _hash_of(file: BinaryIO, size: int) -> Any:
    """SHA-256 of the first bytes, after which the file then ends."""
    sha = hashlib.sha256()
    file.truncate(size)
    file.seek(0)
    while block := file.read(2**22):
        sha.update(block)
    return sha


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _differing(a: dict[str, Any], b: dict[str, Any]) -> str:
    flat = [{**key, **key.get("settings", {})} for key in (a, b)]
    names = [name for name in flat[1] if name != "settings" and flat[0].get(name) != flat[1][name]]
    return ", ".join({"fingerprint": "the files", "images_and_labels": "names and labels"}.get(n, n) for n in names)


def _write_json(path: Path, content: dict[str, Any] | list[str]) -> None:
    with replacing(path) as temporary, temporary.open("w") as file:
        file.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _disk_in_words(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(
                f"the disk that holds {shown(out)} is full; what was packed stays: make room, and the same command "
                "goes on from there"
            ) from error
        cache = f" the cache is $XDG_CACHE_HOME/{out.parent.parent.name}/{out.parent.name}" * (
            out.parent == cache_folder("data")
        )
        raise UserError(f"{shown(out)} cannot be written to ({error});{cache or ' choose another folder'}") from error


@contextmanager
def _bar(total: int, done: int) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(
        total=total,
        initial=done,
        desc="packing",
        unit="image",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        disable=total < SMALL and not sys.stderr.isatty(),
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_fmt}]",
    ) as bar:
        yield bar


def _say(line: str) -> None:
    print(line, flush=True)
