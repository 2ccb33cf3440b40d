"""The laws of experiments/training.py: a run ends alike whatever happens to it."""

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import tqdm
from torch import distributed

import reproduce
from experiments import problem as shared
from experiments import training
from experiments.conftest import arguments_of, config_of, end_of, make
from experiments.problem import trained
from experiments.training import train


def test_a_loss_that_is_no_number_ends_the_run(world, tmp_path):
    """The step is named, and the checkpoint of the last whole epoch stays."""
    config = config_of(world, "planted")
    problem, method = make(config)
    losses, loss = iter(range(99)), problem.loss
    problem.loss = lambda *batch: loss(*batch) * (float("nan") if next(losses) == 13 else 1)
    with pytest.raises(ValueError, match="loss nan at step 14: try float32 or another seed"):
        train(problem, method, config, tmp_path / "checkpoint.pt")
    assert len(torch.load(tmp_path / "checkpoint.pt")["log"]["history"]) == 1


# ---- The log of every step ----
def gradient_norm(problem, method, batch):
    """Of loss and penalty, at the present weights."""
    problem.model.train()
    (problem.loss(problem.model, batch) + method.penalty()).backward()
    squares = sum(float(w.grad.double().square().sum()) for w in trained(problem.model).values())
    return squares**0.5


def test_every_step_is_logged_as_it_goes(world, tmp_path):
    """Before the next batch is drawn. A row has the step's loss, rate, gradient and moved ranks."""
    config, lines = config_of(world, "planted"), []
    problem, method = make(config)
    batches = problem.batches

    def watched(epoch):
        for batch in batches(epoch):
            if (tmp_path / "log.csv").exists():
                lines.append((tmp_path / "log.csv").read_text().splitlines())
            yield batch

    problem.batches = watched
    log = train(problem, method, config, tmp_path / "checkpoint.pt")
    assert [len(found) for found in lines] == [*range(1, 41)]
    rows = pandas.read_csv(tmp_path / "log.csv")
    assert [*rows["step"]] == [*range(1, 41)]
    means = rows["loss"].to_numpy().reshape(4, 10).mean(axis=1)
    assert means == pytest.approx([epoch["train_loss"] for epoch in log["history"]], rel=1e-4)
    peak = method.recipe.learning_rate
    rates = [peak * min(t / 4, (40 - t) / 36) for t in range(40)]  # up in 4 steps, down in 36
    assert [*rows["learning_rate"]] == pytest.approx(rates, rel=1e-4)
    moved = {a["step"]: sum(map(len, a["pruned"].values())) for a in log["adjustments"]}
    assert rows[rows["ranks_moved"] > 0].set_index("step")["ranks_moved"].to_dict() == {
        step: n for step, n in moved.items() if n}
    again, fresh = make(config)
    expected = gradient_norm(again, fresh, next(iter(again.batches(1))))
    assert rows["gradient_norm"][0] == pytest.approx(expected, rel=1e-4)


