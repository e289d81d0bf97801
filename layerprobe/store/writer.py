"""Writer threads that turn full buffers into committed shards: several if one cannot saturate a network link.

A thread checksums, counts non-finite values, writes, flushes and renames, so that the forward pass does none of that.
A failure in a thread is raised in the caller's thread, with its cause, at the next call.

Must never know of models, hooks or devices: it is handed CPU tensors and two callables.
"""

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from layerprobe.errors import LayerProbeError, NonFiniteError, StoreError
from layerprobe.forking import watch_forks
from layerprobe.store.abandoned import abandon
from layerprobe.store.format import commit_shard
from layerprobe.store.headers import SCALE_SUFFIX, ShardHeader, check_shapes, lay_out
from layerprobe.store.places import Place, find_place
from layerprobe.store.scanning import scan_tensor

__all__ = ["NONFINITE_POLICIES", "ShardJob", "ShardWriter"]

NONFINITE_POLICIES = ("warn", "error")


@dataclass(frozen=True, eq=False)
class ShardJob:
    """A full buffer to be written to disk.

    Args:
        header: Counts of the shard; its `nonfinite` may already count values clipped by a cast.
        tensors: Contiguous CPU tensors in file order.
        wait_ready: Blocks until the tensors hold their final values.
        release: Returns the buffer; always called, even after a failure.
    """

    header: ShardHeader
    tensors: Sequence[tuple[str, Tensor]]
    wait_ready: Callable[[], None]
    release: Callable[[], None]


def _do(commit: Callable[[], int]) -> int:
    return commit()


@dataclass(eq=False)
class _Hand:
    """A thread of a writer and its state; each flag is set before the queue that signals it is filled."""

    thread: threading.Thread
    has_begun: bool = False
    has_ended: bool = False
    begun: "queue.SimpleQueue[None]" = field(default_factory=queue.SimpleQueue)
    ended: "queue.SimpleQueue[None]" = field(default_factory=queue.SimpleQueue)


