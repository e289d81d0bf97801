"""One of several processes of a run: does the units it is given and reports its progress.

Communicates over one inherited pipe, in JSON: it receives a job, then unit numbers on request, and sends counts back.
When the pipe closes, the process exits, so it never outlives its parent. Until then it keeps the store's lock open, so
that no other run can start.

Must never know how units are shared out.
"""

import itertools
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from layerprobe.capture.casting import resolve_dtype
from layerprobe.collecting import keep_for_good
from layerprobe.errors import LayerProbeError, ModelError
from layerprobe.extract.ahead import prepare_ahead
from layerprobe.extract.cutting import Unit, UnitRule
from layerprobe.extract.description import describe_tokenizer
from layerprobe.extract.engine import UnitEngine, ending_waits
from layerprobe.extract.inputs import TextSource, open_source
from layerprobe.extract.network import choose_sites
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import Plan
from layerprobe.extract.preparing import check_units, prepare_missing
from layerprobe.extract.reports import RunReport
from layerprobe.extract.space import RoomKeeper
from layerprobe.extract.thinning import find_kept
from layerprobe.models import describe_model, load_model
from layerprobe.sites.resolve import map_model
from layerprobe.store.description import StoredSite
from layerprobe.store.lock import check_held
from layerprobe.store.mismatch import list_model_differences
from layerprobe.store.places import find_place
from layerprobe.tables import format_dtype

__all__ = ["describe_job", "main"]


def describe_job(plan: Plan, device: str, share: int, lock: int | None) -> dict[str, Any]:
    """Describe a plan with a crew for a worker process, which inherits the descriptor of the lock, as JSON types."""
    assert plan.crew is not None
    dtype = resolve_dtype(plan.options.dtype)
    rule = {name: value for name, value in asdict(plan.rule).items() if name != "kept"}
    return {
        "model": plan.crew.model,
        "device": device,
        "share": share,
        "lock": lock,
        "texts": plan.crew.texts,
        "name": plan.source.name,
        "to": str(plan.place if plan.place.folder is None else plan.folder),
        "options": {
            **asdict(plan.options),
            "sites": [site.name for site in plan.sites],
            "dtype": None if dtype is None else format_dtype(dtype),
        },
        "rule": rule,
        "batch_tokens": plan.batch_tokens,
        "num_examples": plan.num_examples,
        "num_bytes": plan.num_bytes,
        "digests": [digest.hex() for digest in plan.digests],
        "description": plan.description,
        "wait_for_space": plan.wait_for_space,
    }


def _rebuild_plan(job: dict[str, Any]) -> Plan:
    """Rebuild the plan of a job; this process loads its own model and tokenizer and opens its own input.

    Raises:
        ModelError: the model is not the one that the run was planned with.
    """
    device = torch.device(job["device"])
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # else loading also takes memory on the first device
    loaded = load_model(job["model"], job["device"])
    description = job["description"]
    is_same = not list_model_differences(description["model"], describe_model(loaded.model))
    tokenizer = json.loads(json.dumps(describe_tokenizer(loaded.tokenizer)))
    if not is_same or tokenizer != description["tokenizer"]:
        raise ModelError(f"model {job['model']!r}: changed while the run was under way. Run the same command again.")
    options = ExtractOptions(**job["options"])
    source = open_source(job["texts"], options.field)
    stored = tuple(StoredSite.from_description(name, said) for name, said in description["sites"].items())
    kept = find_kept(options.tokens, options.keep, loaded.tokenizer, stored, options.pool)
    digests = tuple(bytes.fromhex(digest) for digest in job["digests"])
    return Plan(
        place=find_place(job["to"]),
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        source=TextSource(job["name"], source.iterate),
        options=options,
        sites=tuple(choose_sites(map_model(loaded.model), options.sites)),
        stored=stored,
        rule=UnitRule(**job["rule"], kept=kept),
        batch_tokens=job["batch_tokens"],
        num_examples=job["num_examples"],
        digests=digests,
        num_tokens=0,
        is_exact=False,
        num_bytes=job["num_bytes"],
        description=description,
        done={},
        num_damaged=0,
        overwrite=False,
        wait_for_space=job["wait_for_space"],
    )


class _Pipe:
    """The connection to the parent process."""

    def __init__(self, connection: Connection, stop: threading.Event) -> None:
        self._connection = connection
        self._stop = stop
        self._turn = threading.Lock()
        self._units: queue.Queue[int | None] = queue.Queue()

    def say(self, **what: Any) -> None:
        """Send a message; callable from any thread."""
        with self._turn:
            self._connection.send_bytes(json.dumps(what).encode())

    def hear(self) -> dict[str, Any]:
        """Wait for the next message; exit the process if the pipe is closed."""
        try:
            return json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)

    def listen(self) -> None:
        """Receive unit numbers and the request to stop; runs in its own thread."""
        while True:
            heard = self.hear()
            if heard.get("stop"):
                self._stop.set()
            else:
                self._units.put(heard["unit"])

    def ask(self) -> int | None:
        """Ask for the number of the next unit; None if there is nothing left to do."""
        self.say(wants=True)
        return self._units.get()


def _pick(units: Iterator[Unit], pipe: _Pipe) -> Iterator[Unit]:
    """Yield the units that this process is given; their numbers increase."""
    number = pipe.ask()
    while number is not None:
        yield next(itertools.dropwhile(lambda unit, wanted=number: unit.number < wanted, units))
        number = pipe.ask()


def _work(job: dict[str, Any], pipe: _Pipe, stop: threading.Event) -> None:
    plan = _rebuild_plan(job)
    keep_for_good()
    report = RunReport()

    def tell(_: int = 0, **more: Any) -> None:
        counts = {name: value for name, value in vars(report).items() if type(value) in (int, float)}
        pipe.say(counts=counts, **more)

    def count_wait(seconds: float, is_waiting: bool) -> None:
        report.count_wait(seconds, is_waiting)
        tell()

    keeper = RoomKeeper(plan.place.folder, plan.wait_for_space, stop, count_wait)
    if plan.place.folder is not None and job["lock"] is not None:
        keeper.check = partial(check_held, plan.place.folder, job["lock"])
    engine = UnitEngine(plan, keeper, report, tell, job["share"])
    with engine, ending_waits(stop):
        for prepared in prepare_ahead(_pick(check_units(plan), pipe), partial(prepare_missing, plan)):
            if stop.is_set():
                break
            assert prepared is not None
            engine.run(prepared)
    tell(done=True)


def main() -> None:
    """Work for the process at the other end of the pipe, whose descriptor is the first argument."""
    stop = threading.Event()
    pipe = _Pipe(Connection(int(sys.argv[1])), stop)
    job = pipe.hear()
    threading.Thread(target=pipe.listen, name="layerprobe-listener", daemon=True).start()
    try:
        _work(job, pipe, stop)
    except LayerProbeError as error:
        pipe.say(error=type(error).__name__, message=str(error))
    except Exception as error:
        traceback.print_exc()
        pipe.say(error=None, message=f"{type(error).__name__}: {error}")
