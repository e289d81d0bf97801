"""What ends a process of a crew with the one that gives it its work, from its first moment on.

It is started before torch is imported, which takes seconds: until then the process holds the lock of a store for a run
that may be gone. Imports nothing but Python's own.

Must never read what the pipe holds.
"""

import os
import select
import threading

__all__ = ["end_with"]


def end_with(descriptor: int) -> None:
    """End this process, at once, when nobody holds the other end of its pipe any more."""
    # of no event but that one, which needs no asking: what was sent stays for whoever reads it
    hung_up = select.poll()
    hung_up.register(descriptor, 0)

    def watch() -> None:
        hung_up.poll()
        os._exit(1)

    threading.Thread(target=watch, name="layerprobe-leash", daemon=True).start()
