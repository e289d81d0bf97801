"""Extract activations from Hugging Face encoder models, edit them, read them back and analyse them.

This file re-exports the public names and holds no logic except loading a name on first use. Importing it loads neither
torch nor numpy, transformers, matplotlib, sklearn nor ray.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from layerprobe import errors as errors
from layerprobe.version import __version__

if TYPE_CHECKING:
    from layerprobe.analysis.check import check
    from layerprobe.analysis.classify import classify
    from layerprobe.analysis.differences import differences
    from layerprobe.capture.calls import Sink
    from layerprobe.capture.covariances import Covariance, CrossCovariance
    from layerprobe.capture.finiteness import find_nonfinite
    from layerprobe.capture.probe import Probe
    from layerprobe.capture.registry import ProbeRegistry
    from layerprobe.capture.stage import Stage
    from layerprobe.capture.summaries import Histogram, Moments
    from layerprobe.capture.topk import TopK
    from layerprobe.capture.watching import WatchCallback, watch
    from layerprobe.edit.editor import edit
    from layerprobe.edit.making import ablate, clamp, noise, patch, project_out, replace, scale, steer
    from layerprobe.edit.patching import patching
    from layerprobe.edit.where import token_ids
    from layerprobe.extract.audit import audit
    from layerprobe.extract.classifier import load_classifier
    from layerprobe.extract.depth import depth_profile
    from layerprobe.extract.run import extract
    from layerprobe.extract.untrained import extract_untrained
    from layerprobe.generation.decoding import generate
    from layerprobe.generation.fitting import fit_decoder
    from layerprobe.generation.lens import lens
    from layerprobe.generation.readout import load_decoder
    from layerprobe.models import load_model
    from layerprobe.profile import profile
    from layerprobe.report.attention import plot_attention
    from layerprobe.report.page import report
    from layerprobe.report.plots import plot
    from layerprobe.sites.anatomy import Anatomy, register_architecture
    from layerprobe.sites.resolve import sites
    from layerprobe.store.datasets import ExampleDataset, RowDataset
    from layerprobe.store.export import export
    from layerprobe.store.merge import merge
    from layerprobe.store.progress import read_status as status
    from layerprobe.store.reader import open_store as open
    from layerprobe.store.verify import verify

__all__ = [
    "Anatomy",
    "Covariance",
    "CrossCovariance",
    "ExampleDataset",
    "Histogram",
    "Moments",
    "Probe",
    "ProbeRegistry",
    "RowDataset",
    "Sink",
    "Stage",
    "TopK",
    "WatchCallback",
    "__version__",
    "ablate",
    "audit",
    "check",
    "clamp",
    "classify",
    "depth_profile",
    "differences",
    "edit",
    "export",
    "extract",
    "extract_untrained",
    "find_nonfinite",
    "fit_decoder",
    "generate",
    "lens",
    "load_classifier",
    "load_decoder",
    "load_model",
    "merge",
    "noise",
    "open",
    "patch",
    "patching",
    "plot",
    "plot_attention",
    "profile",
    "project_out",
    "register_architecture",
    "replace",
    "report",
    "scale",
    "sites",
    "status",
    "steer",
    "token_ids",
    "verify",
    "watch",
]

# The module of each name; keep in step with the imports above, which are for type checkers.
_HOMES = {
    "Anatomy": "layerprobe.sites.anatomy",
    "Covariance": "layerprobe.capture.covariances",
    "CrossCovariance": "layerprobe.capture.covariances",
    "ExampleDataset": "layerprobe.store.datasets",
    "Histogram": "layerprobe.capture.summaries",
    "Moments": "layerprobe.capture.summaries",
    "Probe": "layerprobe.capture.probe",
    "ProbeRegistry": "layerprobe.capture.registry",
    "RowDataset": "layerprobe.store.datasets",
    "Sink": "layerprobe.capture.calls",
    "Stage": "layerprobe.capture.stage",
    "TopK": "layerprobe.capture.topk",
    "WatchCallback": "layerprobe.capture.watching",
    "ablate": "layerprobe.edit.making",
    "audit": "layerprobe.extract.audit",
    "check": "layerprobe.analysis.check",
    "clamp": "layerprobe.edit.making",
    "classify": "layerprobe.analysis.classify",
    "depth_profile": "layerprobe.extract.depth",
    "differences": "layerprobe.analysis.differences",
    "edit": "layerprobe.edit.editor",
    "export": "layerprobe.store.export",
    "extract": "layerprobe.extract.run",
    "extract_untrained": "layerprobe.extract.untrained",
    "find_nonfinite": "layerprobe.capture.finiteness",
    "fit_decoder": "layerprobe.generation.fitting",
    "generate": "layerprobe.generation.decoding",
    "lens": "layerprobe.generation.lens",
    "load_classifier": "layerprobe.extract.classifier",
    "load_decoder": "layerprobe.generation.readout",
    "load_model": "layerprobe.models",
    "merge": "layerprobe.store.merge",
    "noise": "layerprobe.edit.making",
    "open": "layerprobe.store.reader:open_store",
    "patch": "layerprobe.edit.making",
    "patching": "layerprobe.edit.patching",
    "plot": "layerprobe.report.plots",
    "plot_attention": "layerprobe.report.attention",
    "profile": "layerprobe.profile",
    "project_out": "layerprobe.edit.making",
    "register_architecture": "layerprobe.sites.anatomy",
    "replace": "layerprobe.edit.making",
    "report": "layerprobe.report.page",
    "scale": "layerprobe.edit.making",
    "sites": "layerprobe.sites.resolve",
    "status": "layerprobe.store.progress:read_status",
    "steer": "layerprobe.edit.making",
    "token_ids": "layerprobe.edit.where",
    "verify": "layerprobe.store.verify",
    "watch": "layerprobe.capture.watching",
}


class _Door(ModuleType):
    """A module that loads its names on first use, and keeps them where a folder of the package has the same name."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        home, _, own = _HOMES[name].partition(":")
        value = getattr(import_module(home), own or name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # the import system would bind the folder layerprobe/extract over the function extract
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        # hide the internals of this file, and folders that were loaded
        return sorted({*(name for name in super().__dir__() if name.startswith("__")), *__all__, "errors"})


sys.modules[__name__].__class__ = _Door
