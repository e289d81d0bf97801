"""What does reading a store cost? An example of a layer, rows in order and shuffled, from the page cache and from disk.

Compared with other ways to read the same bytes: a numpy map of each shard with known offsets, safetensors' own
`safe_open`, and, from disk, `pread` and `readinto`. Every value read is touched. For the cold cases the shard's pages
are first dropped from the page cache.

    python benchmarks/reading.py [--quick | --save] [--seconds 60]
"""

import gc
import json
import mmap
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import Rival, emit, interleave, make_parser
from safetensors import safe_open

import layerprobe as lp
from layerprobe.store.description import commit_description
from layerprobe.store.format import commit_shard
from layerprobe.store.headers import ShardHeader
from layerprobe.store.index import commit_index
from layerprobe.store.reader import Store
from layerprobe.tables import format_table

_SITES = [f"layers.{number}" for number in range(7)]
_SITE = _SITES[3]
_WIDTH = 384
_LENGTH = 128
_ROW_BYTES = 2 * _WIDTH
_BATCH = 4096
_COLD_SHARDS = 4


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for the rounds of all cases together")
    options = parser.parse_args()
    num_shards, examples = (2, 8) if options.quick else (16, 64)
    seconds, least_rounds = (0.0, 1) if options.quick else (options.seconds, 3)
    torch.manual_seed(0)
    results = []
    with tempfile.TemporaryDirectory() as place:
        folder, cold = Path(place) / "warm", Path(place) / "cold"
        for made, count in ((folder, num_shards), (cold, _COLD_SHARDS)):
            made.mkdir()
            make_store(made, count, examples)
        store = lp.open(folder)
        maps = [RawShard(folder / f"shard-{number:06d}.safetensors") for number in range(num_shards)]
        cases = {**list_warm_cases(store, maps, examples), **list_cold_cases(cold, examples)}
        for case, rivals in cases.items():
            timings = interleave(rivals, seconds=seconds / len(cases), least_rounds=least_rounds, most_rounds=400)
            base = next(iter(timings.values()))
            for rival, timing in timings.items():
                summary = timing.summary(base)
                per_call_us = 1e6 * statistics.median(timing.wall_s)
                results.append(
                    {
                        "case": case,
                        "rival": rival,
                        "rounds": len(timing.wall_s),
                        "us": round(per_call_us, 2),
                        "ratio": summary["wall_ratio"],
                        "gb_per_s": round(SIZES[case](store) / 1e3 / per_call_us, 3),
                    }
                )
    headers = ("case", "rival", "rounds", "us", "ratio", "GB/s")
    print(format_table(headers, [tuple(result.values()) for result in results]))
    settings = {"shards": num_shards, "examples": num_shards * examples, "tokens_each": _LENGTH, "sites": len(_SITES)}
    emit("reading", {**settings, "width": _WIDTH, "dtype": "float16", "batch_size": _BATCH}, results, save=options.save)


def make_store(folder: Path, num_shards: int, examples: int) -> None:
    """Write a store of random float16 rows, `_LENGTH` tokens per example, examples in order."""
    sites = {site: {"kind": "token", "dtype": "float16", "width": _WIDTH} for site in _SITES}
    commit_description(folder, {"sites": sites, "fingerprint": "0" * 32, "pool": None})
    headers = []
    for unit in range(num_shards):
        num_rows = examples * _LENGTH
        first = unit * examples
        tensors = [
            ("example", torch.arange(first, first + examples)),
            ("offsets", torch.arange(examples + 1) * _LENGTH),
            ("input_ids", torch.zeros(num_rows, dtype=torch.int64)),
            *((site, torch.randn(num_rows, _WIDTH).half()) for site in _SITES),
        ]
        headers.append(ShardHeader(unit, examples, num_rows, first, "0" * 32))
        commit_shard(folder, headers[-1], tensors)
    commit_index(folder, headers)


