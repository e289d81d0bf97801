"""Parse site patterns such as `layers.8:12.ffn.act` and expand them to site names.

A site name is a sequence of segments joined by dots. In a pattern, the segment after `layers` may be an index, a slice
or a comma-separated list of both; negative numbers count from the end. Any segment may be `*`, which matches exactly
one segment. `module:NAME` and `module:NAME:input` refer to any module of the model by its own name.

Hides how patterns are parsed and matched. Never sees a model: it works on names alone.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from layerprobe.errors import SiteError

__all__ = ["MODULE_PREFIX", "Pattern", "expand_patterns", "list_patterns", "parse_pattern"]

MODULE_PREFIX = "module:"
_INPUT_SUFFIX = ":input"
_LITERAL = re.compile(r"[a-z][a-z0-9_]*\Z")
_INDEX = re.compile(r"-?\d+\Z")
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?\Z")
_DIGITS = re.compile(r"\d+")
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
# prefixes that model families use for their layers: `bert.encoder.layer.0`, `transformer.h.0`, `blocks.0`
_ELSEWHERE = re.compile(r"^(?:[a-z_]+\.)*(?:layers?|blocks?|h)\.")


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: its text and its segments.

    `selector_at` is the position of the segment that selects layers, or None.
    """

    text: str
    segments: tuple[str, ...]
    selector_at: int | None
    is_module: bool = False


def list_patterns(patterns: str | Sequence[str]) -> list[str]:
    """Return one pattern or several as a list.

    Raises:
        SiteError: the argument is neither a string nor an iterable of strings.
    """
    listed: list[Any] = [patterns]
    if not isinstance(patterns, (str, bytes, Mapping)):
        with suppress(TypeError):  # list() also raises TypeError for a 0-dimensional tensor or array
            listed = list(patterns)
    for one in listed:
        if not isinstance(one, str):
            meant = f"layers.{one}" if type(one) is int else "layers.*"
            raise SiteError(
                f"{type(one).__name__} is no site pattern: give a text such as {meant!r}, or a list of them."
            )
    return listed


def parse_pattern(text: str) -> Pattern:
    """Parse one pattern.

    Raises:
        SiteError: the text is not a valid pattern.
    """
    if not text:
        raise SiteError("'' is not a site pattern: a pattern is a text such as 'layers.*' or 'layers.-1'.")
    if text.startswith(MODULE_PREFIX):
        name = text[len(MODULE_PREFIX) :].removesuffix(_INPUT_SUFFIX)
        if not name:
            raise SiteError(f"{text!r} names no module: write 'module:NAME' or 'module:NAME:input'.")
        return Pattern(text, tuple(name.split(".")), None, is_module=True)
    segments = tuple(text.split("."))
    selector_at = None
    for position, segment in enumerate(segments):
        if position and segments[position - 1] == "layers":
            _parse_selector(segment, text)
            selector_at = position
        elif segment != "*" and not _LITERAL.match(segment):
            guess = _guess(text)
            raise SiteError(
                f"{text!r} is not a site pattern: {segment!r} is neither a name nor '*'. "
                "Indices, slices and lists stand after 'layers.', as in 'layers.0,6:9.ffn.act'."
                + (f" Did you mean {guess!r}?" if guess else "")
            )
    return Pattern(text, segments, selector_at)


def _guess(text: str) -> str | None:
    """Translate the layer notation of other libraries (`layer.0`, `encoder.layer.0`, `layers[0]`) to a site pattern."""
    guess = _ELSEWHERE.sub("layers.", _BRACKETS.sub(r".\1", text.lower()))
    if guess == text:
        return None
    try:
        return parse_pattern(guess).text
    except SiteError:
        return None


def _parse_selector(segment: str, text: str) -> list[int | slice | None]:
    """Parse `*`, `3`, `-1`, `8:12`, `-4:` or a comma-separated list of them; None stands for `*`."""
    selectors: list[int | slice | None] = []
    for part in segment.split(","):
        if part == "*":
            selectors.append(None)
        elif _INDEX.match(part):
            selectors.append(int(part))
        elif match := _SLICE.match(part):
            selectors.append(slice(*(int(bound) if bound is not None else None for bound in match.groups())))
        else:
            raise SiteError(
                f"{text!r} is not a site pattern: {part!r} selects no layer. "
                "Use an index (3, -1), a slice (8:12, -4:), a list (0,6,11) or '*'."
            )
    return selectors


def _select_layers(pattern: Pattern, num_layers: int, owner: str) -> set[int]:
    """Turn the selector of a pattern into layer indices; an index out of range is an error."""
    assert pattern.selector_at is not None
    chosen: set[int] = set()
    for selector in _parse_selector(pattern.segments[pattern.selector_at], pattern.text):
        if selector is None:
            chosen.update(range(num_layers))
        elif isinstance(selector, int):
            _check_bound(selector, num_layers - 1, num_layers, pattern, owner)
            chosen.add(selector % num_layers)
        else:
            for bound in (selector.start, selector.stop):
                if bound is not None:
                    _check_bound(bound, num_layers, num_layers, pattern, owner)
            indices = range(num_layers)[selector]
            if not indices:
                raise SiteError(f"{pattern.text!r} selects no layer of {owner}: the slice is empty.")
            chosen.update(indices)
    return chosen


