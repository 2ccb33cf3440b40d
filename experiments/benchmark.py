"""What a training step costs, beside PEFT's LoRA and AdaLoRA and the frozen model's passes.

    python -m experiments.benchmark                 # DeBERTaV3-base's size, random weights, texts
    python -m experiments.benchmark --model FOLDER  # another encoder
    python -m experiments.benchmark --task cifar    # batches and model of a task

Steps of all methods are timed in random order on the same batches, and compared by the round.
"""

import argparse
import ctypes
import itertools
import json
import math
import random
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas
import torch
import torch.utils.benchmark
import tqdm
import transformers
from torch import nn

import elalora
import reproduce
from experiments import glue, report
from experiments.common import check_files, matrices, pretrained
from experiments.problem import DEVICE, Config, Problem, Recipe, autocast, trained, versions

ROUNDS, INTERVAL, TEXTS, TOKENS = 40, 5, 8, 128
TIMED = Recipe(TEXTS, 1e-4, 1, 0, 0, INTERVAL, 4, 1, shape="constant")
METHODS = ("elalora", "adalora", "lora", "frozen")
timer = torch.utils.benchmark.timer  # waits for the GPU


def memory_rise(work: Callable[[], object]) -> float:
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
    work()
    return peak() - before


def random_tokens(config: Config, recipe: Recipe) -> Problem:
    """Texts of one length for an encoder, of random weights if the run names none."""
    if config.model:
        model = pretrained(transformers.AutoModelForSequenceClassification, config.model,
                           num_labels=2, dtype=torch.float32)
    else:
        model = transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            relative_attention=True, position_buckets=256, pos_att_type=["p2c", "c2p"],
            share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False))
    targets = matrices(model, glue.adapted_kinds(model), config)
    model.to(DEVICE)
    ids = torch.randint(5, model.config.vocab_size, (ROUNDS, TEXTS, TOKENS)).to(DEVICE)
    batches = [dict(input_ids=x, labels=x[:, 0] % 2) for x in ids]

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        with autocast(config):
            return model(**batch).loss

    return Problem(model, targets, glue.find_heads(model), ROUNDS, lambda epoch: batches, loss,
                   lambda last: {})


def timed_step(problem: Problem, batch: object, training: reproduce.Training) -> dict[str, float]:
    """The parts of train_step in milliseconds, and their sum."""
    times = [("", timer())]
    reproduce.train_step(problem, batch, training, lambda part: times.append((part, timer())))
    spent = {part: 1000 * (end - start) for (_, start), (part, end) in itertools.pairwise(times)}
    return spent | dict(total=sum(spent.values()))


def measure(problems: dict[str, Problem], config: Config
            ) -> tuple[pandas.DataFrame, pandas.DataFrame, dict[str, reproduce.Training]]:
    """Steps of all methods in random order: medians after INTERVAL rounds, ms of all steps."""
    rows, trainings = [], {}
    for method, problem in problems.items():
        problem.steps_per_epoch = ROUNDS
        trainings[method] = reproduce.prepare(problem, replace(config, method=method), TIMED)
        problem.model.train()
    batches = next(iter(problems.values())).batches(1)
    for step, batch in zip(tqdm.trange(1, ROUNDS + 1), itertools.cycle(batches)):
        for method in random.sample([*problems], len(problems)):
            row = dict(method=method, step=step, moves=step % INTERVAL == 0)
            rows.append(row | timed_step(problems[method], batch, trainings[method]))
    warm = rows[INTERVAL * len(problems) :]
    steps = pandas.DataFrame(warm).set_index(["moves", "method", "step"])
    medians = steps.groupby(["moves", "method"]).median()
    costs = medians.loc[False].assign(adjustment=medians.loc[True]["allocator"])
    for method, problem in problems.items():
        weights = trained(problem.model).values()
        costs.loc[method, "trained"] = sum(w.numel() for w in weights)
        training = trainings[method]
        for name, state in (("optimizer", training.optimizer.state),
                            ("allocator", training.allocator.averages)):
            costs.loc[method, f"{name}_bytes"] = sum(
                x.nbytes for tensors in state.values() for x in tensors.values() if x.ndim)
    return costs, steps.loc[False]["total"].unstack("method"), trainings


