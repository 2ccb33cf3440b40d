"""Runs ElaLoRA, or a method to compare it with, on one of the paper's experiments.

    python reproduce.py                        # planted ranks: no network, two minutes or less
    python reproduce.py --task mrpc --rank 4   # DeBERTaV3-base on GLUE (section 4.2)
    python reproduce.py --task xsum --rank 2   # BART-base on XSum (section 4.3)
    python reproduce.py --task cifar --rank 8  # ViT-B/16 on VTAB-1k (section 4.4)
    python reproduce.py --task glue --rank 2 4 10 --method elalora lora adalora --seeds 0 1 2
                                               # Table 2; go on with --resume
    torchrun --nproc-per-node 2 reproduce.py --task mrpc   # the same batches, shared by two GPUs

A run writes OUTPUT_DIR/TASK-METHOD-rRANK-sSEED/:
    results.json, predictions.json   what was measured; the answer to every example, and its loss
    log.csv, loss.png                every step
    ranks.png, ranks-over-time.png   the last ranks of every matrix; mean ranks, if they moved
    scores.png                       the scores by which ranks move (not of LoRA)
    peft/, adapter.safetensors       the adapter, for PeftModel and for elalora.py
    checkpoint.pt                    after every epoch, for --resume
OUTPUT_DIR/FAMILY.md compares all runs of a family of tasks with the paper's.

Tables and sections are those of arXiv:2504.00254. Where it is silent, the learning rate rises for
10% of the run and falls linearly to 0, gradients are clipped to norm 1, and there is no weight
decay. Phases keep their shares of the paper's run if the run has more or fewer steps.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

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
        help="average rank(s), with b and k of the nearest rank in Table 7, 8 or 10; default: 4")
    add("--seeds", type=int, nargs="+", default=[0], help="one run for each; default: 0")
    add("--model", help=f"hub id or folder; default: the paper's,\n{', '.join(models)}")
    add("--data-dir", help="folder with the data; default: the hub. GLUE and XSum: what\n"
        "datasets.load_dataset reads; VTAB: vtab-1k.zip, or its folder vtab-1k")
    add("--epochs", type=int, help="default: as Table 7, 8 or 10")
    add("--method", choices=METHODS, nargs="+", default=["elalora"],
        help="\n".join(f"{name}: {meaning}" for name, (_, meaning) in METHODS.items()))
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
    add("--output-dir", type=Path, default=Path("runs"), help="default: runs")
    add("--resume", action="store_true", help="go on where unfinished runs had a checkpoint")
    add("--dry-run", action="store_true",
        help="print the steps and hours of what is left to train, by a timed step of each kind")
    return parser


def read_ranks(file: str, asked: list[int]) -> dict[str, int]:
    """The map in a file of --ranks. ValueError if its mean is not the one --rank asks for."""
    content = json.loads(Path(file).read_text())
    ranks = content.get("ranks", content)  # a run's results.json has more
    mean = statistics.fmean(ranks.values())
    if asked != [mean]:
        raise ValueError(f"--ranks: {file} has a mean of {mean:g}: give --rank {mean:g}")
    return ranks


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[tuple[Config, Recipe]]]:
    """The arguments, and the runs that they ask for. Prints what is wrong and exits with 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if min(args.rank) < 1:
        parser.error("--rank takes integers >= 1")
    tasks = []
    for name in args.task:
        family = FAMILIES.get(name)
        tasks += [task for task, _ in family.columns.values()] if family else [name]
    args.family, *others = dict.fromkeys(FAMILY_OF[task] for task in tasks)
    if others:
        parser.error(f"--task: {args.family} and {others[0]} need a command each")
    if args.ranks and not {*args.method} <= {*TAKE_RANKS}:
        parser.error(f"--ranks is for --method {', '.join(TAKE_RANKS)} alone")
    for name in ("model", "data-dir", "dtype", "holdout", "gradient-checkpointing"):
        if not FAMILIES[args.family].model and getattr(args, name.replace("-", "_")):
            parser.error(f"--{name} is not for {args.family}: name another --task")
    args.model = args.model or FAMILIES[args.family].model
    asked = (tasks, [name for name in METHODS if name in args.method], args.rank, args.seeds)
    runs = []
    try:  # names and settings sorted: one run has one name; what is asked for twice is made once
        words = [f"{name}={value}" for name, value in settings_of(args.set).items()]
        for run in itertools.product(*map(dict.fromkeys, asked)):
            config = Config(*run, sorted({*args.targets}), words, args.ranks, args.model,
                            args.data_dir, args.epochs, args.holdout, args.dtype)
            runs.append((config, recipe_of(config)))
        args.ranks = read_ranks(args.ranks, args.rank) if args.ranks else {}
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args, runs


