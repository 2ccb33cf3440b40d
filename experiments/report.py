"""From results.json to what is read: printed lines, tables, figures. Needs no torch.

A run's figures are heatmaps of its ranks (Figures 2 and 3) and the distribution of its scores
(Figure 5). All runs of a task in one folder are compared in its table.md and scores.png.
"""

import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
from matplotlib import colormaps
from matplotlib.figure import Figure

LEGEND = ("Mean ± standard deviation over seeds, after the last epoch (quantiles of log10 of the "
          "scores S: at the end of the search); differences between runs of the same seed; mean "
          "ranks of a kind of matrix; Spearman's correlations of the ranks that any two runs "
          "found: mean (least to greatest).")


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Lets writer(path) write under a temporary name, to the disk, and only then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp-{path.name}")
    writer(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def label(arguments: dict) -> str:
    """What tells a run from others, but for the seed, in folders and tables."""
    words = [arguments["method"], f"r{arguments['rank']}", "+".join(arguments["targets"])]
    return "-".join(filter(None, [*words, *arguments["set"]]))


# ---- One run ----
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
    ranks = results["ranks"]
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
    compared = {results.get("floor_name"): results.get("floor", {}),
                "the paper's ElaLoRA": results.get("paper", {})}
    for metric, value in results["metrics"].items():
        others = [f"{name} {x[metric]:.4f}" for name, x in compared.items() if metric in x]
        lines.append(f"  {metric:<15} {value:.4f}" + f"  ({', '.join(others)})" * bool(others))
    if results.get("note"):
        lines.append(f"  {results['note']}")
    planted, means = mean_ranks(results.get("planted_ranks", {})), mean_ranks(ranks)
    for kind, mean in means.items():
        known = f"  (planted {planted[kind]:.0f})" if kind in planted else ""
        lines.append(f"  {kind:<{max(map(len, means))}} mean rank {mean:5.2f}{known}")
    return lines


def grid(ranks: dict[str, int]) -> pandas.DataFrame:
    """A row for every matrix of a layer, a column for every layer.

    Where layers are numbered in several stacks, such as an encoder and a decoder, rows begin with
    what tells the stacks apart. Raises ValueError if two matrices would share a cell.
    """
    stacks, layers, kinds = zip(*map(split_name, ranks))
    components = [stack.split(".") for stack in stacks]
    shared = set.intersection(*map(set, components))
    prefixes = [".".join(c for c in stack if c not in shared) for stack in components]
    rows = [".".join(filter(None, names)) for names in zip(prefixes, kinds)]
    index = pandas.MultiIndex.from_arrays([layers, rows])
    return pandas.Series([*ranks.values()], index).unstack(0, sort=False)


def split_name(name: str) -> tuple[str, str, str]:
    """A module's name as the stack of layers that it is in, its layer's number, and the rest."""
    names = name.split(".")
    number = next((i for i, component in enumerate(names) if component.isdecimal()), len(names) - 1)
    if names[number].isdecimal() and number + 1 < len(names):
        return ".".join(names[:number]), names[number], ".".join(names[number + 1 :])
    return "", "", name


def mean_ranks(ranks: dict[str, int]) -> dict[str, float]:
    """The kinds of matrices and their mean ranks over the layers."""
    return grid(ranks).mean(axis="columns").to_dict() if ranks else {}


def plot_ranks(panels: dict[str, dict[str, int]], path: Path) -> None:
    """Heatmaps of layers and matrices, as Figure 2."""
    import seaborn
    grids = {title: grid(ranks) for title, ranks in panels.items()}
    height = 3.2 + 0.3 * max(0, max(map(len, grids.values())) - 6)
    figure = Figure(figsize=(7.5 * len(panels), height), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    highest = max(max(ranks.values()) for ranks in panels.values())
    for axis, (title, cells) in zip(axes, grids.items()):
        seaborn.heatmap(cells, annot=True, cmap="Blues", vmin=0, vmax=highest, cbar=False, ax=axis)
        axis.set(xlabel="layer", title=f"ranks {title}, total {sum(panels[title].values())}")
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


# ---- All runs of a task ----
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


def compare(folder: Path, arguments: dict) -> str:
    """Writes table.md and scores.png (Figure 5) of all runs like this one, but for what label()
    has and the seed: mean ± standard deviation over the seeds after the last epoch, differences
    by seed, mean ranks, rank correlations of the ranks."""
    runs, varied = {}, ("method", "rank", "targets", "set", "seed")
    for path in sorted(folder.glob(f"{arguments['task']}-*/results.json")):
        results = json.loads(path.read_text())
        had = results["arguments"]
        if all(had.get(name) == x for name, x in arguments.items() if name not in varied):
            runs[label(had), had["seed"]] = results
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
    kinds = pandas.DataFrame([mean_ranks(r["ranks"]) for r in runs.values()])
    kinds = kinds.groupby(rows["run"].rename("mean ranks"), sort=False)
    groups = rows.drop(columns="seed").groupby("run", sort=False)
    table, kinds = (grouped.agg(lambda x: "{:,.{n}f} ± {:,.{n}f}".format(
        x.mean(), x.std(), n=4 if x.max() < 100 else 0)) for grouped in (groups, kinds))
    metric, *_ = next(iter(runs.values()))["metrics"]
    tables = (table.assign(seeds=groups.size()), paired(rows, metric), kinds, alike)
    text = "\n\n".join(table.to_markdown(disable_numparse=True) for table in tables if len(table))
    text = text.replace("nan ± nan", " " * 9).replace(" ± nan", " " * 6)  # of a single seed
    commands = "\n".join(sorted({r["command"] for r in runs.values()}))
    write(folder / "table.md",
          lambda path: path.write_text(f"```sh\n{commands}\n```\n\n{LEGEND}\n\n{text}\n"))
    ends = {n: [*r["scores"].values()][-1] for n, r in runs.items() if r["seed"] == rows.seed.min()}
    write(folder / "scores.png", lambda path: plot_scores(ends, path))
    return text
