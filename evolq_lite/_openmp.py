"""Bound how long OpenMP's idle threads spin. Import this module before torch.

A torch kernel splits its work over threads that meet at a barrier. The thread that comes first
spins: it asks again and again whether the others are there, which is quick as long as each thread
has a core of its own. When another program takes one of two cores, the thread that waits spins away
the time of the very thread that it waits for, and a candidate that takes 0.05 s takes 5 s. With a
bounded spin it sleeps instead: 0.15 s on a busy machine, 0.053 s on an idle one.

GNU's libgomp (torch on Linux) counts turns, Intel's and LLVM's libomp (macOS, conda) milliseconds.
Both read the environment when they are loaded, so it must be set before torch is imported, and
processes that are started from here inherit it. Whoever has set one of these variables, or
OMP_WAIT_POLICY, is left alone.
"""

import os
import sys

SPIN = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}


def bound_spin() -> str:
    """Set the switches; returns "" if they hold in this process, otherwise what to do."""
    if "OMP_WAIT_POLICY" in os.environ:
        return ""
    unset = [name for name in SPIN if name not in os.environ]
    for name in unset:
        os.environ[name] = SPIN[name]
    if unset and "torch" in sys.modules:
        return (
            "torch was imported before evolq_lite, so its threads spin without bound beside other "
            "programs; import evolq_lite first, or set GOMP_SPINCOUNT=2000 and KMP_BLOCKTIME=1"
        )
    return ""


UNBOUND = bound_spin()
