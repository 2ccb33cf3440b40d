"""Runs ElaLoRA, or a method to compare it with, on one of the paper's experiments.

    python reproduce.py                        # planted ranks: no network, two minutes or less
    python reproduce.py --task mrpc --rank 4   # DeBERTaV3-base on GLUE (section 4.2)
    python reproduce.py --task xsum --rank 2   # BART-base on XSum (section 4.3)
    python reproduce.py --task cifar --rank 8  # ViT-B/16 on VTAB-1k (section 4.4)
    python reproduce.py --method elalora lora --seeds 0 1 2 3 4   # ends in a table
    torchrun --nproc-per-node 2 reproduce.py --task mrpc   # the same batches, shared by two GPUs

A run writes OUTPUT_DIR/TASK-METHOD-rRANK-sSEED/: results.json, predictions.json (the model's answer
to every example, and its loss), ranks.png, peft/ (for PeftModel), of ElaLoRA adapter.safetensors
and scores.png; and checkpoint.pt after every epoch, for --resume. OUTPUT_DIR/TASK.md compares all
runs of a task. Tables and sections are those of arXiv:2504.00254. Where it is silent, the learning
rate rises for 10% of the run and falls linearly to 0, gradients are clipped to norm 1, and there is
no weight decay. Phases keep their shares of the paper's run if the run has more or fewer steps.
"""

import argparse
import itertools
import sys

from experiments.tables import (
    FAMILIES, FAMILY_OF, METHODS, TAKE_RANKS, Config, Recipe, recipe_of, settings_of)


