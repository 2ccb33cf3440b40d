"""The laws of experiments/planted.py: what is planted, and the bounds of what can be found."""

import itertools

import numpy as np
import pytest
import torch

import reproduce
from experiments import planted
from experiments import problem as shared
from experiments.conftest import array
from experiments.problem import Config


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


def test_what_is_planted_has_the_ranks_and_singular_values_of_the_bounds(small_planted):
    """Training has to add an update of each matrix's planted rank; its singular values are those
    that bounds() takes."""
    problem, _, _ = small_planted()
    identity = torch.eye(planted.WIDTH, device=shared.DEVICE)
    problem.loss(problem.model, dict(x=identity)).backward()  # mean of |(W - W0 - Delta*) e_i|^2
    for name, rank in planted.PLANTED.items():
        gradient = problem.model.get_submodule(name).weight.grad
        delta = -array(gradient) * planted.WIDTH * len(planted.PLANTED) / 2
        found = np.linalg.svd(delta, compute_uv=False)
        expected = np.zeros(planted.WIDTH)
        expected[:rank] = np.linspace(1, 0.5, rank)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_ranks_that_leave_no_choice_are_refused(small_planted):
    """All matrices have to keep one, and none has more than 12 planted."""
    for rank in (1, 12):
        with pytest.raises(ValueError, match=f"--rank {rank}: 2 to 11 leave a choice"):
            planted.problem(Config("planted", "elalora", rank, 0), planted.RECIPES["planted"][4])


@pytest.mark.parametrize("names, count", [(("intermediate.dense",), 2), (("key_proj", "dense"), 8)])
@pytest.mark.parametrize("method", ["elalora", "lora"])
def test_targets_alone_are_adapted(method, names, count, small_planted):
    """What is not named keeps its weights; the bounds are those of what is."""
    problem, config, recipe = small_planted(method, targets=names)
    allocator = reproduce.prepare(problem, config, recipe).allocator
    assert len(allocator.ranks()) == count
    assert all(name.endswith(names) for name in allocator.ranks())
    metrics = problem.evaluate(True)
    assert metrics["residual"] == pytest.approx(1) and metrics["best_possible"] < 1
    assert ("gap_closed" in metrics) == (count == 8)  # else all matrices need as many ranks
    expected = planted.bounds(4, [n for n in planted.PLANTED if n.endswith(names)])
    assert (metrics["even_rank_bound"], metrics["best_possible"]) == expected


def test_the_shares_of_the_processes_join_to_the_batches_of_one(small_planted, monkeypatch):
    """Row by row, in every batch of an epoch; epochs differ."""
    problem, _, _ = small_planted()
    whole = [batch["x"] for batch in problem.batches(1)]
    assert not torch.equal(whole[0], next(iter(problem.batches(2)))["x"])
    monkeypatch.setattr(shared, "PROCESSES", 2)
    shares = []
    for process in range(2):
        monkeypatch.setattr(shared, "PROCESS", process)
        shares.append([batch["x"] for batch in problem.batches(1)])
    for x, *parts in zip(whole, *shares, strict=True):
        assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), x)
