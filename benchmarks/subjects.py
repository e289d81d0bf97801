"""The model, device and precision that a benchmark runs with; by default the demo model on the CPU.

Models other than the demo have random weights and the demo's tokenizer, so no network is needed. Results for another
model or device go into a results file of its own name. Hides where models come from, how to wait for a GPU, and how
fast one copies bytes to the host. Must never know of rivals or tables.
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
        model: `demo`, or one with random weights: `narrow`, `bert-base` or `bert-large`.
        device: As torch names it.
        precision: One of `PRECISIONS`.
        usual: The default model of the benchmark.
    """

    model: str = DEMO
    device: str = "cpu"
    precision: str = "fp32"
    usual: str = DEMO

    @property
    def is_on_cuda(self) -> bool:
        """Whether the model is on CUDA, where calls return early and rows have to be copied to the host."""
        return torch.device(self.device).type == "cuda"

    @property
    def arguments(self) -> list[str]:
        """Command line arguments for the same subject."""
        return ["--model", self.model, "--device", self.device, "--precision", self.precision]

    @property
    def settings(self) -> dict[str, str]:
        """Settings to store with results; empty for the default subject, so that its files stay as they were."""
        if self == Subject(self.usual, usual=self.usual):
            return {}
        card = {"gpu": torch.cuda.get_device_name(self.device)} if self.is_on_cuda else {}
        return {"model": self.model, "device": self.device, "precision": self.precision, **card}

    def name_results(self, benchmark: str) -> str:
        """Return the name of a results file; for the default subject just the name of the benchmark."""
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
        """Return a folder from which other libraries load the model: the demo's own, or a new one."""
        if self.model == DEMO:
            return find_demo_model()
        made = Subject(self.model).load()
        model: Any = made.model
        model.save_pretrained(folder)
        made.tokenizer.save_pretrained(folder)
        return folder

    def running(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Set up a bare model for the calls of a run: without gradients, in the precision."""
        return running(model, find_precision(model, resolve_precision(self.precision)))


def add_subject_options(parser: argparse.ArgumentParser, usual: str = DEMO) -> None:
    """Add the options for another model, device and precision.

    Args:
        usual: The default model.
    """
    models = dict.fromkeys((usual, DEMO, "bert-base", "bert-large"))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1; results of CUDA have a file of their own")
    parser.add_argument("--model", choices=tuple(models), default=usual, help="all but the demo have random weights")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="what the forward computes in")
    parser.set_defaults(usual=usual)


def read_subject(options: argparse.Namespace) -> Subject:
    """Read the subject from the options; exit with a one-line message if this machine cannot run it."""
    try:
        device = torch.device(options.device)
    except RuntimeError:
        refuse(f"no device {options.device!r}: use cpu, cuda or cuda:1.")
    if device.type not in ("cpu", "cuda"):
        refuse(f"no device {options.device!r}: use cpu, cuda or cuda:1.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        refuse(f"--device {options.device}: this machine has {torch.cuda.device_count()} CUDA devices. Use cpu.")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # torch does not accept a device without an index here
    if device.type == "cpu" and options.precision == "tf32":
        refuse("--precision tf32 on cpu: CUDA devices compute so. Use fp32, bf16 or fp16.")
    return Subject(options.model, options.device, options.precision, options.usual)


def refuse(reason: str) -> NoReturn:
    """Exit with a message and code 2, like a command line with invalid options."""
    print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    raise SystemExit(2)


def wait_for_model() -> None:
    """Wait until a GPU in use has finished computing; its copies may still be pending."""
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()


def prepare_copies(sizes: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
    """Allocate bytes on a GPU and page-locked memory for them, of the largest size."""
    source = torch.ones(max(sizes), dtype=torch.uint8, device=device)
    return source, torch.empty(max(sizes), dtype=torch.uint8, pin_memory=True)


def copy_to_host(sizes: Sequence[int], prepared: tuple[Tensor, Tensor]) -> None:
    """Copy this many bytes to the host piece by piece: the fastest that a run could copy its shards."""
    source, target = prepared
    for size in sizes:
        target[:size].copy_(source[:size], non_blocking=True)
    torch.cuda.synchronize(source.device)


def find_busy_s(spans: Sequence[tuple[float, float]]) -> float:
    """Return the seconds covered by spans of start and end in microseconds, counting overlaps once."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6
