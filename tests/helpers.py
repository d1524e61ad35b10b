"""What several test files read."""

import csv
import json
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def rows(run: Path, without: tuple[str, ...] = ("images_per_second", "system/")) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv, without the columns (and what begins like them) that no two runs share."""
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith(without)} for row in csv.DictReader(file)]


def records(path: Path) -> dict[str, list]:
    """The records of a finished W&B run's own file, by kind; W&B's process may write them a little later."""
    deadline = time.monotonic() + 30
    while "exit" not in (found := _records(path.read_bytes())) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _records(data: bytes) -> dict[str, list]:
    """The file is a LevelDB log: after 7 bytes of its own, blocks of 32 KiB hold chunks (crc, length, kind, data),
    where kind is 1 for a whole record, and 2, 3, 4 for its first, middle and last parts.
    """
    from wandb.proto import wandb_internal_pb2

    position, whole = 7, b""
    found: dict[str, list] = {}
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too little is left of the block for a chunk
            position += 32768 - position % 32768
            continue
        _, length, part = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):
            break
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if part in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            kind = record.WhichOneof("record_type")
            found.setdefault(kind, []).append(getattr(record, kind))
            whole = b""
    return found


def items(updates: Iterable[Any]) -> dict[str, Any]:
    """What the items of a W&B record hold, by key; of a nested key, its parts joined by slashes."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}
