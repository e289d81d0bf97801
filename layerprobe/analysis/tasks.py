"""The items to classify, with the label, the rows and the side (train, dev or test) of each.

An item is an example, a token, or a span of characters whose tokens are averaged. Labels, spans, splits and groups come
from fields of the records, or as sequences, one value per example.

Hides records and tokenizers. Must never know of values or classifiers.
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from layerprobe.analysis.splits import SIDES, TEST, TRAIN, split_by_field, split_by_group
from layerprobe.errors import InputError, OptionError
from layerprobe.store.guard import brief, need_list
from layerprobe.store.reader import Store
from layerprobe.store.records import RECORD_TENSORS, read_records
from layerprobe.store.shards import span_of
from layerprobe.store.vocabulary import find_characters
from layerprobe.tables import format_count

__all__ = ["Task", "make_task"]


@dataclass(frozen=True, eq=False)
class Task:
    """Items to classify.

    Args:
        name: Name of the labels.
        kind: `examples`, `tokens` or `spans`.
        classes: The labels that occur, by number.
        labels: int64 `[n]`, the number of each item's label.
        sides: int8 `[n]`, 0 train, 1 dev, 2 test.
        examples: int64 `[n]`, the ordinal of each item's example, ascending.
        spans: int64 `[n, 2]`, the first row of each item in its example and the one after the last; None for whole
            examples.
        types: The type of each item, which determines its label in the control task: its token ids.
        words: The text of each item; else its tokens or their ids.
        notes: Remarks on the task, in sentences.
    """

    name: str
    kind: str
    classes: tuple[Any, ...]
    labels: np.ndarray
    sides: np.ndarray
    examples: np.ndarray
    spans: np.ndarray | None
    types: list[Hashable]
    words: list[str]
    notes: tuple[str, ...]

    def count(self, side: int) -> int:
        """Count the items of a side."""
        return int((self.sides == side).sum())


def make_task(
    store: Store,
    labels: str | Sequence[Any],
    *,
    span: tuple[str, str] | None = None,
    split: str | Sequence[Any] | None = None,
    group: str | Sequence[Any] | None = None,
    max_examples: int | None = None,
    seed: int = 0,
) -> Task:
    """Make the items of a store.

    Args:
        store: The store.
        labels: A field, or a value per example. If the values are lists, items are tokens: one value per row, None for
            rows without a label.
        span: Fields with the first character and the one after the last; lists of them if labels are lists.
        split: Field, or values, with train, dev or test.
        group: Field, or values; examples with equal values stay on one side.
        max_examples: Maximum number of examples, and of items, drawn at random; None for all.
        seed: Seed of every draw.

    Raises:
        InputError: labels are missing or unusable.
        OptionError: no record has the field, or two options conflict.
    """
    if split is not None and group is not None:
        raise OptionError("split and group: both say which side an example is on. Use one of the two.")
    if span is not None and not (isinstance(span, (tuple, list)) and len(span) == 2):
        raise OptionError(
            f"span is {brief(repr(span))}: give two fields, of the first character and of the one after the last."
        )
    if not len(store):
        raise InputError(f"labels for {store.place}: it has no examples. Extract some first.")
    store.catalog.need_every_row("a classification", "Extract all rows, or with a pool.")
    ordinals = np.fromiter(store.ordinals(), dtype=np.int64)
    places, notes = np.arange(len(ordinals)), []
    if max_examples is not None and len(ordinals) > max_examples:
        places = np.sort(np.random.default_rng([seed, 0]).permutation(len(ordinals))[:max_examples])
        notes.append(f"{max_examples:,} of {len(ordinals):,} examples, drawn at random.")
    records, ids = _read(store, ordinals[places].tolist())
    name = labels if isinstance(labels, str) else "labels"
    given = _column(store, records, places, "labels", labels)
    items = _find_items(store, ordinals[places], records, ids, given, name, span)
    if max_examples is not None and len(items) > max_examples:
        kept = _draw_items(items, max_examples, seed)
        notes.append(f"{len(kept):,} of {len(items):,} items, in whole examples drawn at random.")
        items = kept
    keys: list[Hashable] = list(ids)
    if group is not None:
        keys = [_need_hashable("group", value) for value in _column(store, records, places, "group", group)]
    firsts = _main_labels(items, len(places))
    if split is not None:
        sides = split_by_field(_column(store, records, places, "split", split), firsts, keys, seed)
    else:
        sides = split_by_group(keys, firsts, seed)
    if num_shared := _count_shared(ids, sides):
        notes.append(f"{format_count(num_shared, 'example')} of test with the same tokens as one of train.")
    numbers = np.array([item[0] for item in items])
    classes, labelled = _number_labels(name, [item[1] for item in items], sides[numbers])
    notes += _note_rare(classes, labelled, sides[numbers])
    is_whole = items[0][2] is None
    texts = [record.get("text") for record in records]
    num_cut = (store.index or {}).get("truncated", 0)
    if num_cut and is_whole and any(text is not None for text in texts):
        notes.append(f"{format_count(num_cut, 'text')} cut to the maximum length; tfidf reads whole ones.")
    types, words = [], []
    for number, _, rows in items:
        own = ids[number] if rows is None else ids[number][rows[0] : rows[1]]
        types.append(own)
        words.append(_name_item(store, own, texts[number], is_whole))
    return Task(
        name=name,
        kind="examples" if is_whole else "spans" if span is not None else "tokens",
        classes=classes,
        labels=labelled,
        sides=sides[numbers],
        examples=ordinals[places][numbers],
        spans=None if is_whole else np.array([item[2] for item in items], dtype=np.int64),
        types=types,
        words=words,
        notes=tuple(notes),
    )


_Item = tuple[int, Any, tuple[int, int] | None]


def _read(store: Store, ordinals: list[int]) -> tuple[list[dict[str, Any]], list[tuple[int, ...]]]:
    """Read the records and the token ids of some examples, shard by shard."""
    records, ids = [], []
    for shard, own in store.catalog.iter_parts(ordinals, ["input_ids", *RECORD_TENSORS]):
        records += read_records(shard, own, store.place.label(shard.header.file))
        of_shard = shard.tensor("input_ids")
        ids += [tuple(of_shard[slice(*span_of(shard, ordinal)[1:])].tolist()) for ordinal in own]
    return records, ids


def _column(
    store: Store, records: list[dict[str, Any]], places: np.ndarray, what: str, given: str | Sequence[Any]
) -> list[Any]:
    """Find a value for each example, from a field of its record or from a sequence."""
    if isinstance(given, str):
        if not any(given in record.get("fields", {}) for record in records):
            known = sorted({field for record in records for field in record.get("fields", {})})
            raise OptionError(
                f"{what} {given!r}: no record in {store.place} has such a field: they have "
                f"{', '.join(known) or 'none'}. Extract records that have it, or give a sequence."
            )
        values = [record.get("fields", {}).get(given) for record in records]
    else:
        if isinstance(given, Mapping):
            raise OptionError(f"{what}: a {type(given).__name__} has no order. Give a value per example, in order.")
        # as a list, because a pandas column is indexed by its own labels, not by position
        ordered = need_list(what, given, "the name of a field, or a value per example, in order")
        if len(ordered) != len(store):
            raise OptionError(
                f"{what}: {format_count(len(ordered), 'value')} for {format_count(len(store), 'example')} of "
                f"{store.place}."
            )
        values = [_unwrap(ordered[place]) for place in places.tolist()]
    missing = [place for place, value in enumerate(values) if _is_missing(value)]
    if missing:
        first = list(store.ordinals())[int(places[missing[0]])]
        raise InputError(
            f"{what} {given if isinstance(given, str) else 'given'!r}: {len(missing):,} of {len(values):,} examples "
            f"have none, the first is example {first}. Give each one, or extract only those that have one."
        )
    return values


def _is_missing(value: Any) -> bool:
    """Return whether a value is missing: None as in JSON, or NaN as in tables."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _unwrap(value: Any) -> Any:
    """Convert a value of numpy or torch to a Python value."""
    return value.tolist() if hasattr(value, "tolist") else value