if __name__ == "__main__":
    parse()  # here, so that a mistyped argument is refused before the slow imports

import importlib.util
import os
import time
import traceback
import warnings
from dataclasses import asdict, replace

import huggingface_hub
import torch
import transformers
from torch import distributed

from experiments import figures, report
from experiments import problem as shared
from experiments.data import check_files
from experiments.methods import METHODS as CLASSES
from experiments.methods import NOISE, Method
from experiments.problem import DEVICE, Problem, best_dtype, commit, versions
from experiments.tables import fit_phases
from experiments.training import check_same, make_problem, rounded, train, train_step

ROOT = Path(__file__).parent


# ---- One run's folder ----
def folder_of(config: Config, output_dir: str | Path) -> Path:
    return Path(output_dir, f"{config.task}-{report.label(asdict(config))}-s{config.seed}")


def make(config: Config, recipe: Recipe, args: argparse.Namespace) -> tuple[Problem, Method]:
    """What a run trains, and how; prints its first line."""
    transformers.set_seed(config.seed)
    problem = make_problem(config, recipe)
    if args.gradient_checkpointing:
        problem.model.activation_checkpointing_enable()
    total = recipe.epochs * problem.steps_per_epoch
    recipe = fit_phases(recipe, config, total)
    method = CLASSES[config.method](problem, config, recipe, args.ranks)
    print(f"{folder_of(config, args.output_dir).name}: {DEVICE}, {config.dtype or 'float32'}, "
          f"{torch.get_num_threads()} thread(s), {method.parameters():,} adapter parameters, "
          f"{total:,} steps: warm-up {recipe.warmup:,}, stabilization {recipe.stabilize:,}, "
          f"adjustments every {recipe.interval:,}", flush=True)
    return problem, method


def run(config: Config, recipe: Recipe, args: argparse.Namespace) -> dict:
    """Trains once, writes the run's folder and returns what is in its results.json."""
    code = commit()  # now: it may change while the run trains
    folder = folder_of(config, args.output_dir)
    problem, method = make(config, recipe, args)
    log = train(problem, method, config, folder / "checkpoint.pt", args.report_to)
    metrics = log["history"][-1]["metrics"]
    results = dict(
        arguments=asdict(config), recipe=asdict(method.recipe), metrics=metrics,
        floor=problem.floor, floor_name=problem.floor_name, note=problem.note(metrics),
        planted_ranks=problem.planted_ranks, adapter_parameters=method.parameters(),
        total_steps=method.t, seconds=round(log["seconds"], 1), commit=code, versions=versions(),
        ranks=method.ranks(), history=log["history"], adjustments=log["adjustments"],
        scores=log["scores"])
    if shared.PROCESS == 0:
        method.export(folder)
        write_folder(folder, problem, results)
    return results


def write_folder(folder: Path, problem: Problem, results: dict) -> None:
    """Predictions, figures, and last results.json, which marks the run as finished."""
    figures.curve(folder / "log.csv", folder / "loss.png")
    if problem.outputs:
        outputs = {name: rounded(values, 4) for name, values in problem.outputs.items()}
        (folder / "predictions.json").write_text(json.dumps(outputs))
    ranks = {"planted": problem.planted_ranks, "found": results["ranks"]}
    maps = {f"ranks {name}, total {sum(found.values())}": report.grid(found)
            for name, found in ranks.items() if found}
    figures.heatmaps(maps, folder / "ranks.png")
    if results["adjustments"]:
        figures.over_time(report.ranks_over_time(results), folder / "ranks-over-time.png")
    scores = {f"after step {step}": report.log_scores(S)
              for step, S in results["scores"].items() if S}  # LoRA has none
    if scores:
        figures.distributions(scores, folder / "scores.png")
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in results.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"  # a line for each
    report.write(folder / "results.json", lambda path: path.write_text(text))
    (folder / "checkpoint.pt").unlink()


