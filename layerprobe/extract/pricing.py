"""What a run over many more texts would cost: bytes, hours, and what they are spent on, from a measured sample.

The sample is run as the whole would be, into a folder that is removed again, on the disk where the store will lie. What
the disk does alone is measured beside it.

Hides how the sample is taken. Must never write into the store itself.
"""

import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerprobe.errors import InputError, OptionError
from layerprobe.extract.inputs import Record, open_source
from layerprobe.extract.network import find_model
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.extract.run import run_extraction
from layerprobe.models import LoadedModel
from layerprobe.sites.stacks import find_device
from layerprobe.store.durable import commit_file, make_noise
from layerprobe.store.places import find_place
from layerprobe.tables import format_bytes, format_table

__all__ = ["DiskPace", "Price", "SamplePace", "price_extraction"]

_CHUNK_EXAMPLES = 2048
_DISK_BYTES = 128 << 20
_UNITS_OF_TIME = (("years", 365 * 86400.0), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("s", 1.0))


@dataclass(frozen=True)
class SamplePace:
    """What a sample took: its examples, tokens, bytes on disk, seconds in all and seconds waited for the disk."""

    num_examples: int
    num_tokens: int
    num_bytes: int
    seconds: float
    stalled_s: float


@dataclass(frozen=True)
class DiskPace:
    """What the disk did alone: bytes, and the seconds until they were on it; and how much room it has."""

    num_bytes: int
    seconds: float
    free_bytes: int


@dataclass(frozen=True)
class Price:
    """The cost of a run; `str(price)` is a small table.

    Args:
        num_examples: Of the run that is asked about.
        sample, disk: What was measured.
        device: Where the model ran.
    """

    num_examples: int
    sample: SamplePace
    disk: DiskPace
    device: str

    @property
    def num_tokens(self) -> int:
        """Tokens of the run."""
        return round(self.sample.num_tokens * self._times)

    @property
    def num_bytes(self) -> int:
        """Bytes of the store."""
        return round(self.sample.num_bytes * self._times)

    @property
    def forward_s(self) -> float:
        """Seconds of the run if the disk cost nothing."""
        return (self.sample.seconds - self.sample.stalled_s) * self._times

    @property
    def disk_s(self) -> float:
        """Seconds of the run if the forward cost nothing."""
        return self.num_bytes * self.disk.seconds / self.disk.num_bytes

    @property
    def seconds(self) -> float:
        """Seconds of the run: the two go on side by side, so that the slower one counts."""
        return max(self.forward_s, self.disk_s)

    @property
    def bound(self) -> str:
        """What the time goes to: `forward` or `disk`."""
        return "forward" if self.forward_s >= self.disk_s else "disk"

    @property
    def _times(self) -> float:
        return self.num_examples / self.sample.num_examples

    def __str__(self) -> str:
        sample, fits = self.sample, "fits" if self.num_bytes <= self.disk.free_bytes else "does not fit"
        rate = f"{sample.num_tokens / sample.seconds:,.0f} tokens/s"
        disk_rate = f"{format_bytes(self.disk.num_bytes / self.disk.seconds)}/s"
        rows = [
            ("texts", f"{self.num_examples:,}", ""),
            ("tokens", f"{self.num_tokens:,}", f"{sample.num_tokens / sample.num_examples:.1f} a text"),
            ("bytes", format_bytes(self.num_bytes), f"{fits}: {format_bytes(self.disk.free_bytes)} free"),
            ("forward", _format_time(self.forward_s), f"{rate} on {self.device}"),
            ("disk", _format_time(self.disk_s), f"{disk_rate} alone"),
            ("in all", _format_time(self.seconds), f"bound by the {self.bound}"),
        ]
        measured = f"{sample.num_examples:,} texts in {sample.seconds:.1f} s, stalled {sample.stalled_s:.2f} s"
        return f"{format_table(('', 'cost', 'measured'), rows)}\n\nfrom a sample of {measured}"


def price_extraction(
    model: Any,
    texts: Any,
    to: str | Path,
    options: ExtractOptions,
    num_examples: int,
    seconds: float = 60.0,
    *,
    device: str | None = None,
) -> Price:
    """Measure a run on the first texts of its input, and say what as many as `num_examples` would cost.

    Args:
        model, texts, options, device: As for the run.
        to: Where its store would lie, in a local folder; nothing is left there.
        num_examples: Texts of the run that is asked about.
        seconds: How long to measure; it ends earlier where the input does, later where 2,048 texts take longer.

    Raises:
        OptionError: a number that cannot be, or no local folder.
        InputError: the input holds no texts.
        LayerProbeError: whatever the run would raise.
    """
    if num_examples < 1 or not math.isfinite(seconds) or seconds <= 0:
        raise OptionError(f"a plan of {num_examples} texts from {seconds:g} s: both must be above 0.")
    folder = find_place(to).folder
    if folder is None:
        raise OptionError(f"{to}: only what a local disk costs can be measured. Give a local folder with -o.")
    parent = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.is_dir())
    source = open_source(texts, options.field)
    network, tokenizer = find_model(model, None, device)
    loaded = replace(model, model=network) if isinstance(model, LoadedModel) else network
    sample = SamplePace(0, 0, 0, 0.0, 0.0)
    with tempfile.TemporaryDirectory(prefix="layerprobe-plan-", dir=parent) as scratch:
        for number, records in enumerate(_cut(iter(source))):
            plan = plan_extraction(
                loaded, records, Path(scratch) / str(number), replace(options, field="text"), tokenizer=tokenizer
            )
            report = run_extraction(plan)
            sample = SamplePace(
                sample.num_examples + report.num_examples,
                sample.num_tokens + report.num_tokens,
                sample.num_bytes + sum(file.stat().st_size for file in plan.folder.glob("shard-*")),
                sample.seconds + report.seconds,
                sample.stalled_s + report.stalled_s,
            )
            for file in plan.folder.glob("shard-*"):
                file.unlink()
            if sample.seconds >= seconds:
                break
        disk = _measure_disk(Path(scratch))
    if not sample.num_examples:
        raise InputError(f"{source.name}: holds no texts. Give at least one.")
    return Price(num_examples, sample, disk, str(find_device(network)))


def _cut(records: Iterator[Record]) -> Iterator[list[dict[str, Any]]]:
    while chunk := [{**record.fields, "text": record.text} for record in itertools.islice(records, _CHUNK_EXAMPLES)]:
        yield chunk


def _measure_disk(folder: Path) -> DiskPace:
    """Write what does not compress, as a shard is written, until it is on the disk."""
    data = make_noise(_DISK_BYTES)
    free = shutil.disk_usage(folder).free
    path = folder / "disk"
    start = time.perf_counter()
    commit_file(path, [data])
    seconds = time.perf_counter() - start
    path.unlink()
    return DiskPace(len(data), max(seconds, 1e-9), free)


def _format_time(seconds: float) -> str:
    for name, size in _UNITS_OF_TIME:
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.1f} s"
