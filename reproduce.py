"""Runs ElaLoRA: on a problem whose answer is known, or on GLUE with a pre-trained encoder as the paper does.

    python reproduce.py                           # planted ranks: no network, under a minute on two cores
    python reproduce.py --task mrpc --rank 4      # DeBERTaV3-base on MRPC, Table 7's schedule
    python reproduce.py --task rte --rank 2 4 --seeds 0 1 2 --model bert-base-uncased --data-dir GLUE

Every run writes OUTPUT_DIR/TASK-elalora-rRANK-sSEED/ with results.json, ranks.png (as the paper's Figure 2),
importance.png (as Figure 5) and adapter.safetensors. `python reproduce.py --help` documents every argument.

Tables, figures and sections are those of Chang et al. 2025, arXiv:2504.00254. What the paper leaves open: linear
warm-up of the learning rate over 10% of the run and linear decay to 0, gradients clipped to norm 1, no weight
decay, at most 256 tokens, the model's own dropout, alpha = 16, penalty weight 0.1, beta1 = beta2 = 0.85.
"""

import argparse
import functools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import elalora

METHOD = "elalora"
DEBERTA = "microsoft/deberta-v3-base"
HUB_DATASET = "nyu-mll/glue"
PENALTY_WEIGHT = 0.1
MAX_LENGTH = 256
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class InputError(ValueError):
    """Something the user gave does not fit; `main` prints it in one line and exits with code 2."""


# ---------------------------------------------------------------- hyperparameters


