"""Every error that layerprobe raises, in one tree.

LayerProbeError
├── SiteError            (LookupError)      a site or pattern that the model does not have
├── ArchitectureError    (TypeError)        a model whose parts layerprobe does not know
├── OptionError          (ValueError)       an option with a value that does not exist
├── ModelError           (OSError)          a model or tokenizer that cannot be loaded
├── InputError           (ValueError)       texts that are missing, empty or unreadable
├── CaptureError         (RuntimeError)     a forward pass that did not give what was asked
├── NonFiniteError       (ArithmeticError)  NaN or infinite values where the policy forbids them
└── StoreError           (OSError)          a folder that cannot be written or read as a store
    ├── FormatError      (ValueError)       a damaged, cut or foreign file
    ├── PlanError        (ValueError)       a store that holds another run
    ├── SpaceError                          not enough room on the disk
    ├── LockError                           a store that another run is writing
    └── MissingExample   (IndexError)       an example that is not in the store (yet)

A message says what was asked, what is wrong with it (with the value), what would be accepted, and what to do.
"""

import contextlib
from collections.abc import Iterator

__all__ = [
    "ArchitectureError",
    "CaptureError",
    "FormatError",
    "InputError",
    "LayerProbeError",
    "LockError",
    "MissingExample",
    "ModelError",
    "NonFiniteError",
    "OptionError",
    "PlanError",
    "SiteError",
    "SpaceError",
    "StoreError",
    "first_line",
    "telling_refusals",
]


class LayerProbeError(Exception):
    """Base of all errors of layerprobe."""


class SiteError(LayerProbeError, LookupError):
    """A site or pattern that the model does not have."""


class ArchitectureError(LayerProbeError, TypeError):
    """A model whose parts layerprobe does not know."""


class OptionError(LayerProbeError, ValueError):
    """An option with a value that does not exist."""


class ModelError(LayerProbeError, OSError):
    """A model or tokenizer that cannot be loaded."""


class InputError(LayerProbeError, ValueError):
    """Texts that are missing, empty or unreadable."""


class CaptureError(LayerProbeError, RuntimeError):
    """A forward pass that did not give what was asked."""


class NonFiniteError(LayerProbeError, ArithmeticError):
    """NaN or infinite values where the policy forbids them."""


class StoreError(LayerProbeError, OSError):
    """A folder that cannot be written or read as a store."""


class FormatError(StoreError, ValueError):
    """A damaged, cut or foreign file."""


class PlanError(StoreError, ValueError):
    """A store that holds another run."""


class SpaceError(StoreError):
    """Not enough room on the disk."""


class LockError(StoreError):
    """A store that another run is writing."""


class MissingExample(StoreError, IndexError):  # noqa: N818 - reads as what it is: `except MissingExample`
    """An example that is not in the store, or not in it yet."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or its class name if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip() if lines else type(error).__name__


@contextlib.contextmanager
def telling_refusals(path: object, done: str, advice: str = "") -> Iterator[None]:
    """Turn an OSError within the block into a StoreError: `PATH: cannot be read (Permission denied).`

    Args:
        path: The file or folder that was accessed.
        done: What failed: `read`, `written` or `removed`.
        advice: What to do, as a sentence.

    Raises:
        StoreError: the system refused.
    """
    try:
        yield
    except LayerProbeError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: cannot be {done} ({error.strerror or error}). {advice}".rstrip()) from error
