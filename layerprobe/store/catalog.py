"""The shards of a store: which there are, which are mapped, and where each example lies.

Shards are mapped on first use and checked against their header and `store.json`. A catalog is a snapshot of the store
at the time it was opened. Pickling it keeps the paths and drops the mappings.

Hides files, shard names and the limit on open files. Must never know of the meaning of sites, models or hooks.
"""

import contextlib
import operator
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from layerprobe.errors import FormatError, MissingExample, OptionError, StoreError
from layerprobe.store.checks import read_totals
from layerprobe.store.description import StoredSite, load_description
from layerprobe.store.format import INDEX_FILE, STORE_FILE, load_header, load_json
from layerprobe.store.guard import brief
from layerprobe.store.headers import POSITIONS, check_stored, parse_shard_name
from layerprobe.store.index import ShardInfo, check_apart, parse_index
from layerprobe.store.kept import parse_kept
from layerprobe.store.naming import need_name
from layerprobe.store.places import Place
from layerprobe.store.ranges import RangedShard, TensorCache
from layerprobe.store.shards import MappedShard, Shard
from layerprobe.tables import format_count

try:
    import resource
except ImportError:  # Windows
    resource = None

__all__ = ["MOST_OPEN_SHARDS", "Catalog"]

# Before Python 3.13 a mapping holds a file descriptor; a process often has a limit of about a thousand.
MOST_OPEN_SHARDS = 256
# For remote stores: the number of shards fetched ahead, including the current one, and of shards opened at once when
# one of those is not open yet, so that the server's latency is paid once for all of them.
_SHARDS_AHEAD = 3
_OPENED_AT_ONCE = 16
# Stands for the number of examples while it is unknown.
_NO_END = 1 << 63


