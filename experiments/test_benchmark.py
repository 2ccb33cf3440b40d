"""The laws of experiments/benchmark.py: what it measures is written as printed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import benchmark
from experiments.conftest import PLACES


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


def test_bad_arguments_of_the_benchmark_are_refused(refusal):
    """In one line and with exit code 2, before any work."""
    assert "'planted'" in refusal("--task", "planted", main=benchmark.main)
    message = "experiments.benchmark: error: --model: ./nowhere is not a folder with a config.json"
    assert message in refusal("--model", "./nowhere", main=benchmark.main)
