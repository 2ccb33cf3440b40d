"""The laws of reproduce.py: its loop is Algorithm 1's, and a run ends alike whatever happens to it.

Oracles are independent: the plain loop, an uninterrupted run, one process, PEFT.
"""

import ast
import importlib
import io
import json
import os
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import tqdm
from safetensors.torch import load_file
from torch import nn

import reproduce
from elalora import (
    RankSchedule, adapter_state_dict, inject, load_adapter_state_dict, orthogonality_penalty,
)  # fmt: skip
from experiments import glue, planted
from experiments import problem as shared
from experiments.conftest import (
    end_of,
    DEV_ROWS, ROOT, ROWS, arguments_of, prepared, python, rte_rows, tiny_problem, torchrun,
    write_glue,
)  # fmt: skip
from experiments.problem import CHOICES, DEVICE, Config, Recipe, recipe_of, trained

SHORT = ["batch_size=16", "learning_rate=0.02", "warmup=2", "stabilize=3", "interval=2", "b=4"]
SHORT_NAME = "-".join(SHORT)  # in a run's name; 13 steps an epoch, adjustments at 4, 6 and 8


def results_of(folder):
    return json.loads(Path(folder, "results.json").read_text())


# ---- The files and what they import ----
def imports_of(path):
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = node.module == "experiments"  # from experiments import problem
            found |= {f"experiments.{n.name}" for n in node.names} if whole else {node.module}
    return found


def test_imports_go_one_way():
    """A family of problems, and what all of them share, knows nothing of other families, of the
    loop or of the report; report and figures know none of them, nor torch."""
    files = {path.stem: imports_of(path) for path in (ROOT / "experiments").glob("[!_]*.py")}
    own = {
        name: {module.removeprefix("experiments.") for module in modules
               if module == "reproduce" or module.startswith("experiments.")}
        for name, modules in files.items() if name != "conftest" and not name.startswith("test_")
    }  # fmt: skip
    allowed = dict(problem=set(), common={"problem"}, baselines={"problem"})
    allowed |= dict(figures=set(), report={"figures"})
    allowed |= {family: {"problem", "common"} for family in reproduce.FAMILIES}
    allowed |= dict(trainer=set(), sharded=set())  # to be copied
    allowed |= dict(language_model={"problem", "common", "report", "trainer", "xsum"})
    allowed |= dict(headroom={"problem", "glue", "report"})
    allowed |= dict(benchmark=own.keys() | {"reproduce"})
    assert own.keys() == allowed.keys()
    for name, modules in own.items():
        assert modules <= allowed[name], name
    imported = {module.split(".")[0] for module in files["report"] | files["figures"]}
    assert "pandas" in imported and not imported & {"torch", "transformers", "elalora"}


def test_families_lists_the_tasks_of_every_family():
    """Those for which it has a recipe, at the default rank too."""
    for name, (model, tasks) in reproduce.FAMILIES.items():
        family = importlib.import_module(f"experiments.{name}")
        assert {*tasks.split()} == family.RECIPES.keys() and callable(family.problem)
        for task in tasks.split():
            arguments = reproduce.parse_arguments(["--task", task])
            assert arguments.model == model
            config = Config(task, "elalora", *arguments.rank, *arguments.seeds, model)
            assert recipe_of(family.RECIPES[task], config).b > 0
            assert reproduce.family_of(config) is family


def test_a_mistyped_argument_is_refused_before_the_slow_imports(tmp_path):
    """Without torch, and whatever else takes seconds."""
    result = python("-X", "importtime", ROOT / "reproduce.py", "--task", "mrcp", cwd=tmp_path)
    assert result.returncode == 2 and "invalid choice: 'mrcp'" in result.stderr.splitlines()[-1]
    imported = set(re.findall(r"^import time:.*\| +(\w+)", result.stderr, re.MULTILINE))
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "numpy", "pandas", "elalora", "experiments"}


