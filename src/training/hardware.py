"""What the device that trains can do and what it holds, so that a log can say how much of it is used."""

import functools
import os
import time
from pathlib import Path

import torch

from src.training.summary import peak_memory

LARGEST = 8192
ENOUGH = 0.004  # seconds of one product
DTYPES = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}


@functools.cache
def peak_flops(device: torch.device, precision: str) -> float:
    """The most floating-point operations a second that a matrix multiplication reaches here, a multiply-add as two.

    Measured, not read from a data sheet: square matrices grow until one product takes 4 ms, each size is timed three
    times, and the best counts. On a CPU it is that of the threads that this process may use. It takes a tenth of a
    second, once.

    Args:
        device: to measure on.
        precision: Lightning's name of it; what is not 16 bits wide is measured in float32, TF32 where that is allowed.
    """
    dtype = DTYPES.get(precision, torch.float32)
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers are not touched
    best, seconds, size = 0.0, 0.0, 256
    while seconds < ENOUGH and size < LARGEST:
        size *= 2
        a = torch.randn(size, size, device=device, generator=generator).to(dtype)
        _seconds(a)  # the first call chooses an algorithm
        seconds = min(_seconds(a) for _ in range(3))
        best = max(best, 2 * size**3 / seconds)
    if device.type == "cuda":
        del a
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # the measurement is not what training needs
    return best


def _seconds(a: torch.Tensor) -> float:
    _synchronize(a.device)
    start = time.perf_counter()
    torch.mm(a, a)
    _synchronize(a.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_bytes(device: torch.device) -> int:
    """On a GPU the most that was allocated so far; on a CPU what this process holds now, where the system says so."""
    if device.type != "cuda":
        try:
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            pass
    return peak_memory(device)
