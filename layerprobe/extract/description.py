"""Describe a run for its store: model, input, sites, plan, and a fingerprint of everything that changes its bytes.

Two runs with the same fingerprint write the same shards, so either can resume the other. Must never choose anything,
and never look at a folder.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from layerprobe.capture.identity import describe_changes, describe_pool
from layerprobe.collecting import collecting_later
from layerprobe.extract.batching import SHAPE_STEPS
from layerprobe.extract.cutting import Survey, UnitRule
from layerprobe.extract.flat import find_unusual_attention
from layerprobe.extract.forward import CUDA_GRAPHS, find_precision
from layerprobe.extract.options import ExtractOptions
from layerprobe.models import describe_model
from layerprobe.sites.resolve import map_model
from layerprobe.store.description import StoredSite
from layerprobe.store.fingerprint import fingerprint_run, hash_tokenizer
from layerprobe.version import __version__

__all__ = ["add_batches", "describe_run", "describe_tokenizer"]


def describe_run(
    model: nn.Module,
    tokenizer: Any,
    stored: tuple[StoredSite, ...],
    options: ExtractOptions,
    rule: UnitRule,
    survey: Survey,
    name: str,
) -> dict[str, Any]:
    """Describe a run, without its batches.

    Args:
        stored: The sites as they are stored.
        rule: The rule that cuts its input into units.
        survey: Counts and digests of its input.
        name: Name of the model; empty if it has none.

    Cost: reads every weight of the model.
    """
    precision = find_precision(model, options.precision)
    attention, changes = find_unusual_attention(map_model(model)), describe_changes(model)
    return {
        "input": {"hash": survey.digests[-1].hex(), "examples": survey.num_examples},
        "model": {**describe_model(model), **({"id": name} if name else {})},
        "tokenizer": describe_tokenizer(tokenizer),
        "sites": {site.name: site.describe() for site in stored},
        "pool": describe_pool(options.pool),
        "plan": {
            "max_length": rule.max_length,
            "shard_bytes": rule.shard_bytes,
            "text_bytes_per_token": rule.text_bytes_per_token,
            "units": len(survey.digests),
            **({"unit_tokens": rule.unit_tokens} if survey.is_bound_by_tokens else {}),
            **({"kept": rule.kept.describe()} if rule.kept is not None else {}),
            # the rest only if it differs from the default
            **({"attention": attention} if attention is not None else {}),
            **({"changes": changes} if changes else {}),
            **({"precision": precision} if precision is not None else {}),
            **({"compile": options.compile} if options.compile else {}),
            **({"shape_steps": SHAPE_STEPS} if options.compile == CUDA_GRAPHS else {}),
        },
    }


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Describe a tokenizer: class, hash of its rules, padding side, and other settings that change ids."""
    with collecting_later():
        rules_hash = hash_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()))
    return {
        "class": type(tokenizer).__name__,
        "hash": rules_hash,
        "padding_side": tokenizer.padding_side,
        # only if they differ from the defaults, so that older stores keep their fingerprints
        **({"truncation_side": tokenizer.truncation_side} if tokenizer.truncation_side != "right" else {}),
        **({"split_special_tokens": True} if getattr(tokenizer, "split_special_tokens", False) else {}),
    }


def add_batches(
    described: Mapping[str, Any], batch_tokens: int, is_flat: bool, batch_cost: int, equal_lengths: bool
) -> dict[str, Any]:
    """Add the batches and the fingerprint, which covers exactly what changes the bytes of the shards.

    Args:
        described: From `describe_run`.
        batch_tokens: Maximum tokens of a batch.
        is_flat: Whether batches have no padding; the following arguments concern batches that have.
        batch_cost: Cost of one more batch, in tokens.
        equal_lengths: Whether all texts of a batch have the same length.
    """
    padding: dict[str, Any] = {"padding_free": True} if is_flat else {"batch_cost_tokens": batch_cost}
    if not is_flat and equal_lengths:
        padding["equal_lengths"] = True
    if not is_flat and described["tokenizer"]["padding_side"] != "right":
        # older versions then padded on the left, which changes the rows of models with absolute positions
        padding["padding_side"] = "right"
    description = {**described, "plan": {"batch_tokens": batch_tokens, **padding, **described["plan"]}}
    return {"layerprobe": __version__, **description, "fingerprint": fingerprint_run(description)}
