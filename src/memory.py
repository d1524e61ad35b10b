"""How a process that computes on the CPU gets its memory."""

import ctypes
import platform
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST = 2**25  # that mallopt takes for M_MMAP_THRESHOLD
ENOUGH = 2**30


@cache
def keep_freed() -> bool:
    """Makes glibc keep what is freed, up to a gibibyte, for what is asked for next.

    By default it gives the activations of a step back to the kernel, which hands them out anew for the next one, page
    by page and set to zero: thousands of faults a step. Blocks of 32 MiB and more are given back still.

    Returns:
        Whether there is a glibc that does so.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, ENOUGH))
