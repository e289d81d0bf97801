"""Runs that keep a part of the rows: those rows, at their positions, of those tokens, and nothing that takes all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import layerprobe
from layerprobe.errors import FormatError, OptionError, PlanError
from layerprobe.extract.audit import audit
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.models import LoadedModel
from layerprobe.store.format import commit_shard, read_header
from layerprobe.store.index import ShardInfo
from layerprobe.store.kept import draw
from layerprobe.store.shards import MappedShard
from layerprobe.store.verify import verify

extract: Any = layerprobe.extract
SITES = ["embeddings", "layers.*", "pooler"]
CHOICES = [{"keep": 0.3}, {"tokens": "first"}, {"tokens": "cls"}, {"tokens": "special"}, {"tokens": "nonspecial"},
           {"tokens": "nonspecial", "keep": 0.5}, {"keep": 0.001}]  # fmt: skip


@pytest.fixture
def many(texts: list[str]) -> list[str]:
    """With texts that are the same: they are computed once and each draws its own rows."""
    return [*texts, *texts[:5], *texts[:5], "", ""]


def wanted_rows(loaded: LoadedModel, ids: list[int], ordinal: int, keep: float = 1.0, tokens: str = "all") -> list[int]:
    """The rule, token by token."""
    special = set(loaded.tokenizer("")["input_ids"])
    is_meant = {
        "all": lambda _: True,
        "first": lambda place: place == 0,
        "cls": lambda place: ids[place] == loaded.tokenizer.cls_token_id,
        "special": lambda place: ids[place] in special,
        "nonspecial": lambda place: ids[place] not in special,
    }[tokens]
    return [
        place
        for place in range(len(ids))
        if is_meant(place) and (keep == 1 or bool(draw(np.array([ordinal]), np.array([place]), keep)[0]))
    ]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_rows_that_are_kept_are_those_of_the_whole_run(
    tiny: LoadedModel, many: list[str], tmp_path: Path, choice: dict[str, Any], dtype: str
) -> None:
    # in one unit both runs cut the same batches, so that rows are bit-equal
    whole = extract(tiny, many, tmp_path / "whole", sites=SITES, dtype=dtype)
    thin = extract(tiny, many, tmp_path / "thin", sites=SITES, dtype=dtype, **choice)
    assert whole.num_shards == thin.num_shards == 1
    total = 0
    for ordinal in range(len(many)):
        ids = whole.input_ids(ordinal)
        rows = wanted_rows(tiny, ids.tolist(), ordinal, **choice)
        total += len(rows)
        example = thin.example(ordinal)
        assert example.positions.tolist() == thin.positions(ordinal).tolist() == rows
        assert torch.equal(example.input_ids, ids[rows]) and example.text == many[ordinal]
        assert example.tokens == [whole.example(ordinal).tokens[row] for row in rows]
        for site in thin.sites:
            kept, every = thin[site][ordinal], whole[site][ordinal]
            kept, every = (one.float() for one in (kept, every))
            assert torch.equal(kept, every if site == "pooler" else every[rows]), site
    assert total == thin.num_tokens and sum(len(batch) for batch in thin["layers.0"].rows(7)) == total
    assert verify(tmp_path / "thin").ok
    report = audit(tmp_path / "thin", tiny, num_examples=100)
    assert report.ok and len(report.examples) == len(many), report


def test_any_cut_into_units_keeps_the_same_rows(tiny: LoadedModel, many: list[str], tmp_path: Path) -> None:
    one = extract(tiny, many, tmp_path / "one", keep=0.3)
    cut = extract(tiny, many, tmp_path / "cut", keep=0.3, shard_size=4000)
    assert cut.num_shards > 3
    for ordinal in range(len(many)):
        assert torch.equal(one.positions(ordinal), cut.positions(ordinal))


def test_a_tokenizer_that_pads_on_the_left_gives_the_same_rows(
    tiny: LoadedModel, many: list[str], tmp_path: Path
) -> None:
    side = tiny.tokenizer.padding_side
    try:
        tiny.tokenizer.padding_side = "left"
        whole = extract(tiny, many, tmp_path / "whole")
        thin = extract(tiny, many, tmp_path / "thin", keep=0.3)
    finally:
        tiny.tokenizer.padding_side = side
    for ordinal in range(len(many)):
        assert torch.equal(thin["layers.2"][ordinal], whole["layers.2"][ordinal][thin.positions(ordinal)])


def test_what_is_kept_belongs_to_the_plan(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    def fingerprint(**choice: Any) -> str:
        return plan_extraction(tiny, texts, tmp_path / "none", ExtractOptions(**choice)).fingerprint

    every = [fingerprint(), *(fingerprint(**choice) for choice in CHOICES)]
    assert len(set(every)) == len(every) and fingerprint(keep=1, tokens="all") == every[0]
    extract(tiny, texts, tmp_path / "acts", keep=0.3)
    said = json.loads((tmp_path / "acts" / "store.json").read_text())["plan"]["kept"]
    assert said == {"tokens": "all", "keep": 0.3, "ids": []}
    with pytest.raises(PlanError, match=r"plan\.kept\.keep: 0\.3 there, 0\.5 here"):
        extract(tiny, texts, tmp_path / "acts", keep=0.5)


def test_a_run_that_keeps_a_part_resumes_byte_for_byte(tiny: LoadedModel, many: list[str], tmp_path: Path) -> None:
    options = {"keep": 0.3, "shard_size": 4000}
    extract(tiny, many, tmp_path / "acts", **options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "acts").glob("shard-*")}
    for name in sorted(before)[::2]:
        (tmp_path / "acts" / name).unlink()
    extract(tiny, many, tmp_path / "acts", **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "acts").glob("shard-*")} == before


def test_shards_of_a_thin_run_hold_what_was_asked(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    long = [" ".join(texts)] * 20 + [f"{n} " + " ".join(texts) for n in range(200)]
    store = extract(tiny, long, tmp_path / "acts", tokens="first", shard_size=40_000)
    sizes = [path.stat().st_size for path in (tmp_path / "acts").glob("shard-*")]
    assert store.num_shards > 2 and sorted(sizes)[1] > 30_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.5, "pool": "mean"}, r"keep=0\.5 with a pool: a pool takes every row"),
        ({"tokens": "cls", "sites": ["layers.0.attention.weights"]}, r"tokens='cls' with 'layers\.0\.attention\.w"),
        ({"keep": 0.5, "sites": ["pooler"]}, "'pooler' has a vector per example and no rows to choose"),
        ({"keep": 2}, "keep is 2"),
        ({"tokens": "some"}, "no tokens 'some'"),
    ],
)
def test_what_has_no_meaning_on_a_part_of_the_rows_is_refused(
    tiny: LoadedModel, texts: list[str], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        extract(tiny, texts, tmp_path / "acts", **options)
    assert not (tmp_path / "acts").exists()


def test_a_tokenizer_without_such_a_token_is_refused(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.cls_token = None
    with pytest.raises(OptionError, match=r"tokens='cls': the tokenizer has no such token\. Use 'first'"):
        extract(tiny.model, texts, tmp_path / "acts", tokenizer=tokenizer, tokens="cls")


def test_what_takes_every_row_is_refused_when_read(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    records = [{"text": text, "label": str(n % 2)} for n, text in enumerate(texts * 3)]
    store = extract(tiny, records, tmp_path / "acts", keep=0.5)
    with pytest.raises(OptionError, match=r"a pool of 'layers\.0' takes every row of an example, and .* 0\.5 of them"):
        store["layers.0"].pooled("mean")
    with pytest.raises(OptionError, match="token_offsets"):
        store.token_offsets(0)
    with pytest.raises(OptionError, match="word="):
        store.where(word="the")
    with pytest.raises(OptionError, match="a classification takes every row"):
        layerprobe.classify(store, "label")


def test_tokens_are_found_among_those_kept(tiny: LoadedModel, many: list[str], tmp_path: Path) -> None:
    whole = extract(tiny, many, tmp_path / "whole")
    store = extract(tiny, many, tmp_path / "acts", keep=0.5)
    token_id = tiny.tokenizer.sep_token_id
    found, every = store.where(token_id=token_id), whole.where(token_id=token_id)
    kept = [pair for pair in every if pair[1] in store.positions(pair[0]).tolist()]
    assert list(found) == kept and 0 < len(found) < len(every)
    rows = torch.stack([whole["layers.1"][ordinal][position] for ordinal, position in kept])
    assert torch.equal(found.rows("layers.1"), rows)


def test_exports_carry_the_positions(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    store = extract(tiny, texts, tmp_path / "acts", keep=0.5)
    wanted = torch.cat([store.positions(ordinal) for ordinal in range(len(store))]).tolist()
    layerprobe.export(tmp_path / "acts", tmp_path / "acts.npz", "npz")
    with np.load(tmp_path / "acts.npz", allow_pickle=False) as arrays:
        assert arrays["positions"].tolist() == wanted
    layerprobe.export(tmp_path / "acts", tmp_path / "tokens.parquet", "parquet", rows="tokens")
    assert parquet.read_table(tmp_path / "tokens.parquet")["position"].to_pylist() == wanted
    layerprobe.export(tmp_path / "acts", tmp_path / "examples.parquet", "parquet")
    listed = parquet.read_table(tmp_path / "examples.parquet")["positions"].to_pylist()
    assert listed == [store.positions(ordinal).tolist() for ordinal in range(len(store))]


def rewrite(folder: Path, change: Any) -> None:
    """Write the one shard anew with other tensors and checksums that are right."""
    (path,) = sorted(folder.glob("shard-*"))
    header = read_header(path)
    info = ShardInfo(header.file, header.first_example, header.num_examples, header.num_tokens)
    shard = MappedShard(path, info, header.fingerprint, True)
    tensors = {name: shard.tensor(name).clone() for name in header.tensors}
    change(tensors)
    commit_shard(folder, header, list(tensors.items()))


def test_wrong_positions_are_named(tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    extract(tiny, texts, tmp_path / "acts", keep=0.5)
    rewrite(tmp_path / "acts", lambda tensors: tensors["positions"].add_(1))
    assert "says that it keeps all tokens, 0.5 of them" in str(verify(tmp_path / "acts"))
    report = audit(tmp_path / "acts", tiny, num_examples=100)
    assert {problem.site for problem in report.problems} == {"positions"} and not report.ok
    rewrite(tmp_path / "acts", lambda tensors: tensors["positions"].sub_(100))
    assert "positions do not rise in each example" in str(verify(tmp_path / "acts"))
    rewrite(tmp_path / "acts", lambda tensors: tensors.pop("positions"))
    with pytest.raises(FormatError, match=r"has no 'positions'; store\.json says otherwise"):
        layerprobe.open(tmp_path / "acts").example(0)
