"""Batches side by side on the CPU, such that no bit of them depends on the number of cores.

A CPU kernel that is split over several threads rounds otherwise than in one, in the last bits of the result. Here each
batch is computed in one thread, several batches at once: as fast, or faster where kernels are small, and always the
same. Where and with what each batch begins must be its own: `torch.no_grad` and autocast are a thread's, too.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Event, Lock
from typing import TypeVar

import torch

from src.diffusion.gaussian import chunk_rows
from src.processes import ALONE, Group

Item = TypeVar("Item")
Made = TypeVar("Made")
Tick = Callable[[float], object]


def untold(amount: float) -> None: ...


class _Stopped(Exception):  # noqa: N818
    """Ends a batch when another has failed."""


def share_out(n: int, batch_size: int, shape: Sequence[int], device: torch.device, group: Group = ALONE) -> list[range]:
    """The numbers of n images of a shape (C, H, W), in batches that keep all processes and their threads busy."""
    if device.type != "cpu":
        return cut(n, batch_size, workers=group.size)
    return cut(n, batch_size, chunk_rows(shape), group.size * torch.get_num_threads())


def in_threads(
    work: Callable[[Item, Tick], Made], items: Sequence[Item], device: torch.device, update: Tick = untold
) -> list[Made]:
    """work(item, tick) of all items, in their order.

    Args:
        work: computes on `device`, and calls tick(amount) now and then: `update`, one at a time, and an exception when
            another item has failed.
    """
    if device.type != "cpu":
        return [work(item, update) for item in items]
    threads, lock, stop = torch.get_num_threads(), Lock(), Event()

    def tick(amount: float) -> None:
        if stop.is_set():
            raise _Stopped
        with lock:
            update(amount)

    def alone(item: Item) -> Made:
        torch.set_num_threads(1)  # of this thread, and of threads that are yet to come
        return work(item, tick)

    pool = ThreadPoolExecutor(threads)
    try:
        futures = [pool.submit(alone, item) for item in items]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return [future.result() for future in futures]
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def cut(n: int, most: int, unit: int = 1, workers: int = 1) -> list[range]:
    """The numbers from 0 to n - 1 in batches of at most `most`, such that workers who deal them out have equal shares.

    Args:
        unit: batches are a multiple of it, but for the last, if `most` allows: what is computed at once anyway.
        workers: for whom there are as many batches each, if there are that many units.
    """
    unit = min(unit, most)
    units = -(-n // unit)
    batches = -(-units // (most // unit))
    batches = min(units, -(-batches // workers) * workers)
    size, larger = divmod(units, batches)
    starts = [(k * size + min(k, larger)) * unit for k in range(batches)]
    return [range(low, high) for low, high in zip(starts, [*starts[1:], n], strict=True)]
