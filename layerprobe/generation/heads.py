"""Apply a masked language model's head to any states; for models without one, map states to word embeddings.

The model's own `forward` computes its head: in a shallow copy of the model, a module that returns the states replaces
the base. So every architecture's own head is used, and neither the model nor its hooks are touched.

Hides where heads lie. Must never know of stores or texts.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from layerprobe.errors import OptionError
from layerprobe.sites.resolve import ModelMap, map_model

__all__ = ["EmbeddingHead", "MaskedHead", "fit_ridge"]


class _Given(nn.Module):
    """A substitute for a base model that returns given states for any input."""

    def __init__(self, states_BSD: Tensor) -> None:
        super().__init__()
        self._states = states_BSD

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        states: Any = self._states
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states[:, 0])


class MaskedHead:
    """The head of a masked language model, applied to any states.

    Args:
        model: A masked language model, without a wrapper.

    Raises:
        OptionError: its base is not a submodule of its own, separate from the head.
    """

    def __init__(self, model: nn.Module) -> None:
        mapped = map_model(model)
        self._model = mapped.model
        self._path = mapped.stacks[0].path
        if not self._path or "." in self._path:
            raise OptionError(
                f"lens of {mapped.owner}: its base is not a part of its own. Use a BertForMaskedLM or kin."
            )
        self._norm = _find_norm(mapped)
        self._dtype = next(mapped.model.parameters()).dtype

    def __call__(self, rows_TD: Tensor, is_final: bool) -> Tensor:
        """Score the words of the vocabulary.

        Args:
            rows_TD: States.
            is_final: Whether the model's final norm, if it has one, was already applied; otherwise it is applied first.

        Returns:
            float32 `[T, V]`.
        """
        states = rows_TD.to(self._dtype)[None]
        if self._norm is not None and not is_final:
            states = self._norm.forward(states)
        twin: Any = copy.copy(self._model)
        twin._modules = {**self._model._modules, self._path: _Given(states)}
        ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        # bypasses hooks on the model, because this is not a call of it
        output = type(twin).forward(twin, input_ids=ids, return_dict=True)
        logits = getattr(output, "logits", None)
        return (output.prediction_logits if logits is None else logits)[0].float()


class EmbeddingHead:
    """A head whose score of a word is the cosine of its embedding with a vector."""

    def __init__(self, model: nn.Module) -> None:
        own: Any = model
        self.words_VE = own.get_input_embeddings().weight.detach().float()
        self._directions = nn.functional.normalize(self.words_VE, dim=1)

    def __call__(self, vectors_TE: Tensor) -> Tensor:
        """Score words, float32 `[T, V]`."""
        return nn.functional.normalize(vectors_TE.float(), dim=1) @ self._directions.T


def _find_norm(mapped: ModelMap) -> Any:
    """Find the final norm of a model; None if it has none."""
    found = [site for site in mapped.table if site.name == "norm"]
    return mapped.model.get_submodule(found[0].module) if found else None


def fit_ridge(rows_TD: Tensor, words_TE: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Fit a map from states to the word embeddings of their tokens: ridge regression with intercept, in closed form.

    With X and Y centred, W = (X'X + strength * trace(X'X) / D * I)^-1 X'Y and b = mean(Y) - mean(X) W.

    Returns:
        Weight W, float64 `[D, E]`, and intercept b, float64 `[E]`.

    Source: Hoerl and Kennard 1970, "Ridge Regression", equation 2.1; the strength is relative to the mean eigenvalue.
    """
    rows, words = rows_TD.double(), words_TE.double()
    mean, centre = rows.mean(0), words.mean(0)
    rows, words = rows - mean, words - centre
    gram = rows.T @ rows
    # a tiny penalty keeps the matrix invertible for a constant layer, which maps to the mean embedding
    penalty = max(strength * float(gram.trace()) / len(gram), torch.finfo(torch.float64).tiny)
    gram.diagonal().add_(penalty)
    weight = torch.linalg.solve(gram, rows.T @ words)
    return weight, centre - mean @ weight
