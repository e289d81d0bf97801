"""Match names and patterns to stored sites.

A store does not record the number of layers of its model: negative layers count from the last stored one, and an open
slice ends there. Every function that takes sites of a store uses this module, so that all agree.

Hides how stored names are matched. Must never know of files or models.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, cast

from layerprobe.errors import SiteError
from layerprobe.sites.grammar import MODULE_PREFIX, expand_patterns, list_patterns
from layerprobe.store.guard import brief

__all__ = ["is_stored", "leave_out", "list_named", "list_names", "match_sites", "need_name"]

_INPUT_SUFFIX = ":input"
_COUNTED = re.compile(r"(?:[a-z_]+\.)?layers\.-\d+(?:\.[a-z_.]+)?\Z")


def match_sites(patterns: str | Sequence[str] | None, names: Sequence[str], owner: str) -> list[str]:
    """Find the stored sites that match patterns, in the order of the store.

    Args:
        patterns: As for `extract`; negative layers count from the last stored one. None for every site.
        names: The stored sites.
        owner: What to call the store in messages.

    Raises:
        SiteError: a pattern is malformed, or matches nothing that is stored.
    """
    if patterns is None:
        return list(names)
    patterns = list_patterns(patterns)
    if not patterns:
        raise SiteError(f"no site asked of {owner}: it holds {', '.join(names)}.")
    chosen = {pattern for pattern in patterns if pattern in names}
    own = [name for name in names if not name.startswith(MODULE_PREFIX)]
    inputs = [name.removesuffix(_INPUT_SUFFIX) for name in names if name.endswith(_INPUT_SUFFIX)]
    outputs = [name for name in names if not name.endswith(_INPUT_SUFFIX)]
    for pattern in patterns:
        if pattern not in chosen:
            modules = inputs if pattern.endswith(_INPUT_SUFFIX) else outputs
            modules = [name.removeprefix(MODULE_PREFIX) for name in modules if name.startswith(MODULE_PREFIX)]
            chosen.update(expand_patterns(pattern, own, _count_layers(own), owner, modules))
    return [name for name in names if name in chosen]


def leave_out(
    patterns: str | Sequence[str] | None, names: Sequence[str], owner: str, is_unfit: Callable[[str], bool]
) -> tuple[list[str], list[str]]:
    """Find the stored sites that match patterns, leaving out unfit sites that only a wildcard matched.

    Args:
        patterns, names, owner: As for `match_sites`.
        is_unfit: Whether a site is unfit.

    Returns:
        The sites that fit or were named explicitly (the caller may refuse the latter), or all that match if that leaves
        none; then the sites left out.

    Raises:
        SiteError: as `match_sites`.
    """
    found, named = match_sites(patterns, names, owner), list_named(patterns, names)
    fit = [name for name in found if name in named or not is_unfit(name)] or found
    return fit, [name for name in found if name not in fit]


def list_named(patterns: str | Sequence[str] | None, names: Collection[str]) -> set[str]:
    """List the stored sites that patterns name explicitly, without a wildcard."""
    asked = [] if patterns is None else list_patterns(patterns)
    return {need_name(one, names, "the store") for one in asked if is_stored(one, names)}


def _count_layers(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        segments = name.split(".")
        for place, segment in enumerate(segments[:-1]):
            if segment == "layers" and segments[place + 1].isdecimal():
                stack = ".".join(segments[: place + 1])
                counts[stack] = max(counts.get(stack, 0), int(segments[place + 1]) + 1)
    return counts


def list_names(sites: object) -> list[Any]:
    """Convert one site name or several to a list; anything else stays in it, for `need_name` to refuse."""
    try:
        return [sites] if isinstance(sites, str) else list(cast("Iterable[Any]", sites))
    except TypeError:
        return [sites]


def need_name(site: object, names: Collection[str], owner: str) -> str:
    """Return the stored name of a site, resolving a negative layer against the last stored one.

    Raises:
        SiteError: it is not stored; the message lists those that are.
    """
    if isinstance(site, str) and site in names:
        return site
    cause: SiteError | None = None
    if type(site) is int:
        why = f"sites are named by texts. Examples are read by store.example({site}). It"
    elif not isinstance(site, str):
        why = "sites are named by texts, one at a time. It"
    elif _COUNTED.match(site):
        try:
            return match_sites(site, list(names), owner)[0]
        except SiteError as error:
            cause = error
        why = "negatives count from the last layer that is stored. It"
    else:
        why = "it"
    held = ", ".join(names) or "none"
    raise SiteError(f"no site {brief(repr(site))} in {owner}: {why} holds {held}.") from cause


def is_stored(site: object, names: Collection[str]) -> bool:
    """Return whether `need_name` finds a site."""
    try:
        return bool(need_name(site, names, "the store"))
    except SiteError:
        return False
