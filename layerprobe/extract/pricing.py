"""Estimate from a measured sample what a run over many more texts would cost, in bytes and hours.

The sample is run as the whole would be, into a temporary folder on the disk of the store. The speed of that disk alone
is measured too.

Hides how the sample is taken. Must never write into the store itself.
"""

import contextlib
import itertools
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerprobe.errors import InputError, OptionError, SpaceError
from layerprobe.extract.inputs import TextSource, open_source
from layerprobe.extract.network import find_model
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.extract.resume import check_place
from layerprobe.extract.sampling import MOST_EXAMPLES, SamplePace, Sampler, check_records, grow_sample
from layerprobe.models import LoadedModel
from layerprobe.sites.stacks import find_device
from layerprobe.store.durable import TRIAL_PREFIX, commit_file, make_noise, tell_failure
from layerprobe.store.paths import NamedPath
from layerprobe.store.places import find_place
from layerprobe.tables import format_bytes, format_count, format_table, format_time

__all__ = ["DiskPace", "Price", "SamplePace", "price_extraction"]

_DISK_BYTES = 128 << 20


@dataclass(frozen=True)
class DiskPace:
    """Speed of the disk alone: bytes, seconds until they were durable, and the free bytes of the disk."""

    num_bytes: int
    seconds: float
    free_bytes: int


@dataclass(frozen=True)
class Price:
    """The cost of a run; `str(price)` is a small table.

    Args:
        num_examples: Number of texts of the run.
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
        """Seconds of the run if the forward pass cost nothing."""
        return self.num_bytes * self.disk.seconds / self.disk.num_bytes

    @property
    def seconds(self) -> float:
        """Seconds of the run: forward passes and disk writes overlap, so the slower of the two counts."""
        return max(self.forward_s, self.disk_s)

    @property
    def bound(self) -> str:
        """What limits the run: `forward` or `disk`."""
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
            ("forward", format_time(self.forward_s), f"{rate} on {self.device}"),
            ("disk", format_time(self.disk_s), f"{disk_rate} alone"),
            ("in all", format_time(self.seconds), f"bound by the {self.bound}"),
        ]
        measured = (
            f"{format_count(sample.num_examples, 'text')} in {sample.seconds:.1f} s, stalled {sample.stalled_s:.2f} s"
        )
        return f"{format_table(('', 'cost', 'measured'), rows)}\n\nfrom a sample of {measured}"


def price_extraction(
    model: Any,
    texts: Any,
    to: str | Path,
    options: ExtractOptions,
    num_examples: int,
    seconds: float = 60.0,
    *,
    device: str | int | None = None,
) -> Price:
    """Measure a run on the first texts of its input, and estimate the cost of `num_examples` texts.

    Args:
        model, texts, options, device: As for the run.
        to: Where its store would be, in a local folder; nothing is left there.
        num_examples: Number of texts of the run.
        seconds: Approximate time to measure; shorter if the input ends first, longer if eight texts take longer, and
            not counting the time to plan and to compile.

    Raises:
        OptionError: an impossible number, or `to` is not a local folder.
        InputError: the input holds no texts.
        StoreError: a store cannot be written there.
        SpaceError: the disk has no space for the sample.
        LayerProbeError: whatever the run would raise.
    """
    if num_examples < 1 or not math.isfinite(seconds) or seconds <= 0:
        raise OptionError(f"a plan of {format_count(num_examples, 'text')} from {seconds:g} s: both must be above 0.")
    place = find_place(to)
    folder = place.folder
    if folder is None:
        raise OptionError(f"{to}: only what a local disk costs can be measured. Give a local folder with -o.")
    check_place(place)
    source = open_source(texts, options.field)
    network, tokenizer = find_model(model, None, device)
    loaded = replace(model, model=network) if isinstance(model, LoadedModel) else network
    with _make_scratch(folder) as scratch:
        try:
            own = replace(options, field="text")
            sample = _measure_sample(loaded, tokenizer, source, scratch / "acts", own, num_examples, seconds)
            disk = _measure_disk(scratch)
        except SpaceError as error:
            raise SpaceError(
                f"{to}: the disk has {format_bytes(shutil.disk_usage(scratch).free)} free, too little for the sample "
                "that a plan measures there. Make room, give another disk with -o, or ask for fewer sites, a smaller "
                "dtype or a pool."
            ) from error
    return Price(num_examples, sample, disk, str(find_device(network)))


@contextlib.contextmanager
def _make_scratch(folder: NamedPath) -> Iterator[Path]:
    """Make a temporary folder beside the future store, or inside an existing one, where the next run clears it."""
    parent = next(one for one in (folder.path, *folder.path.parents) if one.is_dir())
    is_inside = parent == folder.path
    scratch = parent / (f"{TRIAL_PREFIX}{time.time_ns()}.tmp" if is_inside else f"layerprobe-plan-{time.time_ns()}")
    try:
        scratch.mkdir(mode=0o700)
    except OSError as error:
        raise tell_failure(folder, error) from error
    try:
        yield scratch
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(scratch)


def _measure_sample(
    model: Any,
    tokenizer: Any,
    source: TextSource,
    place: Path,
    options: ExtractOptions,
    num_examples: int,
    seconds: float,
) -> SamplePace:
    """Run the first texts for about `seconds`, with the plan that the whole run would have."""
    first = [{**one.fields, "text": one.text} for one in itertools.islice(check_records(source), MOST_EXAMPLES)]
    if not first:
        raise InputError(f"{source.name}: holds no texts. Give at least one.")
    # space is reserved unit by unit, and counted shards are removed, so the plan must not require space for all
    plan = plan_extraction(
        model, first, place, options, tokenizer=tokenizer, wait_for_space=True, stands_for=num_examples
    )
    with Sampler(plan) as sampler:
        grow_sample(source, seconds, sampler.run, sampler.forget)
    return sampler.pace


def _measure_disk(folder: Path) -> DiskPace:
    """Write incompressible data durably, as a shard is written."""
    data = make_noise(_DISK_BYTES)
    free = shutil.disk_usage(folder).free
    path = folder / "disk"
    start = time.perf_counter()
    commit_file(path, [data])
    seconds = time.perf_counter() - start
    path.unlink()
    return DiskPace(len(data), max(seconds, 1e-9), free)
