"""The pictures of docs/, made anew by what the pages themselves say.

    python tests/docs_pictures.py [edit.md ...]

Runs the commands and the snippets of each page that makes pictures, each in an empty folder as a reader would, and puts
what they draw into docs/img. Pictures of the tour are made by `benchmarks/insight.py --save`, that of the decoders by
`benchmarks/decoders.py --save`; that of the report is a screenshot.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pages import PICTURES, ROOT, list_blocks, list_commands

__all__ = ["make_pictures"]


def make_pictures(page: Path, folder: Path) -> dict[str, Path]:
    """Run a page in a folder.

    Returns:
        By the name under docs/img, what was drawn.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    drawn: dict[str, Path] = {}
    for name, programs in {
        "commands": [[sys.executable, "-m", "layerprobe", *command[1:]] for command in list_commands(page)],
        "snippets": [[sys.executable, "-c", "\n".join(list_blocks(page, "python"))]],
    }.items():
        place = folder / name
        (place / "docs").mkdir(parents=True)
        shutil.copy(ROOT / "docs" / "sample.txt", place / "docs")
        for program in programs:
            subprocess.run(program, cwd=place, env=environment, check=True)
        for made, shown in PICTURES[page.name].items():
            if (place / made).is_file() and shown not in drawn:
                drawn[shown] = place / made
    return drawn


def main() -> None:
    for name in sys.argv[1:] or PICTURES:
        with tempfile.TemporaryDirectory() as folder:
            drawn = make_pictures(ROOT / "docs" / name, Path(folder))
            for shown in PICTURES[name].values():
                shutil.copy(drawn[shown], ROOT / "docs" / "img" / shown)
                print(f"wrote docs/img/{shown}")


if __name__ == "__main__":
    main()
