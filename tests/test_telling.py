"""What is said on stderr: it comes through where that takes it, and stops nothing where it does not."""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM

import layerprobe as lp
from layerprobe import telling
from layerprobe.models import LoadedModel
from layerprobe.telling import Stderr, find_stderr, make_bar, say
from sizes import TINY


def make_broken(kind: str) -> Any:
    """Give a stream that takes nothing: a pipe without a reader, a closed file, none at all."""
    if kind == "none":
        return None
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w", buffering=1)  # noqa: SIM115 - closed by the test
    if kind == "closed":
        stream.close()
    return stream


@pytest.mark.parametrize("kind", ["pipe", "closed", "none"])
def test_a_stderr_that_takes_nothing_ends_no_run(
    kind: str, tiny: LoadedModel, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "_LOG_INTERVAL_S", 0.0)
    whole = lp.extract(tiny, texts, "memory://told")
    stream = make_broken(kind)
    monkeypatch.setattr(sys, "stderr", stream)
    store = lp.extract(tiny, texts, "memory://untold", progress=True)
    lp.extract(tiny, texts, lp.Moments(), progress=True)
    assert lp.verify("memory://untold", progress=True).ok
    lp.export(store, tmp_path / "out.npz", progress=True)
    lp.audit("memory://untold", tiny, progress=True)
    lp.lens(tiny.model, store, progress=True)
    filler = BertForMaskedLM(BertConfig(**TINY)).eval()
    one, other = ({"input_ids": torch.tensor([[2, 7, 9, 3]])}, {"input_ids": torch.tensor([[2, 7, 8, 3]])})
    lp.patching(filler, one, other, lambda output: output.logits[:, 1, 5], "layers.0", progress=True)
    say("nobody hears it")
    monkeypatch.undo()
    with suppress(AttributeError, BrokenPipeError):
        stream.close()
    assert store.is_complete and len(store) == len(whole)


@pytest.mark.parametrize("is_own", [True, False], ids=["own", "caller's"])
def test_lines_stand_above_the_bars_of_the_same_stream(is_own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    file: Any = find_stderr() if is_own else written  # as a loop of the caller's, around runs, has its bar
    with tqdm(total=2, file=file, leave=False, mininterval=0) as bar:
        bar.update()
        before = len(written.getvalue())
        say("the disk is full")
    # the bar is wiped out before the line, and drawn anew after it
    assert written.getvalue()[before:].lstrip("\r ").startswith("layerprobe: the disk is full\n\r")


def test_what_a_stream_has_more_of_is_there() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    assert find_stderr() == Stderr(sys.stderr) != Stderr(stream)
    assert Stderr(stream).encoding == "utf-8"
    assert not Stderr(stream).isatty() and not Stderr(None).isatty()


@pytest.mark.parametrize("kind", ["pipe", "closed", "none"])
@pytest.mark.parametrize("progress", [None, True])
def test_a_stderr_that_takes_nothing_ends_no_sweep(
    kind: str, progress: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = make_broken(kind)
    monkeypatch.setattr(sys, "stderr", stream)
    with make_bar(2, "rows", progress) as bar:
        bar.update()
    monkeypatch.undo()
    with suppress(AttributeError, BrokenPipeError):
        stream.close()
    assert bar.total == 2


class Terminal(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("progress", [True, False, None])
def test_a_bar_is_shown_as_asked_and_else_only_on_a_terminal(
    progress: bool | None, is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal(is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(telling, "_UNASKED_DELAY_S", 0.0)
    assert list(telling.go_through([3, 4], "rows", progress, "rows")) == [3, 4]
    assert bool(stream.getvalue()) is (is_terminal if progress is None else progress)
