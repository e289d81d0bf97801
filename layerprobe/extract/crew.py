"""Run one extraction in several processes: start them, hand out units one at a time, and stop them.

Each process asks for its next unit, in ascending order, so a slow device holds up no other. All devices are of one
kind, so the bytes of a unit do not depend on which one computes it. Whatever ends the run ends all processes;
committed shards are whole, and the same command does the rest.

Hides processes. Must never know of models.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from layerprobe import errors
from layerprobe.errors import CaptureError, LayerProbeError
from layerprobe.extract.plan import Plan
from layerprobe.extract.reports import RunReport
from layerprobe.extract.worker import describe_job

__all__ = ["run_crew"]

_POLL_S = 0.2
# -c puts the working folder first in sys.path, where a file of the user's could shadow a module
_CODE = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    "from layerprobe.extract.leash import end_with; end_with(int(sys.argv[1])); "
    "from layerprobe.extract.worker import main; main()"
)
# keep freed memory in glibc for the next forward pass
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_MMAP_THRESHOLD_": "33554432"}


@dataclass(eq=False)
class _Worker:
    device: str
    process: "subprocess.Popen[bytes]"
    pipe: Connection
    counts: dict[str, Any] = field(default_factory=dict)


def run_crew(
    plan: Plan, lock: int | None, report: RunReport, advance: Callable[[int], None], stop: threading.Event
) -> None:
    """Do the missing units of a plan in the processes of its crew.

    Args:
        plan: Has a crew; its store is locked and initialised.
        lock: Descriptor of the store's lock, which each process keeps open; None if there is none.
        report: Counts everything that was done, and says at the end whether the store is complete.
        advance: Called with the number of examples that have just been processed.
        stop: Set it to end after the current units.

    Raises:
        LayerProbeError: what went wrong in one of the processes.
    """
    assert plan.crew is not None
    missing = (number for number in range(plan.num_units) if number not in plan.done)
    own_waited_s = report.waited_s
    with contextlib.ExitStack() as started:
        workers = [started.enter_context(_start(plan, device, lock)) for device in plan.crew.devices]
        pending = {worker.pipe: worker for worker in workers}
        while pending:
            for pipe in wait(list(pending), _POLL_S):
                assert isinstance(pipe, Connection)
                worker = pending[pipe]
                said = _hear(worker)
                if said.get("wants"):
                    number = None if stop.is_set() else next(missing, None)
                    _tell(worker, {"unit": number})
                if "counts" in said:
                    before, worker.counts = worker.counts, said["counts"]
                    _join(report, workers)
                    report.waited_s += own_waited_s
                    advance(worker.counts["num_examples"] - before.get("num_examples", 0))
                if said.get("done"):
                    del pending[pipe]
            if stop.is_set() and report.is_complete:
                report.is_complete = False
                for worker in pending.values():
                    _tell(worker, {"stop": True})
    # when told to stop, the workers may already have been at the last units
    report.is_complete = len(plan.done) + report.num_units == plan.num_units


@contextlib.contextmanager
def _start(plan: Plan, device: str, lock: int | None) -> Iterator[_Worker]:
    """Start the process of a device, and kill it when the block ends."""
    ours, theirs = Pipe()
    assert isinstance(ours, Connection) and isinstance(theirs, Connection)
    inherited = [theirs.fileno(), *([] if lock is None else [lock])]
    # import the same code as this process, wherever it was found
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {**_KEEP_MEMORY, **os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", _CODE, str(theirs.fileno())]
    # this process alone handles signals to the process group; the new process inherits the mask
    process = None
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            process = subprocess.Popen(  # noqa: S603 - this interpreter, and code that stands above
                command, stdin=subprocess.DEVNULL, pass_fds=inherited, env=environment
            )
        finally:
            theirs.close()
            # a signal that arrived meanwhile is raised here
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        worker = _Worker(device, process, ours)
        assert plan.crew is not None
        share = sum(other == device for other in plan.crew.devices) if device == "cpu" else len(plan.crew.devices)
        _tell(worker, describe_job(plan, device, share, lock))
        yield worker
    finally:
        ours.close()
        if process is not None:
            # SIGKILL is safe at any point, like a power loss
            process.kill()
            process.wait()


def _tell(worker: _Worker, what: dict[str, Any]) -> None:
    # a worker that has just died is noticed when its pipe is read
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        worker.pipe.send_bytes(json.dumps(what).encode())


def _hear(worker: _Worker) -> dict[str, Any]:
    """Receive a message from a process.

    Raises:
        LayerProbeError: the process has failed or died.
    """
    try:
        said = json.loads(worker.pipe.recv_bytes())
    except (EOFError, OSError) as error:
        code = worker.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise CaptureError(
            f"{worker.device}: its process ({worker.process.pid}) {how}. Whole shards are kept. "
            "Run the same command again to go on."
        ) from error
    if "error" in said:
        raise _make_error(worker, said["error"], said["message"])
    return said


def _make_error(worker: _Worker, name: str | None, message: str) -> LayerProbeError:
    found = getattr(errors, name) if name in errors.__all__ else None
    if found is None:
        return CaptureError(
            f"{worker.device}: its process failed ({' '.join(message.split())}). Whole shards are kept. "
            "Run the same command again when the cause is gone."
        )
    return found(f"{worker.device}: {message}")


def _join(report: RunReport, workers: list[_Worker]) -> None:
    """Sum the counts of all processes into the report."""
    for name in {name for worker in workers for name in worker.counts} - {"seconds"}:
        setattr(report, name, sum(worker.counts.get(name, 0) for worker in workers))
