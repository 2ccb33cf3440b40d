"""What the tests of the experiments share: a tiny world for every family, short runs, processes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HOME = tempfile.TemporaryDirectory()  # of the hub's libraries, which read this when imported
os.environ.update(HF_HOME=HOME.name, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import datasets
import numpy as np
import pandas
import pytest
import sentencepiece
import torch
import transformers
from hypothesis import settings
from PIL import Image

import reproduce
from experiments import planted, xsum
from experiments.methods import METHODS, NOISE
from experiments.problem import trained
from experiments.tables import FAMILIES, Config, fit_phases, recipe_of
from experiments.training import make_problem, train

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)
datasets.disable_progress_bars()
settings.register_profile("laws", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("laws")


def pytest_configure(config):
    for warning in NOISE:
        config.addinivalue_line("filterwarnings", f"ignore:{warning}")


def array(tensor):
    return tensor.detach().cpu().double().numpy()


# ---- A tiny world: for every family a model, and data laid out as on the hub ----
TINY = dict(  # as any model names its sizes
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, d_model=16,
    encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=150)
DEBERTA = dict(
    **TINY, relative_attention=True, position_buckets=16, type_vocab_size=0, share_att_key=True,
    pos_att_type="p2c|c2p", norm_rel_ebd="layer_norm", position_biased_input=False)
WORDS = "the a cat dog sat ran on under mat house red blue".split()
ROWS = 96


def sentences(n, least, most, seed=0):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(least, most))) for _ in range(n)]


def make_tokenizer(folder):
    """DeBERTa's, as on the hub: a SentencePiece model, of all ASCII, and no tokenizer.json."""
    folder.mkdir()
    ascii = [chr(i) for i in range(33, 127)]
    lines = [f"{a}{b} {b}{a} ... 1/2" for a in ascii for b in ascii] + sentences(999, 4, 8)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "spm"), minloglevel=2,
        vocab_size=TINY["vocab_size"], character_coverage=1.0, pad_id=0, bos_id=1, eos_id=2,
        unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]")
    settings = dict(tokenizer_class="DebertaV2Tokenizer", do_lower_case=False, vocab_type="spm",
                    model_input_names=["input_ids", "attention_mask"])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_data(root, **tasks):
    """A folder laid out like nyu-mll/glue on the hub: task -> split -> rows."""
    for task, splits in tasks.items():
        (root / task).mkdir(parents=True)
        for split, rows in splits.items():
            pandas.DataFrame(rows).to_parquet(root / task / f"{split}-00000-of-00001.parquet")
    configs = [f"- {{config_name: {task}, data_dir: {task}}}\n" for task in tasks]
    (root / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")


def make_images(folder, split, n):
    """Pictures of three classes, by their colour, and their list."""
    random, lines = np.random.default_rng(n), []
    (folder / "images" / split).mkdir(parents=True)
    for i in range(n):
        pixels = random.integers(0, 99, (20, 20, 3), dtype=np.uint8)
        pixels[..., i % 3] += 150
        name = f"images/{split}/{i:03}.{('png', 'jpg')[i % 2]}"
        Image.fromarray(pixels).save(folder / name)
        lines.append(f"{name} {i % 3}\n")
    (folder / f"{split}.txt").write_text("".join(lines))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with the models deberta/, bart/, vit/ and the data glue/, xsum/, vtab/.

    GLUE's are pairs of random sentences; the label is 1 where the first has 'red', and for STS-B
    it counts the letter a. The DeBERTa is as on the hub: in float16, without a head.
    """
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    make_tokenizer(root / "deberta")
    deberta = transformers.DebertaV2Config(**DEBERTA)
    deberta.save_pretrained(root / "deberta")
    weights = transformers.DebertaV2Model(deberta).half().state_dict()
    torch.save(weights, root / "deberta/pytorch_model.bin")
    make_tokenizer(root / "bart")
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    bart = transformers.BartConfig(**TINY, **special, max_position_embeddings=256)
    transformers.BartForConditionalGeneration(bart).save_pretrained(root / "bart")
    vit = transformers.ViTConfig(**TINY, image_size=16, patch_size=8)
    transformers.ViTModel(vit).save_pretrained(root / "vit")
    transformers.ViTImageProcessorPil(size=dict(height=16, width=16)).save_pretrained(root / "vit")
    pairs = [*zip(sentences(ROWS, 4, 8), sentences(ROWS, 2, 6, seed=1))]
    rte = [dict(sentence1=a, sentence2=b, label=int("red" in a)) for a, b in pairs]
    stsb = [row | dict(label=row["sentence1"].count("a") / 2) for row in rte]
    write_data(root / "glue", rte=dict(train=rte, validation=rte[:40]),
               stsb=dict(train=stsb, validation=stsb[:40]))
    articles = [*zip(*(sentences(42, 3, 12, seed) for seed in range(3)))]
    xsum = [dict(document="\n".join(a), summary=a[0].replace("the", "a")) for a in articles]
    write_data(root / "xsum", data=dict(train=xsum[:26], validation=xsum[26:35], test=xsum[35:]))
    for split, n in (("train800", 24), ("val200", 6), ("test", 9)):
        make_images(root / "vtab/vtab-1k/cifar", split, n)
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two layers of planted matrices, 10 steps an epoch; summaries of at most 12 tokens."""
    monkeypatch.setattr(planted, "PLANTED", dict([*planted.PLANTED.items()][:12]))
    monkeypatch.setattr(planted, "STEPS_PER_EPOCH", 10)
    monkeypatch.setattr(xsum, "SUMMARY_TOKENS", 12)


# ---- Short runs ----
RUNS = {  # where its model and its data are, batch size, learning rate
    "planted": (None, None, 32, 0.02), "rte": ("deberta", "glue", 16, 0.02),
    "stsb": ("deberta", "glue", 16, 0.02), "sst2_heldout": ("deberta", "glue", 16, 0.02),
    "xsum": ("bart", "xsum", 8, 0.05), "cifar": ("vit", "vtab", 8, 0.01)}
FAMILY_TASKS = ("planted", "rte", "xsum", "cifar")  # one task of each family
assert len(FAMILY_TASKS) == len(FAMILIES)


def config_of(world, task, method="elalora", settings=(), **changes):
    """A run of 4 epochs, in which ranks move often."""
    model, data, batch_size, rate = RUNS[task]
    words = [f"batch_size={batch_size}", f"learning_rate={rate}", "b=4", "k=2", *settings]
    asked = dict(rank=3, seed=0, epochs=4)
    if model:
        asked |= dict(model=str(world / model), data_dir=str(world / data), dtype="float32")
    return Config(task, method, set=sorted(words), **asked | changes)


def arguments_of(config):
    """The command line of such a run."""
    words = ["--task", config.task, "--method", config.method, "--rank", str(config.rank),
             "--seeds", str(config.seed), "--epochs", str(config.epochs)]
    if config.model:
        words += ["--model", config.model, "--data-dir", config.data_dir]
    return [*words, "--set", *config.set]


def make(config, ranks=None):
    """A problem and a method, as reproduce.run() makes them."""
    transformers.set_seed(config.seed)
    recipe = recipe_of(config)
    problem = make_problem(config, recipe)
    recipe = fit_phases(recipe, config, recipe.epochs * problem.steps_per_epoch)
    return problem, METHODS[config.method](problem, config, recipe, ranks)


def weights_of(problem):
    return {name: w.detach().clone() for name, w in trained(problem.model).items()}


def end_of(config, checkpoint, stop=None, report_to=None):
    """Problem, method and log of a run that was interrupted in the second step of an epoch, and
    then made and trained again."""
    problem, method = make(config)
    batches = problem.batches

    def interrupted(epoch):
        for step, batch in enumerate(batches(epoch), 1):
            if (epoch, step) == (stop, 2):
                raise KeyboardInterrupt
            yield batch

    if stop:
        problem.batches = interrupted
        with pytest.raises(KeyboardInterrupt):
            train(problem, method, config, checkpoint, report_to)
        assert len(torch.load(checkpoint)["log"]["history"]) == stop - 1
        problem, method = make(config)
    return problem, method, train(problem, method, config, checkpoint, report_to)


# ---- The command ----
@pytest.fixture
def refusal(monkeypatch, tmp_path, capsys):
    """The last line that a command of bad arguments prints to stderr, where it wrote nothing."""
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments, main=reproduce.main):
        before = {*tmp_path.rglob("*")}
        with pytest.raises(SystemExit) as exit:
            main([*map(str, arguments)])
        assert exit.value.code == 2 and {*tmp_path.rglob("*")} == before
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
