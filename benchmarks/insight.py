"""From text to insight: what the layers of the demo model tell about a labelled set available on every machine.

The set is that of `docstrings.py`: docstrings of the standard library by the family of their module, split by file.
Every layer is extracted, then compared, plotted and classified, with the baselines, the control labels and the code
length. With `--save` the numbers go to benchmarks/results and the pictures to docs/img; docs/tour.md quotes both.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from docstrings import MOST, list_labelled
from harness import emit, make_parser

import layerprobe as lp

SITES = ["embeddings", "layers.*"]
QUICK = 40
_IMAGES = Path(__file__).parent.parent / "docs" / "img"
_DIGITS = 4


def main() -> None:
    """Run the whole tour once."""
    parser = make_parser("From text to insight on a labelled set that every machine has.")
    asked = parser.parse_args()
    most = QUICK if asked.quick else MOST
    records = list_labelled(most)
    with tempfile.TemporaryDirectory() as folder:
        images = _IMAGES if asked.save and not asked.quick else Path(folder)
        results = _look(records, Path(folder), images)
    emit("insight", {"most": most, "sites": SITES, "model": "demo"}, _rounded(results), save=asked.save)


def _look(records: list[dict[str, str]], folder: Path, images: Path) -> dict[str, Any]:
    with lp.extract("demo", records, folder / "acts", sites=SITES) as store:
        print(f"{len(store):,} texts, {store.num_tokens:,} tokens\n")
        moved = lp.differences(store, pairs="all")
        print(moved, "\n")
        moved.plot(images / "tour-depth.png")
        checked = lp.check(store)
        print(checked, "\n")
        picture = lp.plot(store, images / "tour-layers.png")
        print(picture, "\n")
        found = lp.classify(store, split="split", control=True, mdl=True, untrained=lp.extract_untrained)
        print(found.table(), "\n")
        found.plot(images / "tour-classes.png")
        return {
            "texts": len(store),
            "tokens": store.num_tokens,
            "pairs": _fields(moved.pairs),
            "shapes": _fields(moved.sites),
            "checks": _fields(checked.sites),
            "panels": [{"site": one.site, "variance": one.variance, "trust": one.trust} for one in picture.panels],
            "classification": found.as_dict(),
        }


def _fields(values: Any) -> list[dict[str, Any]]:
    return [dict(vars(value)) for value in values]


def _rounded(value: Any) -> Any:
    """Convert results to JSON types, with floats rounded to four decimals."""
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), _DIGITS))


if __name__ == "__main__":
    main()
