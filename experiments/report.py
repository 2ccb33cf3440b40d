"""From results.json to what is read: printed lines and tables. Needs no torch.

    python -m experiments.report results/*/   # README.md and figures of all, and forest.png

A folder of runs of one task gets a README.md: commands, means and standard deviations over seeds,
differences to one reference, mean ranks, rank correlations. The figures are made by figures.py.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas

METHODS = dict(
    elalora="ElaLoRA", svd="even ranks", final="its final ranks from the start",
    shuffled="its ranks, shuffled", lora="LoRA", eva="EVA", adalora="AdaLoRA")
TASKS = dict(planted="planted ranks", mrpc="MRPC", stsb="STS-B", sst2_heldout="SST-2")
SETTINGS = dict(
    learning_rate="lr {}", lambda_rate="Λ rate × {}", init_ratio="first rank × {}", shape="{} b",
    alpha="α = {}", gamma="penalty {}", beta1="β₁ = {}", beta2="β₂ = {}", warmup="warm-up {}",
    stabilize="stabilization {}", interval="interval {}", batch_size="batch {}", b="b = {}",
    k="k = {}", lr_scheduler="{} learning rate", moments="{} moments",
    processes="{} processes", examples="{} examples", start="{} start", growth="{} growth",
    protect="protection {}")


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Lets writer(path) write under a temporary name, to the disk, and only then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp-{path.name}")
    writer(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ---- Names ----
def label(arguments: dict) -> str:
    """What tells a run from others, but for the seed, in the names of folders."""
    words = [arguments["method"], f"r{arguments['rank']}", "+".join(arguments["targets"]),
             Path(arguments.get("ranks") or "").stem]
    return "-".join(filter(None, [*words, *arguments["set"]]))


def words(arguments: dict) -> list[str]:
    """What label() has, in people's words; rank 4 and all matrices are not named."""
    settings = (setting.partition("=") for setting in arguments["set"])
    file = arguments.get("ranks")
    return [f"ranks of {Path(file).name}" if file else METHODS[arguments["method"]],
            *[f"rank {arguments['rank']}"] * (arguments["rank"] != 4),
            *[f"only {' + '.join(arguments['targets'])}"] * any(arguments["targets"]),
            *(SETTINGS[name].format(value) for name, _, value in settings)]


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
    for i, component in enumerate(names[:-1]):
        if component.isdecimal():
            return ".".join(names[:i]), component, ".".join(names[i + 1 :])
    return "", "", name


def mean_ranks(ranks: dict[str, int]) -> dict[str, float]:
    """The kinds of matrices and their mean ranks over the layers."""
    return grid(ranks).mean(axis="columns").to_dict() if ranks else {}


# ---- One run ----
def count_pruned(results: dict) -> tuple[float, float]:
    """How many ranks the adjustments pruned, and how many of the pruned ones they had added."""
    if not results["adjustments"]:
        return math.nan, math.nan
    pruned, again, initial = 0, 0, dict.fromkeys(results["ranks"], results["rank"])
    for name, indices in ((n, i) for a in results["adjustments"] for n, i in a["pruned"].items()):
        old = sum(i < initial[name] for i in indices)  # added ranks come last
        pruned, again = pruned + len(indices), again + len(indices) - old
        initial[name] -= old
    return pruned, again


def ranks_over_time(results: dict) -> pandas.DataFrame:
    """The mean ranks of each kind of matrix (columns) at the start, after each adjustment and at
    the end (steps)."""
    ranks = dict.fromkeys(results["ranks"], results["rank"])
    rows = {0: mean_ranks(ranks)}
    for adjustment in results["adjustments"]:
        for name, indices in adjustment["pruned"].items():
            ranks[name] -= len(indices)
        for name, n in adjustment["expanded"].items():
            ranks[name] += n
        rows[adjustment["step"]] = mean_ranks(ranks)
    return pandas.DataFrame(rows | {results["total_steps"]: mean_ranks(ranks)}).T


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


