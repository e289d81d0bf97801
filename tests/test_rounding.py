"""How far CUDA rounds float32 products, as torch has it set under its names."""

import subprocess
import sys

import torch

from layerprobe.extract.forward import compute_in
from layerprobe.rounding import rounds_products, rounds_products_outside


def test_rounding_of_products_is_told_by_either_name_and_kernels_go_by_the_new_one() -> None:
    """In a process of its own: torch keeps no way back to how it begins."""
    code = """
import torch
from layerprobe.rounding import rounds_products
assert not rounds_products()
for name in ("high", "highest", "high"):
    torch.set_float32_matmul_precision(name)
    assert rounds_products() == (name == "high")
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert torch.get_float32_matmul_precision() == "high"
    assert not rounds_products()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # the old name raises from here on
    assert rounds_products()
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    assert not rounds_products()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_program_around_has_set_is_told_beside_what_a_run_has() -> None:
    assert not rounds_products()
    with compute_in(torch.nn.Linear(1, 1), "tf32"):
        assert rounds_products() and not rounds_products_outside()
    assert not rounds_products()