def make_parser() -> argparse.ArgumentParser:
    """Every argument, its default and its meaning."""
    parser = argparse.ArgumentParser(
        prog="reproduce.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    tasks = [f"{name}: {' '.join(family.tasks)}" for name, family in FAMILIES.items()]
    models = [family.model for family in FAMILIES.values() if family.model]
    add("--task", choices=FAMILY_OF, default="planted", metavar="TASK",
        help="\n".join(tasks)
        + "\nsst2_heldout evaluates 18,000 phrases of SST-2's training split; default: planted")
    add("--rank", type=int, nargs="+", default=[4],
        help="average rank(s), with b and k of the table's nearest rank; default: 4")
    add("--seeds", type=int, nargs="+", default=[0], help="one run for each; default: 0")
    add("--model", help=f"hub id or folder; default: the paper's,\n{', '.join(models)}")
    add("--data-dir", help="folder with the data; default: the hub. GLUE and XSum: what\n"
        "datasets.load_dataset reads; VTAB: vtab-1k.zip, or its folder vtab-1k")
    add("--epochs", type=int, help="default: the table's")
    add("--method", choices=METHODS, nargs="+", default=["elalora"],
        help="\n".join(f"{name}: {meaning}" for name, meaning in METHODS.items()))
    add("--ranks", metavar="FILE", help="a map from matrices to ranks in JSON, or a run's "
        f"results.json: {', '.join(TAKE_RANKS)} has\nthese ranks; --rank is then their mean")
    add("--targets", nargs="+", default=[""], metavar="NAME",
        help="adapt only matrices whose names end so (output.dense: attention.output.dense,\n"
        "too); default: all that the paper adapts")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="replaces a setting, such as learning_rate=1e-3, b=2 or examples=100;\n"
        "all are explained at Recipe in experiments/tables.py")
    add("--holdout", action="store_true",
        help="for choosing settings: the data that results are reported on stay unseen.\n"
        "GLUE: nine tenths of the training split are trained on, one tenth is evaluated;\n"
        "sst2_heldout: 2,000 phrases kept for this; XSum: validation; VTAB: val200")
    add("--dtype", choices=("float32", "bfloat16"),
        help="of autocast; default: float32. CPUs without bfloat16 are slow in it")
    add("--output-dir", default="runs", help="default: runs")
    add("--resume", action="store_true", help="go on where unfinished runs had a checkpoint")
    return parser


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[tuple[Config, Recipe]]]:
    """The arguments, and the runs that they ask for. Prints what is wrong and exits with 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if min(*args.rank, *(seed + 1 for seed in args.seeds)) < 1:
        parser.error("--rank takes integers >= 1, --seeds integers >= 0")
    for name in ("rank", "seeds", "method"):
        values = getattr(args, name)
        if len({*values}) < len(values):
            parser.error(f"--{name} {values}: remove duplicates")
    if args.ranks and not {*args.method} <= {*TAKE_RANKS}:
        parser.error(f"--ranks is for --method {', '.join(TAKE_RANKS)} alone")
    model = FAMILIES[FAMILY_OF[args.task]].model
    if model:
        args.model, args.dtype = args.model or model, args.dtype or "float32"
    elif args.dtype or args.data_dir or args.holdout or args.model:
        parser.error(f"--model, --data-dir, --dtype, --holdout are not for {args.task}: "
                     "name another --task as well")
    runs = []
    try:  # in the order of METHODS, names and settings sorted: one run has one name
        words = [f"{name}={value}" for name, value in settings_of(args.set).items()]
        for method in (name for name in METHODS if name in args.method):
            for rank, seed in itertools.product(args.rank, args.seeds):
                config = Config(args.task, method, rank, seed, args.model, args.data_dir,
                                args.epochs, sorted({*args.targets}), words, args.holdout,
                                args.dtype, ranks=args.ranks)
                runs.append((config, recipe_of(config)))
    except ValueError as error:
        parser.error(str(error))
    return args, runs


if __name__ == "__main__":
    parse()  # here, so that a mistyped argument is refused before the slow imports

import json
import os
import shlex
import statistics
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from torch import distributed

from experiments import figures, report
from experiments import problem as shared
from experiments.data import check_files
from experiments.methods import METHODS as CLASSES
from experiments.problem import DEVICE, Problem, commit, trained, versions
from experiments.tables import fit_phases, papers_result, papers_run
from experiments.training import check_same, make_problem, rounded, train


# ---- One run's folder ----
def folder_of(config: Config, output_dir: str) -> Path:
    return Path(output_dir, f"{config.task}-{report.label(asdict(config))}-s{config.seed}")


def run(config: Config, recipe: Recipe, ranks: dict[str, int] | None, folder: Path) -> dict:
    """Trains once, writes the run's folder and returns what is in its results.json."""
    code = commit()  # now: it may change while the run trains
    transformers.set_seed(config.seed)
    problem = make_problem(config, recipe)
    total = recipe.epochs * problem.steps_per_epoch
    recipe = fit_phases(recipe, config, total)
    print(f"{total:,} steps (the paper: {papers_run(config)[1]:,}): warm-up {recipe.warmup:,}, "
          f"stabilization {recipe.stabilize:,}, adjustments every {recipe.interval:,}", flush=True)
    method = CLASSES[config.method](problem, config, recipe, ranks)
    log = train(problem, method, config, folder / "checkpoint.pt")
    metrics = log["history"][-1]["metrics"]
    results = dict(
        arguments=asdict(config), recipe=asdict(recipe), metrics=metrics, floor=problem.floor,
        floor_name=problem.floor_name, paper=papers_result(config, total),
        note=problem.note(metrics), planted_ranks=problem.planted_ranks,
        adapter_parameters=method.parameters(),
        trainable_parameters=sum(w.numel() for w in trained(problem.model).values()),
        total_steps=method.t, seconds=round(log["seconds"], 1),
        command=shlex.join(["python", "reproduce.py", *sys.argv[1:]]), commit=code,
        versions=versions(), ranks=method.ranks(), history=log["history"],
        adjustments=log["adjustments"], scores=log["scores"])
    if shared.PROCESS == 0:
        method.export(folder)
        write_folder(folder, problem, results)
    return results


