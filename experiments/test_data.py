"""The laws of experiments/data.py: pre-trained models, data, batches, predictions."""

import math
import re
import shutil
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
import transformers

from experiments import data, glue, vtab, xsum
from experiments.conftest import TINY, array, config_of, make_problem, write_data
from experiments.problem import DEVICE
from experiments.tables import Config, recipe_of

CONFIG = Config("rte", "elalora", 4, 0)


def test_draws_depend_on_no_draw_before():
    """An epoch's batches depend on seed and epoch, the held-out tenth and a number of examples on
    nothing. No row is drawn twice."""
    def draw(epoch=1, seed=0):
        torch.seed()
        config, recipe = replace(CONFIG, seed=seed), replace(recipe_of(CONFIG), examples=9)
        batches = data.epoch_batches(range(57), 6, config, epoch)
        rest, tenth = data.hold_out(range(57))
        return torch.cat([*batches]).tolist(), [*rest], [*tenth], [*data.some(range(57), recipe)]

    first = batches, rest, tenth, some = draw()
    assert draw() == first and draw(seed=1)[1:] == first[1:]
    assert batches != draw(epoch=2)[0] != draw(seed=1)[0] != batches
    assert sorted(batches) == sorted(rest + tenth) == [*range(57)] and len(tenth) == 5
    assert tenth != [*range(5)] and some != [*range(9)] and len({*some}) == 9
    assert [*data.some(range(57), recipe_of(CONFIG))] == [*range(57)]


def test_a_batch_of_texts_is_split_into_chunks_of_like_length():
    """On a CPU into four, the shortest rows first; on a GPU it stays one."""
    rows = [dict(input_ids=[0] * n) for n in (5, 1, 12, 4, 2, 8, 11, 7, 3, 6, 10, 9)]
    lengths = lambda rows: [len(row["input_ids"]) for row in rows]
    (chunks,) = data.epoch_batches(rows, 12, CONFIG, 1, lengths)
    n = 3 if DEVICE == "cpu" else 12
    assert chunks == [[*range(i, i + n)] for i in range(1, 13, n)]


def test_predictions_are_in_the_order_of_the_rows():
    """One for each, though texts of like length are padded together."""
    texts = [dict(i=i, input_ids=[0] * (7 * i % 11)) for i in range(11)]
    squares = lambda batch: [row["i"] ** 2 for row in batch]
    found = data.predictions(texts, 3, squares, lambda rows: rows, CONFIG)
    assert found == [i * i for i in range(11)]


def load(folder, column, task=None):
    (rows,) = data.load_splits(str(folder), glue.HUB, task, [column], ["train"])
    return list(rows[column])


def test_data_that_changed_are_read_anew(tmp_path):
    """In the same folder, and in another one of the same name and README."""
    for number, folder in ((1, "a"), (2, "a"), (3, "b")):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
        write_data(tmp_path / folder / "glue", rte=dict(train=[dict(label=number)]))
        assert load(tmp_path / folder / "glue", "label", "rte") == [number]


def test_a_hub_data_set_with_a_loading_script_is_read_from_its_conversion(monkeypatch):
    """Such scripts are not run any more; the hub keeps a copy without one."""
    rows = {"train": datasets.Dataset.from_dict({"a": ["x"]})}

    def load_dataset(source, task, revision=None):
        if revision != "refs/convert/parquet":
            raise RuntimeError("Dataset scripts are no longer supported")
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert data.load_splits(None, "hub/name", None, ["a"], ["train"]) == [rows["train"]]


FILES = {  # a file, and its texts or what the error says
    "words in a CSV": ("a.csv", 'text\nNA\nnull\n"a, ""b"""', ["NA", "null", 'a, "b"']),
    "quotes in a TSV": ("a.tsv", 'text\tlabel\n"a\t0\nb\t1\n"c"d\t0', ['"a', "b", '"c"d']),
    "words in JSON": ("a.jsonl", '{"text": "NA"}\n{"text": ""}', ["NA", ""]),
    "empty field of a CSV": ("a.csv", "text,label\na,0\n,1", "text is missing (row 2 of 2)"),
    "empty field of a TSV": ("a.tsv", "text\tlabel\n\t1", "text is missing (row 1 of 1)"),
    "null in JSON": ("a.jsonl", '{"text": "a"}\n{"text": null}', "is missing (row 2 of 2)"),
    "numbers": ("a.csv", "text,label\n1,0\n2,0", "the text is of type int64, not a text"),
    "lists": ("a.jsonl", '{"text": ["a"]}', "not a text"),
    "another column": ("a.csv", "texts\na", "no column 'text', only texts"),
    "no rows": ("a.jsonl", "", "no data set that can be read"),
}


@pytest.mark.parametrize("name, content, expected", FILES.values(), ids=FILES)
def test_texts_are_read_as_they_stand_or_refused(name, content, expected, tmp_path):
    """NA, null and None are words, an empty string is a text, an empty field is none."""
    (tmp_path / name).write_text(content + "\n")
    if isinstance(expected, list):
        assert load(tmp_path, "text") == expected
    else:
        with pytest.raises(ValueError, match=f"{tmp_path}.*{re.escape(expected)}"):
            load(tmp_path, "text")


