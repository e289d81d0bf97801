"""Whether memory has run out, whatever torch says of it.

On CUDA torch has an error of its own for that, which may come behind another one. On a CPU it is a `RuntimeError` that
names the allocator. Must never know what was asked for, or what is done about it.
"""

import torch

__all__ = ["ran_out"]

_CPU_ALLOCATOR = "DefaultCPUAllocator: "


def ran_out(error: BaseException) -> bool:
    """Whether memory gave out: while a CUDA graph is recorded that may come as an error of what cleans up after it."""
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
