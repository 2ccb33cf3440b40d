"""Section 4.2: an encoder, DeBERTaV3-base in the paper, on a task of GLUE (Table 2)."""

import itertools
import math
import random
import statistics
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import NamedTuple

import transformers
from torch import nn

from experiments.data import (
    cast_labels, epoch_batches, guesses, hold_out, load_splits, matrices, mean_loss, most_tokens,
    predictions, pretrained, some, with_new_head)
from experiments.problem import DEVICE, Problem
from experiments.tables import Config, Recipe

HUB, MAX_TOKENS, EVALUATION_BATCH = "nyu-mll/glue", 256, 64


class Task(NamedTuple):
    texts: tuple[str, ...]  # columns
    labels: int = 2  # how many there are; 1: the label is a number
    metrics: tuple[str, ...] = ("accuracy",)  # the first is Table 2's
    dev: tuple[str, ...] = ("validation",)  # splits


PAIR = ("sentence1", "sentence2")
TASKS = {
    "mnli": Task(("premise", "hypothesis"), 3,
                 dev=("validation_matched", "validation_mismatched")),
    "sst2": Task(("sentence",)),
    "cola": Task(("sentence",), metrics=("matthews",)),
    "qqp": Task(("question1", "question2"), metrics=("accuracy", "f1")),
    "qnli": Task(("question", "sentence")),
    "rte": Task(PAIR),
    "mrpc": Task(PAIR, metrics=("accuracy", "f1")),
    "stsb": Task(PAIR, 1, metrics=("pearson", "spearman")),
}
TASKS["sst2_heldout"] = TASKS["sst2"]  # evaluated on 18,000 phrases of the training split
HELD_OUT, FOR_CHOOSING = 20_000, 2_000  # by hold_out_sentences()


def character_map(tokenizer: transformers.PreTrainedTokenizerBase) -> Callable[[str], str]:
    """SentencePiece's own normalization, which transformers 5 leaves out of DebertaV2Tokenizer."""
    file = str(getattr(tokenizer, "vocab_file", None))
    if not file.endswith("spm.model"):
        return lambda text: text
    import sentencepiece
    spaces = ("add_dummy_prefix", "escape_whitespaces", "remove_extra_whitespaces")  # left to it
    return sentencepiece.SentencePieceNormalizer(file, **dict.fromkeys(spaces, False)).normalize


@cache
def load_examples(name: str, data_dir: str | None, model: str, most: int = MAX_TOKENS
                  ) -> tuple[Callable, list[list[dict]]]:
    """What pads a batch, and the examples of the training and dev splits, of so many tokens."""
    task = TASKS[name]
    splits, hub_name = ("train", *task.dev), name.removesuffix("_heldout")
    loaded = load_splits(data_dir, HUB, hub_name, [*task.texts, "label"], splits)
    tokenizer, examples = pretrained(transformers.AutoTokenizer, model), []
    mapped = character_map(tokenizer)
    for split, rows in zip(splits, loaded):
        labels = cast_labels(rows["label"], task.labels, f"{data_dir or HUB}, {name}, {split}")
        texts = [[mapped(text) for text in rows[column]] for column in task.texts]
        encoding = tokenizer(*texts, truncation=True, max_length=most)
        columns = {**encoding, "labels": labels}
        examples.append([dict(zip(columns, row)) for row in zip(*columns.values())])
    if name != hub_name:
        examples = hold_out_sentences(examples[0], loaded[0]["sentence"])
    return transformers.DataCollatorWithPadding(tokenizer), examples


