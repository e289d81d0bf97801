"""`lp.watch` and `lp.WatchCallback`: statistics of a model's sites during training, every so many steps.

Between watched steps a single hook counts the model's calls. In a watched step the site hooks are attached when the
call begins and removed when it ends; gradients arrive later, at tensor hooks that belong to the graph.

Hides when that is, and where numbers are logged. Must never wait for the device before a step is logged.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.capture.calls import Context, read_context
from layerprobe.capture.compiled import forget_compiled_graphs, has_compiled
from layerprobe.capture.hooks import HookSet
from layerprobe.capture.readings import Readings, Taken, require_uncompiled
from layerprobe.capture.select import BatchSelection, write_rows
from layerprobe.capture.sinks import is_per_token, select_call
from layerprobe.capture.target import Target
from layerprobe.capture.vitals import Vitals
from layerprobe.errors import CaptureError, OptionError
from layerprobe.models import LoadedModel
from layerprobe.sites.resolve import map_model
from layerprobe.sites.stacks import calls_forward, need_model
from layerprobe.store.guard import check_count

__all__ = ["WatchCallback", "Watcher", "watch"]

Log = Callable[[int, dict[str, float]], object]


class Watcher(AbstractContextManager["Watcher"]):
    """The hooks of a watch.

    Args:
        model: The model being trained.
        sites: Patterns.
        log: As for `watch`.
        choose: Called at each training call; returns the step if it is to be watched, otherwise None.
        once: Remove all hooks after the first watched call.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: str | Sequence[str],
        log: Any,
        choose: Callable[[], int | None],
        *,
        once: bool = False,
    ) -> None:
        self._log = _find_log(log)
        require_uncompiled(model, "watch")
        if calls_forward(model):
            raise OptionError("watch of a SentenceTransformer: it calls past hooks. Pass model[0].auto_model.")
        self._mapped = map_model(model)
        chosen = self._mapped.select(sites)
        for site in chosen:
            if site.kind in ("attention", "source"):
                raise OptionError(f"watch of {site.name!r}: it has no row per token. Ask for attention.context.")
        self._choose = choose
        self._once = once
        self._readings = Readings(self._mapped, chosen, self._take)
        self._always, self._hooks = HookSet(), HookSet()
        self._contexts: dict[int, Context] = {}
        # cached by stack, first position, shape and device: computing a selection synchronises with the device
        self._selections: dict[tuple[int, int, torch.Size, torch.device], BatchSelection] = {}
        self._vitals: dict[str, Vitals] = {}
        self._watched: int | None = None

    def __enter__(self) -> "Watcher":
        if self._always:
            raise CaptureError("this watch is open already. Make a new one for another with block.")
        if has_compiled():
            forget_compiled_graphs()  # a compiled function that calls the model would not run the new hooks
        root = self._mapped.model
        try:
            self._always.keep(root, root.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._always.keep(root, root.register_forward_hook(self._leave, always_call=True))
        except BaseException:
            self._always.remove()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._always.remove()
        self._hooks.remove()
        if has_compiled():
            forget_compiled_graphs()  # frames that the compiler skipped because of the hooks can be compiled again
        try:
            self.flush()
        except Exception:
            if error is None:  # an error raised in the block takes precedence
                raise

    def flush(self) -> None:
        """Log the last watched step, if that has not been done."""
        step, self._watched = self._watched, None
        vitals, self._vitals = self._vitals, {}
        if step is not None and vitals:
            self._log(step, {f"{site}/{name}": value for site, v in vitals.items() for name, value in v.read().items()})

    def _enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        if torch.compiler.is_compiling():
            # the compiler skips this frame and runs it uncompiled; with fullgraph=True the caller sees this message
            raise CaptureError("watch: torch.compile is to take a model that is watched. Compile it after the watch.")
        if kwargs is None or not torch.is_grad_enabled():
            return
        self._hooks.remove()  # left over from a call that Ctrl-C interrupted
        self.flush()
        self._watched = self._choose()
        if self._watched is None:
            return
        self._contexts.clear()
        self._selections.clear()
        try:
            for number, stack in enumerate(self._mapped.stacks):
                if stack.base is module:
                    # a hook attached to it now would not run in this call
                    self._note(number, module, args, kwargs)
                else:
                    hook = partial(self._note, number)
                    self._hooks.keep(stack.base, stack.base.register_forward_pre_hook(hook, with_kwargs=True))
            self._readings.attach(self._hooks)
        except BaseException:
            self._hooks.remove()
            raise

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._hooks.remove()
        if self._watched is not None and self._once:
            self._always.remove()
        if output is None:  # the call raised
            self._watched = None
            self._vitals = {}

    def _note(self, number: int, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """Record the attention mask with which a stack is called."""
        if kwargs is not None:
            parameters = list(inspect.signature(type(module).forward).parameters)[1:]
            context = read_context(dict(zip(parameters, args, strict=False)) | kwargs)
            self._contexts[number] = context
            self._selections = {of: selection for of, selection in self._selections.items() if of[0] != number}
            self._readings.begin(context.shape[1] if context.shape else None)

    def _take(self, taken: Taken) -> None:
        site, value = taken.site, taken.value
        if self._watched is None or not value.is_floating_point():
            return
        vitals = self._vitals.setdefault(site.name, Vitals())
        vitals.add_rows(self._select(taken))
        if value.requires_grad:
            value.register_hook(vitals.add_gradient)

    def _select(self, taken: Taken) -> Tensor:
        """Reduce a value to the rows of its real tokens."""
        value, site = taken.value.detach(), taken.site
        if value.ndim != 3 or not is_per_token(site, value):
            return value.flatten(0, -2)
        number = site.stack if site.stack in self._contexts else next(reversed(self._contexts))
        of = number, taken.start, value.shape[:2], value.device
        if (selection := self._selections.get(of)) is None:
            mask = self._contexts[number].attention_mask
            if mask is not None and mask.ndim == 2:
                mask = mask[:, taken.start : taken.start + value.shape[1]]
            selection = select_call(Context(None, mask, (value.shape[0], value.shape[1])), value)
            self._selections[of] = selection
        rows_TD = torch.empty(selection.num_rows, value.shape[2], dtype=value.dtype, device=value.device)
        write_rows(Target(rows_TD), value, selection)
        return rows_TD


def watch(model: nn.Module | LoadedModel, sites: str | Sequence[str], *, every: int = 50, log: Any) -> Watcher:
    """Watch a model during training: norms, dead and saturated units, gradients, by site.

    A `with` block around the training loop. Calls under `no_grad` are not steps. The numbers of a step are logged when
    the next one begins or the block ends, since its backward pass comes after its forward pass. With several calls per
    optimizer step, each call is a step.

    Args:
        model: A supported model, or the result of `load_model`; not compiled.
        sites: Patterns.
        every: Watch the first step, then one step in this many.
        log: Called with the step and a dict of numbers such as `layers.3/norm`; or a TensorBoard writer.

    Raises:
        SiteError: a pattern matches nothing.
        OptionError: `every` or `log` is not valid; the model is compiled, or not a model; attention weights are
            requested.

    Cost: a hook per call; in a watched one a few passes over each value, and over each gradient.

    Example:
        >>> import torch, layerprobe as lp
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
        >>> model, seen = BertModel(tiny).train(), {}
        >>> with lp.watch(model, "layers.*", every=2, log=seen.__setitem__):
        ...     for _ in range(3):
        ...         model(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state.square().sum().backward()
        >>> list(seen), [name for name in seen[2] if name.startswith("layers.0/")][::4]
        ([0, 2], ['layers.0/norm', 'layers.0/gradient_norm'])
    """
    check_count("every", every)
    steps = count()

    def choose() -> int | None:
        step = next(steps)
        return step if step % every == 0 else None

    return Watcher(need_model(model), sites, log, choose)


class WatchCallback:
    """Watch a transformers `Trainer`: `Trainer(..., callbacks=[lp.WatchCallback("layers.*", log=print)])`.

    Steps are optimizer steps. If a step has several calls, the first is watched; its numbers are logged at the end of
    the step.

    Args:
        sites, every, log: As for `watch`.

    Raises:
        OptionError: `every` or `log` is not valid. Errors in `sites` are raised when training begins.

    Example:
        >>> import layerprobe as lp
        >>> from transformers import TrainerCallback
        >>> isinstance(lp.WatchCallback("layers.*", every=100, log=print), TrainerCallback)
        True
    """

    def __new__(cls, *_: Any, **__: Any) -> "WatchCallback":
        """Create an instance that derives from TrainerCallback, importing transformers only now."""
        return object.__new__(_join_trainer() if cls is WatchCallback else cls)

    def __init__(self, sites: str | Sequence[str], *, every: int = 50, log: Any) -> None:
        check_count("every", every)
        _find_log(log)
        self._sites = sites
        self._every = every
        self._log = log
        self._watcher: Watcher | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        """Check the sites against the model."""
        self._make_watcher(model, 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **_: Any) -> None:
        """Watch the first call of a step."""
        if state.global_step % self._every == 0:
            self._close()
            self._watcher = self._make_watcher(model, state.global_step)
            self._watcher.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log the numbers of the step."""
        self._close()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove every hook."""
        self._close()

    def _make_watcher(self, model: nn.Module, step: int) -> Watcher:
        steps = iter([step])
        return Watcher(model, self._sites, self._log, lambda: next(steps, None), once=True)

    def _close(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.__exit__(None, None, None)


@cache
def _join_trainer() -> type:
    from transformers import TrainerCallback

    return type("WatchCallback", (WatchCallback, TrainerCallback), {"__doc__": WatchCallback.__doc__})


def _find_log(log: Any) -> Log:
    """Return the function that logs: `log` itself, or one that writes to a TensorBoard writer.

    Raises:
        OptionError: `log` is neither.
    """
    if hasattr(log, "add_scalar"):

        def write(step: int, said: Mapping[str, float]) -> None:
            for name, value in said.items():
                log.add_scalar(name, value, step)

        return write
    if not callable(log):
        raise OptionError(f"log={log!r}: give a function of (step, numbers), or a writer with add_scalar.")
    return log
