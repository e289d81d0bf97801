"""From text to class and back: the untrained baseline, what is kept, what it predicts, the profile without labels."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from layerprobe.analysis.features import read_site
from layerprobe.analysis.tasks import make_task
from layerprobe.errors import FormatError, InputError, ModelError, OptionError, StoreError
from layerprobe.models import LoadedModel
from layerprobe.store.reader import Store

SUBJECTS = ("the fox", "the dog", "a lazy dog", "a quick fox", "the brown fox", "the brown dog")
ENDS = ("jumps", "jumps over the dog", "over the fox jumps", "quick", "lazy .", "jumps quick .")


def make_records() -> list[dict[str, Any]]:
    records = []
    for place, subject in enumerate(SUBJECTS):
        for end in ENDS:
            text = f"{subject} {end}"
            start = len(subject) - 3
            label = "fox" if place in (0, 3, 4) else "dog"
            records.append({"text": text, "label": label, "start": start, "end": start + 3})
    return records


@pytest.fixture(scope="module")
def store(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return lp.extract(tiny, make_records(), tmp_path_factory.mktemp("said") / "store")


@pytest.mark.parametrize("pool", ["mean", "cls", "max", "last"])
def test_what_is_predicted_from_text_is_what_the_probe_says_of_the_store(
    store: Store, tiny: LoadedModel, tmp_path: Path, pool: str
) -> None:
    found = lp.classify(store, pool=pool, sites="layers.*")
    classifier = lp.load_classifier(found.probe.save(tmp_path / "kept"), tiny)
    probe = found.probe
    task = make_task(store, "label")
    vectors = probe.feature.combine([read_site(store, site, task, pool) for site in probe.feature.sites])
    wanted = [probe.classes[number] for number in probe.linear.predict(vectors)]
    assert classifier.predict([record["text"] for record in make_records()]) == wanted
    assert classifier.classes == ("dog", "fox") and classifier.predict([]) == []


@pytest.mark.parametrize("kind", ["joined", "averaged", "mix"])
def test_combined_layers_are_kept_and_predict_alike(store: Store, tiny: LoadedModel, tmp_path: Path, kind: str) -> None:
    from layerprobe.analysis.features import Feature
    from layerprobe.analysis.probing import fit_probe

    factors = {"joined": None, "averaged": (0.5, 0.5), "mix": (0.3, 1.7)}[kind]
    feature = Feature(kind, ("layers.0", "layers.1"), factors)
    task = make_task(store, "label")
    vectors = feature.combine([read_site(store, site, task, "mean") for site in feature.sites])
    linear, _ = fit_probe(vectors, task.labels, 2, 0.1)
    kept = replace(lp.classify(store, sites="layers.0").probe, feature=feature, linear=linear)
    classifier = lp.load_classifier(kept.save(tmp_path / "kept"), tiny)
    wanted = [kept.classes[number] for number in linear.predict(vectors)]
    assert classifier.predict([record["text"] for record in make_records()]) == wanted


def test_only_the_layers_that_are_needed_run(store: Store, tiny: LoadedModel, tmp_path: Path) -> None:
    classifier = lp.load_classifier(lp.classify(store, sites="layers.0").probe.save(tmp_path / "kept"), tiny)
    ran: list[int] = []
    network: Any = tiny.model
    hooks = [
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(network.encoder.layer)
    ]
    classifier.predict(["the fox"])
    for hook in hooks:
        hook.remove()
    assert ran == [0]


def test_spans_are_the_mean_of_their_pieces_and_are_predicted_from_text(
    store: Store, tiny: LoadedModel, tmp_path: Path
) -> None:
    records = make_records()
    task = make_task(store, "label", span=("start", "end"))
    values = read_site(store, "layers.0", task, None)
    for place in (0, 17):
        text, record = records[place]["text"], records[place]
        offsets = tiny.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        rows = [row for row, (first, last) in enumerate(offsets) if first < record["end"] and last > record["start"]]
        wanted = store["layers.0"][place][rows].mean(0)
        assert torch.allclose(torch.from_numpy(values[place]), wanted, atol=1e-6)  # sums in another order
    found = lp.classify(store, span=("start", "end"), sites="layers.0")
    assert found.task.kind == "spans"
    classifier = lp.load_classifier(found.probe.save(tmp_path / "kept"), tiny)
    spans = [(record["start"], record["end"]) for record in records]
    wanted = [found.probe.classes[number] for number in found.probe.linear.predict(values)]
    assert classifier.predict([record["text"] for record in records], spans) == wanted
    with pytest.raises(OptionError, match=r"this classifier is of spans. Give a pair"):
        classifier.predict(["the fox"])
    with pytest.raises(OptionError, match="1 span for 2 texts"):
        classifier.predict(["the fox", "the dog"], [(0, 3)])
    with pytest.raises(InputError, match="characters 50 to 53 of text 0 are in no token"):
        classifier.predict(["the fox"], [(50, 53)])


def test_spans_that_cannot_be_are_refused(tiny: LoadedModel, tmp_path: Path) -> None:
    records = [{**record, "far": 900, "further": 903, "back": 2, "to": 1} for record in make_records()]
    made = lp.extract(tiny, records, tmp_path / "store", sites="layers.0")
    with pytest.raises(InputError, match="characters 900 to 903 of example 0 are in no token"):
        lp.classify(made, span=("far", "further"))
    with pytest.raises(InputError, match="example 0 has 2 to 1"):
        lp.classify(made, span=("back", "to"))


def test_offsets_of_a_cut_text_are_those_of_its_tokens(tiny: LoadedModel, tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    made = lp.extract(tiny, [text, ""], tmp_path / "store", sites="layers.0", max_length=6)
    offsets = made.token_offsets(0)
    assert [text[first:last] for first, last in offsets] == ["", "the", "quick", "brown", "fox", ""]
    assert made.token_offsets(1) == [(0, 0), (0, 0)]


def test_tokens_are_predicted_one_by_one(store: Store, tiny: LoadedModel, tmp_path: Path) -> None:
    ids = [store.input_ids(place).tolist() for place in range(len(store))]
    labels = [[token % 2 for token in one] for one in ids]
    found = lp.classify(store, labels, sites="layers.0")
    classifier = lp.load_classifier(found.probe.save(tmp_path / "kept"), tiny)
    said = classifier.predict([record["text"] for record in make_records()][:3])
    assert [len(one) for one in said] == [len(one) for one in ids[:3]]
    values = read_site(store, "layers.0", make_task(store, labels), None)
    wanted = found.probe.linear.predict(values)[: len(ids[0])]
    assert said[0] == [found.probe.classes[number] for number in wanted]


def test_an_untrained_model_is_the_architecture_with_other_weights(
    store: Store, tiny: LoadedModel, tmp_path: Path
) -> None:
    before = torch.random.get_rng_state()
    one, two, other = (
        lp.extract_untrained(store, tmp_path / name, model=tiny, seed=seed)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.sites == store.sites and len(one) == len(store)
    assert all(torch.equal(one.input_ids(place), store.input_ids(place)) for place in range(len(store)))
    assert torch.equal(one["layers.1"][3], two["layers.1"][3])
    assert not torch.equal(one["layers.1"][3], other["layers.1"][3])
    assert not torch.equal(other["layers.1"][3], store["layers.1"][3])


def test_the_untrained_baseline_is_made_where_it_is_asked(store: Store, tiny: LoadedModel) -> None:
    found = lp.classify(
        store, untrained=lambda store, to, **options: lp.extract_untrained(store, to, model=tiny, **options)
    )
    assert set(found.baselines["untrained"].sites or {}) == set(store.sites)
    assert "random weights" in found.baselines["untrained"].detail


def test_another_model_is_refused(store: Store, tmp_path: Path) -> None:
    kept = lp.classify(store, sites="layers.0").probe.save(tmp_path / "kept")
    with pytest.raises(ModelError, match="was made with another model"):
        lp.load_classifier(kept, "demo")
    with pytest.raises(ModelError, match="was made with another model"):
        lp.extract_untrained(store, tmp_path / "untrained", model="demo")


def test_a_model_that_tells_of_no_tokenizer_is_refused(store: Store, tiny: LoadedModel, tmp_path: Path) -> None:
    config: Any = copy.deepcopy(tiny.model.config)
    config._name_or_path = ""
    nameless: Any = type(tiny.model)
    with pytest.raises(ModelError, match="does not say which tokenizer it was trained with"):
        lp.extract_untrained(store, tmp_path / "untrained", model=nameless(config))


@pytest.mark.parametrize("device", ["cpu", 0])
def test_a_device_is_refused_where_no_model_is_named(
    device: str | int, store: Store, tiny: LoadedModel, tmp_path: Path
) -> None:
    kept = lp.classify(store, sites="layers.0").probe.save(tmp_path / "kept")
    calls: list[Callable[[], object]] = [
        lambda: lp.load_classifier(kept, tiny, device=device),
        lambda: lp.extract_untrained(store, tmp_path / "untrained", model=tiny.model, device=device),
        lambda: lp.depth_profile(store, model=tiny, device=device),
    ]
    for call in calls:
        with pytest.raises(OptionError, match="device goes with a model's name"):
            call()
    assert not (tmp_path / "untrained").exists()


def test_folders_that_hold_no_classifier_are_refused(store: Store, tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no classifier in"):
        lp.load_classifier(tmp_path)
    kept = lp.classify(store, sites="layers.0").probe.save(tmp_path / "kept")
    said = (kept / "probe.json").read_text()
    for spoilt in (said[:-20], said.replace("layerprobe-probe/1", "layerprobe-probe/9"), said.replace('"dog",', "")):
        (kept / "probe.json").write_text(spoilt)
        with pytest.raises(FormatError, match="is not a whole classifier"):
            lp.load_classifier(kept, tiny)
    (kept / "probe.json").write_text(said)
    data = (kept / "probe.safetensors").read_bytes()
    (kept / "probe.safetensors").write_bytes(data[:-8])
    with pytest.raises(FormatError, match="is not a whole classifier"):
        lp.load_classifier(kept, tiny)
    (kept / "probe.safetensors").unlink()
    (tmp_path / "elsewhere").write_bytes(data)
    (kept / "probe.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=r"probe\.safetensors"):
        lp.load_classifier(kept, tiny)


def test_a_text_is_cut_where_the_model_ends(make_bert: Any, tiny: LoadedModel, tmp_path: Path) -> None:
    """The positions of RoBERTa's kin begin behind the padding id: its table has two more than a text may have."""
    settings = {"vocab_size": len(tiny.tokenizer), "max_position_embeddings": 20, "pad_token_id": 1}
    model = replace(tiny, model=make_bert("RobertaModel", **settings))
    store = lp.extract(model, make_records(), tmp_path / "acts", sites="layers.0")
    probe = lp.classify(store).probe
    classifier = lp.load_classifier(replace(probe, max_length=None).save(tmp_path / "kept"), model)
    assert classifier.predict(["the quick brown fox jumps over the lazy dog " * 9])[0] in ("dog", "fox")


