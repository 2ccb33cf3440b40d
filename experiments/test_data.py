"""The laws of experiments/data.py: data, batches, losses and predictions, by any processes."""

import contextlib
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import transformers
from torch import distributed, nn
from transformers import BatchEncoding

from experiments import data, glue, vtab, xsum
from experiments import problem as shared
from experiments.conftest import config_of, make_problem, write_glue
from experiments.problem import chosen
from experiments.tables import Config, recipe_of


@pytest.fixture
def processes(monkeypatch):
    """Makes this process the one of that number, of so many."""

    def become(process, processes):
        monkeypatch.setattr(shared, "PROCESS", process)
        monkeypatch.setattr(shared, "PROCESSES", processes)

    return become


def epoch(size, number=1, seed=0):
    config = Config("rte", "elalora", 4, seed)
    return [*data.epoch_batches(range(size), 6, config, number, lambda rows: rows)]


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone():
    """Whatever was drawn before, an epoch's batches are the same; other epochs and seeds differ."""
    torch.manual_seed(0)
    first = epoch(20)
    torch.manual_seed(1)
    assert epoch(20) == first and sorted(sum(first, [])) == [*range(20)]
    assert epoch(20, number=2) != first and epoch(20, seed=1) != first


def test_the_held_out_tenth_is_the_same_for_every_seed():
    """It and the rest are all rows, each once."""
    torch.manual_seed(0)
    rest, tenth = data.hold_out(range(57))
    torch.manual_seed(1)
    assert [*data.hold_out(range(57))[1]] == [*tenth] != [*range(5)]
    assert len(tenth) == 5 and sorted([*rest, *tenth]) == [*range(57)]


def test_some_examples_are_the_same_for_every_seed():
    """As many as asked for, no two the same; 0 is all; more than there are is a ValueError."""
    recipe = recipe_of(Config("rte", "elalora", 4, 0))
    some = lambda n: [*data.some(range(57), replace(recipe, examples=n))]
    torch.manual_seed(0)
    found = some(9)
    torch.manual_seed(1)
    assert some(9) == found != [*range(9)] and len({*found}) == 9 and some(0) == [*range(57)]
    with pytest.raises(ValueError, match="examples=58: there are 57"):
        some(58)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_guess_is_the_likeliest_class_or_the_number_with_its_loss(labels):
    """By NumPy: minus the logarithm of the label's probability, or the squared error."""
    logits, x = torch.randn(20, labels), np.random.default_rng(0)
    y = x.integers(labels, size=20) if labels > 1 else x.random(20)
    guesses, losses = zip(*data.guesses(logits, torch.tensor(y)))
    logits = logits.double().numpy()
    if labels == 1:
        np.testing.assert_allclose(guesses, logits[:, 0])
        np.testing.assert_allclose(losses, (logits[:, 0] - y) ** 2, rtol=1e-4)
    else:
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        assert [*guesses] == probabilities.argmax(axis=1).tolist()
        np.testing.assert_allclose(losses, -np.log(probabilities[range(20), y]), rtol=1e-4)


def test_a_batch_is_split_into_chunks_of_like_length():
    """On a CPU into four, the shortest rows first; on a GPU it stays one."""
    rows = [dict(input_ids=[0] * n) for n in (5, 1, 12, 4, 2, 8, 11, 7, 3, 6, 10, 9)]
    chunks = data.by_length(rows, lambda rows: [len(row["input_ids"]) for row in rows])
    n = 3 if shared.DEVICE == "cpu" else 12
    assert chunks == [[*range(i, i + n)] for i in range(1, 13, n)]


def test_the_loss_of_a_batch_in_chunks_is_the_mean_over_all_its_labels():
    """However rows with unlike numbers of labels are chunked; so is its gradient."""
    scores = nn.Linear(5, 7).to(shared.DEVICE)
    rows = [torch.randint(7, (n,)) for n in (1, 9, 2, 5, 3, 3)]

    def model(x, labels):
        loss = nn.functional.cross_entropy(scores(x).flatten(0, 1), labels.flatten())  # not of -100
        return SimpleNamespace(loss=loss)

    def chunk(rows):
        labels = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        x = torch.sin(labels[..., None] + torch.arange(5.0))
        return BatchEncoding(dict(x=x, labels=labels))

    config, ends = Config("rte", "elalora", 4, 0), []
    for chunks in ([rows], [rows[:1], rows[1:3], rows[3:]]):
        loss = data.mean_loss(model, [chunk(part) for part in chunks], config)
        ends.append((loss, *torch.autograd.grad(loss, scores.weight)))
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_predictions_are_in_the_order_of_the_rows(count, processes, monkeypatch):
    """One for each row in every process, by however many processes they were made, though texts
    of like length are padded together."""
    made = []

    def record(shares, own):
        made.append(own)
        raise EOFError

    def exchange(shares, own):
        shares[:] = made

    config, found = Config("rte", "elalora", 4, 0), []
    squares = lambda batch: [row["i"] ** 2 for row in batch]
    texts = [dict(i=i, input_ids=[0] * (7 * i % 11)) for i in range(11)]
    for gather in (record, exchange):
        monkeypatch.setattr(distributed, "all_gather_object", gather)
        for process in range(count):
            processes(process, count)
            with contextlib.suppress(EOFError):
                found.append(data.predictions(texts, 3, squares, lambda rows: rows, config))
    assert found[-count:] == [[i * i for i in range(11)]] * count


