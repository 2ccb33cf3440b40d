"""Section 4.3: an encoder-decoder, BART-base in the paper, on XSum (Table 3).

The paper names BART-large once; its parameter counts, in Table 3, are those of BART-base.
"""

import math

import torch
import transformers
from datasets import Dataset
from torch import nn

from experiments.data import (
    by_length, epoch_batches, load_splits, matrices, mean_loss, most_tokens, predictions,
    pretrained, some)
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


def load_tokens(config: Config, tokenizer: transformers.PreTrainedTokenizerBase, article: int,
                summary: int) -> tuple[list[Dataset], list[Dataset]]:
    """The training and validation splits, and the one that is reported on; then their tokens, at
    most so many."""
    train, validation, test = load_splits(
        config.data_dir, HUB, None, ("document", "summary"), ("train", "validation", "test"))
    splits = [train, validation, validation if config.holdout else test]

    def tokenize(rows: dict) -> dict:
        articles = tokenizer(rows["document"], max_length=article, truncation=True)
        summaries = tokenizer(text_target=rows["summary"], max_length=summary, truncation=True)
        return {**articles, "labels": summaries["input_ids"]}

    tokens = [split.map(tokenize, batched=True, remove_columns=split.column_names)
              for split in splits]
    return splits, tokens


def problem(config: Config, recipe: Recipe) -> Problem:
    """Summaries of one sentence, from a model that has no new head.

    The loss on the validation split is computed after every epoch. After the last one, ROUGE of
    summaries that are generated for the test split, with --holdout for the validation split.
    """
    tokenizer = pretrained(transformers.AutoTokenizer, config.model)
    model = pretrained(transformers.AutoModelForSeq2SeqLM, config.model, dtype=torch.float32)
    targets = matrices(model, KINDS, config)
    article, summary = (most_tokens(model, n) for n in (ARTICLE_TOKENS, SUMMARY_TOKENS))
    splits, (train, validation, reported) = load_tokens(config, tokenizer, article, summary)
    train = some(train, recipe)
    outputs: dict[str, list] = {}
    model.to(DEVICE)
    pad = transformers.DataCollatorForSeq2Seq(tokenizer)  # labels with -100

    def losses(batch: dict) -> list[tuple[float, int]]:
        """Of every summary: the sum over its tokens, and their number."""
        labels = batch.to(DEVICE)["labels"]
        logits = model(**batch).logits.float().transpose(1, 2)  # (n, vocabulary, tokens)
        sums = nn.functional.cross_entropy(logits, labels, reduction="none").sum(dim=1)
        return [*zip(sums.tolist(), (labels != -100).sum(dim=1).tolist())]

    def summarize(batch: dict) -> list[str]:
        del batch["labels"]
        tokens = model.generate(
            **batch.to(DEVICE), num_beams=BEAMS, max_length=summary, do_sample=False)
        return tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def evaluate(last: bool) -> dict[str, float]:
        found = predictions(validation, recipe.batch_size, losses, pad, config)
        loss = sum(total for total, _ in found) / sum(count for _, count in found)
        if not last:
            return dict(validation_loss=loss)
        outputs["prediction"] = predictions(reported, DECODING_BATCH, summarize, pad, config)
        return rouge(outputs["prediction"], splits[-1]["summary"]) | dict(validation_loss=loss)

    lead = [document.partition("\n")[0] for document in splits[-1]["document"]]
    return Problem(
        model, targets, [], math.ceil(len(train) / recipe.batch_size),
        lambda epoch: epoch_batches(train, recipe.batch_size, config, epoch,
                                    lambda rows: by_length(rows, pad)),
        lambda model, chunks: mean_loss(model, chunks, config), evaluate,
        rouge(lead, splits[-1]["summary"]), "first sentence", outputs=outputs)
