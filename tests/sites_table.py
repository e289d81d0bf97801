"""The table of families and sites in docs/sites.md, worked out by running the tiny models.

    python tests/sites_table.py        writes it between the markers of the page

Each cell says how a site compares with its oracle (`tests/oracles.py`). The table is that of transformers 5.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is on the path and the root is not

from families import FAMILIES, PLAIN, REFUSED, is_known, list_heads
from layerprobe.sites.anatomy import REFUSED as REASONS
from oracles import TOLERANCE, compare_logits, compare_sites

__all__ = ["PAGE", "make_table", "replace_table"]

PAGE = Path(__file__).parent.parent / "docs" / "sites.md"
BEGIN = "<!-- the table of families: made by tests/sites_table.py -->\n"
END = "<!-- end of the table -->\n"

COLUMNS: dict[str, tuple[str, ...]] = {
    "`embeddings`": ("embeddings",),
    "`layers.i`": ("layers.i",),
    "`mid`": ("layers.i.mid",),
    "`query` `key` `value`": tuple(f"layers.i.attention.{part}" for part in ("query", "key", "value")),
    "`weights`": ("layers.i.attention.weights",),
    "`context`": ("layers.i.attention.context",),
    "`attention.out`": ("layers.i.attention.out",),
    "`ffn.act`": ("layers.i.ffn.act",),
    "`ffn.out`": ("layers.i.ffn.out",),
    "`norm`": ("norm",),
    "`pooler`": ("pooler",),
}


def make_table() -> str:
    """Run every family that the installed transformers has, and lay out what came of it."""
    lines = [f"| family | {' | '.join(COLUMNS)} | `logits` |", f"|---|{'---|' * (len(COLUMNS) + 1)}"]
    for name in filter(is_known, FAMILIES):
        worst = compare_sites(name)
        cells = [_write_cell([worst[site] for site in sites if site in worst]) for sites in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {_compare_heads(FAMILIES[name].model_type)} |")
    lines += [f"| {name} |{' refused |' * (len(COLUMNS) + 1)}" for name in REFUSED]
    reasons = [f"`{model_type}` is refused because {reason}." for model_type, reason in REASONS.items()]
    return "\n".join([*lines, "", *reasons]) + "\n"


@functools.cache
def _compare_heads(model_type: str) -> str:
    """Compare the logits of every task head of a family."""
    name = PLAIN[model_type]
    found = [compare_logits(name, head) for head in list_heads(name)]
    return _write_cell([off for off in found if off is not None])


def _write_cell(differences: list[float]) -> str:
    if not differences:
        return ""
    if max(differences) > TOLERANCE:
        return "wrong"
    return "~" if any(differences) else "="


def replace_table(page: str, table: str) -> str:
    """Put a table between the markers of a page."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(replace_table(PAGE.read_text(encoding="utf-8"), make_table()), encoding="utf-8")
