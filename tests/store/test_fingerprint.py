"""What identifies a run: values that must never change, since stores hold them."""

from typing import Any

import pytest

from layerprobe.store.fingerprint import fingerprint_of, fingerprint_run

RUN: dict[str, Any] = {
    "format": 1,
    "layerprobe": "0.1.0",
    "input": {"hash": "0" * 32, "examples": 3},
    "model": {"id": "demo", "revision": None, "class": "BertModel", "config_hash": "a" * 32, "weights_hash": "b" * 32},
    "tokenizer": {"class": "BertTokenizerFast", "hash": "c" * 32, "padding_side": "right"},
    "sites": {"layers.0": {"kind": "token", "dtype": "float16", "width": 8}},
    "pool": None,
    "plan": {"batch_tokens": 4096, "units": 1},
    "fingerprint": "f" * 32,
}


def test_fingerprints_ignore_the_order_of_fields() -> None:
    assert fingerprint_of({"a": 1, "b": {"c": 2}}) == fingerprint_of({"b": {"c": 2}, "a": 1})


def test_fingerprints_are_those_of_stores_that_were_written_before() -> None:
    assert fingerprint_run(RUN) == "10bbfe24177e7671172543645aedf77b"
    assert fingerprint_run({**RUN, "plan": None}) == "aa24cfcfd7437efa9d7c49a2e5ec0b92"


@pytest.mark.parametrize("change", [{"format": 2}, {"layerprobe": "9"}, {"fingerprint": ""}, {"more": 1}])
def test_what_changes_no_byte_of_a_run_is_not_in_its_fingerprint(change: dict[str, Any]) -> None:
    assert fingerprint_run({**RUN, **change}) == fingerprint_run(RUN)
    renamed = {**RUN["model"], "id": "other", "revision": "main"}
    assert fingerprint_run({**RUN, "model": renamed}) == fingerprint_run(RUN)


@pytest.mark.parametrize("field", ["input", "model", "tokenizer", "sites", "pool", "plan"])
def test_what_changes_the_bytes_of_a_run_is_in_its_fingerprint(field: str) -> None:
    other = {**RUN["model"], "weights_hash": "d" * 32} if field == "model" else {"other": 1}
    assert fingerprint_run({**RUN, field: other}) != fingerprint_run(RUN)
