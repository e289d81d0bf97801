"""What tells one pool from another, and a model that something was put on from a plain one."""

import functools
import re
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import layerprobe as lp
from forks import run_each
from layerprobe.capture.identity import describe_changes, describe_pool

SCALE: Any = 1.0


class AttentionPool(nn.Module):
    """Weights rows by how they score."""

    def __init__(self, seed: int, temperature: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.score = nn.Linear(8, 1)
        self.temperature = temperature

    def forward(self, rows_TD: torch.Tensor) -> torch.Tensor:
        return (torch.softmax(self.score(rows_TD) / self.temperature, 0) * rows_TD).sum(0)


class Weighted:
    """Has no repr of its own, and slots."""

    __slots__ = ("weights",)

    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def __call__(self, rows_TD: torch.Tensor) -> torch.Tensor:
        return rows_TD.mean(0)


def scaled(rows_TD: torch.Tensor) -> torch.Tensor:
    return rows_TD.mean(0) * SCALE


def project(matrix: Any) -> Any:
    return lambda rows_TD: (rows_TD @ matrix).mean(0)


def test_content_of_a_pool_tells_it_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, other = torch.zeros(300, 16), torch.zeros(300, 16)
    other[150, 3] = 1  # where no repr would show it
    pools: list[Any] = [AttentionPool(1), AttentionPool(2), AttentionPool(1, 2.0), project(matrix), project(other)]
    pools += [project(matrix.numpy()), project(other.numpy()), project(matrix.half())]
    pools += [functools.partial(torch.sum, dim=0), functools.partial(torch.sum, dim=1), torch.sum, torch.mean]
    pools += [Weighted([1, 2]), Weighted([1, 3]), Weighted({1: "a"}), Weighted(np.float32(1)), Weighted({1, 2})]
    pools += [AttentionPool(1).forward, AttentionPool(2).forward]
    assert len({describe_pool(pool) for pool in pools}) == len(pools)
    assert describe_pool(AttentionPool(1)) == describe_pool(AttentionPool(1))
    assert describe_pool(project(matrix)) == describe_pool(project(matrix.clone()))
    before = describe_pool(scaled)
    assert before == describe_pool(scaled)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 2.0)
    assert describe_pool(scaled) != before


def test_what_cannot_be_told_is_like_nothing_else() -> None:
    lock, numbers = threading.Lock(), iter([1])
    for held in (lock, numbers, torch.Generator(), torch.zeros(2, 2).to_sparse()):
        pool = Weighted(held)
        assert describe_pool(pool) != describe_pool(pool)
    assert describe_pool(Weighted(None)) == describe_pool(Weighted(None))


