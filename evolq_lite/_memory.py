"""Let glibc keep freed memory in the process, instead of returning it to the system.

By default every large buffer is given back as soon as it is free, and the next one of its size is
page-faulted in again, four kilobytes at a time: every batch, every candidate, every step of a
training pays for it. With the thresholds below the process keeps what it once had. `mallopt` sets
them in a process that runs already, as the variables MALLOC_..._ do for one that is to be started.

Elsewhere (macOS, Windows, musl) there is no `mallopt`, and nothing happens. Whoever has set one of
glibc's own variables is left alone.
"""

import ctypes
import os
import sys

# glibc's numbers of the parameters (malloc.h), and bytes.
THRESHOLDS = {
    -3: 2**30,  # M_MMAP_THRESHOLD: smaller buffers come from the heap, and stay there
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: so much may be free at its end; an int's largest number
    -2: 2**28,  # M_TOP_PAD: how far it grows at a time
}
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_memory() -> bool:
    """Set the thresholds; returns whether the process keeps its memory by them."""
    if any(name in os.environ for name in (*VARIABLES, "GLIBC_TUNABLES")):
        return False
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all([mallopt(parameter, size) == 1 for parameter, size in THRESHOLDS.items()])


KEPT = keep_memory()
