"""Measure the report of 10,000 texts at 7 sites: its size, and how soon a real Chromium has painted it.

The texts are lines of the standard library's docstrings. The page is loaded several times in a fresh page of the
Chromium inside Qt WebEngine, which renders without a GPU; times count from the start of the navigation, as reported by
the browser. Needs the extras `analysis`, `demo` and `browser`.
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from corpora import list_docstrings
from harness import emit, make_parser

import layerprobe as lp

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from browser import Browser

SITES = ["embeddings", "layers.*"]
LEAST_LETTERS = 20
WIDTHS = (1400, 420)
# First paint as reported by the browser; and the page's own mark that the scatter plot is drawn.
FIRST_PAINT = "Math.round((performance.getEntriesByType('paint')[0] || {startTime: NaN}).startTime)"
DRAWN = "document.getElementById('plane').dataset.layer === '0'"


def main() -> None:
    """Write the page and load it."""
    parser = make_parser("The report of 10,000 texts: its bytes, and how soon it is painted.")
    parser.add_argument("--keep", type=Path, help="a folder for the page and its pictures")
    asked = parser.parse_args()
    num_texts, rounds = (300, 2) if asked.quick else (10_000, 5)
    with tempfile.TemporaryDirectory() as folder:
        keep = asked.keep or Path(folder)
        keep.mkdir(exist_ok=True)
        store = lp.extract("demo", _list_lines(num_texts), Path(folder) / "acts", sites=SITES, dtype="float16")
        page = keep / "report.html"
        lp.report(store, page)
        settings = {"texts": len(store), "sites": len(store.sites), "rounds": rounds}
        results = _load(page, rounds, keep)
    emit("page", settings, results, save=asked.save)


def _list_lines(count: int) -> list[str]:
    lines = (line.strip() for text in list_docstrings() for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if len(line) >= LEAST_LETTERS))[:count]


def _load(page: Path, rounds: int, keep: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"page_mb": round(page.stat().st_size / 1e6, 2)}
    with Browser() as browser:
        for width in WIDTHS:
            painted = []
            for _ in range(rounds):
                browser.load(page, width=width)
                browser.until(DRAWN)
                browser.until("performance.getEntriesByType('paint').length > 0")
                painted.append(browser.run(FIRST_PAINT))
            browser.shoot(keep / f"report-{width}.png", height=2600 if width == WIDTHS[-1] else 1800)
            found[f"first_paint_ms_{width}"] = {"median": statistics.median(painted), "most": max(painted)}
    return found


if __name__ == "__main__":
    main()