class RawShard:
    """A shard mapped by numpy, with the offset of each tensor known in advance."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            self.map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.begin = {name: 8 + length + said["data_offsets"][0] for name, said in header.items() if "dtype" in said}
        self.num_rows = header[_SITE]["shape"][0]

    def rows(self, site: str, first: int = 0, count: int = 0) -> np.ndarray:
        """View rows of a site, `[count, D]`; all of them if `count` is 0."""
        count = count or self.num_rows
        start = self.begin[site] + first * _ROW_BYTES
        return np.frombuffer(self.map, np.float16, count * _WIDTH, start).reshape(count, _WIDTH)


def forget(path: Path) -> None:
    """Drop the unmapped pages of a file from the page cache, so that the next read is from disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read_batches(store: Store, sites: Sequence[str], shuffle: bool) -> None:
    """Read every row of a store, batch by batch."""
    for batch in store.rows(_BATCH, shuffle, sites=sites):
        for values in batch.values():
            touch(np.asarray(values))


def read_in_order(maps: Sequence[RawShard], sites: Sequence[str]) -> None:
    """Read the same rows in shard order, copied batch by batch."""
    for shard in maps:
        for first in range(0, shard.num_rows, _BATCH):
            for site in sites:
                touch(np.array(shard.rows(site, first, min(_BATCH, shard.num_rows - first))))


def gather(maps: Sequence[RawShard], sites: Sequence[str]) -> None:
    """Gather rows of the whole store in random order, with known offsets: what a map alone would do."""
    num_rows = maps[0].num_rows
    places = np.random.default_rng(0).permutation(len(maps) * num_rows)
    for first in range(0, len(places), _BATCH):
        shards, rows = np.divmod(places[first : first + _BATCH], num_rows)
        for site in sites:
            batch = np.empty((len(rows), _WIDTH), np.float16)
            for number, shard in enumerate(maps):
                of_shard = shards == number
                batch[of_shard] = shard.rows(site)[rows[of_shard]]
            touch(batch)


