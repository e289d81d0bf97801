"""Attach hooks and method overrides to modules so that they can be removed completely and are never copied.

`copy.deepcopy`, `copy.copy` and `pickle` ask an object for its state. While a module carries a probe's hooks, its
instance attributes include a `__getstate__` that omits them, so copies carry no hooks and calls of the model cost
nothing extra. Several probes may share a module and be removed in any order.

Hides torch's handles and how overrides of `forward` stack. Must never know of sites or values.
"""

import enum
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["EDIT", "HookSet", "Lifecycle", "Reader", "Stop", "list_edits", "list_hooks", "list_strange"]

# Name of the attribute by which a hook that edits values describes the edit.
EDIT = "layerprobe_edit"

# The dicts in which torch keeps a module's forward hooks, by handle id.
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
    """State of a `with` block that attaches hooks to a model; each object serves one block."""

    NEW = "new"
    OPEN = "open"
    CLOSED = "closed"


class Stop(BaseException):
    """End a forward pass after the last requested site.

    A BaseException, so that no `except Exception` in a model catches it.

    Args:
        reader: The reader at whose model the exception is caught.
    """

    def __init__(self, reader: "Reader") -> None:
        self.reader = reader


class Reader(Protocol):
    """A probe on a model that it may share with other probes."""

    def wants_stop(self) -> bool:
        """Return whether this thread's call should end early once no reader is waiting for a value."""
        ...

    def is_within(self, other: Any) -> bool:
        """Return whether this thread's call is nested in a call that `other` follows and that continues afterwards."""
        ...

    def is_waiting(self) -> bool:
        """Return whether this thread's call has yet to produce a value for this reader."""
        ...

    def mark_stopped(self) -> None:
        """Record that this thread's call ends here with every requested value."""


class HookSet:
    """The hooks and overrides of one probe."""

    def __init__(self) -> None:
        self._hooks: list[tuple[_Guests, RemovableHandle]] = []
        self._overrides: list[tuple[_Guests, str, Make]] = []
        self._joined: tuple[_Guests, Reader] | None = None

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def keep(self, module: nn.Module, handle: RemovableHandle) -> None:
        """Take ownership of a hook just registered on `module`."""
        with _LOCK:
            guests = _guests_of(module)
            guests.hooks.add(handle.id)
            self._hooks.append((guests, handle))

    def override(self, module: nn.Module, name: str, make: Make) -> None:
        """Replace the module's method `name`, such as `forward`, by `make(method)`."""
        with _LOCK:
            guests = _guests_of(module)
            guests.overrides.setdefault(name, _Override(module, name)).add(make)
            self._overrides.append((guests, name, make))

    def join(self, base: nn.Module, reader: Reader) -> None:
        """Make this probe known to the other probes on the same base model."""
        with _LOCK:
            guests = _guests_of(base)
            guests.readers = (*guests.readers, reader)
            self._joined = guests, reader

    def stop_if_done(self) -> None:
        """End the forward pass if a probe wants it, no probe waits for a value, and no outer call must continue.

        Raises:
            Stop: caught at the outermost call, which then returns None.
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
        """Remove all hooks and overrides."""
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
    """List the edits attached to one module."""
    return [getattr(hook, EDIT) for _, hook in list_hooks(module) if hasattr(hook, EDIT)]


def list_strange(module: nn.Module) -> Iterator[Any]:
    """Iterate over the hooks of one module, and its replaced `forward`, that neither a probe nor an edit has attached.

    The `forward` with which accelerate loads offloaded weights does not count, but the method beneath it may.
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
    """List one module's forward hooks by handle id, as a copy: another thread may attach hooks meanwhile."""
    return [*vars(module)["_forward_pre_hooks"].items(), *vars(module)["_forward_hooks"].items()]


class _Guests:
    """What the probes have attached to one module; as its `__getstate__`, returns the state without any of it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.hooks: set[int] = set()
        self.overrides: dict[str, _Override] = {}
        self.readers: tuple[Reader, ...] = ()

    def __call__(self) -> Any:
        # Before Python 3.11 objects have no default __getstate__.
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
        """Detach from the module once nothing is left on it."""
        self.overrides = {name: override for name, override in self.overrides.items() if override.makes}
        if not (self.hooks or self.overrides or self.readers):
            self.module.__dict__.pop("__getstate__", None)


class _Override:
    """The stacked overrides of one method of a module: each of `makes` wraps the one before."""

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
        """Restore the original attribute in a copy of the module's attributes."""
        if attributes.get(self._name) is self._top:
            _set_or_delete(attributes, self._name, self.before)

    def _stack(self) -> None:
        if self._attributes.get(self._name) is not self._top:
            return  # other code has wrapped it since: keep that wrapper; our method beneath it only passes calls on
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
