"""generate, fit-decoder and lens on the command line: what it prints and writes, and one line for each mistake."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from layerprobe.models import LoadedModel

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def acts(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "acts"
    lp.extract(tiny, ["the quick fox", "a lazy dog over the fox", "dog."], folder, sites="layers.*", progress=False)
    return folder


@pytest.fixture(scope="module")
def bert2bert(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved encoder-decoder model that does not say how a sequence starts; its tokenizer does."""
    import transformers

    torch.manual_seed(4)
    encoder: Any = tiny.model
    own = encoder.config.to_dict() | {"is_decoder": True, "add_cross_attention": True, "initializer_range": 0.4}
    decoder = transformers.BertLMHeadModel(transformers.BertConfig(**own))
    folder = tmp_path_factory.mktemp("models") / "bert2bert"
    transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


def refused(result: tuple[int, str, str], message: str) -> None:
    code, _, said = result
    line = next(line for line in said.splitlines() if line.startswith("layerprobe: "))
    assert code == 2 and message in line


def test_generate_prints_and_writes_what_the_function_gives(
    run: Run, acts: Path, bert2bert: Path, tmp_path: Path
) -> None:
    out = tmp_path / "made.json"
    options = ("--layer", "layers.1", "-e", 2, "-e", 0, "--max-new-tokens", 6, "--beams", 2, "-o", out)
    code, printed, _ = run("generate", acts, bert2bert, *options)
    found = lp.generate(acts, str(bert2bert), layer=1, examples=[2, 0], max_new_tokens=6, num_beams=2)
    assert code == 0 and printed == f"{found.table()}\nwrote {out}\n"
    written = json.loads(out.read_text())
    assert [one["example"] for one in written["sequences"]] == [2, 0]
    assert [one["text"] for one in written["sequences"]] == found.texts and None not in found.texts
    code, printed, _ = run("generate", acts, bert2bert, "--layer", -2, "--max-new-tokens", 3, "-q")
    assert (code, printed) == (0, "")


def test_draws_take_their_options(run: Run, acts: Path, bert2bert: Path) -> None:
    options = ("--sample", "--temperature", 2.0, "--top-p", 0.9, "--seed", 5, "--max-new-tokens", 5)
    _, printed, _ = run("generate", acts, bert2bert, *options)
    drawn = {"do_sample": True, "temperature": 2.0, "top_p": 0.9}
    assert printed == lp.generate(acts, str(bert2bert), seed=5, max_new_tokens=5, **drawn).table() + "\n"


def test_mistakes_of_generate_are_one_line(run: Run, acts: Path, bert2bert: Path, tiny_model_folder: Path) -> None:
    refused(run("generate", acts, bert2bert, "-o", "made.txt"), "'.txt' is not .csv, .json")
    refused(run("generate", acts, bert2bert, "--top-p", 0.5), "--top-p without --sample: nothing is drawn")
    refused(run("generate", acts, tiny_model_folder), "BertModel: it does not generate from states")
    refused(run("generate", acts, bert2bert, "--layer", 9), "layers are 0 to 2")
    refused(run("generate", acts, bert2bert, "-e", 9), "9")


def test_lens_prints_and_writes_what_the_function_gives(
    run: Run, acts: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("the quick fox\na lazy dog over the fox\ndog over fox\n", encoding="utf-8")
    options = ("-s", "layers.*", "--max-tokens", 50, "--seed", 3)
    code, printed, _ = run("lens", tiny_model_folder, source, *options, "--tokens", "-o", tmp_path / "lens.json")
    found = lp.lens(str(tiny_model_folder), source, sites="layers.*", max_tokens=50, seed=3)
    assert code == 0 and printed == f"{found.table()}\n\n{found.grid()}\nwrote {tmp_path / 'lens.json'}\n"
    assert json.loads((tmp_path / "lens.json").read_text())["num_tokens"] == found.num_tokens
    code, printed, _ = run("lens", tiny_model_folder, acts, "-q", "-o", tmp_path / "lens.svg")
    assert (code, printed) == (0, "") and (tmp_path / "lens.svg").exists()
    refused(run("lens", tiny_model_folder, acts, "--mask", 0.2), "mask=0.2 for a store")
    refused(
        run("lens", tiny_model_folder, source, "-o", tmp_path / "lens.txt"),
        "'.txt' is not .csv, .json, .png, .svg, .pdf",
    )


def test_decoders_are_fitted_kept_and_read_on(run: Run, tiny: LoadedModel, tmp_path: Path) -> None:
    words = ("the", "quick", "brown", "fox", "jumps", "over")
    texts = [f"{one} {other}" for one in words for other in words if one != other]
    lp.extract(tiny, texts, tmp_path / "acts", sites="layers.*", progress=False)
    small = ("--width", 32, "--num-layers", 1, "--epochs", 2, "--batch-size", 8)
    code, said, _ = run(
        "fit-decoder", tmp_path / "acts", "--layer", 1, *small, "--save", tmp_path / "kept", "-o", tmp_path / "a.json"
    )
    assert code == 0 and "layers.1" in said and "27 examples to train, 3 to judge" in said
    written = json.loads((tmp_path / "a.json").read_text())
    assert [one["site"] for one in written["layers"]] == ["layers.1"] and written["num_train"] == 27
    code, said, _ = run(
        "generate", tmp_path / "acts", tmp_path / "kept", "--layer", "layers.1", "-e", 2, "-o", tmp_path / "read.json"
    )
    (read,) = json.loads((tmp_path / "read.json").read_text())["sequences"]
    assert code == 0 and read["example"] == 2
    assert read["text"] == lp.load_decoder(tmp_path / "kept").read(tmp_path / "acts", -1, 2)[0].text
    refused(
        run("generate", tmp_path / "acts", tmp_path / "kept", "--beams", 2, "--device", "cpu"),
        "--beams, --device with",
    )
    refused(run("fit-decoder", tmp_path / "acts", "--layer", 1, "--layer", 0), "--layer 1 beside others")
    refused(run("fit-decoder", tmp_path / "acts", "-o", "a.txt"), "a.txt")
    refused(run("fit-decoder", tmp_path / "acts", "--width", 33), "width is 33")
