"""How JSON of a store is spoilt: by structure, with the values that parsers and sizes trip over.

Shared by the fuzzers and by the tests that break whole stores. A function of the random source alone, so that what
failed can be made again. Must never know what the JSON means.
"""

import copy
import json
import random
from typing import Any

__all__ = ["mutate_bytes", "mutate_json", "write_json"]

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 64, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**17, 10**30,
    0.5, 1.0, -0.0, 1e308, "", "0", "1", "-1", "00", "1e3", "\u0663", "x", "..", "../store.json", "/etc/passwd",
    "shard-000000.safetensors", "shard-000001.safetensors", "F32", "F16", "I8", "I64", "U8", "BOOL", "float16", "int8",
    "int64", "load", "token", "example", "attention", "layers.0", "records", "record_offsets", "offsets", "\x1b[2J",
    "a" * 2000, "0" * 16, [], {}, [[]], [0], [0, 0], [2, 3], [0, 2**40], [1] * 70, {"a": 1}, {"kind": "token"},
)  # fmt: skip
# What `json.dumps` does not write, in place of a value.
_TEXTS = ("1e400", "NaN", "-Infinity", "1" * 5000, "[" * 500, '"\\ud800"', '{"a":1,"a":2}', "", "1" * 19, "-0", "tru")


def mutate_json(value: Any, source: random.Random) -> Any:
    """Change a value in one to three places: another value, a lost or doubled item, two swapped, a key renamed."""
    value = copy.deepcopy(value)
    for _ in range(source.randint(1, 3)):
        places = [(holder, key) for holder, key in _list_places(value)]
        if not places:
            return source.choice(_VALUES)
        holder, key = source.choice(places)
        kind = source.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            _double(holder, key, source)
        elif kind == 2:
            other_holder, other_key = source.choice(places)
            holder[key] = copy.deepcopy(other_holder[other_key])
        elif kind == 3 and type(holder[key]) is int:
            holder[key] += source.choice((-1, 1, 8, 2**32))
        elif kind == 4 and isinstance(holder[key], str) and holder[key].isdigit():
            holder[key] = str(int(holder[key]) + source.choice((-1, 1, 2**40, 10**18)))
        else:
            holder[key] = copy.deepcopy(source.choice(_VALUES))
    return value


def _list_places(value: Any) -> list[tuple[Any, Any]]:
    items: list[tuple[Any, Any]] = []
    if isinstance(value, (dict, list)):
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
    found = [(value, key) for key, _ in items]
    for _, item in items:
        found += _list_places(item)
    return found


def _double(holder: Any, key: Any, source: random.Random) -> None:
    if isinstance(holder, list):
        holder.insert(source.randint(0, len(holder)), copy.deepcopy(holder[key]))
    else:
        holder[source.choice((f"{key}x", f"{key}:scale", "example", "layers.0"))] = copy.deepcopy(holder[key])


def write_json(value: Any, source: random.Random) -> bytes:
    """Write JSON, now and then with a text in it that no Python object has."""
    if source.randrange(8):
        return json.dumps(value).encode()
    places = _list_places(value)
    if not places:
        return source.choice(_TEXTS).encode()
    holder, key = source.choice(places)
    mark = "a mark that nothing else is"
    holder[key] = mark
    return json.dumps(value).replace(f'"{mark}"', source.choice(_TEXTS)).encode()


def mutate_bytes(data: bytes, source: random.Random) -> bytes:
    """Flip, cut, insert, repeat or splice bytes in one to three places."""
    spoilt = bytearray(data)
    for _ in range(source.randint(1, 3)):
        size = len(spoilt)
        place, other = source.randint(0, size), source.randint(0, size)
        low, high = min(place, other), min(max(place, other), min(place, other) + 64)
        kind = source.randrange(5)
        if kind == 0 and size:
            spoilt[place % size] ^= 1 << source.randrange(8)
        elif kind == 1:
            del spoilt[low : high if source.randrange(2) else size]
        elif kind == 2:
            spoilt[place:place] = source.randbytes(source.randint(1, 16))
        elif kind == 3:
            spoilt[place:place] = spoilt[low:high]
        else:
            spoilt[low:high] = spoilt[other : other + high - low]
    return bytes(spoilt)
