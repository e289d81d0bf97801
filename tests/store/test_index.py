"""The index: what it says of shards, and what is believed of it."""

import json
from pathlib import Path

import pytest
import xxhash

from layerprobe.errors import FormatError
from layerprobe.store.headers import ShardHeader
from layerprobe.store.index import ShardInfo, check_index, commit_index, parse_index


def test_the_index_sums_what_the_headers_say_in_the_order_of_units(tmp_path: Path) -> None:
    headers = [
        ShardHeader(1, 2, 7, 3, "f", 1, {"layers.0": 2}),
        ShardHeader(0, 3, 5, 0, "f", 0, {"layers.0": 1, "layers.1": 4}),
    ]
    (tmp_path / "store.json").write_bytes(b"{}")
    commit_index(tmp_path, headers)
    index = json.loads((tmp_path / "index.json").read_text())
    assert (index["examples"], index["tokens"], index["truncated"]) == (5, 12, 1)
    assert index["store_checksum"] == xxhash.xxh3_64_hexdigest(b"{}")
    assert index["nonfinite"] == {"layers.0": 3, "layers.1": 4}
    assert [shard["file"] for shard in index["shards"]] == ["shard-000000.safetensors", "shard-000001.safetensors"]
    assert [shard["first_example"] for shard in index["shards"]] == [0, 3]


def test_an_index_without_gaps_and_with_true_sums_is_taken_in_any_order() -> None:
    shards = [ShardInfo("b", 2, 1, 5), ShardInfo("a", 0, 2, 4)]
    check_index("index.json", {"examples": 3, "tokens": 9}, shards)
    check_index("index.json", {"examples": 0, "tokens": 0}, [])


@pytest.mark.parametrize(
    ("examples", "tokens", "firsts", "message"),
    [
        (3, 9, (0, 3), "no shard has example 2"),
        (3, 9, (1, 3), "no shard has example 0"),
        (3, 9, (0, 1), "no shard has example 2"),
        (4, 9, (0, 2), "its shards do not add up to the counts that it says"),
        (3, 8, (0, 2), "its shards do not add up to the counts that it says"),
    ],
)
def test_an_index_with_a_gap_or_wrong_sums_is_refused(
    examples: int, tokens: int, firsts: tuple[int, int], message: str
) -> None:
    shards = [ShardInfo("a", firsts[0], 2, 4), ShardInfo("b", firsts[1], 1, 5)]
    with pytest.raises(FormatError, match=rf"index\.json: is damaged: {message}"):
        check_index("index.json", {"examples": examples, "tokens": tokens}, shards)


def test_an_index_of_a_trillion_pooled_tokens_is_read() -> None:
    # 50 billion texts of 20 tokens, as docs/performance.md has them, in fewer shards than there may be
    counts = {"examples": 100_000, "tokens": 2_000_000}
    shards = [
        {"file": f"shard-{unit:06d}.safetensors", "first_example": unit * 100_000, **counts} for unit in range(500_000)
    ]
    index = {"examples": 50 * 10**9, "tokens": 10**12, "shards": shards}
    assert len(parse_index("index.json", index)) == 500_000
    for shard in shards:
        shard["tokens"] *= 100
    with pytest.raises(FormatError, match="claims more than 17,592,186,044,416 rows"):
        parse_index("index.json", {**index, "tokens": 10**14})
