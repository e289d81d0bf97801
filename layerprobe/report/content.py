"""Collect the content of a report from a store: points, fields, curves over depth, heat maps, classes, attention.

The result is one JSON object: numbers are rounded or packed (little-endian, base64), texts truncated. All random draws
use one seed, so the same store gives the same object.

Hides which analyses are run and how numbers are packed. Must never know of HTML.
"""

import base64
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerprobe.analysis.classify import classify
from layerprobe.analysis.differences import Differences, differences
from layerprobe.analysis.figures import GREY, PALETTE, label_sites
from layerprobe.analysis.points import Points, choose_points, draw_points
from layerprobe.analysis.projection import Panel, project
from layerprobe.analysis.results import plain, shorten, shorten_apart
from layerprobe.analysis.sweep import choose_depth
from layerprobe.analysis.verdict import Classification
from layerprobe.cores import using_few_cores
from layerprobe.errors import NonFiniteError, OptionError, SiteError
from layerprobe.store.guard import brief, is_number, need_list
from layerprobe.store.naming import list_named
from layerprobe.store.reader import Store
from layerprobe.store.records import iter_records
from layerprobe.tables import format_count, format_dtype
from layerprobe.telling import make_bar
from layerprobe.version import __version__

__all__ = ["gather"]

_MOST_TEXT = 400
_MOST_VALUE = 80
_MOST_FIELDS = 20
# More distinct numbers than this make a scale, fewer make categories, each with its own colour.
_MOST_CATEGORIES = len(PALETTE)
# With more sites only adjacent ones are compared, because the cost of all pairs grows with the square.
_MOST_PAIRED = 13
# Attention maps: default number of examples, the most tokens of these, and the most bytes of all maps.
_UNASKED_MAPS = 8
_UNASKED_TOKENS = 40
_MOST_MAP_BYTES = 6 << 20


def gather(
    store: Store,
    *,
    sites: str | Sequence[str] | None,
    labels: str | None,
    points: str,
    pool: str | None,
    max_points: int,
    max_rows: int | None,
    attention: Sequence[int] | None,
    seed: int,
    progress: bool | None,
) -> dict[str, Any]:
    """Collect the content of a report; the arguments are those of `layerprobe.report`."""
    if labels is not None and not isinstance(labels, str):
        raise OptionError(f"labels is {brief(repr(labels))}: give the name of a field.")
    chosen = choose_depth(store, sites)
    # first, because its errors are found quickly
    maps = _gather_attention(store, attention)
    kind = choose_points(store, chosen, "norm", points, pool)
    named = list_named(sites, store.sites)
    drawn = draw_points(
        store, chosen, kind, pool=pool, max_points=max_points, seed=seed, named=named, progress=progress
    )
    names = list(drawn.values)
    with using_few_cores(), make_bar(len(names), "pca", progress, "sites") as bar:
        panels = project(drawn.values, "pca", shared=False, seed=seed, done=bar.update)
    records = dict(iter_records(store.catalog, sorted(set(drawn.examples.tolist()))))
    first = labels or "label"
    fields, left_out = _list_fields(store, drawn, records, first)
    found: dict[str, Any] = {
        "about": _describe(store, drawn.constant, left_out),
        "palette": [*PALETTE],
        "grey": GREY,
        "sites": names,
        "short": label_sites(names),
        "first": shorten(first, _MOST_VALUE),
        "points": _pack_points(store, drawn, panels, records),
        "fields": [*fields, _pack_norms(drawn)],
        "left_out": left_out,
        "constant": drawn.constant,
        "depth": None,
        "classes": None,
        "attention": maps,
    }
    if len(names) > 1:
        pairs = "all" if len(names) <= _MOST_PAIRED else "adjacent"
        moved = differences(store, sites=names, pairs=pairs, max_rows=max_rows, seed=seed, progress=progress)
        found["depth"] = _lay_out_depth(names, moved, pairs == "all")
    if labels is not None:
        classified = classify(store, labels, sites=sites, pool=pool or "mean", seed=seed, progress=progress)
        found["classes"] = _lay_out_classes(classified)
    return found


