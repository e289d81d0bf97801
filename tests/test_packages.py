"""Packages that only some jobs need."""

import json
import sys

import pytest

from layerprobe.errors import InputError, LayerProbeError, OptionError
from layerprobe.packages import need_package, say_missing


def test_a_package_that_is_there_is_imported() -> None:
    assert need_package("json", "a job", "data") is json
    assert need_package("json.decoder", "a job", None) is json.decoder


@pytest.mark.parametrize(
    ("module", "extra", "message"),
    [
        (
            "pyarrow.parquet",
            "data",
            r"^a job needs pyarrow, which .*\. Run pip install 'layerprobe\[data\]'",
        ),
        ("sklearn", "analysis", r"^a job needs scikit-learn, .* Run pip install 'layerprobe\[analysis\]'\.$"),
        ("umap", None, r"^a job needs umap-learn, which is not installed\. Run pip install 'umap-learn'\.$"),
    ],
)
@pytest.mark.parametrize("error", [OptionError, InputError])
def test_a_package_that_is_missing_is_named_with_what_brings_it(
    module: str, extra: str | None, message: str, error: type[LayerProbeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(error, match=message) as raised:
        need_package(module, "a job", extra, error)
    assert isinstance(raised.value.__cause__, ImportError)


def test_what_is_missing_is_said_as_anywhere() -> None:
    assert say_missing("x", "y", None) == "x needs y, which is not installed. Run pip install 'y'."