# ---- End to end ----
@pytest.mark.parametrize(
    "task, metrics", [("rte", ["accuracy", "loss"]), ("stsb", ["pearson", "spearman", "loss"])]
)
def test_a_run_writes_all_that_it_promises(task, metrics, tiny, tmp_path, monkeypatch, capsys):
    """From a float16 checkpoint without head and tokenizer.json, on data laid out as on the hub."""
    monkeypatch.chdir(tmp_path)
    arguments = [*arguments_of(tiny, task), "--rank", "3", "--epochs", "1", "--set", *SHORT]
    reproduce.main(arguments)
    folder = tmp_path / f"runs/{task}-elalora-r3-{SHORT_NAME}-s0"
    names = {"results.json", "predictions.json", "ranks.png", "scores.png", "adapter.safetensors",
             "peft"}  # fmt: skip
    assert {path.name for path in folder.iterdir()} == names
    assert all((folder / name).read_bytes()[1:4] == b"PNG" for name in names if ".png" in name)
    results = results_of(folder)
    assert list(results["metrics"]) == metrics and results["paper"] == {}
    assert results["total_steps"] == 13 and len(results["history"]) == 1
    assert [adjustment["step"] for adjustment in results["adjustments"]] == [4, 6, 8]
    assert [*results["scores"]] == ["2", "10"]
    ranks = results["ranks"]
    assert len(ranks) == 12 and sum(ranks.values()) == 36
    size = {"intermediate.dense": 16 + 32, "output.dense": 32 + 16}
    expected = sum(
        r * (size.get(re.sub(r".*layer\.\d+\.", "", name), 32) + 1) for name, r in ranks.items()
    )
    assert results["adapter_parameters"] == expected
    head = 16 * 16 + 16 + (17 if task == "stsb" else 34)
    assert results["trainable_parameters"] == expected + head
    if task == "rte":
        red = sum(row["label"] for row in rte_rows(ROWS)[:DEV_ROWS]) / DEV_ROWS
        assert results["floor"] == dict(accuracy=pytest.approx(max(red, 1 - red)))
    # The adapter, put on a fresh base, is the model that was measured.
    problem = tiny_problem(tiny, task=task)
    base = tiny_problem(tiny, task=task)
    inject(problem.model, problem.targets, ranks, modules_to_save=problem.heads)
    load_adapter_state_dict(problem.model, load_file(folder / "adapter.safetensors"))
    problem.model.to(DEVICE).eval()
    assert problem.evaluate(True) == pytest.approx(results["metrics"], abs=1e-3)
    outputs = json.loads((folder / "predictions.json").read_text())
    assert outputs["prediction"] == pytest.approx(problem.outputs["prediction"], abs=1e-3)
    assert len(outputs["loss"]) == DEV_ROWS
    assert statistics.fmean(outputs["loss"]) == pytest.approx(results["metrics"]["loss"], rel=1e-4)
    # So it is in PEFT.
    loaded = peft.PeftModel.from_pretrained(base.model, folder / "peft").eval()
    ids = torch.randint(4, 40, (5, 9)).to(DEVICE)
    torch.testing.assert_close(loaded(ids).logits, problem.model(ids).logits, rtol=0, atol=1e-5)
    # Again: finished before. With other arguments: refused.
    capsys.readouterr()
    reproduce.main(arguments)
    assert f"finished before: {folder.relative_to(tmp_path)}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reproduce.main([*arguments, "--dtype", "bfloat16"])
    message = "it has dtype float32, not bfloat16; delete it or take another --output-dir"
    assert message in capsys.readouterr().err and results_of(folder) == results


def test_runs_repeat_bit_for_bit(small_planted, tmp_path, monkeypatch, capsys):
    """Two runs of a seed end alike, two seeds do not; the sum of the ranks is kept. Several runs
    end in a table."""
    monkeypatch.chdir(tmp_path)
    reproduce.main(["--seeds", "0", "1"])
    tables = capsys.readouterr().out.partition("\n| ")[2].strip()
    assert "ElaLoRA" in tables and tables in Path("runs/README.md").read_text()
    reproduce.main(["--output-dir", "again"])
    folders = ("runs/planted-elalora-r4-s0", "again/planted-elalora-r4-s0")
    results = [results_of(folder) for folder in (*folders, "runs/planted-elalora-r4-s1")]
    same, other, seed_1 = [(r["metrics"], r["ranks"], r["adjustments"]) for r in results]
    assert same == other != seed_1
    first, second = (Path(folder, "adapter.safetensors").read_bytes() for folder in folders)
    assert first == second
    assert sum(results[0]["ranks"].values()) == 48
    assert results[0]["adapter_parameters"] == 48 * (64 + 64 + 1)