# ---- Numbers ----
def plain(x: float, digits: int | None = None) -> str:
    """With so many decimals, and no minus before zeros; by default what four digits show."""
    if digits is None:
        digits = 0 if x == round(x) else max(0, 3 - math.floor(math.log10(abs(x))))
    return f"{round(x, digits) + 0.0:,.{digits}f}"


def decimals(stds: pandas.Series) -> int:
    """As many as show two digits of the typical standard deviation of a column."""
    stds = stds[stds > 1e-9]
    return max(0, 1 - math.floor(math.log10(stds.median()))) if len(stds) else 4


def means(groups: pandas.api.typing.DataFrameGroupBy) -> pandas.DataFrame:
    """Mean ± standard deviation by group and column, or only the mean if nothing varies."""
    mean, std = groups.mean(), groups.std()
    digits = {name: decimals(std[name]) for name in std}
    return pandas.DataFrame({name: {
        run: "" if math.isnan(x := mean.loc[run, name]) else plain(x)
        if not std.loc[run, name] > 1e-9 * abs(x) else
        f"{plain(x, digits[name])} ± {plain(std.loc[run, name], digits[name])}"
        for run in mean.index} for name in mean}).rename_axis("run")


def detectable(std: float, n: int, tests: int = 1) -> float:
    """The least mean difference that a t-test of n pairs finds in 80% of all cases, at 5% shared
    equally by so many tests, which is Holm's first step."""
    import scipy.optimize
    import scipy.stats
    critical = scipy.stats.t.isf(0.025 / tests, n - 1)
    power = lambda d: scipy.stats.nct.sf(critical, n - 1, d * math.sqrt(n))
    return std * scipy.optimize.brentq(lambda d: power(d) - 0.8, 0.01, 50)


def holm(p: pandas.Series) -> pandas.Series:
    """p-values corrected for their number (Holm's step-down method)."""
    ordered = p.dropna().sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def differences(rows: pandas.DataFrame, metric: str,
                contrasts: dict[str, tuple[str, str]]) -> pandas.DataFrame:
    """By name, the first run minus the second, paired by seed; tested from five pairs on."""
    import scipy.stats
    by_seed, found = rows.pivot(index="seed", columns="run", values=metric), {}
    for name, (first, second) in contrasts.items():
        pairs = (by_seed[first] - by_seed[second]).dropna()
        if len(pairs) < 2:
            continue
        test = scipy.stats.ttest_1samp(pairs, 0)
        low, high = test.confidence_interval(0.95)
        tested = len(pairs) >= 5 and pairs.std() > 0
        found[name] = dict(
            mean=pairs.mean(), std=pairs.std(), n=len(pairs),
            **dict(low=low, high=high, p=test.pvalue) if tested else {})
    table = pandas.DataFrame(found).T.reindex(columns=["mean", "std", "n", "low", "high", "p"])
    tests = int(table["p"].count())
    least = [detectable(row["std"], int(row["n"]), tests) if row["p"] == row["p"] else math.nan
             for _, row in table.iterrows()]
    return table.assign(p=holm(table["p"]), detectable=least)


def verdict(row: pandas.Series) -> str:
    """Of a difference, at 5% after the correction."""
    if math.isnan(row["p"]):
        return "not tested"
    if row["p"] >= 0.05:
        return "inconclusive"
    return "higher" if row["mean"] > 0 else "lower"