def test_one_text_is_no_list_of_texts(store: Store, tiny: LoadedModel, tmp_path: Path) -> None:
    classifier = lp.load_classifier(lp.classify(store, sites="layers.0").probe.save(tmp_path / "kept"), tiny)
    with pytest.raises(InputError, match="Give a list of texts"):
        classifier.predict("the fox")
    with pytest.raises(InputError, match=r"predict: text 1 is dict, not a text"):
        classifier.predict(["the fox", {"text": "the dog"}])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"dict is no input: give a list of texts\.$"):
        classifier.predict({"text": "the dog"})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"this classifier is of examples. Leave spans out"):
        classifier.predict(["the fox"], [(0, 3)])


def test_a_profile_of_the_last_four_layers_is_drawn(make_bert: Any, tiny: LoadedModel, tmp_path: Path) -> None:
    ends = (".", " the dog .", " the quick brown fox .", " a fox", " jumps over", " the lazy fox jumps over a dog")
    begins = [f"{who} {what}" for who in ("the fox", "a dog", "the lazy dog") for what in ("jumps", "over")]
    texts = [f"{begin}{end}" for begin in begins for end in ends]
    model = LoadedModel("", make_bert("BertModel", vocab_size=len(tiny.tokenizer), num_hidden_layers=4), tiny.tokenizer)
    store = lp.extract(model, texts, tmp_path / "acts", sites="layers.*", progress=False)
    profile = lp.depth_profile(store, pool="last4", model=model)
    axes = profile.plot(tmp_path / "last.png").axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["last4:joined", "last4:averaged"]
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in axes.get_lines()}
    assert drawn == {name: [site.accuracy for site in found.sites] for name, found in profile.tasks.items()}
    assert (tmp_path / "last.png").read_bytes()[:4] == b"\x89PNG"
    profile.tasks["length"].plot(tmp_path / "task.png")


