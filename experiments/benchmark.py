"""What a training step costs, beside PEFT's LoRA and AdaLoRA and the frozen model's passes.

    python -m experiments.benchmark                 # DeBERTaV3-base's size, random weights, texts
    python -m experiments.benchmark --model FOLDER  # another encoder
    python -m experiments.benchmark --task cifar    # batches and model of a task

Every round is a step of each method on the same batch, in random order. A ratio is of two steps of
one round, so that a machine that slows down for a while slows both.
"""

import argparse
import itertools
import json
import random
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pandas
import torch.utils.benchmark
import tqdm
import transformers
from torch import nn

from experiments import glue, report
from experiments.data import check_files, matrices, with_new_head
from experiments.methods import METHODS
from experiments.problem import DEVICE, Problem, autocast, commit, versions
from experiments.tables import FAMILIES, FAMILY_OF, Config, Recipe, recipe_of
from experiments.training import make_problem, train_step

ROUNDS, WARM_UP, TEXTS, TOKENS = 40, 5, 8, 128
STEP = Recipe(TEXTS, 1e-4, 1, 0, 0, 5, 4, 1, shape="constant")  # every fifth step moves 4 ranks
timer = torch.utils.benchmark.timer  # waits for the GPU


def random_tokens(config: Config, recipe: Recipe) -> Problem:
    """Texts of one length for an encoder, of random weights if the run names none."""
    if config.model:
        model = with_new_head(transformers.AutoModelForSequenceClassification, config.model, 2)
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


def measure(problems: dict[str, Problem], config: Config) -> pandas.DataFrame:
    """Milliseconds of a step: a row a round after the warm-up, a column a method."""
    methods = {}
    for name, problem in problems.items():
        problem.steps_per_epoch = ROUNDS
        methods[name] = METHODS[name](problem, replace(config, method=name), STEP)
        problem.model.train()
    batches = itertools.cycle(next(iter(problems.values())).batches(1))
    rows = []
    for _, batch in zip(tqdm.trange(ROUNDS), batches):
        row = {}
        for name in random.sample([*methods], len(methods)):
            start = timer()
            train_step(problems[name], batch, methods[name])
            row[name] = 1000 * (timer() - start)
        rows.append(row)
    return pandas.DataFrame(rows, columns=[*methods])[WARM_UP:]


def benchmark(config: Config, folder: Path) -> str:
    """Measures, writes results.json, returns a table."""
    make, recipe, problems = random_tokens, STEP, {}
    if config.task:
        make, recipe = make_problem, recipe_of(config)
    for name in METHODS:
        transformers.set_seed(config.seed)
        problems[name] = make(config, recipe)
    ms = measure(problems, config)
    ratios = ms.div(ms["frozen"], axis="index").quantile([0.25, 0.5, 0.75]).T
    results = dict(
        arguments=asdict(config), ms=ms.median().to_dict(), rounds=len(ms),
        ratios_to_frozen={name: quartiles.tolist() for name, quartiles in ratios.iterrows()},
        texts=TEXTS, tokens=TOKENS, recipe=asdict(STEP), versions=versions(), commit=commit(),
        command=shlex.join(["python", "-m", "experiments.benchmark", *sys.argv[1:]]))
    content = json.dumps(results, indent=1)
    report.write(folder / "results.json", lambda path: path.write_text(content))
    ratios.columns = [f"step / passes alone, {name}" for name in ("1st quartile", "median", "3rd")]
    return ratios.assign(**{"median ms": ms.median()}).to_markdown(floatfmt=".3f")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="experiments.benchmark", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    tasks = [task for family in FAMILIES.values() if family.model for task in family.tasks]
    add("--task", choices=tasks, metavar="TASK", help="default: random tokens for an encoder")
    add("--model", help="hub id or folder; default: the task's, or random weights")
    add("--data-dir", help="as reproduce.py's")
    add("--rank", type=int, default=4, help="default: 4")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    add("--output-dir", default="runs", help="default: runs")
    args = parser.parse_args(argv)
    if args.task:
        args.model = args.model or FAMILIES[FAMILY_OF[args.task]].model
    name = Path(args.model or "deberta-v3-base").name
    folder = Path(args.output_dir, f"benchmark-{args.task or 'random'}-{name}-r{args.rank}")
    config = Config(args.task, "elalora", args.rank, 0, model=args.model, data_dir=args.data_dir,
                    dtype=args.dtype)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        check_files(args.model, args.data_dir, [folder])
        print(f"{benchmark(config, folder)}\n\nwritten: {folder}")
    except (ValueError, OSError) as error:
        parser.error(str(error).strip().splitlines()[0])


if __name__ == "__main__":
    main()