# ---- All runs of a task ----
def read(folder: Path, arguments: dict | None = None) -> list[dict]:
    """The results in a folder, by default of runs like the first but for method, rank, settings
    and seed; with a "title" in words, without the settings that all of them share."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))]
    runs = [r for r in runs if "history" in r]  # no benchmark
    like = arguments or (runs[0]["arguments"] if runs else {})
    varied = ("method", "rank", "targets", "set", "seed", "ranks")
    runs = [r for r in runs if all(r["arguments"].get(name) == x for name, x in like.items()
                                   if name not in varied)]
    shared = set.intersection(*(set(words(r["arguments"])[1:]) for r in runs)) if runs else set()
    for r in runs:
        method, *others = words(r["arguments"])
        r["title"] = ", ".join([method, *(word for word in others if word not in shared)])
    return runs


def reference_of(runs: list[dict]) -> str:
    """ElaLoRA with the rank and the settings that most runs share; without ElaLoRA, the first."""
    settings = [[r["arguments"][name] for name in ("rank", "targets", "set")] for r in runs]
    shared = {r["title"]: (settings.count(s), -len(s[-1]))
              for r, s in zip(runs, settings) if r["method"] == "elalora"}
    return max(shared, key=shared.get) if shared else runs[0]["title"]


def contrasts_of(folder: Path, runs: list[dict]) -> tuple[str, dict[str, tuple[str, str]]]:
    """What to subtract from what: heading, and name -> titles of two runs.

    contrasts.json, written before the runs, lists pairs of titles without learning rates. Without
    this file, every other run is subtracted from the reference. ValueError if a title could be that
    of several runs.
    """
    titles = [*dict.fromkeys(r["title"] for r in runs)]
    if not (path := folder / "contrasts.json").exists():
        reference = reference_of(runs)
        others = {other: (reference, other) for other in titles if other != reference}
        return f"{reference} minus the other runs", others
    named = {}
    for title in titles:
        name = ", ".join(word for word in title.split(", ") if not word.startswith("lr "))
        if named.setdefault(name, title) != title:
            raise ValueError(f"{path}: {name!r} could be {named[name]!r} or {title!r}")
    asked = json.loads(path.read_text())
    pairs = [(a, b) for a, b in asked if a in named and b in named]
    return (f"{len(pairs)} of {len(asked)} contrasts named before the runs, first minus second",
            {f"{a} − {b}": (named[a], named[b]) for a, b in pairs})


def log_scores(S: list[float]) -> pandas.Series:
    """log10, of 0 -20."""
    return np.log10(pandas.Series(S, dtype=float).clip(lower=1e-20))


def last_scores(results: dict) -> pandas.Series:
    """log10 of the scores at the end of the search."""
    return log_scores([*results["scores"].values()][-1])


def rank_correlations(ranks: dict[tuple[str, int], dict[str, int]]) -> pandas.DataFrame:
    """Spearman's: mean (least to greatest) of all pairs of two settings' runs, (name, seed)."""
    if len(ranks) < 2:
        return pandas.DataFrame()
    pairs = pandas.DataFrame(ranks).corr("spearman").rename_axis(["rank correlations", "seed"])
    others = pairs.mask(np.eye(len(pairs), dtype=bool)).stack([0, 1]).dropna()
    return others.groupby(level=[0, 2]).agg(
        lambda x: f"{plain(x.mean(), 2)} ({plain(x.min(), 2)} to {plain(x.max(), 2)})"
    ).unstack(fill_value="")


def measured(runs: list[dict]) -> pandas.DataFrame:
    """A row for every run: what it was, what it reached, what it took."""
    return pandas.DataFrame(
        dict(run=r["title"], seed=r["seed"]) | r["metrics"] | dict(
            train_loss=r["history"][-1]["train_loss"], adapter_parameters=r["adapter_parameters"],
            minutes=r["seconds"] / 60) | dict(zip(("pruned", "of those added"), count_pruned(r)))
        for r in runs)


def table_of_runs(rows: pandas.DataFrame, floor: dict[str, dict]) -> pandas.DataFrame:
    """One row for each setting, and one for the metrics of a guess without a model."""
    groups = rows.drop(columns="seed").groupby("run", sort=False)
    table = means(groups)
    for name, digits in (("adapter_parameters", 0), ("minutes", 1), ("pruned", 0),
                         ("of those added", 0)):
        table[name] = ["" if math.isnan(x) else plain(x, digits) for x in groups[name].mean()]
    table = table.assign(seeds=groups.size().astype(str))
    for name, metrics in floor.items():
        table.loc[name] = {column: plain(metrics[column]) if column in metrics else ""
                           for column in table}
    return table.rename(columns=lambda name: name.replace("_", " "))


def table_of_differences(found: pandas.DataFrame) -> pandas.DataFrame:
    """In words, with the digits that the standard deviations allow."""
    rows, digits = {}, decimals(found["std"].astype(float))
    signed = lambda x: ("+" if round(x, digits) > 0 else "") + plain(x, digits)
    for other, row in found.iterrows():
        tested = not math.isnan(row["p"])
        rows[other] = {
            "difference": f"{signed(row['mean'])} ± {plain(row['std'], digits)}",
            "95% interval": f"{signed(row['low'])} to {signed(row['high'])}" if tested else "",
            "p (Holm)": f"{row['p']:.2g}" if tested else "",
            "detectable": plain(row["detectable"], digits) if tested else "",
            "verdict": verdict(row), "pairs": int(row["n"])}
    return pandas.DataFrame(rows).T


def hardware_of(runs: Iterable[dict]) -> str:
    """In words; of several machines, all."""
    return "; ".join(sorted({f"torch {r['versions']['torch']}, {r['versions']['hardware']}"
                             for r in runs}))


def page_of(folder: Path, task: str) -> tuple[Path, str]:
    """The page of a task's runs, and how the names of its figures begin: README.md and "" if the
    folder has runs of this task alone. ValueError if README.md is not one of report's."""
    tasks = {path.parent.name.split("-")[0] for path in folder.glob("*-*/results.json")} | {task}
    path = folder / (f"{task}.md" if len(tasks) > 1 else "README.md")
    if path.exists() and MARK not in path.read_text():
        raise ValueError(f"{path} is not a page of runs and would be overwritten; take another "
                         "--output-dir")
    return path, f"{task}-" if len(tasks) > 1 else ""


