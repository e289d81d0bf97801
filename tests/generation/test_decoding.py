"""Generation from stored states, against the same decoder behind its own encoder and against a loop without a cache."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from layerprobe.errors import InputError, MissingExample, ModelError, OptionError, SiteError
from layerprobe.models import LoadedModel

START, END, PAD = 2, 3, 0


def make_decoder(tiny: LoadedModel, **changes: Any) -> Any:
    """Make a random decoder whose words depend on its context."""
    import transformers

    torch.manual_seed(4)
    model: Any = tiny.model
    own = model.config.to_dict() | {"is_decoder": True, "add_cross_attention": True, "initializer_range": 0.4}
    config: Any = transformers.BertConfig(**(own | {"bos_token_id": None, "eos_token_id": None} | changes))
    return transformers.BertLMHeadModel(config).eval()


@pytest.fixture(scope="module")
def bert2bert(tiny: LoadedModel) -> Any:
    import transformers

    encoder: Any = tiny.model
    model: Any = transformers.EncoderDecoderModel(encoder=encoder, decoder=make_decoder(tiny)).eval()
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = START, END, PAD
    return model


def extract(tiny: LoadedModel, texts: list[str], to: Path, **changes: Any) -> Any:
    return lp.extract(tiny, texts, to, **({"sites": "layers.*", "progress": False} | changes))


def live(model: Any, tiny: LoadedModel, texts: list[str], **options: Any) -> list[list[int]]:
    """Generate from the texts, all in one batch, and cut each sequence behind its end."""
    batch = tiny.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
    made = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)[:, 1:].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in made]


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"num_beams": 4}, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}],
    ids=["greedy", "beams", "several"],
)
@pytest.mark.parametrize("batch_size", [2, 16])
def test_float32_states_of_the_last_layer_give_the_tokens_of_the_live_encoder(
    bert2bert: Any, tiny: LoadedModel, texts: list[str], tmp_path: Path, options: dict[str, Any], batch_size: int
) -> None:
    store = extract(tiny, texts, tmp_path / "acts")
    options = options | {"max_new_tokens": 12}
    found = lp.generate(store, bert2bert, layer=-1, batch_size=batch_size, **options)
    wanted = live(bert2bert, tiny, texts, **options)
    assert [list(one.ids) for one in found] == wanted
    assert len({tuple(row) for row in wanted}) > 4
    copies = options.get("num_return_sequences", 1)
    assert [one.example for one in found] == [number for number in range(len(texts)) for _ in range(copies)]


def test_a_decoder_alone_gives_the_tokens_of_a_loop_without_a_cache(
    tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    store = extract(tiny, texts, tmp_path / "acts")
    decoder = make_decoder(tiny)
    found = lp.generate(store, decoder, layer=1, examples=[4, 10, 2], tokenizer=tiny.tokenizer, max_new_tokens=10)
    uncached = lp.generate(
        store, decoder, layer=1, examples=[4, 10, 2], tokenizer=tiny.tokenizer, max_new_tokens=10, use_cache=False
    )
    assert [one.ids for one in found] == [one.ids for one in uncached]
    for one in found:
        # each example alone, so with no padding at all
        context = store["layers.1"][one.example].float()[None]
        ids = [tiny.tokenizer.cls_token_id]
        with torch.no_grad():
            while len(ids) < 11 and ids[-1] != tiny.tokenizer.sep_token_id:
                logits = decoder(torch.tensor([ids]), encoder_hidden_states=context, use_cache=False).logits
                ids.append(int(logits[0, -1].argmax()))
        assert list(one.ids) == ids[1:]
        assert one.text == tiny.tokenizer.decode(ids[1:], skip_special_tokens=True)


def test_beams_of_a_decoder_alone_are_those_of_the_whole_model(
    bert2bert: Any, tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    store = extract(tiny, texts, tmp_path / "acts")
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 8, "eos_token_id": END, "pad_token_id": PAD}
    found = lp.generate(store, bert2bert.decoder, examples=slice(5), bos_token_id=START, **options)
    assert [list(one.ids) for one in found] == live(bert2bert, tiny, texts[:5], **options)


def test_float16_states_are_read_in_the_dtype_of_the_decoder(
    bert2bert: Any, tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    store = extract(tiny, texts, tmp_path / "acts", dtype="float16")
    found = lp.generate(store, bert2bert, max_new_tokens=6)
    same = sum(
        list(one.ids) == row for one, row in zip(found, live(bert2bert, tiny, texts, max_new_tokens=6), strict=True)
    )
    assert same >= len(texts) // 2


def test_draws_are_those_of_the_seed_and_leave_the_callers_alone(
    bert2bert: Any, tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    store = extract(tiny, texts, tmp_path / "acts")

    def draw(seed: int) -> list[tuple[int, ...]]:
        found = lp.generate(store, bert2bert, seed=seed, do_sample=True, max_new_tokens=6)
        return [one.ids for one in found]

    torch.manual_seed(9)
    wanted = torch.rand(3)
    torch.manual_seed(9)
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.rand(3), wanted)


def test_a_model_is_left_as_it_was(bert2bert: Any, tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    store = extract(tiny, texts, tmp_path / "acts")
    before, said = (
        {key: value.clone() for key, value in bert2bert.state_dict().items()},
        bert2bert.generation_config.to_dict(),
    )
    bert2bert.decoder.train()
    try:
        first = lp.generate(store, bert2bert, max_new_tokens=4)
        assert bert2bert.decoder.training
    finally:
        bert2bert.eval()
    assert first == lp.generate(store, bert2bert, max_new_tokens=4)
    assert all(torch.equal(value, before[key]) for key, value in bert2bert.state_dict().items())
    assert bert2bert.generation_config.to_dict() == said


def test_what_cannot_be_is_one_clear_error(bert2bert: Any, tiny: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    store = extract(tiny, texts, tmp_path / "acts")
    with pytest.raises(OptionError, match="BertModel: it does not generate from states"):
        lp.generate(store, tiny)
    with pytest.raises(OptionError, match="no option 'max_new_token' of generate"):
        lp.generate(store, bert2bert, max_new_token=3)
    with pytest.raises(OptionError, match="output_scores: changes what transformers gives back"):
        lp.generate(store, bert2bert, output_scores=True)
    with pytest.raises(OptionError, match=r"nothing says what a sequence starts with\. Pass bos_token_id="):
        lp.generate(store, make_decoder(tiny))
    with pytest.raises(OptionError, match="its states are 32 wide, BertLMHeadModel reads 64"):
        lp.generate(store, make_decoder(tiny, hidden_size=64), bos_token_id=START)
    with pytest.raises(OptionError, match=r"generate with EncoderDecoderModel: .*num_return_sequences"):
        lp.generate(store, bert2bert, num_return_sequences=3, do_sample=False)
    with pytest.raises(ModelError, match="beyond its tables"):
        lp.generate(store, bert2bert, examples=0, max_new_tokens=4, decoder_start_token_id=200)
    options: dict[str, Any]
    for options, message in (
        ({"num_beams": 0}, "num_beams is 0: it must be a whole number of at least 1"),
        ({"num_beams": -1}, "num_beams is -1"),
        ({"num_beams": 1.5}, r"num_beams is 1\.5"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"top_p": 0.0, "do_sample": True}, r"top_p is 0\.0: it is a share of the probability"),
        ({"top_p": 1.5, "do_sample": True}, r"top_p is 1\.5"),
        ({"top_p": "0.5", "do_sample": True}, "top_p is '0.5'"),
    ):
        with pytest.raises(OptionError, match=message):
            lp.generate(store, bert2bert, **options)
    with pytest.raises(OptionError, match="max_new_tokens is 70: EncoderDecoderModel has 64 positions"):
        lp.generate(store, bert2bert, max_new_tokens=70)
    with pytest.raises(OptionError, match=r"max_length is 2\.5: it must be a whole number"):
        lp.generate(store, bert2bert, max_length=2.5)
    with pytest.raises(OptionError, match="device goes with a model's name"):
        lp.generate(store, bert2bert, device="cpu")
    with pytest.raises(OptionError, match="batch_size is 0"):
        lp.generate(store, bert2bert, batch_size=0)
    with pytest.raises(OptionError, match=r"examples=\[\] of .*: none is meant"):
        lp.generate(store, bert2bert, examples=[])
    with pytest.raises(OptionError, match=r"examples=\[0.5\]: they are ordinals"):
        lp.generate(store, bert2bert, examples=[0.5])
    with pytest.raises(MissingExample):
        lp.generate(store, bert2bert, examples=99)
    with pytest.raises(SiteError, match="layers are 0 to 2"):
        lp.generate(store, bert2bert, layer=3)
    pooled = extract(tiny, texts, tmp_path / "pooled", pool="mean")
    extract(tiny, texts, tmp_path / "begun")
    for file in ("index.json", "shard-000000.safetensors"):
        (tmp_path / "begun" / file).unlink()
    with pytest.raises(InputError, match=r"a generation from .*begun: it has no examples\. Extract some first"):
        lp.generate(tmp_path / "begun", bert2bert)
    with pytest.raises(OptionError, match="it holds one vector per example"):
        lp.generate(pooled, bert2bert)


def test_the_result_is_a_table_a_csv_and_a_json(
    bert2bert: Any, tiny: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    store = extract(tiny, texts, tmp_path / "acts")
    found = lp.generate(store, bert2bert, examples=[-1, 0], tokenizer=tiny.tokenizer, max_new_tokens=4)
    assert [one.example for one in found] == [11, 0] and found.site == "layers.2"
    assert found.table().splitlines()[0].split() == ["example", "tokens", "from", "layers.2"]
    written = json.loads(found.to_json(tmp_path / "made.json").read_text())
    assert [one["text"] for one in written["sequences"]] == found.texts
    lines = found.to_csv(tmp_path / "made.csv").read_text().splitlines()
    assert lines[0] == "example,text,ids" and lines[1].startswith("11,")
