"""What the tests of the experiments share: a tiny model and data, short runs, subprocesses."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HOME = tempfile.TemporaryDirectory()  # of the hub's libraries, which read this when imported
caches = {"HF_HOME": ".", "HF_HUB_CACHE": "hub", "HF_DATASETS_CACHE": "datasets"}
os.environ.update({name: str(Path(HOME.name, folder)) for name, folder in caches.items()})
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import datasets
import pytest
import torch
from hypothesis import settings

import reproduce
from experiments import benchmark, glue, planted
from experiments.problem import Config, Recipe, trained

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)
datasets.disable_progress_bars()
settings.register_profile("laws", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("laws")


def pytest_configure(config):
    warning = "ignore:`is_gradient_checkpointing` is deprecated"  # PEFT asks transformers for it
    config.addinivalue_line("filterwarnings", warning)


def array(tensor):
    return tensor.detach().cpu().double().numpy()


# ---- A tiny model and tiny data ----
TINY = dict(
    model_type="deberta-v2", hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, vocab_size=64, relative_attention=True, position_buckets=16,
    pos_att_type="p2c|c2p", norm_rel_ebd="layer_norm", share_att_key=True, type_vocab_size=0,
    position_biased_input=False,
)  # fmt: skip
ROWS, DEV_ROWS = 200, 40


def train_sentencepiece(text, prefix, **arguments):
    """Writes a SentencePiece model with DeBERTa's special tokens."""
    import sentencepiece

    names = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}
    for i, (name, piece) in enumerate(names.items()):
        arguments |= {f"{name}_id": i, f"{name}_piece": piece}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(prefix), minloglevel=2, **arguments
    )


def write_glue(root, **tasks):
    """A folder laid out like nyu-mll/glue on the hub: task -> split -> rows."""
    import pyarrow
    import pyarrow.parquet

    lines = ["---", "configs:"]
    for task, splits in tasks.items():
        (root / task).mkdir(parents=True)
        lines += [f"- config_name: {task}", "  data_files:"]
        for split, rows in splits.items():
            path = root / task / f"{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
            lines += [f"  - split: {split}", f"    path: {task}/{split}-*"]
    (root / "README.md").write_text("\n".join([*lines, "---", ""]))


def rte_rows(n):
    """Pairs of random sentences of unlike length; the label is 1 where the first has 'red'."""
    generator = torch.Generator().manual_seed(0)
    words = "the a cat dog sat ran on under mat house red blue".split()

    def sentence(least):
        length = least + int(torch.randint(4, (), generator=generator))
        return " ".join(words[i] for i in torch.randint(12, (length,), generator=generator))

    pairs = [(sentence(4), sentence(2)) for _ in range(n)]
    return [
        dict(sentence1=a, sentence2=b, label=int("red" in a), idx=i)
        for i, (a, b) in enumerate(pairs)
    ]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with deberta/, a model like microsoft/deberta-v3-base, and glue/, RTE and STS-B."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    root = tmp_path_factory.mktemp("tiny")
    model, rows = root / "deberta", rte_rows(ROWS)
    model.mkdir()
    (root / "text").write_text("\n".join(row["sentence1"] for row in rows))
    train_sentencepiece(root / "text", model / "spm", vocab_size=40, hard_vocab_limit=False)
    (model / "spm.vocab").unlink()
    (model / "config.json").write_text(json.dumps(TINY))
    (model / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    torch.manual_seed(0)
    net = DebertaV2ForSequenceClassification(DebertaV2Config(**{**TINY, "model_type": None}))
    encoder = {k: v.half() for k, v in net.state_dict().items() if k.startswith("deberta.")}
    torch.save(encoder, model / "pytorch_model.bin")
    scored = [dict(row, label=row["sentence1"].count("a") / 2) for row in rows]
    write_glue(
        root / "glue",
        rte=dict(train=rows, validation=rows[:DEV_ROWS]),
        stsb=dict(train=scored, validation=scored[:DEV_ROWS]),
    )
    return root


def arguments_of(tiny, task="rte"):
    """Of the command line, for a run on tiny data."""
    return ["--task", task, "--model", str(tiny / "deberta"), "--data-dir", str(tiny / "glue")]


def tiny_config(tiny, **arguments):
    arguments = dict(task="rte", method="elalora", rank=2, seed=0, dtype="float32") | arguments
    return Config(model=str(tiny / "deberta"), data_dir=str(tiny / "glue"), **arguments)


def tiny_problem(tiny, **arguments):
    config = tiny_config(tiny, **arguments)
    return glue.problem(config, glue.RECIPES[config.task][2])


# ---- Short runs ----
@pytest.fixture
def small_planted(monkeypatch):
    """Makes the planted problem two layers, and a run of it 4 epochs of 10 steps.

    Returns a function of a method and settings, which gives problem, configuration and recipe.
    """
    two_layers = {name: r for name, r in [*planted.PLANTED.items()][:12]}
    monkeypatch.setattr(planted, "PLANTED", two_layers)
    monkeypatch.setattr(planted, "STEPS_PER_EPOCH", 10)
    row = dict(epochs=4, warmup=6, stabilize=12, interval=2, b=3, k=1)
    monkeypatch.setitem(planted.RECIPES, "planted", {4: Recipe(32, 2e-2, **row)})

    def small(method="elalora", targets=("",), **settings):
        recipe = Recipe(32, 2e-2, **row | settings)
        config = Config("planted", method, rank=4, seed=0, targets=[*targets])
        torch.manual_seed(0)
        return planted.problem(config, recipe), config, recipe

    return small


def prepared(method, tiny, total=20, **settings):
    """A problem of random tokens and its training, of which the last two steps keep the ranks."""
    recipe = Recipe(8, 1e-2, 1, 2, 2, 4, 4, 1, **settings)
    config = tiny_config(tiny, method=method)
    torch.manual_seed(0)
    problem = benchmark.random_tokens(config, recipe)
    problem.steps_per_epoch = total
    return problem, reproduce.prepare(problem, config, recipe)


# ---- The command ----
def end_of(make, checkpoint, stops=()):
    """Weights, ranks and log of a run that is interrupted in the third step of some epochs, and
    each time made and trained again; make() gives (problem, config, recipe)."""

    def until(batches, last):
        for step, batch in enumerate(batches, 1):
            if step == last:
                raise KeyboardInterrupt
            yield batch

    for stop in stops:
        problem, config, recipe = make()
        batches = problem.batches
        problem.batches = lambda epoch: until(batches(epoch), 3 if epoch == stop else 0)  # noqa: B023
        with pytest.raises(KeyboardInterrupt):
            reproduce.train(problem, config, recipe, None, checkpoint)
        assert len(torch.load(checkpoint)["log"]["history"]) == stop - 1
    problem, config, recipe = make()
    allocator, log = reproduce.train(problem, config, recipe, None, checkpoint)
    del log["seconds"]
    weights = {name: w.tolist() for name, w in trained(problem.model).items()}
    return weights, allocator.ranks(), log


@pytest.fixture
def refusal(monkeypatch, tmp_path, capsys):
    """The last line that a command of bad arguments prints to stderr, where it wrote nothing."""
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments, main=reproduce.main):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit:
            main([*map(str, arguments)])
        assert exit.value.code == 2 and sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err.splitlines()[-1]

    return refuse


def python(*command, cwd):
    """A Python process of this project, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def torchrun(script, *arguments, cwd):
    """The script in two processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    return python(*launch, script, *arguments, cwd=cwd)
