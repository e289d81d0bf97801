"""How close does a run come to the floor: the forward alone, the copies alone, the disk alone, and the whole?

Nothing can be faster than the slowest of three: the forward pass over the run's own batches, copying and casting the
values of the sites once, and writing their bytes to disk as shards are written, flushed. Two more times are shown for
comparison and are no bounds: a plain write, and the forward pass over padded batches as `padding_free=False` cuts
them, which is how a model is usually called. Measured for one site and for more, as rows and pooled, in float32 and in
float16; and for runs that end at a layer, against the run of the last layer. On a GPU the transfer of the bytes to
page-locked memory takes the place of the copies, and one more run under torch's profiler tells how long its kernels
were busy.

The forward pass is timed within the run: a bare model of the same weights is called with each batch, alternately before
and after the run's own call, since a shared machine changes within minutes. Its time is subtracted from the whole. The
threads of the run, which tokenise and write, work in parallel with both models; so a second ratio adds all of their CPU
time to the whole, which already contains a part of it. The truth lies between the two. A run without clocks and
without the bare model, in turns with the others, has no such doubt: the plain whole, over the floor of the same round,
whose forward pass was timed some seconds before or after.

Clocks around the parts of each run show where its time goes. A part excludes the time of other parts within it, so that
those of the main thread add up to the whole. Work in other threads is listed after them.

All 2,000 docstrings are tokenised before the forward pass begins. `--corpus paragraphs` takes more and shorter texts,
so that most are tokenised in parallel with it.

    python benchmarks/floor.py [--quick | --save] [--texts 2000] [--seconds 480] [--corpus paragraphs]
    python benchmarks/floor.py --device cuda --model bert-base --precision bf16 --save
"""

import copy
import itertools
import mmap
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clocks import BESIDE, MAIN, TWIN, Clocks
from corpora import choose_quick, cut_plan, list_batches, list_docstrings, list_paragraphs, make_caller
from harness import Rival, Timings, emit, interleave, make_parser
from subjects import Subject, add_subject_options, copy_to_host, find_busy_s, prepare_copies, read_subject
from torch import Tensor, nn

import layerprobe as lp
from layerprobe.extract.batching import Batch, FlatBatch
from layerprobe.extract.flat import attending_flat
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.plan import plan_extraction
from layerprobe.models import LoadedModel
from layerprobe.store.durable import commit_file
from layerprobe.tables import format_table

SITE_SETS = {
    "last": ["layers.-1"],
    "all": ["embeddings", "layers.*"],
    "all + ffn.act": ["embeddings", "layers.*", "layers.*.ffn.act"],
}
# default number of texts per corpus
CORPORA = {"docstrings": 2000, "paragraphs": 8000}
ROWS_OF_LAST = "last, rows, float16"


class Regime:
    """One way to run over the texts, with its sites, pool and dtype; keeps clocks and sizes of its runs."""

    def __init__(
        self,
        name: str,
        demo: LoadedModel,
        twin: nn.Module,
        texts: list[str],
        folder: Path,
        subject: Subject,
        **options: Any,
    ) -> None:
        self.name = name
        self.options = {**options, "precision": subject.precision}
        self.subject = subject
        self.clocks: list[dict[str, float]] = []
        self.sizes: list[int] = []
        self.busy_s: float | None = None
        asked = ExtractOptions(**self.options)
        self.batches = list(cut_plan(plan_extraction(demo.model, texts, folder, asked, tokenizer=demo.tokenizer)))
        self.padded, self.num_tokens, _ = list_batches(demo, texts, folder, asked)
        self._call_twin = make_caller(twin)
        self._twin = twin
        self._demo = demo
        self._texts = texts
        self._folder = folder

    @property
    def num_computed(self) -> int:
        """Number of tokens that go through the model, padding included."""
        return sum(batch.input_ids.numel() for batch in self.batches)

    @property
    def widths(self) -> list[int]:
        """Width of each of its sites."""
        return [site.width or 0 for site in lp.sites(self._demo.model, self.options["sites"])]

    def run(self, _: object = None) -> None:
        """Run the whole job with clocks, and with the bare model called alongside."""
        with Clocks(self._call_twin) as taken:
            self.run_plainly()
        self.clocks.append(taken)

    def run_plainly(self, _: object = None) -> None:
        """Run the whole job and nothing else."""
        lp.extract(
            self._demo.model,
            self._texts,
            self._folder,
            tokenizer=self._demo.tokenizer,
            progress=False,
            **self.options,
        )

    def run_padded(self, _: object = None) -> None:
        """Call the bare model on padded batches of the texts, as a run with padding would cut them."""
        with self.subject.running(self._twin):
            for batch in self.padded:
                self._call_twin(batch)

    def watch_gpu(self) -> None:
        """Run the whole job once more, and record how long the GPU's kernels were busy."""
        with torch.profiler.profile() as profile:
            self.run_plainly()
        self.end()
        self.busy_s = find_busy_s(
            [
                (event.time_range.start, event.time_range.end)
                for event in profile.events() or ()
                if event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset"))
            ]
        )

    def end(self, _: object = None) -> None:
        """Record the sizes of the run's shards, and remove them."""
        self.sizes = [path.stat().st_size for path in sorted(self._folder.glob("shard-*"))]
        shutil.rmtree(self._folder)

    def middle(self, of: Callable[[dict[str, float]], float]) -> float:
        """Return the median over the runs of a value computed from one run's clocks."""
        return statistics.median(map(of, self.clocks))


