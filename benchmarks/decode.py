"""What does float16 change in text generated from stored states?

Short docstrings of the standard library go through the demo model, and its last layer is stored in float32 and in
float16. A decoder with random weights, whose choices are closer than a trained one's, generates from each store and
from the live encoder. Counted are the sequences and tokens that differ, with greedy and beam search.

    python benchmarks/decode.py [--quick | --save]
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from corpora import list_docstrings, shuffle
from harness import emit, make_parser

import layerprobe as lp
from layerprobe.models import LoadedModel
from layerprobe.tables import format_table

LETTERS = (10, 60)
TEXTS = 400


def main() -> None:
    options = make_parser(__doc__.splitlines()[0] if __doc__ else "").parse_args()
    demo = lp.load_model("demo", "cpu")
    texts = list_sentences()[: 40 if options.quick else TEXTS]
    with tempfile.TemporaryDirectory() as folder:
        full, half = (
            lp.extract(demo, texts, Path(folder) / dtype, sites="layers.-1", dtype=dtype, progress=False)
            for dtype in ("float32", "float16")
        )
        found = compare_live(demo, texts, full, half, list(range(len(texts))))
    rows = [(way, *shares.values()) for way, shares in found.items()]
    print(format_table(("decoding", "sequences changed, %", "tokens changed, %"), rows))
    emit("decode", {"texts": len(texts), "letters": LETTERS, "site": "layers.-1"}, found, save=options.save)


def list_sentences() -> list[str]:
    """List short first paragraphs of docstrings."""
    firsts = (" ".join(text.strip().split("\n\n")[0].split()) for text in list_docstrings())
    return shuffle([text for text in firsts if LETTERS[0] <= len(text) <= LETTERS[1]])


def compare_live(
    demo: LoadedModel, texts: list[str], whole: Any, halves: Any, examples: list[int]
) -> dict[str, dict[str, float]]:
    """Compare a live encoder with its stored states, using a random decoder with greedy and beam search."""
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
