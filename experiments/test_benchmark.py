"""The laws of experiments/benchmark.py: what it measures is written as printed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import transformers

from experiments import benchmark
from experiments.conftest import PLACES
from experiments.tables import Config


@pytest.fixture
def short(monkeypatch, tmp_path):
    """A benchmark of four rounds, one of them a warm-up, and of short texts."""
    for name, value in dict(ROUNDS=4, WARM_UP=1, TEXTS=2, TOKENS=6).items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "STEP", replace(benchmark.STEP, interval=2))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("task", ["random", "rte", "xsum", "cifar"])
def test_every_round_times_a_step_of_every_method_on_one_batch(task, short, world, monkeypatch,
                                                               capsys):
    """On random tokens or a task's data; the frozen model's ratio to itself is 1."""
    steps, step = [], benchmark.train_step
    record = lambda problem, batch, method: steps.append((id(batch), type(method).__name__))
    monkeypatch.setattr(benchmark, "train_step", lambda *a: (record(*a), step(*a)))
    model, data = PLACES.get(task, PLACES["rte"])
    arguments = ["--task", task, "--data-dir", str(world / data)] if task != "random" else []
    benchmark.main(["--rank", "2", "--model", str(world / model), *arguments])
    rounds = [steps[i : i + 5] for i in range(0, 20, 5)]
    assert len(steps) == 20
    for round in rounds:
        assert len({batch for batch, _ in round}) == 1
        assert {name for _, name in round} == {"ElaLoRA", "EvenRanks", "LoRA", "AdaLoRA", "Method"}
    folder = Path(f"runs/benchmark-{task}-{model}-r2")
    results = json.loads((folder / "results.json").read_text())
    out = capsys.readouterr().out
    assert results["ratios_to_frozen"]["frozen"] == [1, 1, 1] and results["rounds"] == 3
    for method, ms in results["ms"].items():
        low, median, high = results["ratios_to_frozen"][method]
        assert 0 < low <= median <= high and f"{median:.3f}" in out and f"{ms:.3f}" in out


def test_without_a_model_it_takes_one_of_deberta_v3_bases_size(short, monkeypatch):
    """12 layers of width 768, of which it adapts 72 matrices; here its weights are fewer."""
    asked, real = {}, transformers.DebertaV2Config

    def small(**sizes):
        asked.update(sizes)
        return real(**sizes | dict(hidden_size=48, intermediate_size=48, vocab_size=64))

    monkeypatch.setattr(transformers, "DebertaV2Config", small)
    config = Config(None, "elalora", 4, 0, dtype="float32")
    problem = benchmark.random_tokens(config, benchmark.STEP)
    assert asked["hidden_size"] == 768 and asked["intermediate_size"] == 3072
    assert len(problem.targets) == 72 and problem.heads == ["pooler", "classifier"]
    assert problem.batches(1)[0]["input_ids"].shape == (2, 6)


def test_bad_arguments_of_the_benchmark_are_refused(refusal):
    """In one line and with exit code 2, before any work."""
    assert "'planted'" in refusal("--task", "planted", main=benchmark.main)
    message = "experiments.benchmark: error: --model: ./nowhere is no folder with a config.json"
    assert message in refusal("--model", "./nowhere", main=benchmark.main)
