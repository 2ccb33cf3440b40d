"""Runs ElaLoRA, or a method to compare it with, on a problem whose answer is known, or on GLUE.

    python reproduce.py                        # planted ranks: no network, a minute on two cores
    python reproduce.py --task mrpc --rank 4   # DeBERTaV3-base on MRPC, on Table 7's schedule
    python reproduce.py --method elalora lora adalora --seeds 0 1 2 3 4   # ends in a table
    torchrun --nproc-per-node 2 reproduce.py --task mrpc   # the same batches, shared by two GPUs
    python reproduce.py --benchmark            # the cost of a step, beside PEFT's LoRA and AdaLoRA

A run writes OUTPUT_DIR/TASK-METHOD-rRANK-sSEED/: results.json, ranks.png, importance.png, peft/,
adapter.safetensors; and checkpoint.pt after every epoch, for --resume. All runs of a task in
OUTPUT_DIR are compared in table.md and scores.png. Tables, figures, equations: arXiv:2504.00254.
Where it is silent: the learning rate rises for 10% of the run and falls to 0, linearly; gradients
clipped to norm 1; no weight decay; at most 256 tokens; the model's own dropout.
"""

import csv
import ctypes
import functools
import itertools
import json
import math
import os
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawTextHelpFormatter
from collections import namedtuple
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas
import torch
import torch.utils.benchmark
import tqdm
import transformers
from matplotlib import colormaps
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

import elalora

DEBERTA, GLUE = "microsoft/deberta-v3-base", "nyu-mll/glue"
MAX_TOKENS = 256
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROCESS, PROCESSES = 0, 1  # this one's number, and how many share every batch
if distributed.is_torchelastic_launched():  # by torchrun
    PROCESS, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


# ---- Table 7, and ElaLoRA's row of Table 2 in percent ----
METHODS = ("elalora", "svd", "final", "shuffled", "lora", "adalora")
RANKS = (2, 4, 10)  # at which b, k and the paper's results are given
Recipe = namedtuple(
    "Recipe", "batch_size learning_rate epochs warmup stabilize interval b k paper "
    "alpha gamma beta1 beta2 lambda_rate init_ratio shape lr_scheduler moments",
    defaults=(16.0, 0.1, 0.85, 0.85,  # gamma: the weight of the penalty
              1.0,  # the learning rate of singular values / that of the rest
              1.5,  # AdaLoRA's first rank / its last
              "cubic", "linear",
              "kept"))  # Adam's, at an adjustment
WORDS = dict(shape=(*elalora.SHAPES,), lr_scheduler=("linear", "cosine", "constant_with_warmup"),
             moments=("kept", "dropped", "mean"))
SETTINGS = [name for name in Recipe._fields if name not in ("epochs", "paper")]
RECIPES = {
    "mnli": Recipe(64, 5e-4, 5, 5000, 10000, 500, (1, 2, 4), (1, 1, 2), (89.32, 89.44, 89.51)),
    "sst2": Recipe(64, 8e-4, 20, 3000, 10000, 500, (1, 2, 4), (1, 1, 2), (95.53, 95.64, 95.87)),
    "cola": Recipe(64, 8e-4, 20, 300, 1500, 50, (1, 2, 4), (1, 1, 2), (67.38, 70.15, 70.19)),
    "qqp": Recipe(128, 4e-4, 5, 3000, 5000, 100, (1, 2, 4), (1, 1, 2), (91.21, 91.26, 91.42)),
    "qnli": Recipe(64, 5e-4, 5, 2000, 2000, 200, (1, 2, 4), (1, 1, 2), (93.70, 94.44, 94.36)),
    "rte": Recipe(64, 1.2e-3, 50, 300, 500, 50, (1, 4, 8), (1, 2, 4), (85.92, 87.36, 88.81)),
    "mrpc": Recipe(64, 5e-4, 30, 300, 400, 50, (2, 2, 4), (1, 1, 2), (90.44, 90.44, 88.98)),
    "stsb": Recipe(64, 5e-3, 25, 300, 300, 150, (3, 4, 8), (1, 2, 4), (90.61, 91.10, 91.59)),
    "planted": Recipe(32, 2e-2, 10, 100, 300, 20, (6, 6, 6), (1, 1, 1), None),  # ours
}


def recipe_of(config: Namespace) -> Recipe:
    """Table 7's row, its phases as the same shares of other epochs, b and k of the nearest rank."""
    table, epochs = RECIPES[config.task], config.epochs or RECIPES[config.task].epochs
    column = min(range(3), key=lambda i: abs(RANKS[i] - config.rank))  # the first of two as near
    phases = {name: max(1, getattr(table, name) * epochs // table.epochs)
              for name in ("warmup", "stabilize", "interval")}
    recipe = table._replace(epochs=epochs, b=table.b[column], k=table.k[column], **phases)
    for setting in config.set:
        name, _, text = setting.partition("=")
        try:
            if name not in SETTINGS:
                raise ValueError
            value = type(getattr(recipe, name))(text)
            if name in WORDS:
                allowed = value in WORDS[name]
            else:
                zero = value == 0 and name in ("warmup", "stabilize", "b", "gamma")
                allowed = zero or 0 < value < (1 if name in ("beta1", "beta2") else math.inf)
            if not allowed:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"--set {setting}: takes NAME=VALUE, like {recipe}; 0 for phases, b and gamma at "
                f"least, betas below 1; words: {WORDS}") from None
        recipe = recipe._replace(**{name: value})
    return recipe


def seed_of(config: Namespace, epoch: int) -> int:
    """Every epoch starts from its own random state, so a resumed run needs no other."""
    return 100_003 * config.seed + epoch


def chosen(matrices: list[str], config: Namespace) -> list[str]:
    """Those that --targets names, by the ends of their names."""
    for target in config.targets:
        if not any(name.endswith(target) for name in matrices):
            raise ValueError(f"--targets {target}: none of {', '.join(matrices[-6:])} ends so")
    return [name for name in matrices if name.endswith(tuple(config.targets))]


@dataclass
class Problem:
    """What training needs to know of a task; a batch is what batches yields and loss takes."""
    model: nn.Module
    targets: list[str]  # modules to adapt
    heads: list[str]  # modules to train in full
    steps_per_epoch: int
    batches: Callable[[int], Iterable]  # of an epoch
    loss: Callable[[nn.Module, object], Tensor] = lambda model, batch: model(**batch).loss
    evaluate: Callable[[], dict[str, float]] = dict
    baseline: dict[str, float] = field(default_factory=dict)  # the metrics of the majority class
    penalty: Callable[[], Tensor] | None = None


# ---- The planted problem ----
WIDTH, STEPS_PER_EPOCH = 64, 100
MATRICES = {  # of a DeBERTa layer, and the rank planted in each
    "attention.self.query_proj": 2, "attention.self.key_proj": 2, "attention.self.value_proj": 4,
    "attention.output.dense": 4, "intermediate.dense": 12, "output.dense": 0,
}
PLANTED = {f"deberta.encoder.layer.{i}.{m}": r for i in range(12) for m, r in MATRICES.items()}