# ---- The command ----
def earlier(config: Config, args: argparse.Namespace) -> dict | None:
    """The results of a finished run, else None. ValueError if its folder holds another run."""
    path = folder_of(config, args.output_dir) / "results.json"
    if not path.exists():
        if path.with_name("checkpoint.pt").exists() and not (args.resume or args.dry_run):
            raise ValueError(f"{path.parent} has an unfinished run: --resume goes on with it")
        return None
    results = json.loads(path.read_text())
    check_same(path, results["arguments"], config)
    if args.ranks and results["ranks"] != args.ranks:
        raise ValueError(f"{config.ranks} had other ranks when the run of {path} was made")
    return results


def check_hub(args: argparse.Namespace) -> None:
    """If the hub is needed and does not answer, goes offline: no library then waits for it."""
    hub = huggingface_hub.constants
    local = not args.model or args.data_dir and Path(args.model).exists()
    if local or hub.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(hub.ENDPOINT, timeout=3)
    except Exception as error:  # of whatever client the hub's library uses
        print(f"reproduce.py: {hub.ENDPOINT} does not answer ({type(error).__name__}). Without it: "
              f"what was downloaded before, or --model folders/{Path(args.model).name} "
              f"--data-dir folders/{args.family}", file=sys.stderr)
        hub.HF_HUB_OFFLINE = True


def dry_run(args: argparse.Namespace, runs: list[tuple[Config, Recipe]]) -> None:
    """Prints the hours of training of all runs, by a timed step of each kind."""
    total = 0.0
    for _, alike in itertools.groupby(runs, lambda run: (run[0].task, run[0].method, run[0].rank)):
        alike = [*alike]  # but for the seed
        problem, method = make(*alike[0], args)
        batch = next(iter(problem.batches(1)))
        problem.model.train()
        for _ in range(2):  # the first one takes longer
            start = time.time()
            loss, _, _ = train_step(problem, batch, method)
            loss.item()  # waits for the GPU
        seconds = time.time() - start
        hours = len(alike) * method.schedule.total_steps * seconds / 3600
        total += hours
        print(f"  {seconds:.2g} s a step, seeds: {len(alike)}, hours: {hours:.2f}", flush=True)
    print(f"{len(runs)} runs are left, {total:.2f} hours without their evaluations")


def run_all(args: argparse.Namespace, runs: list[tuple[Config, Recipe]]) -> None:
    """Makes all runs, but skips what is finished. What is known to fail is refused before."""
    dtype = args.dtype or (best_dtype() if args.model else None)
    runs = [(replace(config, processes=shared.PROCESSES, dtype=dtype), recipe)
            for config, recipe in runs]
    check_files(args.model, args.data_dir, [folder_of(c, args.output_dir) for c, _ in runs])
    report.check_page(args.output_dir, args.family)
    if any(recipe.batch_size % shared.PROCESSES for _, recipe in runs):
        raise ValueError(f"{shared.PROCESSES} processes cannot share every batch equally")
    if args.report_to and not importlib.util.find_spec(args.report_to):
        raise ValueError(f"--report-to {args.report_to}: pip install {args.report_to}")
    check_hub(args)
    known = [earlier(config, args) for config, _ in runs]
    if args.dry_run:
        return dry_run(args, [run for run, results in zip(runs, known) if not results])
    table = None
    for (config, recipe), results in zip(runs, known):
        lines = report.describe(results or run(config, recipe, args))
        done = "finished before" if results else "written"
        print(*lines, f"  {done}: {folder_of(config, args.output_dir)}", sep="\n", flush=True)
        if shared.PROCESS == 0 and not results:  # the next run may be interrupted
            table = report.compare(args.output_dir, args.family)
    if shared.PROCESS == 0:
        table = table or report.compare(args.output_dir, args.family)  # if all were finished
        if FAMILIES[args.family].results or len(runs) > 1:
            print(f"{table}\n\nwritten: {args.output_dir / args.family}.md")


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
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent
        if error.__cause__ or raised_in not in (ROOT, ROOT / "experiments"):
            raise  # a library's: its traceback says more
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
