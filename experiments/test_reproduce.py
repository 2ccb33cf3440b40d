"""The laws of reproduce.py: what a command makes, what it refuses, and that two processes are one.

Oracles are independent: the model that was written, a run of one process.
"""

import ast
import http.server
import itertools
import json
import re
import shutil
import subprocess
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pandas
import pytest
import torch
from safetensors.torch import load_file

import reproduce
from elalora import inject, load_adapter_state_dict
from experiments import problem as shared
from experiments import training
from experiments.conftest import (
    FAMILY_TASKS, ROOT, arguments_of, config_of, make_problem, python, torchrun,
)  # fmt: skip
from experiments.problem import DEVICE
from experiments.tables import FAMILIES, recipe_of


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def results_of(folder):
    return json.loads(Path(folder, "results.json").read_text())


# ---- The files and what they import ----
def imports_of(name):
    """The modules of experiments/ that one of them imports, anywhere in it, and other packages."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"experiments/{name}.py").read_text())):
        module = getattr(node, "module", None)
        if isinstance(node, ast.Import) or module == "experiments":
            found |= {x.name for x in node.names}
        elif module:
            found.add(module.removeprefix("experiments."))
    return {name.split(".")[0] for name in found}


def test_imports_go_one_way():
    """A family knows no other family, nor the loop; nothing knows the command; tables, report and
    figures need no torch."""
    basis = {"tables", "problem"}
    allowed = dict(
        tables=set(), problem={"tables"}, data=basis, methods=basis,
        training=basis | {"methods", "report"}, report={"tables", "figures"}, figures=set(),
        benchmark=basis | {"data", "glue", "methods", "training"})  # fmt: skip
    allowed |= {family: basis | {"data"} for family in FAMILIES}
    for name, modules in allowed.items():
        assert imports_of(name) & {*allowed, "reproduce"} <= modules, name
    for name in ("tables", "report", "figures"):
        assert not imports_of(name) & {"torch", "transformers", "elalora", "peft"}, name


def test_a_mistyped_argument_is_refused_before_the_slow_imports(tmp_path):
    """Without torch, and whatever else takes seconds."""
    script = ROOT / "reproduce.py"
    result = python("-X", "importtime", script, "--set", "learning_rat=1", cwd=tmp_path)
    assert result.returncode == 2 and "learning_rat=1: takes" in result.stderr.splitlines()[-1]
    imported = set(re.findall(r"^import time:.*\| +(\w+)", result.stderr, re.MULTILINE))
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "numpy", "pandas", "elalora"}


# ---- End to end ----
@pytest.mark.parametrize("task", FAMILY_TASKS)
def test_a_run_writes_all_that_it_promises(task, world, capsys):
    """Its files, from which the model that was measured can be made again; later it is skipped."""
    config = config_of(world, task, epochs=2)
    reproduce.main(arguments_of(config))
    folder = reproduce.folder_of(config, "runs")
    names = {"results.json", "ranks.png", "ranks-over-time.png", "scores.png", "peft", "log.csv",
             "adapter.safetensors", "loss.png", *["predictions.json"] * (task != "planted")}
    assert {path.name for path in folder.iterdir()} == names
    assert all((folder / name).read_bytes()[1:4] == b"PNG" for name in names if ".png" in name)
    results = results_of(folder)
    assert results["arguments"] == config.__dict__ and len(results["history"]) == 2
    assert results["adjustments"] and results["metrics"] == results["history"][-1]["metrics"]
    if task != "planted":
        problem = make_problem(config, recipe_of(config))
        inject(problem.model, problem.targets, results["ranks"], modules_to_save=problem.heads)
        load_adapter_state_dict(problem.model, load_file(folder / "adapter.safetensors"))
        problem.model.to(DEVICE).eval()
        assert problem.evaluate(True) == pytest.approx(results["metrics"], rel=1e-3, abs=1e-4)
        outputs = json.loads((folder / "predictions.json").read_text())
        assert outputs["prediction"] == [*problem.outputs["prediction"]]
        if task != "xsum":
            assert outputs["loss"] == pytest.approx(problem.outputs["loss"], rel=1e-3)
    capsys.readouterr()
    reproduce.main(arguments_of(config))
    assert f"finished before: {folder}" in capsys.readouterr().out


def test_the_first_command_says_what_it_closed_of_which_gap(capsys):
    """Of the gap between even ranks and the best, as its metrics have it; on one thread."""
    torch.set_num_threads(2)
    reproduce.main([])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 1 or DEVICE == "cuda"
    first, *_, note, _ = capsys.readouterr().out.splitlines()
    metrics = results_of("runs/planted-elalora-r4-s0")["metrics"]
    even, best = metrics["even_rank_bound"], metrics["best_possible"]
    closed = (even - metrics["residual"]) / (even - best)
    assert metrics["gap_closed"] == pytest.approx(closed)
    assert note.strip().startswith(
        f"It closed {metrics['gap_closed']:.0%} of the gap between the best even ranks (residual "
        f"{even:.3f}) and the best ranks of at least 1 ({best:.3f}): ranks.png shows")
    assert first.endswith("100 steps: warm-up 10, stabilization 30, adjustments every 2")


def test_what_is_asked_in_another_order_or_twice_is_the_same_run():
    """Settings, targets, methods, seeds, tasks."""
    one = ["--set", "b=2", "lr_scheduler=cosine", "learning_rate=1e-2", "--seeds", "0", "1",
           "--targets", "key_proj", "dense", "--method", "svd", "lora"]  # fmt: skip
    two = ["--method", "lora", "svd", "lora", "--targets", "dense", "key_proj", "dense",
           "--task", "planted", "planted", "--seeds", "0", "1", "0",
           "--set", "learning_rate=0.01", "--set", "lr_scheduler=cosine", "b=02"]  # fmt: skip
    (_, runs), (_, again) = reproduce.parse(one), reproduce.parse(two)
    assert runs == again and len(runs) == 4


def test_a_run_names_the_commit_that_made_it(tmp_path, monkeypatch):
    """With "+changes" if a file differs; None for a copy that has no git of its own."""
    root = tmp_path / "copy"
    monkeypatch.setattr(shared, "__file__", str(root / "experiments/problem.py"))

    def commit_all(folder):
        for words in ("init -q", "add .", "commit -q -m x", "rev-parse HEAD"):
            command = f"git -c user.name=a -c user.email=a@b {words}".split()
            found = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        return found.stdout.strip()

    root.mkdir()
    (root / "reproduce.py").write_text("a")
    commit_all(tmp_path)  # of somebody else's project around the copy
    assert shared.commit() is None
    head = commit_all(root)
    assert shared.commit() == head
    (root / "reproduce.py").write_text("b")
    assert shared.commit() == f"{head}+changes"
    monkeypatch.setenv("PATH", "")  # a machine without git
    assert shared.commit() is None


def test_a_file_of_ranks_takes_the_place_of_even_ones(refusal):
    """A map, or the results of a run. Another mean is refused, and the results of a run for which
    the file had other ranks."""
    results = Path("runs/planted-elalora-r4-s0/results.json")
    reproduce.main(["--epochs", "2"])
    ranks = results_of(results.parent)["ranks"]
    assert len({*ranks.values()}) > 1
    Path("map.json").write_text(json.dumps(ranks))
    for file in ("map.json", str(results)):
        reproduce.main(["--method", "svd", "--ranks", file, "--epochs", "2"])
        found = results_of(f"runs/planted-svd-r4-{Path(file).stem}-s0")
        assert found["ranks"] == ranks and not found["adjustments"]
    asked = ["--method", "svd", "--ranks", "map.json", "--epochs", "2"]
    for rank, message in ((4, "map.json had other ranks"), (3, "a mean of 3: give --rank 3")):
        Path("map.json").write_text(json.dumps(dict.fromkeys(ranks, rank)))
        assert message in refusal(*asked)
    assert "--ranks is for --method svd alone" in refusal("--ranks", "map.json")


# ---- A table in one command ----
def test_a_family_stands_for_the_papers_tasks():
    """In the order of Table 2; sst2_heldout and caltech101 are not the paper's."""
    for family, tasks in (("glue", "mnli sst2 cola qqp qnli rte mrpc stsb"), ("xsum", "xsum"),
                          ("vtab", "cifar svhn eurosat resisc45 dsprites_ori dmlab")):
        args, runs = reproduce.parse(["--task", family])
        assert [config.task for config, _ in runs] == tasks.split() and args.family == family