def compare(folder: Path, arguments: dict | None = None) -> str:
    """Writes README.md and the figures of the runs that read() finds. Returns the tables, but
    nothing for a single run."""
    if not (runs := read(folder, arguments)):
        return ""
    rows, reference = measured(runs), reference_of(runs)
    metric = next(iter(runs[0]["metrics"]))
    heading, contrasts = contrasts_of(folder, runs)
    measures = [name for name in ("loss", metric, "train_loss") if name in rows]
    found = {name: differences(rows, name, contrasts) for name in measures}
    kinds = pandas.DataFrame([mean_ranks(r["ranks"]) for r in runs])
    scores = pandas.DataFrame([last_scores(r).quantile([0.1, 0.5, 0.9]) for r in runs])
    floor = {r["floor_name"]: r["floor"] for r in runs if r.get("floor")}
    tables = {"": table_of_runs(rows, floor)}
    for name, table in found.items():
        tables[f"{heading}, {name.replace('_', ' ')}"] = table_of_differences(table)
    tables["Mean ranks"] = means(kinds.groupby(rows["run"], sort=False))
    moving = [r for r in runs if r["method"] in ("elalora", "adalora")]
    tables["Rank correlations (Spearman)"] = rank_correlations(
        {(r["title"], r["seed"]): r["ranks"] for r in moving})
    tables["log10 of the scores at the end of the search: lowest tenth, median, highest tenth"] = (
        means(scores.groupby(rows["run"], sort=False)).replace("", math.nan).dropna())
    text = "\n\n".join(
        f"## {heading}\n\n{table.to_markdown(disable_numparse=True)}" if heading else
        table.to_markdown(disable_numparse=True) for heading, table in tables.items() if len(table))
    page_path, prefix = page_of(folder, runs[0]["task"])
    pictures = draw(folder, prefix, runs, rows, reference, metric)
    legend = SINGLE if rows["seed"].nunique() < 2 else LEGEND.format(n=found[metric]["p"].count())
    page = PAGE.format(
        folder=folder.name, commands="\n".join(sorted({r["command"] for r in runs})), text=text,
        legend=legend, hardware=hardware_of(runs),
        pictures="\n\n".join(f"{caption}\n\n![{name}]({prefix}{name}.png)"
                             for name, caption in pictures.items()))
    write(page_path, lambda path: path.write_text(page))
    return text if len(runs) > 1 else ""


