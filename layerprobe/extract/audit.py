"""Run some examples of a store through the model again, one at a time, and compare every value.

Checksums prove that a store holds what was written; an audit proves that what was written is what the model computes
from the texts: the right tokens, the right layer, the right example. A recomputed value may differ only by summation
order, since batches have another shape, and by rounding to the stored dtype.

Hides that tolerance. Must never write.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerprobe.capture.casting import cast_into
from layerprobe.capture.identity import describe_changes
from layerprobe.capture.target import Target
from layerprobe.errors import PlanError, StoreError
from layerprobe.extract.forward import PRECISIONS, REORDERED, running
from layerprobe.extract.looking import look
from layerprobe.extract.network import load_named
from layerprobe.extract.tokens import tokenize
from layerprobe.models import LoadedModel, describe_model
from layerprobe.sites.stacks import find_device, need_model
from layerprobe.store.checks import check_tokenizer
from layerprobe.store.examples import Example
from layerprobe.store.format import TOKENIZER_FILE, read_bounded
from layerprobe.store.guard import LARGE, brief, check_count
from layerprobe.store.mismatch import list_model_differences
from layerprobe.store.reader import Store, take_store
from layerprobe.store.shards import POOLS, ScaledRows
from layerprobe.store.tokenizer import load_tokenizer
from layerprobe.tables import format_count
from layerprobe.telling import find_stderr, go_through

__all__ = ["Audit", "AuditProblem", "AuditReport", "audit", "plan_audit"]

# TF32, which GPUs may use for float32 matrix products, has as many mantissa bits as float16.
_REORDERED_TF32 = 2e-2


class AuditProblem(NamedTuple):
    """A mismatch between an example and the model: its ordinal, the site (or `input_ids`), and what differs."""

    example: int
    site: str
    what: str


@dataclass(frozen=True)
class AuditReport:
    """What an audit found; `str(report)` is its closing text. Made by `layerprobe.audit`.

    Args:
        folder: Where the store is.
        examples: Ordinals of the examples that were run again.
        num_values: Values that were compared.
        problems: What differs, by example and site.
        largest: The largest difference, as a share of what is allowed; above 1 is a problem.
    """

    folder: str
    examples: tuple[int, ...]
    num_values: int
    problems: tuple[AuditProblem, ...]
    largest: float

    @property
    def ok(self) -> bool:
        """Whether every value is what the model makes."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"example {example}: {site}: {what}" for example, site, what in self.problems]
        run = f"{format_count(len(self.examples), 'example')} run again, {self.num_values:,} values compared"
        wrong = len({problem.example for problem in self.problems})
        found = (
            f"{format_count(wrong, 'example')} not as the model makes them"
            if wrong
            else f"all as the model makes them, the largest difference {self.largest:.1%} of what rounding allows"
        )
        return "\n".join([*lines, f"{self.folder}: {run}: {found}."])


def audit(
    folder: Store | str | Path,
    model: nn.Module | LoadedModel | str | None = None,
    num_examples: int = 16,
    seed: int = 0,
    *,
    device: str | int | None = None,
    progress: bool | None = None,
) -> AuditReport:
    """Run random examples of a store through its model again, one at a time, and compare ids and every site.

    A stored value passes if it differs from the recomputed one, pooled and cast alike, by at most the sum of two terms.
    The first is a share of the largest magnitude of the site in the example: 1e-4 for a model in float32, 2e-2 in
    float16 and under TF32, 1e-1 in bfloat16. The second is one step of the stored dtype, or for int8 one scale of its
    vector. NaN and infinity must be in the same places.

    Args:
        folder: A store, or its path or URL; complete or not.
        model: A model, the result of `load_model`, or a name; None for the one that `store.json` names, which is then
            printed on stderr. It must be the same model: class, config and weights.
        num_examples: Number of examples; all if there are fewer.
        seed: Random seed of the draw.
        device: Device for a model given by name.
        progress: Show a progress bar on stderr; None: only on a terminal.

    Raises:
        PlanError: it is another model; the error lists the fields that differ.
        StoreError: the store cannot be audited: it was filled by a `Probe`, pooled by a function, keeps no
            texts, or has no examples.
        FormatError: it is damaged.
        ModelError: the model cannot be loaded.
        OptionError: `num_examples` or `seed` is not a count, `model` is not a model, or `device` is given with a model
            object.

    Cost: a forward for each example; memory for one.

    Example:
        >>> import tempfile, layerprobe as lp
        >>> folder = tempfile.mkdtemp()
        >>> store = lp.extract("demo", ["The kettle whistled.", "Who left?"], folder, sites="layers.-1")
        >>> lp.audit(folder, num_examples=2).ok
        True
    """
    return plan_audit(folder, model, num_examples, seed, device=device).run(progress)