def test_a_table_that_is_interrupted_twice_ends_in_the_same_page(world, monkeypatch, refusal):
    """In evaluations after a last and after a first epoch. Given again with --resume, the command
    goes on: no run is made twice, no epoch is trained twice. Without --resume it is refused."""
    words = [*arguments_of(config_of(world, "rte", epochs=2)), "--method", "elalora", "lora",
             "--seeds", "0", "1"]  # fmt: skip
    counts = dict(evaluate=itertools.count(1), train_step=itertools.count(1))
    evaluate, step = training.evaluate, training.train_step
    monkeypatch.setattr(training, "train_step", lambda *a: next(counts["train_step"]) and step(*a))

    def interrupted(*arguments):
        if next(counts["evaluate"]) in (2, 6):
            raise KeyboardInterrupt
        evaluate(*arguments)

    monkeypatch.setattr(training, "evaluate", interrupted)
    for _ in range(2):
        with pytest.raises(SystemExit, match="130"):
            reproduce.main([*words, "--resume"])
        assert "has an unfinished run: --resume goes on with it" in refusal(*words)
    reproduce.main([*words, "--resume"])
    assert next(counts["evaluate"]) == 4 * 2 + 2 + 1 and next(counts["train_step"]) == 4 * 12 + 1
    reproduce.main([*words, "--output-dir", "whole"])
    assert Path("runs/glue.md").read_bytes() == Path("whole/glue.md").read_bytes()
    logs = [path.read_text() for path in sorted(Path("whole").glob("*/log.csv"))]
    assert logs == [path.read_text() for path in sorted(Path("runs").glob("*/log.csv"))]
    assert len({*logs}) == 4


