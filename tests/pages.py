"""The README and the pages of docs/, taken apart: their snippets, their layerprobe commands, the pictures they show."""

import re
import shlex
from pathlib import Path

__all__ = ["BLOCK", "PAGES", "PICTURES", "ROOT", "list_blocks", "list_commands", "list_shown", "split_commands"]

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SHOWN = re.compile(r"!\[[^\]]*\]\((?:docs/)?img/([\w-]+\.png)\)")
# Of each page the pictures that its own snippets and commands make, by the file they write.
PICTURES = {
    "differences.md": {"differences.png": "depth.png"},
    "edit.md": {"attribution.png": "attribution.png", "patching.png": "patching.png"},
    "pictures.md": {"attention.png": "attention.png", "packages.png": "packages.png", "tokens.png": "tokens.png"},
    "profile.md": {"profile.png": "profile.png"},
    "watch.md": {"watch.png": "watch.png"},
}


def list_blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def list_commands(page: Path) -> list[list[str]]:
    """Find the layerprobe commands among a page's shell snippets."""
    return split_commands("\n".join(list_blocks(page, "bash")))


def split_commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").replace("&&", "\n").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and Path(line[0]).name == "layerprobe"]


def list_shown(page: Path) -> list[str]:
    """Find the pictures of docs/img that a page shows."""
    return _SHOWN.findall(page.read_text(encoding="utf-8"))
