"""What the commands tell the C library."""

import os
import subprocess
import sys
import textwrap

import pytest

from layerprobe.cli.allocator import keep_freed_memory


def test_memory_that_is_freed_and_taken_again_brings_no_page_faults() -> None:
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc")
    code = textwrap.dedent(
        """
        import resource, sys
        import torch
        from layerprobe.cli.allocator import keep_freed_memory
        if sys.argv[1] == "keep":
            assert keep_freed_memory()

        def take_and_free():
            kept = [torch.ones(25_000) for _ in range(200)]

        for _ in range(5):
            take_and_free()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            take_and_free()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        """
    )

    def count(how: str) -> int:
        # what glibc begins with; left alone it learns from large memory that an import frees
        plain = {**os.environ, "MALLOC_TRIM_THRESHOLD_": str(128 << 10)}
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True, env=plain)
        return int(done.stdout)

    kept, given_back = count("keep"), count("leave")
    assert kept < 100 < given_back, (kept, given_back)
