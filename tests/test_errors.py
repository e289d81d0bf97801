"""What is quoted of another library's error, and of the system's."""

import pytest

from layerprobe.errors import SpaceError, StoreError, first_line, telling_refusals


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


@pytest.mark.parametrize(
    ("error", "advice", "told"),
    [
        (PermissionError(13, "Permission denied"), "", r"^acts: cannot be written \(Permission denied\)\.$"),
        (
            OSError("too long"),
            "Choose another path.",
            r"^acts: cannot be written \(too long\)\. Choose another path\.$",
        ),
        (SpaceError("the disk is full"), "Choose another path.", "^the disk is full$"),
    ],
)
def test_a_refusal_of_the_system_is_told_once(error: OSError, advice: str, told: str) -> None:
    with pytest.raises(StoreError, match=told), telling_refusals("acts", "written", advice):
        raise error
