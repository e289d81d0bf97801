"""How the command line shows stores and examples.

Turns objects of the library into text. Computes nothing but what it takes to lay them out.
"""

from layerprobe.store.format import parse_shard_name
from layerprobe.store.guard import brief
from layerprobe.store.reader import Example, Store
from layerprobe.tables import format_bytes, format_count, format_table

__all__ = ["describe_example", "describe_store"]


def describe_store(store: Store) -> str:
    """Lay out what a store holds."""
    model = store.description.get("model") or {}
    sizes = {name: size for name, size in store.place.list_sizes().items() if parse_shard_name(name) is not None}
    state = "complete" if store.is_complete else "not complete"
    listed = [str(shard["file"]) for shard in (store.index or {}).get("shards", [])]
    if lost := [name for name in listed if name not in sizes]:
        state = f"{format_count(len(lost), 'shard')} lost, {lost[0]} the first"
    if not store.is_complete or lost:
        state += ": run the same extraction again to go on"
    lines = [
        f"store     {store.place}: {state}",
        f"model     {brief(model.get('id') or '(unnamed)')} ({brief(model.get('class'))})",
        f"holds     {len(store):,} examples, {store.num_tokens:,} tokens, "
        f"{format_count(store.num_shards, 'shard')}, {format_bytes(sum(sizes.values()))}",
        f"pool      {store.pool or 'none: a row per real token'}",
    ]
    index = store.index or {}
    if index.get("truncated"):
        lines.append(f"cut       {index['truncated']:,} texts were longer than the maximum length")
    if index.get("nonfinite"):
        counts = ", ".join(f"{count:,} at {brief(site)}" for site, count in index["nonfinite"].items())
        lines.append(f"nonfinite {counts}")
    views = [store[site] for site in store.sites]
    rows = [(view.site, view.kind, str(view.dtype).removeprefix("torch."), view.width) for view in views]
    return "\n".join([*lines, "", format_table(("site", "kind", "dtype", "width"), rows)])


def describe_example(example: Example) -> str:
    """Lay out an example's tokens and, for each of them, the norm at each site."""
    per_token = {name: value for name, value in example.sites.items() if value.float().ndim == 2}
    pooled = {name: value for name, value in example.sites.items() if name not in per_token}
    tokens = example.tokens or [""] * len(example.input_ids)
    norms = [value.float().norm(dim=1).tolist() for value in per_token.values()]
    head = [f"example {example.index}: {len(example.input_ids)} tokens"]
    if example.text is not None:
        head.append(f"text    {_shorten(example.text)}")
    head.extend(f"{name:<7} {_shorten(str(value))}" for name, value in example.fields.items())
    for name, value in pooled.items():
        head.append(f"norm of {name}: {value.float().norm().item():.2f}")
    if not per_token:
        return "\n".join([*head, " ".join(tokens)])
    rows = [
        (position, token_id, token, *(round(site[position], 2) for site in norms))
        for position, (token_id, token) in enumerate(zip(example.input_ids.tolist(), tokens, strict=True))
    ]
    means = ("", None, "mean norm", *(round(sum(site) / max(1, len(site)), 2) for site in norms))
    table = format_table(("", "id", "token", *per_token), [*rows, means])
    return "\n".join([*head, "", table])


def _shorten(text: str) -> str:
    """Bring a text to one line without control characters, of at most 200 characters."""
    line = "".join(character if character.isprintable() else " " for character in text[:200])
    return line + ("..." if len(text) > 200 else "")
