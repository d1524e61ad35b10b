"""What the tests of faults share: how far a run came, and callbacks that do the harm from inside."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from src import processes
from src.errors import UserError
from src.training import score
from src.training.sharding import local
from tests.helpers import rows


def steps_logged(run: Path) -> int:
    """The last step of metrics.csv; 0 when there is none yet."""
    try:
        lines = (run / "metrics.csv").read_text().splitlines()[1:]
        return max((int(line.partition(",")[0]) for line in lines), default=0)
    except (FileNotFoundError, ValueError):  # caught at the beginning of a line
        return 0


def saved_step(run: Path) -> int:
    """That of last.ckpt; 0 when there is none yet."""
    try:
        return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    except FileNotFoundError:
        return 0


def state(run: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and moments of last.ckpt."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    moments = checkpoint["optimizer_states"][0]["state"]
    return {
        **checkpoint["state_dict"],
        **{f"ema {name}": value for name, value in checkpoint["ema"].items()},
        **{f"adam {i} {name}": value for i, of in moments.items() for name, value in of.items()},
    }


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, averages, moments, metrics and sample grids, to the bit."""
    wa, wb = state(a), state(b)
    assert wa.keys() == wb.keys()
    assert [name for name in wa if not torch.equal(wa[name], wb[name])] == []
    assert rows(a) == rows(b)
    grids = [sorted((run / "samples").iterdir()) for run in (a, b)]
    assert [grid.name for grid in grids[0]] == [grid.name for grid in grids[1]]
    assert all(x.read_bytes() == y.read_bytes() for x, y in zip(*grids, strict=True))
    assert list(b.rglob("*.tmp")) == []


class SlowWrites(Callback):
    """Writes half of each checkpoint, waits, and writes the rest: most moments are in the middle of a save."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        writer: Any = trainer.strategy.checkpoint_io
        dump = writer.dump

        def slowly(checkpoint: dict[str, Any], file: Any) -> None:
            import io

            whole = io.BytesIO()
            dump(checkpoint, whole)
            data = whole.getvalue()
            file.write(data[: len(data) // 2])
            file.flush()
            time.sleep(self.seconds)
            file.write(data[len(data) // 2 :])

        writer.dump = slowly


class OnlyAtFirst(Callback):
    """A fault that does not come back when the run is continued."""

    first = False

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.first = trainer.global_step == 0


class SlowReference(Callback):
    """The group in which gradients are shared waits for a process for so many seconds, and a reference takes half as
    many again: the ten minutes and an hour of a large set, in short."""

    def __init__(self, patience: float) -> None:
        score.reference = partial(self._reference, score.reference, 1.5 * patience)  # type: ignore[attr-defined]
        processes.JOIN = timedelta(seconds=patience)

    @staticmethod
    def _reference(compute: Callable[..., Any], seconds: float, *arguments: Any) -> Any:
        time.sleep(seconds)
        return compute(*arguments)


class SlowStep(OnlyAtFirst):
    """One step that takes long, in which a second Ctrl-C can come."""

    def __init__(self, step: int, seconds: float) -> None:
        self.step = step
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.first and trainer.global_step == self.step:
            print("in the slow step", flush=True)
            deadline = time.monotonic() + self.seconds
            while time.monotonic() < deadline:
                time.sleep(0.01)


class FillDisk(OnlyAtFirst):
    """Fills the disk that a folder is on before one step, and makes room again before another."""

    def __init__(self, folder: str, full_at: int, room_at: int | None = None) -> None:
        self.filler = Path(folder) / "filler"
        self.full_at = full_at
        self.room_at = room_at

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.first and trainer.global_step == self.full_at:
            with contextlib.suppress(OSError), self.filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if trainer.global_step == self.room_at:
            self.filler.unlink(missing_ok=True)


class Poison(Callback):
    """Spoils a weight before some steps: NaN, or so large that the loss explodes.

    Args:
        steps: before which.
        value: that the weight gets, as text, since a configuration holds no nan.
        layer: whose first weight.
        restores: only while training has not gone back more often than so.
        once: put the weight right again after the gradient, as if a cosmic ray had hit an activation.
    """

    def __init__(self, steps: list[int], value: str, layer: str, restores: int = 0, once: bool = True) -> None:
        self.steps = steps
        self.value = float(value)
        self.layer = layer
        self.restores = restores
        self.once = once
        self._own: torch.Tensor | None = None

    def _first(self, module: LightningModule) -> torch.Tensor:
        """The layer's first weight, in place."""
        weight = local(module.net.get_parameter(self.layer))
        return weight[(slice(1),) * weight.ndim]

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        weight = self._first(pl_module)
        guard: Any = next(c for c in trainer.callbacks if type(c).__name__ == "Guard")  # type: ignore[attr-defined]
        if trainer.global_step in self.steps and guard.restores <= self.restores:
            self._own = weight.clone() if self.once else None
            weight.fill_(self.value)

    @torch.no_grad()
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._own is not None:
            self._first(pl_module).copy_(self._own)
            self._own = None


class StopAt(Callback):
    """A SIGTERM in some steps, each once, whether the run was continued or not."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps
        self._began = 0

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self._began = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step + 1 in self.steps and trainer.global_step + 1 > self._began:
            os.kill(os.getpid(), signal.SIGTERM)


class DieAt(Callback):
    """Ends the command by an exception after a step, with nothing saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise UserError("died")


class CountCollectives(Callback):
    """Prints how often Python asked for a collective in ten steps: torch's reducer works below it."""

    def __init__(self, first: int) -> None:
        self.steps = range(first, first + 10)
        self.counts: dict[str, int] = {}

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        import torch.distributed as dist

        for name in ("all_reduce", "broadcast", "barrier", "all_gather", "reduce", "broadcast_object_list"):
            setattr(dist, name, self._counted(trainer, name, getattr(dist, name)))

    def _counted(self, trainer: Trainer, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            if trainer.global_step in self.steps:
                self.counts[name] = self.counts.get(name, 0) + 1
            return collective(*arguments, **settings)

        return call

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            print(f"collectives in ten steps: {dict(sorted(self.counts.items()))}", flush=True)


class CountParts(Callback):
    """Says at the end how many numbers the weights are, and how many of weights, averages and moments each rank has."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        moments = trainer.optimizers[0].state_dict()["state"].values()
        parts = [
            sum(local(p).numel() for p in module.net.parameters()),
            sum(shadow.numel() for shadow in module.ema._shadows["ema"]),
            sum(value.numel() for of in moments for name, value in of.items() if name.startswith("exp_avg")),
        ]
        of_all: Any = trainer.strategy.all_gather(torch.tensor(parts))
        if trainer.is_global_zero:
            print("\nparts of", sum(p.numel() for p in module.net.parameters()), *of_all.flatten().tolist(), flush=True)


class ClockBack(Callback):
    """Sets the clock of the process back by a day, as a machine without a battery does when it finds a time server."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            real, real_ns = time.time, time.time_ns
            time.time = lambda: real() - 86400
            time.time_ns = lambda: real_ns() - 86400 * 10**9