def test_tensorboard_has_the_rows_of_the_log_once(world, tmp_path):
    """By its own reader, of a run that was interrupted and went on."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "checkpoint.pt"
    end_of(config_of(world, "planted"), path, stop=3, report_to="tensorboard")
    rows = pandas.read_csv(tmp_path / "log.csv").set_index("step")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {*events.Tags()["scalars"]} == {*rows}
    for name in rows:
        found = {x.step: x.value for x in events.Scalars(name)}
        assert len(found) == len(events.Scalars(name))
        assert found == pytest.approx(rows[name].to_dict(), rel=1e-5)


# ---- Interrupted, killed, broken ----
def files_of(folder):
    """All of a run that must not depend on interruptions."""
    results = reproduce.json.loads((folder / "results.json").read_text())
    names = ("adapter.safetensors", "peft/adapter_model.safetensors", "peft/adapter_config.json",
             "log.csv")  # fmt: skip
    return results | dict(seconds=0, command=""), [(folder / n).read_bytes() for n in names]


@pytest.mark.parametrize("last", [False, True])
def test_an_interrupted_evaluation_says_so_in_one_line_and_is_made_again(
    last, world, monkeypatch, tmp_path, capsys, refusal
):
    """Ctrl-C after the first or the last epoch exits with 130. The command alone is refused then;
    with --resume it goes on, without training again what was trained, and ends as if never
    interrupted."""
    config = config_of(world, "planted")
    arguments, folder = arguments_of(config), reproduce.folder_of(config, "runs")
    evaluate, step, steps = training.evaluate, training.train_step, []

    def interrupted(problem, method, log):
        if len(log["history"]) == (4 if last else 1):
            raise KeyboardInterrupt
        evaluate(problem, method, log)

    with monkeypatch.context() as context, pytest.raises(SystemExit) as exit:
        context.setattr(training, "evaluate", interrupted)
        reproduce.main(arguments)
    assert exit.value.code == 130
    final = capsys.readouterr().err.splitlines()[-1]
    assert final == "reproduce.py: interrupted; --resume goes on after the last whole epoch, if any"
    assert "has an unfinished run: --resume goes on with it" in refusal(*arguments)
    with monkeypatch.context() as context:
        context.setattr(training, "train_step", lambda *a: steps.append(a) or step(*a))
        reproduce.main([*arguments, "--resume"])
    assert len(steps) == (0 if last else 3 * 10)
    reproduce.main([*arguments, "--output-dir", "whole"])
    whole = reproduce.folder_of(config, "whole")
    assert files_of(folder) == files_of(whole) and not (folder / "checkpoint.pt").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(
    world, tmp_path, monkeypatch
):
    """SIGKILL at random moments, then --resume: the same files bit for bit."""
    monkeypatch.chdir(tmp_path)
    config = config_of(world, "planted", epochs=12)

    def start(*more):
        if pid := os.fork():
            return pid
        code = 1
        try:
            sys.stdout = sys.stderr = open("stderr", "w", buffering=1)
            tqdm.tqdm.set_lock(threading.RLock())  # forks share its lock, and may die holding it
            reproduce.main([*arguments_of(config), *more])
            code = 0
        finally:
            os._exit(code)

    def ended(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    started = time.time()
    assert ended(start("--output-dir", "whole")) == 0, Path("stderr").read_text()
    seconds, random, epochs = time.time() - started, np.random.default_rng(), []
    checkpoint = reproduce.folder_of(config, "killed") / "checkpoint.pt"
    for share in random.permutation([0.1, 0.2, 0.3, 0.4, 0.5]):
        pid = start("--output-dir", "killed", "--resume")
        time.sleep(seconds * share * random.uniform(0.5, 1))
        os.kill(pid, signal.SIGKILL)
        if ended(pid) == 0:
            break
        if checkpoint.exists():
            epochs.append(len(torch.load(checkpoint)["log"]["history"]))
    assert epochs and epochs == sorted(epochs)
    assert ended(start("--output-dir", "killed", "--resume")) == 0, Path("stderr").read_text()
    assert files_of(checkpoint.parent) == files_of(reproduce.folder_of(config, "whole"))


def saved(state):
    torch.save(state, file := io.BytesIO())
    return file.getvalue()


def with_short_lambda(state):
    weights = {name: w[:2] if w.ndim == 1 else w for name, w in state["trained"].items()}
    return saved(state | {"trained": weights})


BROKEN = {  # from a good checkpoint and its bytes: another's bytes, and why they are refused
    "cut": (lambda state, whole: whole[: len(whole) // 2], ""),
    "text": (lambda state, whole: b"weights", ""),
    "another file": (lambda state, whole: saved({"weights": torch.zeros(3)}), "KeyError: 'argu"),
    "another seed": (
        lambda state, whole: saved(state | {"arguments": state["arguments"] | {"seed": 7}}),
        "it has seed 7, not 0",
    ),
    "other phases": (
        lambda state, whole: saved(state | {"recipe": state["recipe"] | {"warmup": 7}}),
        "it has warmup 7, not 4",
    ),
    "unlike ranks": (lambda state, whole: with_short_lambda(state), "size mismatch for"),
    "weights missing": (
        lambda state, whole: saved(state | {"trained": dict([*state["trained"].items()][1:])}),
        "missing or unknown: deberta",
    ),
}


@pytest.mark.parametrize("change, reason", BROKEN.values(), ids=BROKEN)
def test_a_checkpoint_that_is_not_this_runs_is_named_and_refused(change, reason, world, tmp_path):
    """Cut, foreign or of other arguments; and the file stays as it is."""
    config, path = config_of(world, "planted"), tmp_path / "checkpoint.pt"
    problem, method = make(config)
    problem.evaluate = lambda last: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(problem, method, config, path)
    path.write_bytes(broken := change(torch.load(path), path.read_bytes()))
    with pytest.raises(ValueError) as error:
        end_of(config, path)
    assert str(error.value).startswith(f"{path} is not a checkpoint of this run, delete it to ")
    assert reason in str(error.value) and path.read_bytes() == broken


# ---- Several processes ----
def test_weights_that_differ_in_a_bit_are_found(world, monkeypatch):
    """Though they are equal as sums of numbers: two processes compare sums of bits."""
    problem, _ = make(config_of(world, "planted"))
    sums = []
    monkeypatch.setattr(shared, "PROCESSES", 2)
    monkeypatch.setattr(distributed, "all_reduce", lambda x, op: sums.append(x.clone()))
    shared.check_alike(problem.model)
    weight = next(iter(shared.trained(problem.model).values()))
    weight.data.view(torch.int32)[0, 0] ^= 1
    monkeypatch.setattr(distributed, "all_reduce", lambda x, op: x.copy_(x.maximum(sums[0])))
    with pytest.raises(RuntimeError, match="the weights of the processes differ"):
        shared.check_alike(problem.model)
