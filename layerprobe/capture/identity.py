"""What tells one piece of a user's code from another: a pool, or what somebody has put on a model's modules.

Two runs may be one only where both do the same, and a run may be gone on with only where that can be told in another
process. So a function is known by its code and by all that its code sees, a tensor by its bytes, an object by its
attributes; what holds something that cannot be told so is like nothing else, and like nothing later.

Must never know of stores.
"""

import contextlib
import dis
import enum
import functools
import inspect
import io
import pathlib
import random
import re
import sys
import types
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from layerprobe.capture.hooks import list_edits, list_strange
from layerprobe.capture.pooling import Pool

__all__ = ["describe_changes", "describe_pool"]

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type(...), torch.dtype, torch.device, np.dtype,
    pathlib.PurePath, re.Pattern,
)  # fmt: skip
# Their functions and classes are known by name, their hooks and modules by the config and the weights of a model.
_OF_MODELS = {"accelerate", "layerprobe", "sentence_transformers", "torch", "transformers"}
_NAMED = {*sys.stdlib_module_names, *_OF_MODELS, "numpy"} - {"__main__"}
# Of a module, what is told otherwise.
_STATE = ("_buffers", "_modules", "_parameters", "training")
# Of a class, what says where and how it was written.
_NOT_CONTENT = ("__doc__", "__firstlineno__", "__module__", "__qualname__", "__static_attributes__")


def describe_pool(pool: Pool) -> str | None:
    """Name a pool for `store.json`: a callable by its name and by what tells it from any other."""
    return pool if pool is None or isinstance(pool, str) else _describe(pool)


def describe_changes(model: nn.Module) -> list[str]:
    """Name what may change what a model computes, beside its config and its weights.

    Edits, hooks, a `forward` that was put in place, and modules of the user's or of other libraries, such as adapters.
    Probes are none of it, nor are hooks of torch, transformers and accelerate, which come with the model.
    """
    found, strange = [], []
    for path, module in model.named_modules():
        place = path or "the model"
        found += [f"{place}: lp.edit#{_digest_of(edit)}" for edit in list_edits(module)]
        found += [f"{place}: {_describe(one)}" for one in list_strange(module) if _owner_of(one) not in _OF_MODELS]
        if _owner_of(type(module)) not in _OF_MODELS:
            settings = {name: held for name, held in vars(module).items() if name not in _STATE and _is_plain(held)}
            strange.append((path, type(module), settings))
    if strange:
        kinds = dict.fromkeys(f"{kind.__module__}.{kind.__qualname__}" for _, kind, _ in strange)
        found.append(f"modules of {', '.join(kinds)}#{_digest_of(strange)}")
    return found


def _describe(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '?')}.{named.__qualname__}#{_digest_of(value)}"


def _digest_of(value: Any) -> str:
    digest = xxhash.xxh3_64()
    _Walk(digest).add(value)
    return digest.hexdigest()


def _owner_of(value: Any) -> str:
    while isinstance(value, functools.partial):
        value = value.func
    return _top_of(getattr(value, "__module__", None) or type(value).__module__)


def _top_of(module: str | None) -> str:
    return (module or "").partition(".")[0]