def _describe(store: Store, constant: Sequence[str], left_out: Sequence[str]) -> dict[str, Any]:
    """Describe the store, by its name without its path, because pages are shared."""
    model = store.description.get("model") or {}
    index = store.index or {}
    facts = [
        ("model", f"{model.get('id') or '(unnamed)'} ({model.get('class') or 'class unknown'})"),
        ("state", "complete" if store.is_complete else "not complete"),
        ("examples", f"{len(store):,}"),
        ("tokens", f"{store.num_tokens:,}"),
        ("shards", f"{store.num_shards:,}"),
        ("pool", store.pool or "none: a row per token"),
    ]
    if index.get("truncated"):
        facts.append(("cut", f"{format_count(index['truncated'], 'text')} longer than the maximum length"))
    if index.get("nonfinite"):
        counts = ", ".join(f"{count:,} at {site}" for site, count in index["nonfinite"].items())
        facts.append(("not finite", counts))
    if constant:
        facts.append(("sites left out", f"{', '.join(constant)}: all points are the same there"))
    if left_out:
        facts.append(("fields left out", ", ".join(left_out)))
    views = [store[site] for site in store.sites]
    return {
        "name": shorten(str(store.place).rstrip("/").rpartition("/")[2] or "store", _MOST_VALUE),
        "version": __version__,
        "facts": [(name, shorten(value, _MOST_TEXT)) for name, value in facts],
        "sites": [(view.site, view.kind, format_dtype(view.dtype), view.width) for view in views],
    }


