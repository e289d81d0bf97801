"""The fields of `store.json` that identify a run and its model, and the fingerprint computed from them.

Runs with equal fingerprints write the same shards, and models with equal fields compute the same values. Other fields
only record provenance and may differ. `docs/format.md` gives the rule.

Must never know of files.
"""

import json
from collections.abc import Mapping
from typing import Any

import xxhash

__all__ = ["INCIDENTAL", "MODEL_FIELDS", "fingerprint_of", "fingerprint_run", "hash_tokenizer"]

_RUN_FIELDS = ("input", "model", "tokenizer", "sites", "pool", "plan")
MODEL_FIELDS = ("class", "config_hash", "weights_hash")
# Fields that do not affect a byte of the shards, or follow from the others.
INCIDENTAL = ("format", "layerprobe", "fingerprint", "model.id", "model.revision")


def fingerprint_of(fields: Mapping[str, Any]) -> str:
    """Compute xxh3-128 of some fields, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True, default=str).encode())


def hash_tokenizer(rules: Mapping[str, Any]) -> str:
    """Hash a `tokenizer.json` without truncation and padding, which each run sets itself."""
    return fingerprint_of({key: value for key, value in rules.items() if key not in ("truncation", "padding")})


def fingerprint_run(description: Mapping[str, Any]) -> str:
    """Compute the fingerprint of a run from its store's description.

    Args:
        description: As in `store.json`; if its plan is None, as for a `Probe`, every field counts.

    Raises:
        KeyError: a required field is missing.
    """
    if description["plan"] is None:
        return fingerprint_of(
            {key: value for key, value in description.items() if key not in ("format", "fingerprint")}
        )
    fields = {key: description[key] for key in _RUN_FIELDS}
    fields["model"] = {key: fields["model"][key] for key in MODEL_FIELDS}
    return fingerprint_of(fields)
