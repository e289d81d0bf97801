"""What is quoted of another library's error."""

import pytest

from layerprobe.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such file"), "no such file"),
        (RuntimeError("\n  CUDA error  \nCompile with ..."), "CUDA error"),
        (KeyError(), "KeyError"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_the_first_line_of_an_error_or_its_class(error: Exception, line: str) -> None:
    assert first_line(error) == line
