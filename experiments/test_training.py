"""The laws of experiments/training.py: a run ends alike whatever happens to it."""

import itertools
import os
import signal
import threading

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


# ---- Killed, or of another run ----
def files_of(folder):
    """All of a run that must not depend on interruptions."""
    results = reproduce.json.loads((folder / "results.json").read_text())
    adapter = (folder / "adapter.safetensors").read_bytes()
    return results | dict(seconds=0), adapter, (folder / "log.csv").read_text()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_run_that_is_killed_twice_ends_as_if_it_never_was(world, tmp_path, monkeypatch):
    """SIGKILL in the second and the third of four epochs, then --resume: the same files bit for
    bit."""
    monkeypatch.chdir(tmp_path)
    config, step = config_of(world, "planted"), training.train_step

    def train_until(last):
        """In a process of its own, so many steps."""
        pid = os.fork()
        if not pid:
            tqdm.tqdm.set_lock(threading.RLock())  # forks share its lock, and may die with it
            steps = itertools.count()
            training.train_step = lambda *arguments: (
                os.kill(os.getpid(), signal.SIGKILL) if next(steps) == last else step(*arguments))
            try:
                reproduce.main([*arguments_of(config), "--resume"])
            finally:
                os._exit(1)  # it should have been killed
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert [train_until(15), train_until(13)] == [-signal.SIGKILL] * 2
    folder = reproduce.folder_of(config, "runs")
    assert len(torch.load(folder / "checkpoint.pt")["log"]["history"]) == 2
    reproduce.main([*arguments_of(config), "--resume"])
    reproduce.main([*arguments_of(config), "--output-dir", "whole"])
    assert files_of(folder) == files_of(reproduce.folder_of(config, "whole"))
    assert not (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize("part, name", [("arguments", "seed"), ("recipe", "warmup")])
def test_a_checkpoint_that_is_not_this_runs_is_refused(part, name, world, tmp_path):
    """It has other arguments, or, made of other data, other phases. The file stays as it is."""
    config, path = config_of(world, "planted"), tmp_path / "checkpoint.pt"
    problem, method = make(config)
    training.save(path, config, problem.model, method, {})
    saved = torch.load(path)
    saved[part][name] = 7
    torch.save(saved, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{path} is of a run that has {name} 7, not"):
        train(problem, method, config, path)
    assert path.read_bytes() == before


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
