"""From two texts and an answer to effects, through the command line too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from layerprobe.edit.masked import patch_masked
from layerprobe.errors import OptionError
from layerprobe.models import LoadedModel

Run = Callable[..., tuple[int, str, str]]
CLEAN, CORRUPT = "the quick [MASK] .", "the lazy [MASK] ."


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path, make_bert: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that fills masks, with the tokenizer of the other tiny model."""
    import transformers

    made = tmp_path_factory.mktemp("masked")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(tiny_model_folder))
    tokenizer.save_pretrained(made)
    make_bert("BertForMaskedLM", vocab_size=len(tokenizer)).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return lp.load_model(str(folder), "cpu")


def test_metric_is_the_logit_of_the_answer_at_the_mask(loaded: Any) -> None:
    found = patch_masked(loaded, CLEAN, CORRUPT, "fox", ["embeddings", "layers.*"], progress=False)
    for text, metric in ((CLEAN, found.clean), (CORRUPT, found.corrupt)):
        batch = loaded.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = loaded.model(**batch).logits
        assert metric == float(logits[0, 3, loaded.tokenizer.convert_tokens_to_ids("fox")])
    assert found.tokens == ("[CLS]", "the", "quick/lazy", "[MASK]", ".", "[SEP]")
    # the embeddings differ at one token, and the logits at the mask are made of the last layer's vector there
    assert found.normalised[0].tolist() == pytest.approx([0, 0, 1, 0, 0, 0], abs=1e-4)
    assert found.normalised[-1].tolist() == pytest.approx([0, 0, 0, 1, 0, 0], abs=1e-4)


def test_pretraining_models_are_measured_at_their_predictions(loaded: Any, make_bert: Any) -> None:
    model = make_bert("BertForPreTraining", vocab_size=len(loaded.tokenizer))
    found = patch_masked(LoadedModel("x", model, loaded.tokenizer), CLEAN, CORRUPT, "fox")
    batch = loaded.tokenizer(CLEAN, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).prediction_logits
    assert found.clean == float(logits[0, 3, loaded.tokenizer.convert_tokens_to_ids("fox")])


def test_a_discriminator_fills_no_masks(loaded: Any) -> None:
    import transformers

    sizes: dict[str, Any] = {"embedding_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ElectraConfig(vocab_size=len(loaded.tokenizer), intermediate_size=48, **sizes)
    model = LoadedModel("x", transformers.ElectraForPreTraining(config).eval(), loaded.tokenizer)
    with pytest.raises(OptionError, match="ElectraForPreTraining fills no masks"):
        patch_masked(model, CLEAN, CORRUPT, "fox")


def test_command_prints_the_table_and_writes_a_picture(run: Run, folder: Path, tmp_path: Path) -> None:
    asked = ("patch", folder, "--clean", CLEAN, "--corrupt", CORRUPT, "--answer", "fox")
    pytest.importorskip("matplotlib")
    code, printed, said = run(*asked, "-o", tmp_path / "patch.png")
    assert code == 0 and said == ""
    lines = printed.splitlines()
    assert lines[0].split() == ["site", "[CLS]", "the", "quick/lazy", "[MASK]", ".", "[SEP]"]
    assert [line.split()[0] for line in lines[2:6]] == ["embeddings", "layers.0", "layers.1", "layers.2"]
    assert lines[-1] == f"wrote {tmp_path / 'patch.png'}"
    assert (tmp_path / "patch.png").read_bytes().startswith(b"\x89PNG")
    code, printed, _ = run(*asked, "--heads", "--method", "attribution", "-q", "-o", tmp_path / "heads.csv")
    assert code == 0 and printed == ""
    rows = (tmp_path / "heads.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "site,head 0,head 1,head 2,head 3" and rows[1].startswith("layers.0.attention.context,")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--clean": "the fox ."}, "'the fox .' has 0 masks: write [MASK] once"),
        ({"--clean": "[MASK] [MASK] ."}, "has 2 masks"),
        ({"--clean": "the the quick [MASK] ."}, "clean is 7 tokens, corrupt 6"),
        ({"--clean": "[MASK] quick the ."}, "the mask is token 1 of clean, 3 of corrupt"),
        ({"--answer": "foxes"}, "the answer 'foxes' is ['fox', '##e', '##s'] to the tokenizer"),
        ({"--out": "x.gif"}, "'.gif' is not .csv"),
        ({"--out": "nowhere/x.png"}, "there is no folder nowhere"),
    ],
)
def test_mistakes_are_one_line(run: Run, folder: Path, changes: dict[str, str], message: str) -> None:
    # a table, which no picture's package is missed for
    asked = {"--clean": CLEAN, "--corrupt": CORRUPT, "--answer": "fox", "--out": "x.csv"} | changes
    code, printed, said = run("patch", folder, *(word for pair in asked.items() for word in pair))
    assert (code, printed) == (2, "") and message in said and said.count("\n") == 1


def test_model_that_fills_no_masks_is_refused(tiny: Any) -> None:
    with pytest.raises(OptionError, match="BertModel fills no masks"):
        patch_masked(tiny, CLEAN, CORRUPT, "fox")