def test_a_dry_run_says_the_hours_and_writes_nothing(tmp_path, monkeypatch, capsys):
    """Steps times the seconds of the second step, for the runs that are left."""
    words = ["--epochs", "2", "--method", "elalora", "lora"]
    reproduce.main([*words[:2], "--method", "lora"])
    before, times = sorted(tmp_path.rglob("*")), iter([0, 99, 135, 0, 99, 171])
    monkeypatch.setattr(reproduce, "time", SimpleNamespace(time=lambda: next(times)))
    capsys.readouterr()
    reproduce.main([*words, "--seeds", "0", "1", "--dry-run"])
    out = [line for line in capsys.readouterr().out.splitlines() if "20 steps:" not in line]
    assert out == [
        "  36 s a step, seeds: 2, hours: 0.40", "  72 s a step, seeds: 1, hours: 0.40",
        "3 runs are left, 0.80 hours without their evaluations"]  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == before


def test_gradient_checkpointing_changes_no_number(world, monkeypatch):
    """Dropout draws the same numbers when layers are computed again."""
    config, models = config_of(world, "rte", epochs=2), []
    monkeypatch.setattr(reproduce, "train", lambda problem, *a: (
        models.append(problem.model), training.train(problem, *a))[1])
    for words in ([], ["--gradient-checkpointing", "--output-dir", "again"]):
        reproduce.main([*arguments_of(config), *words])
    assert [model.is_activation_checkpointing for model in models] == [False, True]
    one, two = (results_of(reproduce.folder_of(config, where)) for where in ("runs", "again"))
    assert one["history"] == two["history"] and one["ranks"] == two["ranks"]


@pytest.mark.parametrize("method", ["elalora", "lora", "adalora"])
def test_no_warning_of_a_library_reaches_the_user(method, world):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reproduce.main(arguments_of(config_of(world, "rte", method, epochs=2)))
    assert not [x for x in caught if not x.filename.startswith(str(ROOT))
                and "unclosed" not in str(x.message)]


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, capsys):
    """Then the libraries are offline. What is local asks for no hub; any answer is one."""
    hub = huggingface_hub.constants

    def said(model="microsoft/deberta-v3-base", data_dir=str(ROOT)):
        reproduce.check_hub(SimpleNamespace(model=model, data_dir=data_dir, family="glue"))
        return capsys.readouterr().err

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    handler = http.server.BaseHTTPRequestHandler  # it writes all requests to stderr
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert not said(None, None) and not said(str(ROOT))
        assert said().count("HEAD / ") == 1 and not hub.HF_HUB_OFFLINE
        server.shutdown()
    assert f"{hub.ENDPOINT} does not answer" in said() and hub.HF_HUB_OFFLINE
    assert not said()


def test_autocast_is_bfloat16_only_on_a_gpu_that_has_it(monkeypatch):
    """Not where it would be emulated."""
    assert DEVICE == "cuda" or shared.best_dtype() == "float32"
    monkeypatch.setattr(shared, "DEVICE", "cuda")
    for has in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation: has or including_emulation)
        assert shared.best_dtype() == ("bfloat16" if has else "float32")


