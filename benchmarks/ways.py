"""Ways to write every layer of a model for a list of texts to disk, layerprobe's and those of others.

A way is made for a job; loading and wrapping are not timed. It then runs from texts to files in a folder, and can read
back what it wrote for comparison with layerprobe's rows. Each follows its library's own documentation. Those that take
batches get layerprobe's padded ones, sorted by length; the others batch by themselves. Rows leave a GPU batch by batch,
before they are written.

Must never know of clocks.
"""

import contextlib
import copy
import importlib
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from corpora import SITES
from safetensors.torch import load_file
from subjects import Subject
from torch import Tensor

import layerprobe as lp
from layerprobe.extract.batching import cut_batches
from layerprobe.extract.tokens import tokenize
from layerprobe.models import LoadedModel

__all__ = ["PACKAGES", "WAYS", "Job", "Way"]

LOOP_BATCH = 32
BATCH_TOKENS = 1024
LONGEST = 256
# the package that each way needs besides layerprobe's dependencies, by its name on PyPI
PACKAGES = {
    "datasets.map": "datasets",
    "datasets.map, sorted": "datasets",
    "sentence-transformers, last layer": "sentence-transformers",
    "nnsight": "nnsight",
    "TransformerLens": "transformer-lens",
    "TorchLens": "torchlens",
    "NeuroX": "neurox",
}

Read = Iterator[tuple[int, dict[int, Any], list[int] | None]]


@dataclass(frozen=True, eq=False)
class Job:
    """The model and the texts, each on one line and of at most `LONGEST` tokens, so that no way truncates one.

    Args:
        demo: The model and its tokenizer, on their device.
        texts: The texts to extract.
        source: The folder from which others load the model.
        subject: Device and precision; the precision is set around the calls.
    """

    demo: LoadedModel
    texts: list[str]
    source: Path
    subject: Subject

    @property
    def model(self) -> Any:
        """The model, as Any because its submodules are accessed by name."""
        return self.demo.model

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Move a batch to the model's device."""
        return {name: value.to(self.subject.device) for name, value in batch.items()}

    @property
    def layers(self) -> int:
        """Number of layers of the model."""
        return self.model.config.num_hidden_layers


@dataclass(frozen=True, eq=False)
class Way:
    """How one library does the job.

    Args:
        make: Prepares, and returns a function that runs texts into a folder.
        read: Yields, for some texts, their ordinal and their rows by depth, `[T, D]` each, 0 for the embeddings; also
            the places of those rows among the text's tokens, None for all.
    """

    make: Callable[[Job], Callable[[list[str], Path], None]]
    read: Callable[[Path, Job], Read]