def inference_ratios(problems: dict[str, Problem]) -> dict[str, pandas.Series]:
    """Passes of the merged model against those of the base, and of the base against itself."""
    frozen = problems["frozen"]
    base, merged = frozen.model.eval(), elalora.merge(problems["elalora"].model).eval()
    batch = next(iter(frozen.batches(1)))
    seconds = pandas.DataFrame(index=range(ROUNDS), columns=range(3), dtype=float)
    for row, i in ((row, i) for row in seconds.index for i in random.sample(range(3), 3)):
        start = timer()
        with torch.no_grad():
            frozen.loss((base, merged, base)[i], batch)
        seconds.loc[row, i] = timer() - start
    return {"inference, merged / base": seconds[1] / seconds[0],
            "inference, base / base": seconds[2] / seconds[0]}


def growth(config: Config) -> pandas.DataFrame:
    """How ElaLoRA's own parts grow with the matrices and their ranks, at width 256."""
    found, batches = [], [torch.ones(1, 256, device=DEVICE)]
    for n, rank in itertools.product((12, 72, 448), (2, 16, 64)):
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(n))).to(DEVICE)
        squares = Problem(model, [str(i) for i in range(n)], [], ROUNDS, lambda epoch: batches,
                          lambda model, x: sum(layer(x).square().sum() for layer in model),
                          lambda last: {})
        costs, _, _ = measure(dict(elalora=squares), replace(config, rank=rank))
        found.append(costs.assign(matrices=n, rank=rank))
    return pandas.concat(found)[["matrices", "rank", "penalty", "allocator", "adjustment"]]


def benchmark(config: Config, folder: Path) -> str:
    """Measures, writes results.json, README.md and cost.png, returns the tables."""
    make, problems, recipe = random_tokens, {}, TIMED
    if config.task:
        family = reproduce.family_of(config)
        by_rank = family.RECIPES[config.task]
        make, recipe = family.problem, next(iter(by_rank.values()))
    for method in METHODS:
        transformers.set_seed(config.seed)
        problems[method] = make(config, recipe)
    costs, ms, trainings = measure(problems, config)
    ratios = {f"{a} / {b}": ms[a] / ms[b] for a, b in itertools.combinations(problems, 2)}
    batch = next(iter(problems["frozen"].batches(1)))
    costs["memory_bytes"] = pandas.Series(
        {m: memory_rise(lambda: timed_step(problems[m], batch, trainings[m])) for m in problems})
    ratios = pandas.DataFrame(ratios | inference_ratios(problems))
    ratios, grown = ratios.quantile([0.25, 0.5, 0.75]).T, growth(config)
    results = dict(
        costs=costs.to_dict("index"), ratios=ratios.to_dict("index"),
        growth=grown.to_dict("records"), arguments=vars(config), versions=versions(),
        command=shlex.join(["python", "-m", "experiments.benchmark", *sys.argv[1:]]),
        rounds=ROUNDS, texts=TEXTS, tokens=TOKENS, recipe=vars(TIMED))
    content = json.dumps(results, indent=1)
    report.write(folder / "results.json", lambda path: path.write_text(content))
    return report.costs(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="experiments.benchmark", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--task", choices=[task for task in reproduce.FAMILY_OF if task != "planted"],
        metavar="TASK", help="default: random tokens for an encoder")
    add("--model", help="hub id or folder; default: the task's, or random weights")
    add("--data-dir", help="as reproduce.py's")
    add("--rank", type=int, default=4, help="default: 4")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add("--output-dir", default="runs", help="default: runs")
    args = parser.parse_args(argv)
    if args.rank < 1:
        parser.error(f"--rank must be >= 1, got {args.rank}")
    name = Path(args.model or "deberta-v3-base").name
    if args.task:
        args.model = args.model or reproduce.FAMILIES[reproduce.FAMILY_OF[args.task]][0]
        name = Path(args.model).name
    folder = Path(args.output_dir, f"benchmark-{args.task or 'random'}-{name}-r{args.rank}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        check_files(args.model, args.data_dir, [folder])
        config = Config(args.task, "elalora", args.rank, 0, args.model, args.data_dir,
                        dtype=args.dtype)
        text = benchmark(config, folder)
    except (ValueError, OSError) as error:
        print(f"experiments.benchmark: error: {str(error).strip().splitlines()[0]}",
              file=sys.stderr)
        sys.exit(2)
    print(f"{text}\n\nmedians of ms and of bytes, quartiles of ratios; written: {folder}")


if __name__ == "__main__":
    main()
