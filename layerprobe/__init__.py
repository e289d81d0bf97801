"""layerprobe takes activations out of Hugging Face encoder models and does something useful with them.

The door: it re-exports and holds no logic. Importing it loads neither transformers, matplotlib, sklearn nor ray.
"""

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
from layerprobe.models import load_model
from layerprobe.profile import profile
from layerprobe.report.page import report
from layerprobe.report.plots import plot, plot_attention
from layerprobe.sites.anatomy import Anatomy, register_architecture
from layerprobe.sites.resolve import sites
from layerprobe.store.datasets import ExampleDataset, RowDataset
from layerprobe.store.export import export
from layerprobe.store.merge import merge
from layerprobe.store.progress import read_status as status
from layerprobe.store.reader import open_store as open
from layerprobe.store.verify import verify
from layerprobe.version import __version__

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
    "TopK",
    "WatchCallback",
    "__version__",
    "ablate",
    "audit",
    "Stage",
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