def list_batches(job: Job, texts: list[str]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield layerprobe's batches of texts, on the model's device, with the text of each row."""
    tokenized = tokenize(job.demo.tokenizer, texts, LONGEST)
    for batch in cut_batches(tokenized, BATCH_TOKENS, job.demo.tokenizer.pad_token_id):
        first = dict(zip(reversed(batch.sequences), reversed(batch.members), strict=True))
        members = [first[row] for row in range(len(batch.input_ids))]
        yield members, job.place({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask})


def save_batch(folder: Path, members: Sequence[int], mask: Tensor, states: Sequence[Tensor]) -> None:
    kept = {"members": list(members), "mask": mask.cpu(), "states": [state.cpu() for state in states]}
    torch.save(kept, folder / f"batch-{members[0]:06d}.pt")


def read_batches(folder: Path, job: Job) -> Read:
    for path in sorted(folder.glob("batch-*.pt"))[::4]:
        kept = torch.load(path, weights_only=True, mmap=True)
        for row, (member, mask) in enumerate(zip(kept["members"], kept["mask"].bool(), strict=True)):
            yield member, {depth: state[row][mask] for depth, state in enumerate(kept["states"])}, None


def make_layerprobe(job: Job, sites: Sequence[str], dtype: str) -> Callable[[list[str], Path], None]:
    def run(texts: list[str], folder: Path) -> None:
        lp.extract(
            job.model,
            texts,
            folder / "acts",
            sites=sites,
            dtype=dtype,
            precision=job.subject.precision,
            tokenizer=job.demo.tokenizer,
            progress=False,
        )

    return run


def read_layerprobe(folder: Path, job: Job) -> Read:
    store = lp.open(folder / "acts")
    depths = [0, *range(1, job.layers + 1)] if len(store.sites) > 1 else [job.layers]
    for ordinal in range(0, len(store), 4):
        example = store.example(ordinal)
        yield ordinal, {depth: example[site] for depth, site in zip(depths, store.sites, strict=True)}, None


def make_loop(job: Job) -> Callable[[list[str], Path], None]:
    """Make the usual loop: a fixed number of texts at a time in input order, every hidden state, one file per batch."""

    def run(texts: list[str], folder: Path) -> None:
        for start in range(0, len(texts), LOOP_BATCH):
            some = texts[start : start + LOOP_BATCH]
            batch = job.place(job.demo.tokenizer(some, padding=True, return_tensors="pt"))
            states = job.model(**batch, output_hidden_states=True).hidden_states
            save_batch(folder, range(start, start + len(batch["input_ids"])), batch["attention_mask"], states)

    return run


def make_sorted_loop(job: Job) -> Callable[[list[str], Path], None]:
    """Make an expert's loop: sorted by length, stacked in float16, one file per text."""

    def run(texts: list[str], folder: Path) -> None:
        for members, batch in list_batches(job, texts):
            states = torch.stack(job.model(**batch, output_hidden_states=True).hidden_states).half().cpu()
            for row, (member, mask) in enumerate(zip(members, batch["attention_mask"].bool().cpu(), strict=True)):
                torch.save(states[:, row, mask], folder / f"text-{member:06d}.pt")

    return run


def read_texts(folder: Path, job: Job) -> Read:
    for path in sorted(folder.glob("text-*.pt"))[::4]:
        yield int(path.stem.removeprefix("text-")), dict(enumerate(torch.load(path, weights_only=True))), None


def make_dictionaries(job: Job) -> Callable[[list[str], Path], None]:
    """Make hooks that store outputs in a dictionary, like baukit's traces; one file per batch."""
    modules = [job.model.embeddings, *job.model.encoder.layer]

    def run(texts: list[str], folder: Path) -> None:
        seen: dict[int, Tensor] = {}

        def keep(depth: int, module: object, args: object, output: Any) -> None:
            seen[depth] = output[0] if isinstance(output, tuple) else output

        with contextlib.ExitStack() as hooks:
            for depth, module in enumerate(modules):
                hooks.callback(module.register_forward_hook(partial(keep, depth)).remove)
            for members, batch in list_batches(job, texts):
                job.model(**batch)
                save_batch(folder, members, batch["attention_mask"], [seen[depth] for depth in range(len(modules))])

    return run


def make_datasets(job: Job, is_sorted: bool) -> Callable[[list[str], Path], None]:
    """Make the documented form, over texts in input order or sorted by number of characters to reduce padding."""
    datasets = importlib.import_module("datasets")
    datasets.disable_progress_bars()

    def add_states(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        batch = job.place(job.demo.tokenizer(rows["text"], padding=True, return_tensors="pt"))
        with torch.inference_mode():
            states = job.model(**batch, output_hidden_states=True).hidden_states
        masks = batch["attention_mask"].bool()
        return {
            f"depth_{depth}": [values[mask].cpu().numpy() for values, mask in zip(state, masks, strict=True)]
            for depth, state in enumerate(states)
        }

    def run(texts: list[str], folder: Path) -> None:
        order = sorted(range(len(texts)), key=lambda one: -len(texts[one]) if is_sorted else one)
        made = datasets.Dataset.from_dict({"text": [texts[one] for one in order], "member": order})
        made.map(add_states, batched=True, batch_size=LOOP_BATCH, cache_file_name=str(folder / "states.arrow"))

    return run


def read_datasets(folder: Path, job: Job) -> Read:
    made = importlib.import_module("datasets").Dataset.from_file(str(folder / "states.arrow")).with_format("torch")
    for ordinal in range(0, len(made), 4):
        row = made[ordinal]
        yield int(row["member"]), {depth: row[f"depth_{depth}"] for depth in range(job.layers + 1)}, None


def make_sentence_transformers(job: Job) -> Callable[[list[str], Path], None]:
    library = importlib.import_module("sentence_transformers")
    model = library.SentenceTransformer(str(job.source), device=job.subject.device)
    model.max_seq_length = LONGEST

    def run(texts: list[str], folder: Path) -> None:
        kept = model.encode(texts, output_value="token_embeddings", batch_size=LOOP_BATCH, show_progress_bar=False)
        torch.save([rows.cpu().clone() for rows in kept], folder / "tokens.pt")

    return run


def read_sentence_transformers(folder: Path, job: Job) -> Read:
    for ordinal, rows in enumerate(torch.load(folder / "tokens.pt", weights_only=True)[::4]):
        yield 4 * ordinal, {job.layers: rows}, None


def make_nnsight(job: Job) -> Callable[[list[str], Path], None]:
    wrapped = importlib.import_module("nnsight").NNsight(job.model)

    def run(texts: list[str], folder: Path) -> None:
        for members, batch in list_batches(job, texts):
            with wrapped.trace(**batch):
                states = [].save()  # type: ignore[attr-defined]
                states.append(wrapped.embeddings.output)
                for layer in wrapped.encoder.layer:
                    states.append(layer.output)
            save_batch(folder, members, batch["attention_mask"], states)

    return run


def make_transformer_lens(job: Job) -> Callable[[list[str], Path], None]:
    """Make the bridge around the same weights under a language model head, which it needs for BERT but never runs."""
    from transformers import BertForMaskedLM

    bridges = importlib.import_module("transformer_lens.model_bridge")
    config = copy.deepcopy(job.model.config)
    config.architectures = ["BertForMaskedLM"]
    made: Any = BertForMaskedLM(config)
    model = made.to(job.subject.device).eval()
    model.bert.load_state_dict(job.model.state_dict(), strict=False)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config.save_pretrained(folder)
        bridge = bridges.TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=job.demo.tokenizer)
    names = ["blocks.0.hook_in", *(f"blocks.{layer}.hook_out" for layer in range(job.layers))]
    # raised by its own `stop_at_layer`, which stops before a layer and so cannot stop after the last one
    ends = importlib.import_module("transformer_lens.model_bridge.exceptions").StopAtLayerException

    def run(texts: list[str], folder: Path) -> None:
        seen: dict[str, Tensor] = {}

        def keep(name: str, values: Tensor, hook: object) -> None:
            seen[name] = values
            if name == names[-1]:
                raise ends(values)

        hooks = [(name, partial(keep, name)) for name in names]
        for members, batch in list_batches(job, texts):
            bridge.run_with_hooks(
                batch["input_ids"], attention_mask=batch["attention_mask"], fwd_hooks=hooks, return_type=None
            )
            save_batch(folder, members, batch["attention_mask"], [seen[name] for name in names])

    return run


def make_torchlens(job: Job) -> Callable[[list[str], Path], None]:
    """Make its own shards of unpadded rows; the last layer is taken as the model's output, as its name is ambiguous."""
    torchlens = importlib.import_module("torchlens")
    names = ["embeddings.LayerNorm", *(f"encoder.layer.{layer}" for layer in range(job.layers - 1)), "output_1"]

    def run(texts: list[str], folder: Path) -> None:
        torchlens.extract_dataset(
            job.model,
            texts,
            {f"depth_{depth}": name for depth, name in enumerate(names)},
            batch_size=LOOP_BATCH,
            output_dir=folder / "out",
            progress=False,
            collate=lambda items: job.place(job.demo.tokenizer(list(items), padding=True, return_tensors="pt")),
            ragged="trim",
        )

    return run


def read_torchlens(folder: Path, job: Job) -> Read:
    ordinal = 0
    for path in sorted((folder / "out").glob("batch_*.safetensors")):
        saved = load_file(path)
        lengths = saved["depth_0/shapes"][:, 0].tolist()
        parts = [saved[f"depth_{depth}/values"].split(lengths) for depth in range(job.layers + 1)]
        for row in range(0, len(lengths), 4):
            yield ordinal + row, {depth: part[row] for depth, part in enumerate(parts)}, None
        ordinal += len(lengths)


def make_neurox(job: Job) -> Callable[[list[str], Path], None]:
    extractor = importlib.import_module("neurox.data.extraction.transformers_extractor")

    def run(texts: list[str], folder: Path) -> None:
        corpus = folder / "corpus.txt"
        corpus.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        # it prints every token of every text
        with contextlib.redirect_stdout(io.StringIO()):
            extractor.extract_representations(
                str(job.source),
                str(corpus),
                str(folder / "states.hdf5"),
                device=job.subject.device,
                output_type="hdf5",
            )
        corpus.unlink()

    return run


def read_neurox(folder: Path, job: Job) -> Read:
    """Read the rows; it keeps only the last token of each word between spaces, and no special tokens."""
    h5py = importlib.import_module("h5py")
    with h5py.File(folder / "states.hdf5", "r") as file:
        for ordinal in range(0, len(job.texts), 4):
            if str(ordinal) not in file:
                continue
            states = torch.from_numpy(file[str(ordinal)][:])
            spans = job.demo.tokenizer(job.texts[ordinal], return_offsets_mapping=True)["offset_mapping"]
            text = job.texts[ordinal] + " "
            places = [place for place, (_, end) in enumerate(spans) if end and text[end] == " "]
            yield ordinal, dict(enumerate(states)), places


WAYS = {
    "layerprobe": Way(partial(make_layerprobe, sites=SITES, dtype="float16"), read_layerprobe),
    "layerprobe, float32": Way(partial(make_layerprobe, sites=SITES, dtype="float32"), read_layerprobe),
    "layerprobe, last layer": Way(partial(make_layerprobe, sites=["layers.-1"], dtype="float32"), read_layerprobe),
    "arrival-order loop": Way(make_loop, read_batches),
    "sorted loop, a file a text": Way(make_sorted_loop, read_texts),
    "dictionaries of hooks": Way(make_dictionaries, read_batches),
    "datasets.map": Way(partial(make_datasets, is_sorted=False), read_datasets),
    "datasets.map, sorted": Way(partial(make_datasets, is_sorted=True), read_datasets),
    "sentence-transformers, last layer": Way(make_sentence_transformers, read_sentence_transformers),
    "nnsight": Way(make_nnsight, read_batches),
    "TransformerLens": Way(make_transformer_lens, read_batches),
    "TorchLens": Way(make_torchlens, read_torchlens),
    "NeuroX": Way(make_neurox, read_neurox),
}
