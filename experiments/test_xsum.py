"""The laws of xsum.py, on articles and a model that are made here."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers

import elalora
import reproduce
from experiments import common, xsum
from experiments.common import matrices
from experiments.conftest import end_of
from experiments.problem import Config, recipe_of

PHASES = ["warmup=2", "stabilize=2", "interval=2", "batch_size=8"]
WORDS = "the a cat dog sat ran on under mat house red blue and then it was seen again".split()


def save_split(folder, split, n):
    random = np.random.default_rng(n)
    sentences = [
        [" ".join(random.choice(WORDS, random.integers(3, 12))) for _ in range(4)] for _ in range(n)
    ]
    columns = dict(
        document=["\n".join(rows[:3]) for rows in sentences],
        summary=[rows[0].replace("the", "a") + " " + rows[3] for rows in sentences],
        id=[str(i) for i in range(n)],
    )
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a BART and its tokenizer in bart/, and XSum as the hub has it in xsum/."""
    import tokenizers

    root = tmp_path_factory.mktemp("xsum")
    (root / "xsum/data").mkdir(parents=True)
    for split, n in (("train", 26), ("validation", 9), ("test", 7)):
        save_split(root / "xsum/data", split, n)
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator([" ".join(WORDS)] * 20, vocab_size=300, special_tokens=special)
    (root / "bart").mkdir()
    bpe.save_model(str(root / "bart"))
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=bpe.get_vocab_size(), d_model=16, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=32, max_position_embeddings=256, dropout=0.1,
    )  # fmt: skip
    transformers.BartForConditionalGeneration(config).save_pretrained(root / "bart")
    tokenizer = transformers.BartTokenizer.from_pretrained(root / "bart")
    tokenizer.save_pretrained(root / "bart")
    return root


@pytest.fixture
def given(original, tmp_path, monkeypatch):
    """Runs the test in an empty folder; generates at most 12 tokens, for speed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(xsum, "SUMMARY_TOKENS", 12)
    return original


def config_of(given, **changes):
    settings = dict(model=str(given / "bart"), data_dir=str(given / "xsum"), epochs=2, set=PHASES)
    settings |= changes
    return Config("xsum", settings.pop("method", "elalora"), 2, 0, **settings)


def problem_of(config):
    torch.manual_seed(0)
    return xsum.problem(config, recipe_of(xsum.RECIPES["xsum"], config))


@pytest.mark.parametrize("rank, size", [(2, 405_504), (6, 1_216_512)])
def test_adapters_have_the_sizes_of_table_3(rank, size):
    """All 96 matrices of BART-base, cross-attention's too: 0.41 M at rank 2, 1.22 M at rank 6."""
    base = transformers.BartConfig(
        encoder_layers=6, decoder_layers=6, d_model=768, encoder_ffn_dim=3072, decoder_ffn_dim=3072
    )
    with torch.device("meta"):
        model = transformers.BartForConditionalGeneration(base)
    elalora.inject(model, matrices(model, xsum.KINDS, Config("xsum", "elalora", rank, 0)), rank)
    sizes = {n: w.numel() for n, w in model.named_parameters() if w.requires_grad}
    singular_values = sum(n for name, n in sizes.items() if name.endswith(".Lambda"))
    assert singular_values == 96 * rank and sum(sizes.values()) - singular_values == size


def f_measure(matches, found, reference):
    return 2 * matches / (len(found) + len(reference)) if matches else 0


def test_rouge_is_the_f_measure_of_shared_words_pairs_and_longest_subsequences():
    """Counted by hand: after stemming, ROUGE-1 and -2 match n-grams, ROUGE-L keeps the order."""
    found, reference = "cats ran under the red house", "the cat ran under a house"
    words, pairs = (range(6), range(6)), (range(5), range(5))
    expected = dict(
        rouge1=f_measure(5, *words), rouge2=f_measure(2, *pairs), rougeL=f_measure(4, *words)
    )
    assert xsum.rouge([found], [reference]) == pytest.approx(expected)
    both = xsum.rouge([found, "x"], [reference, "y"])
    assert both == pytest.approx({name: value / 2 for name, value in expected.items()})


def test_the_loss_is_the_mean_over_the_tokens_of_all_summaries(given, monkeypatch):
    """In training with chunks of unlike numbers of tokens, and on the validation split."""
    monkeypatch.setattr(xsum, "SUMMARY_TOKENS", 160)
    problem = problem_of(config := config_of(given))
    problem.model.eval().get_input_embeddings().weight.data.mul_(30)  # so that tokens differ
    (train, validation, _) = common.load_splits(
        config.data_dir, xsum.HUB, None, [], ("train", "validation", "test")
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)

    def token_losses(row):
        article = tokenizer(row["document"], return_tensors="pt")
        labels = tokenizer(row["summary"])["input_ids"]
        start = [problem.model.config.decoder_start_token_id, *labels[:-1]]
        with torch.no_grad():
            logits = problem.model(**article, decoder_input_ids=torch.tensor([start])).logits[0]
        return (-logits.log_softmax(dim=-1)[range(len(labels)), labels]).tolist()

    chunks = next(iter(problem.batches(1)))
    assert len(chunks) == 4 and len({chunk["labels"].shape[1] for chunk in chunks}) > 1
    ids = [ids[ids != 1].tolist() for chunk in chunks for ids in chunk["input_ids"]]
    rows = [row for row in train if tokenizer(row["document"])["input_ids"] in ids]
    assert len(rows) == 8
    expected = np.mean(sum(map(token_losses, rows), []))
    assert problem.loss(problem.model, chunks).item() == pytest.approx(expected, rel=1e-4)
    expected = np.mean(sum(map(token_losses, validation), []))
    assert problem.evaluate(False) == {"validation_loss": pytest.approx(expected, rel=1e-4)}


