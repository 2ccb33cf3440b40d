"""The law of experiments/benchmark.py: what it measures is what it prints."""

from dataclasses import replace

from experiments import benchmark
from experiments.conftest import DEBERTA


def test_every_round_times_a_step_of_every_method_on_one_batch(monkeypatch, capsys):
    """By a clock that says how long each takes: its ratio to LoRA's step of the same round is
    printed, and the median of the rounds after the warm-up."""
    changes = dict(ROUNDS=4, WARM_UP=1, TEXTS=2, TOKENS=6, STEP=replace(benchmark.STEP, interval=2),
                   ENCODER=DEBERTA)
    for name, value in changes.items():
        monkeypatch.setattr(benchmark, name, value)
    seconds, steps, clock = dict(elalora=3, svd=2.5, lora=2, adalora=5), [], [0.0]
    step = benchmark.train_step

    def slow(problem, batch, method):
        steps.append((id(batch), method.config.method))
        clock[0] += seconds[method.config.method] * (1 + len({batch for batch, _ in steps}))
        return step(problem, batch, method)

    monkeypatch.setattr(benchmark, "train_step", slow)
    monkeypatch.setattr(benchmark, "timer", lambda: clock[0])
    benchmark.main(["--rank", "2"])
    for i in range(0, 16, 4):
        assert {name for _, name in steps[i : i + 4]} == {*seconds}
        assert len({batch for batch, _ in steps[i : i + 4]}) == 1
    assert len(steps) == 16
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:6]]
    found = {name.strip(): [float(x) for x in cells] for name, *cells in rows}
    assert found == {name: [s / 2] * 3 + [4000 * s] for name, s in seconds.items()}
