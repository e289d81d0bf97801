"""The house as it is meant to stand: who imports whom, how long a file is, what the door loads."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import layerprobe

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "layerprobe"

# Each imports only what stands above it.
ORDER = (
    "layerprobe.errors",
    "layerprobe.version",
    "layerprobe.packages",
    "layerprobe.tables",
    "layerprobe.telling",
    "layerprobe.sharing",
    "layerprobe.forking",
    "layerprobe.collecting",
    "layerprobe.cores",
    "layerprobe.rounding",
    "layerprobe.models",
    "layerprobe.sites.grammar",
    "layerprobe.sites.anatomy",
    "layerprobe.sites.stacks",
    "layerprobe.sites.resolve",
    "layerprobe.sites.weights",
    "layerprobe.store.paths",
    "layerprobe.store.durable",
    "layerprobe.store.guard",
    "layerprobe.store.fingerprint",
    "layerprobe.store.naming",
    "layerprobe.store.kept",
    "layerprobe.store.remote",
    "layerprobe.store.places",
    "layerprobe.store.lock",
    "layerprobe.store.abandoned",
    "layerprobe.store.headers",
    "layerprobe.store.format",
    "layerprobe.store.description",
    "layerprobe.store.index",
    "layerprobe.store.claiming",
    "layerprobe.store.shards",
    "layerprobe.store.ranges",
    "layerprobe.store.scanning",
    "layerprobe.store.writer",
    "layerprobe.store.tokenizer",
    "layerprobe.store.checks",
    "layerprobe.store.mismatch",
    "layerprobe.store.merge",
    "layerprobe.store.progress",
    "layerprobe.store.verify",
    "layerprobe.store.catalog",
    "layerprobe.store.records",
    "layerprobe.store.vocabulary",
    "layerprobe.store.order",
    "layerprobe.store.rows",
    "layerprobe.store.selection",
    "layerprobe.store.siteview",
    "layerprobe.store.columns",
    "layerprobe.store.examples",
    "layerprobe.store.difference",
    "layerprobe.store.padded",
    "layerprobe.store.reader",
    "layerprobe.store.packed",
    "layerprobe.store.export",
    "layerprobe.store.hub",
    "layerprobe.store.datasets",
    "layerprobe.analysis.geometry",
    "layerprobe.analysis.moments",
    "layerprobe.analysis.results",
    "layerprobe.analysis.figures",
    "layerprobe.analysis.sweep",
    "layerprobe.analysis.drawing",
    "layerprobe.analysis.passes",
    "layerprobe.analysis.differences",
    "layerprobe.analysis.check",
    "layerprobe.analysis.points",
    "layerprobe.analysis.projection",
    "layerprobe.analysis.scores",
    "layerprobe.analysis.splits",
    "layerprobe.analysis.probing",
    "layerprobe.analysis.baselines",
    "layerprobe.analysis.tasks",
    "layerprobe.analysis.features",
    "layerprobe.analysis.keeping",
    "layerprobe.analysis.verdict",
    "layerprobe.analysis.classify",
    "layerprobe.report.plots",
    "layerprobe.report.attention",
    "layerprobe.report.content",
    "layerprobe.report.page",
    "layerprobe.capture.calls",
    "layerprobe.capture.compiled",
    "layerprobe.capture.abilities",
    "layerprobe.capture.hooks",
    "layerprobe.capture.frames",
    "layerprobe.capture.early",
    "layerprobe.capture.direct",
    "layerprobe.capture.entries",
    "layerprobe.capture.values",
    "layerprobe.capture.recompute",
    "layerprobe.capture.attention",
    "layerprobe.capture.registry",
    "layerprobe.capture.target",
    "layerprobe.capture.casting",
    "layerprobe.capture.streams",
    "layerprobe.capture.staging",
    "layerprobe.capture.select",
    "layerprobe.capture.pooling",
    "layerprobe.capture.identity",
    "layerprobe.capture.sinks",
    "layerprobe.capture.stage",
    "layerprobe.capture.stagesink",
    "layerprobe.capture.statistics",
    "layerprobe.capture.summaries",
    "layerprobe.capture.covariances",
    "layerprobe.capture.topk",
    "layerprobe.capture.turns",
    "layerprobe.capture.units",
    "layerprobe.capture.packing",
    "layerprobe.capture.probe",
    "layerprobe.capture.readings",
    "layerprobe.capture.finiteness",
    "layerprobe.capture.vitals",
    "layerprobe.capture.watching",
    "layerprobe.edit.where",
    "layerprobe.edit.edits",
    "layerprobe.edit.making",
    "layerprobe.edit.plan",
    "layerprobe.edit.moments",
    "layerprobe.edit.traced",
    "layerprobe.edit.editor",
    "layerprobe.edit.effects",
    "layerprobe.edit.patching",
    "layerprobe.edit.masked",
    "layerprobe.extract.records",
    "layerprobe.extract.inputs",
    "layerprobe.extract.tokens",
    "layerprobe.extract.batching",
    "layerprobe.extract.cutting",
    "layerprobe.extract.network",
    "layerprobe.extract.resume",
    "layerprobe.extract.thinning",
    "layerprobe.extract.forward",
    "layerprobe.extract.memory",
    "layerprobe.extract.looking",
    "layerprobe.extract.padding",
    "layerprobe.extract.options",
    "layerprobe.extract.flat",
    "layerprobe.extract.description",
    "layerprobe.extract.calling",
    "layerprobe.extract.warmup",
    "layerprobe.extract.trials",
    "layerprobe.extract.devices",
    "layerprobe.extract.plan",
    "layerprobe.extract.space",
    "layerprobe.extract.elsewhere",
    "layerprobe.extract.folder",
    "layerprobe.extract.ahead",
    "layerprobe.extract.preparing",
    "layerprobe.extract.reports",
    "layerprobe.extract.stream",
    "layerprobe.extract.engine",
    "layerprobe.extract.leash",
    "layerprobe.extract.worker",
    "layerprobe.extract.crew",
    "layerprobe.extract.run",
    "layerprobe.extract.sampling",
    "layerprobe.extract.pricing",
    "layerprobe.extract.audit",
    "layerprobe.extract.untrained",
    "layerprobe.extract.classifier",
    "layerprobe.extract.depth",
    "layerprobe.generation.results",
    "layerprobe.generation.decoding",
    "layerprobe.generation.narrow",
    "layerprobe.generation.targets",
    "layerprobe.generation.keeping",
    "layerprobe.generation.readout",
    "layerprobe.generation.fitting",
    "layerprobe.generation.heads",
    "layerprobe.generation.gathering",
    "layerprobe.generation.depthlens",
    "layerprobe.generation.lens",
    "layerprobe.cost.machine",
    "layerprobe.cost.marks",
    "layerprobe.cost.counting",
    "layerprobe.cost.results",
    "layerprobe.profile",
    "layerprobe.cost.comparison",
    "layerprobe.cli.arguments",
    "layerprobe.cli.views",
    "layerprobe.cli.signals",
    "layerprobe.cli.allocator",
    "layerprobe.cli.outcomes",
    "layerprobe.cli.runs",
    "layerprobe.cli.stores",
    "layerprobe.cli.exports",
    "layerprobe.cli.analyses",
    "layerprobe.cli.classifiers",
    "layerprobe.cli.generations",
    "layerprobe.cli.edits",
    "layerprobe.cli.instruments",
    "layerprobe.cli.stats",
    "layerprobe.cli.main",
    "layerprobe",
    "layerprobe.__main__",
)
FOLDERS = ("sites", "store", "analysis", "report", "capture", "edit", "extract", "generation", "cost", "cli")
TOP = {"layerprobe", "tests", "benchmarks", "docs", "pyproject.toml", "README.md", "LICENSE", ".gitignore", ".ci"}
MOST_LINES = 400
# the tree of errors is drawn in its docstring
TREE_LINE = re.compile(r"^(LayerProbeError$|\s*[├└│])")
MAKERS = {
    f"torch.{name}"
    for name in [
        "arange",
        "as_tensor",
        "asarray",
        "empty",
        "eye",
        "full",
        "linspace",
        "ones",
        "rand",
        "randint",
        "randn",
        "randperm",
        "tensor",
        "zeros",
    ]
}
HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "matplotlib",
    "sklearn",
    "ray",
    "pyarrow",
    "datasets",
    "zarr",
    "fsspec",
    "s3fs",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py" or path.parent == PACKAGE
}


def list_imports(path: Path) -> set[str]:
    """Find every module of layerprobe that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            base = node.module or ""
            # `from layerprobe.store import format` names a module too
            inner = {f"{base}.{alias.name}" for alias in node.names} & set(ORDER)
            found.update(inner or {base})
    return {name for name in found if name.split(".")[0] == "layerprobe"}


