"""Compute and check everything about a run before it does anything.

A plan holds the texts, the model, the sites and the rule that cuts the input into units. The rule depends only on the
input, so any process can do any unit. The plan's fingerprint identifies the run.

Hides estimates and checks. Runs the model once, on one short text, to measure the width of its sites.
"""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerprobe.capture.casting import resolve_dtype
from layerprobe.capture.identity import describe_pool
from layerprobe.capture.units import check_storable, measure_site
from layerprobe.errors import InputError, OptionError, SpaceError
from layerprobe.extract.batching import Batch, FlatBatch, Shapes, cut_batches, cut_flat_batches
from layerprobe.extract.cutting import Survey, Unit, UnitRule, survey_input
from layerprobe.extract.description import describe_run
from layerprobe.extract.devices import Crew, gather_crew, name_devices
from layerprobe.extract.forward import CUDA_GRAPHS, check_device, find_precision, running
from layerprobe.extract.inputs import TextSource, open_source
from layerprobe.extract.looking import try_out
from layerprobe.extract.network import check_ids, choose_max_length, choose_sites, find_model
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.records import check_text
from layerprobe.extract.resume import (
    check_finite,
    check_place,
    find_done,
    is_same_run,
    recall_run,
    size_units,
)
from layerprobe.extract.thinning import find_kept
from layerprobe.extract.tokens import NO_TEXTS, TokenizedUnit, tokenize
from layerprobe.extract.trials import Trials, can_resume, choose_batches
from layerprobe.models import LoadedModel
from layerprobe.sites.resolve import Site, map_model
from layerprobe.sites.stacks import find_device, need_one_device
from layerprobe.store.description import StoredSite
from layerprobe.store.format import STORE_FILE
from layerprobe.store.guard import MOST_ROWS, MOST_SHARDS
from layerprobe.store.headers import ShardHeader
from layerprobe.store.kept import Kept
from layerprobe.store.places import Place, find_place, need_folder
from layerprobe.tables import format_bytes, format_count, format_dtype

__all__ = ["Plan", "plan_extraction"]

# The size of the input is estimated from this many first texts or bytes, which stay in memory for the whole run.
_SAMPLE_EXAMPLES, _SAMPLE_BYTES = 2000, 16 << 20
_BYTES_PER_TOKEN = 4.0


