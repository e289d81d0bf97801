"""What several test files share: tiny random models, and the real demo model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from layerprobe.models import LoadedModel

# Tiny tensors gain nothing from threads, and two runs on one machine lose by them.
torch.set_num_threads(1)


def _tiny_config(**changes: Any) -> Any:
    from transformers import BertConfig

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 100,
        "max_position_embeddings": 64,
    }
    return BertConfig(**(sizes | changes))


@pytest.fixture(scope="session")
def make_bert() -> Callable[..., Any]:
    """Make a tiny random model in eval mode: `make_bert("BertForMaskedLM", num_labels=5)`."""
    import transformers

    def make(class_name: str = "BertModel", **changes: Any) -> Any:
        torch.manual_seed(0)
        return getattr(transformers, class_name)(_tiny_config(**changes)).eval()

    return make


@pytest.fixture
def tiny_bert(make_bert: Callable[..., Any]) -> Any:
    """A fresh `BertModel` of 3 layers: hidden 32, 4 heads, intermediate 64, vocabulary 100."""
    return make_bert()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three sequences of 7, 4 and 1 real tokens, padded on the right."""
    torch.manual_seed(1)
    mask = (torch.arange(7) < torch.tensor([7, 4, 1])[:, None]).long()
    return {"input_ids": torch.randint(1, 100, (3, 7)) * mask, "attention_mask": mask}


@pytest.fixture(scope="session")
def demo() -> LoadedModel:
    """The real demo model on the CPU; tests leave it as it was."""
    return lp.load_model("demo", "cpu")


@pytest.fixture(scope="session")
def tiny_model_folder(make_bert: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of 3 random layers, width 32, at most 64 tokens, with a tokenizer that spells most words."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    vocabulary += ["the", "quick", "brown", "fox", "over", "lazy", "dog", ".", ",", "中", "文"]
    words = tmp_path_factory.mktemp("words") / "vocab.txt"
    words.write_text("\n".join(vocabulary), encoding="utf-8")
    make_bert(vocab_size=len(vocabulary)).save_pretrained(folder)
    BertTokenizerFast.from_pretrained(str(words.parent), model_max_length=64).save_pretrained(folder)
    return folder
