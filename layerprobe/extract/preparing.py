"""Prepare units for the model: check them against the plan, tokenise them, and cut them into batches.

None of this needs the device, so it runs in the prefetch thread. Must never know of that thread, or of what the model
computes.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from layerprobe.capture.staging import Room
from layerprobe.capture.units import AnnouncedBatch, encode_record
from layerprobe.errors import InputError
from layerprobe.extract.ahead import make_first
from layerprobe.extract.batching import Batch, FlatBatch
from layerprobe.extract.cutting import Unit
from layerprobe.extract.network import check_ids
from layerprobe.extract.plan import Plan
from layerprobe.extract.records import InputDigest, Record
from layerprobe.extract.tokens import TokenizedUnit, tokenize
from layerprobe.store.kept import KeptRows

__all__ = ["PreparedUnit", "ReadyBatch", "check_units", "prepare_missing"]


class ReadyBatch(NamedTuple):
    """A batch, and its announcement to the sink."""

    batch: Batch | FlatBatch
    announced: AnnouncedBatch


class PreparedUnit:
    """A unit that is ready for the model.

    Args:
        plan: Plan of the run.
        unit: Its texts.
        tokenized: Their ids.

    `room` is its size in a buffer, `records` the encoded records of its examples, and `keeps_part` says whether only
    some of its rows are kept. `batches` can be iterated once.
    """

    def __init__(self, plan: Plan, unit: Unit, tokenized: TokenizedUnit) -> None:
        self.unit = unit
        self.num_truncated = tokenized.num_truncated
        self.records = [encode_record(_make_record(record)) for record in unit.records]
        self._tokenized = tokenized
        self._rows: KeptRows | None = None
        self.room = tokenized.room
        if plan.rule.kept is not None:
            ordinals = range(unit.first_example, unit.first_example + len(unit.records))
            self._rows = plan.rule.kept.choose(tokenized.ids, tokenized.offsets, ordinals)
            self.room = Room(len(self._rows.positions), len(unit.records))
        ready = (ReadyBatch(batch, self.announce(batch)) for batch in plan.cut(tokenized))
        self.batches = make_first(ready, lambda one: one.batch.input_ids.numel())

    @property
    def keeps_part(self) -> bool:
        """Whether only some rows are kept, so that their positions are stored too."""
        return self._rows is not None

    def announce(self, batch: Batch | FlatBatch) -> AnnouncedBatch:
        """Make the announcement of a batch, or of a part of one, that a sink gets before the model is called."""
        rows, tokenized = self._rows, self._tokenized
        kept = None if rows is None else [rows.of(member) for member in batch.members]
        has_copies = len(batch.sequences) > batch.num_sequences - batch.num_filling
        if isinstance(batch, FlatBatch) and not has_copies:
            input_ids = batch.input_ids[0]
        else:
            input_ids = tokenized.gather(batch.members)
        if kept is not None:
            parts = zip(input_ids.split(batch.lengths), kept, strict=True)
            input_ids = torch.cat([own[positions] for own, positions in parts])
        return AnnouncedBatch(
            ordinals=[self.unit.first_example + member for member in batch.members],
            lengths=batch.lengths,
            num_positions=batch.input_ids.shape[1],
            input_ids=input_ids,
            records=[self.records[member] for member in batch.members],
            sequences=batch.sequences if has_copies else None,
            kept=kept,
            num_filling=batch.num_filling,
            is_flat=isinstance(batch, FlatBatch),
        )


def prepare_missing(plan: Plan, unit: Unit) -> PreparedUnit | None:
    """Prepare a unit; None if it is done already."""
    return None if unit.number in plan.done else PreparedUnit(plan, unit, _tokenize(plan, unit))


def _tokenize(plan: Plan, unit: Unit) -> TokenizedUnit:
    texts = [record.text for record in unit.records]
    start, end = unit.first_example, unit.first_example + len(texts)
    if end <= len(plan.first_texts) and tuple(texts) == plan.first_texts[start:end]:
        return plan.first.part(start, end)
    tokenized = tokenize(plan.tokenizer, texts, plan.rule.max_length)
    check_ids(plan.model, tokenized, plan.source.name, start)
    return tokenized


def check_units(plan: Plan) -> Iterator[Unit]:
    """Iterate over the units of a plan.

    Raises:
        InputError: a unit has changed since the plan was made.
    """
    digest, num_units = InputDigest(plan.source.name), 0
    for unit in plan.units():
        for record in unit.records:
            digest.add(record)
        if (num_units := unit.number + 1) > plan.num_units or digest.digest() != plan.digests[unit.number]:
            raise _changed(plan)
        yield unit
    if num_units < plan.num_units:
        raise _changed(plan)


def _make_record(record: Record) -> Mapping[str, Any]:
    """Return the record that is stored with an example."""
    return {"text": record.text, **({"fields": record.fields} if record.fields else {})}


def _changed(plan: Plan) -> InputError:
    # units are compared with the plan before they run, so nothing of the changed input has reached the store
    return InputError(
        f"{plan.source.name}: changed while the run was under way. What {plan.place} holds is of the input as it was: "
        "put that back and run the same command again, pass overwrite=True (--overwrite), or choose another folder."
    )