def _check_bound(value: int, most: int, num_layers: int, pattern: Pattern, owner: str) -> None:
    if not -num_layers <= value <= most:
        example = _replace_selector(pattern, str(num_layers - 1))
        last = _replace_selector(pattern, "-1")
        raise SiteError(
            f"no site {pattern.text!r} in {owner}: layers are 0 to {num_layers - 1}. Use {example!r} or {last!r}."
        )


def _replace_selector(pattern: Pattern, selector: str) -> str:
    segments = list(pattern.segments)
    if pattern.selector_at is not None:
        segments[pattern.selector_at] = selector
    return ".".join(segments)


def expand_patterns(
    patterns: str | Sequence[str],
    names: Sequence[str],
    num_layers: Mapping[str, int],
    owner: str,
    modules: Sequence[str] = (),
) -> list[str]:
    """Expand patterns to site names.

    Args:
        patterns: One pattern or several; several give the union.
        names: All site names of the model, in execution order.
        num_layers: Number of layers behind each prefix that ends in `layers`: `{"layers": 12}`.
        owner: Name of the model in error messages.
        modules: The model's own module names, for `module:` patterns.

    Returns:
        Names in the order of `names`, then `module:` sites in the order requested, without duplicates.

    Raises:
        SiteError: a pattern is malformed, selects a layer that does not exist, or matches nothing.
    """
    patterns = list_patterns(patterns)
    if not patterns:
        raise SiteError(f"no site asked of {owner}: pass at least one pattern, such as 'layers.*'.")
    chosen: set[str] = set()
    own_modules: dict[str, None] = {}
    for text in patterns:
        pattern = parse_pattern(text)
        if pattern.is_module:
            own_modules.update(dict.fromkeys(_match_modules(pattern, modules, owner)))
        else:
            chosen.update(_match_names(pattern, names, num_layers, owner))
    return [name for name in names if name in chosen] + list(own_modules)


def _match_names(pattern: Pattern, names: Sequence[str], num_layers: Mapping[str, int], owner: str) -> list[str]:
    wanted, at = _replace_selector(pattern, "*").split("."), pattern.selector_at
    found = [name for name in names if _matches(wanted, name.split("."))]
    if at is not None:
        prefix = wanted[:at]
        stacks = [stack for stack in num_layers if _matches(prefix, stack.split("."))]
        if not stacks:
            raise SiteError(
                f"no site {pattern.text!r} in {owner}: it has no {'.'.join(prefix)!r}.{_suggest(pattern, names)}"
            )
        # resolve per stack: -1 is a different layer in stacks of different depth
        chosen = {f"{stack}.{index}" for stack in stacks for index in _select_layers(pattern, num_layers[stack], owner)}
        found = [name for name in found if ".".join(name.split(".")[: at + 1]) in chosen]
    if not found:
        raise SiteError(f"no site {pattern.text!r} in {owner}.{_suggest(pattern, names)}")
    return found


def _matches(wanted: Sequence[str], segments: Sequence[str]) -> bool:
    return len(wanted) == len(segments) and all(
        want in ("*", have) for want, have in zip(wanted, segments, strict=True)
    )


def _match_modules(pattern: Pattern, modules: Sequence[str], owner: str) -> list[str]:
    suffix = _INPUT_SUFFIX if pattern.text.endswith(_INPUT_SUFFIX) else ""
    found = [name for name in modules if _matches(pattern.segments, name.split("."))]
    if not found:
        asked = ".".join(pattern.segments)
        close = difflib.get_close_matches(asked, modules, n=1, cutoff=0.5)
        hint = f" Did you mean 'module:{close[0]}{suffix}'?" if close else ""
        raise SiteError(f"no module {asked!r} in {owner}.{hint}")
    return [f"{MODULE_PREFIX}{name}{suffix}" for name in found]


def _suggest(pattern: Pattern, names: Sequence[str]) -> str:
    """Suggest the closest site name; layer numbers are replaced by 0 so that they do not affect the match."""
    asked = _replace_selector(pattern, "0")
    shapes = {_DIGITS.sub("0", name): None for name in names}
    close = difflib.get_close_matches(_DIGITS.sub("0", asked), list(shapes), n=1, cutoff=0.5)
    if not shapes:
        return f" Its sites are modules alone: ask for them as '{MODULE_PREFIX}NAME'."
    if not close:
        return f" Its sites are {', '.join(shape.replace('.0', '.i') for shape in shapes)}."
    selector = pattern.segments[pattern.selector_at] if pattern.selector_at is not None else "*"
    guess = close[0].replace("layers.0", f"layers.{selector}")
    if guess == pattern.text:  # a captured result may lack some layers
        return f" It holds {', '.join(name for name in names if _DIGITS.sub('0', name) == close[0])}."
    return f" Did you mean {guess!r}?"