def test_data_that_changed_are_read_anew(tmp_path):
    """In the same folder, and in another one of the same name and README."""
    for number, folder in ((1, "a"), (2, "a"), (3, "b")):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
        write_glue(root := tmp_path / folder / "glue", rte=dict(train=[dict(label=number)]))
        (rows,) = data.load_splits(str(root), glue.HUB, "rte", ["label"], ["train"])
        assert list(rows["label"]) == [number]


def test_a_hub_data_set_with_a_loading_script_is_read_from_its_conversion(monkeypatch):
    """Such scripts are not run any more; the hub keeps a copy without one."""
    rows, asked = {"train": datasets.Dataset.from_dict({"a": ["x"]})}, []

    def load_dataset(source, task, revision=None, **options):
        asked.append((source, task, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported")
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert data.load_splits(None, "hub/name", None, ["a"], ["train"]) == [rows["train"]]
    assert asked == [("hub/name", None, None), ("hub/name", None, "refs/convert/parquet")]


FILES = {  # a file, and its texts or what the error says
    "words in a CSV": ("train.csv", 'text\nNA\nnull\nNone\n"a, ""b"""',
                       ["NA", "null", "None", 'a, "b"']),
    "quotes in a TSV": ("train.tsv", 'text\tlabel\n"a\t0\nb\t1\n"c"d\t0', ['"a', "b", '"c"d']),
    "words in JSON": ("train.jsonl", '{"text": "NA"}\n{"text": ""}', ["NA", ""]),
    "empty field of a CSV": ("train.csv", "text,label\na,0\n,1", "text is missing (row 2 of 2)"),
    "empty field of a TSV": ("train.tsv", "text\tlabel\n\t1", "text is missing (row 1 of 1)"),
    "null in JSON": ("train.jsonl", '{"text": "a"}\n{"text": null}', "is missing (row 2 of 2)"),
    "numbers": ("train.csv", "text,label\n1,0\n2,0", "the text is of type int64, not a text"),
    "lists": ("train.jsonl", '{"text": ["a"]}', "not a text"),
}  # fmt: skip


@pytest.mark.parametrize("name, content, expected", FILES.values(), ids=FILES)
def test_every_text_is_read_as_it_stands_and_a_missing_one_is_refused(
    name, content, expected, tmp_path
):
    """NA, null and None are words, an empty string is a text, an empty field is none."""
    (tmp_path / name).write_text(content + "\n")
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"{tmp_path}, data, train: .*{re.escape(expected)}"):
            data.load_splits(str(tmp_path), glue.HUB, None, ["text"], ["train"])
    else:
        (rows,) = data.load_splits(str(tmp_path), glue.HUB, None, ["text"], ["train"])
        assert list(rows["text"]) == expected


@pytest.mark.parametrize("count, right, wrong", [
    (2, [1, 1.0, True, "1", "1.0"], [-1, 2, 0.5, math.nan, None, "yes", [1]]),
    (1, [1, 1.0, True, "1", "1.0"], [math.inf, math.nan, None, "yes", ""])])  # fmt: skip
def test_labels_are_cast_to_what_the_loss_needs(count, right, wrong):
    """Classes are integers, numbers floats; any other label is named with place and row."""
    found = data.cast_labels(right, count, "here")
    assert found == [1] * 5 and {*map(type, found)} == {float if count == 1 else int}
    for label in wrong:
        meant = "a number" if count == 1 else "one of 0 to 1"
        message = re.escape(f"here: the label is {label!r}, not {meant} (row 6)")
        with pytest.raises(ValueError, match=f"^{message}$"):
            data.cast_labels([*right, label], count, "here")


# ---- Pre-trained models ----
TINY = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, d_model=8,
            intermediate_size=8, max_position_embeddings=20, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, eos_token_id=2,
            position_biased_input=False)  # fmt: skip


@pytest.mark.parametrize("name, positions", [
    ("Bert", 20), ("Electra", 20), ("Roberta", 18), ("Camembert", 18), ("Bart", 20),
    ("MBart", 20), ("DebertaV2", 30)])  # fmt: skip