MARK = "<!-- made by experiments/report.py -->"
PAGE = MARK + """
# {folder}

```sh
{commands}
```

{hardware}

After the last epoch: {legend}

{text}

{pictures}
"""
LEGEND = """mean ± standard deviation over the seeds. Differences are paired by seed. Of those in a
table, {n} are tested (Student's t, from five pairs on; p corrected by Holm for their number).
"Detectable" is the least true difference that these tests would find in 80% of all cases. "Of those
added" counts pruned ranks that an earlier adjustment had added."""
SINGLE = """the numbers of single runs; no difference is tested. "Of those added" counts pruned
ranks that an earlier adjustment had added."""


def draw(folder: Path, prefix: str, runs: list[dict], rows: pandas.DataFrame, reference: str,
         metric: str) -> dict[str, str]:
    """Writes the figures for which there is data, returns their names and captions."""
    from experiments import figures
    whole = [r for r in runs if not any(r["arguments"]["targets"])] or runs  # all matrices adapted
    of_reference = [r for r in runs if r["title"] == reference]
    epochs = pandas.DataFrame(
        dict(run=r["title"], seed=r["seed"], epoch=e["epoch"], train_loss=e["train_loss"])
        | e["metrics"] for r in whole for e in r["history"])
    metrics = [name for name in epochs.columns[4:] if epochs[name].notna().all()]
    shown = ["train_loss", *([metric] if metric in metrics else metrics[:1])]
    pictures = {}
    if rows["run"].nunique() > 12:
        pictures["settings"] = ("Every run, by setting; the line is the reference's mean.",
                                lambda path: figures.dots(rows, metric, reference, path))
    elif epochs["epoch"].nunique() > 1:
        pictures["curves"] = ("Mean over the seeds, lowest and highest, by epoch.",
                              lambda path: figures.curves(epochs, shown, reference, path))
    if any(r["adjustments"] for r in of_reference):
        planted = mean_ranks(next((r["planted_ranks"] for r in of_reference
                                   if r.get("planted_ranks")), {}))
        pictures["ranks-over-time"] = (
            f"Mean, lowest and highest over the seeds of {reference}.", lambda path:
            figures.over_time([ranks_over_time(r) for r in of_reference], planted, path))
        pictures["rank-maps"] = (f"Final ranks of {reference}, by matrix and layer.", lambda path:
                                 figures.heatmaps({f"seed {r['seed']}": grid(r["ranks"])
                                                   for r in of_reference[:3]}, path))
    first = rows["seed"].min()
    scores = {r["title"]: last_scores(r) for r in whole if r["seed"] == first}
    if scores := {name: S for name, S in scores.items() if len(S)}:  # LoRA has none
        pictures["scores"] = (f"Scores of all ranks at the end of the search, seed {first}.",
                              lambda path: figures.distributions(scores, path))
    for name, (_, picture) in pictures.items():
        write(folder / f"{prefix}{name}.png", picture)
    return {name: caption for name, (caption, _) in pictures.items()}


def forest(folders: list[Path], path: Path) -> None:
    """The contrasts of all folders that name some and have a loss, in one picture: the second's
    loss minus the first's, so that to the right the first is better."""
    from experiments import figures
    panels = {}
    for folder in folders:
        if not (folder / "contrasts.json").exists():
            continue
        runs = read(folder)
        rows = measured(runs)
        if "loss" not in rows:
            continue
        _, contrasts = contrasts_of(folder, runs)
        found = differences(rows.assign(loss=-rows["loss"]), "loss", contrasts)
        if len(found := found.dropna()):
            task = TASKS.get(runs[0]["task"], runs[0]["task"])
            panels[f"{task} ({folder.name}): loss of the second minus that of the first"] = (
                found.rename(index=lambda name: name.replace(
                    " − ", "\nagainst " if len(name) > 34 else " against ")))  # two lines if long
    if panels:
        write(path, lambda path: figures.forest(panels, path))


