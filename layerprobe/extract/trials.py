"""Choose a run's batches: how many tokens they have, and how they are padded, if at all.

The choice follows the options, the same run so far, or trials with the model on a few short texts. It belongs to the
plan, since it decides which texts share a batch, and so the last digits of the rows and their order in a shard.

Must never write.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from layerprobe.errors import OptionError, PlanError
from layerprobe.extract.description import add_batches
from layerprobe.extract.flat import refuse_flat
from layerprobe.extract.forward import CUDA_GRAPHS, find_precision, running
from layerprobe.extract.options import ExtractOptions
from layerprobe.extract.padding import TRIED_TOKENS, sees_padding
from layerprobe.extract.resume import RecalledRun
from layerprobe.extract.tokens import TokenizedUnit
from layerprobe.extract.warmup import LEAST_TOKENS, choose_batch_cost, choose_batch_tokens, find_batch_tokens
from layerprobe.sites.resolve import Site
from layerprobe.sites.stacks import find_device
from layerprobe.store.description import StoredSite
from layerprobe.store.kept import Kept
from layerprobe.store.places import Place

__all__ = ["Trials", "can_resume", "choose_batches"]


@dataclass(frozen=True)
class Trials:
    """Trials that run a model on a few texts, each made when first needed.

    Args:
        model: The model to try.
        sites: Sites of the run.
        stored: The sites as they will be stored.
        kept: Which rows the run keeps; None for all.
        options: Options of the run.
        sampled: The first texts of the run.
        num_tokens: Approximate tokens of the whole run.
        pad_id: Id of the padding token.
    """

    model: nn.Module
    sites: Sequence[Site]
    stored: Sequence[StoredSite]
    kept: Kept | None
    options: ExtractOptions
    sampled: TokenizedUnit
    num_tokens: int
    pad_id: int

    @cached_property
    def why_not_flat(self) -> str | None:
        """Why the batches of the run are padded; None if they are not.

        Raises:
            OptionError: they must be padded, but `padding_free=True` was given.
        """
        if self.options.padding_free is False:
            return "padding_free=False"
        ids, is_compiled = self.sampled.ids[:TRIED_TOKENS].tolist(), bool(self.options.compile)
        reason = refuse_flat(self.model, self.sites, ids, self._precision, is_compiled)
        if reason is not None and self.options.padding_free:
            raise OptionError(f"padding_free=True: {reason}. Leave it out.")
        return reason

    @cached_property
    def sees_padding(self) -> bool:
        """Whether the rows of a text depend on the padding after it.

        Raises:
            OptionError: they do, and the run pads its batches to fixed shapes.
        """
        with running(self.model, self._precision):
            found = sees_padding(self.model, self.sampled, self.pad_id, self._precision, self.sites)
        if found and self.options.compile == CUDA_GRAPHS:
            raise OptionError(
                f"compile={CUDA_GRAPHS!r}: {type(self.model).__name__} gives a text other rows with padding behind it, "
                "and batches of few shapes are filled up with that. Use compile=True."
            )
        return found

    def find_budget(self, is_flat: bool) -> int:
        """Return the tokens per batch: the default, or for long runs the fastest found by trial."""
        usual = choose_batch_tokens(find_device(self.model), is_flat)
        # with CUDA graphs, the trial would not account for padding to fixed shapes
        if self.num_tokens < LEAST_TOKENS or self.options.compile == CUDA_GRAPHS:
            return usual
        return find_batch_tokens(
            self.model,
            self.stored,
            self.sampled,
            usual,
            precision=self._precision,
            is_flat=is_flat,
            kept=self.kept,
        )

    def describe(
        self, described: Mapping[str, Any], batch_tokens: int, is_flat: bool, batch_cost: int
    ) -> dict[str, Any]:
        """Complete the description of the run with these batches."""
        equal_lengths = not is_flat and self.sees_padding
        return add_batches(described, batch_tokens, is_flat, batch_cost, equal_lengths)

    @property
    def _precision(self) -> str | None:
        return find_precision(self.model, self.options.precision)


def can_resume(recalled: RecalledRun, described: Mapping[str, Any], trials: Trials) -> bool:
    """Whether the run in the store's place is this one, and can be resumed.

    Args:
        recalled: The run in the store's place.
        described: The description of this run without its batches.
        trials: Trials with its model.
    """
    _, description = _describe_recalled(recalled, described, trials)
    return description["fingerprint"] == recalled.fingerprint and not _has_lost_flat(recalled, trials)


def _has_lost_flat(recalled: RecalledRun, trials: Trials) -> bool:
    """Whether the stored run has no padding, but this one cannot go without."""
    return recalled.is_flat and trials.why_not_flat is not None


def _describe_recalled(
    recalled: RecalledRun, described: Mapping[str, Any], trials: Trials
) -> tuple[int, dict[str, Any]]:
    """Describe this run with the batches of the stored one, except where options set them."""
    options = trials.options
    batch_tokens = options.batch_tokens or recalled.batch_tokens
    is_flat = recalled.is_flat if options.padding_free is None else options.padding_free
    cost = recalled.batch_cost or choose_batch_cost(find_device(trials.model))
    return batch_tokens, trials.describe(described, batch_tokens, is_flat, cost)


def choose_batches(
    place: Place, recalled: RecalledRun | None, described: Mapping[str, Any], trials: Trials
) -> tuple[int, dict[str, Any]]:
    """Choose the tokens and the padding of a batch: from the options, the stored run, or trials.

    Args:
        place: Place of the store, for messages.
        recalled: The stored run; None also if it is to be replaced.
        described: The description of this run without its batches.
        trials: Trials with its model.

    Returns:
        The tokens of a batch, and the complete description of the run.

    Raises:
        PlanError: the same run was started without padding, and cannot resume so.
        OptionError: the options ask for something impossible.
    """
    if recalled is not None:
        batch_tokens, description = _describe_recalled(recalled, described, trials)
        if description["fingerprint"] == recalled.fingerprint and _has_lost_flat(recalled, trials):
            raise PlanError(
                f"{place}: was begun without padding and cannot go on so: {trials.why_not_flat}. Go on as it was "
                "begun, choose another folder, or pass overwrite=True (--overwrite) to replace it."
            )
        # a different run is refused by `find_done`, which lists the differences, so no budget is searched here
        return batch_tokens, description
    is_flat = trials.why_not_flat is None
    batch_tokens = trials.options.batch_tokens or trials.find_budget(is_flat)
    cost = choose_batch_cost(find_device(trials.model))
    return batch_tokens, trials.describe(described, batch_tokens, is_flat, cost)