def main() -> None:
    parser = make_parser("How close a run comes to the floor.")
    parser.add_argument("--corpus", choices=tuple(CORPORA), default="docstrings")
    parser.add_argument("--texts", type=int, help=", ".join(f"{count} {name}" for name, count in CORPORA.items()))
    parser.add_argument("--regime", help="only regimes whose name begins so, and no early ends")
    parser.add_argument("--seconds", type=float, default=480.0, help="begin no further round after; at least one")
    add_subject_options(parser)
    options = parser.parse_args()
    if options.regime and options.save:
        parser.error(f"--regime {options.regime!r} with --save: the results are of every regime. Leave out one.")
    subject = read_subject(options)
    seconds = 0.0 if options.quick else options.seconds
    demo = subject.load()
    twin = copy.deepcopy(demo.model)
    texts = list_texts(options.corpus, demo.tokenizer, options.texts, options.quick)
    with tempfile.TemporaryDirectory() as place, torch.inference_mode(), attending_flat(twin):
        folder = Path(place)
        regimes = {
            name: Regime(name, demo, twin, texts, folder / "acts", subject, **how)
            for name, how in list_regimes(options.quick).items()
            if name.startswith(options.regime or "")
        }
        layers = len(lp.sites(demo.model, "layers.*"))
        for layer in range(0, 0 if options.regime else 1 if options.quick else layers, 2):
            name, how = f"stop at layer {layer}", {"sites": [f"layers.{layer}"], "dtype": "float16"}
            regimes[name] = Regime(name, demo, twin, texts, folder / "acts", subject, **how)
        warm = {"sites": SITE_SETS["all"], "dtype": "float16"}
        Regime("warm", demo, twin, texts[:8], folder / "warm", subject, **warm).run()
        rivals = list_rivals(regimes, folder)
        timings = interleave(rivals, seconds=seconds, least_rounds=1, warm_rounds=0)
        for regime in regimes.values() if subject.is_on_cuda else ():
            regime.watch_gpu()
    results = [lay_out(regime, timings) for name, regime in regimes.items() if not name.startswith("stop")]
    last = regimes.get(ROWS_OF_LAST) or next(iter(regimes.values()))
    stops = [
        lay_out_stop(regimes[name], last, layer, layers)
        for layer in range(layers)
        if (name := f"stop at layer {layer}") in regimes
    ]
    print_tables(results, stops)
    settings = {"texts": len(texts), "tokens": last.num_tokens, "rounds": len(last.clocks), "seconds": seconds}
    settings |= {"corpus": options.corpus, **subject.settings}
    name = subject.name_results("floor" if options.corpus == "docstrings" else f"floor-{options.corpus}")
    emit(name, settings, {"regimes": results, "stops": stops}, save=options.save)


