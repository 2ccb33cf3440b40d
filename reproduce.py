"""Runs ElaLoRA, or a method to compare it with, on one of the paper's experiments.

    python reproduce.py                        # planted ranks: no network, half a minute
    python reproduce.py --task mrpc --rank 4   # DeBERTaV3-base on GLUE, on Table 7's schedule
    python reproduce.py --task xsum --rank 2   # BART-base on XSum, Table 8
    python reproduce.py --task cifar --rank 8  # ViT-B/16 on VTAB-1k, Table 10
    python reproduce.py --method elalora lora --seeds 0 1 2 3 4   # ends in a table
    torchrun --nproc-per-node 2 reproduce.py --task mrpc   # the same batches, shared by two GPUs

A run writes OUTPUT_DIR/TASK-METHOD-rRANK-sSEED/: results.json, predictions.json (the model's answer
to every example, and its loss), ranks.png, peft/ (for PeftModel), of ElaLoRA adapter.safetensors
and scores.png; and checkpoint.pt after every epoch, for --resume. All runs of a task in OUTPUT_DIR
are compared in OUTPUT_DIR/README.md, with figures. Tables, figures and equations are those of
arXiv:2504.00254. Where it is silent, the learning rate rises for 10% of the run and falls linearly
to 0, gradients are clipped to norm 1, and there is no weight decay.
"""

import argparse
import itertools
import sys

FAMILIES = {  # the modules of experiments/: the model that the paper fine-tunes, and the tasks
    "planted": (None, "planted"),
    "glue": ("microsoft/deberta-v3-base", "mnli sst2 sst2_heldout cola qqp qnli rte mrpc stsb"),
    "xsum": ("facebook/bart-base", "xsum"),
    "vtab": ("google/vit-base-patch16-224-in21k",
             "cifar caltech101 svhn eurosat resisc45 dsprites_ori dmlab"),
}
FAMILY_OF = {task: name for name, (_, tasks) in FAMILIES.items() for task in tasks.split()}
METHODS = ("elalora", "svd", "final", "shuffled", "lora", "eva", "adalora")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Every argument, its default and its meaning."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    models = ", ".join(model for model, _ in FAMILIES.values() if model)
    add("--task", choices=FAMILY_OF, default="planted", metavar="TASK",
        help="\n".join(f"{name}: {tasks}" for name, (_, tasks) in FAMILIES.items())
        + "\nsst2_heldout evaluates 18,000 phrases of SST-2's training split")
    add("--rank", type=int, nargs="+", default=[4],
        help="average rank(s), with b and k of the table's nearest rank; default: 4")
    add("--seeds", type=int, nargs="+", default=[0], help="one run for each; default: 0")
    add("--model", help=f"hub id or folder; default: the paper's,\n{models}")
    add("--data-dir", help="folder with the data; default: the hub. GLUE and XSum: what\n"
        "datasets.load_dataset reads; VTAB: vtab-1k.zip, or its folder vtab-1k")
    add("--epochs", type=int, help="default: the table's; phases keep their shares of the run")
    add("--method", choices=METHODS, nargs="+", default=["elalora"],
        help="svd: ElaLoRA whose ranks never move (b = 0), so even ranks\n"
        "final: svd that starts with the ranks which the elalora run of this seed ended with\n"
        "shuffled: like final, with these ranks shuffled over the matrices\n"
        "lora, adalora: PEFT's\n"
        "eva: PEFT's LoRA whose ranks are chosen by the data before training; GLUE and XSum")
    add("--ranks", metavar="FILE",
        help="a map from matrices to ranks in JSON, or a run's results.json: svd has\n"
        "these ranks in place of even ones; --rank is then their mean")
    add("--targets", nargs="+", default=[""], metavar="NAME",
        help="adapt only matrices whose names end so (output.dense: attention.output.dense,\n"
        "too); default: all that the paper adapts")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="replaces a setting, such as learning_rate=1e-3, b=2 or lambda_rate=10;\n"
        "all are explained at Recipe in experiments/problem.py")
    add("--holdout", action="store_true",
        help="for choosing settings: the data that results are reported on stay unseen.\n"
        "GLUE: nine tenths of the training split are trained on, one tenth is evaluated;\n"
        "sst2_heldout: 2,000 phrases kept for this; XSum: validation; VTAB: val200")
    add("--dtype", choices=("float32", "bfloat16"), help="of autocast; default: float32")
    add("--output-dir", default="runs", help="default: runs")
    add("--resume", action="store_true", help="go on where unfinished runs had a checkpoint")
    args = parser.parse_args(argv)
    epochs = 1 if args.epochs is None else args.epochs
    if min(*args.rank, epochs, *(seed + 1 for seed in args.seeds)) < 1:
        parser.error("--rank and --epochs take integers >= 1, --seeds integers >= 0")
    for name in ("rank", "seeds", "method"):
        if len({*(values := getattr(args, name))}) < len(values):
            parser.error(f"--{name} {values}: remove duplicates")
    if "eva" in args.method and FAMILY_OF[args.task] not in ("glue", "xsum"):
        parser.error("--method eva: only for tasks of texts, GLUE's and XSum's")
    if args.ranks and args.method != ["svd"]:
        parser.error("--ranks is for --method svd alone")
    model, _ = FAMILIES[FAMILY_OF[args.task]]
    if model:
        args.model, args.dtype = args.model or model, args.dtype or "float32"
    elif args.dtype or args.data_dir or args.holdout or args.model:
        parser.error(f"--model, --data-dir, --dtype, --holdout are not for {args.task}: "
                     "name another --task as well")
    return args


