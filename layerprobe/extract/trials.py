"""What a run's batches are like: how many tokens they have, with padding or without, and with which.

As asked for, as in the same run so far, or as a model's answers to a few short texts say. Whatever is chosen belongs to
the plan: it decides which texts share a batch, and so the last digits of the rows and their order in a shard.

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
    """What a model shows of itself when it is run on a few texts; each trial is made when it is first asked for.

    Args:
        model: What is tried.
        sites: Those of the run.
        stored: How they will lie on disk.
        kept: Which rows the run keeps; None for all.
        options: Of the run.
        sampled: The first texts of the run.
        num_tokens: Of the whole run, about.
        pad_id: What padding is.
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
        """Why the batches of the run have padding; None where they have none.

        Raises:
            OptionError: they cannot do without, and are asked to.
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
        """Whether the rows of a text depend on the padding behind it.

        Raises:
            OptionError: they do, and the run fills its batches up with it.
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
        """Find how many tokens a batch should have: what is usual, and for long runs what is quickest."""
        usual = choose_batch_tokens(find_device(self.model), is_flat)
        # with graphs, tries would not see what is filled up
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
        """Say what the run is with such batches."""
        equal_lengths = not is_flat and self.sees_padding
        return add_batches(described, batch_tokens, is_flat, batch_cost, equal_lengths)

    @property
    def _precision(self) -> str | None:
        return find_precision(self.model, self.options.precision)


def can_resume(recalled: RecalledRun, described: Mapping[str, Any], trials: Trials) -> bool:
    """Whether the run in the place of a store is this one, and can go on as it was begun.

    Args:
        recalled: What is there of it.
        described: What this run is, but for its batches.
        trials: Of its model.
    """
    _, description = _describe_recalled(recalled, described, trials)
    return description["fingerprint"] == recalled.fingerprint and not _has_lost_flat(recalled, trials)


def _has_lost_flat(recalled: RecalledRun, trials: Trials) -> bool:
    """Whether a run was begun without padding that cannot go on so."""
    return recalled.is_flat and trials.why_not_flat is not None


def _describe_recalled(
    recalled: RecalledRun, described: Mapping[str, Any], trials: Trials
) -> tuple[int, dict[str, Any]]:
    """Say what a run is with the batches of the one in the place of its store, where no others are asked for."""
    options = trials.options
    batch_tokens = options.batch_tokens or recalled.batch_tokens
    is_flat = recalled.is_flat if options.padding_free is None else options.padding_free
    cost = recalled.batch_cost or choose_batch_cost(find_device(trials.model))
    return batch_tokens, trials.describe(described, batch_tokens, is_flat, cost)


def choose_batches(
    place: Place, recalled: RecalledRun | None, described: Mapping[str, Any], trials: Trials
) -> tuple[int, dict[str, Any]]:
    """Choose a batch's tokens and its padding: as asked for, as in the same run so far, or as found now.

    Args:
        place: Where the same run may have begun, for messages.
        recalled: What is there; None also for a run that is to be replaced.
        described: What the run is, but for its batches.
        trials: Of its model.

    Returns:
        The tokens of a batch, and what the run is as a whole.

    Raises:
        PlanError: the same run has no padding so far, and cannot resume so.
        OptionError: what is asked for cannot be.
    """
    if recalled is not None:
        batch_tokens, description = _describe_recalled(recalled, described, trials)
        if description["fingerprint"] == recalled.fingerprint and _has_lost_flat(recalled, trials):
            raise PlanError(
                f"{place}: was begun without padding and cannot go on so: {trials.why_not_flat}. Go on as it was "
                "begun, choose another folder, or pass overwrite=True (--overwrite) to replace it."
            )
        # another run is refused by `find_done`, which says what differs: no budget is tried for it
        return batch_tokens, description
    is_flat = trials.why_not_flat is None
    batch_tokens = trials.options.batch_tokens or trials.find_budget(is_flat)
    cost = choose_batch_cost(find_device(trials.model))
    return batch_tokens, trials.describe(described, batch_tokens, is_flat, cost)