def list_texts(corpus: str, tokenizer: Any, count: int | None, is_quick: bool) -> list[str]:
    """Choose texts from all over a corpus.

    Args:
        count: Number of texts; None for the default.
        is_quick: Whether to choose few and short ones, whatever the count.
    """
    found = list_docstrings() if corpus == "docstrings" else list_paragraphs(tokenizer)
    count = CORPORA[corpus] if count is None else count
    if is_quick:
        return choose_quick(found)
    return found[:: max(1, len(found) // count)][:count]


def list_regimes(is_quick: bool) -> dict[str, dict[str, Any]]:
    """Name every way to run, or a few of them: its sites, its pool, and the stored dtype."""
    # every fifth way still covers each set of sites
    ways = list(itertools.product(SITE_SETS, (None, "mean"), ("float32", "float16")))[:: 5 if is_quick else 1]
    return {
        f"{sites}, {pool or 'rows'}, {dtype}": {"sites": SITE_SETS[sites], "pool": pool, "dtype": dtype}
        for sites, pool, dtype in ways
    }


def list_rivals(regimes: dict[str, Regime], folder: Path) -> dict[str, Rival]:
    """List for each regime the whole, which sets the sizes, the plain whole, the copies and both ways to write."""
    rivals: dict[str, Rival] = {}
    for name, regime in regimes.items():
        rivals[f"{name} whole"] = Rival(regime.run, finish=regime.end)
        if name.startswith("stop"):
            continue
        rivals[f"{name} plain whole"] = Rival(regime.run_plainly, finish=regime.end)
        rivals[f"{name} padded forward"] = Rival(regime.run_padded)
        rivals[f"{name} {way_to_host(regime)}"] = list_copies(regime)
        for way, write in (("disk", commit_file), ("plain disk", write_plainly)):
            rivals[f"{name} {way}"] = Rival(
                partial(write_files, write),
                prepare=partial(prepare_files, regime, folder / "disk"),
                finish=lambda prepared: shutil.rmtree(prepared[0]),
            )
    return rivals


def way_to_host(regime: Regime) -> str:
    """Name the bound for moving rows into host memory."""
    return "bus" if regime.subject.is_on_cuda else "copy"


def list_copies(regime: Regime) -> Rival:
    """Make the rival that only moves the rows into host memory: over a GPU's bus, or by copies on the CPU."""
    if regime.subject.is_on_cuda:
        return Rival(
            lambda prepared: copy_to_host(regime.sizes, prepared),
            prepare=lambda: prepare_copies(regime.sizes, regime.subject.device),
        )
    is_pooled, dtype = regime.options["pool"] is not None, regime.options["dtype"]
    return Rival(partial(copy_values, regime.batches, regime.widths, dtype, is_pooled))


def copy_values(
    batches: list[Batch | FlatBatch], widths: list[int], dtype: str, is_pooled: bool, _: object = None
) -> None:
    """Read and cast as many values as the run does, from tensors of a batch's size; sum pooled ones."""
    largest = max(sum(batch.lengths) for batch in batches)
    source = torch.ones(largest * max(widths))
    target = torch.empty_like(source, dtype=getattr(torch, dtype))
    for batch in batches:
        count = sum(batch.lengths)
        for width in widths:
            rows: Tensor = source[: count * width].view(count, width)
            if is_pooled:
                rows = rows.sum(0, keepdim=True).expand(len(batch.members), width)
            target[: rows.numel()].view(rows.shape).copy_(rows)


def prepare_files(regime: Regime, folder: Path) -> tuple[Path, list[memoryview]]:
    """Make the bytes of as many files as the run wrote, touched once, and a folder for them.

    The memory is page-aligned, so that it can be written directly, like the run's own buffers.
    """
    folder.mkdir()
    block = memoryview(mmap.mmap(-1, max(regime.sizes)))
    np.frombuffer(block, np.uint8)[:] = ord("x")
    return folder, [block[:size] for size in regime.sizes]


def write_files(write: Any, prepared: tuple[Path, list[memoryview]]) -> None:
    folder, pieces = prepared
    for number, piece in enumerate(pieces):
        write(folder / str(number), [piece])


def write_plainly(path: Path, pieces: list[memoryview]) -> None:
    """Write a file through the page cache and flush it."""
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            while len(piece):
                piece = piece[file.write(piece) or 0 :]
        os.fsync(file.fileno())


def lay_out(regime: Regime, timings: dict[str, Timings]) -> dict[str, Any]:
    """Return the medians of a regime, its ratio to the slowest of its bounds, and where its time went."""
    to_host = way_to_host(regime)
    seconds = {
        "forward": regime.middle(itemgetter(TWIN)),
        **{
            way: statistics.median(timings[f"{regime.name} {way}"].wall_s)
            for way in (to_host, "disk", "plain disk", "padded forward", "plain whole")
        },
        "whole": regime.middle(whole_of),
    }
    floor = max(("forward", to_host, "disk"), key=lambda way: seconds[way])
    plain = timings[f"{regime.name} plain whole"].wall_s
    plain_ratios = [
        took / (clocks[TWIN] if floor == "forward" else seconds[floor])
        for took, clocks in zip(plain, regime.clocks, strict=True)
    ]

    def over_floor(clocks: dict[str, float], extra: float = 0.0) -> float:
        return (whole_of(clocks) + extra) / (clocks[TWIN] if floor == "forward" else seconds[floor])

    num_bytes = sum(regime.sizes)
    return {
        "regime": regime.name,
        "bytes": num_bytes,
        "batches": len(regime.batches),
        "padding": round(sum(batch.num_padding for batch in regime.batches) / regime.num_computed, 4),
        **{f"{way.replace(' ', '_')}_s": round(took, 3) for way, took in seconds.items()},
        "disk_gb_per_s": round(num_bytes / 1e9 / seconds["disk"], 3),
        "plain_disk_gb_per_s": round(num_bytes / 1e9 / seconds["plain disk"], 3),
        **({"bus_gb_per_s": round(num_bytes / 1e9 / seconds["bus"], 3)} if to_host == "bus" else {}),
        **({"busy_share": round(regime.busy_s / seconds["plain whole"], 3)} if regime.busy_s is not None else {}),
        "floor": floor,
        "over_padded": round(seconds["whole"] / seconds["padded forward"], 3),
        "ratio": round(regime.middle(over_floor), 3),
        "plain_ratio": round(statistics.median(plain_ratios), 3),
        "most_ratio": round(regime.middle(lambda one: over_floor(one, sum(one[part] for part in BESIDE))), 3),
        "parts_s": {part: round(regime.middle(itemgetter(part)), 3) for part in (*MAIN, *BESIDE)},
    }


def whole_of(clocks: dict[str, float]) -> float:
    """Return the time of a run, without the bare model's forward pass."""
    return sum(clocks[part] for part in MAIN)


def lay_out_stop(regime: Regime, last: Regime, layer: int, layers: int) -> dict[str, Any]:
    """Compare a run that ends at a layer with the run of the last layer, each relative to the full forward pass."""
    share, whole = (one.middle(lambda clocks: whole_of(clocks) / clocks[TWIN]) for one in (regime, last))
    most = round((layer + 1) / layers + 0.05, 3)
    return {"layer": layer, "layers": layers, "ratio": round(share / whole, 3), "most": most}


def print_tables(results: list[dict[str, Any]], stops: list[dict[str, Any]]) -> None:
    """Print the bounds, the parts and the early ends."""
    names = (
        "regime",
        "batches",
        "padding",
        "padded_forward_s",
        "forward_s",
        "copy_s",
        "bus_s",
        "bus_gb_per_s",
        "disk_s",
        "plain_disk_s",
        "whole_s",
        "plain_whole_s",
        "floor",
        "ratio",
        "most_ratio",
        "plain_ratio",
        "over_padded",
        "busy_share",
    )
    names = tuple(name for name in names if name in results[0])
    print(format_table(tuple(map(_name, names)), [tuple(found[name] for name in names) for found in results]))
    print("\nwhere the time of a run goes, in seconds; from tokenise on beside the others:")
    parts = (*MAIN, *BESIDE)
    print(format_table(("regime", *parts), [(found["regime"], *found["parts_s"].values()) for found in results]))
    print("\na run that ends at a layer, against the last layer's:")
    print(format_table(("layer", "layers", "ratio", "at most"), [tuple(stop.values()) for stop in stops]))


def _name(column: str) -> str:
    return column.removesuffix("_s").replace("_", " ") + (" s" if column.endswith("_s") else "")


if __name__ == "__main__":
    main()
