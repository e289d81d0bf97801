"""Keep memory that a forward pass frees for the next one, in a process that belongs to layerprobe.

A layer's intermediate tensors take a few megabytes each. By default glibc returns such memory to the system when it is
freed and requests it again page by page, which takes up to a tenth of a forward pass on a CPU. Commands that run a
model over many texts keep it. A library call does not, because the setting affects the whole process;
docs/performance.md says how users can set it.

Hides glibc's names for it. Must never know of models.
"""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h, with their largest values
_TRIM = (-1, 2**31 - 1)
_MMAP = (-3, 32 << 20)


def keep_freed_memory() -> bool:
    """Make this process keep freed memory; return whether its C library supports that, which only glibc does."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*setting) == 1 for setting in (_TRIM, _MMAP))
