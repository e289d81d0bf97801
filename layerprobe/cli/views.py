"""How the command line shows stores and examples.

Formats objects of the library as text. Computes only what the layout needs.
"""

from functools import partial

from layerprobe.analysis.results import shorten
from layerprobe.store.examples import Example
from layerprobe.store.guard import brief
from layerprobe.store.headers import parse_shard_name
from layerprobe.store.progress import StoreStatus
from layerprobe.store.reader import Store
from layerprobe.tables import format_bytes, format_count, format_dtype, format_table, format_time

__all__ = ["describe_example", "describe_status", "describe_store"]

_shorten = partial(shorten, most=200)


def describe_store(store: Store) -> str:
    """Describe the contents of a store."""
    model = store.description.get("model") or {}
    sizes = {name: size for name, size in store.place.list_sizes().items() if parse_shard_name(name) is not None}
    state = "complete" if store.is_complete else "not complete"
    listed = [str(shard["file"]) for shard in (store.index or {}).get("shards", [])]
    if lost := [name for name in listed if name not in sizes]:
        state = f"{format_count(len(lost), 'shard')} lost, {lost[0]} the first"
    if not store.is_complete or lost:
        state += ": run the same extraction again to go on"
    rows = "real token" if store.kept is None else "token that was kept"
    lines = [
        f"store     {store.place}: {state}",
        f"model     {brief(model.get('id') or '(unnamed)')} ({brief(model.get('class'))})",
        f"holds     {format_count(len(store), 'example')}, {format_count(store.num_tokens, 'token')}, "
        f"{format_count(store.num_shards, 'shard')}, {format_bytes(sum(sizes.values()))}",
        f"pool      {store.pool or f'none: a row per {rows}'}",
    ]
    if store.kept is not None:
        lines.append(f"kept      {store.kept}; the rows of the others are not there")
    index = store.index or {}
    if index.get("truncated"):
        lines.append(f"cut       {format_count(index['truncated'], 'text')} longer than the maximum length")
    if index.get("nonfinite"):
        counts = ", ".join(f"{count:,} at {brief(site)}" for site, count in index["nonfinite"].items())
        lines.append(f"nonfinite {counts}")
    views = [store[site] for site in store.sites]
    rows = [(view.site, view.kind, format_dtype(view.dtype), view.width) for view in views]
    return "\n".join([*lines, "", format_table(("site", "kind", "dtype", "width"), rows)])


def describe_status(status: StoreStatus) -> str:
    """Describe the progress of a run."""
    state = {
        "complete": "complete",
        "damaged": f"damaged: {status.reason}. Run 'layerprobe verify {status.folder} --repair', then the same "
        "extraction to make it again",
        "running": "running",
        "killed": "killed: its process is gone. Run the same extraction again to go on",
        "stopped": f"stopped: {(status.reason or '').rstrip('.')}. Run the same extraction again to go on",
        "silent": "on another machine, and not heard of for a while: see whether it is alive there",
        "incomplete": "not complete, and nothing tells of a run. Run the same extraction again to go on",
    }[status.state]
    lines = [
        f"store     {status.folder}: {state}",
        f"done      {_format_part(status.num_units_done, status.num_units, 'shard')}, "
        f"{_format_part(status.num_examples_done, status.num_examples, 'example')}",
    ]
    if status.process is not None and status.heard_s is not None:
        alive = {True: "alive", False: "gone", None: "cannot be asked from here"}[status.is_alive]
        lines.append(f"process   {status.process}, {alive}; last heard of {format_time(status.heard_s)} ago")
    if status.tokens_per_s is not None and status.bytes_per_s is not None and status.stalled is not None:
        lines.append(
            f"pace      {status.tokens_per_s:,.0f} tokens/s, {format_bytes(status.bytes_per_s)}/s, "
            f"stalled {status.stalled:.0%} of the time"
        )
        left = "unknown time" if status.remaining_s is None else format_time(status.remaining_s)
        lines.append(f"left      {left}, {format_bytes(status.missing_bytes or 0)}")
    if status.is_waiting:
        lines.append(f"room      waiting for it on the disk, {format_time(status.waited_s or 0.0)} so far")
    elif status.waited_s:
        lines.append(f"room      waited {format_time(status.waited_s)} for it on the disk")
    if status.free_bytes is not None and status.state not in ("complete", "damaged"):
        full = "" if status.full_s is None else f"; full in {format_time(status.full_s)} at this pace"
        lines.append(f"disk      {format_bytes(status.free_bytes)} free{full}")
    return "\n".join(lines)


def _format_part(done: int, whole: int | None, noun: str) -> str:
    return format_count(done, noun) if whole is None else f"{done:,} of {format_count(whole, noun)}"


def describe_example(example: Example) -> str:
    """Describe an example: its tokens, and the norm of each at every site."""
    per_token = {name: value for name, value in example.sites.items() if value.float().ndim == 2}
    pooled = {name: value for name, value in example.sites.items() if name not in per_token}
    tokens = [_shorten(token) for token in example.tokens or [""] * len(example.input_ids)]
    norms = [value.float().norm(dim=1).tolist() for value in per_token.values()]
    head = [f"example {example.index}: {format_count(len(example.input_ids), 'token')}"]
    if example.text is not None:
        head.append(f"text    {_shorten(example.text)}")
    head.extend(f"{_shorten(name):<7} {_shorten(str(value))}" for name, value in example.fields.items())
    for name, value in pooled.items():
        head.append(f"norm of {name}: {value.float().norm().item():.2f}")
    if not per_token:
        return "\n".join([*head, " ".join(tokens)])
    rows = [
        (position, token_id, token, *(round(site[row], 2) for site in norms))
        for row, (position, token_id, token) in enumerate(
            zip(example.positions.tolist(), example.input_ids.tolist(), tokens, strict=True)
        )
    ]
    means = ("", None, "mean norm", *(round(sum(site) / max(1, len(site)), 2) for site in norms))
    table = format_table(("", "id", "token", *per_token), [*rows, means])
    return "\n".join([*head, "", table])
