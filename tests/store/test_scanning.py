"""A scan gives the checksum of the bytes, and finds every value that is not finite, wherever it is."""

import pytest
import torch
import xxhash

from layerprobe.store import scanning
from layerprobe.store.scanning import scan_tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
SPECIAL = (float("nan"), float("inf"), float("-inf"))


def _drawn(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.int64, torch.uint8])
@pytest.mark.parametrize("count", [0, 1, 300, 4096])
def test_the_checksum_is_that_of_the_bytes(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, count: int) -> None:
    monkeypatch.setattr(scanning, "_PIECE_BYTES", 512)
    values = (_drawn(count, torch.float32) * 50).to(dtype).view(-1, 1)
    found = scan_tensor(values)
    assert found.checksum == xxhash.xxh3_64_hexdigest(values.view(-1).view(torch.uint8).numpy().tobytes())
    assert found.num_nonfinite == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("place", [0, 63, 64, 1000, 1299])
def test_one_value_that_is_not_finite_is_found(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, special: float, place: int
) -> None:
    monkeypatch.setattr(scanning, "_PIECE_BYTES", 512)
    values = _drawn(1300, dtype)
    values[place] = special
    # float8_e4m3fn has no infinity; what torch makes of one differs from version to version
    assert scan_tensor(values).num_nonfinite == int(not values[place].float().isfinite())


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_are_counted_as_torch_counts_them(dtype: torch.dtype) -> None:
    values = _drawn(5000, dtype)
    for start, special in enumerate(SPECIAL):
        values[start :: 97 + start] = special
    assert scan_tensor(values).num_nonfinite == int((~values.float().isfinite()).sum())


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_finite_values_count_for_nothing(dtype: torch.dtype) -> None:
    ends = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0, -0.0], dtype=torch.float64).to(dtype)
    assert scan_tensor(ends).num_nonfinite == 0
