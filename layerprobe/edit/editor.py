"""`lp.edit`: change values of a model inside a `with` block while it runs.

Its hooks precede all others at a module, so a probe at the same site sees the edited value; nested edits run outermost
first. Under `torch.compile` the same hooks are traced: the arithmetic becomes part of the graph, and custom operators
supply what only the running call knows.

Hides the order of hooks and how calls are followed. Must never know what an edit does.
"""

import inspect
import itertools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.capture.calls import Call
from layerprobe.capture.compiled import Port, forget_compiled_graphs, has_compiled, watching_hooks
from layerprobe.capture.entries import watch_calls
from layerprobe.capture.frames import Frames
from layerprobe.capture.hooks import EDIT, HookSet, Lifecycle
from layerprobe.capture.recompute import watch_second_runs
from layerprobe.capture.values import find_tensor, put_part, put_tensor, take_part
from layerprobe.edit.edits import Edit
from layerprobe.edit.moments import CallState, Moment, note_value
from layerprobe.edit.plan import Point, Slot, plan_points
from layerprobe.edit.traced import ask_for_extra, ask_for_order, ask_for_tokens
from layerprobe.errors import CaptureError
from layerprobe.models import LoadedModel
from layerprobe.sites.resolve import Site, map_model
from layerprobe.sites.stacks import find_device, need_model

__all__ = ["Editor", "edit"]


def edit(
    model: nn.Module | LoadedModel, edits: Mapping[str, Edit | Sequence[Edit]], *, tokenizer: Any = None
) -> "Editor":
    """Edit activations of a model while a `with` block runs; afterwards the model is as it was.

    Args:
        model: A supported Hugging Face model, wrapped or not, or the result of `load_model`, with its tokenizer.
        edits: For each site or pattern, one edit or several, which run in the order given.
        tokenizer: For edits whose `where` names tokens.

    Returns:
        A context manager, for one block.

    Raises:
        SiteError: a pattern matches nothing, or a site cannot be edited.
        ArchitectureError: the model is not supported.
        OptionError: an edit does not fit a site: wrong width or device, or heads that do not exist.
        CaptureError: at the end of the block, if an edited module ran but the model was never called.

    Cost: one new tensor per edit and value, and one more if some tokens stay unchanged.

    Example:
        >>> import torch, layerprobe as lp
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> model = BertModel(tiny).eval()
        >>> with torch.no_grad(), lp.edit(model, {"layers.1": lp.scale(0.0)}):
        ...     output = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> float(output.last_hidden_state.abs().max())
        0.0
    """
    return Editor(model, edits, tokenizer)


