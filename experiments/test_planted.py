"""The laws of experiments/planted.py: what is planted, and the bounds of what can be found."""

import itertools

import numpy as np
import pytest
import torch

from experiments import planted
from experiments import problem as shared
from experiments.conftest import array, config_of, make, make_problem
from experiments.tables import recipe_of


@pytest.mark.parametrize("names", ["abc", "ac", "b"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_bounds_are_what_trying_all_allocations_finds(rank, names, monkeypatch):
    """The residual of even ranks, and the least one of any ranks >= 1 of the same sum."""
    monkeypatch.setattr(planted, "PLANTED", ranks := {"a": 4, "b": 2, "c": 0})
    squares = {name: np.linspace(1, 0.5, r) ** 2 for name, r in ranks.items()}
    total = sum(s.sum() for s in squares.values())
    rest = sum(squares[name].sum() for name in ranks if name not in names)
    residuals = {
        allocation: (rest + sum(squares[n][r:].sum() for n, r in zip(names, allocation))) / total
        for allocation in itertools.product(range(1, 3 * rank + 1), repeat=len(names))
        if sum(allocation) == len(names) * rank
    }
    expected = residuals[(rank,) * len(names)], min(residuals.values())
    assert planted.bounds(rank, names) == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def problem(world):
    config = config_of(world, "planted")
    return make_problem(config, recipe_of(config))


def test_what_is_planted_has_the_ranks_and_singular_values_of_the_bounds(problem):
    """Training has to add an update of each matrix's planted rank; its singular values are those
    that bounds() takes."""
    identity = torch.eye(planted.WIDTH, device=shared.DEVICE)
    problem.loss(problem.model, identity).backward()  # mean of |(W - W0 - Delta*) e_i|^2
    for name, rank in planted.PLANTED.items():
        gradient = problem.model.get_submodule(name).weight.grad
        delta = -array(gradient) * planted.WIDTH * len(planted.PLANTED) / 2
        found = np.linalg.svd(delta, compute_uv=False)
        expected = np.zeros(planted.WIDTH)
        expected[:rank] = np.linspace(1, 0.5, rank)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_bounds_are_those_of_the_targets(world):
    """Before training the residual is 1; where all matrices need as many ranks there is no gap."""
    for names, gap in ((("intermediate.dense",), False), (("key_proj", "dense"), True)):
        config = config_of(world, "planted", targets=[*names], rank=4)
        problem, _ = make(config)
        metrics = problem.evaluate(True)
        assert metrics["residual"] == pytest.approx(1) and metrics["best_possible"] < 1
        assert ("gap_closed" in metrics) == gap == bool(problem.note(metrics))
        expected = planted.bounds(4, [n for n in planted.PLANTED if n.endswith(names)])
        assert (metrics["even_rank_bound"], metrics["best_possible"]) == expected


def test_the_shares_of_the_processes_join_to_the_batches_of_one(problem, monkeypatch):
    """Row by row, in every batch of an epoch; epochs differ."""
    whole = [*problem.batches(1)]
    assert not torch.equal(whole[0], next(iter(problem.batches(2))))
    monkeypatch.setattr(shared, "PROCESSES", 2)
    shares = []
    for process in range(2):
        monkeypatch.setattr(shared, "PROCESS", process)
        shares.append([*problem.batches(1)])
    for x, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), x)
