"""What GLUE, XSum and VTAB share: pre-trained models, data sets, batches, predictions."""

import csv
import math
import os
import random
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterable, Sequence, Sized
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from transformers import AutoConfig

from experiments import problem as shared
from experiments.problem import DEVICE, autocast, chosen, mean_of_processes, seed_of
from experiments.tables import Config, Recipe


# ---- What a command checks first ----
def check_files(model: str | None, data_dir: str | None, folders: list[Path]) -> None:
    """Raises ValueError for what is missing or cannot be written, before anything is loaded."""
    for folder in folders:
        while not os.path.lexists(folder):
            folder = folder.parent
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"--output-dir: cannot write in {folder}: {error.strerror}") from None
    local = model and (model.startswith((".", "/", "~")) or Path(model).exists())
    if local and not Path(model, "config.json").is_file():
        raise ValueError(f"--model: {model} is not a folder with a config.json")
    if data_dir and not Path(data_dir).is_dir():
        raise ValueError(f"--data-dir: {data_dir} is not a folder")


# ---- Models ----
def pretrained(auto: type, model: str, **arguments):
    """from_pretrained, with an error that names the model."""
    if DEVICE == "cpu" and "dtype" in arguments:  # a model, whose backward pass is so faster there
        arguments["attn_implementation"] = "eager"
    try:
        return auto.from_pretrained(model, **arguments)
    except Exception as error:  # broken files raise all kinds
        if isinstance(error, OSError) and error.errno is None:
            raise  # transformers names what it did not find
        what = f"{type(error).__name__}: {str(error).strip()}"
        raise ValueError(f"--model: {model} cannot be loaded, {what}") from error


def with_new_head(auto: type, model: str, labels: int) -> nn.Module:
    """A pre-trained model with a new head for so many classes, or for a number if labels is 1.

    Of a task before, neither classifier nor kind of loss is kept. ValueError if other weights have
    not the shapes of config.json.
    """
    config = pretrained(AutoConfig, model)
    config.problem_type = "regression" if labels == 1 else "single_label_classification"
    config.num_labels = labels
    found, loading = pretrained(
        auto, model, config=config, ignore_mismatched_sizes=True, output_loading_info=True,
        dtype=torch.float32)  # not the checkpoint's: DeBERTaV3's float16 is NaN after a step
    head = {name for name in found.state_dict() if name.startswith("classifier.")}
    if wrong := {name for name, *_ in loading["mismatched_keys"]} - head:
        raise ValueError(f"--model: {model}: {min(wrong)} has another shape than config.json says")
    if head - {*loading["missing_keys"]}:
        print(f"{model} has a classifier of another task: a new one takes its place")
        found.classifier = auto.from_config(config, dtype=torch.float32).classifier
    return found


def most_tokens(model: nn.Module, limit: int) -> int:
    """The limit, or the number of the model's positions if it is smaller, which is printed."""
    most = limit
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and "position" in name.rpartition(".")[2]:
            before = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa's
            most = min(most, table.num_embeddings - getattr(table, "offset", before))  # BART's
    if most < limit:
        print(f"texts are cut at {most} tokens, not at {limit}: the model has no more positions")
    return most


def matrices(model: nn.Module, kinds: Sequence[str], config: Config) -> list[str]:
    """The names that end in one of these kinds and as --targets asks. ValueError if there is none
    of a kind."""
    names = [name for name, _ in model.named_modules()]
    if missing := [kind for kind in kinds if not any(n.endswith(f".{kind}") for n in names)]:
        raise ValueError(f"--model: {config.model} has no matrices named {', '.join(missing)}; "
                         f"this task adapts {', '.join(kinds)}")
    return chosen([n for n in names if n.endswith(tuple(f".{kind}" for kind in kinds))], config)


# ---- Data ----
def load_folder(data_dir: str, task: str | None):
    """All splits of a task. ValueError if the folder cannot be read.

    In a CSV an empty field is missing, but words such as NA are texts. A TSV has no quotes.
    """
    import datasets
    files = [(str(path), path.stat().st_mtime_ns) for path in Path(data_dir).resolve().rglob("*")]
    known = datasets.fingerprint.Hasher.hash(sorted(files))
    cache = Path(datasets.config.HF_DATASETS_CACHE, known)  # datasets' own knows no files
    try:
        builder = datasets.load_dataset_builder(data_dir, task, cache_dir=cache)
        builder.config.keep_default_na = False  # a setting of CSV, which other formats ignore
        builder.config.na_values = [""]
        if getattr(builder.config, "sep", None) == "\t":
            builder.config.quoting = csv.QUOTE_NONE
        builder.download_and_prepare()
        return builder.as_dataset()
    except Exception as error:  # broken files raise all kinds
        cause = error.__cause__ or error  # datasets says only there what is wrong
        raise ValueError(f"--data-dir: {data_dir} has no {task or 'data set'} that can be read, "
                         f"{type(cause).__name__}: {cause}") from error