@dataclass(frozen=True, eq=False)
class Plan:
    """A run that is ready to start; `print(plan)` describes what it will do.

    `digests` are those of the input up to the end of each unit, so a unit can be identified before it is written.
    `first_texts` are the texts that the plan was made from, `first` their token ids.
    """

    place: Place
    model: nn.Module
    tokenizer: Any
    source: TextSource
    options: ExtractOptions
    sites: tuple[Site, ...]
    stored: tuple[StoredSite, ...]
    rule: UnitRule
    batch_tokens: int
    num_examples: int
    digests: tuple[bytes, ...]
    num_tokens: int
    is_exact: bool
    num_bytes: int
    description: dict[str, Any]
    done: dict[int, ShardHeader]
    num_damaged: int
    overwrite: bool
    is_resumed: bool = False
    wait_for_space: bool = False
    crew: Crew | None = None
    first_texts: tuple[str, ...] = ()
    first: TokenizedUnit = NO_TEXTS

    @property
    def fingerprint(self) -> str:
        """Identifier of this run."""
        return self.description["fingerprint"]

    @property
    def folder(self) -> Path:
        """Absolute path of the store's local folder.

        Raises:
            StoreError: the store is not in a local folder.
        """
        return need_folder(self.place).path

    @property
    def num_units(self) -> int:
        """Number of shards of the whole run."""
        return len(self.digests)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return find_device(self.model)

    @property
    def precision(self) -> str | None:
        """Precision of the forward pass if it differs from the dtype of the weights, else None."""
        return self.description["plan"].get("precision")

    @property
    def is_flat(self) -> bool:
        """Whether texts are concatenated into one sequence instead of padded."""
        return bool(self.description["plan"].get("padding_free"))

    @property
    def missing_bytes(self) -> int:
        """Estimated bytes still to be written."""
        done = sum(header.num_examples for header in self.done.values())
        return round(self.num_bytes * (self.num_examples - done) / self.num_examples)

    @property
    def free_bytes(self) -> int | None:
        """Free bytes where the store is or will be; None for remote stores, which have no known limit."""
        if self.place.folder is None:
            return None
        place = self.folder
        while not place.exists():
            place = place.parent
        # files that a killed run reserved, or that this run replaces, are removed before anything is written
        replaced = itertools.chain(
            self.folder.glob("shard-*.safetensors.tmp"),
            self.folder.glob("shard-*.safetensors") if self.overwrite else (),
        )
        return shutil.disk_usage(place).free + sum(file.stat().st_size for file in replaced)

    def cut(self, tokenized: TokenizedUnit) -> Iterator[Batch | FlatBatch]:
        """Cut a unit into the batches of the run."""
        pad_id, said = self.tokenizer.pad_token_id or 0, self.description["plan"]
        if self.is_flat:
            return cut_flat_batches(tokenized, self.batch_tokens, pad_id)
        return cut_batches(
            tokenized,
            self.batch_tokens,
            pad_id,
            shapes=Shapes(self.batch_tokens, self.rule.max_length) if self.options.compile == CUDA_GRAPHS else None,
            batch_cost=said["batch_cost_tokens"],
            equal_lengths=bool(said.get("equal_lengths")),
        )

    def units(self) -> Iterator[Unit]:
        """Iterate over the units of the input."""
        return self.rule.cut(iter(self.source))

    def __str__(self) -> str:
        names = ", ".join(site.name for site in self.sites[:3]) + (", ..." if len(self.sites) > 3 else "")
        about = "" if self.is_exact else "about "
        dtypes = ", ".join(dict.fromkeys(format_dtype(site.dtype) for site in self.stored))
        pool = describe_pool(self.options.pool)
        rows = f"pooled by {pool} over all real tokens, special ones included" if pool else "a row per real token"
        rows = rows if self.rule.kept is None else f"rows of {self.rule.kept}"
        where = self.device if self.crew is None else ", ".join(self.crew.devices)
        lines = [
            f"input     {self.source.name}: {format_count(self.num_examples, 'example')}, "
            f"{about}{format_count(self.num_tokens, 'token')}",
            f"model     {self.description['model']['id'] or self.description['model']['class']} on {where}",
            f"sites     {len(self.sites)} ({names}), {rows}, stored as {dtypes}",
            f"store     {self.place}: {format_count(self.num_units, 'shard')}, {about}{format_bytes(self.num_bytes)}; "
            + (
                "space not checked there, and no lock: one run at a time"
                if self.free_bytes is None
                else f"{format_bytes(self.free_bytes)} free"
            ),
        ]
        missing = self.num_units - len(self.done)
        if self.crew is not None and 0 < missing < (num_devices := len(self.crew.devices)):
            # a resumed run keeps its division into shards
            can_have_more = not self.is_resumed and self.num_examples > self.num_units
            advice = "; a smaller shard_size (--shard-size) makes more" if can_have_more else ""
            to_do = f"{format_count(missing, 'shard')} to do{advice}"
            lines.append(f"idle      {num_devices - missing} of {num_devices} devices: {to_do}")
        if self.done:
            lines.append(f"resuming  {format_count(len(self.done), 'shard')} of {self.num_units:,} already there")
        if self.num_damaged:
            lines.append(f"damaged   {format_count(self.num_damaged, 'shard')} to be made again")
        return "\n".join(lines)


