"""Let glibc keep freed memory in the process, instead of returning it to the system.

By default a large buffer is given back as soon as it is free, and the next one of its size is
page-faulted in again, four kilobytes at a time: every batch and every step of a training pays for
it. With the thresholds below the process keeps what it once had. glibc reads them from the
environment when a process starts, and `mallopt` changes them later. benchmarks/README.md says what
it is worth.

Elsewhere (macOS, Windows, musl) there is no `mallopt`, and nothing happens. Whoever has set one of
the variables, or GLIBC_TUNABLES, is left alone.
"""

import ctypes
import os
import sys

# As variables: one heap for all threads (a thread's own would return what is larger than 64 MiB);
# bytes from which a buffer is the system's, bytes at the heap's end from which they are returned,
# bytes by which the heap grows.
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}
# The same in malloc.h.
NUMBERS = {
    "MALLOC_ARENA_MAX": -8,
    "MALLOC_MMAP_THRESHOLD_": -3,
    "MALLOC_TRIM_THRESHOLD_": -1,
    "MALLOC_TOP_PAD_": -2,
}
LARGEST_INT = 2**31 - 1  # mallopt takes no more


def keep_memory() -> bool:
    """Set the thresholds; returns whether glibc has taken them."""
    own = any(name in os.environ for name in (*KEEP_MEMORY, "GLIBC_TUNABLES"))
    if own or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    sizes = {NUMBERS[name]: min(int(size), LARGEST_INT) for name, size in KEEP_MEMORY.items()}
    return all([mallopt(number, size) == 1 for number, size in sizes.items()])


KEPT = keep_memory()
