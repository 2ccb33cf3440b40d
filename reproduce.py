"""Runs ElaLoRA, or a method to compare it with, on one of the paper's experiments.

    python reproduce.py                        # planted ranks: no network, two minutes or less
    python reproduce.py --task mrpc --rank 4   # DeBERTaV3-base on GLUE (section 4.2)
    python reproduce.py --task xsum --rank 2   # BART-base on XSum (section 4.3)
    python reproduce.py --task cifar --rank 8  # ViT-B/16 on VTAB-1k (section 4.4)
    python reproduce.py --task glue --rank 2 4 10 --method elalora lora adalora --seeds 0 1 2
                                               # Table 2; go on with --resume
    torchrun --nproc-per-node 2 reproduce.py --task mrpc   # the same batches, shared by two GPUs

A run writes OUTPUT_DIR/TASK-METHOD-rRANK-sSEED/: results.json, predictions.json (the model's
answer to every example, and its loss), log.csv (every step) and loss.png, ranks.png, peft/ (for
PeftModel), of ElaLoRA adapter.safetensors and scores.png; and checkpoint.pt after every epoch, for
--resume. OUTPUT_DIR/FAMILY.md compares all runs of a family of tasks with the paper's. Tables and
sections are those of arXiv:2504.00254. Where it is silent, the learning rate rises for 10% of the
run and falls linearly to 0, gradients are clipped to norm 1, and there is no weight decay. Phases
keep their shares of the paper's run if the run has more or fewer steps.
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
    add("--task", choices={**FAMILIES, **FAMILY_OF}, nargs="+", default=["planted"], metavar="TASK",
        help="tasks of one family, or its name for all that the paper reports:\n" + "\n".join(tasks)
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
        help="of autocast; default: bfloat16 on a GPU that has it, else float32")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--report-to", choices=("tensorboard", "wandb"),
        help="beside log.csv; needs the package of that name. TensorBoard reads OUTPUT_DIR")
    add("--output-dir", default="runs", help="default: runs")
    add("--resume", action="store_true", help="go on where unfinished runs had a checkpoint")
    add("--dry-run", action="store_true",
        help="print the runs, their steps, and the hours of training by one timed step of each")
    return parser


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[tuple[Config, Recipe]]]:
    """The arguments, and the runs that they ask for. Prints what is wrong and exits with 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if min(*args.rank, *(seed + 1 for seed in args.seeds)) < 1:
        parser.error("--rank takes integers >= 1, --seeds integers >= 0")
    args.task = [task for name in args.task for task in (
        dict(FAMILIES[name].columns.values()) if name in FAMILIES else [name])]
    for name in ("task", "rank", "seeds", "method"):
        values = getattr(args, name)
        if len({*values}) < len(values):
            parser.error(f"--{name} {' '.join(map(str, values))}: remove duplicates")
    args.family, *others = dict.fromkeys(FAMILY_OF[task] for task in args.task)
    if others:
        parser.error(f"--task: {args.family} and {others[0]} need a command each")
    if args.ranks and not {*args.method} <= {*TAKE_RANKS}:
        parser.error(f"--ranks is for --method {', '.join(TAKE_RANKS)} alone")
    for name in ("model", "data-dir", "dtype", "holdout", "gradient-checkpointing"):
        if not FAMILIES[args.family].model and getattr(args, name.replace("-", "_")):
            parser.error(f"--{name} is not for {args.family}: name another --task")
    args.model = args.model or FAMILIES[args.family].model
    runs = []
    try:  # in the order of METHODS, names and settings sorted: one run has one name
        words = [f"{name}={value}" for name, value in settings_of(args.set).items()]
        methods = [name for name in METHODS if name in args.method]
        for task, method, rank, seed in itertools.product(
                args.task, methods, args.rank, args.seeds):
            config = Config(task, method, rank, seed, sorted({*args.targets}), words, args.ranks,
                            args.model, args.data_dir, args.epochs, args.holdout, args.dtype)
            runs.append((config, recipe_of(config)))
    except ValueError as error:
        parser.error(str(error))
    return args, runs


if __name__ == "__main__":
    parse()  # here, so that a mistyped argument is refused before the slow imports

import importlib.util
import json
import os
import shlex
import statistics
import time
import traceback
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import torch
import transformers
from torch import distributed

from experiments import figures, report
from experiments import problem as shared
from experiments.data import check_files
from experiments.methods import METHODS as CLASSES
from experiments.methods import NOISE, Method
from experiments.problem import DEVICE, Problem, best_dtype, commit, trained, versions
from experiments.tables import fit_phases, papers_result, papers_run
from experiments.training import check_same, make_problem, rounded, train, train_step


# ---- One run's folder ----
def folder_of(config: Config, output_dir: str) -> Path:
    return Path(output_dir, f"{config.task}-{report.label(asdict(config))}-s{config.seed}")


def make(config: Config, recipe: Recipe, ranks: dict[str, int] | None, args: argparse.Namespace
         ) -> tuple[Problem, Method]:
    """What a run trains, and how; prints its first line."""
    transformers.set_seed(config.seed)
    problem = make_problem(config, recipe)
    if args.gradient_checkpointing:
        problem.model.activation_checkpointing_enable()
    total = recipe.epochs * problem.steps_per_epoch
    recipe = fit_phases(recipe, config, total)
    method = CLASSES[config.method](problem, config, recipe, ranks)
    threads = torch.get_num_threads()
    print(f"{folder_of(config, args.output_dir).name}: {DEVICE}, {config.dtype or 'float32'}, "
          f"{threads} thread{'s' * (threads > 1)}, {method.parameters():,} adapter parameters, "
          f"{total:,} steps (the paper: {papers_run(config)[1]:,}): warm-up {recipe.warmup:,}, "
          f"stabilization {recipe.stabilize:,}, adjustments every {recipe.interval:,}", flush=True)
    return problem, method