def costs(folder: Path) -> str:
    """Writes README.md and cost.png of a benchmark's results.json, returns the tables."""
    from experiments import figures
    results = json.loads((folder / "results.json").read_text())
    by_method = {METHODS.get(name, "frozen model"): x for name, x in results["costs"].items()}
    tables = {"Medians of milliseconds, and bytes": pandas.DataFrame(by_method),
              "Quartiles of ratios of steps of the same round": pandas.DataFrame(
                  results["ratios"]).T,
              "How ElaLoRA's own parts grow with the matrices (milliseconds, width 256)":
                  pandas.DataFrame(results["growth"])}
    text = "\n\n".join(f"## {heading}\n\n{table.to_markdown(floatfmt=',.4g')}"
                       for heading, table in tables.items())
    command = results.get("command", "python -m experiments.benchmark")
    write(folder / "README.md", lambda path: path.write_text(
        f"{MARK}\n# {folder.name}\n\n```sh\n{command}\n```\n\n{hardware_of([results])}\n\n"
        f"![cost of a step](cost.png)\n\n{text}\n"))
    parts = ["passes", "penalty", "optimizer", "allocator"]
    write(folder / "cost.png", lambda path: figures.bars(by_method, parts, path))
    return text


def truncations(folder: Path) -> str:
    """Writes README.md and truncated.png of what headroom.py measured, returns the tables."""
    from experiments import figures
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*-truncated.json"))]
    rows = pandas.concat([pandas.DataFrame(x["rows"]).assign(task=TASKS.get(x["task"], x["task"]))
                          for x in found])
    tables = {}
    for task, of_task in rows.groupby("task"):
        of_task = of_task.drop(columns="task").dropna(axis="columns")
        metrics = [name for name in of_task if name not in ("seed", "rank", "map")]
        by_seed = of_task.groupby(["rank", "map", "seed"], sort=False)[metrics].mean()
        run = by_seed.index.map(lambda key: f"{key[1]}, mean rank {key[0]}")
        table = means(by_seed.groupby(run, sort=False))
        counts = of_task.groupby(["rank", "map"], sort=False).size()
        tables[task] = table.assign(evaluations=[str(n) for n in counts])
    text = "\n\n".join(f"## {task}\n\n{table.to_markdown(disable_numparse=True)}"
                       for task, table in tables.items())
    commands = "\n".join(sorted(x["command"] for x in found))
    write(folder / "README.md", lambda path: path.write_text(TRUNCATED.format(
        mark=MARK, folder=folder.name, commands=commands, hardware=hardware_of(found), text=text)))
    write(folder / "truncated.png", lambda path: figures.strips(rows, path))
    return text


TRUNCATED = """{mark}
# {folder}

```sh
{commands}
```

{hardware}

What a LoRA of rank 64 learned, cut to a mean rank per matrix in several ways, without more
training: mean ± standard deviation over the seeds (of shuffled maps, each seed counts with its
mean).

![truncated updates](truncated.png)

{text}
"""


def write_page(folder: Path) -> str:
    """Writes README.md and the figures of a folder of results of any kind, returns the tables."""
    if (folder / "results.json").exists():
        return costs(folder)
    return truncations(folder) if [*folder.glob("*-truncated.json")] else compare(folder)


def main(folders: list[str]) -> None:
    if not folders:
        sys.exit("usage: python -m experiments.report FOLDER ...")
    paths = [Path(folder) for folder in folders]
    for folder in paths:
        kinds = ("results.json", "*/results.json", "*-truncated.json")
        if any(path for kind in kinds for path in folder.glob(kind)):
            write_page(folder)
            print(folder / "README.md")
    if len(paths) > 1:
        forest(paths, paths[0].parent / "forest.png")


if __name__ == "__main__":
    main(sys.argv[1:])