def _find_items(
    store: Store,
    ordinals: np.ndarray,
    records: list[dict[str, Any]],
    ids: list[tuple[int, ...]],
    labels: list[Any],
    name: str,
    span: tuple[str, str] | None,
) -> list[_Item]:
    if span is not None:
        return _find_spans(store, ordinals, records, ids, labels, span)
    is_list = [isinstance(value, (list, tuple)) for value in labels]
    if not any(is_list):
        return [(number, value, None) for number, value in enumerate(labels)]
    items: list[_Item] = []
    for number, (ordinal, values) in enumerate(zip(ordinals.tolist(), labels, strict=True)):
        length = len(ids[number])
        if not is_list[number] or len(values) != length:
            what = format_count(len(values), "label") if is_list[number] else f"the label {values!r}"
            raise InputError(
                f"labels {name!r}: example {ordinal} has {what} for {format_count(length, 'token')}. Give one for "
                "each token, special ones included, and None where there is none; or use span."
            )
        own = enumerate(map(_unwrap, values))
        items += [(number, one, (row, row + 1)) for row, one in own if not _is_missing(one)]
    if not items:
        raise InputError(f"labels {name!r}: no token has one. Give some tokens a label.")
    return items


def _draw_items(items: list[_Item], most: int, seed: int) -> list[_Item]:
    """Draw whole examples with at most `most` items in total, or one larger example; items keep their order."""
    counts = Counter(number for number, _, _ in items)
    numbers, left, chosen = list(counts), most, set()
    for place in np.random.default_rng([seed, 6]).permutation(len(numbers)).tolist():
        number = numbers[place]
        if counts[number] <= left or not chosen:
            chosen.add(number)
            left -= counts[number]
    return [item for item in items if item[0] in chosen]


