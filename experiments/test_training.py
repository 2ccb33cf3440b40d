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
from experiments.conftest import arguments_of, array, config_of, end_of, make
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
def test_every_step_is_logged_as_it_goes(world, tmp_path):
    """Before the next batch is drawn. A row has the step's loss, rate, gradient and moved ranks."""
    config, lengths = config_of(world, "planted"), []
    problem, method = make(config)
    batches, loss = problem.batches, problem.loss
    problem.loss = lambda *batch: 9 * loss(*batch)  # so that gradients are clipped

    def watched(epoch):
        for batch in batches(epoch):
            lengths.append(len((tmp_path / "log.csv").read_text().splitlines()))
            yield batch

    problem.batches = watched
    log = train(problem, method, config, tmp_path / "checkpoint.pt")
    rows = pandas.read_csv(tmp_path / "log.csv")
    assert [*rows["step"]] == lengths == [*range(1, 41)]
    means = rows["loss"].to_numpy().reshape(4, 10).mean(axis=1)
    assert means == pytest.approx([epoch["train_loss"] for epoch in log["history"]], rel=1e-4)
    peak = method.recipe.learning_rate
    rates = [peak * min(t / 4, (40 - t) / 36) for t in range(40)]  # up in 4 steps, down in 36
    assert [*rows["learning_rate"]] == pytest.approx(rates, rel=1e-4)
    moved = {a["step"]: sum(map(len, a["pruned"].values())) for a in log["adjustments"]}
    assert [*rows["ranks_moved"]] == [moved.get(step, 0) for step in range(1, 41)]
    problem, method = make(config)
    (9 * problem.loss(problem.model, next(iter(batches(1)))) + method.penalty()).backward()
    gradients = [array(w.grad).ravel() for w in trained(problem.model).values()]
    norm = np.linalg.norm(np.concatenate(gradients))
    assert norm > 1 and rows["gradient_norm"][0] == pytest.approx(norm, rel=1e-4)


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
def interrupt(*arguments):
    raise KeyboardInterrupt


def files_of(folder):
    """All of a run that must not depend on interruptions."""
    results = reproduce.json.loads((folder / "results.json").read_text())
    binary = [path.read_bytes() for path in sorted(folder.rglob("adapter*"))]
    return results | dict(seconds=0, command=""), binary, (folder / "log.csv").read_text()


@pytest.mark.parametrize("last", [False, True])
def test_an_interrupted_evaluation_says_so_in_one_line_and_is_made_again(
    last, world, monkeypatch, tmp_path, capsys, refusal
):
    """Ctrl-C after the first or the last epoch exits with 130. The command alone is refused then;
    with --resume it goes on, without training again what was trained, and ends as if never
    interrupted."""
    config = config_of(world, "planted")
    arguments, step, steps = arguments_of(config), training.train_step, []
    monkeypatch.setattr(training, "train_step", lambda *a: steps.append(a) or step(*a))
    with monkeypatch.context() as context, pytest.raises(SystemExit) as exit:
        evaluations = iter([training.evaluate] * (3 if last else 0))
        context.setattr(training, "evaluate", lambda *a: next(evaluations, interrupt)(*a))
        reproduce.main(arguments)
    assert exit.value.code == 130 and len(steps) == (40 if last else 10)
    final = capsys.readouterr().err.splitlines()[-1]
    assert final == "reproduce.py: interrupted; --resume goes on after the last whole epoch, if any"
    assert "has an unfinished run: --resume goes on with it" in refusal(*arguments)
    reproduce.main([*arguments, "--resume"])
    assert len(steps) == 40
    reproduce.main([*arguments, "--output-dir", "whole"])
    folder, whole = (reproduce.folder_of(config, where) for where in ("runs", "whole"))
    assert files_of(folder) == files_of(whole) and not (folder / "checkpoint.pt").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(
    world, tmp_path, monkeypatch
):
    """SIGKILL at random moments, then --resume: the same files bit for bit."""
    monkeypatch.chdir(tmp_path)
    config = config_of(world, "planted", epochs=12)

    def exit_code(*words, kill_after=None):
        pid = os.fork()
        if not pid:
            try:
                sys.stdout = sys.stderr = open("stderr", "w", buffering=1)
                tqdm.tqdm.set_lock(threading.RLock())  # forks share its lock, and may die with it
                reproduce.main([*arguments_of(config), *words])
                os._exit(0)
            finally:
                os._exit(1)
        if kill_after:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    started = time.time()
    assert exit_code("--output-dir", "whole") == 0, Path("stderr").read_text()
    seconds, random, epochs = time.time() - started, np.random.default_rng(), []
    checkpoint = reproduce.folder_of(config, "runs") / "checkpoint.pt"
    for share in random.permutation([0.1, 0.2, 0.3, 0.4, 0.5]):
        exit_code("--resume", kill_after=seconds * share * random.uniform(0.5, 1))
        if checkpoint.exists():
            epochs.append(len(torch.load(checkpoint)["log"]["history"]))
    assert epochs and epochs == sorted(epochs)
    assert exit_code("--resume") == 0, Path("stderr").read_text()
    assert files_of(checkpoint.parent) == files_of(reproduce.folder_of(config, "whole"))


