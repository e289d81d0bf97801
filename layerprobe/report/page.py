"""`layerprobe.report`: a store as one page that needs no network.

The page contains its style, script and data. Its content security policy forbids all requests and any script but its
own, identified by hash; no text in the JSON data can end their block. Style and scripts lie beside this file.

Must never know of models, hooks or shards.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from layerprobe.errors import OptionError, telling_refusals
from layerprobe.packages import need_package
from layerprobe.report.content import gather
from layerprobe.store.format import need_parent
from layerprobe.store.guard import check_count, need_path
from layerprobe.store.reader import Store, take_store
from layerprobe.tables import format_bytes, format_count

__all__ = ["Report", "report"]

_SCRIPTS = ("charts.js", "scatter.js", "page.js")
_MARK = re.compile(r"@(POLICY|STYLE|SCRIPT|DATA)@")
# Characters that could end the data block or start a comment in it, and surrogates, which UTF-8 cannot encode.
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True)
class Report:
    """What `layerprobe.report` wrote.

    Args:
        path: The page.
        sites: The sites of its slider.
        num_points: Number of points in the scatter plot.
        num_all: Number of points in the store.
        kind: What a point is: `rows` or `examples`.
        fields: The fields that may colour the points.
        left_out: Fields left out beyond the first twenty.
        parts: Further parts of the page: `depth`, `classes`, `attention`.
        num_bytes: Size of the page.
        constant: Sites that were left out because all points are the same there.
    """

    path: Path
    sites: tuple[str, ...]
    num_points: int
    num_all: int
    kind: str
    fields: tuple[str, ...]
    left_out: tuple[str, ...]
    parts: tuple[str, ...]
    num_bytes: int
    constant: tuple[str, ...] = ()

    def table(self) -> str:
        """Summarise the page in a few lines."""
        left_out = [f"left out  {', '.join(self.left_out)}"] if self.left_out else []
        if self.constant:
            left_out.append(f"left out  {', '.join(self.constant)}: all points are the same there")
        sites = format_count(len(self.sites), "site")
        return "\n".join(
            [
                f"{self.path}  {format_bytes(self.num_bytes)}",
                f"points  {self.num_points:,} of {self.num_all:,} {self.kind} at {sites}",
                f"colours {', '.join(self.fields)}",
                *left_out,
                f"parts   {', '.join(self.parts) or 'none besides'}",
            ]
        )

    __str__ = table
    __repr__ = table


def report(
    store: Store | str | Path,
    path: str | Path,
    *,
    site: str | Sequence[str] | None = None,
    labels: str | None = None,
    points: str = "examples",
    pool: str | None = None,
    max_points: int = 10_000,
    max_rows: int | None = 100_000,
    attention: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Report:
    """Write a store as one self-contained page: points by layer, curves, heat maps, classes, attention.

    Args:
        store: A store, or its path or URL.
        path: A `.html` file to write; an existing one is replaced.
        site: Patterns over the stored sites; None for the embeddings and every layer's output. A site that is not named
            is left out if all its points are the same.
        labels: A record field to classify by; None for no table of classes.
        points: `examples`, or `rows` for one point per token.
        pool: How an example's rows become one vector: `mean` if not given, `max`, `cls` or `last`.
        max_points: Maximum number of points, drawn at random.
        max_rows: Approximate number of rows for the curves and heat maps, drawn at random; None for all.
        attention: Ordinals of the examples whose attention weights are shown; None for the first eight of at most 40
            tokens, if weights are stored.
        seed: Random seed.
        progress: Show progress bars; None: only on a terminal.

    Raises:
        OptionError: an invalid value, a suffix that is not `.html`, points that are all the same at a named site, or a
            package that is not installed.
        SiteError: a pattern matches nothing, or attention is requested and none is stored.
        InputError: fewer than three points, or labels that cannot be classified.
        NonFiniteError: a value that is not finite, by name.
        StoreError: the file cannot be written.

    Example:
        >>> import layerprobe as lp
        >>> texts = ["The kettle whistled.", "Who left the gate open?", "So it goes."]
        >>> store = lp.extract("demo", texts, "memory://reported", sites="layers.-2:")
        >>> page = lp.report(store, "report.html")
        >>> page.sites, page.num_points, page.parts
        (('layers.4', 'layers.5'), 3, ('depth',))

    Cost: that of `differences` over `max_rows` rows, and the drawn points in float64 at every site.
    """
    path = _check_path(path)
    check_count("max_points", max_points, 3)
    seed = check_count("seed", seed, 0)
    if max_rows is not None:
        check_count("max_rows", max_rows, 2)
    need_package("sklearn", "a report", "analysis")
    found = gather(
        take_store(store),
        sites=site,
        labels=labels,
        points=points,
        pool=pool,
        max_points=max_points,
        max_rows=max_rows,
        attention=attention,
        seed=seed,
        progress=progress,
    )
    page = _lay_out(found).encode("utf-8")
    with telling_refusals(path, "written", "Choose another path."):
        path.write_bytes(page)
    return Report(
        path,
        tuple(found["sites"]),
        len(found["points"]["of"]),
        found["points"]["all"],
        found["points"]["kind"],
        tuple(field["name"] for field in found["fields"] if field.get("colours", True)),
        tuple(found["left_out"]),
        tuple(name for name in ("depth", "classes", "attention") if found[name] is not None),
        len(page),
        tuple(found["constant"]),
    )


def _check_path(path: str | Path) -> Path:
    """Check, before anything is computed, that a page can be written to a path."""
    path = need_path("path", path)
    if path.suffix.lower() not in _SUFFIXES:
        raise OptionError(f"no report {str(path)!r}: {path.suffix or 'no suffix'!r} is not {' or '.join(_SUFFIXES)}.")
    return need_parent(path)


def _lay_out(found: dict[str, Any]) -> str:
    """Fill the page with style, script, data and policy."""
    folder = files("layerprobe.report")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    script = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in _SCRIPTS)
    parts = {
        "POLICY": "; ".join(
            [
                "default-src 'none'",
                f"script-src '{_hash(script)}'",
                f"style-src '{_hash(style)}'",
                "base-uri 'none'",
                "form-action 'none'",
                # text cannot become markup, even through a bug in the script
                "require-trusted-types-for 'script'",
                "trusted-types 'none'",
            ]
        ),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _write_json(found),
    }
    # a single pass, so that a placeholder inside the data is not replaced
    return _MARK.sub(lambda mark: parts[mark[1]], folder.joinpath("page.html").read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _write_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
