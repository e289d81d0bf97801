"""The version of the library, in a file of its own so that any file may import it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
