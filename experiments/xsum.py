"""Section 4.3: an encoder-decoder, BART-base in the paper, on XSum (Table 3).

The paper names BART-large once; its parameter counts, in Table 3, are those of BART-base.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import transformers
from datasets import Dataset
from torch import nn

from experiments.data import (
    epoch_batches, load_splits, matrices, mean_loss, most_tokens, predictions, pretrained, some)
from experiments.problem import DEVICE, Problem
from experiments.tables import Config, Recipe

HUB = "EdinburghNLP/xsum"
ARTICLE_TOKENS, SUMMARY_TOKENS = 1024, 160  # the released script's; Table 8 has none
BEAMS, DECODING_BATCH = 8, 64
KINDS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # cross-attention's, too
ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(found: list[str], references: list[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, -2 and -L of summaries, with stemming."""
    from rouge_score.rouge_scorer import RougeScorer
    score = RougeScorer(ROUGE, use_stemmer=True).score
    scores = [score(reference, summary) for summary, reference in zip(found, references)]
    return {name: sum(s[name].fmeasure for s in scores) / len(scores) for name in ROUGE}


def tokens_of(rows: Dataset, tokenizer: Callable, article: int, summary: int) -> Dataset:
    """The tokens of texts, at most so many of an article and of a summary."""
    def tokenize(batch: dict) -> dict:
        articles = tokenizer(batch["document"], max_length=article, truncation=True)
        summaries = tokenizer(text_target=batch["summary"], max_length=summary, truncation=True)
        return {**articles, "labels": summaries["input_ids"]}

    return rows.map(tokenize, batched=True, remove_columns=rows.column_names)


def token_losses(model: nn.Module, batch: dict) -> list[tuple[float, int]]:
    """Of every summary: the sum over its tokens, and their number."""
    labels = batch.to(DEVICE)["labels"]
    logits = model(**batch).logits.float().transpose(1, 2)  # (n, vocabulary, tokens)
    sums = nn.functional.cross_entropy(logits, labels, reduction="none").sum(dim=1)
    return [*zip(sums.tolist(), (labels != -100).sum(dim=1).tolist())]


def problem(config: Config, recipe: Recipe) -> Problem:
    """Summaries of one sentence, from a model that has no new head.

    The loss on the validation split is computed after every epoch. After the last one, ROUGE of
    summaries that are generated for the test split, with --holdout for the validation split.
    """
    tokenizer = pretrained(transformers.AutoTokenizer, config.model)
    model = pretrained(transformers.AutoModelForSeq2SeqLM, config.model, dtype=torch.float32)
    targets = matrices(model, KINDS, config)
    article, summary = (most_tokens(model, n) for n in (ARTICLE_TOKENS, SUMMARY_TOKENS))
    train, validation, test = load_splits(
        config.data_dir, HUB, None, ("document", "summary"), ("train", "validation", "test"))
    texts = validation if config.holdout else test
    train, validation, reported = (
        tokens_of(rows, tokenizer, article, summary) for rows in (train, validation, texts))
    train = some(train, recipe)
    pad = transformers.DataCollatorForSeq2Seq(tokenizer)  # labels with -100
    outputs: dict[str, list] = {}
    model.to(DEVICE)

    def summarize(batch: dict) -> list[str]:
        del batch["labels"]
        found = model.generate(
            **batch.to(DEVICE), num_beams=BEAMS, do_sample=False, max_length=summary)
        return tokenizer.batch_decode(found, skip_special_tokens=True)

    def evaluate(last: bool) -> dict[str, float]:
        losses = partial(token_losses, model)
        sums, counts = zip(*predictions(validation, recipe.batch_size, losses, pad, config))
        metrics = dict(validation_loss=sum(sums) / sum(counts))
        if last:
            outputs["prediction"] = predictions(reported, DECODING_BATCH, summarize, pad, config)
            metrics = rouge(outputs["prediction"], texts["summary"]) | metrics
        return metrics

    lead = [document.partition("\n")[0] for document in texts["document"]]
    return Problem(
        model, targets, [], math.ceil(len(train) / recipe.batch_size),
        lambda epoch: epoch_batches(train, recipe.batch_size, config, epoch, pad),
        partial(mean_loss, config=config), evaluate, rouge(lead, texts["summary"]),
        "first sentence", outputs=outputs)