def _find_spans(
    store: Store,
    ordinals: np.ndarray,
    records: list[dict[str, Any]],
    ids: list[tuple[int, ...]],
    labels: list[Any],
    span: tuple[str, str],
) -> list[_Item]:
    items: list[_Item] = []
    everywhere = np.arange(len(ordinals))
    by_place = [_column(store, records, everywhere, "span", field) for field in span]
    for number, (ordinal, label) in enumerate(zip(ordinals.tolist(), labels, strict=True)):
        values = [label, *(column[number] for column in by_place)]
        lists = [list(one) if isinstance(one, (list, tuple)) else [one] for one in values]
        if len({len(one) for one in lists}) != 1:
            counts = ", ".join(str(len(one)) for one in lists)
            raise InputError(
                f"span {span}: example {ordinal} has {counts} labels, starts and ends. Give as many of each."
            )
        what = f"characters of example {ordinal} of {store.place}"
        own = torch.tensor(ids[number], dtype=torch.int64, device="cpu")
        offsets = find_characters(store.vocabulary, records[number].get("text"), own, what)
        for one, start, end in zip(*lists, strict=True):
            if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end):
                raise InputError(f"span {span}: example {ordinal} has {start!r} to {end!r}. Give characters, from 0.")
            rows = [row for row, (first, last) in enumerate(offsets) if first < end and last > start]
            if not rows:
                raise InputError(
                    f"span {span}: characters {start} to {end} of example {ordinal} are in no token; the text may have "
                    "been cut. Leave the span out, or extract with a larger max_length."
                )
            items.append((number, _unwrap(one), (rows[0], rows[-1] + 1)))
    if not items:
        raise InputError(f"span {span}: no example has a span. Give some.")
    return items


def _main_labels(items: list[_Item], count: int) -> list[Hashable]:
    """Find the most frequent label of each example's items, which keeps classes in proportion in a split."""
    found: list[Counter[Any]] = [Counter() for _ in range(count)]
    for number, label, _ in items:
        found[number][_need_hashable("labels", label)] += 1
    return [counts.most_common(1)[0][0] if counts else None for counts in found]


def _need_hashable(what: str, value: Any) -> Hashable:
    if _is_missing(value) or not isinstance(value, (str, int, float, bool)):
        raise InputError(f"{what}: {value!r} is no label: use text, whole numbers or true and false.")
    return value


def _number_labels(name: str, labels: list[Any], sides: np.ndarray) -> tuple[tuple[Any, ...], np.ndarray]:
    classes: tuple[Any, ...] = tuple(sorted(set(labels), key=lambda one: (isinstance(one, str), one)))
    if len(classes) < 2:
        raise InputError(f"labels {name!r}: every item is {labels[0]!r}. A classifier needs two classes or more.")
    numbers = {label: number for number, label in enumerate(classes)}
    labelled = np.array([numbers[label] for label in labels], dtype=np.int64)
    for side, part in enumerate(SIDES):
        if not (sides == side).any():
            raise InputError(f"labels {name!r}: no item is in {part}. Give more examples, or another split.")
    train = labelled[sides == TRAIN]
    if len(train) < len(classes):
        raise InputError(
            f"labels {name!r}: {len(classes):,} classes, and {format_count(len(train), 'item')} to learn them from. "
            "Use a field with few values, such as a topic, not one that names each example."
        )
    if len(np.unique(train)) < 2:
        raise InputError(f"labels {name!r}: in train every item is {classes[train[0]]!r}. Use another split.")
    return classes, labelled


def _note_rare(classes: tuple[Any, ...], labelled: np.ndarray, sides: np.ndarray) -> list[str]:
    """Write notes on classes that train lacks or has once, and on a test side with a single class."""
    counts = np.bincount(labelled[sides == TRAIN], minlength=len(classes))
    notes, num_unseen, num_single = [], int((counts == 0).sum()), int((counts == 1).sum())
    if num_unseen:
        notes.append(f"Train lacks {num_unseen:,} of {len(counts):,} classes, which no probe can say.")
    if 2 * num_single > len(counts):
        notes.append(f"{num_single:,} of {len(counts):,} classes have one item in train: little is learned of them.")
    if len(judged := np.unique(labelled[sides == TEST])) == 1:
        notes.append(f"Every item of test is {classes[judged[0]]!r}: accuracy there tells little.")
    return notes


def _count_shared(ids: list[tuple[int, ...]], sides: np.ndarray) -> int:
    train = {one for one, side in zip(ids, sides, strict=True) if side == TRAIN}
    return sum(one in train for one, side in zip(ids, sides, strict=True) if side == TEST)


def _name_item(store: Store, own: tuple[int, ...], text: str | None, is_whole: bool) -> str:
    """Return an item as words: the text of a whole example, else its tokens, else their ids."""
    if is_whole and text is not None:
        return text
    if not is_whole and store.id_to_tokens is not None:
        return " ".join(store.id_to_tokens(torch.tensor(own, dtype=torch.int64, device="cpu")))
    return " ".join(map(str, own))