@pytest.mark.parametrize("count", [1, 2])
def test_labels_are_cast_to_what_the_loss_needs(count):
    """Classes are integers, numbers floats; any other label is named with place and row."""
    right = [1, 1.0, True, "1", "1.0"]
    found = data.cast_labels(right, count, "here")
    assert found == [1] * 5 and {*map(type, found)} == {float if count == 1 else int}
    meant = "a number" if count == 1 else "one of 0 to 1"
    for label in (math.nan, math.inf, None, "yes", "", [1], *[-1, 2, 0.5][: 3 * (count > 1)]):
        message = re.escape(f"here: the label is {label!r}, not {meant} (row 6)")
        with pytest.raises(ValueError, match=f"^{message}$"):
            data.cast_labels([*right, label], count, "here")


# ---- Pre-trained models ----
SHORT = TINY | dict(max_position_embeddings=20)


@pytest.mark.parametrize("task, name, most", [
    ("rte", "BertModel", 20), ("rte", "RobertaModel", 18),
    ("xsum", "BartForConditionalGeneration", 20)])
def test_longer_texts_are_cut_to_the_models_positions(
    task, name, most, world, tmp_path, monkeypatch, capsys
):
    """Which is printed. They are trained on and evaluated: articles and summaries, given and
    generated, too. So is a text without characters, which has special tokens alone."""
    monkeypatch.setattr(xsum, "SUMMARY_TOKENS", 300)
    model = shutil.copytree(world / "bart", tmp_path / "model")  # for its tokenizer
    kind = getattr(transformers, name)
    kind(kind.config_class(**SHORT)).save_pretrained(model)
    texts = ["", "red cat " * 9, *["red cat " * 400] * 6]
    names = ("sentence1", "sentence2", "document", "summary")
    rows = [dict.fromkeys(names, text) | dict(label=len(text) % 2) for text in texts]
    write_data(tmp_path / "data", rte=dict.fromkeys(("train", "validation", "test"), rows))
    config = config_of(world, task, model=str(model), data_dir=str(tmp_path / "data"))
    problem = make_problem(config, recipe_of(config))
    assert f"texts are cut at {most} tokens" in capsys.readouterr().out
    (batch,) = problem.batches(1)
    for key in ("input_ids", "input_ids" if task == "rte" else "labels"):
        assert max(chunk[key].shape[1] for chunk in batch) == most
    assert problem.loss(problem.model, batch).isfinite() and problem.evaluate(True)


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("had, remembered", [
    (0, "regression"), (1, "regression"), (2, "single_label_classification"), (3, None)])
def test_a_base_keeps_nothing_of_the_task_it_was_trained_for(
    labels, had, remembered, tmp_path, capsys
):
    """Its head is new, which is said, and the loss is this task's; all other weights are kept, in
    float32. A guess is the likeliest class or the number, with its loss."""
    config = transformers.BertConfig(**SHORT, num_labels=had or 2, problem_type=remembered)
    base = transformers.BertForSequenceClassification(config).half()
    (base if had else base.bert).save_pretrained(tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    model = data.with_new_head(auto, str(tmp_path), labels).eval().to(DEVICE)
    assert (f"{tmp_path} has a classifier of another task" in capsys.readouterr().out) == bool(had)
    assert not torch.equal(model.classifier.weight[0].half().cpu(), base.classifier.weight[0])
    assert all(torch.equal(w.cpu(), v.float())
               for w, v in zip(model.bert.parameters(), base.bert.parameters(), strict=True))
    ids, y = torch.tensor([[1, 2], [3, 4]], device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    found = model(input_ids=ids, labels=y if labels > 1 else y.float())
    guess, losses = zip(*data.guesses(model, dict(input_ids=ids, labels=y)))
    assert found.loss.item() == pytest.approx(np.mean(losses), rel=1e-5)
    logits = array(found.logits)
    assert guess == pytest.approx(logits.argmax(axis=1) if labels > 1 else logits[:, 0])


# ---- What is adapted ----
BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)
BART = dict(d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072,
            decoder_ffn_dim=3072)
HEADS = ["pooler", "classifier"]


@pytest.mark.parametrize("name, kind, sizes, count, size, heads", [
    ("DebertaV2", "ForSequenceClassification", BASE, 72, 165_888, HEADS),  # 0.33 M at rank 2
    ("Roberta", "ForSequenceClassification", BASE, 72, 165_888, HEADS[1:]),
    ("Bart", "ForConditionalGeneration", BART, 96, 202_752, None),  # 0.41 M at rank 2
    ("ViT", "ForImageClassification", BASE, 60, 147_456, None)])  # 1.18 M at rank 8
def test_what_the_paper_adapts_is_found_by_its_names(name, kind, sizes, count, size, heads):
    """With as many weights at rank 1 as the parameters of Tables 2 to 4 say. What a checkpoint of
    an encoder lacks is trained, too."""
    config = getattr(transformers, f"{name}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, name + kind)(config)
    other = vtab.KINDS if name == "ViT" else xsum.KINDS
    names = data.matrices(model, glue.adapted_kinds(model) if heads else other, CONFIG)
    shapes = [model.get_submodule(n).weight.shape for n in names]
    assert (len(names), sum(map(sum, shapes))) == (count, size)
    assert not heads or glue.find_heads(model) == heads


def test_bfloat16_is_of_autocast_alone(world):
    """Weights are float32, and the loss is nearly float32's."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        config = config_of(world, "rte", dtype=dtype)
        problem = make_problem(config, recipe_of(config))
        assert {w.dtype for w in problem.model.parameters()} == {torch.float32}
        problem.model.eval()
        losses[dtype] = problem.loss(problem.model, next(iter(problem.batches(1)))).item()
    assert losses["float32"] != losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