class _Walk:
    """Goes through all that a value is made of, each thing once, and feeds it to a digest."""

    def __init__(self, digest: Any) -> None:
        self._digest = digest
        self._seen: dict[int, int] = {}
        # what was made on the way must not give its number to another
        self._kept: list[Any] = []

    def add(self, value: Any) -> None:
        if isinstance(value, enum.Enum):
            self._say("enum", repr(value))
        elif isinstance(value, _PLAIN):
            self._say(type(value).__qualname__, str(value) if isinstance(value, pathlib.PurePath) else repr(value))
        elif id(value) in self._seen:
            self._say("again", self._seen[id(value)])
        else:
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
            self._add_new(value)

    def _add_new(self, value: Any) -> None:
        if isinstance(value, Tensor):
            held = value.detach().cpu().contiguous()
            self._say("tensor", value.dtype, tuple(value.shape))
            self._digest.update(held.view(-1).view(torch.uint8).numpy() if held.numel() else b"")
        elif isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
            self._say("array", value.dtype, value.shape)
            self._digest.update(value.tobytes())
        elif isinstance(value, (list, tuple)):
            self._say(type(value).__qualname__, len(value))
            self._add_all(value)
        elif isinstance(value, (set, frozenset)):
            self._say("set", sorted(map(_digest_of, value)))
        elif isinstance(value, Mapping):
            self._say(type(value).__qualname__, len(value))
            for pair in value.items():
                self._add_all(pair)
        elif isinstance(value, types.CodeType):
            self._say("code", value.co_code, value.co_names, value.co_varnames, value.co_freevars)
            self._add_all(value.co_consts)
        elif isinstance(value, types.ModuleType):
            self._say("module", value.__name__)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, types.FunctionType):
            self._add_function(value)
        elif isinstance(value, types.MethodType):
            self._add_all(("method", value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            self._add_all(("partial", value.func, value.args, value.keywords))
        elif isinstance(value, (staticmethod, classmethod)):
            self._add_all((type(value).__qualname__, value.__func__))
        elif isinstance(value, property):
            self._add_all(("property", value.fget))
        elif inspect.isroutine(value):
            owner = getattr(value, "__self__", None)
            self._say("built in", getattr(value, "__module__", None), getattr(value, "__qualname__", repr(type(value))))
            self._add_all(() if isinstance(owner, types.ModuleType | None) else (owner,))
        else:
            self._add_object(value)

    def _add_class(self, value: type) -> None:
        self._say("class", value.__module__, value.__qualname__)
        if not _is_installed(_top_of(value.__module__)):
            self._add_all(value.__bases__)
            own = {name: one for name, one in sorted(vars(value).items()) if name not in _NOT_CONTENT}
            self._add_all(pair for pair in own.items() if inspect.isroutine(pair[1]) or _is_data(pair[1]))

    def _add_function(self, value: types.FunctionType) -> None:
        self._say("function", value.__module__, value.__qualname__)
        top, seen = _top_of(value.__module__), value.__globals__
        if top in _NAMED:
            return
        self._add_all((value.__defaults__, value.__kwdefaults__))
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # one that is not filled yet
                self.add(cell.cell_contents)
        if not _is_installed(top):
            self.add(value.__code__)
            self._add_all(seen[name] for name in sorted(set(_names_in(value.__code__))) if name in seen)

    def _add_object(self, value: Any) -> None:
        if _holds_hidden(value):
            # a generator, a lock, a file: what they do next is not written anywhere
            self._say("like nothing else", uuid.uuid4())
        self._add_class(type(value))
        slots = {name for one in type(value).__mro__ for name in _slots_of(one)} - {"__dict__", "__weakref__"}
        own = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
        for name in sorted(own.keys() - {"__getstate__"}):
            self._say("attribute", name)
            # torch keeps hooks by numbers that it counts up
            is_hooks = isinstance(value, nn.Module) and "_hooks" in name and isinstance(own[name], dict)
            self.add(list(own[name].values()) if is_hooks else own[name])

    def _add_all(self, values: Any) -> None:
        for value in values:
            self.add(value)
        self._say("end")

    def _say(self, *words: object) -> None:
        self._digest.update(repr(words).encode())


@functools.lru_cache
def _is_installed(top: str) -> bool:
    """Whether a package is a library: what it does is the business of its version."""
    if top in _NAMED:
        return True
    module = sys.modules.get(top)
    places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", ())]
    return any({"dist-packages", "site-packages"} & {*pathlib.PurePath(place).parts} for place in places)


def _names_in(code: types.CodeType) -> Iterator[str]:
    """List the globals that a function and those within it look up."""
    yield from (one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _names_in(const)


def _slots_of(one: type) -> tuple[str, ...]:
    slots = one.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_data(value: Any) -> bool:
    return isinstance(value, (*_PLAIN, staticmethod, classmethod, property, Tensor, np.ndarray, list, tuple))


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a word, or a collection of such; not a device, where a run may go on elsewhere."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN) and not isinstance(value, torch.device)


def _holds_hidden(value: Any) -> bool:
    """Whether an object may hold what is not among its attributes: one of a class that is not Python's."""
    if isinstance(value, (io.IOBase, random.Random)):
        return True
    has_slots = any("__slots__" in vars(one) for one in type(value).__mro__)
    return not hasattr(value, "__dict__") and not has_slots and type(value) is not object
