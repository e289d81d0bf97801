"""What commands share: options that do not go together, and what is done with a result."""

import pytest

from layerprobe.cli.outcomes import conclude, refuse_given
from layerprobe.errors import OptionError


def test_options_that_are_given_are_named_and_zero_is_given() -> None:
    given = {"--seed": 0, "--pool": None, "--shared": False, "--name": "", "--all": True}
    with pytest.raises(OptionError, match=r"^--seed, --name, --all with --fast: it draws nothing\. Leave it out\.$"):
        refuse_given(given, "with --fast: it draws nothing. Leave it out.")


def test_options_that_are_not_given_are_no_error() -> None:
    refuse_given({"--pool": None, "--shared": False}, "with --fast: it draws nothing. Leave it out.")


class Unwritable:
    """A result whose picture cannot be written."""

    def table(self) -> str:
        return "what took an hour"

    def plot(self, path: str) -> None:
        raise OptionError(f"no picture {path}")


def test_a_table_is_printed_though_its_picture_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match="no picture"):
        conclude(Unwritable(), "a.png", kept="here", more="and more", quiet=False)
    assert capsys.readouterr().out.split("\n") == ["what took an hour", "", "and more", ""]
    with pytest.raises(OptionError, match="no picture"):
        conclude(Unwritable(), "a.png", quiet=True)
    assert capsys.readouterr().out == ""
