"""Measure what a small decoder can read from each layer of the demo model: the example of docs/generation.md.

The texts are those of `docstrings.py`. Every layer gets a decoder of its own, fitted for a minute or two on two cores,
and one more decoder gets no context. The decoders of the first and last site then write a few of the test texts.
"""

import tempfile
from pathlib import Path
from typing import Any

from docstrings import MOST, list_labelled
from harness import emit, make_parser

import layerprobe as lp

SITES = ["embeddings", "layers.*"]
QUICK = 20
SHOWN = 6
_IMAGES = Path(__file__).parent.parent / "docs" / "img"
_DIGITS = 4


def main() -> None:
    """Fit the decoders once."""
    parser = make_parser("What a small decoder can read of each layer, on docstrings of the standard library.")
    asked = parser.parse_args()
    most, epochs = (QUICK, 2) if asked.quick else (MOST, 10)
    with tempfile.TemporaryDirectory() as folder:
        store = lp.extract("demo", list_labelled(most), Path(folder) / "acts", sites=SITES)
        found = lp.fit_decoder(store, epochs=epochs)
        print(found)
        if asked.save and not asked.quick:
            found.plot(_IMAGES / "read.png")
        texts = _read(store, found)
    said = found.as_dict()
    layers = [_numbers(one) for one in (*found.layers, found.baseline)]
    counts = {name: said[name] for name in said if name.startswith("num_")}
    settings = {"most": most, "epochs": epochs, "model": "demo"}
    emit("decoders", settings, {"layers": layers, **counts, "read": texts}, save=asked.save)


def _numbers(reading: Any) -> dict[str, Any]:
    return {name: round(one, _DIGITS) if isinstance(one, float) else one for name, one in vars(reading).items()}


def _read(store: Any, found: Any) -> list[dict[str, Any]]:
    ends = (found.layers[0].site, found.layers[-1].site)
    read = {site: found.read(store, site, found.test[:SHOWN]).texts for site in ends}
    rows = []
    for place, ordinal in enumerate(found.test[:SHOWN]):
        rows.append({"text": store.example(ordinal).text, **{site: texts[place] for site, texts in read.items()}})
        print(*(f"{name:<11} {text}" for name, text in rows[-1].items()), "", sep="\n")
    return rows


if __name__ == "__main__":
    main()