def test_summaries_are_generated_only_after_the_last_epoch_with_8_beams(given, monkeypatch):
    """In batches of 64 articles; with --holdout they are of the validation split."""
    for holdout, n in ((False, 7), (True, 9)):
        problem, calls = problem_of(config_of(given, holdout=holdout)), []
        generate = problem.model.generate
        problem.model.generate = lambda **x: calls.append(x) or generate(**x)
        problem.model.eval()
        assert [*problem.evaluate(False)] == ["validation_loss"] and not calls
        assert [*problem.evaluate(True)] == [*xsum.ROUGE, "validation_loss"]
        (call,) = calls
        assert len(call["input_ids"]) == n and "labels" not in call
        assert (call["num_beams"], call["max_length"], xsum.DECODING_BATCH) == (8, 12, 64)


def test_a_run_writes_maps_of_both_stacks_and_an_adapter_that_peft_generates_with(given):
    """ROUGE of PEFT's summaries is the run's; the floor is the first sentence's; all 32 matrices
    have a place of their own in the heatmap."""
    import peft

    from experiments.report import grid

    config = config_of(given)
    command = ["--task", "xsum", "--rank", "2", "--epochs", "2", "--model", config.model]
    reproduce.main([*command, "--data-dir", config.data_dir, "--set", *PHASES])
    (folder,) = Path("runs").glob("*-s0")
    results = json.loads((folder / "results.json").read_text())
    assert len(results["ranks"]) == 32 and sum(results["ranks"].values()) == 64
    assert results["adjustments"] and results["total_steps"] == 8
    cells = grid(results["ranks"])
    assert cells.loc["encoder.fc1", "1"] == results["ranks"]["model.encoder.layers.1.fc1"]
    assert cells.loc["decoder.fc1", "1"] == results["ranks"]["model.decoder.layers.1.fc1"]
    assert cells.shape == (6 + 10, 2) and (folder / "ranks.png").exists()
    problem = problem_of(config)
    peft.PeftModel.from_pretrained(problem.model, folder / "peft")
    problem.model.eval()
    assert problem.evaluate(True) == pytest.approx(results["metrics"], abs=1e-4)
    test = pyarrow.parquet.read_table(next((given / "xsum/data").glob("test*"))).to_pydict()
    first = [document.splitlines()[0] for document in test["document"]]
    assert results["floor"] == xsum.rouge(first, test["summary"])


@pytest.mark.parametrize("method", ["elalora", "lora", "adalora"])
def test_an_interrupted_run_ends_bit_for_bit_as_one_that_was_not(method, given):
    """Every method goes on from the checkpoint of its first epoch, with dropout."""
    recipe = recipe_of(xsum.RECIPES["xsum"], config := config_of(given, method=method))
    make = lambda: (problem_of(config), config, recipe)
    assert end_of(make, Path("resumed.pt"), (2,)) == end_of(make, Path("whole.pt"))


def test_a_repository_with_a_loading_script_is_read_from_its_parquet_branch(given, monkeypatch):
    """datasets runs no scripts: what it says of one leads to refs/convert/parquet."""
    import datasets

    load, asked = datasets.load_dataset, []

    def script(source, task, revision=None, cache_dir=None):
        asked.append((source, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found xsum.py")
        return load(str(given / "xsum"))

    monkeypatch.setattr(datasets, "load_dataset", script)
    (test,) = common.load_splits(None, xsum.HUB, None, ["summary"], ["test"])
    assert len(test) == 7 and asked == [(xsum.HUB, None), (xsum.HUB, "refs/convert/parquet")]


BAD = {
    "no column": (lambda: [save_split_as(split, dict(document=["a"], highlights=["b"]))
                           for split in ("train", "validation", "test")],
                  "the split 'train' has no column 'summary', only document, highlights"),
    "an empty split": (lambda: save_split_as("test", dict(document=[], summary=[])),
                       "--data-dir: xsum has no data set that can be read, ArrowInvalid"),
    "no data": (lambda: [path.unlink() for path in Path("xsum/data").iterdir()],
                "--data-dir: xsum has no data set that can be read"),
    "a broken file": (lambda: next(Path("xsum/data").glob("train*")).write_bytes(b"PAR1"),
                      "--data-dir: xsum has no data set that can be read"),
}  # fmt: skip


def save_split_as(split, columns):
    types = {name: pyarrow.array(values, pyarrow.string()) for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table(types), next(Path("xsum/data").glob(f"{split}*")))


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_data_ends_in_one_line_and_exit_code_2(change, message, given, capsys):
    """What is wrong is named before training, and nothing is written."""
    shutil.copytree(given / "xsum", "xsum")
    change()
    with pytest.raises(SystemExit) as exit:
        reproduce.main(["--task", "xsum", "--model", str(given / "bart"), "--data-dir", "xsum"])
    assert exit.value.code == 2 and not Path("runs").exists()
    *_, last = capsys.readouterr().err.splitlines()
    assert re.match(f"reproduce.py: error: .*{message}", last), last
