"""End a worker process when its parent process is gone.

This starts before torch is imported, which takes seconds: otherwise the process would hold the store's lock during the
import for a run that may be gone. Imports only the standard library.

Must never read from the pipe.
"""

import os
import select
import threading

__all__ = ["end_with"]


def end_with(descriptor: int) -> None:
    """Exit this process at once when the other end of its pipe is closed."""
    # registered for no events: a hang-up is always reported, and data is left for the reader
    hung_up = select.poll()
    hung_up.register(descriptor, 0)

    def watch() -> None:
        hung_up.poll()
        os._exit(1)

    threading.Thread(target=watch, name="layerprobe-leash", daemon=True).start()
