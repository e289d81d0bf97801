"""Every edit at every editable site of every family and head, against what numpy makes of the unedited values.

Nothing before a site changes when the site is edited, so what is read there must be the formula of what was there.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import layerprobe as lp
from families import FAMILIES, PLAIN, build, is_known, list_heads, make_batch
from layerprobe.sites.resolve import Site
from oracles import build_head, make_head_batch

# Some are made of other roundings: a mean of another order, a third of a fused projection that gets a bias afterwards.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
Rows = np.ndarray


def project(rows: Rows, direction: Rows) -> Rows:
    unit = direction / np.linalg.norm(direction)
    return rows - np.outer(rows @ unit, unit)


def make_edits(width: int) -> dict[str, tuple[Any, Callable[[Rows], Rows]]]:
    """By name an edit, and what it makes of the rows that are meant, `[T, D]` in float64."""
    vector = torch.randn(width, generator=torch.Generator().manual_seed(width))
    wide, factor = vector.double().numpy(), np.ones(width)
    factor[[0, -1]] = 3.0
    return {
        "steer": (lp.steer(vector, 2.0), lambda rows: rows + 2 * wide),
        "scale": (lp.scale(-0.5), lambda rows: -0.5 * rows),
        "clamp": (lp.clamp(-0.1, 0.2), lambda rows: rows.clip(-0.1, 0.2)),
        "project_out": (lp.project_out(vector), lambda rows: project(rows, wide)),
        "patch": (lp.patch(vector), lambda rows: np.broadcast_to(wide, rows.shape)),
        "zero": (lp.ablate("zero"), np.zeros_like),
        "mean": (lp.ablate("mean"), lambda rows: np.broadcast_to(rows.mean(0), rows.shape)),
        "replace": (lp.replace(torch.tanh), np.tanh),
        "units": (lp.scale(3.0, units=[0, -1]), lambda rows: rows * factor),
    }


def read(model: Any, batch: dict[str, Any], site: str, edit: Any = None) -> Tensor:
    edited = contextlib.nullcontext() if edit is None else lp.edit(model, {site: edit})
    # what comes after the site is others' to test
    with torch.no_grad(), edited, lp.Probe(model, site, stop=True) as probe:
        model(**batch)
    value = probe[site]
    assert isinstance(value, Tensor)
    return value


def check_site(model: Any, batch: dict[str, Any], site: Site) -> None:
    """Make each edit at a site, and hold the real tokens to the formula and all others to what they were."""
    before = read(model, batch, site.name)
    real = batch["attention_mask"].bool().flatten(0, -2)
    meant = real if before.shape[:2] == real.shape else torch.ones(before.shape[:-1], dtype=torch.bool)
    rows = before[meant].double().numpy()
    for name, (edit, formula) in make_edits(before.shape[-1]).items():
        after = read(model, batch, site.name, edit)
        assert torch.equal(after[~meant], before[~meant]), (site.name, name)
        found = after[meant].double().numpy()
        np.testing.assert_allclose(found, formula(rows), **CLOSE, err_msg=f"{site.name} {name}")
    drawn = read(model, batch, site.name, lp.noise(0.5, seed=1))
    assert torch.equal(drawn[~meant], before[~meant]) and (drawn[meant] != before[meant]).any(), site.name
    assert torch.equal(drawn, read(model, batch, site.name, lp.noise(0.5, seed=1))), site.name
    shuffled = read(model, batch, site.name, lp.ablate("resample", seed=1))
    assert torch.equal(shuffled[~meant], before[~meant]), site.name
    # the tokens' own vectors, in another order
    apart = torch.cdist(shuffled[meant].double(), before[meant].double())
    assert apart.min(1).values.max() < 1e-4 and apart.min(0).values.max() < 1e-4, site.name
    assert len(rows) < 3 or apart.diagonal().max() > 1e-3, site.name


@pytest.mark.slow
@pytest.mark.oldest
@pytest.mark.parametrize("name", FAMILIES)
def test_every_edit_does_what_it_says_at_every_site_of_every_family(name: str) -> None:
    if not is_known(name):
        pytest.skip(f"this transformers has no {FAMILIES[name].model_type}")
    model, batch = build(name), make_batch()
    is_first = [site for site in lp.sites(model) if not site.name.startswith("layers.") or ".0" in site.name]
    sites = [s for s in is_first if s.takes != "weights" and not (s.name.endswith(".mid") and s.takes == "input")]
    assert len(sites) > 5
    for site in sites:
        check_site(model, batch, site)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(PLAIN))
def test_every_edit_does_what_it_says_on_every_head(family: str) -> None:
    if not is_known(PLAIN[family]):
        pytest.skip(f"this transformers has no {family}")
    for head in list_heads(PLAIN[family]):
        batch: dict[str, Any] = dict(make_head_batch(head))
        if head.endswith(("CausalLM", "LMHeadModel", "Decoder")):
            batch["use_cache"] = False
        model = build_head(PLAIN[family], head)
        for site in lp.sites(model):
            if site.name in ("layers.1", "logits"):
                check_site(model, batch, site)
