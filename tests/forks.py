"""Code that needs a process of its own, many times over: each piece in a fork of one process that imports once.

What a process cannot take back (a setting of torch, its own end) is then tested without importing torch for every case.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Ended", "run_each"]

_SERVER = """
import json, os, sys, tempfile, traceback
setup, pieces = json.load(sys.stdin)
names = {"__name__": "forked"}
exec(setup, names)
ended = []
for piece in pieces:
    with tempfile.TemporaryFile() as said:
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            status = 0
            try:
                exec(piece, names)
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        ended.append([status, said.read().decode()])
print(json.dumps(ended))
"""


@dataclass(frozen=True)
class Ended:
    """How a piece of code ended: its exit code, or less the number of its signal, and all that it printed."""

    status: int
    said: str


def run_each(setup: str, pieces: Sequence[str]) -> list[Ended]:
    """Run each piece of code in a process of its own, after what is set up once for all of them."""
    if not hasattr(os, "fork"):
        codes = [f"{setup}\n{piece}" for piece in pieces]
        ran = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for code in codes]
        return [Ended(one.returncode, one.stdout + one.stderr) for one in ran]
    done = subprocess.run(
        [sys.executable, "-c", _SERVER], input=json.dumps([setup, list(pieces)]), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [Ended(*one) for one in json.loads(done.stdout.splitlines()[-1])]
