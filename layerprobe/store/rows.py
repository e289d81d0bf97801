"""Rows of a store: find sites with common rows, copy rows out of a shard, and iterate over all rows in batches.

Hides how rows from many shards are gathered into one tensor. Must never know of examples or records.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from layerprobe.errors import FormatError, MissingExample, OptionError, SiteError
from layerprobe.store.catalog import Catalog
from layerprobe.store.description import StoredSite
from layerprobe.store.headers import SCALE_SUFFIX
from layerprobe.store.naming import list_names
from layerprobe.store.order import ORDER, EpochOrder, RowOptions
from layerprobe.store.shards import ScaledRows, Shard

__all__ = ["RowBatches", "choose_sites", "take_rows"]

# Small batches are gathered several at a time, to locate their rows only once. Above this size, fresh memory that
# exceeds the CPU cache costs more than that saves.
_WINDOW_BYTES = 4 << 20

Batch = TypeVar("Batch")


def choose_sites(catalog: Catalog, sites: str | Sequence[str] | None) -> tuple[StoredSite, ...]:
    """Choose sites that have their rows in common.

    Args:
        catalog: The store's catalog.
        sites: Names; duplicates are dropped. None for every site with a row per token, or if there is none, every site
            with a vector per example.

    Raises:
        SiteError: a site is not stored, or no site has rows.
        OptionError: a site holds attention weights, or row-per-token and vector-per-example sites are mixed.
    """
    if sites is None:
        by_kind = {
            kind: [site for site in catalog.sites.values() if site.kind == kind] for kind in ("token", "example")
        }
        chosen = by_kind["token"] or by_kind["example"]
    else:
        chosen = list({site.name: site for site in map(catalog.need_site, list_names(sites))}.values())
    if not chosen:
        raise SiteError(f"no site to take rows of in {catalog.place}: it holds {', '.join(catalog.sites) or 'none'}.")
    for site in chosen:
        if site.kind == "attention":
            raise OptionError(
                f"{site.name!r} is one matrix per head and cannot be gone through by rows: read it by example."
            )
        if site.kind != chosen[0].kind:
            raise OptionError(
                f"{chosen[0].name!r} and {site.name!r} have no rows in common: one has a row per token, the other a "
                "vector per example. Go through them one after the other."
            )
    return tuple(chosen)


def _pick(source: Tensor, rows: np.ndarray, out: Tensor) -> Tensor:
    """Copy some rows of a tensor of any dtype into `out`, which is contiguous.

    Uses numpy, in this thread: if another process occupies a core, torch's threads wait for each other and the same
    copy takes thirty times as long.
    """
    if not len(rows):
        return out
    if not 0 <= int(rows.min()) <= int(rows.max()) < len(source):
        raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(source)}")
    # the default mode copies through a buffer, in case an index is invalid; all were checked above
    np.take(_as_bytes(source), rows, axis=0, out=_as_bytes(out), mode="clip")
    return out


def _as_bytes(tensor: Tensor) -> np.ndarray:
    """View `[n, ...]` as `[n, bytes]`, because numpy has no bfloat16 or float8."""
    return tensor.reshape(len(tensor), -1).view(torch.uint8).numpy()


def _find_worker() -> tuple[int, int]:
    """Return this `DataLoader` worker's id and the number of workers; (0, 1) outside of any."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker is not None else (0, 1)


def take_rows(shard: Shard, site: StoredSite, rows: Tensor) -> Tensor:
    """Copy some rows of a site out of a shard: `[n, D]` in the stored dtype, or float32 if int8 is stored."""
    places = rows.numpy()
    values = _pick(shard.tensor(site.name), places, torch.empty(len(rows), site.width, dtype=site.dtype, device="cpu"))
    if site.dtype != torch.int8:
        return values
    scale = _pick(shard.tensor(site.name + SCALE_SUFFIX), places, values.new_empty(len(rows), dtype=torch.float32))
    return ScaledRows(values, scale).float()


