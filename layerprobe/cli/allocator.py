"""Memory that a forward pass has freed is kept for the next one, in a process that is layerprobe's own.

A layer's intermediate values are a few megabytes each. By default glibc gives such memory back to the system as it is
freed and takes it again a moment later, page by page: up to a tenth of a forward pass on a CPU. The commands that run a
model over many texts keep it. A library call does not, since the setting is the whole process's; docs/performance.md
says how its user can.

Hides glibc's names for it. Must never know of models.
"""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, and the largest values that they take
_TRIM = (-1, 2**31 - 1)
_MMAP = (-3, 32 << 20)


def keep_freed_memory() -> bool:
    """Have this process keep what it frees; says whether its C library can be told so, which is glibc alone."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) == 1 for setting in (_TRIM, _MMAP))
