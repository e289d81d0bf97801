"""Send texts through a model into a sink: `lp.extract` without a store.

Texts are processed in chunks of bounded size; each is tokenised and cut into batches while the model runs the previous
one. Nothing is written and nothing can be resumed.

Hides how texts become calls of the model. Must never know of stores.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from layerprobe.capture.abilities import abilities_of
from layerprobe.capture.calls import Sink
from layerprobe.capture.early import can_end_early
from layerprobe.capture.probe import Probe
from layerprobe.cores import using_cores
from layerprobe.errors import InputError
from layerprobe.extract.ahead import make_first, prepare_ahead
from layerprobe.extract.batching import Batch, cut_batches
from layerprobe.extract.calling import ModelCaller
from layerprobe.extract.cutting import Unit
from layerprobe.extract.forward import find_precision, running
from layerprobe.extract.inputs import open_source
from layerprobe.extract.network import check_ids, choose_max_length, choose_sites, find_model
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.padding import sees_padding
from layerprobe.extract.records import Record, check_text
from layerprobe.extract.reports import StreamReport
from layerprobe.extract.tokens import TokenizedUnit, tokenize
from layerprobe.extract.warmup import choose_batch_cost, choose_batch_tokens
from layerprobe.models import LoadedModel
from layerprobe.sites.resolve import map_model
from layerprobe.sites.stacks import find_device
from layerprobe.telling import make_run_bar

__all__ = ["stream_texts"]

# Enough texts that sorting by length leaves little padding, and few enough to hold two chunks in memory.
_CHUNK_EXAMPLES = 4096
_CHUNK_BYTES = 4 << 20
# Texts whose tokens are used to test whether the model sees padding.
_TRIED_TEXTS = 8


class _Chunk(NamedTuple):
    unit: Unit
    tokenized: TokenizedUnit
    batches: Iterator[Batch]


def stream_texts(
    model: nn.Module | LoadedModel | str,
    texts: Any,
    sink: Sink,
    options: ExtractOptions,
    *,
    tokenizer: Any = None,
    device: str | int | None = None,
    progress: bool = False,
) -> StreamReport:
    """Send every text through the model and its sites to the sink; see `extract` for the arguments.

    Raises:
        InputError, ModelError, SiteError, OptionError, ArchitectureError: before any text has gone through.
    """
    source = open_source(texts, options.field)
    first_records = list(itertools.islice(source, _TRIED_TEXTS))
    if not first_records:
        raise InputError(f"{source.name}: holds no texts. Give at least one.")
    network, tokenizer = find_model(model, tokenizer, device)
    max_length = choose_max_length(network, tokenizer, options.max_length)
    sites = [site.name for site in choose_sites(map_model(network), options.sites)]
    probe = Probe(network, sites, to=sink, stop=can_end_early(network), this_thread=True)
    announce = abilities_of(sink).announce_examples
    report, caller = StreamReport(), ModelCaller(network, find_device(network))

    def read(unit: Unit) -> TokenizedUnit:
        checked = [
            check_text(record.text, source.name, unit.first_example + place)
            for place, record in enumerate(unit.records)
        ]
        tokenized = tokenize(tokenizer, checked, max_length)
        check_ids(network, tokenized, source.name, unit.first_example)
        return tokenized

    precision = find_precision(network, None)
    cut = _choose_cut(network, tokenizer, precision, options.batch_tokens, read(Unit(0, 0, first_records)))

    def prepare(unit: Unit) -> _Chunk:
        tokenized = read(unit)
        return _Chunk(unit, tokenized, make_first(cut(tokenized), lambda batch: batch.input_ids.numel()))

    start = time.perf_counter()
    with make_run_bar(progress) as bar, running(network, precision), using_cores(), probe:
        for unit, tokenized, batches in prepare_ahead(_cut_chunks(iter(source)), prepare):
            for batch in batches:
                first = unit.first_example
                caller.call(batch, lambda part, first=first: announce([first + m for m in part.members]))
                report.num_computed += batch.input_ids.numel()
                report.num_padding += batch.num_padding
                bar.update(len(batch.members))
            report.num_examples += len(unit.records)
            report.num_tokens += tokenized.num_tokens
            report.num_truncated += tokenized.num_truncated
    report.num_halved = caller.num_halved
    report.seconds = time.perf_counter() - start
    return report


def _choose_cut(
    network: nn.Module, tokenizer: Any, precision: str | None, batch_tokens: int | None, tried: TokenizedUnit
) -> Callable[[TokenizedUnit], Iterator[Batch]]:
    """Choose how texts are cut into batches, by the device and by a trial on the first texts."""
    device, pad_id = find_device(network), tokenizer.pad_token_id or 0
    with running(network, precision):
        equal_lengths = sees_padding(network, tried, pad_id, precision)
    return partial(
        cut_batches,
        batch_tokens=batch_tokens or choose_batch_tokens(device),
        pad_id=pad_id,
        # the sink must count repeated texts each time
        joins_equal=False,
        batch_cost=choose_batch_cost(device),
        equal_lengths=equal_lengths,
    )


def _cut_chunks(records: Iterator[Record]) -> Iterator[Unit]:
    """Split records into chunks of bounded number and size."""
    first = 0
    for number in itertools.count():
        members: list[Record] = []
        size = 0
        while len(members) < _CHUNK_EXAMPLES and size < _CHUNK_BYTES:
            record = next(records, None)
            if record is None:
                break
            members.append(record)
            size += len(record.text)
        if not members:
            return
        yield Unit(number, first, members)
        first += len(members)
