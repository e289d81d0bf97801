"""The fields in which two plans or models differ, for messages that refuse a store of another run or model.

A field that follows from others is listed only if nothing else differs. Must never know of files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from layerprobe.store.fingerprint import INCIDENTAL, MODEL_FIELDS

__all__ = ["list_differences", "list_model_differences"]

# Fields that follow from an option or the input, listed only if nothing else differs.
_DERIVED = (
    "plan.batch_cost_tokens",
    "plan.kept.ids",
    "plan.padding_side",
    "plan.text_bytes_per_token",
    "plan.unit_tokens",
    "plan.units",
)


def list_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List the fields in which two runs differ, with both values.

    Args:
        found: The content of a `store.json`.
        wanted: The content of another, or a plan.
    """
    there, here = _flatten(_condense(found)), _flatten(_condense(wanted))
    keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
    keys = [key for key in keys if key not in INCIDENTAL]
    keys = [key for key in keys if key not in _DERIVED] or keys
    return _compare(there, here, keys)


def list_model_differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """List the fields in which two models differ, with both values.

    Args:
        there, here: The description of each, from a store or from `describe_model`.
    """
    return _compare(there, here, [key for key in MODEL_FIELDS if there.get(key) != here.get(key)])


def _compare(there: Mapping[str, Any], here: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    return [f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in keys]


def _condense(description: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the fields that are the same for most sites into one each, to keep the list of differences short."""
    sites = description.get("sites")
    if not isinstance(sites, dict) or not all(isinstance(site, dict) for site in sites.values()):
        return dict(description)
    dtypes = dict.fromkeys(str(site.get("dtype")) for site in sites.values())
    return {**description, "sites": " ".join(sites), "dtype": " ".join(dtypes)}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat
