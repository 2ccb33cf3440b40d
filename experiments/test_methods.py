"""The laws of every method on every family of problems, then those of single methods.

Oracles are independent: the base model, a run that was not interrupted, PEFT, NumPy.
"""

import functools

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from elalora import RankSchedule, adapter_state_dict, orthogonality_penalty
from experiments import benchmark, tables
from experiments.conftest import (
    DEBERTA, FAMILY_TASKS, array, config_of, end_of, make, make_problem, weights_of,
)  # fmt: skip
from experiments.methods import METHODS
from experiments.problem import trained
from experiments.training import train_step


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    """A function of a configuration: its run, not interrupted, and what that exported."""

    @functools.cache
    def run(task, method):
        folder = tmp_path_factory.mktemp("whole")
        made = end_of(config_of(world, task, method), folder / "checkpoint.pt")
        made[1].export(folder)
        return *made, folder

    return run


def scale_of(method, layer):
    """What a layer multiplies the product of its factors with, in PEFT's words or ours."""
    if method == "adalora":
        return layer.scaling["default"] / layer.ranknum["default"].item()
    return float(layer.scaling["default"] if method == "lora" else layer.scaling)


@pytest.mark.parametrize("method", tables.METHODS)
@pytest.mark.parametrize("task", FAMILY_TASKS)
class TestEveryMethodOnEveryFamily:
    def test_starts_as_the_base(self, task, method, world):
        """Same metrics; the same matrices and heads train; alpha / rank scales every update."""
        config = config_of(world, task, method)
        problem, found = make(config)
        problem.model.eval()
        torch.manual_seed(config.seed)
        base = make_problem(config, found.recipe)
        base.model.eval()
        assert problem.evaluate(False) == pytest.approx(base.evaluate(False), rel=1e-5)
        layers = {name: m for name, m in problem.model.named_modules() if hasattr(m, "base_layer")}
        assert found.ranks().keys() == {*problem.targets} == {
            name.removeprefix("base_model.model.") for name in layers}
        for layer in layers.values():
            assert scale_of(method, layer) == pytest.approx(16 / 3)
        weights = trained(problem.model)
        heads = {n for n in weights if not any(n.startswith(f"{layer}.") for layer in layers)}
        assert len(weights) - len(heads) == len(layers) * (2 if method == "lora" else 3)
        assert {name.split(".")[0] for name in heads} == {*problem.heads}
        held = {w for group in found.optimizer.param_groups for w in group["params"]}
        assert held == {*weights.values()}

    def test_trains_and_keeps_the_mean_rank(self, task, method, whole):
        """The loss falls; ranks move where they should, and their sum is as at the start."""
        problem, found, log, _ = whole(task, method)
        losses = [epoch["train_loss"] for epoch in log["history"]]
        assert losses[-1] < losses[0]
        ranks = found.ranks()
        assert sum(ranks.values()) == 3 * len(problem.targets)
        moved = method in ("elalora", "adalora")
        assert (len({*ranks.values()}) > 1) == moved
        assert bool(log["adjustments"]) == (method == "elalora")
        counts = [len(S) for S in log["scores"].values()]
        assert counts[-1] == (0 if method == "lora" else sum(ranks.values()))

    def test_resumes_bit_for_bit(self, task, method, world, whole, tmp_path):
        """A run that was interrupted in its third epoch ends as one that was not."""
        problem, found, log, _ = whole(task, method)
        again, other, other_log = end_of(
            config_of(world, task, method), tmp_path / "checkpoint.pt", stop=3)
        torch.testing.assert_close(weights_of(again), weights_of(problem), rtol=0, atol=0)
        assert other.ranks() == found.ranks()
        assert other_log | {"seconds": 0} == log | {"seconds": 0}

    def test_exports_what_peft_loads(self, task, method, world, whole):
        """On a fresh base PEFT gives the run's metrics; weights are counted as they are."""
        problem, found, log, folder = whole(task, method)
        torch.manual_seed(found.config.seed)
        base = make_problem(found.config, found.recipe)
        before = base.evaluate(True)
        loaded = peft.PeftModel.from_pretrained(base.model, folder / "peft").eval()
        assert loaded.base_model.model is base.model
        metrics = log["history"][-1]["metrics"]
        assert base.evaluate(True) == pytest.approx(metrics, rel=1e-4, abs=1e-4)
        assert before != pytest.approx(metrics, rel=1e-3)
        files = [*folder.glob("adapter.safetensors"), folder / "peft/adapter_model.safetensors"]
        weights = load_file(files[0])  # PEFT's is padded to one rank, but AdaLoRA's, without pruned
        kinds = (".lora_A", ".lora_B", ".lora_E", ".P", ".Lambda", ".Q")
        sizes = [w.numel() for name, w in weights.items() if any(kind in name for kind in kinds)]
        assert found.parameters() == sum(sizes)


# ---- The loop and the recipe ----
@pytest.fixture
def tokens(monkeypatch):
    """A function that makes a problem of random tokens, and a method of 20 steps, the last two
    without moves."""
    monkeypatch.setattr(benchmark, "ENCODER", DEBERTA)

    def make(method="elalora", **settings):
        torch.manual_seed(0)
        config = tables.Config("rte", method, rank=2, seed=0)
        problem = benchmark.random_tokens(config)
        problem.steps_per_epoch = 20
        recipe = tables.Recipe(8, 1e-2, 1, 2, 2, 4, 4, 1, **settings)
        return problem, METHODS[method](problem, config, recipe, {})

    return make


def test_a_step_of_training_is_algorithm_1s(tokens, monkeypatch):
    """Weights, scores and adjustments are those of the plain loop that the README shows."""
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)  # Adam would blow up roundings
    ends = []
    for plain in (False, True):
        problem, method = tokens()
        generator = torch.Generator().manual_seed(2)
        for name, w in trained(problem.model).items():  # in the middle of training: nothing is 0
            if name.endswith((".P", ".Lambda", ".Q")):
                w.data.copy_(torch.randn(w.shape, generator=generator))
        torch.manual_seed(1)
        problem.model.train()
        adjusted = []
        for batch in problem.batches(1)[:12]:
            if plain:
                loss = problem.model(**batch).loss + 0.1 * orthogonality_penalty(problem.model)
                loss.backward()
                nn.utils.clip_grad_norm_(problem.model.parameters(), 1.0)
                method.optimizer.step()
                method.scheduler.step()
                adjusted.append(method.allocator.step())
                method.optimizer.zero_grad()
            else:
                adjusted.append(train_step(problem, batch, method)[-1])
        moves = [(a.step, a.b, a.pruned, a.expanded) for a in adjusted if a]
        ends.append((moves, adapter_state_dict(problem.model), method.importance()))
    assert ends[0][0] == ends[1][0] != []
    torch.testing.assert_close(ends[0][1:], ends[1][1:], rtol=1e-4, atol=1e-6)


def test_the_recipe_reaches_the_allocator(world, monkeypatch):
    """The schedule of ranks, k, the betas and the seed; b = 0 for svd, which moves none."""
    made, settings = [], ["shape=linear", "beta1=0.5", "beta2=0.6", "warmup=6", "interval=2"]
    monkeypatch.setattr("elalora.RankAllocator", lambda *arguments: made.append(arguments))
    for method, b in (("elalora", 4), ("svd", 0)):
        _, found = make(config_of(world, "planted", method, settings, seed=7))
        _, optimizer, schedule, *rest = made.pop()
        assert optimizer is found.optimizer and rest == [2, 0.5, 0.6, 7]
        assert schedule == RankSchedule(40, 6, 12, 2, b, "linear")


def test_the_learning_rate_rises_for_a_tenth_and_then_does_as_named(world):
    """Here it falls to 0 in a half cosine."""
    _, method = make(config_of(world, "planted", settings=["lr_scheduler=cosine"]))
    (rate, *_), progress = method.scheduler.lr_lambdas, np.arange(36) / 36
    expected = [*np.arange(4) / 4, *(1 + np.cos(np.pi * progress)) / 2]
    np.testing.assert_allclose([rate(step) for step in range(40)], expected, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_lambda_rate_multiplies_the_rate_of_what_starts_at_0_alone(method, world):
    """Adam's first step is one learning rate long: lambda_rate of them for Λ, E and LoRA's B."""
    problem, found = make(config_of(world, "planted", method, ["lambda_rate=7"]))
    weights = trained(problem.model)
    for w in weights.values():
        nn.init.ones_(w)
    for group in found.optimizer.param_groups:
        group["lr"] = group["initial_lr"]  # else 0 at the start of the warm-up
    train_step(problem, next(iter(problem.batches(1))), found)
    for name, w in weights.items():
        rate = 7 if name.endswith((".Lambda", ".lora_E.default")) or (
            method == "lora" and "lora_B" in name) else 1
        assert (w - 1).abs().max().item() == pytest.approx(rate * 2e-2, rel=1e-3)


# ---- AdaLoRA ----
def test_adaloras_penalty_is_pefts(tokens):
    """What PEFT's own model adds to the loss."""
    problem, method = tokens("adalora")
    model, batch = problem.model.eval(), problem.batches(1)[0]
    whole = method.adapted.base_model(**batch).loss.item()
    penalty = method.penalty().item()
    assert penalty > 0.1 and problem.loss(model, batch).item() + penalty == pytest.approx(whole)


def test_adalora_starts_at_a_multiple_of_the_rank(tokens):
    """And ends, once its search is over, at the rank of the others."""
    problem, method = tokens("adalora", init_ratio=3.0)
    E = [w for name, w in problem.model.named_parameters() if "lora_E" in name]
    assert sum(w.numel() for w in E) == 12 * 6
    for _, batch in zip(range(20), problem.batches(1)):
        train_step(problem, batch, method)
    assert sum(w.count_nonzero() for w in E) == 12 * 2 == sum(method.ranks().values())


def test_adaloras_scores_are_equation_2s_of_the_ranks_it_kept(whole):
    """Averages times uncertainties, summed over a rank's weights as in eq. 2."""
    _, method, log, _ = whole("planted", "adalora")
    expected, tuner = [], method.allocator
    for name, kept in method.kept().items():
        names = {factor: f"{name}.lora_{factor}.default" for factor in "AEB"}
        s = {f: array(tuner.exp_avg_ipt[n]) * array(tuner.exp_avg_unc[n]) for f, n in names.items()}
        S = s["A"].mean(axis=1) + s["E"][:, 0] + s["B"].mean(axis=0)
        expected += [score for score, keep in zip(S, kept) if keep]
    *_, end = log["scores"].values()
    np.testing.assert_allclose(end, expected, rtol=6e-3)  # the log has three digits
