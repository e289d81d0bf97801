"""Arguments and options shared by several commands, each with its name, help and short form.

Must never know what a command does with them.
"""

from typing import Annotated

import typer

__all__ = [
    "Device",
    "Field",
    "Json",
    "Model",
    "Quiet",
    "Seed",
    "Sites",
    "StoredSites",
    "Table",
    "Texts",
    "Vector",
    "Where",
]

Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Default: CUDA if available.")]
Field = Annotated[str, typer.Option(help="Record field that holds the text.")]
Json = Annotated[str | None, typer.Option(metavar="FILE", help="Write all results as JSON.")]
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A hub id, a folder, or 'demo' (real MiniLM weights from the demo extra)."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Sites = Annotated[
    list[str] | None,
    typer.Option(
        "--sites", "-s", metavar="PATTERN",
        help="Site pattern, such as 'layers.*', 'layers.-4:' or 'layers.0,5.ffn.act'; repeatable.",
    ),
]  # fmt: skip
StoredSites = Annotated[
    list[str] | None,
    typer.Option("--sites", "--site", "-s", metavar="PATTERN", help="Stored sites, such as 'layers.*'; repeatable."),
]
Table = Annotated[
    str | None, typer.Option("--out", "-o", metavar="FILE", help="Write a .csv, .json, .png, .svg or .pdf file.")
]
Texts = Annotated[
    str,
    typer.Argument(
        metavar="INPUT",
        help="A .txt (one text per line), .jsonl, .csv or .parquet file, a folder of them, a data set on the hub "
        "(hf:NAME or hf:NAME:SPLIT), or '-' for standard input (one plain text per line).",
    ),
]
Vector = Annotated[str | None, typer.Option(help="How an example's rows become one vector: mean, max, cls or last.")]
# not a Path, which would collapse the two slashes of a URL
Where = Annotated[str, typer.Argument(metavar="DIR", help="A store: a folder, or a URL such as s3://bucket/acts.")]