def hold_out_sentences(examples: list[dict], phrases: Sequence[str]) -> list[list[dict]]:
    """Splits SST-2's training split: what to train on, 2,000 to choose settings by, 18,000.

    The split has sentences and their phrases. No held-out phrase is part of a sentence that is
    trained on. Sentences are drawn at random, but alike for every seed.
    """
    if len(phrases) < 2 * HELD_OUT:
        raise ValueError(f"sst2_heldout holds out {HELD_OUT:,} phrases and needs twice as many, "
                         f"but there are {len(phrases):,}")
    rows: dict[str, list[int]] = {}
    for i, phrase in enumerate(phrases):
        rows.setdefault(" ".join(phrase.split()), []).append(i)
    parts: dict[str, list[int]] = {}  # sentence -> rows of its phrases; it is in no longer phrase
    seen: set[str] = set()
    for phrase in sorted(rows, key=lambda phrase: -len(phrase.split())):
        if phrase not in seen:
            words = phrase.split()
            spans = itertools.combinations(range(len(words) + 1), 2)
            found = rows.keys() & {" ".join(words[i:j]) for i, j in spans}
            parts[phrase] = sorted(i for part in found for i in rows[part])
            seen |= found
    elsewhere, held = Counter(itertools.chain(*parts.values())), []  # row -> sentences not held out
    for sentence in random.Random(0).sample([*parts], len(parts)):
        elsewhere.subtract(parts[sentence])
        held += [i for i in parts[sentence] if not elsewhere[i]]
        if len(held) >= HELD_OUT:
            break
    train = sorted({*range(len(phrases))} - {*held})
    split = (train, held[:FOR_CHOOSING], held[FOR_CHOOSING:HELD_OUT])
    return [[examples[i] for i in part] for part in split]


def compute_metrics(names: Iterable[str], predicted: list, labels: list) -> dict[str, float]:
    """GLUE's metrics; a correlation with a constant counts as 0."""
    import scipy.stats
    import sklearn.metrics
    compute = {
        "accuracy": sklearn.metrics.accuracy_score,
        "f1": sklearn.metrics.f1_score,
        "matthews": sklearn.metrics.matthews_corrcoef,
        "pearson": lambda x, y: scipy.stats.pearsonr(x, y).statistic if len({*y}) > 1 else 0,
        "spearman": lambda x, y: scipy.stats.spearmanr(x, y).statistic if len({*y}) > 1 else 0,
    }
    return {name: float(compute[name](labels, predicted)) for name in names}


def adapted_kinds(model: nn.Module) -> list[str]:
    """The matrices of Figure 2, as DeBERTa or as BERT and RoBERTa name them."""
    end = "_proj" if model.config.model_type == "deberta-v2" else ""
    return [f"query{end}", f"key{end}", f"value{end}", "intermediate.dense", "output.dense"]


def find_heads(model: nn.Module) -> list[str]:
    """What a checkpoint of an encoder does not have, so what is trained in full."""
    last = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [head for head in ("pooler", "classifier") if head in last]


def problem(config: Config, recipe: Recipe) -> Problem:
    """A GLUE task for a pre-trained encoder with a new head."""
    task = TASKS[config.task]
    auto = transformers.AutoModelForSequenceClassification
    model = with_new_head(auto, config.model, task.labels)
    targets = matrices(model, adapted_kinds(model), config)
    pad, (train, *devs) = load_examples(
        config.task, config.data_dir, config.model, most_tokens(model, MAX_TOKENS))
    if config.task == "sst2_heldout":
        devs = devs[:1] if config.holdout else devs[1:]
    elif config.holdout:
        train, *devs = hold_out(train)
    devs = dict(zip(("", "_mm"), devs))  # _mm: MNLI's mismatched
    train = some(train, recipe)
    model.to(DEVICE)
    outputs: dict[str, Sequence] = {}

    def metrics(guess: Sequence, suffix: str) -> dict[str, float]:
        found = compute_metrics(task.metrics, guess, [row["labels"] for row in devs[suffix]])
        return {f"{name}{suffix}": value for name, value in found.items()}

    def evaluate(last: bool) -> dict[str, float]:
        found = {}
        for suffix, dev in devs.items():
            each = predictions(dev, EVALUATION_BATCH, partial(guesses, model), pad, config)
            guess, loss = zip(*each)
            outputs.update({f"prediction{suffix}": guess, f"loss{suffix}": loss})
            found |= metrics(guess, suffix) | {f"loss{suffix}": statistics.fmean(loss)}
        return found

    majority = statistics.mode(row["labels"] for row in train)
    floors = [metrics([majority] * len(dev), suffix) for suffix, dev in devs.items()]
    return Problem(
        model, targets, find_heads(model), math.ceil(len(train) / recipe.batch_size),
        lambda epoch: epoch_batches(train, recipe.batch_size, config, epoch, pad),
        partial(mean_loss, config=config), evaluate, dict(ChainMap(*floors)), outputs=outputs)