class _Numbering:
    """A sink that numbers the calls and keeps nothing."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def open(self, sites: Sequence[Site]) -> None:
        """Do nothing."""

    def begin(self, call: Call) -> None:
        """Assign the next number to a call."""
        call.state = CallState(next(self._numbers))

    def receive(self, call: Call, index: int, value: Tensor) -> None:
        """Do nothing: values are edited by the hooks and not passed on."""

    def finish(self, call: Call) -> None:
        """Do nothing."""

    def abandon(self, call: Call) -> None:
        """Do nothing."""

    def close(self, error: BaseException | None) -> None:
        """Do nothing."""


class Editor(AbstractContextManager["Editor"]):
    """The edits of one `with` block. Made by `lp.edit`."""

    def __init__(
        self, model: nn.Module | LoadedModel, edits: Mapping[str, Edit | Sequence[Edit]], tokenizer: Any
    ) -> None:
        if isinstance(model, LoadedModel):
            model, tokenizer = model.model, tokenizer or model.tokenizer
        model = need_model(model)
        self._given = model
        self._mapped = map_model(model)
        self._root = self._mapped.model
        self.sites, self._points = plan_points(self._mapped, edits, tokenizer)
        self._calls = _Numbering()
        self._frames = Frames(self.sites, len(self._mapped.stacks), self._calls, self._mapped.owner)
        self._frames.spares_cached = True
        self._port = Port(self, find_device(self._root))
        self._hooks = HookSet()
        self._guarding = ExitStack()
        self._has_graphs = False
        # the thread that runs the block, and the first site in it that ran outside a call and so was not edited
        self._thread = 0
        self._left: str | None = None
        self._state = Lifecycle.NEW

    def __enter__(self) -> "Editor":
        if self._state is not Lifecycle.NEW:
            raise CaptureError(f"this edit is {self._state.value}: make a new one for another with block.")
        try:
            self._guarding.enter_context(watching_hooks())
            self._port.open()
            watch_calls(self._hooks, self._given, self._mapped, self._frames, self._port)
            for point in self._points:
                self._attach(point)
                self._refuse_chosen_logits(point)
            watch_second_runs(self._hooks, self._root, self._frames, always=True)
            self._thread = threading.get_ident()
            self._frames.is_open = True
            if has_compiled():  # slow, and Ctrl-C may interrupt it
                forget_compiled_graphs()
        except BaseException:
            self._detach()
            raise
        self._state = Lifecycle.OPEN
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._state = Lifecycle.CLOSED
        self._detach()
        if self._has_graphs:
            forget_compiled_graphs()
        if self._left is not None and error is None:
            self._tell_what_was_left(f"{self._left!r} of {self._mapped.owner}")

    def _tell_what_was_left(self, site: str) -> None:
        """Report a module that ran outside a call: an error if no call was made, otherwise a warning."""
        if not self._frames.has_made:
            raise CaptureError(
                f"{site} ran and was not edited, since the model was not called (model.forward(), a module by itself "
                "and a SentenceTransformer around it go past its hooks): call model(...) inside the with block, or "
                "pass the SentenceTransformer."
            )
        warnings.warn(
            f"{site} ran outside a call of the model too, and was not edited there (model.forward() and a module by "
            "itself go past the model's hooks).",
            stacklevel=3,
        )

    def _detach(self) -> None:
        self._frames.is_open = False
        self._hooks.remove()
        self._port.close()
        self._guarding.close()
        self._frames.drain()

    # hooks

    def _attach(self, point: Point) -> None:
        """Register a hook before all other hooks at the module but after those of outer edits."""
        if point.takes == "input":
            hook = self._make_input_hook(point)
            handle = point.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            beside: Any = point.module._forward_pre_hooks
        else:
            hook = self._make_output_hook(point)
            handle = point.module.register_forward_hook(hook, prepend=True)
            beside = point.module._forward_hooks
        self._hooks.keep(point.module, handle)
        earlier = [number for number, other in beside.items() if hasattr(other, EDIT) and number != handle.id]
        for number in reversed(earlier):
            beside.move_to_end(number, last=False)

    def _refuse_chosen_logits(self, point: Point) -> None:
        """Refuse `logits_to_keep` tensors if an edit must know which tokens the logits belong to."""
        slots = [slot for slot in point.slots if slot.spot.kind != "all" or slot.edit.need == "rows"]
        if not slots or not point.makes_logits:
            return
        task: Any = self._root if len(self._mapped.stacks) == 1 else self._root.decoder
        parameters = list(inspect.signature(type(task).forward).parameters)[1:]

        def refuse(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            given = {**dict(zip(parameters, args, strict=False)), **(kwargs or {})}
            if isinstance(given.get("logits_to_keep"), Tensor):
                raise CaptureError(
                    f"lp.{slots[0].edit.name} at {slots[0].site.name!r}: logits_to_keep is a tensor, and which tokens "
                    "its logits are of is not known here. Pass how many to keep, or edit all of them with where='all' "
                    "and no rows."
                )

        self._hooks.keep(task, task.register_forward_pre_hook(refuse, with_kwargs=True))

    def _make_output_hook(self, point: Point) -> Callable[..., Any]:
        def edit_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            held = self._require_values(point, find_tensor(output))
            made = self._change(point, held)
            return None if made is held else put_tensor(output, held, made)

        setattr(edit_output, EDIT, point.slots)
        return edit_output

    def _make_input_hook(self, point: Point) -> Callable[..., Any]:
        def edit_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
            if kwargs is None:  # torch passes no kwargs if the hook was removed while the module's hooks were running
                return None
            name = None if args else next(iter(kwargs))
            held = self._require_values(point, args[0] if name is None else kwargs[name])
            made = self._change(point, held)
            if made is held:
                return None
            return ((made, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: made})

        setattr(edit_input, EDIT, point.slots)
        return edit_input

    def _require_values(self, point: Point, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = f"values of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise CaptureError(
                f"{point.slots[0].site.name!r} of {self._mapped.owner} gave {got}: only modules that pass floating "
                "tensors can be edited."
            )
        return value

    # values

    def _change(self, point: Point, value: Tensor) -> Tensor:
        """Apply a module's edits to a value."""
        if torch.compiler.is_compiling():
            return self._change_traced(point, value)
        call = self._find_call(point)
        if call is None:
            return value
        moment = note_value(call, point, value.shape, value.device)
        for number, slot in enumerate(point.slots):
            if moment.is_meant[number]:
                mask, held = moment.masks[number], take_part(self._root, slot.site.part, value)
                value = self._apply(slot, value, held, mask, moment.give(slot, mask, held))
        return value

    def _find_call(self, point: Point) -> Call | None:
        """Return the running call; remember the site if there is none."""
        call = self._frames.current()
        if call is None and self._left is None and threading.get_ident() == self._thread:
            # a call that was stopped, or has not yet reached its base model, does not count as outside
            is_outside = not self._frames.by_thread.get(self._thread)
            self._left = point.slots[0].site.name if is_outside else None
        return call

    def _change_traced(self, point: Point, value: Tensor) -> Tensor:
        """Apply the edits inside a compiled graph, where every edit runs and only masks select."""
        token, editor, key = self._port.token, self._port.number, point.key
        masks = ask_for_tokens(token, value, editor, key, len(point.slots))
        for number, slot in enumerate(point.slots):
            mask, extra = masks[number], None
            held = take_part(self._root, slot.site.part, value)
            if slot.edit.need == "order":
                extra = ask_for_order(token, held, editor, key, number)
            elif slot.edit.need:
                extra = ask_for_extra(token, held, editor, key, number)
            value = self._apply(slot, value, held, mask, extra)
        return value

    def _apply(self, slot: Slot, value: Tensor, held: Tensor, mask: Tensor | None, extra: Tensor | None) -> Tensor:
        """Edit a site's part of a value and merge it back; unselected elements stay bit-identical."""
        made = slot.edit.change(held, mask, extra)
        if made is held:
            return value
        kept = slot.columns
        if mask is not None:
            mask = mask if mask.ndim == held.ndim else mask[..., None]
            kept = mask if kept is None else mask & kept
        return put_part(self._root, slot.site.part, value, held, made, kept)

    # callbacks from compiled graphs

    def enter_compiled(
        self, stack: int, ids: Tensor | None, mask: Tensor | None, embeds: Tensor | None, cached: bool
    ) -> None:
        """Record, from a running graph, that a module was called."""
        self._has_graphs = True
        self._frames.enter_compiled(stack, ids, mask, embeds, cached)

    def leave_compiled(self, stack: int, completed: bool) -> None:
        """Record, from a running graph, that a module has returned or raised."""
        self._frames.leave(stack, completed)

    def pick_compiled(self, key: int, value: Tensor) -> Tensor:
        """Return to a running graph the token mask of each edit."""
        point, shape = self._points[key], value.shape[:-1]
        self._has_graphs = True
        call = self._find_call(point)
        if call is None:
            return torch.zeros((len(point.slots), *shape), dtype=torch.bool, device=value.device)
        moment = note_value(call, point, value.shape, value.device)
        if moment.number and any(slot.site.call_index is None for slot in point.slots):
            raise CaptureError(
                f"{point.slots[0].site.name!r} of {self._mapped.owner} was made twice in one call: torch.compile lets "
                "layers share a graph that it has broken in two, and with it the edits of one of them. Do not compile."
            )
        call.state.moments[key] = moment
        masks = []
        for slot, meant, mask in zip(point.slots, moment.is_meant, moment.masks, strict=True):
            if mask is not None and mask.ndim == value.ndim:
                raise CaptureError(
                    f"lp.{slot.edit.name} at {slot.site.name!r}: a mask [B, S, D] is for models that are not compiled. "
                    "Pass one of [B, S], or units."
                )
            meant_here = torch.full(shape, meant, dtype=torch.bool, device=value.device)
            masks.append(meant_here if mask is None else mask)
        return torch.stack(masks)

    def give_compiled(self, key: int, number: int, value: Tensor) -> Tensor:
        """Return to a running graph the extra input of an edit."""
        slot, call = self._points[key].slots[number], self._frames.current()
        moment: Moment | None = None if call is None else call.state.moments.get(key)
        if moment is None or not moment.is_meant[number]:
            is_order = slot.edit.need == "order"
            return torch.arange(value.shape[:-1].numel(), device=value.device) if is_order else torch.zeros_like(value)
        if any(tensor.requires_grad for tensor in slot.edit.tensors.values()) and torch.is_grad_enabled():
            raise CaptureError(
                f"lp.{slot.edit.name} at {slot.site.name!r}: no gradient flows to rows in a compiled model. Patch one "
                "vector [D], or do not compile."
            )
        extra = moment.give(slot, moment.masks[number], value)
        assert extra is not None
        return extra.contiguous()