def planted_bounds(rank: int, names: Iterable[str]) -> tuple[float, float]:
    """Least residuals (Eckart-Young), where only matrices of these names are adapted: of `rank`
    in each of them, and of any ranks >= 1 of the same sum."""
    squares = {name: torch.linspace(1, 0.5, r).square() for name, r in PLANTED.items()}
    total = sum(s.sum() for s in squares.values())
    adapted = [squares.pop(name) for name in names]
    beyond_first = torch.cat([s[1:] for s in adapted]).sort(descending=True).values
    best = beyond_first[(rank - 1) * len(adapted) :].sum()
    even, rest = sum(s[rank:].sum() for s in adapted), sum(s.sum() for s in squares.values())
    return float((even + rest) / total), float((best + rest) / total)


def planted_problem(config: Namespace, recipe: Recipe) -> Problem:
    """72 frozen random W0, each to regress W0 + Delta*, of known rank, from Gaussian inputs."""
    if not 1 < config.rank < max(PLANTED.values()):
        raise ValueError(f"--rank {config.rank}: 2 to 11 leave a choice of where to put the ranks")
    targets = chosen([*PLANTED], config)
    even, best = planted_bounds(config.rank, targets)
    model, deltas = nn.Module(), []
    for name, r in PLANTED.items():
        (*path, last), parent = name.split("."), model
        for part in path:
            parent = parent._modules.setdefault(part, nn.Module())
        parent.add_module(last, nn.Linear(WIDTH, WIDTH, bias=False))
        U, V = (nn.init.orthogonal_(torch.empty(WIDTH, max(r, 1)))[:, :r] for _ in range(2))
        deltas.append(U * torch.linspace(1, 0.5, r) @ V.T)
    model.to(DEVICE)
    delta = torch.stack(deltas).to(DEVICE)  # (72, 64, 64)
    target = delta + torch.stack([model.get_submodule(name).weight.data for name in PLANTED])

    def batches(epoch: int) -> Iterable[dict]:
        generator = torch.Generator().manual_seed(seed_of(config, epoch))
        for _ in range(STEPS_PER_EPOCH):
            x = torch.randn(recipe.batch_size, WIDTH, generator=generator)
            yield dict(x=x[PROCESS::PROCESSES].to(DEVICE))

    def forward(x: Tensor) -> Namespace:
        outputs = torch.stack([model.get_submodule(name)(x) for name in PLANTED])
        return Namespace(loss=(outputs - x @ target.mT).square().sum(dim=-1).mean())

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        identity = torch.eye(WIDTH, device=DEVICE)  # a layer's output is (W0 + its update)'
        learned = torch.stack([model.get_submodule(name)(identity).T for name in PLANTED])
        residual = float((learned - target).square().sum() / delta.square().sum())
        gap = even - best
        return dict(residual=residual, even_rank_bound=even, best_possible=best) | (
            dict(gap_closed=(even - residual) / gap) if gap > 1e-6 else {})

    model.forward = forward
    return Problem(model, targets, [], STEPS_PER_EPOCH, batches, evaluate=evaluate)


# ---- GLUE ----
# Columns on the hub and in the classic TSV files; labels as in the TSV, in the hub's order, () for
# numbers; splits (name on the hub, stem of the TSV), dev last; the header of a TSV that has none.
SPLITS = (("train", "train"), ("validation", "dev"))
MNLI_SPLITS = SPLITS[:1] + tuple((f"validation_{m}", f"dev_{m}") for m in ("matched", "mismatched"))
Task = namedtuple("Task", "folder texts tsv_texts tsv_label labels metrics splits header",
                  defaults=(("0", "1"), ("accuracy",), SPLITS, None))
PAIR, NLI = ("sentence1", "sentence2"), ("entailment", "not_entailment")
TASKS = {
    "mnli": Task("MNLI", ("premise", "hypothesis"), PAIR, "gold_label",
                 ("entailment", "neutral", "contradiction"), splits=MNLI_SPLITS),
    "sst2": Task("SST-2", ("sentence",), ("sentence",), "label"),
    "cola": Task("CoLA", ("sentence",), ("sentence",), "label", metrics=("matthews",),
                 header=("source", "label", "star", "sentence")),
    "qqp": Task("QQP", ("question1", "question2"), ("question1", "question2"), "is_duplicate",
                metrics=("accuracy", "f1")),
    "qnli": Task("QNLI", ("question", "sentence"), ("question", "sentence"), "label", NLI),
    "rte": Task("RTE", PAIR, PAIR, "label", NLI),
    "mrpc": Task("MRPC", PAIR, ("#1 String", "#2 String"), "Quality", metrics=("accuracy", "f1")),
    "stsb": Task("STS-B", PAIR, PAIR, "score", (), ("pearson", "spearman")),
}


def read_label(text: str, task: Task) -> float:
    if text in task.labels:
        return task.labels.index(text)
    if task.labels or not math.isfinite(float(text)):
        raise ValueError(f"the label is {text!r}, not {' or '.join(task.labels) or 'a number'}")
    return float(text)