def test_a_result_is_compared_with_the_papers_only_if_set_up_as_that_was():
    """The paper's model, ranks, epochs and settings, all matrices, the dev split."""
    config = Config("mrpc", "elalora", 4, 0, "microsoft/deberta-v3-base", dtype="float32")

    def paper(**changes):
        changed = replace(config, **changes)
        return reproduce.papers_result(changed, recipe_of(glue.RECIPES["mrpc"], changed))

    assert paper() == paper(seed=3, epochs=30) == dict(accuracy=0.9044)
    assert paper(rank=10) == dict(accuracy=0.8898)
    for changes in (
        dict(rank=3), dict(epochs=29), dict(model="roberta-base"), dict(method="svd"),
        dict(holdout=True), dict(targets=["dense"]), dict(set=["b=2"]),
    ):  # fmt: skip
        assert paper(**changes) == {}, changes


# ---- What is refused ----
BAD_ARGUMENTS = {
    "task": (["--task", "wnli"], "invalid choice: 'wnli'"),
    "rank": (["--rank", "0"], "--rank and --epochs take integers >= 1"),
    "rank of planted": (["--rank", "12"], "--rank 12: 2 to 11 leave a choice"),
    "seeds": (["--seeds", "3", "1", "3"], r"--seeds \[3, 1, 3\]: remove duplicates"),
    "dtype": (["--dtype", "bfloat16"], "--dtype, --holdout are not for planted"),
    "data": (["--task", "mrpc", "--data-dir", "nowhere"], "--data-dir: nowhere is no folder"),
    "model": (["--task", "mrpc", "--model", "./nowhere"], "nowhere is no folder with a config"),
    "hub": (["--task", "mrpc"], r"\(without the hub: --model FOLDER --data-dir FOLDER\)"),
    "targets": (["--targets", "dense", "bias"], "--targets bias: none of .*output.dense ends so"),
    "set": (["--set", "b=1", "--set", "k=two"], "--set k=two: "),
    "output": (["--output-dir", "/dev/null/runs"], "cannot write in /dev/null: Not a directory"),
    "method": (["--method", "final"], "takes the ranks of runs/.*-s0: run elalora first"),
    "eva": (["--method", "eva"], "--method eva: only for tasks of texts"),
    "examples": (["--set", "examples=9"], "examples=...: planted ranks have no end"),
}


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_end_in_one_line_and_exit_code_2(arguments, message, refusal):
    """What does not fit is named, and nothing is written."""
    assert re.search(message, refusal(*arguments))


def rewrite(rows_of, *splits):
    """Changes the rows of these splits of RTE."""

    def change(folder):
        import pyarrow.parquet

        for split in splits:
            (path,) = folder.glob(f"glue/rte/{split}-*")
            pyarrow.parquet.write_table(rows_of(pyarrow.parquet.read_table(path)), path)

    return change


def with_label(rows, label):
    return rows.set_column(2, "label", [[*rows["label"].to_pylist()[:-1], label]])


def without_split(folder):
    (path,) = folder.glob("glue/rte/validation-*")
    path.unlink()
    path = folder / "glue/README.md"
    path.write_text(re.sub(r"  - split: validation\n    path: rte.*\n", "", path.read_text()))


def without_weights(folder):
    (folder / "deberta/pytorch_model.bin").unlink()


def cut_weights(folder):
    path = folder / "deberta/pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-500])


def unlike_bert(folder):
    import tokenizers
    import transformers

    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, pad_token_id=0)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(folder / "deberta")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="b")
    tokenizer.save_pretrained(folder / "deberta")
    (folder / "deberta/spm.model").unlink()


