"""What a benchmark runs: which model, on which device, in which precision; the demo on the CPU unless it is asked for.

Models beside the demo have random weights and the demo's tokenizer, so that no network is needed. What is found of
another model or device goes into a results file of its own name. Hides where models come from, how one waits for a
GPU, and how fast one gives bytes back. Must never know of rivals or tables.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

import layerprobe as lp
from layerprobe.extract.forward import find_precision, resolve_precision, running
from layerprobe.models import LoadedModel, find_demo_model, load_tokenizer

__all__ = [
    "DEMO",
    "NARROW",
    "PRECISIONS",
    "Subject",
    "add_subject_options",
    "copy_to_host",
    "find_busy_s",
    "prepare_copies",
    "read_subject",
    "refuse",
    "wait_for_model",
]

DEMO, NARROW = "demo", "narrow"
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
_CONFIGS: dict[str, dict[str, Any]] = {
    NARROW: {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 512},
    "bert-base": {},
    "bert-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}


@dataclass(frozen=True)
class Subject:
    """A model on a device, in a precision.

    Args:
        model: `demo`, or what has random weights: `narrow`, `bert-base` or `bert-large`.
        device: As torch names it.
        precision: One of `PRECISIONS`.
        usual: The model that the benchmark runs unless it is asked for another.
    """

    model: str = DEMO
    device: str = "cpu"
    precision: str = "fp32"
    usual: str = DEMO

    @property
    def is_on_cuda(self) -> bool:
        """Whether calls return before they are computed, and rows have a bus to cross."""
        return torch.device(self.device).type == "cuda"

    @property
    def arguments(self) -> list[str]:
        """What says the same on a command line."""
        return ["--model", self.model, "--device", self.device, "--precision", self.precision]

    @property
    def settings(self) -> dict[str, str]:
        """What is said of it beside results; nothing of the usual one, so that its files stay what they were."""
        if self == Subject(self.usual, usual=self.usual):
            return {}
        card = {"gpu": torch.cuda.get_device_name(self.device)} if self.is_on_cuda else {}
        return {"model": self.model, "device": self.device, "precision": self.precision, **card}

    def name_results(self, benchmark: str) -> str:
        """Give the name of a results file: that of the benchmark alone for what it usually runs."""
        if not self.settings:
            return benchmark
        return f"{benchmark}-{torch.device(self.device).type}-{self.model}-{self.precision}"

    def load(self) -> LoadedModel:
        """Load the model, in eval mode, with a tokenizer."""
        if self.model == DEMO:
            return lp.load_model(DEMO, self.device)
        from transformers import BertConfig, BertModel

        tokenizer = load_tokenizer(str(find_demo_model()))
        torch.manual_seed(0)
        config = BertConfig(vocab_size=len(tokenizer), **_CONFIGS[self.model])
        model: Any = BertModel(config).eval()
        return LoadedModel(self.model, model.to(self.device), tokenizer)

    def save(self, folder: Path) -> Path:
        """Give a folder that other libraries load the model from: the demo's own, or a new one."""
        if self.model == DEMO:
            return find_demo_model()
        made = Subject(self.model).load()
        model: Any = made.model
        model.save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
        return folder

    def running(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Let a bare model's calls be those of a run: without gradients, in the precision."""
        return running(model, find_precision(model, resolve_precision(self.precision)))


def add_subject_options(parser: argparse.ArgumentParser, usual: str = DEMO) -> None:
    """Let a benchmark be asked for another model, device and precision.

    Args:
        usual: The model it runs otherwise.
    """
    models = dict.fromkeys((usual, DEMO, "bert-base", "bert-large"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1; results of CUDA have a file of their own")
    parser.add_argument("--model", choices=tuple(models), default=usual, help="all but the demo have random weights")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="what the forward computes in")
    parser.set_defaults(usual=usual)


def read_subject(options: argparse.Namespace) -> Subject:
    """Give what was asked for; end the process with one line where this machine cannot run it."""
    try:
        device = torch.device(options.device)
    except RuntimeError:
        refuse(f"no device {options.device!r}: use cpu, cuda or cuda:1.")
    if device.type not in ("cpu", "cuda"):
        refuse(f"no device {options.device!r}: use cpu, cuda or cuda:1.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        refuse(f"--device {options.device}: this machine has {torch.cuda.device_count()} CUDA devices. Use cpu.")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # torch takes no device without a number here
    if device.type == "cpu" and options.precision == "tf32":
        refuse("--precision tf32 on cpu: CUDA devices compute so. Use fp32, bf16 or fp16.")
    return Subject(options.model, options.device, options.precision, options.usual)


def refuse(reason: str) -> NoReturn:
    """End the process as a command line does that was asked for what it cannot do."""
    print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    raise SystemExit(2)


def wait_for_model() -> None:
    """Wait until a GPU that is in use has computed what it was given; its copies may still be under way."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()


def prepare_copies(sizes: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
    """Make bytes on a GPU and page-locked memory for them, of the largest size."""
    source = torch.ones(max(sizes), dtype=torch.uint8, device=device)
    return source, torch.empty(max(sizes), dtype=torch.uint8, pin_memory=True)


def copy_to_host(sizes: Sequence[int], prepared: tuple[Tensor, Tensor]) -> None:
    """Bring so many bytes over the bus, piece by piece, as a run brings its shards at best."""
    source, target = prepared
    for size in sizes:
        target[:size].copy_(source[:size], non_blocking=True)
    torch.cuda.synchronize(source.device)


def find_busy_s(spans: Sequence[tuple[float, float]]) -> float:
    """Give the seconds that are in any of the spans from a start to an end in microseconds, overlaps counted once."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6