def _pack(values: np.ndarray) -> str:
    """Encode the little-endian bytes of numbers as base64."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode("ascii")


def _pack_points(
    store: Store, drawn: Points, panels: Sequence[Panel], records: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """Pack the points, with each panel scaled to its own square in int16 coordinates of -32767 to 32767."""
    places = np.empty((len(panels), len(drawn), 2), dtype=np.int16)
    for number, panel in enumerate(panels):
        low, high = panel.points.min(0).values, panel.points.max(0).values
        half = max(float((high - low).max()) / 2, 1e-9)
        places[number] = np.round((panel.points - (low + high) / 2).numpy() / half * 32767)
    ordinals = sorted(records)
    place_of = {ordinal: place for place, ordinal in enumerate(ordinals)}
    return {
        "kind": drawn.kind,
        "all": drawn.num_all,
        "panels": [{"variance": _round(panel.variance), "trust": _round(panel.trust)} for panel in panels],
        "places": _pack(places),
        "of": [place_of[ordinal] for ordinal in drawn.examples.tolist()],
        "ordinals": ordinals,
        "texts": [_read_text(store, ordinal, records[ordinal]) for ordinal in ordinals],
    }


def _read_text(store: Store, ordinal: int, record: dict[str, Any]) -> str | None:
    text = record.get("text")
    if text is None and store.id_to_tokens is not None:
        text = " ".join(store.id_to_tokens(store.input_ids(ordinal)))
    return None if text is None else shorten(str(text), _MOST_TEXT)


def _list_fields(
    store: Store, drawn: Points, records: dict[int, dict[str, Any]], first: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """List what may colour points: token and position of rows, and record fields with single values.

    At most twenty fields are kept, in order of name but always `first`; also returns the names of the others.
    """
    ordinals = drawn.examples.tolist()
    fields = {ordinal: record.get("fields") or {} for ordinal, record in records.items()}
    is_list = {name for of in fields.values() for name, value in of.items() if isinstance(value, (list, dict))}
    names = sorted({name for of in fields.values() for name in of} - is_list, key=lambda name: (name != first, name))
    kept = sorted(names[:_MOST_FIELDS])
    found = [_lay_out_field(name, [fields[ordinal].get(name) for ordinal in ordinals]) for name in kept]
    if drawn.positions is not None:
        found.append({"name": "position", "numbers": drawn.positions.tolist()})
    if drawn.input_ids is not None and store.id_to_tokens is not None:
        found.append(_lay_out_field("token", store.id_to_tokens(drawn.input_ids)))
    return found, [shorten(name, _MOST_VALUE) for name in names[_MOST_FIELDS:]]


def _lay_out_field(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Turn a field into a scale or into categories, the most frequent first; too many categories give no colours."""
    title = shorten(name, _MOST_VALUE)
    values = plain(list(values))
    given = [value for value in values if value is not None]
    is_scale = all(is_number(value) for value in given)
    if is_scale and len(set(given)) > _MOST_CATEGORIES:
        return {"name": title, "numbers": [None if value is None else float(value) for value in values]}
    texts = ["none" if value is None else str(value) for value in values]
    ranked = [value for value, _ in Counter(sorted(texts)).most_common()]
    code = {value: place for place, value in enumerate(ranked)}
    return {
        "name": title,
        "values": shorten_apart(ranked, _MOST_VALUE),
        "codes": [code[text] for text in texts],
        "colours": len(ranked) <= max(_MOST_CATEGORIES, len(texts) // 2),
    }


def _pack_norms(drawn: Points) -> dict[str, Any]:
    norms = np.stack([values.norm(dim=1).numpy() for values in drawn.values.values()])
    return {"name": "norm", "packed": _pack(norms.astype(np.float32))}


def _lay_out_depth(names: Sequence[str], moved: Differences, is_all: bool) -> dict[str, Any]:
    """Collect the curves over depth and the heat maps of each site against each other."""
    of = {(pair.before, pair.after): pair for pair in moved.pairs}
    steps = [of[step] for step in pairwise(names)]
    shapes = (
        ("mean_norm", "Mean norm", "Mean length of a row."),
        ("anisotropy", "Anisotropy", "Mean cosine of two different rows: near 1, all point one way."),
        (
            "self_similarity",
            "Self-similarity",
            "Mean cosine of two rows of the same token: 1 where context says nothing.",
        ),
        ("effective_rank", "Effective rank", "How many directions the rows fill."),
        (
            "cosine_distance",
            "Turned from layer before",
            "1 minus the cosine of a row and the same row one layer before.",
        ),
        ("neighbour_overlap", "Neighbours kept", "Share of a row's nearest neighbours that the layer before had."),
    )
    curves = []
    for key, name, about in shapes:
        is_step = key in ("cosine_distance", "neighbour_overlap")
        values = [_round(getattr(one, key)) for one in (steps if is_step else moved.sites)]
        if any(value is not None for value in values):
            curves.append({"name": name, "about": about, "values": [None, *values] if is_step else values})
    maps = [{"name": "Linear CKA", "about": "1: the same up to rotation and scale.", "values": moved.cka}]
    if is_all:
        overlap = _square(names, {pair: one.neighbour_overlap for pair, one in of.items()}, 1.0)
        cosine = _square(names, {pair: one.cosine_distance for pair, one in of.items()}, 0.0)
        maps.append({"name": "Neighbours shared", "about": "Share of a row's nearest neighbours.", "values": overlap})
        maps.append({"name": "Cosine distance", "about": "Of a row at both layers, on average.", "values": cosine})
    heat = [{**one, "values": [[_round(value) for value in row] for row in one["values"]]} for one in maps]
    said = (
        f"{format_count(moved.num_rows, 'row')}; CKA debiased over minibatches of {moved.cka_rows}; "
        f"{format_count(moved.neighbours, 'neighbour')} of {format_count(moved.num_sampled, 'row')}."
    )
    return {"curves": curves, "heat": heat, "said": said}


def _square(names: Sequence[str], of: dict[tuple[str, str], float | None], diagonal: float) -> list[list[float | None]]:
    return [[diagonal if a == b else of.get((a, b), of.get((b, a))) for b in names] for a in names]


def _round(value: float | None) -> float | None:
    value = plain(value)
    return None if value is None else float(f"{value:.4g}")


def _lay_out_classes(found: Classification) -> dict[str, Any]:
    """Collect the scores of sites and baselines."""
    rows = [(one.site, one.accuracy, one.ci, one.f1, one.tied) for one in found.sites]
    baselines = [(name, one.accuracy, one.ci, one.f1, False) for name, one in found.baselines.items()]
    task = found.task
    return {
        "labels": shorten(task.labels, _MOST_VALUE),
        "said": f"{len(task.classes)} classes; {format_count(task.num_train, 'item')} to train, "
        f"{task.num_dev:,} to choose, {task.num_test:,} to judge.",
        "rows": [
            {
                "name": name,
                "accuracy": _round(accuracy),
                "ci": [_round(end) for end in ci],
                "f1": _round(f1),
                "tied": tied,
            }
            for name, accuracy, ci, f1, tied in (*rows, *baselines)
        ],
        "num_sites": len(rows),
        "verdict": [*found.verdict.sentences, *found.notes],
    }


def _gather_attention(store: Store, asked: Sequence[int] | None) -> dict[str, Any] | None:
    """Pack the attention weights of examples, one byte per weight; by default of the first short ones.

    Raises:
        SiteError: examples are requested but no weights are stored.
        OptionError: they would make the page too large.
        NonFiniteError: a weight is not finite.
    """
    asked = None if asked is None else need_list("attention", asked, "a list of ordinals of examples")
    names = [name for name in store.sites if store[name].kind == "attention"]
    if not names:
        if asked is not None:
            raise SiteError(
                f"attention={asked}: {store.place} holds no attention weights but {', '.join(store.sites)}. "
                "Extract with sites='layers.*.attention.weights' (--sites)."
            )
        return None
    ordinals = _choose_maps(store) if asked is None else [_resolve(store, ordinal) for ordinal in asked]
    examples, num_bytes = [], 0
    for ordinal in dict.fromkeys(ordinals):
        ids = store.input_ids(ordinal)
        tokens = store.id_to_tokens(ids) if store.id_to_tokens is not None else [str(one) for one in ids.tolist()]
        num_bytes += len(ids) ** 2 * sum(len(store[name][ordinal]) for name in names)
        if num_bytes > _MOST_MAP_BYTES:
            raise OptionError(
                f"attention={ordinals}: the weights of these examples take more than {_MOST_MAP_BYTES >> 20} MiB of "
                "the page. Ask for fewer, or for shorter ones."
            )
        maps = [_pack_weights(store, name, ordinal) for name in names]
        examples.append({"ordinal": ordinal, "tokens": [shorten(one, 20) for one in tokens], "maps": maps})
    return {"sites": names, "examples": examples} if examples else None


def _choose_maps(store: Store) -> list[int]:
    chosen = []
    for place in range(min(len(store), 100 * _UNASKED_MAPS)):
        ordinal = store.ordinal_at(place)
        if 1 < len(store.input_ids(ordinal)) <= _UNASKED_TOKENS:
            chosen.append(ordinal)
        if len(chosen) == _UNASKED_MAPS:
            break
    return chosen


def _resolve(store: Store, ordinal: int) -> int:
    """Convert a negative ordinal to one from the start; an example that is not in the store raises an error."""
    return store.catalog.find(ordinal)[1]


def _pack_weights(store: Store, name: str, ordinal: int) -> dict[str, Any]:
    weights: Tensor = store[name][ordinal].float()
    if not bool(torch.isfinite(weights).all()):
        raise NonFiniteError(
            f"{name!r} in {store.place}: a weight of example {ordinal} is not finite, and has no place in a picture. "
            "Ask for other examples."
        )
    top = max(float(weights.max()), 1e-9)
    return {"heads": len(weights), "top": _round(top), "packed": _pack((weights / top * 255).round().byte().numpy())}
