"""Format the tables of docs/performance.md from saved benchmark results.

    python benchmarks/figures.py        writes them between the markers of the page

The table of a benchmark without saved results stays empty. Must never measure.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layerprobe.extract.pricing import DiskPace, Price, SamplePace
from layerprobe.tables import format_bytes, format_time

__all__ = ["PAGE", "RESULTS", "TABLES", "write_tables"]

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
END = "<!-- end of the table -->\n"

# bert-base: bytes of a row at one site in float16, and its numbers of layers and sites
_ROW_BYTES, _NUM_LAYERS, _NUM_SITES = 2 * 768, 12, 13
_TOKENS_PER_TEXT = 20
_MONTH_S = 30 * 86400.0
_ALL, _LAST, _THIRD = "every site", "`--sites layers.-1`", "`--sites layers.3`: 4 of 12 layers run"
# tokens, options, bytes per token, layers that run
_STEPS: tuple[tuple[int, str, float, int], ...] = (
    (10**6, _ALL, _NUM_SITES * _ROW_BYTES, 12),
    (10**9, _ALL, _NUM_SITES * _ROW_BYTES, 12),
    (10**9, _LAST, _ROW_BYTES, 12),
    (10**9, _THIRD, _ROW_BYTES, 4),
    (10**11, f"{_ALL}, `--keep 0.001`", 0.001 * _NUM_SITES * _ROW_BYTES, 12),
    (10**11, f"{_THIRD}, `--pool mean`", _ROW_BYTES / _TOKENS_PER_TEXT, 4),
    (10**12, f"{_ALL}, `--keep 0.0001`", 0.0001 * _NUM_SITES * _ROW_BYTES, 12),
    (10**12, f"{_THIRD}, `--pool mean`", _ROW_BYTES / _TOKENS_PER_TEXT, 4),
)


def lay_out_floor(document: dict[str, Any]) -> list[str]:
    """Format the bounds of each regime, where its time goes, and the runs that end early."""
    regimes, settings = document["results"]["regimes"], document["settings"]
    # a GPU has a bus in place of copies, and older files have no plain whole
    columns = [
        (header, key)
        for header, key in (
            ("batches", "batches"),
            ("forward, padded", "padded_forward_s"),
            ("forward", "forward_s"),
            ("copy", "copy_s"),
            ("bus", "bus_s"),
            ("disk", "disk_s"),
            ("whole", "whole_s"),
            ("plain whole", "plain_whole_s"),
            ("over the floor", "ratio"),
            ("with the threads", "most_ratio"),
            ("plain over the floor", "plain_ratio"),
            ("over the padded forward", "over_padded"),
            ("GPU busy", "busy_share"),
        )
        if all(key in found for found in regimes)
    ]
    texts = f"{settings['texts']:,} {settings.get('corpus', 'docstrings')}"
    return [
        f"{texts}, {settings['tokens']:,} tokens, {_rounds(document)}, {_machine(document)}, in seconds:",
        "",
        *_table(
            ("sites, rows, dtype", *(header for header, _ in columns)),
            [(found["regime"], *(found[key] for _, key in columns)) for found in regimes],
        ),
        "",
        "Where the time goes; the columns from tokenise on are beside the rest, of the writer it is CPU time:",
        "",
        *_table(
            ("sites, rows, dtype", *regimes[0]["parts_s"]),
            [(found["regime"], *found["parts_s"].values()) for found in regimes],
        ),
        "",
        "A run that ends at a layer, against the run of the last one:",
        "",
        *_table(
            ("layer", "ratio", "layers run of all"),
            [
                (stop["layer"], stop["ratio"], f"{stop['layer'] + 1} of {stop['layers']}")
                for stop in document["results"]["stops"]
            ],
        ),
    ]


def lay_out_storing(document: dict[str, Any]) -> list[str]:
    """Format each model's ways to run over the same batches, against the bare forward pass."""
    rows = [
        (
            case["model"],
            f"{case['tokens'] / case['batches']:.0f}",
            way["pass"],
            way["way"],
            way["s"],
            way["ratio"],
            way["ratio_with_writer"] or "",
            way["batch_ratio"],
            round(way["s"] / _asking_s(case, way), 4) if way["ratio_with_writer"] else "",
        )
        for case in document["results"]
        for way in case["ways"]
    ]
    headers = (
        "model",
        "tokens a batch",
        "pass",
        "way",
        "s",
        "ratio of the sums",
        "with the writer",
        "median of a batch",
        "over output_hidden_states",
    )
    return [f"{_rounds(document).capitalize()}, {_machine(document)}:", "", *_table(headers, rows)]