def test_texts_are_cut_where_a_model_fails(name, positions, capsys):
    """By its forward pass, which takes that many tokens and no more. A cut is printed."""
    config = getattr(transformers, f"{name}Config")(**TINY)
    model = getattr(transformers, f"{name}Model")(config)
    assert data.most_tokens(model, 30) == positions
    assert (f"cut at {positions} tokens" in capsys.readouterr().out) == (positions < 30)
    model(input_ids=torch.full((1, positions), 3))
    with pytest.raises((IndexError, RuntimeError)) if positions < 30 else contextlib.nullcontext():
        model(input_ids=torch.full((1, positions + 1), 3))


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("had, remembered", [
    (None, None), (None, "single_label_classification"), (None, "regression"), (1, "regression"),
    (2, "multi_label_classification"), (2, "single_label_classification"), (3, None)])  # fmt: skip
def test_a_base_keeps_nothing_of_the_task_it_was_trained_for(
    labels, had, remembered, tmp_path, capsys
):
    """Its head is new, which is said, and the loss is this task's; all other weights are kept."""
    auto = transformers.AutoModelForSequenceClassification
    config = transformers.BertConfig(**TINY, num_labels=had or 2, problem_type=remembered)
    base = transformers.BertForSequenceClassification(config)
    (base if had else base.bert).save_pretrained(tmp_path)
    model = data.with_new_head(auto, str(tmp_path), labels).eval()
    assert (f"{tmp_path} has a classifier of another task" in capsys.readouterr().out) == bool(had)
    assert not torch.equal(model.classifier.weight[0], base.classifier.weight[0])
    assert all(torch.equal(*pair) for pair in zip(model.bert.parameters(), base.bert.parameters()))
    ids, y = torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 1])
    found = model(input_ids=ids, labels=y if labels > 1 else y.float())
    expected = np.mean([loss for _, loss in data.guesses(found.logits, y)])
    assert found.loss.item() == pytest.approx(expected, rel=1e-5)


# ---- What is adapted ----
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
BART = dict(d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072,
            decoder_ffn_dim=3072)  # fmt: skip
TEXT, IMAGE = "ForSequenceClassification", "ForImageClassification"


@pytest.mark.parametrize("name, head, sizes, kinds, count, size", [
    ("DebertaV2", TEXT, BASE, glue.adapted_kinds, 72, 165_888),  # 0.33 M at rank 2
    ("Bert", TEXT, BASE, glue.adapted_kinds, 72, 165_888),
    ("Roberta", TEXT, BASE, glue.adapted_kinds, 72, 165_888),
    ("Bart", "ForConditionalGeneration", BART, lambda model: xsum.KINDS, 96, 202_752),  # 0.41 M
    ("ViT", IMAGE, BASE, lambda model: vtab.KINDS, 60, 147_456),  # 1.18 M at rank 8
    ("CLIP", IMAGE, {}, lambda model: vtab.KINDS, 60, 147_456),
    ("Dinov2", IMAGE, {}, lambda model: vtab.KINDS, 60, 147_456)])  # fmt: skip
def test_what_the_paper_adapts_is_found_by_its_names(name, head, sizes, kinds, count, size):
    """With as many weights at rank 1 as the parameters of Tables 2 to 4 say."""
    config = getattr(transformers, f"{name}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, name + head)(config)
    names = data.matrices(model, kinds(model), Config("rte", "elalora", 1, 0))
    shapes = [model.get_submodule(n).weight.shape for n in names]
    assert (len(names), sum(map(sum, shapes))) == (count, size)
    with pytest.raises(ValueError, match="--model: x has no matrices named c_attn; this task"):
        data.matrices(model, ["c_attn"], Config("rte", "elalora", 1, 0, model="x"))


@pytest.mark.parametrize("name, heads", [
    ("Bert", ["pooler", "classifier"]), ("Roberta", ["classifier"]),
    ("DebertaV2", ["pooler", "classifier"])])  # fmt: skip
def test_what_a_checkpoint_of_an_encoder_lacks_is_trained(name, heads):
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(num_hidden_layers=1)
        model = getattr(transformers, name + TEXT)(config)
    assert glue.find_heads(model) == heads


def test_targets_choose_matrices_by_the_ends_of_their_names():
    """In the order of the model; a target that fits nothing is named."""
    names = ["0.query", "0.dense", "1.query", "1.dense"]

    def choose(*targets):
        return chosen(names, Config("mrpc", "elalora", 4, 0, targets=[*targets]))

    assert choose("") == names and choose("dense") == names[1::2]
    assert choose("1.dense", "query") == ["0.query", "1.query", "1.dense"]
    with pytest.raises(ValueError, match="--targets bias: none of .*1.dense ends so"):
        choose("dense", "bias")


def test_weights_are_float32_and_bfloat16_is_of_autocast_alone(world):
    """Though the checkpoint has float16. The loss is nearly the same."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        config = config_of(world, "rte", dtype=dtype)
        problem = make_problem(config, recipe_of(config))
        assert {w.dtype for w in problem.model.parameters()} == {torch.float32}
        problem.model.eval()
        losses[dtype] = problem.loss(problem.model, next(iter(problem.batches(1)))).item()
        assert 0 <= problem.evaluate(True)["accuracy"] <= 1
    assert losses["float32"] != losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
