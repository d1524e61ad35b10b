"""Shards: tar files, on a disk or behind a URL, in which files that share a name up to its first dot are one sample.

The layout of the webdataset library: 000017.jpg beside 000017.cls, which holds the number of its class, or
000017.json, whose "label" is that number. A shard is read from front to end, and no more of it than is asked for.
"""

import gzip
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from glob import has_magic
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from src.data.catalogue import BrokenImageError
from src.data.decoding import SUFFIXES
from src.data.remote import Remote
from src.errors import UserError

BLOCK = 512  # bytes: what tar files are made of
BUFFER = 2**20
URL = re.compile(r"https?://")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


class Sample(NamedTuple):
    """What a shard holds of one image.

    Attributes:
        name: shard and key.
        image: the bytes of its image file; None where there is none.
        label: what .cls or .json say; None where they say nothing.
    """

    name: str
    image: bytes | None
    label: Any


def expand(patterns: str | Sequence[str], dir: Path) -> list[str]:
    """The shards that patterns name, in their order: {000..127} and {a,b} are every one of these, * whatever is there.

    Args:
        dir: where relative paths begin.

    Raises:
        UserError: when a pattern names nothing.
    """
    shards = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in _braces(pattern):
            if URL.match(name):
                shards.append(name)
                continue
            path = dir / name
            root = Path(path.anchor)
            found = sorted(root.glob(str(path.relative_to(root)))) if has_magic(name) else [path]
            if not found or not found[0].is_file():
                raise UserError(f"there is no shard {path}; set data.dir and data.shards to where the tar files are")
            shards += map(str, found)
    return shards


def _braces(pattern: str) -> list[str]:
    found = BRACES.search(pattern)
    if found is None:
        return [pattern]
    inside = found[1]
    if numbers := RANGE.fullmatch(inside):
        first, last = numbers.groups()
        options = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    else:
        options = inside.split(",")
    return [name for option in options for name in _braces(pattern[: found.start()] + option + pattern[found.end() :])]


def samples(shard: str, skip: int = 0) -> Iterator[Sample]:
    """The samples of a shard after the first `skip`, whose bytes are passed over.

    Raises:
        BrokenImageError: when it is damaged or cut short; the samples before have been given.
        UserError: when it cannot be opened or read at all.
    """
    try:
        with _opened(shard) as stream:
            number, key = -1, ""
            parts: dict[str, bytes] = {}
            for name, size in _members(stream, shard):
                folder, _, base = name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if (of := f"{folder}/{stem}" if folder else stem) != key or number < 0:
                    if parts:
                        yield _sample(shard, key, parts)
                    number, key, parts = number + 1, of, {}
                padded = -(-size // BLOCK) * BLOCK
                if number < skip:
                    _pass_over(stream, padded, shard)
                else:
                    parts[f".{suffix.lower()}"] = _exactly(stream, padded, shard)[:size]
            if parts:
                yield _sample(shard, key, parts)
    except BrokenImageError:
        raise
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
        raise BrokenImageError(shard, f"is damaged ({error})") from error
    except OSError as error:  # urllib's too
        raise UserError(
            f"the shard {shard} cannot be read ({error}); training can go on from its checkpoint"
        ) from error


@contextmanager
def _opened(shard: str) -> Iterator[Any]:
    with ExitStack() as stack:
        raw: Any = Remote(shard) if URL.match(shard) else FileIO(shard)
        stream: Any = stack.enter_context(io.BufferedReader(stack.enter_context(raw), BUFFER))
        yield stack.enter_context(gzip.open(stream)) if shard.endswith("gz") else stream


def _members(stream: BinaryIO, shard: str) -> Iterator[tuple[str, int]]:
    """Name and size of each file; the caller takes its bytes from the stream, filled up to whole blocks."""
    longer: dict[str, str] = {}  # what headers before a file's own say of it
    while True:
        block = stream.read(BLOCK)
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise BrokenImageError(shard, "is cut short: it lacks the blocks of zeros that end a tar file") from error
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            content = _exactly(stream, -(-info.size // BLOCK) * BLOCK, shard)[: info.size]
            gnu = info.type == tarfile.GNUTYPE_LONGNAME
            longer.update({"path": content.rstrip(b"\0").decode(errors="replace")} if gnu else _pax(content))
            continue
        size = int(longer.get("size", info.size))
        if info.isreg():
            yield longer.get("path", info.name), size
        elif info.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            _pass_over(stream, -(-size // BLOCK) * BLOCK, shard)
        longer = {}


def _pax(content: bytes) -> dict[str, str]:
    """Records of "<length> <key>=<value>" and a new line."""
    records = {}
    while content:
        length = int(content.partition(b" ")[0])
        key, _, value = content[:length].partition(b" ")[2].decode(errors="replace").rstrip("\n").partition("=")
        records[key] = value
        content = content[length:]
    return records


def _exactly(stream: BinaryIO, size: int, shard: str) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise BrokenImageError(shard, "is cut short in the middle of a file")
    return content


def _pass_over(stream: BinaryIO, size: int, shard: str) -> None:
    if stream.seekable():
        stream.seek(size, io.SEEK_CUR)
        return
    while size:
        size -= len(_exactly(stream, min(size, BUFFER), shard))


def _sample(shard: str, key: str, parts: dict[str, bytes]) -> Sample:
    image = next((content for suffix, content in parts.items() if suffix in SUFFIXES), None)
    label: Any = None
    if ".cls" in parts:
        label = parts[".cls"].decode(errors="replace").strip()
    elif ".json" in parts:
        try:
            label = json.loads(parts[".json"]).get("label")
        except (ValueError, AttributeError):
            label = "damaged JSON"
    return Sample(f"{key} of {shard}", image, label)