def saved(state, part="", **changes):
    """Its bytes, after changes of a part."""
    file = io.BytesIO()
    torch.save(state | {part: state[part] | changes} if part else state, file)
    return file.getvalue()


BROKEN = {  # from a good checkpoint: another's bytes, and why they are refused
    "cut": (lambda state: saved(state)[:9999], ""),
    "text": (lambda state: b"weights", ""),
    "another file": (lambda state: saved({"weights": torch.zeros(3)}), "KeyError: 'argu"),
    "another seed": (lambda state: saved(state, "arguments", seed=7), "it has seed 7, not 0"),
    "other phases": (lambda state: saved(state, "recipe", warmup=7), "it has warmup 7, not 4"),
    "unlike ranks": (lambda state: saved(state, "trained", **{
        name: w[:2] for name, w in state["trained"].items() if w.ndim == 1}), "size mismatch for"),
    "weights missing": (lambda state: saved(state | {"trained": {}}), "missing or unknown: deber"),
    "weights unknown": (lambda state: saved(state, "trained", x=torch.zeros(3)), "unknown: x"),
}  # fmt: skip


@pytest.mark.parametrize("change, reason", BROKEN.values(), ids=BROKEN)
def test_a_checkpoint_that_is_not_this_runs_is_named_and_refused(change, reason, world, tmp_path):
    """Cut, foreign or of other arguments; and the file stays as it is."""
    config, path = config_of(world, "planted"), tmp_path / "checkpoint.pt"
    problem, method = make(config)
    problem.evaluate = lambda last: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(problem, method, config, path)
    broken = change(torch.load(path))
    path.write_bytes(broken)
    message = f"{path} is not a checkpoint of this run, delete it to start again (.*{reason}"
    with pytest.raises(ValueError, match=message.replace("(", "[(]")):
        end_of(config, path)
    assert path.read_bytes() == broken


# ---- Several processes ----
def test_weights_that_differ_in_a_bit_are_found(world, monkeypatch):
    """Though they are equal as sums of numbers: two processes compare sums of bits."""
    problem, _ = make(config_of(world, "planted"))
    others = []
    monkeypatch.setattr(shared, "PROCESSES", 2)
    monkeypatch.setattr(distributed, "all_gather_object", lambda found, own: (
        others.append(own), found.__setitem__(slice(None), [others[0], own])))
    shared.check_alike(problem.model)
    weight = next(iter(trained(problem.model).values()))
    weight.data.view(torch.int32)[0, 0] ^= 1
    with pytest.raises(RuntimeError, match="the weights of the processes differ"):
        shared.check_alike(problem.model)
