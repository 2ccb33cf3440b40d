"""The laws of experiments/xsum.py: what is adapted, ROUGE, losses, and when it generates."""

import numpy as np
import pytest
import torch
import transformers

from experiments import xsum
from experiments.conftest import config_of, make_problem, write_parquet
from experiments.data import load_splits
from experiments.tables import recipe_of


def problem_of(world, **changes):
    config = config_of(world, "xsum", **changes)
    return make_problem(config, recipe_of(config))


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


def test_the_loss_is_the_mean_over_the_tokens_of_all_summaries(world, monkeypatch):
    """In training with chunks of unlike numbers of tokens, and on the validation split."""
    monkeypatch.setattr(xsum, "SUMMARY_TOKENS", 160)
    problem = problem_of(world)
    problem.model.eval().get_input_embeddings().weight.data.mul_(30)  # so that tokens differ
    folder, names = str(world / "xsum"), ("train", "validation")
    train, validation = load_splits(folder, xsum.HUB, None, [], names)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "bart")

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


def test_summaries_are_generated_only_after_the_last_epoch_with_8_beams(world):
    """In batches of 64 articles; with --holdout they are of the validation split."""
    for holdout, n in ((False, 7), (True, 9)):
        problem, calls = problem_of(world, holdout=holdout), []
        generate = problem.model.generate
        problem.model.generate = lambda **x: calls.append(x) or generate(**x)
        problem.model.eval()
        assert [*problem.evaluate(False)] == ["validation_loss"] and not calls
        assert [*problem.evaluate(True)] == [*xsum.ROUGE, "validation_loss"]
        (call,) = calls
        assert len(call["input_ids"]) == n and "labels" not in call
        assert (call["num_beams"], call["max_length"], xsum.DECODING_BATCH) == (8, 12, 64)


def test_texts_of_more_tokens_than_the_model_has_positions_are_cut(world, tmp_path, monkeypatch):
    """Articles and summaries, given and generated; also in the test split, which is read last."""
    monkeypatch.setattr(xsum, "SUMMARY_TOKENS", 300)
    for split in ("train", "validation", "test"):
        rows = [dict(document="the cat " * 400, summary="a cat " * 400)]
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", rows)
    problem = problem_of(world, data_dir=str(tmp_path))
    ((chunk,),) = problem.batches(1)
    assert chunk["input_ids"].shape == chunk["labels"].shape == (1, 256)
    assert problem.loss(problem.model, [chunk]).isfinite()
    assert [*problem.evaluate(True)] == [*xsum.ROUGE, "validation_loss"]


def test_the_floor_is_the_first_sentence(world):
    """ROUGE of what stands before the first line break of each test article."""
    problem = problem_of(world)
    (test,) = load_splits(str(world / "xsum"), xsum.HUB, None, [], ["test"])
    first = [document.splitlines()[0] for document in test["document"]]
    assert problem.floor == xsum.rouge(first, test["summary"])
