"""What several test files share: tiny random models, the real demo model, and stores of known tensors."""

import os
import shutil
import signal
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import layerprobe as lp
from layerprobe.models import LoadedModel
from layerprobe.sites import anatomy
from layerprobe.store.description import commit_description
from layerprobe.store.format import commit_shard
from layerprobe.store.headers import ShardHeader
from layerprobe.store.index import commit_index
from sizes import TINY

FINGERPRINT = "0" * 32

# Tiny tensors gain nothing from threads, and two runs on one machine lose by them.
torch.set_num_threads(1)


# Of a line of the summary where it goes to a file or a pipe: a name takes up to a hundred, its reason the rest.
_SUMMARY_WIDTH = 320


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Let the summary say why each test failed: of 80 columns a long name leaves none, and a log may keep no more."""
    if not terminalreporter.isatty:
        terminalreporter.config.get_terminal_writer().fullwidth = _SUMMARY_WIDTH


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest test: at the end it would run alone."""
    items.sort(key=lambda item: item.path.name != "test_kills.py")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what was compiled, before a test and after it."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session", autouse=True)
def heard_interrupts() -> None:
    """Hear SIGINT, which what a shell starts in the background ignores, and so would the commands that tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _tiny_config(**changes: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(**(TINY | changes))


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
def restored_rows() -> Iterator[None]:
    """Forget the architectures that a test registers."""
    rows = dict(anatomy._ROWS)
    yield
    anatomy._ROWS.clear()
    anatomy._ROWS.update(rows)


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
    import transformers

    folder = tmp_path_factory.mktemp("models") / "tiny"
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    vocabulary += ["the", "quick", "brown", "fox", "over", "lazy", "dog", ".", ",", "中", "文"]
    words = tmp_path_factory.mktemp("words") / "vocab.txt"
    words.write_text("\n".join(vocabulary), encoding="utf-8")
    make_bert(vocab_size=len(vocabulary)).save_pretrained(folder)
    tokenizer: Any = getattr(transformers, "BertTokenizerFast")  # noqa: B009 - made on demand, so no checker sees it
    tokenizer.from_pretrained(str(words.parent), model_max_length=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_model_folder: Path) -> LoadedModel:
    """The tiny model on the CPU; tests leave it as it was."""
    return lp.load_model(str(tiny_model_folder), "cpu")


@pytest.fixture
def texts() -> list[str]:
    """Twelve texts of different lengths, one empty, one too long, two alike."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "."]
    made = [" ".join(words[: 1 + 3 * number % 10]) for number in range(9)]
    return [*made, "", "the " * 200, made[3]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MiB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@dataclass(frozen=True)
class Written:
    """What a store holds, example by example, in the order of the input."""

    folder: Path
    rows: list[Tensor]
    ids: list[Tensor]
    pooled: Tensor
    headers: list[ShardHeader]


@pytest.fixture
def write_store(tmp_path: Path) -> Callable[..., Written]:
    """Write a store of a token site `layers.0` and a pooled one `pooler`, each unit in a shuffled batch order."""

    def write(
        units: tuple[tuple[int, ...], ...] = ((3, 0, 5), (1, 4)),
        dtype: torch.dtype = torch.float32,
        width: int = 8,
        complete: bool = True,
        pool: str | None = None,
        name: str = "store",
    ) -> Written:
        folder = tmp_path / name
        folder.mkdir()
        maker = torch.Generator().manual_seed(5)
        sites = {
            "layers.0": {"kind": "token", "dtype": str(dtype).removeprefix("torch."), "width": width},
            "pooler": {"kind": "example", "dtype": "float32", "width": width},
        }
        commit_description(folder, {"sites": sites, "fingerprint": FINGERPRINT, "pool": pool})
        rows: list[Tensor] = []
        ids: list[Tensor] = []
        vectors: list[Tensor] = []
        headers = []
        for unit, lengths in enumerate(units):
            first = len(rows)
            rows += [torch.randn(length, width, generator=maker).to(dtype) for length in lengths]
            ids += [torch.randint(100, (length,), generator=maker) for length in lengths]
            vectors += [torch.randn(width, generator=maker) for _ in lengths]
            order = torch.randperm(len(lengths), generator=maker) + first
            places = order.tolist()
            tensors = [
                ("example", order),
                ("offsets", torch.tensor([0, *(len(rows[place]) for place in places)]).cumsum(0)),
                ("input_ids", torch.cat([ids[place] for place in places])),
                ("layers.0", torch.cat([rows[place] for place in places])),
                ("pooler", torch.stack([vectors[place] for place in places])),
            ]
            header = ShardHeader(unit, len(lengths), sum(lengths), first, FINGERPRINT)
            commit_shard(folder, header, sorted(tensors, key=lambda named: -named[1].dtype.itemsize))
            headers.append(header)
        if complete:
            commit_index(folder, headers)
        return Written(folder, rows, ids, torch.stack(vectors), headers)

    return write


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; gives exit code, stdout and stderr."""
    from layerprobe.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["layerprobe", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call