def plan_extraction(
    model: nn.Module | LoadedModel | str,
    texts: Any,
    to: str | Path | Place,
    options: ExtractOptions | None = None,
    *,
    tokenizer: Any = None,
    device: str | int | None = None,
    devices: str | Sequence[int | str] | None = None,
    overwrite: bool = False,
    wait_for_space: bool = False,
    stands_for: int | None = None,
) -> Plan:
    """Plan and check a run; see `extract` for the arguments.

    Args:
        stands_for: Number of examples of the full run that this one samples; batches are chosen as for that run.

    Raises:
        LayerProbeError: anything that would make the run fail and can be known before it starts.
    """
    options = options or ExtractOptions()
    place = find_place(to)
    check_place(place)
    if wait_for_space and place.folder is None:
        raise OptionError(f"{place}: wait_for_space goes with a local folder: no disk can fill up there. Leave it out.")
    crew, source, device = _find_source(model, texts, to, options, tokenizer, device, devices)
    sample = _read_sample(source)
    name = model.name if isinstance(model, LoadedModel) else model if isinstance(model, str) else ""
    model, tokenizer = find_model(model, tokenizer, device)
    check_device(need_one_device(model), options.compile)
    sites = choose_sites(map_model(model), options.sites)
    max_length = choose_max_length(model, tokenizer, options.max_length)
    stored = _measure_sites(model, tokenizer, sites, options)
    sampled = tokenize(tokenizer, sample, max_length)
    check_ids(model, sampled, source.name)
    kept = find_kept(options.tokens, options.keep, tokenizer, stored, options.pool)
    recalled = recall_run(place)
    rule = _make_rule(stored, max_length, _measure_texts(sample, sampled), kept)
    rule = size_units(rule, options.shard_bytes, recalled, find_device(model))
    survey = survey_input(source, rule)
    # described before batches are chosen, which may need it twice: it reads every weight
    described = describe_run(model, tokenizer, stored, options, rule, survey, name)
    num_tokens = round(survey.num_tokens * (stands_for or survey.num_examples) / survey.num_examples)
    trials = Trials(model, sites, stored, rule.kept, options, sampled, num_tokens, tokenizer.pad_token_id or 0)
    if overwrite and recalled is not None and not can_resume(recalled, described, trials):
        # the run in the folder, whose cut was used so far, will be replaced
        recalled, own = None, size_units(rule, options.shard_bytes, None, find_device(model))
        if own != rule:
            rule, survey = own, survey_input(source, own)
            described = describe_run(model, tokenizer, stored, options, rule, survey, name)
    _check_counts(survey)
    batch_tokens, description = choose_batches(place, recalled, described, trials)
    is_exact = survey.num_examples <= len(sample)
    # the same run is resumed even with overwrite, because a requeued job starts with the same command
    overwrite = overwrite and place.exists(STORE_FILE) and not is_same_run(recalled, description)
    done, num_damaged = ({}, 0) if overwrite else find_done(place, description)
    if options.nonfinite == "error":
        check_finite(done.values())
    plan = Plan(
        place=place,
        model=model,
        tokenizer=tokenizer,
        source=source,
        options=options,
        sites=sites,
        stored=stored,
        rule=rule,
        batch_tokens=batch_tokens,
        num_examples=survey.num_examples,
        digests=survey.digests,
        num_tokens=sampled.num_tokens if is_exact else survey.num_tokens,
        is_exact=is_exact,
        num_bytes=_estimate_bytes(survey, rule, sampled if is_exact else None),
        description=description,
        done=done,
        num_damaged=num_damaged,
        overwrite=overwrite,
        is_resumed=recalled is not None and not overwrite,
        wait_for_space=wait_for_space,
        crew=crew,
        first_texts=sample,
        first=sampled,
    )
    _check_space(plan)
    return plan


def _read_sample(source: TextSource) -> tuple[str, ...]:
    """Read the first texts of an input: at least one, and at most `_SAMPLE_EXAMPLES` and about `_SAMPLE_BYTES`.

    Raises:
        InputError: there is none, or one that no tokenizer accepts.
    """
    texts: list[str] = []
    size = 0
    for number, record in enumerate(itertools.islice(source, _SAMPLE_EXAMPLES)):
        size += len(check_text(record.text, source.name, number).encode())
        if texts and size > _SAMPLE_BYTES:
            break
        texts.append(record.text)
    if not texts:
        raise InputError(f"{source.name}: holds no texts. Give at least one.")
    return tuple(texts)