def write_folder(folder: Path, problem: Problem, results: dict) -> None:
    """Predictions, figures, and last results.json, which marks the run as finished."""
    if problem.outputs:
        outputs = {name: rounded(values, 4) for name, values in problem.outputs.items()}
        report.write(folder / "predictions.json", lambda path: path.write_text(json.dumps(outputs)))
    planted = {"planted": problem.planted_ranks} if problem.planted_ranks else {}
    maps = {f"ranks {name}, total {sum(ranks.values())}": report.grid(ranks)
            for name, ranks in (planted | {"found": results["ranks"]}).items()}
    report.write(folder / "ranks.png", lambda path: figures.heatmaps(maps, path))
    scores = {f"after step {step}": report.log_scores(S)
              for step, S in results["scores"].items() if S}  # LoRA has none
    if scores:
        report.write(folder / "scores.png", lambda path: figures.distributions(scores, path))
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in results.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"  # a line for each
    report.write(folder / "results.json", lambda path: path.write_text(text))
    (folder / "checkpoint.pt").unlink()


# ---- The command ----
def read_ranks(file: str) -> dict[str, int]:
    """ValueError if the file of --ranks has no ranks."""
    try:
        content = json.loads(Path(file).read_text())
        ranks = content.get("ranks", content)
        if {*map(type, ranks.values())} != {int}:
            raise TypeError("ranks are integers")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"--ranks: {file} has no map from matrices to ranks "
                         f"({type(error).__name__}: {error})") from None
    return ranks


def earlier(config: Config, folder: Path, ranks: dict[str, int] | None,
            resume: bool) -> dict | None:
    """The results of a finished run, else None. ValueError if the folder holds another run."""
    path = folder / "results.json"
    if not path.exists():
        if (folder / "checkpoint.pt").exists() and not resume:
            raise ValueError(f"{folder} has an unfinished run: --resume goes on with it")
        return None
    try:
        results = json.loads(path.read_text())
        check_same(results["arguments"], config)
        if ranks and results["ranks"] != ranks:
            raise ValueError(f"{config.ranks} had other ranks when this run was made")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; delete it or take another --output-dir") from None
    return results


def run_all(args: argparse.Namespace, runs: list[tuple[Config, Recipe]]) -> None:
    """Makes all runs, but skips what is finished."""
    runs = [(replace(config, processes=shared.PROCESSES), recipe) for config, recipe in runs]
    folders = [folder_of(config, args.output_dir) for config, _ in runs]
    check_files(args.model, args.data_dir, folders)
    report.page_of(Path(args.output_dir), args.task)  # raises if others' pages are there
    ranks = read_ranks(args.ranks) if args.ranks else None
    for config, recipe in runs:
        if ranks and statistics.fmean(ranks.values()) != config.rank:
            raise ValueError(f"--ranks: {args.ranks} has a mean of "
                             f"{statistics.fmean(ranks.values()):g}, --rank {config.rank}")
        if recipe.batch_size % shared.PROCESSES:
            raise ValueError(
                f"{shared.PROCESSES} processes cannot share batches of {recipe.batch_size}")
    known = [earlier(config, folder, ranks, args.resume)
             for (config, _), folder in zip(runs, folders)]
    for (config, recipe), folder, results in zip(runs, folders, known):
        lines = report.describe(results or run(config, recipe, ranks, folder))
        print(*lines, f"  {'finished before' if results else 'written'}: {folder}", sep="\n",
              flush=True)
    if shared.PROCESS == 0:
        tables = report.compare(Path(args.output_dir), asdict(config))
        if tables:  # of several runs
            print(tables)


def main(argv: list[str] | None = None) -> None:
    args, runs = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if shared.PROCESSES > 1:
        if DEVICE == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    if shared.PROCESS > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        run_all(args, runs)
        if shared.PROCESSES > 1:
            distributed.destroy_process_group()
    except KeyboardInterrupt:
        print("reproduce.py: interrupted; --resume goes on after the last whole epoch, if any",
              file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        from_hub = isinstance(error, OSError) and error.errno is None
        hint = " (without the hub: --model FOLDER --data-dir FOLDER)" if from_hub else ""
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        own = Path(raised_in).parent in (Path(__file__).parent, Path(report.__file__).parent)
        if isinstance(error, ValueError) and (error.__cause__ or not own):  # a library's
            path = Path(args.output_dir, "traceback.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(traceback.format_exc())
            hint = f" (all of it: {path})"
        print(f"reproduce.py: error: {str(error).strip().splitlines()[0]}{hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