@dataclass(frozen=True)
class Recipe:
    """One row of Table 7; phases in optimizer steps, b and k by rank."""

    batch_size: int
    learning_rate: float
    epochs: int
    warmup: int
    stabilize: int
    interval: int
    b: dict[int, int]
    k: dict[int, int]

    def scaled_to(self, epochs: int) -> "Recipe":
        """The same phases as shares of a run of another length."""
        share = {x: max(1, getattr(self, x) * epochs // self.epochs) for x in ("warmup", "stabilize", "interval")}
        return replace(self, epochs=epochs, **share)


def by_rank(*values: int) -> dict[int, int]:
    return dict(zip((2, 4, 10), values))


# fmt: off
RECIPES = {
    "mnli": Recipe( 64, 5e-4,  5, 5000, 10000, 500, b=by_rank(1, 2, 4), k=by_rank(1, 1, 2)),
    "sst2": Recipe( 64, 8e-4, 20, 3000, 10000, 500, b=by_rank(1, 2, 4), k=by_rank(1, 1, 2)),
    "cola": Recipe( 64, 8e-4, 20,  300,  1500,  50, b=by_rank(1, 2, 4), k=by_rank(1, 1, 2)),
    "qqp":  Recipe(128, 4e-4,  5, 3000,  5000, 100, b=by_rank(1, 2, 4), k=by_rank(1, 1, 2)),
    "qnli": Recipe( 64, 5e-4,  5, 2000,  2000, 200, b=by_rank(1, 2, 4), k=by_rank(1, 1, 2)),
    "rte":  Recipe( 64, 1.2e-3, 50, 300,  500,  50, b=by_rank(1, 4, 8), k=by_rank(1, 2, 4)),
    "mrpc": Recipe( 64, 5e-4, 30,  300,   400,  50, b=by_rank(2, 2, 4), k=by_rank(1, 1, 2)),
    "stsb": Recipe( 64, 5e-3, 25,  300,   300, 150, b=by_rank(3, 4, 8), k=by_rank(1, 2, 4)),
    # Ours, fixed before any result was written down: 10 "epochs" of 100 steps.
    "planted": Recipe(32, 1e-2, 10, 100,  300,  20, b=by_rank(8, 8, 8), k=by_rank(2, 2, 2)),
}
# Table 2: ElaLoRA on DeBERTaV3-base at ranks 2, 4, 10, in percent.
PAPER = {
    "mnli": (89.32, 89.44, 89.51), "sst2": (95.53, 95.64, 95.87), "cola": (67.38, 70.15, 70.19),
    "qqp": (91.21, 91.26, 91.42), "qnli": (93.70, 94.44, 94.36), "rte": (85.92, 87.36, 88.81),
    "mrpc": (90.44, 90.44, 88.98), "stsb": (90.61, 91.10, 91.59),
}
# fmt: on


@dataclass
class Problem:
    """All that the training loop must know of a task; a batch is whatever `batches` yields and `loss` takes."""

    model: nn.Module
    target_modules: list[str]
    modules_to_save: list[str]
    steps_per_epoch: int
    batches: Callable[[int], Iterable]
    loss: Callable[..., Tensor]
    evaluate: Callable[[], dict[str, float]]
    baseline: dict[str, float]


# ---------------------------------------------------------------- the planted problem

MATRICES = (  # DeBERTa's names and the planted rank of each
    ("attention.self.query_proj", 2),
    ("attention.self.key_proj", 2),
    ("attention.self.value_proj", 4),
    ("attention.output.dense", 4),
    ("intermediate.dense", 12),
    ("output.dense", 0),
)
PLANTED = {f"deberta.encoder.layer.{i}.{name}": r for i in range(12) for name, r in MATRICES}
WIDTH = 64
STEPS_PER_EPOCH = 100


def planted_spectrum(rank: int) -> Tensor:
    return torch.linspace(1, 0.5, rank)


def planted_bounds(rank: int) -> tuple[float, float]:
    """Least residual of any update of `rank` everywhere, and of any allocation of that total with >= 1 each.

    By Eckart-Young the best update of rank r leaves the squares of all singular values but the r largest.
    """
    squares = [planted_spectrum(r).square() for r in PLANTED.values()]
    total = sum(s.sum() for s in squares)
    even = sum(s[rank:].sum() for s in squares)
    beyond_first = torch.cat([s[1:] for s in squares]).sort(descending=True).values
    best = beyond_first[(rank - 1) * len(PLANTED) :].sum()
    return float(even / total), float(best / total)


def planted_problem(args: argparse.Namespace, recipe: Recipe, rank: int, seed: int) -> Problem:
    """72 frozen random matrices, each to regress W0 + Delta* with Delta* of known rank, from Gaussian inputs."""
    model = nn.Module()
    deltas = {}
    for name, r in PLANTED.items():
        *path, last = name.split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        setattr(parent, last, nn.Linear(WIDTH, WIDTH, bias=False))
        U, V = (nn.init.orthogonal_(torch.empty(WIDTH, r)) if r else torch.empty(WIDTH, 0) for _ in "UV")
        deltas[name] = U * planted_spectrum(r) @ V.T
    delta = torch.stack(list(deltas.values())).to(DEVICE)  # (72, 64, 64)
    target = delta + torch.stack([model.get_submodule(name).weight.data for name in PLANTED]).to(DEVICE)
    model.to(DEVICE)
    even, best = planted_bounds(rank)

    def batches(epoch: int) -> Iterable[Tensor]:
        generator = epoch_generator(seed, epoch)
        for _ in range(STEPS_PER_EPOCH):
            yield torch.randn(recipe.batch_size, WIDTH, generator=generator).to(DEVICE)

    def loss(x: Tensor) -> Tensor:
        got = torch.stack([model.get_submodule(name)(x) for name in PLANTED])  # (72, batch, 64)
        return (got - x @ target.mT).square().sum(dim=(0, 2)).mean()

    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            found = torch.stack([model.get_submodule(name).delta_weight() for name in PLANTED])
        residual = float((found - delta).square().sum() / delta.square().sum())
        gap_closed = (even - residual) / (even - best)
        return dict(residual=residual, even_rank_bound=even, best_possible=best, gap_closed=gap_closed)

    return Problem(model, list(PLANTED), [], STEPS_PER_EPOCH, batches, loss, evaluate, {})


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The source of an epoch's order: depends on these two alone."""
    return torch.Generator().manual_seed(seed * 100_003 + epoch)


# ---------------------------------------------------------------- GLUE


@dataclass(frozen=True)
class Task:
    """Where a GLUE task's texts and labels are, on the hub and in the classic TSV files."""

    folder: str
    texts: tuple[str, ...]  # columns on the hub
    tsv_texts: tuple[str | int, ...]  # columns in the TSV: names in its header, positions where it has none
    tsv_label: str | int
    labels: tuple[str, ...] = ("0", "1")  # as the TSV writes them, in the hub's order; () for a number
    metrics: tuple[str, ...] = ("accuracy",)
    dev: tuple[tuple[str, str], ...] = (("validation", "dev"),)  # splits: name on the hub, name of the TSV


PAIR = ("sentence1", "sentence2")
NLI = ("entailment", "not_entailment")
MATCHED = (("validation_matched", "dev_matched"), ("validation_mismatched", "dev_mismatched"))
TASKS = {
    "mrpc": Task("MRPC", PAIR, ("#1 String", "#2 String"), "Quality", metrics=("accuracy", "f1")),
    "rte": Task("RTE", PAIR, PAIR, "label", NLI),
    "cola": Task("CoLA", ("sentence",), (3,), 1, metrics=("matthews",)),
    "stsb": Task("STS-B", PAIR, PAIR, "score", (), ("pearson", "spearman")),
    "sst2": Task("SST-2", ("sentence",), ("sentence",), "label"),
    "qnli": Task("QNLI", ("question", "sentence"), ("question", "sentence"), "label", NLI),
    "qqp": Task(
        "QQP", ("question1", "question2"), ("question1", "question2"), "is_duplicate", metrics=("accuracy", "f1")
    ),
    "mnli": Task(
        "MNLI", ("premise", "hypothesis"), PAIR, "gold_label", ("entailment", "neutral", "contradiction"), dev=MATCHED
    ),
}

Split = tuple[list[list[str]], list[float]]  # one list of texts per column, and the labels


def read_tsv(path: Path, task: Task) -> Split:
    """A file of the classic layout: tab-separated, quotes literal, a header unless columns go by position."""
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
    rows = [line.removesuffix("\r").split("\t") for line in lines[:-1] + lines[-1:] * bool(lines[-1])]
    columns = (*task.tsv_texts, task.tsv_label)
    if isinstance(task.tsv_label, str):
        header = rows.pop(0)
        if missing := [c for c in columns if c not in header]:
            raise InputError(f"{path}: no column {missing[0]!r} in its header {header}")
        columns = tuple(map(header.index, columns))
        width = len(header)
    else:
        width = 4
    if not rows:
        raise InputError(f"{path}: no examples")
    texts, labels = [[] for _ in task.tsv_texts], []
    for number, row in enumerate(rows, start=1 + isinstance(task.tsv_label, str)):
        if len(row) != width:
            raise InputError(f"{path}, line {number}: {len(row)} columns where there should be {width}")
        *values, label = (row[c] for c in columns)
        for column, value in zip(texts, values):
            column.append(value)
        try:
            labels.append(task.labels.index(label) if task.labels else float(label))
        except ValueError:
            expected = f"one of {', '.join(task.labels)}" if task.labels else "a number"
            raise InputError(f"{path}, line {number}: the label {label!r} is not {expected}") from None
    return texts, labels


def check_files(name: str, data_dir: str | None, model: str) -> None:
    """Finds what is missing before anything is loaded or downloaded."""
    if data_dir is not None:
        folder = Path(data_dir) / TASKS[name].folder
        for stem in ("train", *(tsv for _, tsv in TASKS[name].dev)):
            if not (folder / f"{stem}.tsv").is_file():
                raise InputError(f"--data-dir: {folder / stem}.tsv is missing")
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists()
    if looks_local and not (Path(model) / "config.json").is_file():
        raise InputError(f"--model: {model} is no folder with a config.json in it")


def load_splits(name: str, data_dir: str | None) -> list[Split]:
    """The training split, then the dev split (two for MNLI)."""
    task = TASKS[name]
    if data_dir is not None:
        stems = ("train", *(tsv for _, tsv in task.dev))
        return [read_tsv(Path(data_dir) / task.folder / f"{stem}.tsv", task) for stem in stems]
    import datasets

    data = from_hub(lambda: datasets.load_dataset(HUB_DATASET, name), HUB_DATASET, "--data-dir FOLDER_WITH_TSV_FILES")
    splits = [data[split] for split in ("train", *(hub for hub, _ in task.dev))]
    return [([list(split[column]) for column in task.texts], list(split["label"])) for split in splits]


def from_hub(load: Callable, what: str, instead: str):
    """load(), with whatever the hub's libraries raise turned into one line."""
    try:
        return load()
    except Exception as error:  # their errors have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot load {what} ({reason}); where the hub cannot be reached, use {instead}") from error


def compute_metrics(names: Iterable[str], predictions: list[float], labels: list[float]) -> dict[str, float]:
    """GLUE's metrics by name; a correlation with a constant is 0."""
    import scipy.stats
    import sklearn.metrics

    if len(set(predictions)) == 1 and "pearson" in names:
        return dict.fromkeys(names, 0.0)
    compute = {
        "accuracy": sklearn.metrics.accuracy_score,
        "f1": sklearn.metrics.f1_score,
        "matthews": sklearn.metrics.matthews_corrcoef,
        "pearson": lambda y, p: scipy.stats.pearsonr(y, p).statistic,
        "spearman": lambda y, p: scipy.stats.spearmanr(y, p).statistic,
    }
    return {name: float(compute[name](labels, predictions)) for name in names}


@functools.cache
def encoded_splits(name: str, data_dir: str | None, model: str) -> tuple:
    """The tokenizer's collator, and per split the examples as lists of token ids, tokenized once for all runs."""
    import transformers

    tokenizer = from_hub(
        lambda: transformers.AutoTokenizer.from_pretrained(model), f"the tokenizer of {model}", "--model FOLDER"
    )
    splits = []
    for texts, labels in load_splits(name, data_dir):
        encoding = tokenizer(*texts, truncation=True, max_length=MAX_LENGTH)
        rows = [dict(zip(encoding.keys(), row)) for row in zip(*encoding.values())]
        splits.append([row | {"labels": label} for row, label in zip(rows, labels)])
    return transformers.DataCollatorWithPadding(tokenizer), splits


def glue_problem(args: argparse.Namespace, recipe: Recipe, rank: int, seed: int) -> Problem:
    """A GLUE task for a sequence classifier on a pre-trained encoder."""
    import transformers

    task = TASKS[args.task]
    collate, (train, *devs) = encoded_splits(args.task, args.data_dir, args.model)
    model = from_hub(
        lambda: transformers.AutoModelForSequenceClassification.from_pretrained(
            args.model,
            num_labels=len(task.labels) or 1,
            dtype=torch.float32,  # transformers would take the checkpoint's, float16 for DeBERTaV3
        ),
        args.model,
        "--model FOLDER",
    ).to(DEVICE)
    targets = attention_and_feed_forward(model)
    heads = [h for h in ("pooler", "classifier") if any(n.split(".")[-1] == h for n, _ in model.named_modules())]
    autocast = functools.partial(torch.autocast, DEVICE, torch.bfloat16, enabled=args.dtype == "bfloat16")

    def microbatches(rows: list) -> list:
        # On a CPU a batch in four parts of like length pads less and runs twice as fast; its loss is the same.
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        size = math.ceil(len(rows) / (1 if DEVICE == "cuda" else 4))
        return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]

    def loader(split: list, collate_fn: Callable, **kwargs) -> Iterable:
        return torch.utils.data.DataLoader(split, recipe.batch_size, collate_fn=collate_fn, **kwargs)

    def loss(parts: list) -> Tensor:
        with autocast():
            losses = [model(**part.to(DEVICE)).loss * len(part["labels"]) for part in parts]
        return sum(losses) / sum(len(part["labels"]) for part in parts)

    def predict(split: list) -> list[float]:
        logits = []
        model.eval()
        with torch.no_grad(), autocast():
            for batch in loader(split, collate):
                logits.append(model(**batch.to(DEVICE)).logits.float().cpu())
        logits = torch.cat(logits)
        return (logits.argmax(-1) if task.labels else logits.squeeze(-1)).tolist()

    def score(predictors: Callable[[list], list[float]]) -> dict[str, float]:
        scores = {}
        for split, suffix in zip(devs, ("", "_mm")):
            got = compute_metrics(task.metrics, predictors(split), [row["labels"] for row in split])
            scores |= {f"{name}{suffix}": value for name, value in got.items()}
        return scores

    majority = statistics.mode(row["labels"] for row in train)
    return Problem(
        model,
        targets,
        heads,
        math.ceil(len(train) / recipe.batch_size),
        lambda epoch: loader(train, microbatches, shuffle=True, generator=epoch_generator(seed, epoch)),
        loss,
        lambda: score(predict),
        score(lambda split: [majority] * len(split)),
    )


def attention_and_feed_forward(model: nn.Module) -> list[str]:
    """The names of the six matrices of a layer that the paper adapts: DeBERTa's, or BERT's and its relatives'."""
    names = [name for name, _ in model.named_modules()]
    for targets in (["query_proj", "key_proj", "value_proj"], ["query", "key", "value"]):
        targets = [*targets, "intermediate.dense", "output.dense"]
        if all(any(name.endswith(f".{target}") for name in names) for target in targets):
            return targets
    raise InputError(f"--model: a {model.config.model_type} has other layers than DeBERTa, BERT, RoBERTa or ELECTRA")


# ---------------------------------------------------------------- one run


def run(args: argparse.Namespace, recipe: Recipe, rank: int, seed: int) -> dict:
    """Trains once and writes the run's folder; returns what is in results.json."""
    import tqdm
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.set_seed(seed)
    started = time.time()
    problem = (planted_problem if args.task == "planted" else glue_problem)(args, recipe, rank, seed)
    model, total_steps = problem.model, recipe.epochs * problem.steps_per_epoch
    row = nearest_row(rank)
    elalora.inject(model, problem.target_modules, rank, modules_to_save=problem.modules_to_save)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, recipe.learning_rate, weight_decay=0.0, foreach=True)
    lr_schedule = transformers.get_linear_schedule_with_warmup(optimizer, total_steps // 10, total_steps)
    schedule = elalora.RankSchedule(
        total_steps, recipe.warmup, recipe.stabilize, recipe.interval, recipe.b[row], args.schedule
    )
    allocator = elalora.RankAllocator(model, optimizer, schedule, recipe.k[row], seed=seed)

    history, adjustments, importance = [], [], {}
    with tqdm.tqdm(total=total_steps, desc=run_name(args, rank, seed), mininterval=1) as bar:
        for epoch in range(1, recipe.epochs + 1):
            model.train()
            losses = []
            for batch in problem.batches(epoch):
                loss = problem.loss(batch)
                losses.append(finite(loss.item(), allocator.t + 1))
                (loss + PENALTY_WEIGHT * elalora.orthogonality_penalty(model)).backward()
                nn.utils.clip_grad_norm_(trainable, 1.0)
                optimizer.step()
                lr_schedule.step()
                adjustment = allocator.step()
                optimizer.zero_grad()
                if adjustment:
                    adjustments.append(asdict(adjustment))
                if allocator.t in (schedule.warmup_steps, schedule.search_end):
                    importance[allocator.t] = torch.cat(list(allocator.importance().values())).tolist()
                bar.update()
                dev = next(iter(history[-1]["metrics"].values())) if history else math.nan
                b = adjustments[-1]["b"] if adjustments else 0
                total_rank = sum(allocator.ranks().values())
                bar.set_postfix(loss=f"{losses[-1]:.3f}", dev=f"{dev:.4f}", rank=total_rank, b=b, refresh=False)
            model.eval()
            metrics = problem.evaluate()
            history.append(dict(epoch=epoch, train_loss=statistics.fmean(losses), metrics=metrics))

    adapters = sum(p.numel() for n, p in model.named_parameters() if n.split(".")[-1] in elalora.RANK_DIM)
    main_metric = next(iter(history[-1]["metrics"]))
    pick = min if main_metric == "residual" else max
    results = dict(
        task=args.task,
        method=METHOD,
        rank=rank,
        seed=seed,
        metrics=history[-1]["metrics"],
        best_metrics=pick(history, key=lambda h: h["metrics"][main_metric])["metrics"],
        baseline=problem.baseline,
        history=history,
        adapter_parameters=adapters,
        trainable_parameters=sum(p.numel() for p in trainable),
        total_steps=total_steps,
        seconds=time.time() - started,
        ranks=allocator.ranks(),
        adjustments=adjustments,
        arguments=run_arguments(args, rank, seed),
        recipe=asdict(recipe),
        versions=versions(),
    )
    write_run(Path(args.output_dir) / run_name(args, rank, seed), results, importance, model)
    return results


def finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise InputError(f"the loss is {loss} at step {step}: try --dtype float32, another seed or another model")
    return loss


def nearest_row(rank: int) -> int:
    """The rank of Table 7 whose b and k a rank takes: the nearest, the smaller of two equally near."""
    return min((2, 4, 10), key=lambda row: (abs(row - rank), row))


def run_name(args: argparse.Namespace, rank: int, seed: int) -> str:
    return f"{args.task}-{METHOD}-r{rank}-s{seed}"


def run_arguments(args: argparse.Namespace, rank: int, seed: int) -> dict:
    """What determines the numbers of a run."""
    shared = {name: value for name, value in vars(args).items() if name not in ("output_dir", "seeds")}
    return shared | dict(rank=rank, seed=seed)


def versions() -> dict[str, str]:
    import transformers

    hardware = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return dict(
        python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__, hardware=hardware
    )


# ---------------------------------------------------------------- what a run writes


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes under a temporary name and renames, so that what exists is complete."""
    temporary = path.with_name(f"tmp-{path.name}")
    write(temporary)
    os.replace(temporary, path)


def write_run(folder: Path, results: dict, importance: dict[int, list[float]], model: nn.Module) -> None:
    import safetensors.torch

    folder.mkdir(parents=True, exist_ok=True)
    state = elalora.adapter_state_dict(model)
    atomically(folder / "adapter.safetensors", lambda path: safetensors.torch.save_file(state, path))
    panels = {"ranks found": results["ranks"]}
    if results["task"] == "planted":
        panels = {"ranks planted": PLANTED} | panels
    atomically(folder / "ranks.png", lambda path: plot_ranks(panels, path))
    atomically(folder / "importance.png", lambda path: plot_importance(importance, path))
    text = json.dumps(results, indent=1)
    atomically(folder / "results.json", lambda path: path.write_text(text))  # last: it marks the run as finished


def plot_ranks(panels: dict[str, dict[str, int]], path: Path) -> None:
    """Heatmaps, layers x matrices, as the paper's Figure 2."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(7.5 * len(panels), 3.2), squeeze=False, layout="constrained")
    highest = max(max(ranks.values()) for ranks in panels.values())
    for axis, (title, ranks) in zip(axes[0], panels.items()):
        found = {re.search(r"\.(\d+)\.(.+)", name).groups(): rank for name, rank in ranks.items()}
        layers = sorted({int(layer) for layer, _ in found})
        matrices = list(dict.fromkeys(matrix for _, matrix in found))
        grid = [[found[str(layer), matrix] for layer in layers] for matrix in matrices]
        axis.imshow(grid, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
        for i, values in enumerate(grid):
            for j, value in enumerate(values):
                axis.text(j, i, value, ha="center", va="center", color="white" if value > highest / 2 else "black")
        axis.set_xticks(range(len(layers)), layers)
        axis.set_yticks(range(len(matrices)), matrices)
        axis.set(title=f"{title} (total {sum(ranks.values())})", xlabel="layer")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_importance(importance: dict[int, list[float]], path: Path) -> None:
    """Distribution of the importance scores after warm-up and after the rank search, as the paper's Figure 5."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logs = {step: [math.log10(s) for s in scores if s > 0] for step, scores in importance.items()}
    everything = [x for values in logs.values() for x in values] or [0.0]
    low, high = min(everything), max(everything) + 1e-6
    bins = [low + (high - low) * i / 40 for i in range(41)]
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for (step, values), when in zip(logs.items(), ("after warm-up", "after the rank search")):
        axis.hist(values, bins=bins, alpha=0.6, label=f"{when} (step {step})")
    axis.set(xlabel="log10 of the importance score of a rank", ylabel="ranks")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- what the user sees


def describe(results: dict) -> str:
    metrics, name = results["metrics"], f"{results['task']}, rank {results['rank']}, seed {results['seed']}"
    if results["task"] == "planted":
        return f"{name}: residual |dW - Delta*|^2 / |Delta*|^2 after {results['seconds']:.0f} s\n" + planted_table(results)
    lines = [f"{name}, last of {len(results['history'])} epochs, {results['seconds']:.0f} s"]
    for metric, value in metrics.items():
        lines.append(f"  {metric:<12} {value:.4f}   (majority class: {results['baseline'][metric]:.4f})")
    arguments = results["arguments"]
    if arguments["model"] == DEBERTA and results["rank"] in (2, 4, 10):
        figure = PAPER[results["task"]][(2, 4, 10).index(results["rank"])]
        lines.append(f"  the paper's {next(iter(metrics))} (Table 2, in percent): {figure}")
    ranks = results["ranks"].values()
    lines.append(
        f"  {results['adapter_parameters']:,} adapter parameters, {results['trainable_parameters']:,} trained with the "
        f"head; {len(ranks)} matrices, total rank {sum(ranks)}, from {min(ranks)} to {max(ranks)}"
    )
    return "\n".join(lines)


def planted_table(results: dict) -> str:
    m = results["metrics"]
    rows = [
        f"  any fixed rank {results['rank']} (bound)   {m['even_rank_bound']:.4f}",
        f"  ElaLoRA                  {m['residual']:.4f}   {m['gap_closed']:.1%} of the gap closed",
        f"  best possible            {m['best_possible']:.4f}",
        "  matrix                       planted   found, mean over the layers (min-max)",
    ]
    for matrix, planted in MATRICES:
        found = [rank for name, rank in results["ranks"].items() if re.search(rf"\.\d+\.{re.escape(matrix)}$", name)]
        rows.append(f"  {matrix:<28} {planted:>7}   {statistics.fmean(found):.2f} ({min(found)}-{max(found)})")
    return "\n".join(rows)


def summarize(all_results: list[dict]) -> str:
    """Mean and standard deviation of the last epoch over the seeds of every rank."""
    lines = []
    for rank in dict.fromkeys(r["rank"] for r in all_results):
        runs = [r["metrics"] for r in all_results if r["rank"] == rank]
        for metric in runs[0] if len(runs) > 1 else ():
            values = [run[metric] for run in runs]
            mean, std = statistics.fmean(values), statistics.stdev(values)
            lines.append(f"rank {rank}, {metric}: {mean:.4f} +- {std:.4f} (last epoch, {len(runs)} seeds)")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--task", choices=RECIPES, default="planted", help="what to train on")
    parser.add_argument("--rank", type=positive, nargs="+", default=[4], help="average rank(s) of a matrix")
    parser.add_argument("--seeds", type=natural, nargs="+", default=[0], help="one run for each")
    parser.add_argument("--model", default=DEBERTA, help="hub id or folder of the pre-trained encoder")
    parser.add_argument("--data-dir", help="folder of GLUE in the classic TSV layout (MRPC/train.tsv ...) "
                        f"instead of {HUB_DATASET} from the hub")  # fmt: skip
    parser.add_argument("--epochs", type=positive, help="instead of Table 7's; the phases shrink or grow along")
    parser.add_argument("--schedule", choices=elalora.SHAPES, default="cubic", help="shape of b^(t) (eq. 5: cubic)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16: by autocast")
    parser.add_argument("--output-dir", default="runs", help="where the folders of the runs go")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def natural(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def finished(args: argparse.Namespace, rank: int, seed: int) -> dict | None:
    """The results of a run that is complete; InputError where they came of other arguments."""
    path = Path(args.output_dir) / run_name(args, rank, seed) / "results.json"
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    wanted = run_arguments(args, rank, seed)
    if other := [name for name in wanted if results["arguments"].get(name) != wanted[name]]:
        name = other[0]
        raise InputError(
            f"{path.parent} holds a run with --{name.replace('_', '-')} {results['arguments'].get(name)}, not "
            f"{wanted[name]}: take another --output-dir"
        )
    return results


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    recipe = RECIPES[args.task]
    if args.epochs is not None:
        recipe = recipe.scaled_to(args.epochs)
    if args.task != "planted":
        check_files(args.task, args.data_dir, args.model)
    runs = [(rank, seed) for rank in args.rank for seed in args.seeds]
    known = {(rank, seed): finished(args, rank, seed) for rank, seed in runs}
    for rank in args.rank:
        if rank != (row := nearest_row(rank)) and args.task != "planted":
            print(f"Table 7 has no rank {rank}: b and k are those of rank {row}")
    results = []
    for rank, seed in runs:
        folder = Path(args.output_dir) / run_name(args, rank, seed)
        if known[rank, seed]:
            print(f"{folder} is finished already")
        results.append(known[rank, seed] or run(args, recipe, rank, seed))
        print(f"{describe(results[-1])}\n  written: {folder}/", flush=True)
    if summary := summarize(results):
        print(summary)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
