"""Fingerprint user code: a pool function, or whatever is attached to a model's modules.

Two runs are the same only if their code does the same, and a run resumes only if another process can verify that. So
functions are hashed by their code and what it refers to, tensors by their bytes, objects by class and attributes. What
cannot be hashed never matches anything.

Library code is covered by package versions, so it is identified by name.
"""

import contextlib
import dis
import enum
import functools
import io
import logging
import pathlib
import random
import re
import sys
import types
import uuid
import weakref
from collections.abc import Mapping, Set
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from layerprobe.capture.hooks import list_edits, list_strange
from layerprobe.capture.pooling import Pool

__all__ = ["describe_changes", "describe_pool"]

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type(...), torch.dtype, np.dtype,
    pathlib.PurePath,
)  # fmt: skip
# Hooks and modules of these packages belong to the model, whose config and weights describe them.
_OF_MODELS = {"accelerate", "layerprobe", "sentence_transformers", "torch", "transformers", "transformers_modules"}
_NAMED = {*sys.stdlib_module_names, *_OF_MODELS} - {"__main__"}
# Attributes of a module that are covered elsewhere.
_STATE = ("_buffers", "_modules", "_parameters", "training")
_BUILT_IN = (
    types.BuiltinFunctionType, types.ClassMethodDescriptorType, types.GetSetDescriptorType, types.MemberDescriptorType,
    types.MethodDescriptorType, types.MethodWrapperType, types.WrapperDescriptorType,
)  # fmt: skip


def describe_pool(pool: Pool) -> str | None:
    """Describe a pool; a callable by its name and a digest of its code."""
    return pool if pool is None or isinstance(pool, str) else _describe(pool)


def describe_changes(model: nn.Module) -> list[str]:
    """Name what may change what a model computes, besides its config and its weights.

    That is edits, hooks, a replaced `forward`, and modules of the user or of other libraries, such as adapters, with
    their settings. A setting that changes with every call, such as a counter, makes every run a different one. Probes
    are not included, nor are hooks of torch, transformers and accelerate, which come with the model. Hooks on all
    modules at once, and methods put into a class, are not seen.
    """
    found, strange = [], []
    for path, module in model.named_modules():
        place = path or "the model"
        found += [f"{place}: lp.edit#{_digest_of(edit)}" for edit in list_edits(module)]
        found += [f"{place}: {_describe(one)}" for one in list_strange(module) if _owner_of(one) not in _OF_MODELS]
        if (owner := _owner_of(type(module))) not in _OF_MODELS:
            counts = _is_setting if _is_installed(owner) else _is_setting_of_user
            settings = {name: held for name, held in vars(module).items() if name not in _STATE and counts(held)}
            strange.append((path, type(module), settings))
    if strange:
        kinds = dict.fromkeys(f"{kind.__module__}.{kind.__qualname__}" for _, kind, _ in strange)
        found.append(f"modules of {', '.join(kinds)}#{_digest_of(strange)}")
    return found


def _describe(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '?')}.{named.__qualname__}#{_digest_of(value)}"


def _digest_of(value: Any) -> str:
    return _Walk({}).digest_of(value)


def _owner_of(value: Any) -> str:
    while isinstance(value, functools.partial):
        value = value.func
    return _top_of(getattr(value, "__module__", None) or type(value).__module__)


def _top_of(module: str | None) -> str:
    return (module or "").partition(".")[0]


