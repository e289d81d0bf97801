"""Thirds of a fused projection: what is put there is what the model computes with."""

from typing import Any

import pytest
import torch

import layerprobe as lp
from families import build
from layerprobe.capture.values import put_part, take_part
from layerprobe.sites.resolve import Part

# The projections of DeBERTa add a bias to query and value after the thirds are taken apart; ModernBERT's do not.
FUSED = ["layers.1.attention.query", "layers.1.attention.key", "layers.1.attention.value"]
IDS = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 3]])


def read(model: Any, site: str, edit: Any) -> torch.Tensor:
    with torch.no_grad(), lp.edit(model, {site: edit}), lp.Probe(model, site) as probe:
        model(input_ids=IDS)
    return probe[site]  # type: ignore[return-value]


@pytest.mark.parametrize("site", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_third_without_a_bias_is_the_value_asked_for_to_the_bit(site: str, dtype: torch.dtype) -> None:
    model = build("modernbert").to(dtype)
    vector = torch.linspace(-0.001, 0.001, 32)
    assert torch.equal(read(model, site, lp.patch(vector)), vector.to(dtype).expand(2, 4, 32))
    bound = float(torch.tensor(0.001, dtype=dtype))
    assert float(read(model, site, lp.clamp(-0.001, 0.001)).abs().max()) <= bound


@pytest.mark.parametrize("site", FUSED)
def test_third_with_a_bias_is_rounded_by_the_bias_alone(site: str) -> None:
    """The model adds the bias to what is put there: of a sum in bfloat16 nobody can ask for more than its last bit."""
    model = build("deberta").to(torch.bfloat16)
    found = lp.sites(model, site)[0]
    assert found.part is not None and (found.part.bias is None) == site.endswith("key")
    bias = torch.zeros(32) if found.part.bias is None else model.get_parameter(found.part.bias).float()
    vector = torch.linspace(-0.001, 0.001, 32)
    made = read(model, site, lp.patch(vector)).float()
    eps = torch.finfo(torch.bfloat16).eps
    # one rounding of the vector to bfloat16, one of what is left without the bias, one of the sum
    allowed = vector.abs() * eps + (vector - bias).abs() * eps
    assert bool(((made - vector).abs() <= allowed).all())


@pytest.mark.parametrize(("family", "site"), [(f, s) for f in ("modernbert", "deberta") for s in FUSED])
def test_own_value_that_is_not_finite_is_patched(family: str, site: str) -> None:
    model = build(family)
    found = lp.sites(model, site)[0]
    with torch.no_grad():
        model.get_submodule(found.module).weight.fill_(float("inf"))
    with torch.no_grad(), lp.edit(model, {site: lp.patch(torch.ones(32))}), lp.Probe(model, site) as probe:
        model(input_ids=IDS)
    # off by the roundings of taking a bias of a few units off and adding it again
    torch.testing.assert_close(probe[site], torch.ones(2, 4, 32), rtol=0, atol=1e-6)


@pytest.mark.parametrize("part", [Part(0, 4, None), Part(1, None, None), Part(2, 4, "bias"), Part(2, None, "bias")])
def test_what_is_left_as_it_is_stays_to_the_bit_and_gradients_are_those_of_a_sum(part: Part) -> None:
    """The gradient of a sum of what was put, weighted, is the weights: to the vector, the value and the bias."""
    root = torch.nn.Module()
    root.bias = torch.nn.Parameter(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    value = torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
    vector = torch.zeros(32, requires_grad=True)
    held = take_part(root, part, value)
    made = put_part(root, part, value, held, held + vector, None)
    assert torch.equal(made, value)
    weights = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))
    (take_part(root, part, made) * weights).sum().backward()
    assert vector.grad is not None and value.grad is not None
    torch.testing.assert_close(vector.grad, weights.sum((0, 1)), rtol=1e-6, atol=1e-6)  # a sum in another order
    expected = take_part(root, Part(part.index, part.num_heads, None), value.grad)
    assert torch.equal(expected, weights) and int(value.grad.count_nonzero()) == weights.numel()
    if part.bias is not None:
        assert root.bias.grad is not None
        torch.testing.assert_close(root.bias.grad, weights.sum((0, 1)), rtol=1e-6, atol=1e-6)
    kept = torch.tensor([True, False, True])[:, None]
    some = put_part(root, part, value, held, held + 1.0, kept)
    assert torch.equal(some[:, 1], value[:, 1])
    moved = take_part(root, part, some)
    torch.testing.assert_close(moved[:, ::2], held[:, ::2] + 1.0, rtol=0, atol=1e-6)
