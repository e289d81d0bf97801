"""A tiny model with its tokenizer, and texts of many kinds."""

from pathlib import Path

import pytest

from layerprobe.models import LoadedModel, load_model


@pytest.fixture(scope="session")
def tiny(tiny_model_folder: Path) -> LoadedModel:
    """The tiny model on the CPU; tests leave it as it was."""
    return load_model(str(tiny_model_folder), "cpu")


@pytest.fixture
def texts() -> list[str]:
    """Twelve texts of different lengths, one empty, one too long, two alike."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "."]
    made = [" ".join(words[: 1 + 3 * number % 10]) for number in range(9)]
    return [*made, "", "the " * 200, made[3]]
