"""What can a narrow decoder read of each layer, and what does float16 change in what is generated?

First sentences of the standard library's docstrings through the demo model, every layer stored in float16, a decoder
fitted to each and one to no context. Then the same texts in float32: how many sequences of a live encoder-decoder model
come back token by token, and how many differ once the states are float16.

    python benchmarks/decode.py [--quick] [--save]
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from corpora import list_docstrings, shuffle
from harness import emit, make_parser

import layerprobe as lp
from layerprobe.models import LoadedModel
from layerprobe.tables import format_table

SITES = ["embeddings", "layers.*"]
LETTERS = (10, 60)


def main() -> None:
    options = make_parser(__doc__.splitlines()[0] if __doc__ else "").parse_args()
    demo = lp.load_model("demo", "cpu")
    texts = list_sentences()[: 120 if options.quick else 3000]
    epochs = 1 if options.quick else 4
    with tempfile.TemporaryDirectory() as folder:
        halves = lp.extract(demo, texts, Path(folder) / "half", sites=SITES, dtype="float16", progress=False)
        began = time.perf_counter()
        found = lp.fit_decoder(halves, layer=["layers.-1"] if options.quick else SITES, epochs=epochs)
        fit_s = time.perf_counter() - began
        whole = lp.extract(demo, texts, Path(folder) / "whole", sites=SITES, dtype="float32", progress=False)
        examples = list(found.test)
        changed = {
            site: _share_changed(found.read(whole, site, examples), found.read(halves, site, examples))
            for site in found.decoders
        }
        live = compare_live(demo, texts, whole, halves, examples)
        read = found.read(halves, found.layers[0].site, examples[:5])
    print(found.table())
    rows = [(site, *shares.values()) for site, shares in {**changed, **live}.items()]
    print(format_table(("sequences", "changed", "tokens changed"), rows))
    for one in read:
        print(f"{texts[one.example]!r} -> {one.text!r}")
    settings = {"texts": len(texts), "letters": LETTERS, "epochs": epochs, "width": 128, "num_layers": 2}
    results = {"readout": as_percent(found), "fit_s": round(fit_s), "float16": changed, "live": live}
    emit("decode", settings, results, save=options.save)


def list_sentences() -> list[str]:
    """List the first paragraphs of docstrings that are short."""
    firsts = (" ".join(text.strip().split("\n\n")[0].split()) for text in list_docstrings())
    return shuffle([text for text in firsts if LETTERS[0] <= len(text) <= LETTERS[1]])


def as_percent(found: Any) -> dict[str, Any]:
    """Give the readings with shares in percent, and the sizes."""
    readings = {
        one.site: {
            "loss": round(one.loss, 3),
            "accuracy_percent": round(100 * one.accuracy, 1),
            "exact_percent": round(100 * one.exact, 1),
            "train_loss": round(one.train_loss, 3),
        }
        for one in (*found.layers, found.baseline)
    }
    names = ("num_train", "num_test", "num_test_tokens", "num_types", "num_cut")
    return {"readings": readings, **{name: getattr(found, name) for name in names}}


def compare_live(
    demo: LoadedModel, texts: list[str], whole: Any, halves: Any, examples: list[int]
) -> dict[str, dict[str, float]]:
    """Compare a live encoder with its stored states; a random decoder, greedy and by beams."""
    from transformers import BertConfig, BertLMHeadModel, EncoderDecoderModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 6}
    config = BertConfig(
        **shape, intermediate_size=512, is_decoder=True, add_cross_attention=True, initializer_range=0.3
    )
    encoder: Any = demo.model
    model: Any = EncoderDecoderModel(encoder=encoder, decoder=BertLMHeadModel(config)).eval()
    starts = {"decoder_start_token_id": 101, "eos_token_id": 102, "pad_token_id": 0, "max_new_tokens": 16}
    shares: dict[str, dict[str, float]] = {}
    for name, beams in (("greedy", 1), ("beams", 4)):
        settings: dict[str, Any] = {**starts, "num_beams": beams, "do_sample": False}
        stored = lp.generate(whole, model, layer=-1, examples=examples, **settings)
        narrow = lp.generate(halves, model, layer=-1, examples=examples, **settings)
        own = []
        for first in range(0, len(examples), 16):
            part = [texts[one] for one in examples[first : first + 16]]
            batch = demo.tokenizer(part, return_tensors="pt", padding=True)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            made = model.generate(ids, attention_mask=mask, **settings)[:, 1:].tolist()
            own += [tuple(row[: row.index(102) + 1] if 102 in row else row) for row in made]
        shares[f"{name}, float32 and live"] = _share_differing([one.ids for one in stored], own)
        shares[f"{name}, float16 and live"] = _share_differing([one.ids for one in narrow], own)
    return shares


def _share_changed(first: Any, second: Any) -> dict[str, float]:
    return _share_differing([one.ids for one in first], [one.ids for one in second])


def _share_differing(first: list[tuple[int, ...]], second: list[tuple[int, ...]]) -> dict[str, float]:
    pairs = list(zip(first, second, strict=True))
    tokens = sum(max(len(one), len(other)) for one, other in pairs)
    same = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=False))
    differing = sum(one != other for one, other in pairs)
    return {
        "sequences_percent": round(100 * differing / len(pairs), 2),
        "tokens_percent": round(100 * (tokens - same) / max(1, tokens), 2),
    }


if __name__ == "__main__":
    main()
