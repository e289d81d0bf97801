"""`layerprobe.lens`: what the model would predict if it ended at each layer.

Masked language models use their own head. Models without a head use the nearest word embedding, after a map that is
fitted in closed form for each layer on half of the texts and evaluated on the other half.

Needs the model, unlike analyses that read only a store. Hides how ranks are counted in chunks.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.cores import using_few_cores
from layerprobe.errors import InputError, OptionError
from layerprobe.extract.network import find_model
from layerprobe.generation.depthlens import Lens, LensReading, LensSite
from layerprobe.generation.gathering import TokenRows, gather_store, gather_texts
from layerprobe.generation.heads import EmbeddingHead, MaskedHead, fit_ridge
from layerprobe.models import LoadedModel, evaluating
from layerprobe.sites.grammar import list_patterns
from layerprobe.sites.resolve import DEFAULT_SITES, ModelMap, map_model
from layerprobe.sites.stacks import fills_masks, find_device, widen
from layerprobe.store.format import STORE_FILE
from layerprobe.store.guard import check_count, is_number
from layerprobe.store.places import find_place
from layerprobe.store.reader import Store, open_store
from layerprobe.telling import go_through

__all__ = ["lens"]

_CHUNK_ROWS = 256
_MOST_READINGS = 24
_MASK = 0.15
_RIDGE = 1e-3


def lens(
    model: nn.Module | LoadedModel | str,
    source: Store | str | Path | Sequence[str],
    *,
    sites: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    mask: float | None = None,
    max_tokens: int = 4096,
    seed: int = 0,
    device: str | None = None,
    progress: bool | None = None,
) -> Lens:
    """Show how close each layer is to the true token, and what the model would predict from it.

    Args:
        model: The model, or its name. A masked language model (`BertForMaskedLM` and similar, `BertForPreTraining`) is
            read through its own head, after the final norm if it has one. Any other encoder, a discriminator such as
            `ElectraForPreTraining` too, is read through its word embeddings.
        source: A store of the same model, or texts as for `extract`.
        sites: Patterns; None for the embeddings, every layer's output and the final norm.
        tokenizer: The model's; None for that of its checkpoint.
        mask: Share of the tokens of each text, at least one, that are masked and evaluated. None: 0.15 for texts with a
            masked language model, else 0, which leaves every token visible and evaluates them all. Stores take only 0.
        max_tokens: Maximum number of tokens to evaluate: from the first texts, or from examples of a store drawn at
            random. The embedding lens fits its maps on half of them.
        seed: Random seed.
        device: Device for a model given by name.
        progress: Show a progress bar; None: only on a terminal.

    Raises:
        OptionError: a mask for a store or an embedding lens, sites of another width than the model's, an invalid value,
            or an encoder-decoder model.
        InputError: too little text.
        SiteError: a pattern matches nothing.
        NonFiniteError: a row is not finite.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; the map is that of Belrose et al. 2023, "Eliciting
    Latent Predictions from Transformers with the Tuned Lens", to embeddings instead of logits and in closed form.

    Example:
        >>> import layerprobe as lp
        >>> texts = ["The kettle whistled in the kitchen.", "Who left the gate open?", "Rain fell on the roof."]
        >>> found = lp.lens("demo", texts, sites=["embeddings", "layers.5"])
        >>> found.method, [site.site for site in found.sites], found.num_tokens
        ('embedding', ['embeddings', 'layers.5'], 13)
    """
    check_count("max_tokens", max_tokens, 2)
    seed = check_count("seed", seed, 0)
    store = _find_store(source)
    if store is not None and tokenizer is None and isinstance(model, nn.Module) and device is None:
        network: nn.Module = model
    else:
        network, tokenizer = find_model(model, tokenizer, device)
    mapped = map_model(network)
    network = mapped.model
    if getattr(network.config, "is_encoder_decoder", False):
        raise OptionError(f"lens of {mapped.owner}: it has an encoder and a decoder. Pass its encoder.")
    share = _choose_mask(mask, store is not None, fills_masks(network))
    with using_few_cores():
        if store is not None:
            special = set(getattr(tokenizer, "all_special_ids", ()))
            special |= store.vocabulary.special_ids if store.vocabulary is not None else frozenset[int]()
            rows = gather_store(store, sites, special, max_tokens, seed)
        else:
            rows = gather_texts(
                network, tokenizer, source, _choose_sites(mapped, sites),
                mask=share, most=max_tokens, seed=seed, progress=progress,
            )  # fmt: skip
        _check_width(network, mapped.owner, rows)
        write = _choose_writer(store, tokenizer)
        with evaluating(network), torch.no_grad():
            if fills_masks(network):
                return _look_by_head(network, rows, share, write, progress)
            return _look_by_embeddings(network, rows, share, write, seed, progress)


def _find_store(source: Any) -> Store | None:
    if isinstance(source, Store):
        return source
    is_url = isinstance(source, str) and "://" in source
    is_folder = isinstance(source, (str, Path)) and (Path(source) / STORE_FILE).is_file()
    return open_store(find_place(source)) if is_url or is_folder else None


def _choose_mask(mask: float | None, is_store: bool, is_masked_model: bool) -> float:
    if mask is None:
        return 0.0 if is_store or not is_masked_model else _MASK
    if not is_number(mask) or not 0 <= mask < 1:
        raise OptionError(f"mask is {mask!r}: it is a share from 0 to below 1.")
    if mask and is_store:
        raise OptionError(f"mask={mask} for a store: its states were made already. Give texts, or mask=0.")
    if mask and not is_masked_model:
        raise OptionError(f"mask={mask}: a model without a head puts in no words for masks. Use mask=0.")
    return float(mask)


def _choose_sites(mapped: ModelMap, sites: str | Sequence[str] | None) -> list[str]:
    if sites is not None:
        return list_patterns(sites)
    return mapped.leave_out_missing((*DEFAULT_SITES, "norm"))


def _check_width(network: Any, owner: str, rows: TokenRows) -> None:
    vocabulary = network.get_input_embeddings().num_embeddings
    if len(rows.ids) and int(rows.ids.max()) >= vocabulary:
        raise OptionError(
            f"lens of {owner}: token {int(rows.ids.max())} is none of its {vocabulary}. Pass the model's own store."
        )
    if fills_masks(network):
        width = getattr(network.config, "hidden_size", None)
        for site, values in rows.rows.items():
            if width is not None and values.shape[1] != width:
                raise OptionError(
                    f"lens of {owner}: {site!r} is {values.shape[1]} wide, its head reads {width}. Leave the site out."
                )


def _choose_writer(store: Store | None, tokenizer: Any) -> Callable[[Tensor], list[str]]:
    if tokenizer is not None:
        return lambda ids: [str(token) for token in tokenizer.convert_ids_to_tokens(ids.tolist())]
    known = None if store is None else store.id_to_tokens
    return known if known is not None else lambda ids: [str(one) for one in ids.tolist()]


def _look_by_head(
    network: nn.Module,
    rows: TokenRows,
    share: float,
    write: Callable[[Tensor], list[str]],
    progress: bool | None,
) -> Lens:
    head, device = MaskedHead(network), find_device(network)
    has_norm = "norm" in rows.rows
    found: list[LensSite] = []
    guesses: list[tuple[list[str], list[int]]] = []
    for site, values in go_through(rows.rows.items(), "lens", progress, "sites"):
        seen = _Seen()
        for first in range(0, len(values), _CHUNK_ROWS):
            logits = head(values[first : first + _CHUNK_ROWS].to(device), is_final=has_norm and site == "norm")
            seen.add(logits, rows.ids[first : first + _CHUNK_ROWS].to(device), is_logit=True)
        found.append(seen.judge(site, None))
        guesses.append(seen.first(write))
    return Lens("logit", share, len(rows.ids), tuple(found), _readings(rows, guesses, write))


def _look_by_embeddings(
    network: nn.Module,
    rows: TokenRows,
    share: float,
    write: Callable[[Tensor], list[str]],
    seed: int,
    progress: bool | None,
) -> Lens:
    head, device = EmbeddingHead(network), find_device(network)
    texts = torch.unique(rows.texts)
    if len(texts) < 2:
        raise InputError("an embedding lens: all tokens are of one text; half of the texts fit a map. Give two others.")
    order = torch.from_numpy(np.random.default_rng([seed, 23]).permutation(len(texts)))
    fits = torch.isin(rows.texts, texts[order[: len(texts) // 2]])
    judged = TokenRows(
        {site: values[~fits] for site, values in rows.rows.items()},
        rows.ids[~fits], rows.examples[~fits], rows.positions[~fits], rows.texts[~fits],
    )  # fmt: skip
    words_TE = head.words_VE[rows.ids[fits].to(device)].cpu()
    found: list[LensSite] = []
    guesses: list[tuple[list[str], list[int]]] = []
    for site, values in go_through(judged.rows.items(), "lens", progress, "sites"):
        weight, bias = fit_ridge(rows.rows[site][fits], words_TE, _RIDGE)
        mapped, raw = _Seen(), _Seen()
        is_raw = values.shape[1] == head.words_VE.shape[1]
        for first in range(0, len(values), _CHUNK_ROWS):
            part, ids = values[first : first + _CHUNK_ROWS], judged.ids[first : first + _CHUNK_ROWS].to(device)
            mapped.add(head((part.double() @ weight + bias).float().to(device)), ids, is_logit=False)
            if is_raw:
                raw.add(head(part.to(device)), ids, is_logit=False)
        found.append(mapped.judge(site, raw.top1 if is_raw else None))
        guesses.append(mapped.first(write))
    return Lens("embedding", share, len(judged.ids), tuple(found), _readings(judged, guesses, write))


class _Seen:
    """Collect ranks and probabilities of the true tokens at one site, chunk by chunk."""

    def __init__(self) -> None:
        self._ranks: list[Tensor] = []
        self._logs: list[Tensor] = []
        self._guesses: list[Tensor] = []

    def add(self, scores_TV: Tensor, ids: Tensor, *, is_logit: bool) -> None:
        true = scores_TV.gather(1, ids[:, None])
        # ties share the better rank
        self._ranks.append(1 + (scores_TV > true).sum(1).cpu())
        self._guesses.append(scores_TV.argmax(1).cpu())
        if is_logit:
            self._logs.append(widen(true[:, 0] - scores_TV.logsumexp(1)).cpu())

    @property
    def top1(self) -> float:
        return float((torch.cat(self._ranks) == 1).double().mean())

    def judge(self, site: str, unmapped: float | None) -> LensSite:
        ranks = torch.cat(self._ranks).double()
        logs = torch.cat(self._logs) if self._logs else None
        return LensSite(
            site,
            self.top1,
            float((ranks <= 10).double().mean()),
            float(np.median(ranks.numpy())),
            float((1 / ranks).mean()),
            None if logs is None else float(logs.exp().mean()),
            None if logs is None else float(-logs.mean()),
            unmapped,
        )

    def first(self, write: Callable[[Tensor], list[str]]) -> tuple[list[str], list[int]]:
        ranks, guesses = torch.cat(self._ranks), torch.cat(self._guesses)
        return write(guesses[:_MOST_READINGS]), ranks[:_MOST_READINGS].tolist()


def _readings(
    rows: TokenRows, guesses: list[tuple[list[str], list[int]]], write: Callable[[Tensor], list[str]]
) -> tuple[LensReading, ...]:
    tokens = write(rows.ids[:_MOST_READINGS])
    return tuple(
        LensReading(
            int(rows.examples[place]),
            int(rows.positions[place]),
            token,
            tuple(words[place] for words, _ in guesses),
            tuple(ranks[place] for _, ranks in guesses),
        )
        for place, token in enumerate(tokens)
    )
