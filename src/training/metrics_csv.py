"""metrics.csv: every logged metric of a run, and the same table as tensors for a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from src.files import replacing, tolerated

Rows = dict[int, dict[str, float]]


class MetricsCSV(Logger):
    """One row a step, one column a metric, on disk as soon as it is logged.

    Metrics logged twice for one step share its row. Values are written with all their digits. Where the disk takes
    nothing, training goes on, and the next row that can be written brings all that are missing.

    Args:
        path: of the file; one that exists is replaced.
        table: what `table` gave, to be continued.
    """

    def __init__(self, path: Path, table: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.path = path
        self.columns = ["step"]
        self.rows: Rows = {}
        if table is not None:
            self.rows = _from_table(table)
            self.columns += table["columns"]
        self._last = max(self.rows, default=-1)  # the step whose line is the last of the file,
        self._last_start = 0  # where that begins, to be rewritten when more of it comes,
        self._size = -1  # and where it ends; -1 when the file is not known to be whole
        if self.rows:
            with tolerated(path):
                self._rewrite()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        new = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        self.rows.setdefault(step, {}).update(new)
        unknown = [k for k in new if k not in self.columns]
        self.columns += unknown
        with tolerated(self.path):
            if unknown or step < self._last or not self._is_whole():
                self._rewrite()
            else:
                self._append(step)

    def table(self) -> dict[str, Any]:
        """All rows as plain data.

        Returns:
            columns, list of str; steps, (N,) int64; values, (N, columns) float64; given, (N, columns) bool, False for
            an empty cell (a value may be NaN).
        """
        columns = self.columns[1:]
        steps = sorted(self.rows)
        values = [[self.rows[step].get(k, 0.0) for k in columns] for step in steps]
        given = [[k in self.rows[step] for k in columns] for step in steps]
        shape = (len(steps), len(columns))
        return {
            "columns": columns,
            "steps": torch.tensor(steps, dtype=torch.int64),
            "values": torch.tensor(values, dtype=torch.float64).reshape(shape),
            "given": torch.tensor(given, dtype=torch.bool).reshape(shape),
        }

    def _is_whole(self) -> bool:
        """Whether the file is as it was left: nobody took it away, and no write broke off."""
        return self.path.is_file() and self.path.stat().st_size == self._size

    def _append(self, step: int) -> None:
        start = self._last_start if step == self._last else self._size
        line = self._line(step).encode()
        self._size = -1
        with self.path.open("r+b") as file:
            file.seek(start)
            file.write(line)
            file.truncate()
        self._last, self._last_start, self._size = step, start, start + len(line)

    def _rewrite(self) -> None:
        steps = sorted(self.rows)
        lines = [",".join(self.columns) + "\n", *(self._line(step) for step in steps)]
        text = "".join(lines).encode()
        self._size = -1
        with replacing(self.path) as temporary:
            temporary.write_bytes(text)
        self._last, self._last_start, self._size = steps[-1], len(text) - len(lines[-1].encode()), len(text)

    def _line(self, step: int) -> str:
        row = self.rows[step]
        return ",".join([str(step), *(repr(row[k]) if k in row else "" for k in self.columns[1:])]) + "\n"


def _from_table(table: dict[str, Any]) -> Rows:
    columns = table["columns"]
    lines = zip(table["steps"].tolist(), table["values"].tolist(), table["given"].tolist(), strict=True)
    return {
        step: {k: value for k, value, is_given in zip(columns, values, given, strict=True) if is_given}
        for step, values, given in lines
    }