class Catalog:
    """The shards of one store.

    Args:
        place: Location of the store.
        check: Verify the checksum of each tensor when it is first read.

    Raises:
        FormatError: `store.json`, `index.json` or, without an index, a shard is damaged.
    """

    def __init__(self, place: Place, check: bool) -> None:
        self.place = place
        self.check = check
        self.description = load_description(place)
        self.fingerprint: str = self.description["fingerprint"]
        self.pool: str | None = self.description["pool"]
        self.kept = parse_kept(self.description.get("plan"))
        self.sites = {site: StoredSite.from_description(site, said) for site, said in self.description["sites"].items()}
        self.index: dict[str, Any] | None = None
        if place.exists(INDEX_FILE):
            self.index = load_json(place, INDEX_FILE)
        self._cache = TensorCache()
        self.shards = sorted(self._list_shards(), key=lambda info: (info.first_example, info.num_examples))
        self.num_examples = sum(info.num_examples for info in self.shards)
        self.num_tokens = sum(info.num_tokens for info in self.shards)
        # one past the last stored ordinal
        self.end = max((info.first_example + info.num_examples for info in self.shards), default=0)
        self._firsts = [info.first_example for info in self.shards]
        # number of stored examples before each shard
        self._places = [0, *accumulate(info.num_examples for info in self.shards)]
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._is_closed = False
        self._checked: defaultdict[int, set[str]] = defaultdict(set)
        self._is_weighed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def is_complete(self) -> bool:
        return self.index is not None

    @property
    def num_open(self) -> int:
        """The number of shards currently mapped."""
        return len(self._open)

    def close(self) -> None:
        """Drop every mapping; the memory is freed with the last tensor that views it."""
        self._is_closed = True
        self._open.clear()
        self._cache.close()

    def release(self) -> None:
        """Drop the mappings for now, because their resident pages count towards the process's memory.

        Shards are mapped again on demand, and tensors already read stay valid. Remote shards are not affected.
        """
        if self.place.folder is not None:
            self._open.clear()

    def check_claims(self) -> None:
        """Check the index's counts against the file sizes, before memory is allocated from them.

        Raises:
            FormatError: a file is too small for what the index says.
            MissingExample: a file does not exist.

        Cost: the first call stats each file of a local store; nothing for a remote one.
        """
        if self.place.folder is None or self.index is None or self._is_weighed:
            return
        for info in self.shards:
            with self._naming_lost(info):
                size = self.place.size(info.file)
            # int64 each: an ordinal and an offset per example, an id per token
            if size < 16 * info.num_examples + 8 * info.num_tokens:
                raise FormatError(f"{self.place.label(info.file)}: does not hold the examples that {INDEX_FILE} says.")
        self._is_weighed = True

    def ordinals(self) -> Iterator[int]:
        """Iterate over the stored ordinals, in ascending order."""
        for info in self.shards:
            yield from range(info.first_example, info.first_example + info.num_examples)

    def ordinal_at(self, place: int) -> int:
        """Return the ordinal of the k-th stored example.

        Raises:
            MissingExample: there are fewer examples.
        """
        wanted = operator.index(place)
        if wanted < 0:
            wanted += self.num_examples
        if not 0 <= wanted < self.num_examples:
            raise MissingExample(f"no example at place {place} of {self.place}: {self.num_examples} are there.")
        number = bisect_right(self._places, wanted) - 1
        return self.shards[number].first_example + wanted - self._places[number]

    def slice_ordinals(self, wanted: slice) -> range:
        """Return the ordinals of a slice.

        An omitted or negative bound is relative to the last stored example, like a negative ordinal. Any other bound
        may lie beyond it, up to the end of the run if that is known.

        Raises:
            OptionError: a bound is not an integer, or the step is 0.
            MissingExample: an example is not stored yet.
        """
        whole_end = self.end if self.is_complete else max(self.end, read_totals(self.description)[1] or _NO_END)
        try:
            there, whole = wanted.indices(self.end), wanted.indices(whole_end)
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"{self.place} is sliced by ordinals, not by {wanted}: bounds are whole numbers, and the step is not 0."
            ) from error
        start, stop = (
            at_end if bound is not None and bound >= 0 else at_last
            for bound, at_end, at_last in zip((wanted.start, wanted.stop), whole, there, strict=False)
        )
        ordinals = range(start, stop, there[2])
        if not self.is_complete:
            for ordinal in ordinals:
                self.locate(ordinal)
        return ordinals

    def find(self, ordinal: int) -> tuple[Shard, int]:
        """Find and open the shard that holds an example; raises as `locate` does."""
        number, wanted = self.locate(ordinal)
        return self.shard(number), wanted

    def locate(self, ordinal: int) -> tuple[int, int]:
        """Find the shard that holds an example, and its ordinal; negative ordinals count from the end.

        Raises:
            MissingExample: no shard holds it, or none does yet.
            OptionError: the ordinal is not an integer.
        """
        try:
            wanted = operator.index(ordinal)
        except TypeError as error:
            raise OptionError(
                f"no example {brief(repr(ordinal))} in {self.place}: examples are known by whole numbers."
            ) from error
        if wanted < 0:
            wanted += self.end
        number = bisect_right(self._firsts, wanted) - 1
        if number >= 0 and wanted < self._firsts[number] + self.shards[number].num_examples:
            return number, wanted
        if self.is_complete:
            held = f"it holds 0 to {self.end - 1}" if self.end else "it holds none"
            raise MissingExample(f"no example {ordinal} in {self.place}: {held}.")
        raise MissingExample(
            f"no example {ordinal} in {self.place} yet: the run is not complete and has "
            f"{format_count(self.num_examples, 'example')} so far. "
            "Run the same extraction again to go on."
        )

    def shard(self, number: int) -> Shard:
        """Return a shard by its place in input order, opened and checked.

        Raises:
            FormatError: the shard is damaged.
            MissingExample: the file no longer exists.
            StoreError: the file cannot be read, or the store is closed.
        """
        found = self._open.get(number)
        if found is not None:
            self._open.move_to_end(number)
            return found
        if self._is_closed:
            raise StoreError(f"{self.place}: this store was closed. Open it again with layerprobe.open.")
        return self._keep(number, self._make_shard(number))

    def prefetch(self, numbers: Sequence[int], names: Sequence[str], num_needed: int = 0) -> list[object]:
        """Begin to fetch tensors of the shards needed next.

        Args:
            numbers: Places of all upcoming shards, in order of use; the first few are fetched.
            names: Names of the tensors.
            num_needed: Number of leading shards to fetch even if they do not fit into the cache; reading such a shard
                by example would otherwise request each row by itself, without a checksum.

        Returns:
            Objects that keep the tensors cached while held.
        """
        ahead = numbers[:_SHARDS_AHEAD]
        if any(number not in self._open for number in ahead):
            self._open_all(numbers[:_OPENED_AT_ONCE])
        held: list[object] = []
        for place, number in enumerate(ahead):
            try:
                shard = self.shard(number)
            except StoreError:
                if place == 0:
                    raise
                break  # raised when this shard is used
            held += shard.prefetch(names, needs_room=place >= num_needed)
        return held

    def fetch(
        self, pieces: Sequence[tuple[int, int, int]], names: Sequence[str], num_needed: int
    ) -> list[list[object]]:
        """Begin to fetch rows of tensors that will be read as pieces.

        Args:
            pieces: Shard place, first row and the row after the last.
            names: Names of the tensors.
            num_needed: Number of leading pieces to fetch even if they do not fit into the cache.

        Returns:
            For each piece, the objects that keep it cached while held: one per tensor that fitted into the cache.
        """
        self._open_all([number for number, _, _ in pieces])
        held: list[list[object]] = [[] for _ in pieces]
        for place, (number, start, stop) in enumerate(pieces):
            try:
                shard = self.shard(number)
            except StoreError:
                if place < num_needed:
                    raise
                break  # raised when this shard is used
            held[place] = shard.fetch(names, start, stop, needs_room=place >= num_needed)
        return held

    def _open_all(self, numbers: Sequence[int]) -> None:
        """Open remote shards concurrently; an error in any but the first is raised when that shard is used."""
        if self.place.folder is None and not self._is_closed:
            missing = [number for number in dict.fromkeys(numbers) if number not in self._open]
            found = self._cache.map(self._make_shard, missing)
            for number in missing:
                try:
                    self._keep(number, next(found))
                except StoreError:
                    if number == numbers[0]:
                        raise
                    return  # raised when this shard is used

    def _keep(self, number: int, shard: Shard) -> Shard:
        self._open[number] = shard
        if len(self._open) > _count_openable():
            self._open.popitem(last=False)
        return shard

    def _make_shard(self, number: int) -> Shard:
        info = self.shards[number]
        shard: Shard
        with self._naming_lost(info):
            if self.place.folder is not None:
                shard = MappedShard(
                    self.place.folder / info.file, info, self.fingerprint, self.check, self._checked[number]
                )
            else:
                shard = RangedShard(self.place, info, self.fingerprint, self.check, self._cache)
        for site in self.sites.values():
            self._check_site(shard, site)
        if (POSITIONS in shard.header.tensors) != (self.kept is not None):
            there = "has no" if self.kept is not None else "has"
            raise FormatError(f"{self.place.label(info.file)}: {there} {POSITIONS!r}; {STORE_FILE} says otherwise.")
        return shard

    @contextlib.contextmanager
    def _naming_lost(self, info: ShardInfo) -> Iterator[None]:
        """Report which examples are lost if a shard's file does not exist."""
        try:
            yield
        except StoreError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            last = info.first_example + info.num_examples - 1
            # a store filled by a probe cannot be recomputed
            again = ", or run the same extraction again to make it anew" if self.description.get("plan") else ""
            raise MissingExample(
                f"{self.place.label(info.file)}: is gone, and with it examples {info.first_example} to {last} of "
                f"{self.place}. Copy it back{again}."
            ) from error

    def need_site(self, name: object) -> StoredSite:
        """Return a stored site by name; negative layers count from the last stored one.

        Raises:
            SiteError: it is not stored; the message lists those that are.
        """
        return self.sites[need_name(name, self.sites, str(self.place))]

    def need_every_row(self, what: str, instead: str) -> None:
        """Refuse an operation that is wrong on a subset of the rows.

        Raises:
            OptionError: not every row was kept.
        """
        if self.kept is not None:
            raise OptionError(
                f"{what} takes every row of an example, and {self.place} keeps a part of them ({self.kept}). {instead}"
            )

    def iter_shards(self) -> Iterator[Shard]:
        """Iterate over the opened shards in input order."""
        numbers = range(len(self.shards))
        for number in numbers:
            if number not in self._open:
                self._open_all(numbers[number : number + _OPENED_AT_ONCE])
            yield self.shard(number)

    def iter_parts(self, ordinals: Sequence[int], names: Sequence[str]) -> Iterator[tuple[Shard, list[int]]]:
        """Iterate over the shards that hold some examples, each with its ordinals; fetch the named tensors ahead."""
        parts: dict[int, list[int]] = {}
        for ordinal in ordinals:
            parts.setdefault(self.locate(ordinal)[0], []).append(ordinal)
        numbers = list(parts)
        for place, number in enumerate(numbers):
            self.prefetch(numbers[place : place + _OPENED_AT_ONCE], names)
            yield self.shard(number), parts[number]

    def _check_site(self, shard: Shard, site: StoredSite) -> None:
        """Refuse a shard whose layout of a site differs from `store.json`."""
        try:
            pairs = shard.pairs_before[-1] if site.kind == "attention" else 0
            check_stored(shard.header, site.layout(shard.header, pairs))
        except ValueError as error:
            raise FormatError(f"{self.place.label(shard.header.file)}: {error}.") from error

    def _list_shards(self) -> list[ShardInfo]:
        label = self.place.label(INDEX_FILE)
        if self.index is not None:
            return parse_index(label, self.index)
        names = [name for name in self.place.list_files() if parse_shard_name(name) is not None]
        load = partial(load_header, self.place)
        headers = map(load, names) if self.place.folder is not None else self._cache.map(load, names)
        shards = [ShardInfo(h.file, h.first_example, h.num_examples, h.num_tokens) for h in headers]
        check_apart(str(self.place), shards)
        return shards


def _count_openable() -> int:
    """Return how many shards may be mapped: at most a third of the process's file limit, which is 256 on macOS."""
    limit = -1 if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST_OPEN_SHARDS if limit < 0 else min(MOST_OPEN_SHARDS, max(1, limit // 3))
