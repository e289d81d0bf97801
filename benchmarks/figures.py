"""The tables of docs/performance.md, laid out from what the benchmarks saved.

    python benchmarks/figures.py        writes them between the markers of the page

A benchmark that has not been saved leaves its place empty. Must never measure.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerprobe.tables import format_bytes

__all__ = ["PAGE", "RESULTS", "TABLES", "write_tables"]

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
END = "<!-- end of the table -->\n"


def lay_out_floor(document: dict[str, Any]) -> list[str]:
    """Give the bounds of each regime, where its time goes, and the runs that end early."""
    regimes, settings = document["results"]["regimes"], document["settings"]
    return [
        f"{settings['texts']:,} docstrings, {settings['tokens']:,} tokens, {_rounds(document)}, "
        f"{_machine(document)}, in seconds:",
        "",
        *_table(
            (
                "sites, rows, dtype",
                "batches",
                "forward, padded",
                "forward",
                "copy",
                "disk",
                "whole",
                "over the floor",
                "with the threads",
                "over the padded forward",
            ),
            [
                (
                    found["regime"],
                    found["batches"],
                    *(found[f"{way}_s"] for way in ("padded_forward", "forward", "copy", "disk", "whole")),
                    found["ratio"],
                    found["most_ratio"],
                    found["over_padded"],
                )
                for found in regimes
            ],
        ),
        "",
        "Where the time goes; the last two are beside the rest, of the writer it is CPU time:",
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
    """Give each model's ways to run over the same batches, against the bare forward."""
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
    )
    return [f"{_rounds(document).capitalize()}, {_machine(document)}:", "", *_table(headers, rows)]


def lay_out_growth(document: dict[str, Any]) -> list[str]:
    """Give a line for each point of each axis."""
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
            found["sites"],
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
    """Give a line for each way, and name those that are missing."""
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


def _rounds(document: dict[str, Any]) -> str:
    rounds = document["settings"]["rounds"]
    return "one round" if rounds == 1 else f"medians of {rounds} rounds"


def _machine(document: dict[str, Any]) -> str:
    return f"{document['machine']['cpu']}, {document['machine']['cores']} cores, torch {document['versions']['torch']}"


def _table(headers: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> list[str]:
    cells = [headers, ("---",) * len(headers), *rows]
    return [f"| {' | '.join(map(str, row))} |" for row in cells]


TABLES = {"floor": lay_out_floor, "storing": lay_out_storing, "growth": lay_out_growth, "peers": lay_out_peers}


def write_tables(page: str, results: Path = RESULTS) -> str:
    """Put each table between its markers in a page."""
    for name, lay_out in TABLES.items():
        begin = f"<!-- {name}.json: written by benchmarks/figures.py -->\n"
        before, found, rest = page.partition(begin)
        if not found:
            raise ValueError(f"the page has no place for {name}.json: put {begin.strip()!r} where its table goes.")
        _, ended, rest = rest.partition(END)
        if not ended:
            raise ValueError(f"the place of {name}.json has no end: put {END.strip()!r} after its table.")
        saved = results / f"{name}.json"
        lines = lay_out(json.loads(saved.read_text(encoding="utf-8"))) if saved.is_file() else []
        body = "\n".join(["", *lines, "", ""]) if lines else ""
        page = f"{before}{begin}{body}{END}{rest}"
    return page


if __name__ == "__main__":
    PAGE.write_text(write_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
