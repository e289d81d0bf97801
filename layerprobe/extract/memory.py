"""Recognise out-of-memory errors, whatever form torch gives them.

On CUDA torch raises an error of its own type, which another error may hide. On a CPU it is a `RuntimeError` that names
the allocator. Must never know what was allocated, or how callers handle it.
"""

import torch

__all__ = ["ran_out"]

_CPU_ALLOCATOR = "DefaultCPUAllocator: "


def ran_out(error: BaseException) -> bool:
    """Whether an error or one it hides is out of memory: cleanup after a failed CUDA graph capture may hide one."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or any(one is other for other in seen):
            continue
        if isinstance(one, torch.OutOfMemoryError) or (isinstance(one, RuntimeError) and _CPU_ALLOCATOR in str(one)):
            return True
        seen.append(one)
        waiting += [one.__cause__, None if one.__suppress_context__ else one.__context__]
    return False
