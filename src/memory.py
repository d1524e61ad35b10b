"""How a process that computes on the CPU gets its memory."""

import ctypes
import os
import platform
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST = 2**25  # that it takes for M_MMAP_THRESHOLD
NEVER = 2**31 - 1
OF_USERS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


@cache
def keep_freed() -> bool:
    """Makes glibc's malloc keep what is freed for what is asked for next, unless the environment sets it otherwise.

    By default it gives the activations of a step back to the kernel, which hands them out anew for the next one, page
    by page and set to zero: thousands of faults a step. Blocks of 32 MiB and more are given back still. Where torch has
    an allocator of its own, as on 64-bit ARM, it changes nothing for tensors.

    Returns:
        Whether glibc has taken the settings.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in OF_USERS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, NEVER))
