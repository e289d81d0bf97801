"""Sites of every BERT class: their names, modules, kinds and widths, and that the values are what they say."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerprobe as lp
from layerprobe.errors import ArchitectureError, SiteError
from layerprobe.sites.resolve import map_model
from sizes import TINY

TAILS = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.weights",
    "attention.context",
    "attention.out",
    "mid",
    "ffn.act",
    "ffn.out",
)
ENCODER = ["embeddings", *(f"layers.{i}{tail}" for i in range(3) for tail in (*(f".{tail}" for tail in TAILS), ""))]

# class, tail of its site list, kind and width of its logits, field of the output that equals them
HEADS = [
    ("BertForPreTraining", ["pooler", "logits"], "token", 100, "prediction_logits"),
    ("BertForMaskedLM", ["logits"], "token", 100, "logits"),
    ("BertLMHeadModel", ["logits"], "token", 100, "logits"),
    ("BertForNextSentencePrediction", ["pooler", "logits"], "example", 2, "logits"),
    ("BertForSequenceClassification", ["pooler", "logits"], "example", 5, "logits"),
    ("BertForTokenClassification", ["logits"], "token", 5, "logits"),
    ("BertForQuestionAnswering", ["logits"], "token", 2, None),
    ("BertForMultipleChoice", ["pooler", "logits"], "example", 1, None),
]


def _make_head(make_bert: Any, class_name: str) -> Any:
    changes: dict[str, Any] = {"is_decoder": True} if class_name == "BertLMHeadModel" else {}
    num_labels = 2 if class_name == "BertForQuestionAnswering" else 5
    return make_bert(class_name, num_labels=num_labels, **changes)


def test_heads_are_all_that_transformers_has() -> None:
    import transformers

    classes = {name for name in dir(transformers) if name.startswith(("BertFor", "BertLMHead"))}
    assert classes == {name for name, *_ in HEADS}


def test_base_model_has_every_site_with_its_width(tiny_bert: Any) -> None:
    table = lp.sites(tiny_bert)
    assert [site.name for site in table] == [*ENCODER, "pooler"]
    widths = {site.name: site.width for site in table}
    assert widths.pop("layers.0.ffn.act") == widths.pop("layers.1.ffn.act") == widths.pop("layers.2.ffn.act") == 64
    weights = [name for name in ENCODER if name.endswith(".weights")]
    assert {widths.pop(name) for name in weights} == {4}
    assert set(widths.values()) == {32}
    kinds = {**dict.fromkeys(ENCODER, "token"), **dict.fromkeys(weights, "attention"), "pooler": "example"}
    assert {site.name: site.kind for site in table} == kinds


def test_base_model_without_a_pooler_has_no_pooler_site(tiny_bert: Any) -> None:
    model = type(tiny_bert)(tiny_bert.config, add_pooling_layer=False)
    assert [site.name for site in lp.sites(model)] == ENCODER
    with pytest.raises(SiteError, match=r"no site 'pooler' in BertModel\."):
        lp.sites(model, "pooler")


@pytest.mark.parametrize(("class_name", "tail", "kind", "width", "field"), HEADS)
def test_every_head_model_has_the_base_sites_and_its_own(
    make_bert: Any, batch: dict[str, Tensor], class_name: str, tail: list[str], kind: str, width: int, field: str | None
) -> None:
    model = _make_head(make_bert, class_name)
    table = lp.sites(model)
    assert [site.name for site in table] == [*ENCODER, *tail]
    assert table[1].module == "bert.encoder.layer.0.attention.self.query"
    assert (table[-1].kind, table[-1].width) == (kind, width)

    given = {name: value[:, None] for name, value in batch.items()} if "Choice" in class_name else batch
    with torch.no_grad():
        expected = model(**given, output_hidden_states=True)
        with lp.Probe(model, ["*", "layers.*"]) as probe:
            output = model(**given)
    made: Any = probe.calls[0]
    assert list(made) == ["embeddings", "layers.0", "layers.1", "layers.2", *tail]
    for name, hidden in zip(list(made)[:4], expected.hidden_states, strict=True):
        assert torch.equal(made[name], hidden)
    for name in output:
        if isinstance(output[name], Tensor):
            assert torch.equal(output[name], expected[name])
    if "pooler" in tail:
        assert torch.equal(probe["pooler"], model.bert.pooler(probe["layers.-1"]))
    if field is not None:
        assert torch.equal(probe["logits"], output[field])
    assert probe["logits"].shape[-1] == width


def test_logits_of_question_answering_are_its_two_outputs(make_bert: Any, batch: dict[str, Tensor]) -> None:
    model = _make_head(make_bert, "BertForQuestionAnswering")
    with lp.Probe(model, "logits") as probe:
        output = model(**batch)
    assert torch.equal(probe["logits"], torch.stack([output.start_logits, output.end_logits], dim=-1))


def test_logits_of_multiple_choice_are_one_per_choice(make_bert: Any, batch: dict[str, Tensor]) -> None:
    model = _make_head(make_bert, "BertForMultipleChoice")
    with lp.Probe(model, "logits") as probe:
        output = model(**{name: value[None] for name, value in batch.items()})
    assert torch.equal(probe["logits"].view(1, 3), output.logits)


def test_module_sites_name_any_module(make_bert: Any, batch: dict[str, Tensor]) -> None:
    model = make_bert("BertForMaskedLM")
    asked = ["module:cls.predictions.transform", "module:bert.encoder.layer.1.intermediate.dense:input"]
    table = lp.sites(
        model, [*asked, "module:bert.embeddings.word_embeddings", "module:bert.embeddings.LayerNorm:input"]
    )
    assert [(site.name, site.kind, site.width) for site in table[:2]] == [
        (asked[0], "unknown", None),
        (asked[1], "unknown", 32),
    ]
    assert [site.width for site in table[2:]] == [32, 32]
    assert lp.sites(model, "module:bert.embeddings.word_embeddings:input")[0].width is None
    with lp.Probe(model, [*asked, "layers.1.mid"]) as probe:
        output = model(**batch)
    assert torch.equal(probe[asked[1]], probe["layers.1.mid"])
    assert torch.equal(model.cls.predictions.decoder(probe[asked[0]]), output.logits)


def test_table_prints_every_site_with_its_module_and_width(tiny_bert: Any) -> None:
    lines = str(lp.sites(tiny_bert)).splitlines()
    assert lines[0].split() == ["site", "module", "kind", "width"]
    assert len(lines) == 2 + len(ENCODER) + 1
    row = next(line for line in lines if line.startswith("layers.1.ffn.act"))
    assert row.split() == ["layers.1.ffn.act", "encoder.layer.1.output.dense", "(input)", "token", "64"]
    assert repr(lp.sites(tiny_bert)) == str(lp.sites(tiny_bert))


def test_table_is_a_sequence(tiny_bert: Any) -> None:
    table = lp.sites(tiny_bert)
    assert len(table) == len(list(table)) == 32
    assert table[0].name == "embeddings"
    assert [site.name for site in table[-2:]] == ["layers.2", "pooler"]
    assert table[0] in table


def test_owner_in_messages_is_class_and_checkpoint(tiny_bert: Any) -> None:
    tiny_bert.config._name_or_path = "some/model"
    with pytest.raises(SiteError, match=r"no site 'layers\.3' in BertModel 'some/model': layers are 0 to 2\."):
        lp.sites(tiny_bert, "layers.3")


def test_demo_model_has_six_layers(demo: Any) -> None:
    table = lp.sites(demo.model, ["layers.*", "layers.-1.ffn.act"])
    assert [site.name for site in table] == [*(f"layers.{i}" for i in range(5)), "layers.5.ffn.act", "layers.5"]
    assert [site.width for site in table] == [384] * 5 + [1536, 384]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential()])
def test_model_that_is_not_of_transformers_is_refused(model: nn.Module) -> None:
    with pytest.raises(ArchitectureError, match=r"is not a Hugging Face model: it has no base_model with a config\."):
        lp.sites(model)


def test_architecture_without_a_row_has_the_layers_that_its_structure_shows() -> None:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=8)).eval()
    assert [site.name for site in lp.sites(model)] == ["layers.0", "layers.1"]
    with pytest.raises(SiteError, match=r"no site 'layers\.0\.mid' in GPT2Model"):
        lp.sites(model, "layers.0.mid")
    with lp.Probe(model, "layers.0") as probe:
        output = model(input_ids=torch.arange(5)[None], output_hidden_states=True)
    assert torch.equal(probe["layers.0"], output.hidden_states[1])


@pytest.mark.parametrize(("name", "has_embeddings"), [("RemBert", False), ("Luke", True), ("FNet", True)])
def test_embeddings_without_a_row_are_listed_where_nothing_follows_them(name: str, has_embeddings: bool) -> None:
    """RemBERT widens them after the module of that name, Luke has others beside it, FNet widens them within it."""
    import transformers

    sizes = TINY | {"input_embedding_size": 16} if name == "RemBert" else TINY
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    with torch.no_grad(), lp.Probe(model, [site.name for site in lp.sites(model)]) as probe:
        hidden = model(input_ids=torch.arange(3, 8)[None], output_hidden_states=True).hidden_states
    assert ("embeddings" in probe) == has_embeddings
    for site, states in zip(probe, hidden if has_embeddings else hidden[1:], strict=True):
        assert torch.equal(probe[site], states)


def test_architecture_without_a_row_or_a_structure_is_refused() -> None:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=8))
    model.config.n_layer = 5
    with pytest.raises(ArchitectureError, match=r"(?s)no row for architecture .gpt2.*register_architecture"):
        lp.sites(model)


def test_stages_of_widths_of_their_own_are_no_layers() -> None:
    from transformers import SegformerConfig, SegformerModel

    sizes: Any = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_attention_heads": [1, 1], "num_encoder_blocks": 2}
    model = SegformerModel(SegformerConfig(**sizes, sr_ratios=[2, 1], strides=[4, 2], patch_sizes=[7, 3]))
    model.config.num_hidden_layers = 2
    with pytest.raises(ArchitectureError, match=r"no row for architecture .segformer."):
        lp.sites(model)


def test_heads_that_differ_from_layer_to_layer_are_not_asked_for() -> None:
    from transformers import GPT2Config, GPT2Model

    class Uneven(GPT2Config):
        def __getattribute__(self, name: str) -> Any:
            if name == "num_attention_heads":  # as transformers does where its value is of a single layer
                raise ValueError("it may vary across layers")
            return super().__getattribute__(name)

    model = GPT2Model(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=8))
    model.config.__class__ = Uneven
    assert [site.name for site in lp.sites(model)] == ["layers.0", "layers.1"]


def test_architecture_with_a_final_norm_has_the_site(make_bert: Any, batch: Any, monkeypatch: Any) -> None:
    from dataclasses import replace

    from layerprobe.sites import anatomy

    model = make_bert(add_cross_attention=False)
    model.final = nn.LayerNorm(32)
    monkeypatch.setitem(anatomy._ROWS, "bert", replace(anatomy.find_anatomy("bert"), norm="final"))
    assert [(site.name, site.width) for site in lp.sites(model)][-2:] == [("norm", 32), ("pooler", 32)]


def test_map_finds_the_base_inside_a_head_model(make_bert: Any) -> None:
    model = make_bert("BertForTokenClassification")
    mapped = map_model(model)
    assert mapped.base is model.bert
    assert mapped.num_layers == {"layers": 3}


def test_head_whose_name_is_not_in_the_row_has_no_logits(make_bert: Any) -> None:
    model = make_bert("BertForSequenceClassification")
    model.own_head = model.classifier
    del model.classifier
    assert [site.name for site in lp.sites(model)] == [*ENCODER, "pooler"]


def test_head_without_a_linear_has_no_known_width(make_bert: Any) -> None:
    model = make_bert("BertForSequenceClassification")
    model.classifier = nn.Identity()
    assert lp.sites(model, "logits")[0].width is None
