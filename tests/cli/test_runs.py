"""The options of commands that run a model."""

import pytest

from layerprobe.cli import runs


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12", 12),
        ("300KB", 300_000),
        ("1gib", 1 << 30),
        ("64MB", 64_000_000),
        ("1GiB", 1 << 30),
        ("1.5 k", 1500),
        ("2kiB", 2048),
        ("3T", 3 * 10**12),
    ],
)
def test_sizes_are_decimal_unless_they_say_otherwise(text: str, size: int) -> None:
    assert runs._parse_size(text) == size
