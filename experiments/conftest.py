"""What the tests of the experiments share: a tiny world for every family, short runs, processes."""

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
import numpy as np
import pandas
import pytest
import sentencepiece
import tokenizers
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
TINY = {  # as any model names its sizes
    **dict.fromkeys(("hidden_size", "d_model"), 16),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers"), 2),
    **{f"{of}_attention_heads": 2 for of in ("num", "encoder", "decoder")}}
DEBERTA = dict(
    **TINY, vocab_size=64, relative_attention=True, position_buckets=16, type_vocab_size=0,
    pos_att_type="p2c|c2p", norm_rel_ebd="layer_norm", share_att_key=True,
    position_biased_input=False)
WORDS = "the a cat dog sat ran on under mat house red blue".split()
ROWS = 96


def train_sentencepiece(folder, lines, **arguments):
    """Makes a folder of a SentencePiece model with DeBERTa's special tokens."""
    folder.mkdir(exist_ok=True)
    (folder / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spm"), minloglevel=2, pad_id=0,
        bos_id=1, eos_id=2, unk_id=3, pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]",
        unk_piece="[UNK]", **arguments)
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')


def write_parquet(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def write_glue(root, **tasks):
    """A folder laid out like nyu-mll/glue on the hub: task -> split -> rows."""
    configs = []
    for task, splits in tasks.items():
        for split, rows in splits.items():
            write_parquet(root / task, split, rows)
        files = [dict(split=split, path=f"{task}/{split}-*") for split in splits]
        configs.append(dict(config_name=task, data_files=files))
    (root / "README.md").write_text(f"---\n{json.dumps(dict(configs=configs))}\n---\n")


def sentences(n, least, most, seed=0):
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(least, most))) for _ in range(n)]


def make_deberta(folder):
    """Stored as microsoft/deberta-v3-base is: float16, no head, no tokenizer.json."""
    train_sentencepiece(folder, sentences(200, 4, 8), vocab_size=40, hard_vocab_limit=False)
    config = transformers.DebertaV2Config(**DEBERTA)
    config.save_pretrained(folder)
    state = transformers.DebertaV2ForSequenceClassification(config).state_dict()
    encoder = {key: w.half() for key, w in state.items() if key.startswith("deberta.")}
    torch.save(encoder, folder / "pytorch_model.bin")


def make_bart(folder):
    folder.mkdir()
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator([" ".join(WORDS)] * 20, vocab_size=300, special_tokens=special)
    bpe.save_model(str(folder))
    size = bpe.get_vocab_size()
    config = transformers.BartConfig(**TINY, vocab_size=size, max_position_embeddings=256)
    transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    transformers.BartTokenizer.from_pretrained(folder).save_pretrained(folder)


def make_images(folder, split, n):
    """Pictures of three classes, by the part that is bright, and their list."""
    random, lines = np.random.default_rng(n), []
    (folder / "images" / split).mkdir(parents=True)
    for i in range(n):
        pixels = random.integers(0, 99, (20, 20, 3)).astype(np.uint8)
        (pixels[:10], pixels[10:], pixels[:, :10])[i % 3][:] += 150
        name = f"images/{split}/{i:03}.{('png', 'jpg')[i % 2]}"
        Image.fromarray(pixels).save(folder / name)
        lines.append(f"{name} {i % 3}\n")
    (folder / f"{split}.txt").write_text("".join(lines))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with the models deberta/, bart/, vit/ and the data glue/, xsum/, vtab/.

    GLUE's are pairs of random sentences; the label is 1 where the first has 'red', and for STS-B
    it counts the letter a.
    """
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    make_deberta(root / "deberta")
    pairs = [*zip(sentences(ROWS, 4, 8), sentences(ROWS, 2, 6, seed=1))]
    rte = [dict(sentence1=a, sentence2=b, label=int("red" in a)) for a, b in pairs]
    stsb = [row | dict(label=row["sentence1"].count("a") / 2) for row in rte]
    write_glue(root / "glue", rte=dict(train=rte, validation=rte[:40]),
               stsb=dict(train=stsb, validation=stsb[:40]))
    make_bart(root / "bart")
    for split, n in (("train", 26), ("validation", 9), ("test", 7)):
        articles = zip(*(sentences(n, 3, 12, seed) for seed in range(3)))
        rows = [dict(document="\n".join(a), summary=a[0].replace("the", "a")) for a in articles]
        write_parquet(root / "xsum/data", split, rows)
    vit = transformers.ViTConfig(**TINY, image_size=16, patch_size=8)
    transformers.ViTModel(vit).save_pretrained(root / "vit")
    transformers.ViTImageProcessorPil(size=dict(height=16, width=16)).save_pretrained(root / "vit")
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
PLACES = {"planted": (), **dict.fromkeys(("rte", "stsb", "sst2_heldout"), ("deberta", "glue")),
          "xsum": ("bart", "xsum"), "cifar": ("vit", "vtab")}
BATCH = {"planted": 32, "xsum": 8, "cifar": 8}  # of others 16
RATE = {"xsum": 0.05, "cifar": 0.01}  # of others 0.02
FAMILY_TASKS = ("planted", "rte", "xsum", "cifar")  # one task of each family
assert len(FAMILY_TASKS) == len(FAMILIES)


def config_of(world, task, method="elalora", settings=(), **changes):
    """A run of 4 epochs, in which ranks move often."""
    changes = dict(rank=3, seed=0, epochs=4) | changes
    words = [f"batch_size={BATCH.get(task, 16)}", f"learning_rate={RATE.get(task, 0.02)}"]
    words += ["b=4", "k=2", *settings]
    if PLACES[task]:
        model, data = (str(world / name) for name in PLACES[task])
        changes = dict(model=model, data_dir=data, dtype="float32") | changes
    return Config(task, method, set=sorted(words), **changes)


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