def lay_out_costs(storing: dict[str, Any], floor: dict[str, Any]) -> list[str]:
    """Format hours of the forward pass and of the disk, up to a trillion tokens, computed as by `extract --plan`."""
    (case,) = (case for case in storing["results"] if case["model"].startswith("random bert-base"))
    (bare_s,) = (way["s"] for way in case["ways"] if (way["pass"], way["way"]) == ("second", "bare"))
    (regime,) = (found for found in floor["results"]["regimes"] if found["regime"] == "all, rows, float16")
    disk = DiskPace(regime["bytes"], regime["disk_s"], 0)
    rows: list[tuple[object, ...]] = []
    for tokens, switched_on, token_bytes, num_layers in _STEPS:
        seconds = bare_s * num_layers / _NUM_LAYERS
        # one token per text, since the price is per token
        sample = SamplePace(case["tokens"], case["tokens"], round(token_bytes * case["tokens"]), seconds, 0.0)
        price = Price(tokens, sample, disk, "cpu")
        rows.append(
            (
                f"{tokens:,}",
                switched_on,
                format_bytes(tokens * token_bytes),
                format_time(price.forward_s),
                format_time(price.disk_s),
                price.bound,
                f"{max(1, -int(-price.seconds // _MONTH_S)):,}",
                f"{disk.num_bytes / disk.seconds / token_bytes:,.0f} tokens/s",
            )
        )
    headers = (
        "tokens",
        "switched on",
        "bytes",
        "forward",
        "disk",
        "bound by",
        "machines, for a month",
        "disk binds from",
    )
    paces = case["tokens"] / bare_s, floor["settings"]["tokens"] / regime["forward_s"]
    return [
        f"One machine: {_machine(storing)}. Forward: {paces[0]:,.0f} tokens/s, {case['model']} ({paces[1]:,.0f} of the "
        f"demo); disk: {format_bytes(disk.num_bytes / disk.seconds)}/s:",
        "",
        *_table(headers, rows),
    ]


def lay_out_growth(document: dict[str, Any]) -> list[str]:
    """Format a line for each point of each axis."""
    headers = (
        "axis",
        "texts",
        "tokens each",
        "sites",
        "shards",
        "threads",
        "us a token",
        "over the forward",
        "memory above start",
        "resume s",
        "open ms",
    )
    rows: list[tuple[object, ...]] = [
        (
            axis,
            f"{found['texts']:,}",
            found["length"],
            f"{found['sites']}, {found['pool']}" if found.get("pool") else found["sites"],
            f"{found['shards']:,}",
            found["threads"] or "",
            found["us_per_token"],
            found["over_forward"],
            format_bytes(found["peak_bytes"]),
            found["resume_s"],
            found["open_ms"],
        )
        for axis, points in document["results"].items()
        for found in points
    ]
    return [f"{_rounds(document).capitalize()}, {_machine(document)}:", "", *_table(headers, rows)]


def lay_out_peers(document: dict[str, Any]) -> list[str]:
    """Format a line for each way, and list those that are missing."""
    settings, found = document["settings"], document["results"]
    headers = ("way", "s", "times ours", "CPU, times ours", "memory above start", "bytes", "texts that agree")
    rows: list[tuple[object, ...]] = [
        (
            way,
            one["wall_s"],
            one["wall_ratio"],
            one["cpu_ratio"],
            format_bytes(one["peak_bytes"]),
            format_bytes(one["bytes"]),
            f"{one['agree']} of {one['compared']}",
        )
        for way, one in found["ways"].items()
    ]
    named = ", ".join(f"{package} {version}" for package, version in settings["versions"].items())
    lines = [
        f"{settings['texts']:,} docstrings, {settings['tokens']:,} tokens, {_rounds(document)}, "
        f"{_machine(document)}" + (f"; {named}" if named else "") + ":",
        "",
        *_table(headers, rows),
    ]
    for way, reason in found["missing"].items():
        lines += ["", f"{way} is left out: `{reason}`."]
    return lines


def _asking_s(case: dict[str, Any], way: dict[str, Any]) -> float:
    """Return the seconds of `output_hidden_states` in the same pass as another way."""
    (found,) = (one for one in case["ways"] if one["way"] == "output_hidden_states" and one["pass"] == way["pass"])
    return found["s"]


def _rounds(document: dict[str, Any]) -> str:
    rounds = document["settings"]["rounds"]
    return "one round" if rounds == 1 else f"medians of {rounds} rounds"


def _machine(document: dict[str, Any]) -> str:
    return f"{document['machine']['cpu']}, {document['machine']['cores']} cores, torch {document['versions']['torch']}"


def _table(headers: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> list[str]:
    cells = [headers, ("---",) * len(headers), *rows]
    return [f"| {' | '.join(map(str, row))} |" for row in cells]


# by the names of their results files
TABLES: dict[str, Callable[..., list[str]]] = {
    "storing.json, floor.json": lay_out_costs,
    "floor.json": lay_out_floor,
    "storing.json": lay_out_storing,
    "growth.json": lay_out_growth,
    "peers.json": lay_out_peers,
}


def write_tables(page: str, results: Path = RESULTS) -> str:
    """Insert each table between its markers in a page."""
    for name, lay_out in TABLES.items():
        begin = f"<!-- {name}: written by benchmarks/figures.py -->\n"
        before, found, rest = page.partition(begin)
        if not found:
            raise ValueError(f"the page has no place for {name}: put {begin.strip()!r} where its table goes.")
        _, ended, rest = rest.partition(END)
        if not ended:
            raise ValueError(f"the place of {name} has no end: put {END.strip()!r} after its table.")
        saved = [results / file for file in name.split(", ")]
        are_there = all(path.is_file() for path in saved)
        lines = lay_out(*(json.loads(path.read_text(encoding="utf-8")) for path in saved)) if are_there else []
        body = "\n".join(["", *lines, "", ""]) if lines else ""
        page = f"{before}{begin}{body}{END}{rest}"
    return page


if __name__ == "__main__":
    argparse.ArgumentParser(description="Write the tables of docs/performance.md from benchmarks/results.").parse_args()
    PAGE.write_text(write_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