def test_pool_is_the_same_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
        import functools
        import logging
        import operator
        from datetime import date

        import torch
        from numpy import maximum

        import helpers

        logger = logging.getLogger(__name__)
        logger.addHandler(logging.StreamHandler())
        WEIGHTS = {"a", "b", "c", "d"}
        SINCE, FIRST = date(2020, 1, 2), operator.itemgetter(0)

        @functools.lru_cache
        def count(name):
            logger.info("counting")
            return len(name)

        class Pool(torch.nn.Module):
            KINDS = {"sum": sum, "max": maximum}

            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.over = torch.nn.GRU(4, 4)
                self.parts = [lambda rows: FIRST(rows), sorted]

            def forward(self, rows):
                return sum((part(rows) for part in self.parts if count("a") in WEIGHTS), helpers.first(rows))

        def pool(rows):
            import later

            def inner(value):
                return [one * 2 for one in value]

            return torch.stack(list(inner(row) for row in rows)).sum(0) * len(WEIGHTS) * count("x") * SINCE.year
        """)
    )
    (tmp_path / "helpers.py").write_text("def first(rows):\n    return rows[0]\n")
    (tmp_path / "later.py").write_text("")
    setup = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from layerprobe.capture.identity import describe_pool as d"
    )
    say = "import later, mine; print(d(mine.pool), d(mine.Pool()))"
    change = f"open({str(tmp_path)!r} + '/{{}}', 'w').write({{!r}})\n{say}".format

    def run(*pieces: str) -> list[list[str]]:
        ended = run_each(setup, pieces)
        assert not any(one.status for one in ended), ended
        return [one.said.split() for one in ended]

    [first] = run(say)
    changes = [change("helpers.py", "def first(rows):\n    return rows[-1]\n"), change("later.py", "A = 1")]
    again, other_helper, other_module = run(say, *changes)
    assert first == again and first[0].startswith("mine.pool#") and first[1].startswith("mine.Pool#")
    assert other_helper[0] == first[0] and other_helper[1] != first[1]
    assert other_module[0] != first[0]


def test_what_goes_round_comes_to_an_end() -> None:
    class Node:
        def __init__(self) -> None:
            self.all: Any = set()

        def __call__(self, rows_TD: torch.Tensor) -> torch.Tensor:
            return rows_TD[0]

    node, child, itself = Node(), Node(), Node()
    node.all, child.all = {child}, {node}
    itself.all = [1]
    itself.all.append(itself.all)
    assert describe_pool(node) == describe_pool(node) != describe_pool(itself) == describe_pool(itself)
    deep: Any = []
    for _ in range(20_000):
        deep = [deep]
    assert describe_pool(Weighted(deep)) != describe_pool(Weighted(deep))  # too deep to be told
    while deep:  # nor can Python take it apart at once
        deep = deep.pop()


def test_pools_by_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    class Titled(dict[str, int]):
        def __call__(self, rows_TD: torch.Tensor) -> torch.Tensor:
            return rows_TD[0]

    class Private:
        __slots__ = ("__kept",)

        def __init__(self, kept: int) -> None:
            self.__kept = kept

        def __call__(self, rows_TD: torch.Tensor) -> torch.Tensor:
            return rows_TD[self.__kept]

    class Table:
        FACTORS: ClassVar[dict[str, int]] = {"a": 1}

        def __call__(self, rows_TD: torch.Tensor) -> torch.Tensor:
            return rows_TD[self.FACTORS["a"]]

    pools: list[Any] = [Titled(a=1), Titled(a=2), Private(1), Private(2), Table(), Weighted({"a": 1})]
    pools += [Weighted(re.compile("a" * 300)), Weighted(re.compile("a" * 299 + "b"))]
    told = {describe_pool(pool) for pool in pools}
    assert len(told) == len(pools) and describe_pool(Private(1)) in told
    monkeypatch.setitem(Table.FACTORS, "a", 2)
    assert describe_pool(Table()) not in told
    # where a run goes on is no part of what it does
    assert describe_pool(Weighted(torch.device("cpu"))) == describe_pool(Weighted(torch.device("meta")))


def test_edits_and_hooks_of_others_are_changes_and_probes_are_none(make_bert: Any) -> None:
    model = make_bert()
    assert describe_changes(model) == []
    with lp.Probe(model, "layers.*", stop=True), lp.Probe(model, "embeddings"):
        assert describe_changes(model) == []

    def edited(scale: float) -> list[str]:
        with lp.edit(model, {"layers.1": lp.steer(torch.ones(32), scale)}), lp.Probe(model, "layers.1"):
            return describe_changes(model)

    (said,) = edited(2.0)
    assert said.startswith("encoder.layer.1: lp.edit#") and edited(2.0) == [said] != edited(3.0)
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: None)
    (hooked,) = describe_changes(model)
    assert hooked.startswith(f"encoder.layer.0: {__name__}.test_edits")
    handle.remove()
    model.pooler.forward = functools.partial(nn.Identity.forward, model.pooler)
    with lp.Probe(model, "layers.0", stop=True):
        assert describe_changes(model) == []  # torch's own
    model.pooler._hf_hook, model.pooler._old_forward = "accelerate's", scaled
    assert [said.partition("#")[0] for said in describe_changes(model)] == [f"pooler: {__name__}.scaled"]
    model.pooler._old_forward = type(model.pooler).forward.__get__(model.pooler)
    assert describe_changes(model) == []
    del model.pooler._hf_hook, model.pooler._old_forward
    model.pooler.forward = scaled
    with lp.Probe(model, "layers.0", stop=True):
        assert [said.partition("#")[0] for said in describe_changes(model)] == [f"pooler: {__name__}.scaled"]
    del model.pooler.forward
    assert describe_changes(model) == []


def test_modules_of_the_user_are_changes_by_their_code_and_settings(make_bert: Any) -> None:
    class Louder(nn.Linear):
        factor = 2.0

        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
            return super().forward(input) * self.factor

    def told(factor: float | None = None, held: Any = 0) -> list[str]:
        model = make_bert()
        louder = model.encoder.layer[0].output.dense = Louder(64, 32)
        if factor is not None:
            louder.factor = factor
        louder.held = held
        return describe_changes(model)

    (said,) = told()
    assert said.startswith(f"modules of {__name__}.test_modules_of") and told() == [said]
    others: list[Any] = [{"names": ["a"]}, {"names": ["b"]}, np.zeros(2), np.ones(2), torch.tensor(1), torch.tensor(2)]
    assert len({*told(), *told(2.0), *told(3.0), *(one for held in others for one in told(held=held))}) == 9
    assert told(held=object()) == told(held=threading.Lock())  # no settings
    # where a run goes on is no part of what it does
    assert told(held=torch.device("cpu")) == told(held=torch.device("meta"))


def test_edits_by_functions_are_told_apart(make_bert: Any) -> None:
    model = make_bert()

    def edited(edit: Any) -> list[str]:
        with lp.edit(model, {"layers.1": edit}):
            return describe_changes(model)

    kinds = [
        lp.replace(lambda value: value * 2),
        lp.replace(lambda value: value * 3),
        lp.ablate(),
        lp.ablate(where=0),
        lp.scale(0.5),
        lp.patch(torch.zeros(32)),
        lp.patch(torch.ones(32)),
    ]
    told = [tuple(edited(kind)) for kind in kinds]
    assert len(set(told)) == len(told) and all(len(one) == 1 for one in told)
    assert [tuple(edited(kind)) for kind in kinds] == told