if __name__ == "__main__":
    parse_arguments()  # here, so that a mistyped argument is refused before the slow imports

import importlib
import json
import math
import os
import random
import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
import tqdm
import transformers
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

import elalora
from experiments import problem as shared
from experiments import figures, report
from experiments.baselines import BASELINES
from experiments.common import check_files, warn_of_slow_bfloat16
from experiments.problem import (
    DEVICE, Config, Problem, Recipe, check_alike, check_arguments, mean_of_processes, recipe_of,
    seed_of, trained, versions)


# ---- Algorithm 1's loop ----
@dataclass
class Training:
    """What changes while a run trains."""
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    allocator: elalora.RankAllocator  # or what stands for it in baselines.py
    penalty: Callable[[], Tensor] | None
    stateful = ("optimizer", "scheduler", "allocator")

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in self.stateful}

    def load_state_dict(self, state: dict) -> None:
        for name in self.stateful:
            getattr(self, name).load_state_dict(state[name])


def prepare(problem: Problem, config: Config, recipe: Recipe,
            ranks: dict[str, int] | None = None) -> Training:
    """Adapts the model, by default with config.rank in every matrix; makes the optimizer."""
    total = recipe.epochs * problem.steps_per_epoch
    b = recipe.b if config.method == "elalora" else 0
    try:
        schedule = elalora.RankSchedule(
            total, recipe.warmup, recipe.stabilize, recipe.interval, b, recipe.shape)
    except ValueError as error:  # with less data, or larger batches, than the paper's
        raise ValueError(f"{error}; shorten the phases: --set warmup=... stabilize=... "
                         "interval=...") from None
    if baseline := BASELINES.get(config.method):
        allocator = baseline(problem, config, recipe, schedule)
    else:
        elalora.inject(problem.model, problem.targets, ranks or config.rank, recipe.alpha,
                       modules_to_save=problem.heads)
    groups = {1: [], recipe.lambda_rate: []}  # of singular values, AdaLoRA's as well
    for name, w in trained(problem.model).items():
        times = recipe.lambda_rate if name.endswith((".Lambda", ".lora_E.default")) else 1
        groups[times].append(w)
    optimizer = torch.optim.AdamW(
        [dict(params=group, lr=times * recipe.learning_rate) for times, group in groups.items()],
        weight_decay=0.0, foreach=True)
    scheduler = transformers.get_scheduler(recipe.lr_scheduler, optimizer, total // 10, total)
    if baseline:
        return Training(optimizer, scheduler, allocator, allocator.penalty)
    allocator = elalora.RankAllocator(problem.model, optimizer, schedule, recipe.k, recipe.beta1,
                                      recipe.beta2, config.seed)
    return Training(optimizer, scheduler, allocator,
                    lambda: recipe.gamma * elalora.orthogonality_penalty(problem.model))


def train_step(problem: Problem, batch: object, training: Training,
               lap: Callable[[str], object] = lambda part: None
               ) -> tuple[Tensor, elalora.Adjustment | None]:
    """One iteration of Algorithm 1's loop; lap is told the end of each part."""
    weights = [w for group in training.optimizer.param_groups for w in group["params"]]
    loss = problem.loss(problem.model, batch)
    loss.backward()
    lap("passes")
    if training.penalty:
        training.penalty().backward()
    lap("penalty")
    if shared.PROCESSES > 1:  # in one message; DistributedDataParallel cannot follow adjustments
        gradients = [w.grad for w in weights if w.grad is not None]
        mean = mean_of_processes(nn.utils.parameters_to_vector(gradients))
        nn.utils.vector_to_parameters(mean, gradients)
    nn.utils.clip_grad_norm_(weights, 1.0)
    training.optimizer.step()
    training.scheduler.step()
    lap("optimizer")
    adjustment = training.allocator.step()  # scores, and where one is due, an adjustment
    lap("allocator")
    training.optimizer.zero_grad()
    lap("zero_grad")
    return loss.detach(), adjustment


def train(problem: Problem, config: Config, recipe: Recipe, ranks: dict[str, int] | None,
          checkpoint: Path) -> tuple:
    """Trains all epochs that the checkpoint does not have; returns the allocator and the log."""
    training = prepare(problem, config, recipe, ranks)
    allocator, log = training.allocator, dict(seconds=0.0, history=[], adjustments=[], scores={})
    if checkpoint.exists():
        log = restore(checkpoint, config, problem.model, training)
    started, schedule = time.time() - log["seconds"], allocator.schedule
    with tqdm.tqdm(desc=f"{config.task} {config.method} {config.seed}", initial=allocator.t,
                   total=schedule.total_steps, mininterval=1, disable=shared.PROCESS > 0) as bar:
        for epoch in range(len(log["history"]) + 1, recipe.epochs + 1):
            if log["history"]:  # only now: the checkpoint is safe if the evaluation is killed
                evaluate(problem, recipe, log)
            torch.manual_seed(seed_of(config, epoch) * shared.PROCESSES + shared.PROCESS)  # dropout
            problem.model.train()
            losses = []
            for batch in problem.batches(epoch):
                loss, adjustment = train_step(problem, batch, training)
                losses.append(value := loss.item())
                if not math.isfinite(value):
                    raise ValueError(
                        f"loss {value} at step {allocator.t}: try float32 or another seed")
                if adjustment:
                    check_alike(problem.model)
                    log["adjustments"].append(asdict(adjustment))
                if allocator.t in (schedule.warmup_steps, schedule.search_end):
                    scores = itertools.chain(*allocator.importance().values())
                    log["scores"][allocator.t] = [float(f"{S:.3g}") for S in scores]
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                bar.update()
            check_alike(problem.model)
            train_loss = mean_of_processes(torch.tensor(statistics.fmean(losses), device=DEVICE))
            log["history"].append(dict(epoch=epoch, train_loss=float(train_loss)))
            log["seconds"] = time.time() - started
            if shared.PROCESS == 0:
                state = training.state_dict() | dict(
                    arguments=asdict(config), trained=trained(problem.model), log=log)
                report.write(checkpoint, lambda path: torch.save(state, path))
    evaluate(problem, recipe, log)
    log["seconds"] = time.time() - started
    return allocator, log


def evaluate(problem: Problem, recipe: Recipe, log: dict) -> None:
    """Adds the metrics to the last epoch of the log."""
    problem.model.eval()
    epoch = log["history"][-1]
    epoch["metrics"] = problem.evaluate(epoch["epoch"] == recipe.epochs)


def restore(path: Path, config: Config, model: nn.Module, training: Training) -> dict:
    """Loads a checkpoint, returns its log. ValueError if it is broken or not of this run."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        check_arguments(saved["arguments"], config)
        if wrong := saved["trained"].keys() ^ trained(model).keys():
            raise ValueError(f"missing or unknown: {min(wrong)}")
        model.load_state_dict(saved["trained"], strict=False)
        training.load_state_dict(saved)
        return saved["log"]
    except Exception as error:  # a broken file makes torch.load raise all kinds
        raise ValueError(f"{path} is no checkpoint of this run, delete it to start again "
                         f"({type(error).__name__}: {' '.join(str(error).split())})") from None


# ---- One run's folder ----
def family_of(config: Config) -> ModuleType:
    return importlib.import_module(f"experiments.{FAMILY_OF[config.task]}")


def folder_name(config: Config) -> str:
    return f"{config.task}-{report.label(asdict(config))}-s{config.seed}"


def rank_map(config: Config, folder: Path) -> dict[str, int] | None:
    """The final ranks of the ElaLoRA run beside this one, shuffled if the method says so; or those
    of --ranks. None: even ranks."""
    if config.ranks:
        return read_ranks(config)
    if config.method not in ("final", "shuffled"):
        return None
    source = replace(config, method="elalora")
    if not (results := earlier(source, path := folder.with_name(folder_name(source)), False)):
        raise ValueError(f"--method {config.method} takes the ranks of {path}: run elalora first")
    ranks = results["ranks"]
    if config.method == "shuffled":
        values = random.Random(config.seed).sample([*ranks.values()], len(ranks))
        ranks = dict(zip(ranks, values))
    return ranks


def read_ranks(config: Config) -> dict[str, int]:
    """ValueError if the file of --ranks has no ranks, or others than --rank on average."""
    try:
        content = json.loads(Path(config.ranks).read_text())
        ranks = content.get("ranks", content)
        mean = statistics.fmean(ranks.values())
        if {*map(type, ranks.values())} != {int}:
            raise TypeError("ranks are integers")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"--ranks: {config.ranks} has no map from matrices to ranks "
                         f"({type(error).__name__}: {error})") from None
    if mean != config.rank:
        raise ValueError(f"--ranks: {config.ranks} has a mean of {mean:g}, --rank {config.rank}")
    return ranks


def papers_result(config: Config, recipe: Recipe) -> dict[str, float]:
    """ElaLoRA's result in the paper, if this run has the paper's model and settings; else {}."""
    model, _ = FAMILIES[FAMILY_OF[config.task]]
    by_rank = family_of(config).RECIPES[config.task]
    as_paper = replace(config, method="elalora", model=model, targets=[""], set=[], holdout=False)
    whole = config.rank in by_rank and recipe.epochs == by_rank[config.rank].epochs
    return recipe.paper if whole and config == as_paper else {}


def run(config: Config, folder: Path) -> dict:
    """Trains once, writes the run's folder and returns what is in its results.json."""
    family = family_of(config)
    recipe, ranks = recipe_of(family.RECIPES[config.task], config), rank_map(config, folder)
    transformers.set_seed(config.seed)
    problem = family.problem(config, recipe)
    allocator, log = train(problem, config, recipe, ranks, folder / "checkpoint.pt")
    ranks, layers = allocator.ranks(), allocator.layers
    per_rank = {name: sum(layer.base_layer.weight.shape) + (config.method not in ("lora", "eva"))
                for name, layer in layers.items()}  # weights: two vectors, a singular value
    results = dict(
        task=config.task, method=config.method, rank=config.rank, seed=config.seed,
        metrics=log["history"][-1]["metrics"], floor=problem.floor, floor_name=problem.floor_name,
        paper=papers_result(config, recipe), note=problem.note,
        planted_ranks=problem.planted_ranks,
        adapter_parameters=sum(ranks[name] * size for name, size in per_rank.items()),
        trainable_parameters=sum(w.numel() for w in trained(problem.model).values()),
        total_steps=allocator.t, seconds=round(log["seconds"], 1),
        command=shlex.join(["python", "reproduce.py", *sys.argv[1:]]),
        arguments=asdict(config), recipe=asdict(recipe), versions=versions(),
        ranks=ranks, history=log["history"], adjustments=log["adjustments"], scores=log["scores"])
    if shared.PROCESS == 0:
        write_folder(folder, config, problem, allocator, results)
    return results


def write_folder(folder: Path, config: Config, problem: Problem, allocator, results: dict) -> None:
    """The adapter, the figures, and last results.json, which marks the run as finished."""
    if config.method in BASELINES:
        allocator.adapted.save_pretrained(folder / "peft")
    else:
        elalora.export_peft(problem.model, folder / "peft", config.model or config.task)
        adapter = elalora.adapter_state_dict(problem.model)
        report.write(folder / "adapter.safetensors", lambda path: save_file(adapter, path))
    planted = {"planted": problem.planted_ranks} if problem.planted_ranks else {}
    maps = {f"ranks {name}, total {sum(ranks.values())}": report.grid(ranks)
            for name, ranks in (planted | {"found": results["ranks"]}).items()}
    scores = {f"after step {step}": report.log_scores(S)
              for step, S in results["scores"].items() if S}  # LoRA has none
    if problem.outputs:
        digits = lambda x: float(f"{x:.4g}") if isinstance(x, float) else x
        outputs = {name: [*map(digits, values)] for name, values in problem.outputs.items()}
        report.write(folder / "predictions.json", lambda path: path.write_text(json.dumps(outputs)))
    report.write(folder / "ranks.png", lambda path: figures.heatmaps(maps, path))
    if scores:
        report.write(folder / "scores.png", lambda path: figures.distributions(scores, path))
    text = json.dumps(results, indent=1)
    report.write(folder / "results.json", lambda path: path.write_text(text))
    (folder / "checkpoint.pt").unlink()


# ---- The command ----
def earlier(config: Config, folder: Path, resume: bool) -> dict | None:
    """The results of a finished run, else None. ValueError if the folder holds another run."""
    if not (path := folder / "results.json").exists():
        if (folder / "checkpoint.pt").exists() and not resume:
            raise ValueError(f"{folder} has an unfinished run: --resume goes on with it")
        return None
    try:
        results = json.loads(path.read_text())
        check_arguments(results["arguments"], config)
        if config.ranks and results["ranks"] != read_ranks(config):
            raise ValueError(f"{config.ranks} had other ranks when this run was made")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; delete it or take another --output-dir") from None
    return results


def run_all(args: argparse.Namespace) -> None:
    """Runs every method at every rank with every seed, but skips what is finished."""
    runs = {}
    for method, rank, seed in itertools.product(METHODS, args.rank, args.seeds):
        if method in args.method:
            config = Config(args.task, method, rank, seed, args.model, args.data_dir, args.epochs,
                            args.targets, args.set, args.holdout, args.dtype, shared.PROCESSES,
                            args.ranks)
            runs[Path(args.output_dir, folder_name(config))] = config
    check_files(args.model, args.data_dir, [*runs])
    report.page_of(Path(args.output_dir), args.task)  # raises if a foreign README.md is there
    for config in runs.values():
        recipe = recipe_of(family_of(config).RECIPES[config.task], config)
        if recipe.batch_size % shared.PROCESSES:
            raise ValueError(
                f"{shared.PROCESSES} processes cannot share batches of {recipe.batch_size}")
    known = [earlier(config, folder, args.resume) for folder, config in runs.items()]
    if "elalora" not in args.method:
        for folder, config in runs.items():
            rank_map(config, folder)  # raises now, not after hours, if a run is missing
    warn_of_slow_bfloat16(args.dtype)
    for (folder, config), results in zip(runs.items(), known):
        print(*report.describe(results or run(config, folder)), sep="\n")
        print(f"  {'finished before: ' if results else 'written: '}{folder}", flush=True)
    if shared.PROCESS == 0 and (tables := report.compare(Path(args.output_dir), asdict(config))):
        print(tables)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if shared.PROCESSES > 1:
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    if shared.PROCESS > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        run_all(args)
        if shared.PROCESSES > 1:
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
