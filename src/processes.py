"""Several processes that do one job: who one is, what is one's share, and everything back in the first.

A launcher has started them, torchrun, srun or `src.start`; see `src.launch`.
Item k of a job belongs to process k mod size.

What travels is small (uint8 images, numbers), so that it goes over gloo, on the CPU, whatever device has made it.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from src.errors import UserError
from src.launch import Launch, launched, meeting_point
from src.start import ERROR_FILE, start

T = TypeVar("T")
JOIN = timedelta(minutes=10)  # within which all must have come
WORK = timedelta(days=30)  # for which the first to be done waits for the last; one that has died is noticed at once


class Lost(UserError):  # noqa: N818
    """Another process of the group has gone."""


@dataclass(frozen=True)
class Group:
    """The processes of a job, seen from one of them.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
        handle: torch's group; None for its default one.
    """

    rank: int = 0
    size: int = 1
    handle: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those items that are this process's."""
        return items[self.rank :: self.size]

    def gather(self, made: Sequence[T]) -> list[T]:
        """What all processes have made of their shares, in the order of the items, in the first; [] in the others."""
        if self.size == 1:
            return list(made)
        parts: list[Any] = [None] * self.size
        with self._exchange():
            dist.gather_object(list(made), parts if self.first else None, dst=0, group=self.handle)
        if not self.first:
            return []
        return [parts[k % self.size][k // self.size] for k in range(sum(map(len, parts)))]

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """A block of one's own work, which all processes leave together: an error of one is the error of all.

        Raises:
            UserError: in all, when the block raised it in one.
        """
        if self.size == 1:
            yield
            return
        own: UserError | None = None
        try:
            yield
        except UserError as error:
            own = error
        sentences: list[Any] = [None] * self.size
        with self._exchange():
            dist.all_gather_object(sentences, None if own is None else str(own), group=self.handle)
        for sentence in sentences:
            if sentence is not None:
                raise UserError(sentence) from own

    def in_turn(self, make: Callable[[], T]) -> T:
        """What `make` returns, in the first process before the others: it may download something."""
        with self.agreement():
            made = [make()] if self.first else []
        with self.agreement():
            made = made or [make()]
        return made[0]

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise Lost(
                f"another of the {self.size} processes has ended before its work was done; its own output says why"
            ) from error


ALONE = Group()


@contextmanager
def joined(device: str = "cpu") -> Iterator[Group]:
    """The group that a launcher has started, for as long as the block lasts; a process that is alone joins nothing.

    All leave the block together, so that a folder that is still empty is not taken for one that nobody needs. Of a
    UserError only the first process tells; the others end with the same exit code, 2.

    Args:
        device: what the block will compute on; "auto" or "cuda" chooses this process's GPU where there are any.

    Raises:
        UserError: when the others do not come.
    """
    place = launched()
    if place is None or place.world_size == 1:
        yield ALONE
        return
    threads = torch.get_num_threads()
    share_cores(place)
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    try:
        group = _join(place)
        yield group
        with group.agreement():
            pass
    except UserError as error:
        file = os.environ.get(ERROR_FILE)
        if file is not None and not isinstance(error, Lost):
            Path(file).write_text(str(error))
        if file is None and place.rank == 0:
            raise
        if file is None:
            time.sleep(1)  # until the first has told: torchrun ends all when one has failed
        raise SystemExit(2) from error
    finally:
        torch.set_num_threads(threads)
        if dist.is_initialized():
            dist.destroy_process_group()


def share_cores(place: Launch) -> None:
    """Gives torch as many threads as there are cores for this process, unless the user has said how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(place.threads)


def meet(place: Launch, backend: str) -> None:
    """Makes torch's default group of all processes that the launcher has started.

    A process of `src.start` from now on ends when its parent does. When torchrun starts all again, it keeps its store,
    with the addresses of those that have died in it: each attempt gets keys of its own.

    Raises:
        UserError: when the others do not come.
    """
    _end_with_parent()
    address, port = meeting_point()
    try:
        _meet(place, backend, address, port)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {place.world_size} processes that {place.launcher} started did not meet at {address}:{port} "
            f"({str(error).splitlines()[0]}); MASTER_ADDR and MASTER_PORT say where they shall"
        ) from error


def _meet(place: Launch, backend: str, address: str, port: str) -> None:
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    store = None
    if attempt and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        tcp = dist.TCPStore(address, int(port), place.world_size, is_master=False, timeout=JOIN)
        store = dist.PrefixStore(f"attempt {attempt}", tcp)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=JOIN)


def mean(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes, in place; of a process that is alone, as it is.

    Lightning's own reduction has all processes wait for each other first.
    """
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def _join(place: Launch) -> Group:
    meet(place, "gloo")
    return Group(place.rank, place.world_size, dist.new_group(timeout=WORK))


def count(devices: int | Literal["auto"], device: str) -> int:
    """How many processes `devices` asks for: one for each GPU that is meant, or so many on the CPU.

    Raises:
        UserError: when there are not as many GPUs.
    """
    if devices != "auto" and devices < 1:
        raise UserError(f"devices={devices} must be at least 1, or auto")
    if device in ("auto", "cuda") and torch.cuda.is_available():
        gpus = torch.cuda.device_count()
    elif device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        gpus = 1
    else:
        return 1 if devices == "auto" or device == "cuda" else devices  # that there is no CUDA is told later
    if devices == "auto":
        return gpus
    if devices > gpus:
        raise UserError(f"devices={devices} asks for {devices} GPUs and this machine has {gpus}")
    return devices


def on_devices(
    work: Callable[[Group], None], command: Callable[[], list[str]], devices: int | Literal["auto"], device: str
) -> None:
    """Does `work` in the group that a launcher has started, or else in one that it starts with so many processes.

    Args:
        work: is given the group.
        command: makes the command that comes to this same call in the processes that are started.
        devices, device: see `count`; of no account where a launcher has counted.

    Raises:
        UserError: of `work`, or of `start`.
    """
    processes = 1 if launched() else count(devices, device)
    if processes > 1:
        start(command(), processes)
    else:
        with joined(device) as group:
            work(group)


def _end_with_parent() -> None:
    """In a process of `src.start`: standard input is a pipe that nobody writes to, and that ends with its parent."""
    if ERROR_FILE not in os.environ:
        return

    def watch() -> None:
        os.read(0, 1)  # not sys.stdin, whose lock would be held when the interpreter ends
        os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
