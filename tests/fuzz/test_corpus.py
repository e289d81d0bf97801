"""Every input that fuzzing kept, once more; and the mutators, which must spoil and must be repeatable."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fuzz.__main__ import mutate
from fuzz.fuzz_header import check_header, forge_checksum
from fuzz.fuzz_store_json import check_store_json
from layerprobe.store.headers import parse_header

CORPUS = Path(__file__).parent / "corpus"
TARGETS: dict[str, Callable[[bytes], None]] = {"header": check_header, "store_json": check_store_json}
SEEDS = {"header": ("attention", "float32", "int8"), "store_json": ("complete", "empty", "open")}


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_fuzzing_kept_are_read_or_refused(name: str) -> None:
    files = sorted((CORPUS / name).iterdir())
    assert len(files) > 20
    for file in files:
        TARGETS[name](file.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_spoilt_seeds_are_read_or_refused(name: str) -> None:
    for seed in range(300):
        data = (CORPUS / name / SEEDS[name][seed % 3]).read_bytes()
        spoilt = mutate(data, seed)
        assert spoilt == mutate(data, seed)
        TARGETS[name](spoilt)


@pytest.mark.parametrize("seed", SEEDS["header"])
def test_seeds_are_headers_and_stay_so_when_their_checksum_is_forged(seed: str) -> None:
    """Fuzzing that is refused at the door shows nothing."""
    data = (CORPUS / "header" / seed).read_bytes()
    assert parse_header(data).num_examples == 2
    changed = data.replace(b'"first_example":"0"', b'"first_example":"9"').rstrip()
    assert parse_header(forge_checksum(changed)).first_example == 9


def test_the_corpus_stays_small() -> None:
    assert sum(file.stat().st_size for file in CORPUS.rglob("*") if file.is_file()) < 100_000


def test_a_target_notices_a_broken_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerprobe.store.headers._check_places", lambda _: None)
    entries = json.loads((CORPUS / "header" / "float32").read_bytes())
    start, stop = entries["layers.0"]["data_offsets"]
    entries["layers.0"]["data_offsets"] = [start + 4, stop + 4]
    with pytest.raises(AssertionError):
        check_header(json.dumps(entries).encode())


def test_mutation_by_structure_changes_what_it_is_given() -> None:
    source = random.Random(1)
    from fuzz.mutations import mutate_json

    value = {"a": [1, 2, {"b": "3"}], "c": None}
    assert sum(mutate_json(value, source) != value for _ in range(100)) > 80
    assert value == {"a": [1, 2, {"b": "3"}], "c": None}
