"""Tables of images in Parquet files, as Hugging Face's datasets have them."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from src.data.catalogue import BrokenImageError, Catalogue
from src.data.catalogues.common import digest, is_hidden
from src.data.decoding import Array, FloatRange, check_float_range, decode, finished
from src.data.labels import Labels, named, no_labels, numbered
from src.errors import UserError

SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}
LABEL = "label"


@dataclass(frozen=True)
class Parquet:
    """Parquet files: a column of images, and one of classes.

    Images are files in a column of {bytes, path} or of bytes, or numbers in nested lists (height, width, channels).
    Files whose path says validation (or val, valid, dev; or else test) validate, those that say train train.

    Args:
        image: the column of images; None finds it.
        shape: (height, width, channels) of images that are flat lists of numbers.
        float_range, gaps: see `src.data.catalogues.common.FileSource`.
    """

    image: str | None = None
    shape: tuple[int, int, int] | None = None
    float_range: tuple[float, float] = (-1.0, 1.0)
    gaps: bool = False

    def __post_init__(self) -> None:
        check_float_range(self.float_range)

    def catalogues(self, dir: Path, labels: str | None = None) -> tuple[Catalogue, Catalogue | None]:
        """The images to train on, and those to validate on where files say so.

        Args:
            dir: a file, or a folder of files, nested or not.
            labels: "none", or the column of classes, numbers or names; None for `label` where there is one.

        Raises:
            UserError: when there are no such files, one is damaged, or a column is not there or does not fit.
        """
        train, val = split_files(dir)
        tables = [_table(path) for path in (*train, *val)]
        image = self._image_column(tables[0])
        wrong = next((table for table in tables if not table.schema.equals(tables[0].schema)), None)
        if wrong is not None:
            raise UserError(f"{wrong.path} has other columns than {tables[0].path}; set data.dir to files of one kind")
        found = self._labels(tables, labels)
        parts = []
        start = 0
        for group in (tables[: len(train)], tables[len(train) :]):
            count = sum(map(sum, (table.row_groups for table in group)))
            names = _names(group, image, dir)
            numbers = found.numbers[start : start + count]
            start += count
            parts.append(
                ParquetCatalogue(dir, group, image, names, numbers, found.classes, self.shape, self.float_range)
            )
        if not len(parts[0].names):
            raise UserError(f"{dir} holds Parquet files without rows; there is nothing to train on")
        return parts[0], parts[1] if len(parts[1].names) else None

    def _image_column(self, table: "Table") -> str:
        fields = {field.name: field.type for field in table.schema}
        if self.image is not None:
            if self.image not in fields:
                raise UserError(
                    f"data.source.image={self.image} is no column of {table.path}; there are {_all(fields)}"
                )
            return self.image
        found = [name for name, kind in fields.items() if _holds_images(kind)]
        named = [name for name in ("image", "img", *found[:1] * (len(found) == 1)) if name in found]
        if not named:
            raise UserError(
                f"no column of {table.path} is plainly that of images; set data.source.image to one of {_all(fields)}"
            )
        return named[0]

    def _labels(self, tables: Sequence["Table"], labels: str | None) -> Labels:
        fields = {field.name: field.type for field in tables[0].schema}
        column = labels or LABEL
        if labels == "none" or (labels is None and column not in fields):
            return no_labels(sum(sum(table.row_groups) for table in tables))
        if column not in fields:
            raise UserError(f"data.labels={column} is no column of {tables[0].path}; there are {_all(fields)}")
        values: list[Any] = []
        for table in tables:
            part = _opened(table.path).read(columns=[column], use_threads=False).column(0).to_pylist()
            if None in part:
                raise UserError(f"{table.path} has no {column} in row {part.index(None)}; set data.labels=none")
            values += part
        title = f"{column} of {tables[0].path.parent}"
        if all(isinstance(value, str) for value in values):
            return named(values)
        if all(isinstance(value, bool) for value in values):
            return Labels(np.array(values, np.int64), (f"not {column}", column))
        if not all(isinstance(value, int) for value in values):
            raise UserError(f"{title} is {fields[column]}, neither whole numbers nor names; set data.labels=none")
        return numbered(np.array(values, np.int64), title, _class_names(tables[0].schema, column), self.gaps)


class Table(NamedTuple):
    """A Parquet file.

    Attributes:
        row_groups: how many rows each has.
    """

    path: Path
    schema: Any
    row_groups: tuple[int, ...]


@dataclass(eq=False)
class ParquetCatalogue:
    """Images in the rows of Parquet files, one file after the other: a `Catalogue`.

    A group of rows is unpacked at a time, and the last one is kept.
    """

    root: Path
    tables: Sequence[Table]
    image: str
    names: Sequence[str]
    labels: NDArray[np.int64]
    classes: Sequence[str]
    shape: tuple[int, int, int] | None = None
    float_range: FloatRange = (-1.0, 1.0)
    _kept: tuple[int, int, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._groups = [(t, g) for t, table in enumerate(self.tables) for g in range(len(table.row_groups))]
        counts = [self.tables[t].row_groups[g] for t, g in self._groups]
        self._ends = np.cumsum(counts) if counts else np.zeros(0, np.int64)

    @property
    def where(self) -> str:
        return str(self.root)

    def read(self, i: int) -> Array:
        name = self.names[i]
        group = int(np.searchsorted(self._ends, i, side="right"))
        start = int(self._ends[group - 1]) if group else 0
        try:
            value = self._column(group)[i - start]
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise BrokenImageError(name, f"cannot be read ({' '.join(str(error).split())[:200]})") from error
        return self._image(value, name)

    def _column(self, group: int) -> Any:
        if self._kept is None or self._kept[:2] != (os.getpid(), group):
            self._kept = None  # frees one group before the next is read
            t, g = self._groups[group]
            table = _opened(self.tables[t].path).read_row_group(g, columns=[self.image], use_threads=False)
            self._kept = os.getpid(), group, table.column(0)
        return self._kept[2]

    def _image(self, value: Any, name: str) -> Array:
        import pyarrow

        content = value.as_py() if pyarrow.types.is_binary(value.type) else None
        if pyarrow.types.is_large_binary(value.type):
            content = value.as_py()
        elif pyarrow.types.is_struct(value.type):
            if "bytes" not in [field.name for field in value.type]:
                raise BrokenImageError(name, f"is a {value.type} in the table and has no bytes; set data.source.image")
            content = None if not value.is_valid else value["bytes"].as_py()
            if value.is_valid and content is None:
                raise BrokenImageError(name, "has a path but no bytes in the table; write the images into it")
        elif _is_list(value.type) and value.is_valid:
            return self._listed(value, name)
        if content is None:
            raise BrokenImageError(name, "is missing in the table")
        return decode(content, name, self.float_range)

    def _listed(self, value: Any, name: str) -> Array:
        kind = value.type
        while _is_list(kind):
            kind = getattr(kind, "storage_type", kind).value_type
        try:
            array = np.array(value.as_py(), np.dtype(kind.to_pandas_dtype()))
        except (ValueError, TypeError) as error:  # rows of different lengths, or missing numbers
            raise BrokenImageError(name, f"is no array of numbers ({' '.join(str(error).split())[:80]})") from error
        if array.ndim == 1:
            if self.shape is None or array.size != np.prod(self.shape):
                raise BrokenImageError(
                    name,
                    f"is a list of {array.size} numbers; set data.source.shape=[height,width,channels], of which it "
                    f"has {'none' if self.shape is None else list(self.shape)}",
                )
            array = array.reshape(self.shape)
        return finished(array, name, self.float_range)

    def fingerprint(self) -> str:
        states = [(_below(table.path, self.root), *_state(table.path), *table.row_groups) for table in self.tables]
        return digest("parquet", [*states, (self.image, self.shape)], self, self.float_range)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def split_files(dir: Path) -> tuple[list[Path], list[Path]]:
    """The Parquet files to train on, and those to validate on, sorted by name.

    Raises:
        UserError: when there are none.
    """
    if dir.is_file():
        return [dir], []
    if not dir.exists():
        raise UserError(f"data.dir={dir} does not exist")
    paths = [path for path in dir.rglob("*.parquet") if not any(map(is_hidden, path.relative_to(dir).parts))]
    if not paths:
        raise UserError(f"data.dir={dir} holds no .parquet files")
    kinds: dict[str, list[Path]] = {"train": [], "val": [], "test": [], "": []}
    for path in sorted(paths):
        words = re.split(r"[^a-z]+", path.relative_to(dir).as_posix().lower())
        kinds[next((SPLITS[word] for word in words if word in SPLITS), "")].append(path)
    train = kinds["train"] or kinds[""]
    val = kinds["val"] or kinds["test"]
    return (train, val) if train else (val, [])


def _names(tables: Sequence[Table], image: str, dir: Path) -> list[str]:
    """The paths of the images, where they tell them apart; else the file and the row."""
    import pyarrow

    counted = [f"{_below(table.path, dir)}:{row}" for table in tables for row in range(sum(table.row_groups))]
    if not tables:
        return counted
    kind = tables[0].schema.field(image).type
    if not pyarrow.types.is_struct(kind) or kind.get_field_index("path") < 0:
        return counted
    paths: list[str | None] = []
    for table in tables:
        column = _opened(table.path).read(columns=[f"{image}.path"], use_threads=False).column(0)
        paths += [None if row is None else row["path"] for row in column.to_pylist()]
    known = {path for path in paths if path}
    return paths if len(known) == len(counted) else counted  # type: ignore[return-value]


def _class_names(schema: Any, column: str) -> tuple[str, ...]:
    """Those that Hugging Face's datasets write into the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[column]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()


def _table(path: Path) -> Table:
    file = _opened(path)
    groups = tuple(file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups))
    return Table(path, file.schema_arrow, groups)


def _opened(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet files need pyarrow, which is not installed; pip install pyarrow") from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise UserError(f"{path} is damaged or no Parquet file ({reason}); replace it") from error


def _below(path: Path, dir: Path) -> str:
    return path.name if path == dir else path.relative_to(dir).as_posix()


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _is_list(kind: Any) -> bool:
    return hasattr(getattr(kind, "storage_type", kind), "value_type")


def _holds_images(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or _is_list(kind))


def _all(fields: dict[str, Any]) -> str:
    return ", ".join(fields)