def seconds_of_step(problem: Problem, method: Method) -> float:
    """Of a step on a batch of the data. It trains the method."""
    batch = next(iter(problem.batches(1)))
    problem.model.train()
    for _ in range(2):  # the first one takes longer
        start = time.time()
        loss, _, _ = train_step(problem, batch, method)
        loss.item()  # waits for the GPU
    return time.time() - start


def run(config: Config, recipe: Recipe, ranks: dict[str, int] | None, args: argparse.Namespace
        ) -> dict:
    """Trains once, writes the run's folder and returns what is in its results.json."""
    code = commit()  # now: it may change while the run trains
    folder = folder_of(config, args.output_dir)
    problem, method = make(config, recipe, ranks, args)
    log = train(problem, method, config, folder / "checkpoint.pt", args.report_to)
    metrics = log["history"][-1]["metrics"]
    results = dict(
        arguments=asdict(config), recipe=asdict(method.recipe), metrics=metrics,
        floor=problem.floor, floor_name=problem.floor_name,
        paper=papers_result(config, method.t),
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
    report.write(folder / "loss.png", lambda path: figures.curve(folder / "log.csv", path))
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


def check_hub(model: str | None, data_dir: str | None) -> None:
    """If the hub is needed and does not answer, goes offline: no library then waits for it."""
    hub = huggingface_hub.constants
    local = not model or data_dir and Path(model).exists()
    if local or hub.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(hub.ENDPOINT, timeout=3)
    except Exception as error:  # of whatever client the hub's library uses
        print(f"reproduce.py: {hub.ENDPOINT} does not answer ({type(error).__name__}): only what "
              "was downloaded before can be used", file=sys.stderr)
        hub.HF_HUB_OFFLINE = True


def check(args: argparse.Namespace, runs: list[tuple[Config, Recipe]]) -> dict[str, int] | None:
    """Raises ValueError for what can be known to fail before any work; returns --ranks."""
    check_files(args.model, args.data_dir, [folder_of(c, args.output_dir) for c, _ in runs])
    report.check_page(Path(args.output_dir), args.family)
    if args.report_to and not importlib.util.find_spec(args.report_to):
        raise ValueError(f"--report-to {args.report_to}: pip install {args.report_to}")
    ranks = read_ranks(args.ranks) if args.ranks else None
    for config, recipe in runs:
        if ranks and statistics.fmean(ranks.values()) != config.rank:
            raise ValueError(f"--ranks: {args.ranks} has a mean of "
                             f"{statistics.fmean(ranks.values()):g}, --rank {config.rank}")
        if recipe.batch_size % shared.PROCESSES:
            raise ValueError(
                f"{shared.PROCESSES} processes cannot share batches of {recipe.batch_size}")
    check_hub(args.model, args.data_dir)
    return ranks


def dry_run(args: argparse.Namespace, runs: list[tuple[Config, Recipe]],
            ranks: dict[str, int] | None) -> None:
    """Prints the runs, their steps, and the hours of training by a timed step of each kind."""
    kinds: dict[tuple, tuple[int, float]] = {}
    hours = 0.0
    for config, recipe in runs:
        kind = config.task, config.method, config.rank
        if kind not in kinds:
            problem, method = make(config, recipe, ranks, args)
            kinds[kind] = method.schedule.total_steps, seconds_of_step(problem, method)
        steps, seconds = kinds[kind]
        hours += steps * seconds / 3600
        print(f"  {folder_of(config, args.output_dir).name}: {steps:,} steps of {seconds:.2g} s, "
              f"{steps * seconds / 3600:.2f} hours", flush=True)
    print(f"{len(runs)} runs are left, {hours:.2f} hours without their evaluations")


def run_all(args: argparse.Namespace, runs: list[tuple[Config, Recipe]]) -> None:
    """Makes all runs, but skips what is finished."""
    dtype = args.dtype or (best_dtype() if args.model else None)
    runs = [(replace(config, processes=shared.PROCESSES, dtype=dtype), recipe)
            for config, recipe in runs]
    ranks, table = check(args, runs), ""
    known = [earlier(config, folder_of(config, args.output_dir), ranks, args.resume or args.dry_run)
             for config, _ in runs]
    if args.dry_run:
        return dry_run(args, [r for r, results in zip(runs, known) if not results], ranks)
    for (config, recipe), results in zip(runs, known):
        lines = report.describe(results or run(config, recipe, ranks, args))
        folder = folder_of(config, args.output_dir)
        print(*lines, f"  {'finished before' if results else 'written'}: {folder}", sep="\n",
              flush=True)
        if shared.PROCESS == 0:
            table = report.compare(Path(args.output_dir), args.family)
    if len(runs) > 1:
        print(f"{table}\n\nwritten: {Path(args.output_dir, args.family)}.md")


def main(argv: list[str] | None = None) -> None:
    args, runs = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
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
        hint = (f" (without the hub: --model folders/{Path(args.model).name} "
                f"--data-dir folders/{args.family})" if from_hub and args.model else "")
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