class ShardWriter:
    """Write shards into a store from background threads.

    Args:
        where: The store; a local folder must exist.
        nonfinite: `warn` counts non-finite values, `error` refuses a shard that holds any.
        attempt: Calls the function that it is given, which commits a shard; may retry it when the disk is full.
        num_threads: Number of shards written at once. With several, shards are committed in order of completion.
        probes_disk: Measure before the first shard whether the disk is faster with direct I/O (bypassing the page
            cache); worthwhile only for large runs.
    """

    def __init__(
        self,
        where: Path | Place,
        nonfinite: str = "warn",
        attempt: Callable[[Callable[[], int]], int] = _do,
        num_threads: int = 1,
        probes_disk: bool = False,
    ) -> None:
        # no request is retried for a shard that was given up
        self.place = find_place(where).checked_by(self.check)
        self.num_threads = num_threads
        self._attempt = attempt
        self._probes_disk = probes_disk
        self.committed: list[ShardHeader] = []
        self.num_bytes = 0
        self._nonfinite = nonfinite
        # Only `SimpleQueue`s and bare locks: `Queue` and `Event` are built on `Condition`, and Ctrl-C inside one may
        # leave its lock held or its waiter listed, which deadlocks.
        self._jobs: queue.SimpleQueue[ShardJob | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._counting = threading.Lock()
        self._hands: list[_Hand] = []
        self._is_closing = False

    def start(self) -> None:
        """Start the threads.

        Raises:
            StoreError: the system cannot start a thread; none is left running.
        """
        _started.add(self)
        for number in range(self.num_threads):
            hand = self._make_hand(self._probes_disk and not number)
            self._hands.append(hand)
            try:
                hand.thread.start()
                while not hand.has_begun:
                    hand.begun.get()
            except BaseException as error:
                self.close()
                if isinstance(error.__context__, KeyboardInterrupt):  # Ctrl-C released a lock inside `Thread.start`
                    raise error.__context__ from None
                if not isinstance(error, RuntimeError):
                    raise
                raise StoreError(f"{self.place}: no thread for writer {number + 1}. Ask for fewer writers.") from error

    def _make_hand(self, probes_disk: bool) -> _Hand:
        def run() -> None:
            with self._counting:
                # `close` does not wait for a thread that has not begun, so it must not begin any more
                if self._is_closing:
                    return
                hand.has_begun = True
            hand.begun.put(None)
            try:
                self._run(probes_disk)
            finally:
                hand.has_ended = True
                hand.ended.put(None)

        hand = _Hand(threading.Thread(target=run, name="layerprobe-writer", daemon=True))
        return hand

    def submit(self, job: ShardJob) -> None:
        """Queue a full buffer and return at once.

        Raises:
            LayerProbeError: an earlier shard could not be written.
        """
        self.check()
        self._jobs.put(job)

    def check(self) -> None:
        """Raise the error of a writer thread, if there is one."""
        if self._error is not None:
            if isinstance(self._error, LayerProbeError):
                raise self._error
            what = str(self._error) or type(self._error).__name__
            raise StoreError(
                f"{self.place}: the writer stopped: {what}. What was committed before stays readable; run the same "
                "command again when the cause is gone."
            ) from self._error

    def close(self) -> None:
        """Wait for the queued shards and end the threads. Errors of the threads are raised by `check`, not here.

        Ctrl-C while waiting abandons the shards that are not on disk yet. In a local folder it is raised only once no
        thread can write any more, because the caller then releases the folder's lock. A remote store has no lock, and a
        server may not answer for minutes, so there it is raised at once and at most the pending requests complete.
        """
        cut: BaseException | None = None
        waits, is_over = True, False
        while not is_over:
            try:
                with self._counting:
                    self._is_closing = True
                    begun = [hand for hand in self._hands if hand.has_begun]
                for _ in begun:
                    self._jobs.put(None)
                # not `join` alone: one interrupted by Ctrl-C marks the thread as ended
                for hand in begun:
                    while waits and not hand.has_ended:
                        hand.ended.get()
                is_over = True
            except BaseException as error:
                cut = self._error = error
                waits = self.place.folder is not None
        while self._hands:
            if not (hand := self._hands.pop()).has_begun:
                continue
            if waits:
                hand.thread.join()
            else:
                abandon(str(self.place), hand.thread)
        if cut is not None:
            raise cut

    def _give_up(self) -> None:
        """Stop writing in a forked process: it has no threads, and the store belongs to its parent."""
        self._counting, self._hands = threading.Lock(), []
        self._error = StoreError(
            f"{self.place}: only the process that opened it writes there, and this one was forked from that. Open a "
            "store of its own here, or end this process by os._exit."
        )

    def _run(self, probes_disk: bool) -> None:
        try:
            if probes_disk:
                self.place = self.place.tried()
            while (job := self._jobs.get()) is not None:
                self._take(job)
        except BaseException as error:
            # an error between two jobs is reported like any other; `check` raises it in the caller
            self._error = self._error or error

    def _take(self, job: ShardJob) -> None:
        try:
            # After a failure, only release the remaining buffers, so that nobody waits for them.
            if self._error is None:
                self._write(job)
        except BaseException as error:
            self._error = self._error or error
        finally:
            job.release()

    def _write(self, job: ShardJob) -> None:
        shapes = [(name, tensor.dtype, tensor.shape) for name, tensor in job.tensors]
        try:
            check_shapes(replace(job.header, tensors=lay_out(shapes)))
        except (KeyError, ValueError) as error:
            raise StoreError(f"{job.header.file}: not written, since nobody could read it: {error}.") from error
        job.wait_ready()
        counts, checksums = dict(job.header.nonfinite), {}
        for name, tensor in job.tensors:
            checksums[name], lost = scan_tensor(tensor)
            if lost:
                site = name.removesuffix(SCALE_SUFFIX)
                counts[site] = counts.get(site, 0) + lost
        if counts and self._nonfinite == "error":
            listed = ", ".join(f"{count} at {site!r}" for site, count in counts.items())
            raise NonFiniteError(
                f"{job.header.file}: values that are not finite or do not fit the dtype: {listed}. "
                "Store a wider dtype (float32, bfloat16), or pass nonfinite='warn' to keep and count them."
            )
        header = replace(job.header, nonfinite=counts)
        num_bytes = self._attempt(lambda: self._commit(header, job.tensors, checksums))
        with self._counting:
            self.num_bytes += num_bytes
            self.committed.append(header)

    def _commit(self, header: ShardHeader, tensors: Sequence[tuple[str, Tensor]], checksums: Mapping[str, str]) -> int:
        # another thread may have failed while this one waited for disk space
        self.check()
        return commit_shard(self.place, header, tensors, checksums)


_started = watch_forks(ShardWriter._give_up)
