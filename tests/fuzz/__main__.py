"""Run a fuzz target: guided by coverage where atheris is installed, else by mutation alone.

In tests/: `python -m fuzz header CORPUS -max_total_time=300 -len_control=0`, or `store_json` in place of `header`;
without atheris `python -m fuzz header CORPUS 300`. Both start from a folder of inputs and stop after a time or at the
first error, whose input they keep. Must never know what a target does.
"""

import contextlib
import importlib
import importlib.util
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fuzz.mutations import mutate_bytes, mutate_json, write_json

__all__ = ["fuzz", "mutate"]

_MOST_BYTES = 1 << 14


def fuzz(name: str, arguments: Sequence[str]) -> None:
    """Call a target with mutated inputs.

    Args:
        name: Of the target: `header` is `check_header` of `fuzz_header.py`.
        arguments: A folder of inputs, then options of libFuzzer, or seconds.
    """
    if importlib.util.find_spec("atheris") is None:
        _fuzz_blindly(_find_target(name), Path(arguments[0]), float(arguments[1]))
        return
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["layerprobe"]):
        target = _find_target(name)
    options = ["fuzz", *arguments]
    atheris.Setup(options, target, custom_mutator=lambda data, size, seed: mutate(data, seed)[:size])
    atheris.Fuzz()


def _find_target(name: str) -> Callable[[bytes], None]:
    return getattr(importlib.import_module(f"fuzz.fuzz_{name}"), f"check_{name}")


def mutate(data: bytes, seed: int) -> bytes:
    """Spoil an input: by structure where a part of it is JSON, else by bytes."""
    source = random.Random(seed)
    parts = data.split(b"\n###\n")
    place = source.randrange(len(parts))
    if source.randrange(3):
        with contextlib.suppress(ValueError, RecursionError):
            parts[place] = _mutate_text(parts[place], source)
            return b"\n###\n".join(parts)
    parts[place] = mutate_bytes(parts[place], source)
    return b"\n###\n".join(parts)


def _mutate_text(data: bytes, source: random.Random) -> bytes:
    value = json.loads(data)
    metadata = value.get("__metadata__") if isinstance(value, dict) else None
    inner = source.choice(("checksums", "nonfinite"))
    if isinstance(metadata, dict) and isinstance(metadata.get(inner), str) and not source.randrange(4):
        # JSON inside a text of the JSON
        metadata[inner] = write_json(mutate_json(json.loads(metadata[inner]), source), source).decode()
        return json.dumps(value).encode()
    return write_json(mutate_json(value, source), source)


def _fuzz_blindly(target: Callable[[bytes], None], corpus: Path, seconds: float) -> None:
    inputs = [path.read_bytes() for path in sorted(corpus.iterdir())]
    source = random.Random(0)
    stop = time.monotonic() + seconds
    cases = 0
    while time.monotonic() < stop:
        data = mutate(source.choice(inputs), source.getrandbits(32))[:_MOST_BYTES]
        try:
            target(data)
        except BaseException:
            (corpus.parent / f"crash-{cases}").write_bytes(data)
            raise
        cases += 1
    print(f"{cases} cases in {seconds:.0f} s")


if __name__ == "__main__":
    fuzz(sys.argv[1], sys.argv[2:])
