"""The laws of experiments/glue.py: texts and labels, metrics, what is held out."""

from types import SimpleNamespace

import pytest
import sentencepiece
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st

from experiments import glue
from experiments.conftest import ROWS, config_of, make_problem, write_data
from experiments.problem import DEVICE
from experiments.tables import Config, recipe_of


def examples_of(world):
    """What pads, and the splits of RTE."""
    return glue.load_examples("rte", str(world / "glue"), str(world / "deberta"))


# ---- Texts ----
@pytest.fixture(scope="session")
def deberta(world):
    """Its tokenizer, and SentencePiece's own."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(world / "deberta/spm.model"))
    return transformers.AutoTokenizer.from_pretrained(world / "deberta"), pieces


UNUSUAL = ["…", "½", "\u00a0", "ＦＵＬＬ", "％", "ﬁ", "™", "\u200b", "é", "e\u0301"]
ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=4)


@given(st.lists(st.sampled_from(UNUSUAL) | ASCII, max_size=8).map("".join))
@example("½ cup… of\u00a0tea, ＦＵＬＬ")
def test_deberta_texts_are_split_as_sentencepiece_splits_them(deberta, text):
    """With its character map restored, transformers' tokenizer gives SentencePiece's own pieces;
    a tokenizer of WordPiece needs none."""
    tokenizer, pieces = deberta
    mapped = glue.character_map(tokenizer)
    got = tokenizer(mapped(text), add_special_tokens=False)["input_ids"]
    assert got == pieces.encode(text)
    assert mapped(text) == text or not text.isascii()
    assert glue.character_map(SimpleNamespace(vocab_file="vocab.txt"))(text) == text  # no map


def test_examples_are_pairs_of_mapped_texts_of_256_tokens_at_most(deberta, tmp_path):
    """[CLS] first [SEP] second [SEP] in SentencePiece's own pieces; labels stay as they are."""
    tokenizer, pieces = deberta
    pairs = [("½ cup…", "a\u00a0b"), ("x", "½ " * 300)]
    rows = [dict(sentence1=a, sentence2=b, label=i) for i, (a, b) in enumerate(pairs)]
    write_data(tmp_path, rte=dict(train=rows, validation=rows[:1]))
    _, (train, dev) = glue.load_examples("rte", str(tmp_path), tokenizer.name_or_path)
    assert [row["labels"] for row in train] == [0, 1] and dev == train[:1]
    for row, (a, b) in zip(train, pairs):
        assert row["input_ids"] == [1, *pieces.encode(a), 2, *pieces.encode(b)][:255] + [2]


# ---- Training and evaluation ----
@pytest.mark.parametrize("task, holdout, evaluated", [
    ("rte", True, None), ("sst2_heldout", False, [2, 3, 4]), ("sst2_heldout", True, [0, 1])])
def test_what_is_held_out_is_evaluated_and_not_trained_on(
    task, holdout, evaluated, world, monkeypatch
):
    """A tenth of the training split in place of the dev split; of SST-2 one of two parts."""
    pad, (train, dev) = examples_of(world)
    rows = [dict(row, labels=i) for i, row in enumerate(train)]
    splits = [rows, dev] if task == "rte" else [rows[10:], rows[:2], rows[2:5]]
    monkeypatch.setattr(glue, "load_examples", lambda *_: (pad, splits))
    found = []
    monkeypatch.setattr(glue, "compute_metrics", lambda *a: found.append(a[2]) or {})
    config = config_of(world, task, holdout=holdout)
    problem = make_problem(config, recipe_of(config))
    used = [i for b in problem.batches(1) for chunk in b for i in chunk["labels"].tolist()]
    assert len(used) == ROWS - (9 if task == "rte" else 10) and not {*used} & {*found[-1]}
    assert found[-1] == evaluated or sorted(used + found[-1]) == [*range(ROWS)]


def test_metrics_are_what_they_are_defined_as():
    """Counted by hand; a correlation with a constant is 0."""
    found = glue.compute_metrics(["accuracy", "f1", "matthews"], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0])
    assert found == pytest.approx(dict(accuracy=3 / 5, f1=4 / 6, matthews=1 / 6))
    found = glue.compute_metrics(["pearson", "spearman"], [1.0, 2.0, 3.0], [0.0, 1.0, 8.0])
    assert found == pytest.approx(dict(pearson=8 / 76**0.5, spearman=1))
    constant = glue.compute_metrics(["pearson", "spearman", "matthews"], [1] * 4, [0, 1] * 2)
    assert constant == dict(pearson=0, spearman=0, matthews=0)


def test_mnli_is_evaluated_on_both_of_its_dev_splits(world, monkeypatch):
    """The mismatched one's accuracy ends in _mm; the floor is the training split's majority."""
    pad, (rows, _) = examples_of(world)
    splits = [[dict(row, labels=label) for row in rows[:12]] for label in (2, 0, 2)]
    monkeypatch.setattr(glue, "load_examples", lambda *_: (pad, splits))
    config = Config("mnli", "elalora", 2, 0, model=str(world / "deberta"))
    problem = glue.problem(config, recipe_of(config))
    assert problem.floor == dict(accuracy=0, accuracy_mm=1)
    with torch.no_grad():
        problem.model.classifier.bias += torch.tensor([99, 0, 0]).to(DEVICE)
    metrics = problem.evaluate(True)
    assert (metrics["accuracy"], metrics["accuracy_mm"]) == (1, 0)
    assert metrics["loss"] < 1e-9 and metrics["loss_mm"] == pytest.approx(99, abs=1)


def contains(words, part):
    return any(words[i : i + len(part)] == part for i in range(len(words) - len(part) + 1))


@given(st.lists(st.lists(st.sampled_from("abcde"), min_size=2, max_size=7), min_size=4), st.data())
def test_no_held_out_phrase_is_part_of_what_is_trained_on(sentences, data):
    """By brute force over all pairs of phrases; as many are held out as asked for, each once. What
    is trained on is part of a sentence that is trained on: its phrases go together."""
    phrases = [*sentences]
    for words in sentences:
        ends = st.tuples(*[st.integers(0, len(words))] * 2)
        phrases += [words[i:j] for i, j in data.draw(st.lists(ends, max_size=4)) if i < j]
    texts = [" ".join(phrase) + " " for phrase in phrases]
    with pytest.MonkeyPatch.context() as context:
        context.setattr(glue, "HELD_OUT", n := len(phrases) // 2)
        context.setattr(glue, "FOR_CHOOSING", 1)
        train, choosing, held = glue.hold_out_sentences([*range(len(phrases))], texts)
        with pytest.raises(ValueError, match=f"holds out {n} .* but there are {2 * n - 1}"):
            glue.hold_out_sentences(phrases, texts[: 2 * n - 1])
    out = choosing + held
    assert len(choosing) == 1 and len({*out}) == len(out) == n and {*out}.isdisjoint(train)
    trained = [phrases[i] for i in train]
    assert not any(contains(phrase, phrases[i]) for phrase in trained for i in out)
    longest = [p for p in trained if not any(contains(q, p) and p != q for q in phrases)]
    assert all(any(contains(sentence, phrase) for sentence in longest) for phrase in trained)