def read_tsv(path: Path, task: Task) -> tuple[list[list[str]], list[float]]:
    """One list of texts per column, and the labels, of a file in GLUE's classic layout."""
    texts, labels = [[] for _ in task.tsv_texts], []
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        rows = csv.DictReader(file, task.header, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            header = list(rows.fieldnames or [])
            if missing := {*task.tsv_texts, task.tsv_label} - {*header}:
                raise ValueError(f"no column {min(missing)!r} in its header {header}")
            for row in rows:
                if None in row or None in row.values():
                    raise ValueError(f"more or fewer than {len(header)} columns")
                labels.append(read_label(row[task.tsv_label], task))
                for column, name in zip(texts, task.tsv_texts):
                    column.append(row[name])
        except (ValueError, csv.Error) as error:  # also of bytes that are not UTF-8
            raise ValueError(f"{path}, line {rows.line_num}: {error}") from None
    if not labels:
        raise ValueError(f"{path}: no examples")
    return texts, labels


def pretrained(auto: type, model: str, **arguments):
    """from_pretrained, with an error that names the model."""
    try:
        return auto.from_pretrained(model, **arguments)
    except Exception as error:  # broken files raise all kinds
        if isinstance(error, OSError) and error.errno is None:
            raise  # transformers names what it did not find
        raise ValueError(f"--model: {model} cannot be loaded, {type(error).__name__}: "
                         f"{str(error).strip()}") from None


def character_map(tokenizer: transformers.PreTrainedTokenizerBase) -> Callable[[str], str]:
    """SentencePiece's own normalization, which transformers 5 leaves out of DebertaV2Tokenizer."""
    file = str(getattr(tokenizer, "vocab_file", None))
    if not file.endswith("spm.model"):
        return str
    import sentencepiece
    spaces = ("add_dummy_prefix", "escape_whitespaces", "remove_extra_whitespaces")  # left to it
    return sentencepiece.SentencePieceNormalizer(file, **dict.fromkeys(spaces, False)).normalize


@functools.cache
def load_examples(name: str, data_dir: str | None, model: str) -> tuple[Callable, list[list[dict]]]:
    """What pads a batch, and the tokenized examples of the training and dev splits."""
    task = TASKS[name]
    if data_dir:
        folder = Path(data_dir, task.folder)
        splits = [read_tsv(folder / f"{stem}.tsv", task) for _, stem in task.splits]
    else:
        import datasets  # here, like the metrics' packages, as planted runs need none of them
        hub = datasets.load_dataset(GLUE, name)
        splits = [([list(hub[split][column]) for column in task.texts], list(hub[split]["label"]))
                  for split, _ in task.splits]
    tokenizer, examples = pretrained(transformers.AutoTokenizer, model), []
    if tokenizer.pad_token is None:
        raise ValueError(f"--model: the tokenizer of {model} has no pad token, which batches need")
    mapped = character_map(tokenizer)
    for texts, labels in splits:
        texts = [[mapped(text) for text in column] for column in texts]
        encoding = tokenizer(*texts, truncation=True, max_length=MAX_TOKENS)
        columns = {**encoding, "labels": labels}
        examples.append([dict(zip(columns, row)) for row in zip(*columns.values())])
    return transformers.DataCollatorWithPadding(tokenizer), examples


def compute_metrics(names: Iterable[str], predicted: list, labels: list) -> dict[str, float]:
    """GLUE's metrics; a correlation with a constant counts as 0."""
    import scipy.stats, sklearn.metrics
    compute = {
        "accuracy": sklearn.metrics.accuracy_score,
        "f1": sklearn.metrics.f1_score,
        "matthews": sklearn.metrics.matthews_corrcoef,
        "pearson": lambda x, y: scipy.stats.pearsonr(x, y).statistic if len({*y}) > 1 else 0,
        "spearman": lambda x, y: scipy.stats.spearmanr(x, y).statistic if len({*y}) > 1 else 0,
    }
    return {name: float(compute[name](labels, predicted)) for name in names}


def load_model(config: Namespace, num_labels: int) -> tuple[nn.Module, list[str], list[str]]:
    """An encoder with a new head; the names of the matrices to adapt (Figure 2), of the head."""
    if config.model:
        model = pretrained(
            transformers.AutoModelForSequenceClassification, config.model, num_labels=num_labels,
            dtype=torch.float32)  # not the checkpoint's: DeBERTaV3's float16 is NaN after a step
    else:  # DeBERTaV3-base with random weights, for the benchmark
        model = transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            relative_attention=True, position_buckets=256, pos_att_type=["p2c", "c2p"],
            share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False))
    names = [name for name, _ in model.named_modules()]
    heads = [h for h in ("pooler", "classifier") if any(f".{n}".endswith(f".{h}") for n in names)]
    for attention in (["query_proj", "key_proj", "value_proj"], ["query", "key", "value"]):
        kinds = [f".{kind}" for kind in (*attention, "intermediate.dense", "output.dense")]
        if all(any(name.endswith(kind) for name in names) for kind in kinds):
            targets = chosen([name for name in names if name.endswith(tuple(kinds))], config)
            return model.to(DEVICE), targets, heads
    raise ValueError(f"--model: {config.model} is not built like DeBERTa, BERT or RoBERTa")