def _measure_texts(sample: Sequence[str], sampled: TokenizedUnit) -> float:
    """Measure the bytes of text per token over the texts that were not truncated, for estimating token counts."""
    known = zip(sample, sampled.lengths.tolist(), sampled.truncated, strict=True)
    whole = [(len(text.encode()), length) for text, length, is_cut in known if not is_cut]
    tokens = sum(count - 2 for _, count in whole)
    text_bytes = sum(size for size, _ in whole)
    return round(text_bytes / tokens, 2) if tokens > 0 and text_bytes > 0 else _BYTES_PER_TOKEN


def _make_rule(
    stored: Sequence[StoredSite], max_length: int, text_bytes_per_token: float, kept: Kept | None
) -> UnitRule:
    """Make the rule with the cost of texts at these sites; `size_units` sets the size of a unit."""
    vectors = {
        kind: sum(site.bytes_per_vector for site in stored if site.kind == kind) for kind in ("token", "example")
    }
    return UnitRule(
        row_bytes=vectors["token"],
        example_bytes=vectors["example"],
        pair_bytes=sum(site.width * site.dtype.itemsize for site in stored if site.kind == "attention"),
        shard_bytes=0,
        max_length=max_length,
        text_bytes_per_token=text_bytes_per_token,
        kept=kept,
    )


def _check_counts(survey: Survey) -> None:
    """Refuse a run whose store would exceed what can be read back."""
    if (num_units := len(survey.digests)) > MOST_SHARDS:
        raise OptionError(f"{num_units:,} shards; at most {MOST_SHARDS:,} are read. Raise shard_size.")
    if (num_rows := survey.num_tokens + survey.num_examples) > MOST_ROWS:
        raise OptionError(
            f"{num_rows:,} tokens and texts; at most {MOST_ROWS:,} are read. Make several stores of them."
        )


def _estimate_bytes(survey: Survey, rule: UnitRule, whole: TokenizedUnit | None) -> int:
    """Estimate the bytes of a store; `whole` is its input if that is fully tokenised already."""
    value_bytes = survey.value_bytes if whole is None else sum(map(rule.cost, whole.lengths.tolist()))
    # besides values and ids: an ordinal and two offsets per example, and the records
    return value_bytes + 24 * survey.num_examples + survey.record_bytes


def _check_space(plan: Plan) -> None:
    """Check that the disk has space for what is still to be written, unless the run may wait for it."""
    free_bytes, missing_bytes = plan.free_bytes, plan.missing_bytes
    if free_bytes is not None and missing_bytes > free_bytes and not plan.wait_for_space:
        raise SpaceError(
            f"{plan.place}: needs {format_bytes(missing_bytes)} more, the disk has {format_bytes(free_bytes)} "
            f"free: {missing_bytes - free_bytes:,} bytes missing. Ask for fewer sites, a smaller dtype or "
            "a pool, choose another disk, or start all the same with wait_for_space=True (--wait-for-space)."
        )


def _find_source(
    model: object,
    texts: Any,
    to: object,
    options: ExtractOptions,
    tokenizer: object,
    device: str | int | None,
    devices: str | Sequence[int | str] | None,
) -> tuple[Crew | None, TextSource, str | int | None]:
    """Open the input; with several devices, also set up the crew, and plan on the first device."""
    if devices is None:
        return None, open_source(texts, options.field), device
    names = name_devices(devices)
    if device is not None:
        raise OptionError(f"devices={','.join(names)} with device={device!r}: give one of the two.")
    if len(names) == 1:
        return None, open_source(texts, options.field), names[0]
    untold = {"tokenizer": tokenizer is not None, "pool": callable(options.pool)}
    return *gather_crew(names, model, texts, to, options.field, untold), names[0]


def _measure_sites(
    model: nn.Module, tokenizer: Any, sites: tuple[Site, ...], options: ExtractOptions
) -> tuple[StoredSite, ...]:
    """Run the model on one short text to learn the width and dtype of each site."""
    dtype = resolve_dtype(options.dtype)
    check_storable(sites, options.pool, dtype)
    ids = tokenize(tokenizer, ["layer probe"], options.max_length or 8).gather([0])[None]
    with running(model, find_precision(model, options.precision)):
        made = try_out(model, [site.name for site in sites], ids, options.precision)
    return tuple(measure_site(site, made[site.name], options.pool, dtype) for site in sites)
