"""How close does a run come to the floor: the forward alone, the copies alone, the disk alone, and the whole?

Nothing can be faster than the slowest of the three: the forward over the same batches, copying and casting the values
of the asked sites once, and writing their bytes to disk, flushed. Each is measured in turn with the whole run, for one
site and for all, as rows and pooled, in float32 and in float16. Where the rest of the time goes comes from clocks
around the parts of one further run.

    python benchmarks/floor.py [--quick] [--save] [--texts 2000] [--rounds 3]
"""

import itertools
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from corpora import list_batches, list_docstrings, list_paragraphs, shuffle
from harness import Rival, emit, interleave, make_parser
from torch import Tensor

import layerprobe as lp
from layerprobe.capture.packing import StoreSink
from layerprobe.extract import engine as engine_module
from layerprobe.extract import run as run_module
from layerprobe.extract.batching import Batch
from layerprobe.models import LoadedModel
from layerprobe.store.durable import commit_file
from layerprobe.store.writer import ShardWriter
from layerprobe.tables import format_table

SITE_SETS = {
    "last": ["layers.-1"],
    "all": ["embeddings", "layers.*"],
    "all + ffn.act": ["embeddings", "layers.*", "layers.*.ffn.act"],
}


def main() -> None:
    parser = make_parser("How close a run comes to the floor.")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    num_texts, rounds = (48, 1) if options.quick else (options.texts, options.rounds)
    demo = lp.load_model("demo", "cpu")
    texts = shuffle([*list_docstrings(), *list_paragraphs(demo.tokenizer)])[:num_texts]
    results = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        regimes = itertools.product(SITE_SETS, (None, "mean"), ("float32", "float16"))
        for number, (set_name, pool, dtype) in enumerate(regimes):
            if pool is not None and set_name != "all":
                continue
            print(f"{set_name}, pool {pool}, {dtype}", flush=True)
            place = Path(folder) / str(number)
            results.append(run_regime(demo, texts, set_name, pool, dtype, place, rounds))
            shutil.rmtree(place)
    headers = ("sites", "pool", "dtype", "forward s", "copy s", "disk s", "whole s", "floor", "ratio", "cpu ratio")
    names = ("sites", "pool", "dtype", "forward_s", "copy_s", "disk_s", "whole_s", "floor", "ratio", "cpu_ratio")
    print(format_table(headers, [tuple(found[name] for name in names) for found in results]))
    parts = list(results[0]["parts_s"])
    rows = [(found["sites"], found["pool"], found["dtype"], *found["parts_s"].values()) for found in results]
    print(format_table(("sites", "pool", "dtype", *parts), rows))
    emit("floor", {"texts": num_texts, "rounds": rounds}, results, save=options.save)


def run_regime(
    demo: LoadedModel, texts: list[str], set_name: str, pool: str | None, dtype: str, folder: Path, rounds: int
) -> dict[str, Any]:
    """Time the three bounds and the whole in turns, then the parts of one more run."""
    folder.mkdir()
    batches, num_tokens, _ = list_batches(demo, texts, folder / "plan")
    whole = partial(run_whole, demo, texts, SITE_SETS[set_name], pool, dtype, folder / "acts")
    whole()
    shards = sorted((folder / "acts").glob("shard-*"))
    sizes = [path.stat().st_size for path in shards]
    rivals = {
        "forward": Rival(lambda _: run_forward(demo, batches)),
        "copy": Rival(lambda _: copy_values(demo, batches, SITE_SETS[set_name], dtype)),
        "disk": Rival(lambda _: write_bytes(folder / "disk", sizes)),
        "whole": Rival(lambda _: whole()),
    }
    timings = interleave(rivals, seconds=0.0, least_rounds=rounds, most_rounds=rounds, warm_rounds=0)
    found = {way: timing.summary(timings["forward"]) for way, timing in timings.items()}
    seconds = {way: round(found[way]["wall_ms"] / 1e3, 3) for way in rivals}
    floor = max(("forward", "copy", "disk"), key=lambda way: seconds[way])
    against = timings["whole"].summary(timings[floor])
    with clocks() as parts:
        whole()
    return {
        "sites": set_name,
        "pool": pool,
        "dtype": dtype,
        "tokens": num_tokens,
        "computed": sum(batch.input_ids.numel() for batch in batches),
        "bytes": sum(sizes),
        **{f"{way}_s": seconds[way] for way in rivals},
        "floor": floor,
        "ratio": against["wall_ratio"],
        "cpu_ratio": against["cpu_ratio"],
        "parts_s": {name: round(took, 3) for name, took in parts.items()},
    }


def run_whole(
    demo: LoadedModel, texts: list[str], sites: list[str], pool: str | None, dtype: str, folder: Path
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lp.extract(demo.model, texts, folder, sites=sites, pool=pool, dtype=dtype, tokenizer=demo.tokenizer, progress=False)


def run_forward(demo: LoadedModel, batches: list[Batch]) -> None:
    for batch in batches:
        demo.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)


def copy_values(demo: LoadedModel, batches: list[Batch], sites: list[str], dtype: str) -> None:
    """Read and cast as many values as the run does, out of tensors of the size of a batch."""
    widths = [site.width for site in lp.sites(demo.model, sites)]
    largest = max(batch.input_ids.numel() for batch in batches)
    source = torch.ones(largest, max(width or 0 for width in widths))
    target = torch.empty_like(source, dtype=getattr(torch, dtype))
    for batch in batches:
        count = sum(batch.lengths)
        for width in widths:
            out: Tensor = target.view(-1)[: count * (width or 0)]
            out.copy_(source.view(-1)[: count * (width or 0)])


def write_bytes(folder: Path, sizes: list[int]) -> None:
    """Write as many bytes in as many files, each flushed and renamed as a shard is."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    block = memoryview(bytearray(max(sizes)))
    for number, size in enumerate(sizes):
        commit_file(folder / str(number), [block[:size]])


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Put clocks around the parts of a run that are not the forward."""
    parts: tuple[str, ...] = ("plan", "tokenise", "hooks", "wait for a buffer", "last flush", "writer thread")
    taken: dict[str, float] = dict.fromkeys(parts, 0.0)
    originals: list[tuple[Any, str, Any]] = []

    def watch(owner: Any, attribute: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken[part] += time.perf_counter() - start

        originals.append((owner, attribute, function))
        setattr(owner, attribute, timed)

    watch(run_module, "plan_extraction", "plan")
    watch(engine_module, "tokenize", "tokenise")
    watch(StoreSink, "receive", "hooks")
    watch(StoreSink, "begin_unit", "wait for a buffer")
    watch(ShardWriter, "close", "last flush")
    watch(ShardWriter, "_write", "writer thread")
    assert threading.current_thread() is threading.main_thread()
    try:
        yield taken
    finally:
        for owner, attribute, function in originals:
            setattr(owner, attribute, function)


if __name__ == "__main__":
    main()