class RowBatches(Iterator[Batch], Generic[Batch]):
    """Iterate over an epoch of rows in batches. Made by `store.rows` and `store[site].rows`.

    `len()` is the number of batches left in this share. `state_dict()` is small and plain; after `load_state_dict()`,
    in this process or another, the iterator returns exactly the batches that were left.
    """

    def __init__(
        self,
        catalog: Catalog,
        sites: Sequence[StoredSite],
        options: RowOptions,
        finish: Callable[[dict[str, Tensor]], Batch],
    ) -> None:
        self._catalog = catalog
        self._sites = tuple(sites)
        self._options = options
        self._finish = finish
        self._order = EpochOrder(catalog, sites, options)
        self._num_batches = -(-self._order.num_rows // int(options.batch_size))
        row_bytes = max(1, sum(site.bytes_per_vector for site in sites))
        self._window = max(1, _WINDOW_BYTES // (row_bytes * int(options.batch_size)))
        self._given = 0  # batches returned from this share
        self._is_checked = False
        self._ready: deque[dict[str, Tensor]] = deque()
        # the pieces needed last, with the objects that keep them cached
        self._held: dict[tuple[int, int, int], list[object]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": deque(), "_held": {}}  # gathered again after unpickling

    def __iter__(self) -> "RowBatches[Batch]":
        return self

    def __len__(self) -> int:
        return max(0, len(self._share()) - self._given)

    def __next__(self) -> Batch:
        if not self._ready:
            numbers = self._share()[self._given : self._given + self._window]
            if not numbers:
                self._held = {}
                raise StopIteration
            try:
                self._ready.extend(self._gather(numbers))
            except (FormatError, MissingExample):
                if len(numbers) == 1:
                    raise
                # return the batches before the damaged one first
                self._ready.extend(self._gather(numbers[:1]))
        batch = self._finish(self._ready.popleft())
        self._given += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch, and what identifies the epoch."""
        return {**self._identity(), "given": self._given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the position of an iterator over the same rows.

        Raises:
            OptionError: the state belongs to other rows, another order or another share.
        """
        for name, own in self._identity().items():
            if state.get(name) != own:
                way = "ask for the same rows in the same way"
                if name == "order":
                    way = "rows are mixed otherwise now, begin the epoch anew"
                raise OptionError(
                    f"a state with {name}={state.get(name)!r} cannot go on here, where {name} is {own!r}: {way}."
                )
        given = state.get("given")
        if type(given) is not int or not 0 <= given <= len(self._share()):
            raise OptionError(f"a state with given={given!r} cannot go on: the batches here are {len(self._share())}.")
        self._given = given
        self._ready.clear()
        self._held = {}

    def _share(self) -> range:
        """Return the batch numbers of this rank and, inside a `DataLoader`, of this worker."""
        turn, workers = _find_worker()
        options = self._options
        return range(turn * options.world + options.rank, self._num_batches, options.world * workers)

    def _identity(self) -> dict[str, Any]:
        worker, workers = _find_worker()
        said = {name: int(value) for name, value in vars(self._options).items()}
        return {
            **said,
            **({"order": ORDER} if self._options.shuffle else {}),
            "worker": worker,
            "workers": workers,
            "fingerprint": self._catalog.fingerprint,
            "sites": [site.name for site in self._sites],
            "num_rows": self._order.num_rows,
        }

    def _gather(self, numbers: range) -> list[dict[str, Tensor]]:
        size, num_rows = int(self._options.batch_size), self._order.num_rows
        spans = [(number * size, min((number + 1) * size, num_rows)) for number in numbers]
        lengths = [stop - start for start, stop in spans]
        gathered = self._make_room(sum(lengths))
        if self._options.shuffle:
            gathered = self._gather_mixed(np.concatenate([np.arange(start, stop) for start, stop in spans]), gathered)
        else:
            # consecutive batches form one span
            self._copy_runs([(spans[0][0], spans[-1][1])] if numbers.step == 1 else spans, gathered)
        found: dict[str, tuple[Tensor, ...]] = {}
        tensors = {name: tensor.split(lengths) for name, tensor in gathered.items()}
        for site in self._sites:
            found[site.name] = tensors[site.name]
            if site.dtype == torch.int8:
                pairs = zip(tensors[site.name], tensors[site.name + SCALE_SUFFIX], strict=True)
                found[site.name] = tuple(ScaledRows(values, scale).float() for values, scale in pairs)
        return [{name: parts[place] for name, parts in found.items()} for place in range(len(spans))]

    def _make_room(self, num_rows: int) -> dict[str, Tensor]:
        """Allocate a tensor for the rows of each site, and for int8 scales."""
        if not self._is_checked:
            # opening one shard checks the claimed widths before memory is allocated for them
            self._catalog.shard(self._order.groups[0][0][0])
            self._is_checked = True
        room: dict[str, Tensor] = {}
        for site in self._sites:
            room[site.name] = torch.empty(num_rows, site.width, dtype=site.dtype, device="cpu")
            if site.dtype == torch.int8:
                room[site.name + SCALE_SUFFIX] = torch.empty(num_rows, dtype=torch.float32, device="cpu")
        return room

    def _fetch_group(self, group: int, names: Sequence[str]) -> None:
        pieces = self._order.groups[group]
        if self._held.keys() != set(pieces):
            self._held = {}  # drop the old pieces first, to free their memory
            self._held = dict(zip(pieces, self._catalog.fetch(pieces, names, len(pieces)), strict=True))

    def _fetch_coming(self, row: int, names: Sequence[str]) -> None:
        """Fetch the piece that contains a row and the upcoming ones, several at a time; `_held` keeps them in order."""
        pieces = self._order.list_coming(row, self._share(), int(self._options.batch_size))
        self._held = {piece: self._held[piece] for piece in pieces if piece in self._held}
        missing = [piece for piece in pieces if len(self._held.get(piece, ())) < len(names)]
        if pieces[0] in missing or 2 * len(missing) >= len(pieces):
            num_needed = int(pieces[0] in missing)
            found = self._held | dict(zip(missing, self._catalog.fetch(missing, names, num_needed), strict=True))
            self._held = {piece: found[piece] for piece in pieces}

    def _copy_runs(self, spans: Sequence[tuple[int, int]], room: Mapping[str, Tensor]) -> None:
        """Gather rows in stored order: each contiguous run in a shard is one copy."""
        targets, sources, at, filled = [_as_bytes(out) for out in room.values()], list[np.ndarray](), (-1, -1), 0
        for start, stop in spans:
            for group, piece, first, last in self._order.find_runs(start, stop):
                if (group, piece) != at:
                    at, current = (group, piece), self._order.groups[group][piece]
                    if next(iter(self._held), None) != current:  # else the previous batch fetched it already
                        row = self._order.starts[group] + int(self._order.bounds[group][piece]) + first
                        self._fetch_coming(row, list(room))
                    shard = self._catalog.shard(current[0])
                    sources = [_as_bytes(shard.piece(name, *current[1:])) for name in room]
                end = filled + last - first
                for target, source in zip(targets, sources, strict=True):
                    target[filled:end] = source[first:last]
                filled = end

    def _gather_mixed(self, rows: np.ndarray, room: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather shuffled rows shard by shard in file order, then permute them into epoch order."""
        inverse = np.empty(len(rows), dtype=np.int64)
        for group, first, last, places in self._order.locate(rows):
            sorted_at = np.argsort(places, kind="stable")
            inverse[first + sorted_at] = np.arange(first, last)
            places = places[sorted_at]
            bounds = self._order.bounds[group]
            self._fetch_group(group, list(room))
            cuts = np.searchsorted(places, bounds)
            for piece in np.flatnonzero(np.diff(cuts)).tolist():
                number, *span = self._order.groups[group][piece]
                shard, part = self._catalog.shard(number), slice(int(cuts[piece]), int(cuts[piece + 1]))
                local = places[part] - int(bounds[piece])
                for name, out in room.items():
                    _pick(shard.piece(name, *span), local, out[first + part.start : first + part.stop])
        return {name: _pick(tensor, inverse, torch.empty_like(tensor)) for name, tensor in room.items()}