@dataclass(frozen=True, eq=False)
class Audit:
    """A planned audit: its store, the model and tokenizer, and the examples that were drawn."""

    store: Store
    network: nn.Module
    tokenizer: Any
    examples: tuple[int, ...]
    max_length: int
    precision: str | None

    def run(self, progress: bool | None = None) -> AuditReport:
        """Run the examples and compare, with a progress bar as in `audit`."""
        store = self.store
        problems: list[AuditProblem] = []
        num_values, largest = 0, 0.0
        with running(self.network, self.precision):
            for ordinal in go_through(self.examples, "", progress, "examples"):
                example = store.example(ordinal)
                if example.text is None:
                    raise StoreError(
                        f"{store.place}: keeps no text of example {ordinal}. Only its checksums can be checked."
                    )
                made = tokenize(self.tokenizer, [example.text], self.max_length)
                ids = made.ids.tolist()
                rows = None if store.kept is None else store.kept.choose(made.ids, made.offsets, [ordinal]).positions
                if rows is not None and not torch.equal(rows, example.positions):
                    problems.append(AuditProblem(ordinal, "positions", f"are not the rows that {store.kept} are"))
                    continue
                wanted, stored_ids = ids if rows is None else [ids[row] for row in rows], example.input_ids.tolist()
                if wanted != stored_ids:
                    problems.append(AuditProblem(ordinal, "input_ids", _compare_ids(wanted, stored_ids)))
                if len(wanted) != len(stored_ids) or not ids:
                    continue
                for site, what, share, count in _compare(store, self.network, example, ids, self.precision):
                    num_values, largest = num_values + count, max(largest, share)
                    if what:
                        problems.append(AuditProblem(ordinal, site, what))
        return AuditReport(str(store.place), self.examples, num_values, tuple(problems), largest)


def plan_audit(
    folder: Store | str | Path,
    model: nn.Module | LoadedModel | str | None,
    num_examples: int,
    seed: int,
    *,
    device: str | int | None,
) -> Audit:
    """Check everything that an audit needs and load its model, before any example is run; same arguments as `audit`.

    Raises:
        PlanError, StoreError, FormatError, ModelError, OptionError: as `audit`.
    """
    check_count("num_examples", num_examples)
    seed = check_count("seed", seed, 0)
    store = take_store(folder)
    plan = _check_auditable(store)
    if not len(store):
        raise StoreError(f"{store.place}: has no examples, and nothing is proved of it. Extract some first.")
    network = _find_model(store, model, device)
    tokenizer = _load_own_tokenizer(store)
    chosen = tuple(_choose(store, num_examples, seed))
    return Audit(store, network, tokenizer, chosen, plan["max_length"], plan.get("precision"))


def _check_auditable(store: Store) -> Mapping[str, Any]:
    """Check that the store describes its run well enough to repeat it, and return its plan."""
    plan = store.description.get("plan")
    if not isinstance(plan, dict) or type(plan.get("max_length")) is not int:
        raise StoreError(
            f"{store.place}: a Probe filled it, and nothing in it tells the texts or how the model was called (token "
            "types, positions, mask). Check its files alone, with layerprobe.verify."
        )
    if plan.get("precision") not in (None, *PRECISIONS):
        raise StoreError(f"{store.place}: computed in {plan['precision']!r}, which this version does not know.")
    if store.pool not in (None, *POOLS):
        raise StoreError(
            f"{store.place}: was pooled by the function {store.pool!r}, which no store holds. Stores of every row or "
            f"pooled by {', '.join(POOLS)} can be audited."
        )
    return plan


def _find_model(store: Store, model: nn.Module | LoadedModel | str | None, device: str | int | None) -> nn.Module:
    """Load the model and check that the store was made with it.

    Raises:
        PlanError: it is a different model, or `store.json` names none.
        OptionError: it is not a model, or a device is given for a model that has one already.
    """
    said = store.description["model"]
    if model is None:
        model = said.get("id") or ""
        if not model:
            raise PlanError(f"{store.place}: does not name its model. Pass the model (--model).")
        # the store, and the name in it, may come from a stranger
        print(f"layerprobe: loading the model {brief(repr(model))}, as {store.place} says", file=find_stderr())
    network = need_model(load_named(model, device))
    differing = list_model_differences(said, describe_model(network))
    if differing:
        raise PlanError(
            f"{store.place}: was made with another model ({'; '.join(differing)}). Pass the very model "
            "it was made with (--model); a config may also differ between versions of transformers."
        )
    there, here = (store.description.get("plan") or {}).get("changes", []), describe_changes(network)
    if there != here:
        raise PlanError(
            f"{store.place}: was made with other edits, hooks or modules on the model ({brief(str(there))} there, "
            f"{brief(str(here))} here). Put the same on the model while this is called."
        )
    return network