def glue_problem(config: Namespace, recipe: Recipe) -> Problem:
    """A GLUE task for a pre-trained encoder."""
    task = TASKS[config.task]
    pad, (train, *devs) = load_examples(config.task, config.data_dir, config.model)
    if config.holdout:  # for choosing settings, a tenth of the training split is the dev set
        rows = random.Random(0).sample(train, len(train))
        train, devs = rows[len(rows) // 10 :], [rows[: len(rows) // 10]]
    model, targets, heads = load_model(config, len(task.labels) or 1)
    autocast = functools.partial(torch.autocast, DEVICE, torch.bfloat16, config.dtype == "bfloat16")
    loader, batch_size = torch.utils.data.DataLoader, recipe.batch_size // PROCESSES

    def by_length(rows: list) -> list:
        # On a CPU, four parts of like length need less padding, so less time, for the same loss.
        rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        size = math.ceil(len(rows) / (4 if DEVICE == "cpu" else 1))
        return [pad(rows[i : i + size]) for i in range(0, len(rows), size)]

    def batches(epoch: int) -> Iterable:
        shard = torch.utils.data.DistributedSampler(
            train, PROCESSES, PROCESS, seed=seed_of(config, epoch))  # one process has all of them
        return loader(train, batch_size, sampler=shard, collate_fn=by_length)

    def loss(model: nn.Module, parts: list) -> Tensor:
        sizes = [len(part["labels"]) for part in parts]
        with autocast():
            losses = [model(**part.to(DEVICE)).loss * size for part, size in zip(parts, sizes)]
        return sum(losses) / sum(sizes)

    @torch.no_grad()
    def evaluate(constant: float | None = None) -> dict[str, float]:
        scores = {}
        for split, suffix in zip(devs, ("", "_mm")):
            predicted, labels = [constant] * len(split), [row["labels"] for row in split]
            if constant is None:
                with autocast():
                    logits = torch.cat([model(**batch.to(DEVICE)).logits.float()
                                        for batch in loader(split, batch_size, collate_fn=pad)])
                predicted = (logits.argmax(dim=-1) if task.labels else logits.squeeze(-1)).tolist()
            for name, value in compute_metrics(task.metrics, predicted, labels).items():
                scores[f"{name}{suffix}"] = value
        return scores

    majority = evaluate(statistics.mode(row["labels"] for row in train))
    steps = math.ceil(len(train) / recipe.batch_size)
    return Problem(model, targets, heads, steps, batches, loss, evaluate, majority)


# ---- One run ----
def mean_of_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, the same bits in each."""
    if PROCESSES > 1:
        distributed.all_reduce(x)
    return x / PROCESSES


def check_alike(model: nn.Module) -> None:
    """Compares the bits of every trained weight, summed up, between the processes."""
    if PROCESSES > 1:
        sums = [w.detach().view(torch.int32).sum() + w.numel() for w in trained(model).values()]
        own = torch.stack([*sums, *(-x for x in sums)])
        distributed.all_reduce(highest := own.clone(), distributed.ReduceOp.MAX)
        if not torch.equal(own, highest):  # equal, x is the highest, and -x, so x is the lowest too
            raise RuntimeError("the weights of the processes differ, they train different models")


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes under a temporary name, to the disk, and only then gives it the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp-{path.name}")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: w for name, w in model.named_parameters() if w.requires_grad}


def restore(path: Path, config: Namespace, model: nn.Module, parts: dict) -> dict:
    """Loads a checkpoint, returns its log. ValueError if it is broken or not of this run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        check_arguments(saved["arguments"], config)
        if wrong := saved["trained"].keys() ^ trained(model).keys():
            raise ValueError(f"missing or unknown: {min(wrong)}")
        model.load_state_dict(saved["trained"], strict=False)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        return saved["log"]
    except Exception as error:  # a broken file makes torch.load raise all kinds
        raise ValueError(f"{path} is no checkpoint of this run, delete it to start anew "
                         f"({type(error).__name__}: {error})") from None


class Baseline:
    """PEFT's LoRA, its AdaLoRA, or a frozen model's passes alone."""
    def __init__(self, config: Namespace, problem: Problem, recipe: Recipe,
                 schedule: elalora.RankSchedule):
        import peft
        self.schedule, self.t, self.tuner = schedule, 0, None
        names = dict(target_modules=problem.targets, modules_to_save=problem.heads)
        if config.method == "frozen":  # the floor: from the embeddings to the loss, and back
            for name, w in problem.model.named_parameters():
                w.requires_grad_(not {*name.split(".")}.isdisjoint(problem.heads))
            problem.model.get_input_embeddings().register_forward_hook(
                lambda module, inputs, output: output.requires_grad_())
            return
        r, start = config.rank, max(config.rank + 1, int(config.rank * recipe.init_ratio))
        settings = peft.LoraConfig(r=r, lora_alpha=recipe.alpha, **names)
        if config.method == "adalora":  # PEFT divides alpha by init_r
            settings = peft.AdaLoraConfig(
                init_r=start, target_r=r, lora_alpha=recipe.alpha * start / r,
                orth_reg_weight=recipe.gamma, beta1=recipe.beta1, beta2=recipe.beta2,
                tinit=schedule.warmup_steps, tfinal=schedule.stabilize_steps,
                deltaT=schedule.adjust_interval, total_step=schedule.total_steps, **names)
        self.adapted = peft.get_peft_model(problem.model, settings)
        self.layers = {n: m for n, m in problem.model.named_modules() if hasattr(m, "lora_A")}
        self.tuner = getattr(self.adapted.base_model, "rankallocator", None)
        if self.tuner:
            self.tuner.reset_ipt = lambda: None  # the last scores are kept, as ElaLoRA's are
            problem.penalty = lambda: recipe.gamma * self.penalty()

    def step(self) -> None:
        self.t += 1
        if self.tuner:
            self.adapted.base_model.update_and_allocate(self.t)

    def penalty(self) -> Tensor:
        """AdaLoRA's. PEFT's model would add it to the loss of every part of a batch, in bfloat16
        under autocast."""
        factors = [factor for layer in self.layers.values()
                   for factor in (layer.lora_A["default"], layer.lora_B["default"].T)]
        norms = [(X @ X.T - torch.eye(len(X), device=DEVICE)).norm() for X in factors]
        return sum(norms) / len(norms)

    @property
    def averages(self) -> dict[str, dict[str, Tensor]]:
        names = ("ipt", "exp_avg_ipt", "exp_avg_unc") if self.tuner else ()
        return {name: getattr(self.tuner, name) for name in names}

    @property
    def kept(self) -> dict[str, list[bool]]:
        """Which ranks AdaLoRA has not pruned so far; all of LoRA's."""
        pattern = self.adapted.peft_config["default"].rank_pattern or {}
        return {name: pattern.get(f"{name}.lora_E.default", [True] * layer.r["default"])
                for name, layer in self.layers.items()}

    def ranks(self) -> dict[str, int]:
        return {name: sum(kept) for name, kept in self.kept.items()}

    def importance(self) -> dict[str, Tensor]:
        """AdaLoRA's scores of the ranks that it kept, which are those of eq. 2 and 3."""
        s = getattr(self.tuner, "_element_score", None)
        return {n: (s(f"{n}.lora_E.default")[:, 0] + s(f"{n}.lora_A.default").mean(dim=1)
                    + s(f"{n}.lora_B.default").mean(dim=0))[torch.tensor(kept, device=DEVICE)]
                for n, kept in self.kept.items() if s}

    def state_dict(self) -> dict:
        pattern = self.adapted.peft_config["default"].rank_pattern
        return dict(step=self.t, averages=self.averages, rank_pattern=pattern)

    def load_state_dict(self, state: dict) -> None:
        self.t = state["step"]
        self.adapted.peft_config["default"].rank_pattern = state["rank_pattern"]
        for key, values in state["averages"].items():
            setattr(self.tuner, key, {name: value.to(DEVICE) for name, value in values.items()})


def prepare(problem: Problem, config: Namespace, recipe: Recipe, ranks: dict | None = None) -> dict:
    """Adapts the model; its optimizer, learning rate and allocator."""
    total = recipe.epochs * problem.steps_per_epoch
    b = recipe.b if config.method == "elalora" else 0
    schedule = elalora.RankSchedule(
        total, recipe.warmup, recipe.stabilize, recipe.interval, b, recipe.shape)
    if baseline := config.method in ("lora", "adalora", "frozen"):
        allocator = Baseline(config, problem, recipe, schedule)
    else:
        elalora.inject(problem.model, problem.targets, ranks or config.rank, recipe.alpha, 0,
                       problem.heads)
        problem.penalty = lambda: recipe.gamma * elalora.orthogonality_penalty(problem.model)
    groups = {1: [], recipe.lambda_rate: []}  # of singular values, AdaLoRA's as well
    for name, w in trained(problem.model).items():
        times = recipe.lambda_rate if name.endswith((".Lambda", ".lora_E.default")) else 1
        groups[times].append(w)
    optimizer = torch.optim.AdamW(
        [dict(params=group, lr=times * recipe.learning_rate) for times, group in groups.items()],
        weight_decay=0.0, foreach=True)
    rate = transformers.get_scheduler(recipe.lr_scheduler, optimizer, total // 10, total)
    if not baseline:
        allocator = elalora.RankAllocator(problem.model, optimizer, schedule, recipe.k,
                                          recipe.beta1, recipe.beta2, config.seed)
    return dict(optimizer=optimizer, rate=rate, allocator=allocator)


@torch.no_grad()
def replace_moments(optimizer: torch.optim.Optimizer, layers: dict[str, nn.Module],
                    adjustment: elalora.Adjustment, how: str) -> None:
    """What could be done instead with Adam's state: drop all of it, as the released code does, or
    start a new rank at the mean second moments of its matrix."""
    if how == "dropped":
        optimizer.state.clear()
    elif how == "mean":
        for name, n in adjustment.expanded.items():  # new ranks come last
            for factor, dim in elalora.RANK_DIM.items():
                squares = optimizer.state[getattr(layers[name], factor)]["exp_avg_sq"]
                old, new = squares.split([squares.shape[dim] - n, n], dim)
                new.copy_(old.mean(dim, keepdim=True))


def train_step(problem: Problem, batch: object, optimizer: torch.optim.Optimizer, rate,
               allocator: elalora.RankAllocator | Baseline,
               lap: Callable[[str], object] = str) -> tuple[Tensor, elalora.Adjustment | None]:
    """What Algorithm 1 repeats; lap is told of the end of each part."""
    weights = [w for group in optimizer.param_groups for w in group["params"]]
    loss = problem.loss(problem.model, batch)
    loss.backward()
    lap("passes")
    if problem.penalty:
        problem.penalty().backward()
    lap("penalty")
    if PROCESSES > 1:  # in one message; DistributedDataParallel cannot follow the adjustments
        gradients = [w.grad for w in weights if w.grad is not None]
        mean = mean_of_processes(nn.utils.parameters_to_vector(gradients))
        nn.utils.vector_to_parameters(mean, gradients)
    nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    rate.step()
    lap("optimizer")
    adjustment = allocator.step()  # Algorithm 1
    lap("allocator")
    optimizer.zero_grad()
    lap("zero_grad")
    return loss.detach(), adjustment


def train(problem: Problem, config: Namespace, recipe: Recipe, ranks: dict | None,
          checkpoint: Path) -> tuple:
    """All epochs, or those after the checkpoint; returns the allocator and the log."""
    parts = prepare(problem, config, recipe, ranks)
    allocator, log = parts["allocator"], dict(seconds=0.0, history=[], adjustments=[], scores={})
    if checkpoint.exists():
        log = restore(checkpoint, config, problem.model, parts)
    started, schedule = time.time() - log["seconds"], allocator.schedule
    with tqdm.tqdm(desc=f"{config.task} {config.method} {config.seed}", initial=allocator.t,
                   total=schedule.total_steps, mininterval=1, disable=PROCESS > 0) as bar:
        for epoch in range(len(log["history"]) + 1, recipe.epochs + 1):
            torch.manual_seed(seed_of(config, epoch) * PROCESSES + PROCESS)  # for dropout
            problem.model.train()
            losses = []
            for batch in problem.batches(epoch):
                loss, adjustment = train_step(problem, batch, **parts)
                losses.append(value := loss.item())
                if not math.isfinite(value):
                    raise ValueError(
                        f"loss {value} at step {allocator.t}: try float32 or another seed")
                if adjustment:
                    check_alike(problem.model)
                    replace_moments(
                        parts["optimizer"], allocator.layers, adjustment, recipe.moments)
                    log["adjustments"].append(asdict(adjustment))
                if allocator.t in (schedule.warmup_steps, schedule.search_end):
                    scores = itertools.chain(*allocator.importance().values())
                    log["scores"][allocator.t] = [float(f"{S:.3g}") for S in scores]
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                bar.update()
            check_alike(problem.model)
            problem.model.eval()
            train_loss = mean_of_processes(torch.tensor(statistics.fmean(losses), device=DEVICE))
            log["history"].append(
                dict(epoch=epoch, train_loss=float(train_loss), metrics=problem.evaluate()))
            log["seconds"] = time.time() - started
            if PROCESS == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= dict(arguments=vars(config), trained=trained(problem.model), log=log)
                replace(checkpoint, lambda path: torch.save(state, path))
    return allocator, log


def versions() -> dict[str, str]:
    hardware = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    return {package: version(package) for package in ("torch", "transformers", "peft")} | {
        "hardware": f"{hardware}, {torch.get_num_threads()} threads"}


def label(config: Namespace) -> str:
    """What tells a run from others, but for the seed, in folders and tables."""
    parts = [config.method, f"r{config.rank}", "+".join(config.targets), *config.set]
    return "-".join(filter(None, parts))


def folder_name(config: Namespace) -> str:
    return f"{config.task}-{label(config)}-s{config.seed}"


def rank_map(config: Namespace, folder: Path) -> dict[str, int] | None:
    """The ranks with which the ElaLoRA run beside this one ended, or those shuffled."""
    if config.method not in ("final", "shuffled"):
        return None
    source = Namespace(**vars(config) | dict(method="elalora"))
    if not (results := earlier(source, path := folder.with_name(folder_name(source)), False)):
        raise ValueError(f"--method {config.method} takes the ranks of {path}: run elalora first")
    ranks = results["ranks"]
    if config.method == "shuffled":
        values = random.Random(config.seed).sample([*ranks.values()], len(ranks))
        ranks = dict(zip(ranks, values))
    return ranks


def run(config: Namespace, folder: Path) -> dict:
    """Trains once, writes the run's folder and returns what is in its results.json."""
    recipe, ranks = recipe_of(config), rank_map(config, folder)
    transformers.set_seed(config.seed)
    problem = (planted_problem if config.task == "planted" else glue_problem)(config, recipe)
    allocator, log = train(problem, config, recipe, ranks, folder / "checkpoint.pt")
    ranks, layers = allocator.ranks(), allocator.layers
    weights = {name: sum(layer.base_layer.weight.shape) + (config.method != "lora")
               for name, layer in layers.items()}  # of a rank: its vectors, its singular value
    results = dict(
        task=config.task, method=config.method, rank=config.rank, seed=config.seed,
        metrics=log["history"][-1]["metrics"], baseline=problem.baseline,
        adapter_parameters=sum(r * weights[name] for name, r in ranks.items()),
        trainable_parameters=sum(w.numel() for w in trained(problem.model).values()),
        total_steps=allocator.t, seconds=round(log["seconds"], 1),
        command=shlex.join(["python", "reproduce.py", *sys.argv[1:]]),
        arguments=vars(config), recipe=recipe._asdict(), versions=versions(),
        ranks=ranks, history=log["history"], adjustments=log["adjustments"], scores=log["scores"])
    if PROCESS == 0:
        if isinstance(allocator, Baseline):
            allocator.adapted.save_pretrained(folder / "peft")
        else:
            elalora.export_peft(problem.model, folder / "peft", config.model or "planted")
            adapter = elalora.adapter_state_dict(problem.model)
            replace(folder / "adapter.safetensors", lambda path: save_file(adapter, path))
        maps = {"planted": PLANTED} if config.task == "planted" else {}
        scores = {f"after step {step}": S for step, S in log["scores"].items()}
        replace(folder / "ranks.png", lambda path: plot_ranks(maps | {"found": ranks}, path))
        replace(folder / "importance.png", lambda path: plot_scores(scores, path))
        text = json.dumps(results, indent=1)  # comes last: it marks the run as finished
        replace(folder / "results.json", lambda path: path.write_text(text))
        (folder / "checkpoint.pt").unlink()
    return results


def grid(ranks: dict[str, int]) -> pandas.DataFrame:
    """A row for every matrix of a layer, a column for every layer."""
    cells = {re.search(r"\.(\d+)\.(.+)", name).groups(): rank for name, rank in ranks.items()}
    return pandas.Series(cells).unstack(0, sort=False)


def plot_ranks(panels: dict[str, dict[str, int]], path: Path) -> None:
    """Heatmaps of layers and matrices, as Figure 2."""
    import seaborn
    figure = Figure(figsize=(7.5 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    highest = max(max(ranks.values()) for ranks in panels.values())
    for axis, (title, ranks) in zip(axes, panels.items()):
        seaborn.heatmap(grid(ranks), annot=True, cmap="Blues", vmin=0, vmax=highest, cbar=False,
                        ax=axis)
        axis.set(xlabel="layer", title=f"ranks {title}, total {sum(ranks.values())}")
    figure.savefig(path, dpi=110)


def log_scores(S: list[float]) -> pandas.Series:
    """log10, of 0 -20."""
    return np.log10(pandas.Series(S, dtype=float).clip(lower=1e-20))


def plot_scores(scores: dict[str, list[float]], path: Path) -> None:
    """How the importance scores of all ranks are distributed (Figure 5), cumulatively."""
    size = (6, 3.2 + 0.25 * len(scores))  # the legend has a line for each
    axis = (figure := Figure(figsize=size, layout="constrained")).subplots()
    axis.set_prop_cycle(color=colormaps["tab20"].colors)
    for name, S in scores.items():
        if S:  # LoRA has none
            axis.ecdf(log_scores(S), label=name)
    if axis.lines:
        figure.legend(loc="outside upper center")
    axis.set(xlabel="log10 of the importance score S (of 0: -20)", ylabel="share of the ranks")
    figure.savefig(path, dpi=110, bbox_inches="tight")  # with all of a wide legend


# ---- The benchmark ----
ROUNDS, INTERVAL, TEXTS, TOKENS = 40, 5, 8, 128
TIMED = Recipe(TEXTS, 1e-4, 1, 0, 0, INTERVAL, 4, 1, None, shape="constant")


def memory_rise(part: Callable[[], object]) -> float:
    """By how many bytes a call raises what is allocated on the GPU, or resident (on Linux)."""
    status, peak, reset = Path("/proc/self/status"), lambda: math.nan, lambda: None
    if DEVICE == "cuda":
        peak, reset = torch.cuda.max_memory_allocated, torch.cuda.reset_peak_memory_stats
    elif status.exists():
        peak = lambda: 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
        reset = lambda: status.with_name("clear_refs").write_text("5")
        ctypes.CDLL(None).malloc_trim(0)  # so that freed memory is not resident any more
    reset()
    before = peak()
    part()
    return peak() - before


def random_tokens(config: Namespace, recipe: Recipe) -> Problem:
    """Texts of one length for an encoder, of random weights if --model names none."""
    model, targets, heads = load_model(config, 2)
    ids = torch.randint(5, model.config.vocab_size, (ROUNDS, TEXTS, TOKENS)).to(DEVICE)
    batches = [dict(input_ids=x, labels=x[:, 0] % 2) for x in ids]
    return Problem(model, targets, heads, ROUNDS, lambda epoch: batches)


def timed_step(problem: Problem, batch: object, **parts) -> dict[str, float]:
    """train_step's parts in milliseconds, and their sum."""
    times = [("", torch.utils.benchmark.timer())]  # which waits for the GPU
    train_step(problem, batch, **parts,
               lap=lambda part: times.append((part, torch.utils.benchmark.timer())))
    spent = {part: 1000 * (end - start) for (_, start), (part, end) in itertools.pairwise(times)}
    return spent | dict(total=sum(spent.values()))


def measure(problems: dict[str, Problem], config: Namespace) -> tuple:
    """Steps of all methods in random order; medians after INTERVAL rounds, ms of steps, parts."""
    rows, parts = [], {}
    for method, problem in problems.items():
        problem.steps_per_epoch = ROUNDS
        parts[method] = prepare(problem, Namespace(**vars(config) | dict(method=method)), TIMED)
        problem.model.train()
    for step, batch in zip(tqdm.trange(1, ROUNDS + 1), itertools.cycle(problem.batches(1))):
        for method in random.sample([*problems], len(problems)):
            row = dict(method=method, step=step, moves=step % INTERVAL == 0)
            rows.append(row | timed_step(problems[method], batch, **parts[method]))
    steps = pandas.DataFrame(rows[INTERVAL * len(parts) :]).set_index(["moves", "method", "step"])
    medians = steps.groupby(["moves", "method"]).median()
    costs = medians.loc[False].assign(adjustment=medians.loc[True]["allocator"])
    for method, problem in problems.items():
        costs.loc[method, "trained"] = sum(w.numel() for w in trained(problem.model).values())
        for name, kept in (("optimizer", parts[method]["optimizer"].state),
                           ("allocator", parts[method]["allocator"].averages)):
            costs.loc[method, f"{name}_bytes"] = sum(
                x.nbytes for tensors in kept.values() for x in tensors.values() if x.ndim)
    return costs, steps.loc[False]["total"].unstack("method"), parts


def benchmark(args: Namespace) -> None:
    """What training steps cost, beside PEFT's LoRA and AdaLoRA and the frozen model's passes."""
    name = f"benchmark-{args.task}-{Path(args.model or DEBERTA).name}-r{args.rank[0]}"
    check_files(args, [folder := Path(args.output_dir, name.replace("planted", "random"))])
    config = Namespace(**vars(args) | dict(rank=args.rank[0], seed=args.seeds[0]))
    make, problems = random_tokens if args.task == "planted" else glue_problem, {}
    for method in ("elalora", "adalora", "lora", "frozen"):
        transformers.set_seed(config.seed)
        problems[method] = make(config, RECIPES[args.task])
    costs, ms, parts = measure(problems, config)
    ratios = {f"{a} / {b}": ms[a] / ms[b] for a, b in itertools.combinations(problems, 2)}
    frozen, batch = problems["frozen"], next(iter(problems["frozen"].batches(1)))
    rise = {m: memory_rise(lambda: timed_step(problems[m], batch, **parts[m])) for m in problems}
    costs["memory_bytes"] = pandas.Series(rise)
    base, merged = frozen.model, elalora.merge(problems["elalora"].model)
    ms = pandas.DataFrame(index=range(ROUNDS), columns=range(3), dtype=float)
    for row, i in ((row, i) for row in ms.index for i in random.sample(range(3), 3)):
        start, model = torch.utils.benchmark.timer(), (base, merged, base)[i].eval()
        with torch.no_grad():
            frozen.loss(model, batch)
        ms.loc[row, i] = torch.utils.benchmark.timer() - start
    ratios |= {"inference, merged / base": ms[1] / ms[0], "inference, base / base": ms[2] / ms[0]}
    ratios = pandas.DataFrame(ratios).quantile([0.25, 0.5, 0.75]).T
    growth, batches = [], [torch.ones(1, 256, device=DEVICE)]
    for n, rank in itertools.product((12, 72, 448), (2, 16, 64)):
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(n))).to(DEVICE)
        squares = Problem(model, [str(i) for i in range(n)], [], ROUNDS, lambda epoch: batches,
                          lambda model, x: sum(layer(x).square().sum() for layer in model))
        found, _, _ = measure(dict(elalora=squares), Namespace(rank=rank, seed=config.seed))
        growth.append(found.assign(matrices=n, rank=rank))
    growth = pandas.concat(growth)[["matrices", "rank", "penalty", "allocator", "adjustment"]]
    text = "\n\n".join(table.to_markdown(floatfmt=".4g") for table in (costs.T, ratios, growth))
    results = dict(costs=costs.to_dict("index"), ratios=ratios.to_dict("index"),
                   growth=growth.to_dict("records"), arguments=vars(config), versions=versions(),
                   rounds=ROUNDS, texts=TEXTS, tokens=TOKENS, recipe=TIMED._asdict())
    replace(folder / "table.md", lambda path: path.write_text(f"{text}\n"))
    replace(folder / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
    print(f"{text}\n\nmedians of ms and of bytes, quartiles of ratios; written: {folder}")


# ---- What the user sees ----
def count_pruned(results: dict) -> tuple[float, float]:
    """How many ranks the adjustments of a run pruned, and how many of those they had added."""
    if not results["adjustments"]:
        return math.nan, math.nan
    pruned, again, initial = 0, 0, dict.fromkeys(results["ranks"], results["rank"])
    for name, indices in ((n, i) for a in results["adjustments"] for n, i in a["pruned"].items()):
        old = sum(i < initial[name] for i in indices)  # added ranks come last
        pruned, again = pruned + len(indices), again + len(indices) - old
        initial[name] -= old
    return pruned, again


def describe(results: dict) -> list[str]:
    """The lines printed of a run."""
    ranks, baseline, table = results["ranks"], results["baseline"], RECIPES[results["task"]]
    sizes = sorted(ranks.values())
    lines = [
        "{task}, {method}, rank {rank}, seed {seed}: {total_steps} steps, {seconds:.0f} s\n"
        "  {adapter_parameters:,} adapter parameters, {trainable_parameters:,} in all trained"
        .format(**results),
        f"  {len(ranks)} matrices, total rank {sum(sizes)}, {sizes[0]} to {sizes[-1]} each"]
    if results["adjustments"]:
        pruned, again = count_pruned(results)
        lines[-1] += (f" after {len(results['adjustments'])} adjustments; of {pruned} ranks "
                      f"pruned, {again} had been added by them")
    for metric, value in results["metrics"].items():
        majority = f"  (majority class {baseline[metric]:.4f})" if baseline else ""
        lines.append(f"  {metric:<15} {value:.4f}{majority}")
    paper = dict(model=DEBERTA, method="elalora", set=[], targets=[""], holdout=False)
    as_paper = results["arguments"] | paper == results["arguments"]
    if as_paper and results["recipe"]["epochs"] == table.epochs and results["rank"] in RANKS:
        lines.append(f"  Table 2 has     {table.paper[RANKS.index(results['rank'])] / 100:.4f}")
    if "gap_closed" in results["metrics"]:
        lines.append("  (of the gap between those two; best_possible gives every matrix a rank)")
    for matrix, mean in grid(ranks).mean(axis="columns").items():
        planted = f"  (planted {MATRICES[matrix]})" if results["task"] == "planted" else ""
        lines.append(f"  {matrix:<25} mean rank {mean:5.2f}{planted}")
    return lines


LEGEND = ("Mean ± standard deviation over seeds, after the last epoch (quantiles of log10 of the "
          "scores S: at the end of the search); differences between runs of the same seed; mean "
          "ranks of a kind of matrix; Spearman's correlations of the ranks that any two runs "
          "found: mean (least to greatest).")


def paired(rows: pandas.DataFrame, metric: str) -> pandas.DataFrame:
    """Differences of every two runs by seed, with Student's interval from five seeds on."""
    import scipy.stats
    pairs, by_seed = {}, rows.pivot(index="seed", columns="run", values=metric)
    for a, b in itertools.combinations(rows["run"].unique(), 2):
        difference, interval, verdict = (by_seed[a] - by_seed[b]).dropna(), "", ""
        if len(difference) < 2:
            continue
        if len(difference) >= 5:
            low, high = scipy.stats.ttest_1samp(difference, 0).confidence_interval(0.95)
            interval = f"{low:+.4f} to {high:+.4f}"
            verdict = "higher" if low > 0 else "lower" if high < 0 else ""
        pairs[f"{a} − {b}"] = {
            metric: f"{difference.mean():+.4f} ± {difference.std():.4f}", "95% interval": interval,
            "the first is": verdict or f"undecided at {len(difference)} seeds"}
    return pandas.DataFrame(pairs).T


def rank_correlations(ranks: dict[tuple[str, int], dict[str, int]]) -> pandas.DataFrame:
    """Spearman's: mean (least to greatest) of all pairs of two settings' runs, (name, seed)."""
    if len(ranks) < 2:
        return pandas.DataFrame()
    pairs = pandas.DataFrame(ranks).corr("spearman").rename_axis(["rank correlations", "seed"])
    others = pairs.mask(np.eye(len(pairs), dtype=bool)).stack([0, 1]).dropna()
    return others.groupby(level=[0, 2]).agg(
        lambda x: f"{x.mean():.2f} ({x.min():.2f} to {x.max():.2f})").unstack(fill_value="")


def compare(folder: Path, config: Namespace) -> str:
    """Writes table.md and scores.png (Figure 5) of all runs like this one, but for what label()
    has and the seed: mean ± standard deviation over the seeds after the last epoch, differences
    by seed, mean ranks, rank correlations of the ranks."""
    runs, varied = {}, ("method", "rank", "targets", "set", "seed")
    for path in sorted(folder.glob(f"{config.task}-*/results.json")):
        results = json.loads(path.read_text())
        had = results["arguments"]
        if all(had.get(name) == x for name, x in vars(config).items() if name not in varied):
            runs[label(Namespace(**had)), had["seed"]] = results
    if len(runs) < 2:
        return ""
    rows = pandas.DataFrame(
        dict(run=name, seed=seed) | r["metrics"] | dict(
            train_loss=r["history"][-1]["train_loss"], adapter_parameters=r["adapter_parameters"],
            minutes=r["seconds"] / 60) | dict(zip(("pruned", "of_those_added"), count_pruned(r)))
        | log_scores([*r["scores"].values()][-1]).quantile([0.1, 0.5, 0.9])
        .add_prefix("log10_S_").to_dict()
        for (name, seed), r in runs.items())
    alike = rank_correlations(
        {key: r["ranks"] for key, r in runs.items() if r["method"] in ("elalora", "adalora")})
    runs = {f"{name}-s{seed}": r for (name, seed), r in runs.items()}
    matrices = [grid(r["ranks"]).mean(axis="columns").to_dict() for r in runs.values()]
    matrices = pandas.DataFrame(matrices).groupby(rows["run"].rename("mean ranks"), sort=False)
    groups = rows.drop(columns="seed").groupby("run", sort=False)
    table, matrices = (parts.agg(lambda x: "{:,.{n}f} ± {:,.{n}f}".format(
        x.mean(), x.std(), n=4 if x.max() < 100 else 0)) for parts in (groups, matrices))
    metric, *_ = next(iter(runs.values()))["metrics"]
    tables = (table.assign(seeds=groups.size()), paired(rows, metric), matrices, alike)
    text = "\n\n".join(table.to_markdown(disable_numparse=True) for table in tables if len(table))
    text = text.replace("nan ± nan", " " * 9).replace(" ± nan", " " * 6)  # of a single seed
    commands = "\n".join(sorted({r["command"] for r in runs.values()}))
    replace(folder / "table.md",
            lambda path: path.write_text(f"```sh\n{commands}\n```\n\n{LEGEND}\n\n{text}\n"))
    ends = {n: [*r["scores"].values()][-1] for n, r in runs.items() if r["seed"] == rows.seed.min()}
    replace(folder / "scores.png", lambda path: plot_scores(ends, path))
    return text


def parse_arguments(argv: list[str] | None) -> Namespace:
    """Every argument, its default and its meaning."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    add = parser.add_argument
    add("--task", choices=RECIPES, default="planted", help="default: planted")
    add("--rank", type=int, nargs="+", default=[4],
        help="average rank(s), with b and k as for 2, 4 or 10; default: 4")
    add("--seeds", type=int, nargs="+", default=[0], help="one run for each; default: 0")
    add("--model", help=f"encoder: hub id or folder; default: {DEBERTA}")
    add("--data-dir", help=f"folder with MRPC/train.tsv and so on; default: {GLUE} on the hub")
    add("--epochs", type=int, help="default: Table 7's (planted: 10); phases keep their shares")
    add("--method", choices=METHODS, nargs="+", default=["elalora"],
        help="svd: ElaLoRA with b = 0; final: svd at the ranks with which the elalora run of the\n"
        "same rank and seed ended; shuffled: at those, shuffled; lora, adalora: PEFT's")
    add("--targets", nargs="+", default=[""], metavar="NAME",
        help="adapt only matrices whose names end so; default: all of Figure 2")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help=f"instead of the recipe's: {' '.join(SETTINGS)}")
    add("--holdout", action="store_true",
        help="for choosing settings: a tenth of the training split as dev set")
    add("--dtype", choices=("float32", "bfloat16"), help="of autocast; default: float32")
    add("--output-dir", default="runs", help="default: runs")
    add("--benchmark", action="store_true", help="time steps, of random tokens or a GLUE --task")
    add("--resume", action="store_true", help="go on where unfinished runs had a checkpoint")
    args = parser.parse_args(argv)
    epochs = 1 if args.epochs is None else args.epochs
    if min(*args.rank, epochs, *(seed + 1 for seed in args.seeds)) < 1:
        parser.error("--rank and --epochs take integers >= 1, --seeds integers >= 0")
    for name in ("rank", "seeds", "method"):
        if len({*(values := getattr(args, name))}) < len(values):
            parser.error(f"--{name} {values}: name each but once")
    if args.task != "planted":
        args.model, args.dtype = args.model or DEBERTA, args.dtype or "float32"
    elif args.dtype or args.data_dir or args.holdout or args.model and not args.benchmark:
        parser.error("--model, --data-dir, --dtype, --holdout are for GLUE: name a --task as well")
    if args.benchmark and (len(args.rank) * len(args.seeds) * PROCESSES > 1 or args.set
                           or args.epochs or args.holdout or args.method != ["elalora"]):
        parser.error("--benchmark takes one rank, one seed and one process, no --method, --set, "
                     "--epochs, --holdout")
    return args


def check_files(args: Namespace, folders: list[Path]) -> None:
    """Names what is missing, or cannot be written, before anything is loaded."""
    for folder in folders:
        while not os.path.lexists(folder):
            folder = folder.parent
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(f"--output-dir: cannot write in {folder}: {error.strerror}") from None
    local = args.model and (args.model.startswith((".", "/", "~")) or Path(args.model).exists())
    if local and not Path(args.model, "config.json").is_file():
        raise ValueError(f"--model: {args.model} is no folder with a config.json")


def check_arguments(had: dict, config: Namespace) -> None:
    """ValueError unless a run that is there already was asked for in the same way."""
    for name, wanted in vars(config).items():
        if had.get(name) != wanted:
            raise ValueError(f"it has {name} {had.get(name)}, not {wanted}")


def earlier(config: Namespace, folder: Path, resume: bool) -> dict | None:
    """The results of the run, if it is finished; an error if the folder holds a different one."""
    if not (path := folder / "results.json").exists():
        if (folder / "checkpoint.pt").exists() and not resume:
            raise ValueError(f"{folder} has an unfinished run: --resume goes on with it")
        return None
    try:
        results = json.loads(path.read_text())
        check_arguments(results["arguments"], config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; delete it or take another --output-dir") from None
    return results


def run_all(args: Namespace) -> None:
    """Every method at every rank with every seed, but those that are finished."""
    apart = ("rank", "seeds", "output_dir", "resume", "benchmark")
    shared = {k: v for k, v in vars(args).items() if k not in apart} | dict(processes=PROCESSES)
    runs = {}
    for method, rank, seed in itertools.product(METHODS, args.rank, args.seeds):
        if method in args.method:
            config = Namespace(**shared | dict(method=method, rank=rank, seed=seed))
            runs[Path(args.output_dir, folder_name(config))] = config
    check_files(args, [*runs])
    for recipe in map(recipe_of, runs.values()):
        if recipe.batch_size % PROCESSES:
            raise ValueError(f"{PROCESSES} processes cannot share batches of {recipe.batch_size}")
    known = [earlier(config, folder, args.resume) for folder, config in runs.items()]
    if "elalora" not in args.method:
        for folder, config in runs.items():
            rank_map(config, folder)  # an error now, if those runs are missing
    for (folder, config), results in zip(runs.items(), known):
        print(*describe(results or run(config, folder)), sep="\n")
        print(f"  {'finished before: ' if results else 'written: '}{folder}", flush=True)
    if PROCESS == 0 and (tables := compare(Path(args.output_dir), config)):
        print(tables)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if PROCESSES > 1:
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    if PROCESS > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        (benchmark if args.benchmark else run_all)(args)
        if PROCESSES > 1:
            distributed.destroy_process_group()
    except KeyboardInterrupt:
        print("reproduce.py: interrupted; --resume goes on after the last whole epoch, if any",
              file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        from_hub = isinstance(error, OSError) and error.errno is None
        hint = " (without the hub: --model FOLDER --data-dir FOLDER)" if from_hub else ""
        print(f"reproduce.py: error: {str(error).strip().splitlines()[0]}{hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
