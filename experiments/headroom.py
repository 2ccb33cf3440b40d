"""How much could any allocation of ranks gain? Truncates what a LoRA of rank 64 has learned.

    python reproduce.py --task stsb --method lora --rank 64 --seeds 0 1 2 --output-dir runs/lora64
    python -m experiments.headroom stsb runs/lora64 --maps results/stsb --output-dir runs/headroom

The update of every matrix is cut to its greatest singular values, as many as a map says, and the
model is evaluated: with even ranks, with the ranks that keep most of the updates (Eckart and
Young), with the mean map of the ElaLoRA runs in --maps, and with that map shuffled. The command
also writes maps for reproduce.py --ranks: even ranks plus and minus twice what ElaLoRA's map has
beyond them.
"""

import argparse
import json
import random
import shlex
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from experiments import glue, report
from experiments.problem import Config, Problem, recipe_of, versions


def consensus(folder: Path, rank: int) -> dict[str, float]:
    """The mean final ranks over the seeds of a folder's ElaLoRA runs of this rank, by matrix."""
    runs = [r for r in report.read(folder) if r["method"] == "elalora" and r["rank"] == rank
            and not any(r["arguments"]["targets"])]
    if not runs:
        raise ValueError(f"--maps: {folder} has no ElaLoRA runs of rank {rank}")
    title = report.reference_of(runs)
    maps = [r["ranks"] for r in runs if r["title"] == title]
    return {name: sum(ranks[name] for ranks in maps) / len(maps) for name in maps[0]}


def rounded(wanted: dict[str, float], total: int) -> dict[str, int]:
    """The ranks >= 1 of this sum that are next to the wanted ones."""
    ranks = {name: max(1, round(x)) for name, x in wanted.items()}
    while missing := total - sum(ranks.values()):
        step = 1 if missing > 0 else -1
        name = max((n for n in ranks if ranks[n] + step >= 1),
                   key=lambda n: step * (wanted[n] - ranks[n]))
        ranks[name] += step
    return ranks


def largest(singular_values: dict[str, Tensor], total: int) -> dict[str, int]:
    """So many ranks, where the singular values are largest. This leaves out the least of the
    updates, in squares, that any allocation can (Eckart and Young)."""
    found = sorted(((float(s), name) for name, S in singular_values.items() for s in S),
                   reverse=True)[:total]
    counts = Counter(name for _, name in found)
    return {name: counts[name] for name in singular_values}


def maps(singular_values: dict[str, Tensor], found: dict[str, float], rank: int,
         shuffles: int, seed: int) -> list[tuple[str, dict[str, int]]]:
    """The allocations to evaluate, with their names."""
    total = rank * len(singular_values)
    elalora = rounded(found, total)
    values, generator = [*elalora.values()], random.Random(seed)
    return [("even", dict.fromkeys(singular_values, rank)),
            ("largest singular values", largest(singular_values, total)),
            ("ElaLoRA's", elalora),
            *(("ElaLoRA's, shuffled", dict(zip(elalora, generator.sample(values, len(values)))))
              for _ in range(shuffles))]


def learned(folder: Path, problem: Problem) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The SVD of every matrix's update of a LoRA run; loads its heads into the problem's model."""
    settings = json.loads((folder / "peft" / "adapter_config.json").read_text())
    tensors = {name.removeprefix("base_model.model."): w for name, w in
               load_file(folder / "peft" / "adapter_model.safetensors").items()}
    found = {}
    for name in problem.targets:
        A, B = tensors.pop(f"{name}.lora_A.weight"), tensors.pop(f"{name}.lora_B.weight")
        found[name] = torch.linalg.svd(settings["lora_alpha"] / settings["r"] * B @ A,
                                       full_matrices=False)
    if wrong := problem.model.load_state_dict(tensors, strict=False).unexpected_keys:
        raise ValueError(f"{folder}: what is {wrong[0]}?")
    return found


@torch.no_grad()
def truncate(folder: Path, found: dict[int, dict[str, float]], shuffles: int) -> list[dict]:
    """A row for every allocation that is evaluated: seed, mean rank, its name, metrics. found has
    ElaLoRA's map for each mean rank."""
    arguments = json.loads((folder / "results.json").read_text())["arguments"]
    config = Config(**arguments)
    config = replace(config, holdout=config.task == "sst2_heldout")  # 18,000 phrases take minutes
    problem = glue.problem(config, recipe_of(glue.RECIPES[config.task], config))
    update, rows = learned(folder, problem), []
    weights = {name: problem.model.get_submodule(name).weight for name in update}
    before = {name: w.clone() for name, w in weights.items()}
    problem.model.eval()

    def evaluate(rank: int, name: str, ranks: dict[str, int]) -> None:
        for matrix, (U, S, Vh) in update.items():
            r = ranks[matrix]
            weights[matrix].copy_(before[matrix] + U[:, :r] * S[:r] @ Vh[:r])
        rows.append(dict(seed=config.seed, rank=rank, map=name) | problem.evaluate(True))
        print(*rows[-1].values(), flush=True)

    evaluate(0, "no update", dict.fromkeys(update, 0))
    evaluate(config.rank, "whole update", dict.fromkeys(update, config.rank))
    singular_values = {name: S for name, (_, S, _) in update.items()}
    for rank, elalora in found.items():
        for name, ranks in maps(singular_values, elalora, rank, shuffles, config.seed):
            evaluate(rank, name, ranks)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("task", choices=[*glue.TASKS])
    parser.add_argument("runs", type=Path, help="folder with LoRA runs of the task")
    parser.add_argument("--maps", type=Path, required=True, help="folder with ElaLoRA runs")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4], help="mean ranks")
    parser.add_argument("--shuffles", type=int, default=17, help="for each run and mean rank")
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folders = sorted(path.parent for path in args.runs.glob(f"{args.task}-lora-r64-*/results.json"))
    if not folders:
        raise ValueError(f"{args.runs} has no LoRA runs of rank 64 of {args.task}")
    found = {rank: consensus(args.maps, rank) for rank in args.ranks}
    for rank, elalora in found.items():
        for times in (2, -2):
            dose = rounded({n: rank + times * (x - rank) for n, x in elalora.items()},
                           rank * len(elalora))
            report.write(args.output_dir / f"{args.task}-r{rank}-dose{times:+}.json",
                         lambda path: path.write_text(json.dumps(dose, indent=1)))
    rows = [row for folder in folders for row in truncate(folder, found, args.shuffles)]
    command = shlex.join(["python", "-m", "experiments.headroom", *sys.argv[1:]])
    text = json.dumps(dict(task=args.task, command=command, versions=versions(), rows=rows))
    report.write(args.output_dir / f"{args.task}-truncated.json",
                 lambda path: path.write_text(text))


if __name__ == "__main__":
    main()
