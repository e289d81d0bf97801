"""What a probe puts on the modules of a model, so that all of it comes off again and none of it leaves with a copy.

`copy.deepcopy`, `copy.copy` and `pickle` ask an object for its state. A module with hooks of a probe on it has, for as
long, a `__getstate__` among its own attributes that leaves them out; so a copy carries nothing, and a call of the model
costs nothing more. Several probes may be on one module and come off in any order.

Hides torch's handles and how an override of `forward` is stacked on others. Must never know of sites or values.
"""

import enum
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["EDIT", "HookSet", "Lifecycle", "Reader", "Stop", "list_edits", "list_hooks", "list_strange"]

# Attribute of a hook that edits values: what it does to them.
EDIT = "layerprobe_edit"

# Where torch keeps the forward hooks of a module, by the number of their handle.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_LOCK = threading.Lock()
Method = Callable[..., Any]
Make = Callable[[Method], Method]


class Lifecycle(enum.Enum):
    """Where a `with` block is that puts hooks on a model; each is for one block."""

    NEW = "new"
    OPEN = "open"
    CLOSED = "closed"


class Stop(BaseException):
    """Ends a forward after the last requested site; a BaseException, which no `except Exception` in a model stops.

    Args:
        reader: The one whose model the call comes out of.
    """

    def __init__(self, reader: "Reader") -> None:
        self.reader = reader


class Reader(Protocol):
    """A probe on a model that others may be on too."""

    def wants_stop(self) -> bool:
        """Whether the call of this thread should end, and come out of its model, once nobody waits for a value."""
        ...

    def is_within(self, other: Any) -> bool:
        """Whether the call of this thread is made by one that another reader follows, which goes on after it."""
        ...

    def is_waiting(self) -> bool:
        """Whether the call of this thread has yet to make a value for it."""
        ...

    def mark_stopped(self) -> None:
        """Take note that the call of this thread ends here, with all that was asked."""


class HookSet:
    """The hooks and overrides of one probe."""

    def __init__(self) -> None:
        self._hooks: list[tuple[_Guests, RemovableHandle]] = []
        self._overrides: list[tuple[_Guests, str, Make]] = []
        self._joined: tuple[_Guests, Reader] | None = None

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def keep(self, module: nn.Module, handle: RemovableHandle) -> None:
        """Take over a hook just put on `module`."""
        with _LOCK:
            guests = _guests_of(module)
            guests.hooks.add(handle.id)
            self._hooks.append((guests, handle))

    def override(self, module: nn.Module, name: str, make: Make) -> None:
        """Let `make(method)` stand for the module's method `name`, such as `forward`."""
        with _LOCK:
            guests = _guests_of(module)
            guests.overrides.setdefault(name, _Override(module, name)).add(make)
            self._overrides.append((guests, name, make))

    def join(self, base: nn.Module, reader: Reader) -> None:
        """Let the other probes on the same base model know of this one."""
        with _LOCK:
            guests = _guests_of(base)
            guests.readers = (*guests.readers, reader)
            self._joined = guests, reader

    def stop_if_done(self) -> None:
        """End the forward where a probe on the base model wants it, and none waits for a value or has a call around it.

        Raises:
            Stop: to be turned into None where the call began.
        """
        readers = self._joined[0].readers if self._joined is not None else ()
        ending = [reader for reader in readers if reader.wants_stop()]
        if not ending or any(reader.is_waiting() for reader in readers):
            return
        for reader in ending:
            if not any(reader.is_within(other) for other in readers):
                for each in readers:
                    each.mark_stopped()
                raise Stop(reader)

    def remove(self) -> None:
        """Take everything off again."""
        with _LOCK:
            if self._joined is not None:
                (guests, reader), self._joined = self._joined, None
                guests.readers = tuple(other for other in guests.readers if other is not reader)
                guests.leave()
            while self._overrides:
                guests, name, make = self._overrides.pop()
                guests.overrides[name].remove(make)
                guests.leave()
            while self._hooks:
                guests, handle = self._hooks.pop()
                handle.remove()
                guests.hooks.discard(handle.id)
                guests.leave()


def list_edits(module: nn.Module) -> list[Any]:
    """List what edits do to the values of one module."""
    return [getattr(hook, EDIT) for _, hook in list_hooks(module) if hasattr(hook, EDIT)]


def list_strange(module: nn.Module) -> Iterator[Any]:
    """Go through what neither a probe nor an edit has put on one module: hooks, and a method in place of `forward`.

    A method of accelerate's, which brings weights that lie elsewhere, is none of it, but the one under it may be.
    """
    guests = _find_guests(module) or _Guests(module)
    yield from (hook for number, hook in list_hooks(module) if number not in guests.hooks)
    override = guests.overrides.get("forward")
    forward = vars(module).get("forward") if override is None else override.before
    if "_hf_hook" in vars(module):
        forward = vars(module).get("_old_forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        yield forward


def list_hooks(module: nn.Module) -> list[tuple[int, Any]]:
    """List the hooks of one module that see or make values, by number; another thread may put some on meanwhile."""
    return [*vars(module)["_forward_pre_hooks"].items(), *vars(module)["_forward_hooks"].items()]


class _Guests:
    """What the probes have put on one module; called as its `__getstate__`, gives its state without any of it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.hooks: set[int] = set()
        self.overrides: dict[str, _Override] = {}
        self.readers: tuple[Reader, ...] = ()

    def __call__(self) -> Any:
        # Before 3.11 an object has no __getstate__ of its own.
        read = getattr(type(self.module), "__getstate__", None)
        state = self.module.__dict__ if read is None else read(self.module)
        if not isinstance(state, dict):
            return state
        state = {name: value for name, value in state.items() if value is not self}
        for name in _HOOKS:
            if name in state:
                kept = ((number, hook) for number, hook in state[name].items() if number not in self.hooks)
                state[name] = type(state[name])(kept)
        for override in self.overrides.values():
            override.leave_out(state)
        return state

    def leave(self) -> None:
        """Forget the module once nothing is on it."""
        self.overrides = {name: override for name, override in self.overrides.items() if override.makes}
        if not (self.hooks or self.overrides or self.readers):
            self.module.__dict__.pop("__getstate__", None)


class _Override:
    """What stands before a method of one module: `makes` on top of what was there before the first of them."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.makes: list[Make] = []
        self._attributes = module.__dict__
        self._name = name
        self.before = self._attributes.get(name)
        self._method: Method = getattr(module, name)
        self._top = self.before

    def add(self, make: Make) -> None:
        self.makes.append(make)
        self._stack()

    def remove(self, make: Make) -> None:
        self.makes.remove(make)
        self._stack()

    def leave_out(self, attributes: dict[str, Any]) -> None:
        """Put back among the attributes what was there before."""
        if attributes.get(self._name) is self._top:
            _set_or_delete(attributes, self._name, self.before)

    def _stack(self) -> None:
        if self._attributes.get(self._name) is not self._top:
            return  # somebody has wrapped it since: theirs stays, and what it wraps only passes on
        method = self._method
        for make in self.makes:
            method = make(method)
        self._top = method if self.makes else self.before
        _set_or_delete(self._attributes, self._name, self._top)


def _find_guests(module: nn.Module) -> _Guests | None:
    found = module.__dict__.get("__getstate__")
    return found if isinstance(found, _Guests) and found.module is module else None


def _guests_of(module: nn.Module) -> _Guests:
    found = _find_guests(module)
    if found is None:
        found = module.__dict__["__getstate__"] = _Guests(module)
    return found


def _set_or_delete(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        attributes.pop(name, None)
    else:
        attributes[name] = value
