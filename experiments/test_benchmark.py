"""The laws of experiments/benchmark.py: what it measures adds up, and is written as printed."""

import json
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import transformers

import reproduce
from experiments import benchmark
from experiments.conftest import arguments_of, tiny_config
from experiments.problem import Config

FACTORS = 2 * sum(a + b for a, b in [(16, 16)] * 4 + [(16, 32)] * 2) * 2  # weights of P and Q
HEAD = 16 * 16 + 16 + 34


@pytest.fixture
def short(monkeypatch, tmp_path):
    """A benchmark of four rounds, of which one moves ranks, and of short texts."""
    for name, value in dict(ROUNDS=4, INTERVAL=2, TEXTS=2, TOKENS=6).items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "TIMED", replace(benchmark.TIMED, interval=2))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("task", ["random", "rte"])
def test_the_benchmark_writes_what_it_prints(task, short, tiny, monkeypatch, capsys):
    """On random tokens or a task's data; parts add up, states have the bytes they must have."""
    arguments = ["--model", str(tiny / "deberta")]
    if task == "rte":
        arguments = arguments_of(tiny)
        rows = [dict(matrices=12, rank=2, penalty=1.0, allocator=1.0, adjustment=1.0)] * 9
        monkeypatch.setattr(benchmark, "growth", lambda config: pandas.DataFrame(rows))  # no other
    benchmark.main([*arguments, "--rank", "2"])
    folder = Path(f"runs/benchmark-{task}-deberta-r2")
    tables = (folder / "README.md").read_text().partition("\n## ")[2]
    assert tables.strip() in capsys.readouterr().out
    assert (folder / "cost.png").read_bytes()[1:4] == b"PNG"
    results = json.loads((folder / "results.json").read_text())
    for method, extra, states in (
        ("frozen", 0, 0),
        ("lora", FACTORS, 0),
        ("adalora", FACTORS * 3 // 2 + 36, 3),
        ("elalora", None, 2),  # its ranks move between matrices of other sizes
    ):
        costs = results["costs"][method]
        extra = costs["trained"] - HEAD if extra is None else extra
        assert costs["trained"] == HEAD + extra
        assert costs["optimizer_bytes"] == 4 * 2 * (HEAD + extra)  # AdamW's moments
        assert costs["allocator_bytes"] == 4 * states * extra
        assert costs["total"] > costs["passes"] > 0 and costs["memory_bytes"] >= 0
    assert len(results["ratios"]) == 8 and len(results["growth"]) == 9
    for ratio in results["ratios"].values():
        assert 0 < ratio["0.25"] <= ratio["0.5"] <= ratio["0.75"]


def test_an_adjustment_is_timed_apart(short, tiny, monkeypatch):
    """The allocator's time is that of steps in which no ranks move."""

    def timed_step(problem, batch, training):
        _, adjustment = reproduce.train_step(problem, batch, training)
        return dict(passes=1.0, allocator=100.0 if adjustment else 1.0, total=0.0)

    monkeypatch.setattr(benchmark, "timed_step", timed_step)
    config = tiny_config(tiny)
    problems = dict(elalora=benchmark.random_tokens(config, benchmark.TIMED))
    costs, total, _ = benchmark.measure(problems, config)
    assert costs.loc["elalora", ["allocator", "adjustment"]].tolist() == [1, 100]
    assert [*total.index] == [3]  # the first two rounds warm up, and the fourth moves ranks


def test_without_a_model_it_takes_one_of_deberta_v3_bases_size(short, monkeypatch):
    """12 layers of width 768, of which it adapts 72 matrices; here its weights are fewer."""
    asked, real = {}, transformers.DebertaV2Config

    def small(**sizes):
        asked.update(sizes)
        return real(**sizes | dict(hidden_size=48, intermediate_size=48, vocab_size=64))

    monkeypatch.setattr(transformers, "DebertaV2Config", small)
    config = Config(None, "elalora", 4, 0, dtype="float32")
    problem = benchmark.random_tokens(config, benchmark.TIMED)
    assert asked["hidden_size"] == 768 and asked["intermediate_size"] == 3072
    assert len(problem.targets) == 72 and problem.heads == ["pooler", "classifier"]
    assert problem.batches(1)[0]["input_ids"].shape == (2, 6)


def test_bad_arguments_of_the_benchmark_are_refused(refusal):
    """In one line and with exit code 2, before any work."""
    assert "--rank must be >= 1, got 0" in refusal("--rank", 0, main=benchmark.main)
    assert "'planted'" in refusal("--task", "planted", main=benchmark.main)
    message = "experiments.benchmark: error: --model: ./nowhere is no folder with a config.json"
    assert message in refusal("--model", "./nowhere", main=benchmark.main)