def list_warm_cases(store: Store, maps: Sequence[RawShard], examples: int) -> dict[str, dict[str, Rival]]:
    """List the cases read from the page cache; the first rival of each is the raw one."""
    order = random.Random(0).choices(range(len(store)), k=500)
    opened = [safe_open(shard.path, framework="pt") for shard in maps]

    def raw_example(sites: Sequence[str]) -> None:
        for index in order:
            for site in sites:
                maps[index // examples].rows(site, index % examples * _LENGTH, _LENGTH)

    def own_site() -> None:
        view = store[_SITE]
        for index in order:
            view[index]

    def own_example() -> None:
        for index in order:
            example = store.example(index)
            for site in _SITES:
                example[site]

    def stock_example() -> None:
        for index in order:
            first = index % examples * _LENGTH
            opened[index // examples].get_slice(_SITE)[first : first + _LENGTH]

    count = len(order)
    return {
        "random example, one layer": {
            "numpy map": Rival(lambda _: raw_example([_SITE]), count),
            "store[site][i]": Rival(lambda _: own_site(), count),
            "safe_open": Rival(lambda _: stock_example(), count),
        },
        "random example, all layers": {
            "numpy map": Rival(lambda _: raw_example(_SITES), count),
            "store.example(i)": Rival(lambda _: own_example(), count),
        },
        "rows in order, one layer": {
            "numpy map": Rival(lambda _: read_in_order(maps, [_SITE])),
            "rows()": Rival(lambda _: read_batches(store, [_SITE], False)),
        },
        "rows shuffled, one layer": {
            "numpy map": Rival(lambda _: gather(maps, [_SITE])),
            "rows(shuffle=True)": Rival(lambda _: read_batches(store, [_SITE], True)),
        },
        "rows shuffled, all layers": {
            "numpy map": Rival(lambda _: gather(maps, _SITES)),
            "rows(shuffle=True)": Rival(lambda _: read_batches(store, _SITES, True)),
        },
    }


def list_cold_cases(folder: Path, examples: int) -> dict[str, dict[str, Rival]]:
    """List the cases read from disk, from a store that nothing else has mapped.

    Opened without checksums, because verifying a tensor on first access reads all of it.
    """
    paths = sorted(folder.glob("*.safetensors"))
    numbers = random.Random(1)

    def open_cold() -> tuple[int, Store, RawShard]:
        """Map a shard anew with only its header in memory."""
        index = numbers.randrange(examples * len(paths))
        path = paths[index // examples]
        store, raw = lp.open(folder, check=False), RawShard(path)
        store.input_ids(index)
        forget(path)
        return index, store, raw

    def open_all_cold() -> tuple[Store, list[RawShard]]:
        """Map every shard anew with only the headers in memory."""
        gc.collect()  # maps left from the last round would keep their pages in memory
        store, raw = lp.open(folder, check=False), [RawShard(path) for path in paths]
        for first in range(0, examples * len(paths), examples):
            store.input_ids(first)
        for path in paths:
            forget(path)
        return store, raw

    def by_map(opened: tuple[int, Store, RawShard]) -> None:
        index, _, raw = opened
        touch(raw.rows(_SITE, index % examples * _LENGTH, _LENGTH))

    def by_store(opened: tuple[int, Store, RawShard]) -> None:
        index, store, _ = opened
        touch(np.asarray(store[_SITE][index]))

    def by_pread(opened: tuple[int, Store, RawShard]) -> None:
        index, _, raw = opened
        with raw.path.open("rb", buffering=0) as file:
            start = raw.begin[_SITE] + index % examples * _LENGTH * _ROW_BYTES
            touch(np.frombuffer(os.pread(file.fileno(), _LENGTH * _ROW_BYTES, start), np.float16))

    def whole_by_map(opened: tuple[int, Store, RawShard]) -> None:
        touch(np.frombuffer(opened[2].map, np.uint8))

    def whole_by_store(opened: tuple[int, Store, RawShard]) -> None:
        index, store, _ = opened
        first = index // examples * examples
        for number in range(first, first + examples):
            example = store.example(number)
            for site in _SITES:
                touch(np.asarray(example[site]))

    def whole_by_readinto(opened: tuple[int, Store, RawShard]) -> None:
        path = opened[2].path
        whole = np.empty(path.stat().st_size, np.uint8)
        with path.open("rb", buffering=0) as file:
            done = 0
            while done < len(whole):
                done += file.readinto(whole.data[done:])
        touch(whole)

    return {
        "random example, one layer, cold": {
            "numpy map": Rival(by_map, 1, open_cold),
            "store[site][i]": Rival(by_store, 1, open_cold),
            "pread": Rival(by_pread, 1, open_cold),
        },
        "rows in order, one layer, cold": {
            "numpy map": Rival(lambda opened: read_in_order(opened[1], [_SITE]), 1, open_all_cold),
            "rows()": Rival(lambda opened: read_batches(opened[0], [_SITE], False), 1, open_all_cold),
        },
        "rows shuffled, one layer, cold": {
            "numpy map": Rival(lambda opened: gather(opened[1], [_SITE]), 1, open_all_cold),
            "rows(shuffle=True)": Rival(lambda opened: read_batches(opened[0], [_SITE], True), 1, open_all_cold),
        },
        "a whole shard, cold": {
            "numpy map": Rival(whole_by_map, 1, open_cold),
            "store.example(i) of each": Rival(whole_by_store, 1, open_cold),
            "readinto": Rival(whole_by_readinto, 1, open_cold),
        },
    }


def touch(values: np.ndarray) -> None:
    """Read every byte, at memory speed."""
    raw = values.reshape(-1).view(np.uint8)
    raw[: len(raw) // 8 * 8].view(np.uint64).max()


def _one_site(store: Store, rows: int | None = None) -> int:
    return _ROW_BYTES * (store.num_tokens if rows is None else rows)


# Bytes that a call reads.
SIZES: dict[str, Callable[[Store], int]] = {
    "random example, one layer": partial(_one_site, rows=_LENGTH),
    "random example, all layers": partial(_one_site, rows=_LENGTH * len(_SITES)),
    "rows in order, one layer": _one_site,
    "rows shuffled, one layer": _one_site,
    "rows shuffled, all layers": lambda store: len(_SITES) * _one_site(store),
    "random example, one layer, cold": partial(_one_site, rows=_LENGTH),
    "rows in order, one layer, cold": lambda store: _COLD_SHARDS * _one_site(store) // len(list(store.iter_shards())),
    "rows shuffled, one layer, cold": lambda store: _COLD_SHARDS * _one_site(store) // len(list(store.iter_shards())),
    "a whole shard, cold": lambda store: len(_SITES) * _one_site(store) // len(list(store.iter_shards())),
}


if __name__ == "__main__":
    main()
