"""What commands share: options that do not go together."""

import pytest

from layerprobe.cli.outcomes import refuse_given
from layerprobe.errors import OptionError


def test_options_that_are_given_are_named_and_zero_is_given() -> None:
    given = {"--seed": 0, "--pool": None, "--shared": False, "--name": "", "--all": True}
    with pytest.raises(OptionError, match=r"^--seed, --name, --all with --fast: it draws nothing\. Leave it out\.$"):
        refuse_given(given, "with --fast: it draws nothing. Leave it out.")


def test_options_that_are_not_given_are_no_error() -> None:
    refuse_given({"--pool": None, "--shared": False}, "with --fast: it draws nothing. Leave it out.")