def test_a_profile_leaves_out_attention_weights_that_are_stored_too(
    store: Store, tiny: LoadedModel, tmp_path: Path
) -> None:
    texts = [store.record(ordinal)["text"] for ordinal in store.ordinals()]
    sites = ["embeddings", "layers.*", "layers.0.attention.weights"]
    both = lp.extract(tiny, texts, tmp_path / "both", sites=sites, progress=False)
    of_both, of_rows = (lp.depth_profile(one, model=tiny) for one in (both, store))
    assert of_both.table() == of_rows.table()


def test_a_profile_makes_its_labels_of_the_texts(store: Store, tiny: LoadedModel, tmp_path: Path) -> None:
    profile = lp.depth_profile(store, model=tiny)
    assert set(profile.tasks) >= {"length", "order"}
    words = [name for name in profile.tasks if name.startswith("word: ")]
    assert words and profile.tasks[words[0]].task.classes == (False, True)
    assert profile.tasks["order"].task.classes == ("as it was", "swapped")
    assert "order" in profile.table().splitlines()[0]
    profile.plot(tmp_path / "profile.svg")
    assert profile.to_csv(tmp_path / "p.csv").read_text().startswith("site,length,")
    assert '"order"' in profile.to_json(tmp_path / "p.json").read_text()
    with pytest.raises(InputError, match="it has 3 texts; 30 are the least"):
        lp.depth_profile(lp.extract(tiny, ["the fox", "a dog", "the"], tmp_path / "few", sites="layers.0"))