HOSTILE = {  # what is done to a good folder, the error
    "no weights": (without_weights, "no file named .*pytorch_model.bin.* in .*deberta"),
    "cut weights": (cut_weights, "--model: .*deberta cannot be loaded"),
    "GPT-2": (unlike_bert, "--model: .*deberta has no matrices named query, key.*this task adapts"),
    "no split": (without_split, "no examples in the split 'validation'"),
    "no rows": (rewrite(lambda rows: rows[:0], "validation"), "glue has no rte that can be read"),
    "no column": (
        rewrite(lambda rows: rows.drop_columns("sentence2"), "train", "validation"),
        "the split 'train' has no column 'sentence2', only sentence1, label, idx",
    ),
    "label": (rewrite(lambda rows: with_label(rows, -1), "train"), "train: the label is -1, not"),
    "few rows": (lambda folder: None, "total_steps must hold warm-up, .*warmup_steps=300"),
}


@pytest.mark.parametrize("change, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_end_in_one_line_and_exit_code_2(change, message, tiny, tmp_path, refusal):
    """Whatever is wrong with data or model is named before training, and nothing is written."""
    shutil.copytree(tiny, tmp_path / "given")
    change(tmp_path / "given")
    last = refusal(*arguments_of(tmp_path / "given"))
    assert re.match("reproduce.py: error: .*" + message, last), last


@pytest.mark.parametrize("content", ["", "[]", '{"arguments": {}}'])
def test_results_that_are_broken_or_anothers_are_named(content, tmp_path, refusal):
    """A results.json that is not this run's is neither taken for it nor overwritten."""
    path = tmp_path / "runs/planted-elalora-r4-s0/results.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    message = f"error: {path.relative_to(tmp_path)}: .*; delete it or take another --output-dir"
    assert re.search(message, refusal()) and path.read_text() == content


def test_a_run_folder_that_is_a_file_is_named_before_training(tmp_path, refusal):
    """Though the runs before it could be made."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/planted-elalora-r4-s1").write_text("")
    assert "cannot write in runs/planted-elalora-r4-s1" in refusal("--seeds", 0, 1)


def test_a_loss_that_is_no_number_ends_the_run(small_planted, monkeypatch, tmp_path):
    """The step is named, and the checkpoint of the last whole epoch stays."""
    problem, config, recipe = small_planted()
    losses, loss = iter(range(99)), problem.loss
    problem.loss = lambda *batch: loss(*batch) * (float("nan") if next(losses) == 13 else 1)
    with pytest.raises(ValueError, match="loss nan at step 14: try float32 or another seed"):
        reproduce.train(problem, config, recipe, None, tmp_path / "checkpoint.pt")
    assert len(torch.load(tmp_path / "checkpoint.pt")["log"]["history"]) == 1


# ---- The loop ----
def test_a_step_of_training_is_algorithm_1s(tiny, monkeypatch):
    """Weights, averages and adjustments are those of the plain loop that the README shows."""
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)  # Adam would blow up roundings
    ends = []
    for plain in (False, True):
        problem, training = prepared("elalora", tiny)
        allocator, generator = training.allocator, torch.Generator().manual_seed(2)
        for w in allocator.factors.values():  # in the middle of training: nothing is 0
            w.data.copy_(torch.randn(w.shape, generator=generator))
        torch.manual_seed(1)
        problem.model.train()
        adjusted = []
        for batch in problem.batches(1)[:12]:
            if plain:
                loss = problem.model(**batch).loss + 0.1 * orthogonality_penalty(problem.model)
                loss.backward()
                nn.utils.clip_grad_norm_(problem.model.parameters(), 1.0)
                training.optimizer.step()
                training.scheduler.step()
                adjusted.append(allocator.step())
                training.optimizer.zero_grad()
            else:
                adjusted.append(reproduce.train_step(problem, batch, training)[1])
        assert any(adjusted)
        ends.append((adapter_state_dict(problem.model), allocator.state_dict()))
        ends[-1] += (list(filter(None, adjusted)),)
    assert ends[0][2] == ends[1][2]
    torch.testing.assert_close(ends[0][:2], ends[1][:2], rtol=1e-4, atol=1e-6)


def test_the_recipe_reaches_the_allocator(small_planted):
    """The schedule of ranks and what scores them; b = 0 for svd, which moves none."""
    settings = dict(b=5, k=2, shape="linear", beta1=0.5, beta2=0.6)
    for method, b in (("elalora", 5), ("svd", 0)):
        problem, config, recipe = small_planted(method, **settings)
        allocator = reproduce.prepare(problem, replace(config, seed=7), recipe).allocator
        assert allocator.schedule == RankSchedule(40, 6, 12, 2, b, "linear")
        assert (allocator.k, allocator.beta1, allocator.beta2) == (2, 0.5, 0.6)
        assert allocator.generator.initial_seed() == 7


@pytest.mark.parametrize("name", CHOICES["lr_scheduler"])
def test_the_learning_rate_rises_for_a_tenth_and_then_does_as_named(name, small_planted):
    """After that it falls to 0, in a line or a half cosine, or it stays."""
    problem, config, recipe = small_planted(lr_scheduler=name)
    training, rates = reproduce.prepare(problem, config, recipe), []
    for _ in range(40):
        rates.append(training.scheduler.get_last_lr()[0] / recipe.learning_rate)
        training.optimizer.step()
        training.scheduler.step()
    progress = np.arange(36) / 36
    falls = dict(linear=1 - progress, cosine=(1 + np.cos(np.pi * progress)) / 2)
    expected = [*np.arange(4) / 4, *falls.get(name, np.ones(36))]
    np.testing.assert_allclose(rates, expected, atol=1e-12)


@pytest.mark.parametrize("method", ["elalora", "adalora"])
def test_lambda_rate_multiplies_the_rate_of_singular_values_alone(method, small_planted):
    """Adam's first step is one learning rate long: lambda_rate of them for singular values."""
    problem, config, recipe = small_planted(method, lambda_rate=7.0)
    training = reproduce.prepare(problem, config, recipe)
    weights = trained(problem.model)
    singular = {name for name in weights if name.endswith((".Lambda", ".lora_E.default"))}
    assert len(singular) == 12
    before = {name: nn.init.ones_(w).detach().clone() for name, w in weights.items()}
    for group in training.optimizer.param_groups:
        group["lr"] = group["initial_lr"]  # else 0 at the start of the warm-up
    reproduce.train_step(problem, next(iter(problem.batches(1))), training)
    for name, w in weights.items():
        change = (w - before[name]).abs().max().item()
        assert change == pytest.approx((7 if name in singular else 1) * 2e-2, rel=1e-3)


def test_final_and_shuffled_train_at_the_ranks_that_elalora_found(
    small_planted, tmp_path, monkeypatch, refusal
):
    """From the start to the end, at the same scaling; of an ElaLoRA run that differs in nothing
    but the method."""
    reproduce.main(["--method", "shuffled", "final", "elalora"])
    ranks, scalings = {}, set()
    for method in ("elalora", "final", "shuffled"):
        folder = Path(f"runs/planted-{method}-r4-s0")
        results = results_of(folder)
        assert bool(results["adjustments"]) == (method == "elalora")
        ranks[method] = results["ranks"]
        state = load_file(folder / "adapter.safetensors")
        scalings |= {value.item() for key, value in state.items() if key.endswith("scaling")}
    assert ranks["final"] == ranks["elalora"] != ranks["shuffled"]
    assert sorted(ranks["final"].values()) == sorted(ranks["shuffled"].values()) != [4] * 12
    assert scalings == {4.0}
    shutil.rmtree("runs/planted-final-r4-s0")
    message = "planted-elalora-r4-s0/results.json: it has epochs None, not 3"
    assert message in refusal("--method", "final", "--epochs", "3")


def test_a_file_of_ranks_takes_the_place_of_even_ones(small_planted, tmp_path, refusal):
    """A map, or the results of a run. What has no map, another mean, other matrices, or not the
    ranks that a finished run had, is refused."""
    reproduce.main([])
    (results,) = tmp_path.glob("runs/*/results.json")
    ranks = results_of(results.parent)["ranks"]
    Path("map.json").write_text(json.dumps(ranks))
    for file in ("map.json", str(results)):
        reproduce.main(["--method", "svd", "--ranks", file])
        found = results_of(tmp_path / f"runs/planted-svd-r4-{Path(file).stem}-s0")
        assert found["ranks"] == ranks and not found["adjustments"]
        assert {*ranks.values()} != {4}
    assert "--ranks is for --method svd alone" in refusal("--ranks", "map.json")
    for content, message in (
        ([1], "bad.json has no map"),
        (dict.fromkeys(ranks, 4.0), "bad.json has no map"),
        (ranks | {"x": 4}, "a rank map of others: ['x']"),
        (dict.fromkeys(ranks, 3), "has a mean of 3, --rank 4"),
    ):
        Path("bad.json").write_text(json.dumps(content))
        assert message in refusal("--method", "svd", "--ranks", "bad.json")
    Path("map.json").write_text(json.dumps(dict.fromkeys(ranks, 4)))
    assert "map.json had other ranks" in refusal("--method", "svd", "--ranks", "map.json")


# ---- Killed, interrupted, broken ----
@pytest.mark.parametrize("method", ["elalora", "svd", "lora", "adalora"])
def test_every_method_resumes_bit_for_bit(method, small_planted, tmp_path):
    """A run that was interrupted in its third and fourth epochs ends as one that was not."""
    whole = end_of(lambda: small_planted(method), tmp_path / "whole.pt")
    assert end_of(lambda: small_planted(method), tmp_path / "resumed.pt", (3, 4)) == whole


def test_an_evaluation_that_was_interrupted_is_made_again_without_training_again(
    small_planted, monkeypatch, tmp_path
):
    """After the last epoch too: its checkpoint is written before it is evaluated."""
    expected = reproduce.train(*small_planted(), None, tmp_path / "whole.pt")[1]["history"]
    problem, *rest = small_planted()
    evaluate = problem.evaluate

    def interrupted(last):
        if last:
            raise KeyboardInterrupt
        return evaluate(last)

    problem.evaluate = interrupted
    with pytest.raises(KeyboardInterrupt):
        reproduce.train(problem, *rest, None, tmp_path / "checkpoint.pt")
    steps, step = [], reproduce.train_step
    monkeypatch.setattr(reproduce, "train_step", lambda *a: steps.append(a) or step(*a))
    allocator, log = reproduce.train(*small_planted(), None, tmp_path / "checkpoint.pt")
    assert not steps and allocator.t == 40
    assert log["history"] == expected and all(epoch["metrics"] for epoch in expected)


@pytest.fixture
def short_rte(tiny, tmp_path, monkeypatch):
    """What runs 30 epochs of 3 steps, with dropout, in a fork, and returns its process id."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    rows = rte_rows(160)
    write_glue(tmp_path / "glue", rte=dict(train=rows, validation=rows[:20]))
    monkeypatch.setitem(glue.RECIPES, "rte", {4: Recipe(64, 5e-3, 30, 12, 20, 8, 3, 2)})
    monkeypatch.chdir(tmp_path)
    folders = ["--model", str(tiny / "deberta"), "--data-dir", str(tmp_path / "glue")]
    glue.load_examples("rte", folders[3], folders[1])  # forks share what is loaded
    glue.compute_metrics(["f1"], [1], [1])  # and imported

    def start(*more):
        """Its stderr goes to a file."""
        if pid := os.fork():
            return pid
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
            sys.stdout = sys.stderr = open("stderr", "w", buffering=1)
            tqdm.tqdm.set_lock(threading.RLock())  # forks share its lock, and may die holding it
            torch.set_num_threads(1)
            reproduce.main(["--task", "rte", *folders, *more])
            code = 0
        except SystemExit as exit:
            code = exit.code
        finally:
            os._exit(code)

    return start


def wait_for(path, since=0):
    """Until the file is there, written after that time in ns; returns when it was."""
    start = time.time()
    while not path.exists() or path.stat().st_mtime_ns <= since:
        assert time.time() < start + 120, Path("stderr").read_text()
        time.sleep(0.01)
    return path.stat().st_mtime_ns


def ended(pid):
    """A process's exit code; negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder):
    """All of a run's results but the times, and the bytes of its adapters."""
    results = results_of(folder)
    del results["seconds"]
    names = ("adapter.safetensors", "peft/adapter_model.safetensors", "peft/adapter_config.json")
    return results, [(folder / name).read_bytes() for name in names]


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(short_rte):
    """SIGKILL at random moments, then --resume: the same weights and metrics bit for bit."""
    started, pid = time.time(), short_rte("--output-dir", "whole")
    wait_for(Path("whole/rte-elalora-r4-s0/checkpoint.pt"))
    startup = time.time() - started
    assert ended(pid) == 0, Path("stderr").read_text()
    expected = outcome(Path("whole/rte-elalora-r4-s0"))
    epoch = results_of("whole/rte-elalora-r4-s0")["seconds"] / 30
    random = np.random.default_rng()
    folder, written, resumed = Path("killed/rte-elalora-r4-s0"), 0, set()
    for epochs in random.permutation([0, 0, 1, 1, 2, 2, 3]):  # some more are done, of the 30
        pid = short_rte("--output-dir", "killed", "--resume")
        for _ in range(epochs):
            written = wait_for(folder / "checkpoint.pt", written)
        time.sleep(random.uniform(0, epoch if epochs else startup))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        if (folder / "checkpoint.pt").exists():
            resumed.add(len(torch.load(folder / "checkpoint.pt")["log"]["history"]))
    assert len(resumed) >= 5
    assert ended(short_rte("--output-dir", "killed", "--resume")) == 0, Path("stderr").read_text()
    assert not (folder / "checkpoint.pt").exists()
    assert (got := outcome(folder)) == expected
    assert got[0]["adjustments"] and len(set(got[0]["ranks"].values())) > 1


def test_an_interrupted_run_says_so_in_one_line_and_goes_on(short_rte):
    """Ctrl-C exits with 130; the command alone is refused then, with --resume it goes on."""
    pid, folder = short_rte(), Path("runs/rte-elalora-r4-s0")
    wait_for(folder / "checkpoint.pt")
    os.kill(pid, signal.SIGINT)
    assert ended(pid) == 130
    last = Path("stderr").read_text().splitlines()[-1]
    assert last == "reproduce.py: interrupted; --resume goes on after the last whole epoch, if any"
    assert "Traceback" not in Path("stderr").read_text()
    before = len(torch.load(folder / "checkpoint.pt")["log"]["history"])
    assert ended(short_rte()) == 2
    assert "has an unfinished run: --resume goes on with it" in Path("stderr").read_text()
    assert ended(short_rte("--resume")) == 0
    history = results_of(folder)["history"]
    assert [part["epoch"] for part in history] == list(range(1, 31)) and before < 30


def saved(state):
    torch.save(state, file := io.BytesIO())
    return file.getvalue()


def with_unlike_ranks(state):
    trained = {name: w[:2] if w.ndim == 1 else w for name, w in state["trained"].items()}
    return saved(state | {"trained": trained})


BROKEN = {  # from a good checkpoint and its bytes: another's bytes, and why they are refused
    "cut": (lambda state, whole: whole[: len(whole) // 2], ""),
    "text": (lambda state, whole: b"weights", ""),
    "another file": (lambda state, whole: saved({"weights": torch.zeros(3)}), "KeyError: 'argu"),
    "another seed": (
        lambda state, whole: saved(state | {"arguments": state["arguments"] | {"seed": 7}}),
        "it has seed 7, not 0",
    ),
    "unlike ranks": (lambda state, whole: with_unlike_ranks(state), "size mismatch for"),
    "weights missing": (
        lambda state, whole: saved(state | {"trained": dict([*state["trained"].items()][1:])}),
        "missing or unknown: deberta",
    ),
}


@pytest.mark.parametrize("change, reason", BROKEN.values(), ids=BROKEN)
def test_a_checkpoint_that_is_not_this_runs_is_named_and_refused(
    change, reason, small_planted, monkeypatch, tmp_path, refusal
):
    """Cut, foreign or of other arguments: exit code 2, and the file stays as it is."""
    path = Path("runs/planted-elalora-r4-s0/checkpoint.pt")
    with monkeypatch.context() as context, pytest.raises(SystemExit) as exit:
        context.setattr(reproduce, "evaluate", lambda *_: signal.raise_signal(signal.SIGINT))
        reproduce.main([])
    assert exit.value.code == 130
    path.write_bytes(broken := change(torch.load(path), path.read_bytes()))
    last = refusal("--resume")
    start = f"reproduce.py: error: {path} is no checkpoint of this run, delete it to start again"
    assert last.startswith(start) and reason in last and path.read_bytes() == broken


# ---- Several processes ----
SHARED_PLANTED = """
import sys
from pathlib import Path

import torch
from torch import distributed

import elalora
import reproduce
from experiments import planted, problem as shared

def train(folder):
    torch.set_num_threads(1)
    planted.PLANTED = dict(list(planted.PLANTED.items())[:12])
    planted.STEPS_PER_EPOCH = 30
    recipe = shared.Recipe(32, 2e-2, 3, 30, 20, 5, 4, 1)
    config = shared.Config("planted", "elalora", 4, 3)
    torch.manual_seed(3)
    problem = planted.problem(config, recipe)
    _, log = reproduce.train(problem, config, recipe, None, Path(folder, "checkpoint.pt"))
    return problem.model, log

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    model, log = train(sys.argv[1])
    torch.save((elalora.adapter_state_dict(model), log), f"{sys.argv[1]}/{shared.PROCESS}.pt")
    if shared.PROCESS == 1:  # one bit
        weight = next(p for p in model.parameters() if p.requires_grad)
        weight.data.view(torch.int32)[0, 0] ^= 1
    shared.check_alike(model)
"""


def test_two_processes_train_the_model_that_one_trains(tmp_path, monkeypatch):
    """Both have the same bits, those of one process to 1e-4 before the first adjustment; a bit
    that differs is found."""
    script = tmp_path / "shared_planted.py"
    script.write_text(SHARED_PLANTED)
    result = torchrun(script, tmp_path, cwd=tmp_path)
    assert result.stderr.count("RuntimeError: the weights of the processes differ") == 2
    assert result.stderr.count(" 0/90 ") == 1  # one progress bar
    (zero, log), (one, _) = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    assert zero.keys() == one.keys() and all(torch.equal(zero[key], one[key]) for key in zero)
    assert log["adjustments"][0]["step"] == 35
    assert len({value.numel() for key, value in zero.items() if "Lambda" in key}) > 1
    monkeypatch.setattr(planted, "PLANTED", planted.PLANTED)  # what the script changes here
    monkeypatch.setattr(planted, "STEPS_PER_EPOCH", 30)
    alone = {"__name__": "alone"}
    exec(SHARED_PLANTED, alone)
    (tmp_path / "alone").mkdir()
    _, expected = alone["train"](tmp_path / "alone")
    first, other = expected["history"][0], log["history"][0]
    assert other["train_loss"] == pytest.approx(first["train_loss"], abs=1e-4)
    assert other["metrics"] == pytest.approx(first["metrics"], abs=1e-4)
    assert first["metrics"]["residual"] < 0.9


def test_torchrun_shares_the_examples_and_writes_once(tiny, tmp_path, refusal):
    """With dropout, by the command line: one report, one folder, and the metrics of all examples.
    A run of two processes is none of one."""
    arguments = [*arguments_of(tiny, "stsb"), "--epochs", "1", "--set", *SHORT]
    result = torchrun(ROOT / "reproduce.py", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("stsb, elalora, rank 4, seed 0: 13 steps") == 1
    (folder,) = tmp_path.glob("runs/stsb-*")
    results = results_of(folder)
    assert results["arguments"]["processes"] == 2 and results["adjustments"]
    assert results["command"] == " ".join(["python reproduce.py", *arguments])
    problem = tiny_problem(tiny, task="stsb")
    inject(problem.model, problem.targets, results["ranks"], modules_to_save=problem.heads)
    load_adapter_state_dict(problem.model, load_file(folder / "adapter.safetensors"))
    problem.model.to(DEVICE).eval()
    assert problem.evaluate(True) == pytest.approx(results["metrics"], abs=1e-3)
    assert "it has processes 2, not 1" in refusal(*arguments)


@pytest.mark.parametrize("task", ["planted", "mrpc"])
def test_batches_that_processes_cannot_share_are_refused(task, monkeypatch):
    """Shares of unlike size would weigh unlike: a ValueError before any work, for every task."""
    monkeypatch.setattr(shared, "PROCESSES", 3)
    with pytest.raises(ValueError, match="3 processes cannot share batches of"):
        reproduce.run_all(reproduce.parse_arguments(["--task", task]))
