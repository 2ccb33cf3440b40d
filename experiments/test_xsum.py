"""The laws of experiments/xsum.py: ROUGE, losses, and when it generates."""

import numpy as np
import pytest
import torch
import transformers

from experiments import xsum
from experiments.conftest import config_of, make_problem
from experiments.data import load_splits
from experiments.tables import recipe_of


def problem_of(world, **changes):
    config = config_of(world, "xsum", **changes)
    return make_problem(config, recipe_of(config))


def load(world, *splits):
    return load_splits(str(world / "xsum"), xsum.HUB, None, [], splits)


def test_rouge_is_the_f_measure_of_shared_words_pairs_and_longest_subsequences():
    """Counted by hand: after stemming, ROUGE-1 and -2 match n-grams, ROUGE-L keeps the order."""
    found, reference = "cats ran under the red house", "the cat ran under a house"
    expected = dict(rouge1=5 / 6, rouge2=2 / 5, rougeL=4 / 6)  # of six words, five pairs each
    assert xsum.rouge([found], [reference]) == pytest.approx(expected)
    both = xsum.rouge([found, "x"], [reference, "y"])
    assert both == pytest.approx({name: value / 2 for name, value in expected.items()})


def test_the_loss_is_the_mean_over_the_tokens_of_all_summaries(world, monkeypatch):
    """In training with chunks of unlike numbers of tokens, and on the validation split."""
    monkeypatch.setattr(xsum, "SUMMARY_TOKENS", 160)
    problem = problem_of(world)
    problem.model.eval().get_input_embeddings().weight.data.mul_(30)  # so that tokens differ
    train, validation = load(world, "train", "validation")
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
    ids = [ids[ids != 0].tolist() for chunk in chunks for ids in chunk["input_ids"]]  # 0: padding
    rows = [row for row in train if tokenizer(row["document"])["input_ids"] in ids]
    assert len(rows) == 8
    found = problem.loss(problem.model, chunks).item(), problem.evaluate(False)["validation_loss"]
    for loss, split in zip(found, (rows, validation)):
        assert loss == pytest.approx(np.mean(sum(map(token_losses, split), [])), rel=1e-4)


@pytest.mark.parametrize("holdout, split, n", [(False, "test", 7), (True, "validation", 9)])
def test_summaries_are_generated_after_the_last_epoch_with_8_beams(holdout, split, n, world):
    """In batches of 64 articles; with --holdout they are of the validation split. The floor is what
    stands before the first line break of each article."""
    problem, calls = problem_of(world, holdout=holdout), []
    generate = problem.model.generate
    problem.model.generate = lambda **x: calls.append(x) or generate(**x)
    problem.model.eval()
    assert [*problem.evaluate(False)] == ["validation_loss"] and not calls
    assert [*problem.evaluate(True)] == [*xsum.ROUGE, "validation_loss"]
    (call,) = calls
    assert len(call["input_ids"]) == n and "labels" not in call
    assert (call["num_beams"], call["max_length"], xsum.DECODING_BATCH) == (8, 12, 64)
    (rows,) = load(world, split)
    first = [document.splitlines()[0] for document in rows["document"]]
    assert problem.floor == xsum.rouge(first, rows["summary"])
