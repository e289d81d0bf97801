"""The version of the library; here so that any file may read it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
