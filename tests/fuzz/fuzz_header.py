"""Fuzz the parser of shard headers: whatever the bytes, a header that keeps its promises or a refusal.

The checksum of the header is put right before it is parsed, as a stranger would. What is accepted is held against a
second, slower reading of the same JSON, and read once more from a real file.

Run as `fuzz/__main__.py` says. Must never know who mutates.
"""

import json
import os
import re
import struct
import tempfile
from itertools import pairwise
from pathlib import Path

from layerprobe.errors import FormatError
from layerprobe.store.format import read_header
from layerprobe.store.headers import ShardHeader, checksum, parse_header

__all__ = ["check_header", "forge_checksum"]

_OWN = re.compile(rb'("header_checksum": ?")[^"]*(")')
_MOST_FILE = 1 << 20
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


def forge_checksum(text: bytes) -> bytes:
    """Make the checksum of a header right, whatever the header says."""
    blank = _OWN.sub(rb"\g<1>0000000000000000\2", text, count=1)
    return blank.replace(b"0" * 16, checksum(blank).encode(), 1) if blank != text or b"0" * 16 in blank else text


def check_header(data: bytes) -> None:
    """Parse one header; an error is a bug."""
    text = forge_checksum(data)
    try:
        header = parse_header(text)
    except _REFUSALS:
        return
    _check_promises(header, json.loads(text))
    end = max(entry.stop for entry in header.tensors.values())
    if end > _MOST_FILE:
        return
    with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
        path = Path(folder) / header.file
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(path, 8 + len(text) + end)
        try:
            read_header(path)
        except FormatError as error:
            raise AssertionError(f"parsed, but refused from a file: {error}") from error
        os.truncate(path, 8 + len(text) + end + 1)
        try:
            read_header(path)
        except FormatError:
            return
        raise AssertionError("a file that is too long was believed")


def _scratch() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _check_promises(header: ShardHeader, entries: dict[str, dict[str, list[int]]]) -> None:
    """Read the same JSON the slow way."""
    del entries["__metadata__"]
    assert entries.keys() == header.tensors.keys() == header.checksums.keys()
    spans = sorted((start, stop) for start, stop in (entry["data_offsets"] for entry in entries.values()))
    assert spans[0][0] == 0 and all(one[1] == other[0] for one, other in pairwise(spans))
    for name, entry in header.tensors.items():
        count = 1
        for extent in entries[name]["shape"]:
            count *= extent
        assert [entry.start, entry.stop] == entries[name]["data_offsets"]
        assert list(entry.shape) == entries[name]["shape"] and entry.stop - entry.start == count * entry.dtype.itemsize
        assert 0 <= entry.start <= entry.stop < 2**63 and all(0 <= extent < 2**63 for extent in entry.shape)
    assert header.tensors["example"].shape == (header.num_examples,)
    assert header.tensors["offsets"].shape == (header.num_examples + 1,)
    assert header.tensors["input_ids"].shape == (header.num_tokens,)
    assert 0 <= header.first_example <= header.first_example + header.num_examples < 2**62
    assert header.num_tokens**2 < 2**63