def test_every_file_has_its_place_in_the_order() -> None:
    assert sorted(FILES) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_files_import_only_from_above(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)])
    assert list_imports(FILES[name]) <= above


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_have_no_code_of_their_own(folder: str) -> None:
    assert not (PACKAGE / folder / "__init__.py").read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("name", ORDER)
def test_files_are_short_and_say_what_they_are(name: str) -> None:
    text = FILES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    tree = ast.parse(text)
    docstring = ast.get_docstring(tree)
    assert docstring
    if any(isinstance(node, (ast.ClassDef, ast.FunctionDef)) for node in tree.body):
        lines = [line for line in docstring.splitlines() if not TREE_LINE.match(line)]
        assert 3 <= len(lines) <= 12


@pytest.mark.parametrize("name", [name for name in ORDER if name != "layerprobe.generation.narrow"])
def test_tensors_are_made_on_a_named_device(name: str) -> None:
    # else torch.set_default_device decides; only the modules of a decoder are left to it
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in MAKERS:
            assert "device" in {one.arg for one in node.keywords}, f"{name}:{node.lineno}: {ast.unparse(node)}"


def test_opening_a_door_loads_nothing_heavy_and_what_runs_a_model_no_compiler() -> None:
    code = f"""
import sys
for door in ("layerprobe", "layerprobe.cli.main"):
    __import__(door)
    assert not [name for name in {HEAVY!r} if name in sys.modules], door
import layerprobe.extract.run, layerprobe.edit.editor
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_names_load_what_type_checkers_are_told_of() -> None:
    told = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("layerprobe.")
        for alias in node.names
    }
    assert sorted(told) == sorted(layerprobe.__all__)
    for name, (home, own) in told.items():
        assert getattr(layerprobe, name) is getattr(importlib.import_module(str(home)), own), name


def test_an_installed_package_tells_type_checkers_to_read_its_annotations() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_a_name_stays_what_it_is_where_a_folder_has_the_same() -> None:
    code = (
        "import layerprobe.extract.run, layerprobe.edit.editor, layerprobe.profile, layerprobe as lp\n"
        "assert callable(lp.extract) and callable(lp.profile) and callable(lp.edit) and callable(lp.sites)\n"
        "import layerprobe.sites.resolve, layerprobe.report.plots\n"
        "assert callable(lp.sites) and lp.plot is layerprobe.plot and not hasattr(lp, 'none')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names_are_the_documented_ones() -> None:
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `lp\.(\w+)` \|", page, re.MULTILINE)
    assert sorted(documented) == sorted(layerprobe.__all__)
    assert all(hasattr(layerprobe, name) for name in layerprobe.__all__)


def test_the_door_offers_its_public_names_and_nothing_that_it_is_made_of() -> None:
    offered = [name for name in dir(layerprobe) if not name.startswith("__")]
    assert offered == sorted({*layerprobe.__all__, "errors"} - {"__version__"})
    assert "__version__" in dir(layerprobe) and "__doc__" in dir(layerprobe)


def test_the_top_holds_only_what_belongs_there() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {line.split("/")[0] for line in tracked.stdout.splitlines()} <= TOP