class _Walk:
    """Traverses everything a value consists of, each object once, and feeds it to a digest.

    Args:
        seen: Numbers of the objects already visited, by id.
    """

    def __init__(self, seen: Mapping[int, int]) -> None:
        self._digest = xxhash.xxh3_64()
        self._seen = dict(seen)
        # keeps temporary objects alive, so that no id is reused
        self._kept: list[Any] = []

    def digest_of(self, value: Any) -> str:
        try:
            self.add(value)
        except RecursionError:
            self._add_hidden()
        return self._digest.hexdigest()

    def add(self, value: Any) -> None:
        if isinstance(value, enum.Enum):
            self._say("enum", repr(value))
        elif isinstance(value, _PLAIN):
            self._say(type(value).__qualname__, str(value) if isinstance(value, pathlib.PurePath) else repr(value))
        elif isinstance(value, torch.device):
            self._say("device")  # a run may resume on another device
        elif id(value) in self._seen:
            self._say("again", self._seen[id(value)])
        else:
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
            self._add_new(value)

    def _add_new(self, value: Any) -> None:
        if isinstance(value, (Tensor, np.ndarray, np.generic)):
            self._add_array(value)
        elif isinstance(value, (list, tuple, Set, Mapping)):
            self._add_collection(value)
        elif isinstance(value, re.Pattern):
            self._say("pattern", value.pattern, value.flags)
        elif isinstance(value, types.CodeType):
            self._say("code", value.co_code, value.co_names, value.co_varnames, value.co_freevars)
            self._add_all(value.co_consts)
        elif isinstance(value, types.ModuleType):
            self._add_module(value)
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
        elif isinstance(value, _BUILT_IN):
            owner = getattr(value, "__self__", None)
            self._say("built in", getattr(value, "__module__", None), value.__qualname__)
            self._add_all(() if isinstance(owner, types.ModuleType | None) else (owner,))
        else:
            self._add_object(value)

    def _add_array(self, value: Any) -> None:
        self._say("array", value.dtype, tuple(value.shape))
        if isinstance(value, Tensor) and value.is_meta:
            return
        try:
            if isinstance(value, Tensor):
                held = value.detach().cpu().contiguous()
                if held.numel():
                    self._digest.update(held.view(-1).view(torch.uint8).numpy().data)
            elif value.dtype.hasobject:
                self.add(value.tolist())
            else:
                self._digest.update(value.tobytes())
        except (NotImplementedError, RuntimeError, TypeError):  # sparse tensors, and others without accessible bytes
            self._add_hidden()

    def _add_collection(self, value: Any) -> None:
        self._add_class(type(value))
        self._say("of", len(value))
        if isinstance(value, Set):
            # unordered: hash each element separately and sort
            self._say(sorted(_Walk(self._seen).digest_of(one) for one in value))
        elif isinstance(value, Mapping):
            for pair in list(value.items()):
                self._add_all(pair)
        else:
            self._add_all(value)

    def _add_module(self, value: types.ModuleType) -> None:
        self._say("module", value.__name__)
        file = getattr(value, "__file__", None)
        if file and not _is_installed(_top_of(value.__name__)):
            with contextlib.suppress(OSError):
                self._digest.update(pathlib.Path(file).read_bytes())

    def _add_class(self, value: type) -> None:
        self._say("class", value.__module__, value.__qualname__)
        if _is_installed(_top_of(value.__module__)):
            return
        self._add_all(value.__bases__)
        for name, held in sorted(vars(value).items()):
            # hash methods and the class's own attributes, but not metadata such as __module__ or __doc__
            is_noted = name.startswith("__") and not isinstance(held, (types.FunctionType, staticmethod, classmethod))
            if not is_noted and not name.startswith("_abc_") and not isinstance(held, _BUILT_IN):
                self._say("attribute", name)
                self.add(held)

    def _add_function(self, value: types.FunctionType) -> None:
        self._say("function", value.__module__, value.__qualname__)
        top, code, names = _top_of(value.__module__), value.__code__, value.__globals__
        if top in _NAMED:
            return
        self._add_all((value.__defaults__, value.__kwdefaults__))
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is still empty
                self.add(cell.cell_contents)
        if not _is_installed(top):
            self.add(code)
            self._add_all(names[name] for name in _find_operands(code, "LOAD_GLOBAL", "LOAD_NAME") if name in names)
            self._add_all(sys.modules[name] for name in _find_operands(code, "IMPORT_NAME") if name in sys.modules)

    def _add_object(self, value: Any) -> None:
        if isinstance(value, logging.Logger):
            self._say("logger", value.name)
            return
        if isinstance(value, weakref.ref):
            self._add_all(("reference", value()))
            return
        self._add_class(type(value))
        own = _attributes_of(value)
        if own is None and type(value) is not object:
            said = repr(value)
            if type(value).__repr__ is object.__repr__ or " at 0x" in said:
                self._add_hidden()
            self._say("said", said)  # e.g. a date, a ufunc, a fraction
        if isinstance(value, (io.IOBase, random.Random)):
            self._add_hidden()
        for name, held in sorted((own or {}).items()):
            if name == "__getstate__":  # a probe's, present while it is attached to a module
                continue
            self._say("attribute", name)
            # torch keys hooks by a running number, which differs between runs
            is_hooks = isinstance(value, nn.Module) and "_hooks" in name and isinstance(held, dict)
            self.add(list(held.values()) if is_hooks else held)

    def _add_hidden(self) -> None:
        """Add a token that matches nothing, for values whose state is not accessible: a lock, a generator, a file."""
        self._say("like nothing else", uuid.uuid4())

    def _add_all(self, values: Any) -> None:
        for value in values:
            self.add(value)
        self._say("end")

    def _say(self, *words: object) -> None:
        self._digest.update(repr(words).encode())


def _attributes_of(value: Any) -> dict[str, Any] | None:
    """Return an object's attributes; None if it can have none and so may hide its state."""
    own: dict[str, Any] = {}
    has_slots = False
    for one in type(value).__mro__:
        slots = vars(one).get("__slots__")
        has_slots |= slots is not None
        for name in (slots,) if isinstance(slots, str) else slots or ():
            mangled = f"_{one.__name__.lstrip('_')}{name}" if name[:2] == "__" != name[-2:] else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, mangled):
                own[mangled] = getattr(value, mangled)
    if hasattr(value, "__dict__"):
        return own | vars(value)
    return own if has_slots else None


@functools.lru_cache
def _is_installed(top: str) -> bool:
    """Return whether a package is an installed library."""
    if top in _NAMED or top == "numpy":
        return True
    module = sys.modules.get(top)
    places = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", ())]
    return any({"dist-packages", "site-packages"} & {*pathlib.PurePath(place).parts} for place in places)


def _find_operands(code: types.CodeType, *operators: str) -> list[str]:
    """List the names that some opcodes use in a function and in its nested functions, sorted, without duplicates."""
    found = {one.argval for one in dis.get_instructions(code) if one.opname in operators}
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return sorted(found.union(*(_find_operands(one, *operators) for one in inner)))


def _is_setting(value: Any, depth: int = 8) -> bool:
    """Return whether a value is plain data or a collection of it; not a device, since runs may resume elsewhere."""
    if not isinstance(value, (list, tuple, set, frozenset, Mapping)):
        return isinstance(value, _PLAIN)
    inner = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    return depth > 0 and all(_is_setting(one, depth - 1) for one in inner)


def _is_setting_of_user(value: Any) -> bool:
    """Return whether a value is a setting, an array or tensor, or a function."""
    return _is_setting(value) or isinstance(value, (Tensor, np.ndarray, types.FunctionType, functools.partial))
