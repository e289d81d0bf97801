"""Import optional packages on demand, and say what to install if one is missing.

They come with an extra of layerprobe, or are installed by themselves; the message is the same everywhere. Must never
know what they are used for.
"""

import importlib
from typing import Any

from layerprobe.errors import LayerProbeError, OptionError, first_line

__all__ = ["need_package", "say_missing"]

# Packages whose name on PyPI differs from their import name.
_INSTALLED_AS = {"sklearn": "scikit-learn", "umap": "umap-learn"}


def need_package(module: str, what: str, extra: str | None, error: type[LayerProbeError] = OptionError) -> Any:
    """Import an optional package.

    Args:
        module: Name of the module.
        what: What needs it; the beginning of the message.
        extra: The extra of layerprobe that installs it; None if none does.
        error: Class of the error.

    Raises:
        LayerProbeError: it is not installed; of the class `error`.
    """
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        package = module.partition(".")[0]
        if not isinstance(cause, ModuleNotFoundError) or (cause.name or "").partition(".")[0] != package:
            raise error(
                f"{what} needs {package}, which cannot be imported ({first_line(cause)}). Install it again."
            ) from cause
        raise error(say_missing(what, _INSTALLED_AS.get(package, package), extra)) from cause


def say_missing(what: str, package: str, extra: str | None) -> str:
    """Say which package is missing, and how to install it."""
    wanted = package if extra is None else f"layerprobe[{extra}]"
    return f"{what} needs {package}, which is not installed. Run pip install '{wanted}'."