def load_splits(data_dir: str | None, hub: str, task: str | None, columns: Sequence[str],
                splits: Sequence[str]) -> list:
    """Splits of the data set on the hub, or of the one in --data-dir. ValueError if a split, a
    column or a value is missing, or if a column of texts has others."""
    import datasets
    try:
        loaded = load_folder(data_dir, task) if data_dir else datasets.load_dataset(hub, task)
    except RuntimeError:  # of a hub repository that still has a loading script
        loaded = datasets.load_dataset(hub, task, revision="refs/convert/parquet")
    for split in splits:
        where = f"{data_dir or hub}, {task or 'data'}, {split}"
        if split not in loaded or not len(loaded[split]):
            raise ValueError(f"{where}: no examples")
        names = loaded[split].column_names
        for column in columns:
            if column not in names:
                raise ValueError(f"{where}: no column {column!r}, only {', '.join(names)}")
            values = loaded[split].data.column(column)  # pyarrow's, so that no text is decoded
            if values.null_count:
                row = values.is_null().index(True).as_py() + 1
                raise ValueError(f"{where}: the {column} is missing (row {row} of {len(values)})")
            if column != "label" and str(values.type) not in ("string", "large_string"):
                raise ValueError(f"{where}: the {column} is of type {values.type}, not a text")
    return [loaded[split] for split in splits]


def cast_labels(labels: Iterable, count: int, where: str) -> list[int] | list[float]:
    """So many classes, or numbers if count is 1, as a loss takes them. ValueError for others.

    Whole floats, booleans and strings of digits are classes.
    """
    found = []
    for row, label in enumerate(labels, 1):
        try:
            number = float(label)
        except (TypeError, ValueError):
            number = math.nan
        if not (math.isfinite(number) if count == 1 else number in range(count)):
            right = "a number" if count == 1 else f"one of 0 to {count - 1}"
            raise ValueError(f"{where}: the label is {label!r}, not {right} (row {row})")
        found.append(number if count == 1 else int(number))
    return found


def hold_out(rows: Sized) -> tuple[Subset, Subset]:
    """Splits the training split: (nine tenths, one tenth), at random but alike for every seed."""
    order = random.Random(0).sample(range(len(rows)), len(rows))
    return Subset(rows, order[len(rows) // 10 :]), Subset(rows, order[: len(rows) // 10])


def some(rows: Sized, recipe: Recipe) -> Sized:
    """As many of the rows as the recipe asks for (0: all), at random but alike for every seed."""
    if recipe.examples > len(rows):
        raise ValueError(f"--set examples={recipe.examples}: there are {len(rows)} to train on")
    order = random.Random(0).sample(range(len(rows)), recipe.examples)
    return Subset(rows, order) if recipe.examples else rows


def epoch_batches(rows: Sized, batch_size: int, config: Config, epoch: int,
                  pad: Callable | None = None) -> DataLoader:
    """The batches of an epoch in its random order; every process has its share of each.

    With pad, a batch is a list of chunks of similar length. On a CPU this saves padding, so time.
    """
    def chunks(batch: list[dict]) -> list[dict]:
        batch = sorted(batch, key=lambda row: len(row["input_ids"]))
        size = math.ceil(len(batch) / (4 if DEVICE == "cpu" else 1))
        return [pad(batch[i : i + size]) for i in range(0, len(batch), size)]

    seed, count = seed_of(config, epoch), shared.PROCESSES
    sampler = DistributedSampler(rows, count, shared.PROCESS, seed=seed)
    collate = chunks if pad else None
    return DataLoader(rows, batch_size // count, sampler=sampler, collate_fn=collate,
                      pin_memory=DEVICE == "cuda" and collate is None)


def mean_loss(model: nn.Module, chunks: list[dict], config: Config) -> Tensor:
    """The mean over all labels of a batch that comes in chunks, and in shares of processes."""
    counts = [(chunk["labels"] != -100).sum().to(DEVICE) for chunk in chunks]  # -100: padding
    with autocast(config):
        losses = [model(**chunk.to(DEVICE)).loss * n for chunk, n in zip(chunks, counts)]
    return sum(losses) / mean_of_processes(sum(counts))


@torch.no_grad()
def predictions(rows: Sized, batch_size: int, predict: Callable, pad: Callable | None,
                config: Config) -> list:
    """What predict(batch), a list, gives for every row, in their order; processes share them."""
    order = range(len(rows))
    if pad:  # texts, of which batches of one length need no padding
        order = sorted(order, key=lambda i: len(rows[i]["input_ids"]))
    own, found = order[shared.PROCESS :: shared.PROCESSES], []
    for batch in DataLoader(Subset(rows, own), batch_size, collate_fn=pad):
        with autocast(config):
            found += predict(batch)
    by_row = dict(zip(own, found))
    if shared.PROCESSES > 1:
        shares = [{}] * shared.PROCESSES
        distributed.all_gather_object(shares, by_row)
        by_row = ChainMap(*shares)
    return [by_row[i] for i in range(len(rows))]


def guesses(model: nn.Module, batch: dict) -> list[tuple[float, float]]:
    """Of every example: what the model says, a class or a number, and its loss."""
    inputs = {key: x.to(DEVICE) for key, x in batch.items()}
    labels = inputs.pop("labels")
    logits = model(**inputs).logits.float()  # (n, classes), or (n, 1) for a number
    if logits.shape[1] == 1:
        guess = logits.squeeze(1)
        losses = (guess - labels).square()
    else:
        guess = logits.argmax(dim=1)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return [*zip(guess.tolist(), losses.tolist())]
