"""Final reports of a run: counts, speed, and warnings for the user.

One class for runs into a store and one for runs into a sink. Must never know how a run works.
"""

from collections import Counter
from dataclasses import dataclass, field

from layerprobe.tables import format_bytes, format_count

__all__ = ["RunReport", "StreamReport"]


@dataclass
class RunReport:
    """What a run did; `str(report)` is its closing line.

    Args:
        num_examples, num_tokens, num_bytes: Written by this run.
        value_bytes: Bytes of the values that the model produced at the sites, padding included, before pooling, row
            selection and casting; None if the plan does not determine it: for attention weights, for modules by their
            own name, and for autocast with a different stored dtype.
        num_units: Shards that this run has committed.
        num_computed: Tokens that went through the model, padding included.
        num_padding: How many of those are padding.
        num_repeated: Texts with the same tokens as another text of the unit, which were not computed again.
        num_halved: Batches that did not fit into the device's memory and were split in two.
        num_truncated: Texts truncated to the maximum length.
        seconds: Time from the first text to the index.
        stalled_s: Time the forward pass waited for a buffer to be written, with its device idle.
        waited_s: Time any thread waited for disk space; summed over processes.
        num_waiting: Processes of the run that are waiting for disk space now.
        nonfinite: Values that are not finite, by site.
        is_complete: Whether the store is complete; False if the run was asked to stop.
    """

    num_examples: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    value_bytes: int | None = None
    num_units: int = 0
    num_computed: int = 0
    num_padding: int = 0
    num_repeated: int = 0
    num_halved: int = 0
    num_truncated: int = 0
    seconds: float = 0.0
    stalled_s: float = 0.0
    waited_s: float = 0.0
    num_waiting: int = 0
    nonfinite: Counter[str] = field(default_factory=Counter)
    is_complete: bool = True

    def count_wait(self, seconds: float, is_waiting: bool) -> None:
        """Add a wait for disk space; called by a `RoomKeeper`."""
        self.waited_s += seconds
        self.num_waiting = int(is_waiting)

    @property
    def padding(self) -> float:
        """Share of the computed tokens that is padding."""
        return self.num_padding / self.num_computed if self.num_computed else 0.0

    def __str__(self) -> str:
        if self.is_complete and not self.num_examples:
            return "nothing to do: every shard is there already"
        seconds = max(self.seconds, 1e-9)
        line = (
            f"{format_count(self.num_examples, 'example')}, {format_count(self.num_tokens, 'token')} "
            f"in {self.seconds:.1f} s: "
            f"{self.num_tokens / seconds:,.0f} tokens/s, "
            + ("" if self.value_bytes is None else f"{format_bytes(self.value_bytes / seconds)}/s in, ")
            + f"{format_bytes(self.num_bytes / seconds)}/s out, "
            f"{format_bytes(self.num_bytes)} written, padding {self.padding:.1%}, "
            f"{self.num_truncated:,} truncated, stalled {self.stalled_s:.2f} s"
        )
        if self.waited_s:
            line += f", waited {self.waited_s:.2f} s for room on the disk"
        if self.num_halved:
            line += f", batches halved for want of memory: {self.num_halved:,}; ask for fewer tokens with batch_tokens"
        if self.num_repeated:
            line += f", {self.num_repeated:,} computed with another of the same tokens"
        if self.nonfinite:
            worst = ", ".join(f"{count:,} at {site}" for site, count in self.nonfinite.most_common(3))
            line += f"; {format_count(self.nonfinite.total(), 'value')} not finite or beyond the dtype ({worst})"
        return line


@dataclass
class StreamReport:
    """What went through the model; `str(report)` is its closing line.

    Args:
        num_examples, num_tokens: Totals of all texts, special tokens included.
        num_computed, num_padding: Tokens that went through the model, and how many of those are padding.
        num_truncated: Texts truncated to the maximum length.
        num_halved: Batches that did not fit into the device's memory and were split in two.
        seconds: Time from the first text to the last.
    """

    num_examples: int = 0
    num_tokens: int = 0
    num_computed: int = 0
    num_padding: int = 0
    num_truncated: int = 0
    num_halved: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        line = (
            f"{format_count(self.num_examples, 'example')}, {format_count(self.num_tokens, 'token')} "
            f"in {self.seconds:.1f} s: "
            f"{self.num_tokens / max(self.seconds, 1e-9):,.0f} tokens/s, "
            f"padding {self.num_padding / max(1, self.num_computed):.1%}, {self.num_truncated:,} truncated"
        )
        return line + (f", batches halved for want of memory: {self.num_halved:,}" if self.num_halved else "")