# ---- What is refused ----
BAD_ARGUMENTS = {
    "rank": (["--rank", "0"], "--rank takes integers >= 1"),
    "epochs": (["--epochs", "0"], "epochs must be a number > 0, got 0"),
    "dtype": (["--dtype", "bfloat16"], "--dtype is not for planted: name another --task"),
    "two families": (["--task", "mrpc", "cifar"], "--task: glue and vtab need a command each"),
    "no file": (["--method", "svd", "--ranks", "no.json"], "No such file or directory: 'no.json'"),
    "targets": (["--targets", "dense", "bias"], "--targets bias: none of deberta."),
    "phases": (["--set", "warmup=9999"], "total_steps must hold warm-up"),
    "output": (["--output-dir", "/dev/null/runs"], "cannot write in /dev/null: Not a directory"),
    "data": (["--task", "mrpc", "--data-dir", "nowhere"], "--data-dir: nowhere is not a folder"),
}


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_end_in_one_line_and_exit_code_2(arguments, message, refusal):
    """What does not fit is named, and nothing is written."""
    last = refusal(*arguments)
    assert last.startswith("reproduce.py: error: ") and message in last


def bad_label(root):
    for path in root.glob("glue/rte/train-*"):
        pandas.read_parquet(path).replace({"label": {1: -1}}).to_parquet(path)


HOSTILE = {  # the task, what is done to a copy of the world, the error
    "BART": ("rte", lambda root: shutil.copytree(
        root / "bart", root / "deberta", dirs_exist_ok=True), "no matrices named query, key"),
    "label": ("rte", bad_label, "train: the label is -1, not"),
    "no task": ("cifar", lambda root: (root / "vtab/vtab-1k/cifar").rename(root / "vtab/vtab-1k/x"),
                "no folder vtab-1k/cifar"),
}


@pytest.mark.parametrize("task, change, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_end_in_one_line(task, change, message, world, tmp_path, refusal):
    """What is wrong with data or model is named before training, and nothing is written."""
    root = shutil.copytree(world, tmp_path / "given")
    change(root)
    last = refusal(*arguments_of(config_of(root, task)))
    assert last.startswith("reproduce.py: error: ") and message in last


def test_results_of_another_run_are_named(refusal):
    """They are neither taken for this run's nor overwritten."""
    path = Path("runs/planted-elalora-r4-s0/results.json")
    path.parent.mkdir(parents=True)
    path.write_text('{"arguments": {}}')
    assert f"error: {path} is of a run that has task None, not planted: delete it" in refusal()
    assert path.read_text() == '{"arguments": {}}'


def test_an_error_of_a_library_keeps_its_traceback(monkeypatch):
    """Its one line says too little."""
    monkeypatch.setattr(reproduce, "check_files", lambda *_: json.loads("x"))
    with pytest.raises(ValueError, match="Expecting value"):
        reproduce.main([])


# ---- Several processes ----
def test_two_processes_make_the_run_that_one_makes(world, tmp_path, refusal):
    """By the command line, without dropout, whose draws differ: losses, metrics and ranks are those
    of one process. It reports and writes once, and is not taken for a run of one process."""
    root = shutil.copytree(world, tmp_path / "given")
    config = json.loads((root / "deberta/config.json").read_text())
    config |= dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    (root / "deberta/config.json").write_text(json.dumps(config))
    asked = config_of(root, "rte", epochs=2)
    result = torchrun(ROOT / "reproduce.py", *arguments_of(asked), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("rte, elalora, rank 3, seed 0: 12 steps") == 1
    assert result.stderr.count(" 0/12 ") == 1  # one progress bar
    two = results_of(reproduce.folder_of(asked, "runs"))
    assert "a run that has processes 2, not 1" in refusal(*arguments_of(asked))
    reproduce.main([*arguments_of(asked), "--output-dir", "alone"])
    one = results_of(reproduce.folder_of(asked, "alone"))
    assert two["arguments"] == one["arguments"] | dict(processes=2)
    assert two["ranks"] == one["ranks"] and len({*two["ranks"].values()}) > 1
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-3)
    losses = [[epoch["train_loss"] for epoch in run["history"]] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_batches_that_processes_cannot_share_are_refused(monkeypatch):
    """Shares of unlike size would weigh unlike: a ValueError before any work."""
    monkeypatch.setattr(shared, "PROCESSES", 3)
    with pytest.raises(ValueError, match="3 processes cannot share every batch"):
        reproduce.run_all(*reproduce.parse([]))
