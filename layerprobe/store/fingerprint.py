"""What identifies a run and its model among all that `store.json` says, and the fingerprint that is made of it.

Two runs of one fingerprint write the same shards; two models of the same fields make the same values. What else is said
tells where something came from, and may differ. docs/format.md gives the rule.

Must never know of files.
"""

import json
from collections.abc import Mapping
from typing import Any

import xxhash

__all__ = ["INCIDENTAL", "MODEL_FIELDS", "fingerprint_of", "fingerprint_run", "hash_tokenizer"]

_RUN_FIELDS = ("input", "model", "tokenizer", "sites", "pool", "plan")
MODEL_FIELDS = ("class", "config_hash", "weights_hash")
# What tells of a run and does not change a byte of it, or follows from the rest.
INCIDENTAL = ("format", "layerprobe", "fingerprint", "model.id", "model.revision")


def fingerprint_of(fields: Mapping[str, Any]) -> str:
    """xxh3-128 of what tells one thing from another, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True, default=str).encode())


def hash_tokenizer(rules: Mapping[str, Any]) -> str:
    """Hash a `tokenizer.json`, but for truncation and padding: set anew at each call, they are options of the run."""
    return fingerprint_of({key: value for key, value in rules.items() if key not in ("truncation", "padding")})


def fingerprint_run(description: Mapping[str, Any]) -> str:
    """Work out the fingerprint of a run from what its store says, or will say, of it.

    Args:
        description: As in `store.json`; with a plan of None, as a `Probe` has it, all of it counts.

    Raises:
        KeyError: a field is missing that counts.
    """
    if description["plan"] is None:
        return fingerprint_of(
            {key: value for key, value in description.items() if key not in ("format", "fingerprint")}
        )
    fields = {key: description[key] for key in _RUN_FIELDS}
    fields["model"] = {key: fields["model"][key] for key in MODEL_FIELDS}
    return fingerprint_of(fields)