def _load_own_tokenizer(store: Store) -> Any:
    """Load the tokenizer saved in the store, after checking that it is the one of the run."""
    place, said = store.place, store.description.get("tokenizer")
    if not isinstance(said, dict):
        raise StoreError(f"{place}: does not say which tokenizer made its ids. Only its checksums can be checked.")
    check_tokenizer(place, said)
    from transformers import PreTrainedTokenizerFast

    # Load the rules alone: a configuration saved with them may name code, and come from a stranger.
    rules = load_tokenizer(place.label(TOKENIZER_FILE), read_bounded(place, TOKENIZER_FILE, LARGE))
    splits = said.get("split_special_tokens") is True
    side = "left" if said.get("truncation_side") == "left" else "right"
    return PreTrainedTokenizerFast(tokenizer_object=rules, split_special_tokens=splits, truncation_side=side)


def _choose(store: Store, count: int, seed: int) -> list[int]:
    """Draw ordinals of existing examples, in ascending order."""
    places = sorted(random.Random(seed).sample(range(len(store)), min(count, len(store))))  # noqa: S311 - no secret
    return [store.ordinal_at(place) for place in places]


def _compare_ids(ids: list[int], stored: list[int]) -> str:
    if len(ids) != len(stored):
        return f"{len(stored)} are stored, the tokenizer makes {len(ids)} of the text"
    place = next(place for place, (own, other) in enumerate(zip(ids, stored, strict=True)) if own != other)
    return f"{stored[place]} is stored at {place}, the tokenizer makes {ids[place]} of the text"


def _compare(
    store: Store, network: nn.Module, example: Example, ids: list[int], precision: str | None
) -> Iterator[tuple[str, str | None, float, int]]:
    """Run an example alone; for each site yield what is wrong, the share of the tolerance, and the number of values."""
    made = {
        site: value[0]
        for site, value in look(network, store.sites, torch.tensor([ids], device="cpu"), pool=store.pool).items()
    }
    if store.kept is not None:
        rows = example.positions.to(find_device(network))
        made = {site: value[rows] if store[site].kind == "token" else value for site, value in made.items()}
    for site in store.sites:
        share = _measure(example[site], made[site], precision)
        what = None
        if share > 1:
            what = f"differs by {share:,.3g} times what rounding allows"
            twin = next(
                (other for other in made if other != site and _measure(example[site], made[other], precision) <= 1),
                None,
            )
            if twin is not None:
                what += f"; it holds what the model makes at {twin}"
        yield site, what, share, made[site].numel()


def _measure(stored: Tensor | ScaledRows, made: Tensor, precision: str | None = None) -> float:
    """Return the largest difference as a share of the tolerance; infinity if values cannot be compared."""
    if stored.shape != made.shape:
        return float("inf")
    dtype = stored.values.dtype if isinstance(stored, ScaledRows) else stored.dtype
    target = Target(
        torch.empty(made.shape, dtype=dtype, device="cpu"),
        torch.empty(made.shape[:-1], dtype=torch.float32, device="cpu") if dtype == torch.int8 else None,
    )
    cast_into(target, made.cpu())
    repeated = target.values.double()
    if isinstance(stored, ScaledRows):
        assert target.scale is not None
        scale = torch.maximum(stored.scale, target.scale)[..., None].double()
        found, repeated = stored.float().double(), repeated * target.scale[..., None].double()
        step = scale.expand(made.shape)
    else:
        found = stored.double()
        limits = torch.finfo(dtype)
        step = torch.maximum(found.abs(), repeated.abs()) * limits.eps + limits.tiny * limits.eps
    finite = repeated.isfinite()
    same = (found == repeated) | (found.isnan() & repeated.isnan())
    if not bool((finite & found.isfinite() | same).all()):
        return float("inf")
    largest = made.cpu().double()[finite].abs().max().item() if bool(finite.any()) else 0.0
    allowed = step + largest * _share_reordered(made, precision)
    return torch.where(same, 0.0, (found - repeated).abs() / allowed).max().item() if made.numel() else 0.0


def _share_reordered(made: Tensor, precision: str | None) -> float:
    if precision == "tf32":
        return _REORDERED_TF32
    return max(REORDERED[made.dtype], REORDERED[PRECISIONS[precision]] if precision is not None else 0.0)
