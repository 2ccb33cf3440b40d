"""From the runs' results.json to what is read: lines, tables, studies. Needs no torch.

    python -m experiments.report pack runs results/mrpc   # adds all runs in runs/ to a study
    python -m experiments.report results/*.csv            # prints the tables of studies
    python -m experiments.report fill README.md results/README.md

A study is two files. STUDY.csv has a row a run: what was asked, what it reached, what it took.
STUDY.jsonl.gz has a line a run: all of its results.json, "predictions" and "folder". contrasts.json
beside them names the differences to test: study -> family -> pairs of runs. Without it, ElaLoRA is
compared with every other run. `fill` writes results into texts, between <!--STUDY;RUN;METRIC-->
and <!--end-->. RUN may be a difference, "ElaLoRA − LoRA". STUDY may be followed by a task. A
fourth field says what is written, as {mean:.0%}; there are mean, std, n, and of differences low,
high, p, detectable.
"""

import gzip
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas

from experiments.tables import FAMILIES, Config

METHODS = dict(  # the last three are in results/ only
    elalora="ElaLoRA", svd="even ranks", lora="LoRA", adalora="AdaLoRA",
    eva="EVA", final="ElaLoRA's final ranks", shuffled="shuffled ranks")
ASKED = asdict(Config(None, None, None, None))  # the defaults of what older runs do not name
RESULTS = Path(__file__).parent.parent / "results"
LEGEND = """Mean ± standard deviation over the seeds; (n) where only n of them are done. An average
is over the tasks shown. Parameters are counted at the end of a run; the paper counts AdaLoRA's at
the start. Differences are paired by seed and tested from five pairs on (Student's t, Holm's
correction)."""
MARK = "<!-- made by experiments/report.py -->"
DIFFERENCE = "{mean:+.{d}f} ± {std:.{d}f} (p = {p:.2g})"


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
    """What tells a run from others, but for task and seed, in the names of folders."""
    words = [arguments["method"], f"r{arguments['rank']}", "+".join(arguments["targets"]),
             Path(arguments.get("ranks") or "").stem, *sorted(arguments["set"])]
    return "-".join(filter(None, words))


def words(results: dict) -> list[str]:
    """What tells a run from others, but for task and seed, for people.

    First comes the method, or a "name" that was added to the results. Rank 4 is not named.
    """
    asked = ASKED | results["arguments"]
    method = METHODS.get(asked["method"], asked["method"])
    if asked["ranks"]:
        method = f"ranks of {asked['ranks']}"
    found = [results.get("name", method)]
    found += [f"rank {asked['rank']}"] * (asked["rank"] != 4)
    found += [f"only {' + '.join(asked['targets'])}"] * any(asked["targets"])
    for setting in sorted(asked["set"]):
        found.append(setting.replace("learning_rate=", "lr ").replace("=", " = "))
    others = ("model", "data_dir", "epochs", "holdout", "dtype", "processes")
    return found + [f"{name} {asked[name]}" for name in others if asked[name] != ASKED[name]]


def shared_words(runs: list[dict]) -> set[str]:
    return set.intersection(*({*words(r)[1:]} for r in runs))


def titles(runs: list[dict]) -> list[str]:
    """The words of each run, without those that all runs share, and without the learning rate where
    the title is clear without it."""
    shared = shared_words(runs)
    found = [[method, *(word for word in rest if word not in shared)]
             for method, *rest in map(words, runs)]
    long = [", ".join(x) for x in found]
    short = [", ".join(word for word in x if not word.startswith("lr ")) for x in found]
    clear = pandas.Series(long).groupby(short).nunique() == 1
    return [s if clear[s] else l for s, l in zip(short, long)]


def grid(ranks: dict[str, int]) -> pandas.DataFrame:
    """A row for every matrix of a layer, a column for every layer.

    Where layers are numbered in several stacks, such as an encoder and a decoder, rows begin with
    what tells the stacks apart. Raises ValueError if two matrices would share a cell.
    """
    numbered = [re.fullmatch(r"(?:(.*?)\.)??(\d+)\.(.+)", name) for name in ranks]
    stacks, layers, kinds = zip(*(found.groups("") if found else ("", "", name)
                                  for name, found in zip(ranks, numbered)))
    components = [stack.split(".") for stack in stacks]
    shared = set.intersection(*map(set, components))
    prefixes = [".".join(c for c in stack if c not in shared) for stack in components]
    rows = [".".join(filter(None, names)) for names in zip(prefixes, kinds)]
    index = pandas.MultiIndex.from_arrays([layers, rows])
    return pandas.Series([*ranks.values()], index).unstack(0, sort=False)


# ---- One run ----
def mean_ranks(ranks: dict[str, int]) -> dict[str, float]:
    """The kinds of matrices and their mean ranks over the layers."""
    return grid(ranks).mean(axis="columns").to_dict() if ranks else {}


def log_scores(S: list[float]) -> pandas.Series:
    """log10, of 0 -20."""
    return np.log10(pandas.Series(S, dtype=float).clip(lower=1e-20))


def count_pruned(results: dict) -> tuple[int, int]:
    """How many ranks the adjustments pruned, and how many of the pruned ones they had added."""
    pruned, again = 0, 0
    initial = dict.fromkeys(results["ranks"], results["arguments"]["rank"])
    for adjustment in results["adjustments"]:
        for name, indices in adjustment["pruned"].items():
            old = sum(i < initial[name] for i in indices)  # added ranks come last
            initial[name] -= old
            pruned += len(indices)
            again += len(indices) - old
    return pruned, again


def describe(results: dict) -> list[str]:
    """The lines printed of a run."""
    sizes = sorted(results["ranks"].values())
    pruned, again = count_pruned(results)
    lines = [
        "{task}, {method}, rank {rank}, seed {seed}: ".format(**results["arguments"])
        + "{total_steps} steps, {seconds:.0f} s".format(**results),
        "  {adapter_parameters:,} adapter parameters, {trainable_parameters:,} in all trained"
        .format(**results),
        f"  {len(sizes)} matrices, total rank {sum(sizes)}, {sizes[0]} to {sizes[-1]} each"]
    if pruned:
        lines[-1] += f"; of {pruned} ranks pruned, {again} had been added by earlier adjustments"
    planted, means = mean_ranks(results.get("planted_ranks")), mean_ranks(results["ranks"])
    for kind, mean in means.items():
        known = f"  (planted {planted[kind]:.0f})" if kind in planted else ""
        lines.append(f"  {kind:<{max(map(len, means))}} mean rank {mean:5.2f}{known}")
    compared = {results.get("floor_name"): results.get("floor", {}),
                "the paper": results.get("paper", {})}
    for metric, value in results["metrics"].items():
        others = [f"{name} {x[metric]:.4f}" for name, x in compared.items() if metric in x]
        lines.append(f"  {metric:<15} {value:.4f}" + f"  ({', '.join(others)})" * bool(others))
    if results.get("note"):
        lines.append(f"  {results['note']}")
    return lines


# ---- Studies ----
def read(folder: Path) -> list[dict]:
    """All runs in a folder of run folders, but no costs. ValueError if a file is broken."""
    runs = []
    for path in sorted(folder.rglob("results.json")):
        predictions = path.with_name("predictions.json")
        try:
            results = json.loads(path.read_text())
            if "history" not in results:
                continue
            results["folder"] = path.parent.relative_to(folder).as_posix()
            if predictions.exists():
                results["predictions"] = json.loads(predictions.read_text())
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path.parent}: {error}; delete it") from None
        runs.append(results)
    return runs


def read_study(study: Path) -> list[dict]:
    """All runs of STUDY.jsonl.gz."""
    with gzip.open(f"{study}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def pack(folder: Path, study: Path) -> None:
    """Adds the runs in a folder to a study's two files. ValueError if the study has another run in
    a folder of this name, or if there is no run."""
    found = {r["folder"]: r for r in read_study(study)} if Path(f"{study}.csv").exists() else {}
    for r in read(folder):
        if found.setdefault(r["folder"], r) != r:
            raise ValueError(f"{study} has another run in a folder of the name {r['folder']}")
    if not found:
        raise ValueError(f"{folder} has no run, which is a folder with a results.json")
    runs = [found[name] for name in sorted(found)]
    rows = frame(runs)
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in runs)
    packed = gzip.compress(lines.encode(), mtime=0)  # the same runs make the same file
    write(Path(f"{study}.jsonl.gz"), lambda path: path.write_bytes(packed))
    write(Path(f"{study}.csv"), lambda path: rows.to_csv(path, index=False))


def frame(runs: list[dict]) -> pandas.DataFrame:
    """What STUDY.csv has. ValueError if two runs have the same task, title and seed."""
    metrics = {name: math.nan for r in runs for name in r["metrics"]}
    rows = pandas.DataFrame([row(r, metrics) for r in runs])
    for _, of_task in rows.groupby("task"):
        rows.loc[of_task.index, "run"] = titles([runs[i] for i in of_task.index])
    keys = rows[["task", "run", "seed"]]
    if keys.duplicated().any():
        twice = ", ".join(map(str, keys[keys.duplicated()].iloc[0]))
        raise ValueError(f"two runs are {twice}; add a \"name\" to one's results.json")
    for _, alike in rows.groupby(["task", "run"]):  # with the ranks of the other seeds
        maps = pandas.DataFrame({i: runs[i]["ranks"] for i in alike.index})
        pairs = maps.corr("spearman").mask(np.eye(len(alike), dtype=bool))
        rows.loc[alike.index, "rank_correlation"] = pairs.mean()
    return rows


def row(r: dict, metrics: dict) -> dict:
    """One run's row, but for what others decide: its title and the correlation of its ranks."""
    asked = {name: r["arguments"].get(name, default) for name, default in ASKED.items()}
    asked |= {name: " ".join(sorted(asked[name])) for name in ("targets", "set")}
    pruned, again = count_pruned(r) if r["adjustments"] else (math.nan, math.nan)
    last_scores = [[], *r["scores"].values()][-1]
    found = dict(run="") | asked | metrics | r["metrics"]
    found |= dict(
        train_loss=r["history"][-1]["train_loss"], adapter_parameters=r["adapter_parameters"],
        seconds=r["seconds"], commit=r.get("commit"), pruned=pruned, pruned_again=again,
        score_median=log_scores(last_scores).median(), rank_correlation=math.nan)
    return found | {f"rank of {kind}": mean for kind, mean in mean_ranks(r["ranks"]).items()}


# ---- Differences ----
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


def differences(rows: pandas.DataFrame, metric: str, pairs: list[list[str]]) -> pandas.DataFrame:
    """The first run minus the second, by name, paired by seed; tested from five pairs on."""
    import scipy.stats
    by_seed, found = rows.pivot(index="seed", columns="run", values=metric), {}
    for first, second in pairs:
        values = (by_seed[first] - by_seed[second]).dropna()
        if len(values) < 2:
            continue
        x = dict(mean=values.mean(), std=values.std(), n=len(values))
        if len(values) >= 5 and values.std() > 0:
            test = scipy.stats.ttest_1samp(values, 0)
            x["low"], x["high"] = test.confidence_interval(0.95)
            x["p"] = test.pvalue
        found[f"{first} − {second}"] = x
    table = pandas.DataFrame(found).T.reindex(columns=["mean", "std", "n", "low", "high", "p"])
    tests = int(table["p"].count())
    least = [detectable(x["std"], int(x["n"]), tests) if x["p"] == x["p"] else math.nan
             for _, x in table.iterrows()]
    return table.assign(p=holm(table["p"]), detectable=least)


def families_of(study: Path, rows: pandas.DataFrame) -> dict[str, list[list[str]]]:
    """The pairs of runs to compare, of runs of one task: those that contrasts.json names, else
    ElaLoRA (with the rank and settings that most runs share) and each other run."""
    path, present = study.with_name("contrasts.json"), [*rows["run"].unique()]
    named = json.loads(path.read_text()).get(study.name, {}) if path.exists() else {}
    if named:
        found = {x: [pair for pair in named[x] if {*pair} <= {*present}] for x in named}
        return {f"{x}, {len(found[x])} of {len(named[x])} named beforehand": found[x]
                for x in named if found[x]}
    asked = rows.reindex(columns=["rank", "targets", "set"])
    asked = pandas.Series(map(str, asked.to_numpy().tolist()), rows.index)
    alike = asked.map(asked.value_counts()).groupby(rows["run"]).first()
    ours = rows["run"][rows["method"] == "elalora"]
    if ours.empty:
        return {}
    reference = min(ours, key=lambda title: (-alike[title], len(title)))
    return {"ElaLoRA and others": [[reference, x] for x in present if x != reference]}


# ---- Tables ----
def digits(std: float) -> int:
    """The decimals that show two digits of a standard deviation, or three if the first is a 1."""
    return max(0, 1 - math.floor(math.log10(std / 2))) if std > 0 else 4


def mean_std(values: pandas.Series) -> str:
    """Only the mean if nothing varies."""
    mean, std = values.mean(), values.std()
    if std > 1e-9 * abs(mean):
        return f"{mean:,.{digits(std)}f} ± {std:,.{digits(std)}f}"
    return "" if math.isnan(mean) else f"{mean:,.0f}" if mean == round(mean) else f"{mean:,.4g}"


def mean_std_n(values: pandas.Series) -> str:
    """And how many there are, if some are missing."""
    n = values.count()
    return f"{mean_std(values)} ({n})" if 0 < n < len(values) else mean_std(values)


def in_words(x: pandas.Series, shape: str = "") -> str:
    """A difference, by default its mean ± standard deviation with the corrected p."""
    text = (shape or DIFFERENCE).format(d=digits(x["std"]), **x)
    return text.replace("(p = nan)", "(not tested)")


def tables(study: Path, rows: pandas.DataFrame) -> str:
    """What the runs of each task reached, their ranks, and the differences."""
    found = {}
    for task, of_task in rows.groupby("task", sort=False):
        present = of_task.dropna(axis="columns", how="all").columns.difference(ASKED, sort=False)
        present = present.drop(["run", "commit"], errors="ignore")
        groups = of_task.groupby("run", sort=False)
        found[task] = groups[[*present]].agg(mean_std).assign(seeds=groups.size()).T
        for family, pairs in families_of(study, of_task).items():
            cells = {}
            for metric in {"loss", present[0], "train_loss"} & {*present}:
                for name, x in differences(of_task, metric, pairs).iterrows():
                    cells.setdefault(metric, {})[name] = in_words(x)
            heading = f"{task}, first minus second: {family}"
            found[heading] = pandas.DataFrame(cells).sort_index(axis="columns")
    return "\n\n".join(f"## {heading}\n\n{table.to_markdown(disable_numparse=True)}"
                       for heading, table in found.items() if table.size)


def papers_table(family: str, runs: list[dict]) -> str:
    """A family's tasks × methods in percent, beside the paper's rows; then, what was not run."""
    columns, rows = FAMILIES[family].columns, []
    runs = sorted(runs, key=lambda r: (r["arguments"]["rank"], label(r["arguments"])))
    for title, r in zip(titles(runs), runs):
        asked = r["arguments"]
        own = {name: asked[name] for name in ("rank", "method", "seed")}
        own["run"] = re.sub(r", rank \d+", "", title)
        rows.append(own | dict(column="parameters", value=r["adapter_parameters"] / 1e6))
        rows += [own | dict(column=name, value=100 * r["metrics"][metric])
                 for name, (task, metric) in columns.items()
                 if task == asked["task"] and metric in r["metrics"]]
    wide = pandas.DataFrame(rows).pivot_table(
        "value", ["rank", "method", "run", "seed"], "column", sort=False)
    present = [name for name in columns if name in wide]
    wide["average"] = wide[present].mean(axis="columns", skipna=False)
    lines = []
    for (rank, method, run), seeds in wide.groupby(level=[0, 1, 2], sort=False):
        parameters = f"{seeds['parameters'].mean():.2f} M"
        cells = seeds[[*present, "average"]].agg(mean_std_n).to_dict()
        lines.append(dict(rank=rank, run=run, parameters=parameters) | cells)
        paper = FAMILIES[family].results.get((method, rank))
        if paper:
            percent = pandas.Series(paper[1:], [*columns])[present]
            percent["average"] = percent.mean()
            name, parameters = f"{METHODS[method]}, the paper", f"{paper[0]:.2f} M"
            cells = percent.map("{:.2f}".format).to_dict()
            lines.append(dict(rank=rank, run=name, parameters=parameters) | cells)
    missing: dict[str, list[str]] = {}
    done = {(x["method"], x["rank"], x["column"]) for x in rows}
    for method, rank in FAMILIES[family].results:
        lacking = ", ".join(name for name in columns if (method, rank, name) not in done)
        missing.setdefault(lacking, []).append(f"{METHODS[method]} at rank {rank}")
    missing.pop("", None)
    lacking = "; ".join(f"{', '.join(names)}: {tasks}" for tasks, names in missing.items())
    table = pandas.DataFrame(lines).to_markdown(index=False, disable_numparse=True)
    return table + f"\n\nNot run: {lacking}." * bool(lacking)


def check_page(folder: Path, family: str) -> Path:
    """Where the family's page is. ValueError if a file of somebody else's is there."""
    path = folder / f"{family}.md"
    if path.exists() and not path.read_text().startswith(MARK):
        raise ValueError(f"{path} is not a page of runs and would be overwritten; take another "
                         "--output-dir")
    return path


def compare(folder: Path, family: str) -> str:
    """Writes the page of a family's runs, FAMILY.md; returns what it says beside the paper."""
    page, tasks = check_page(folder, family), FAMILIES[family].tasks
    runs = [r for r in read(folder) if r["arguments"]["task"] in tasks]
    rows = frame(runs).drop(columns=["seconds", "commit"])  # the same runs make the same page
    top = papers_table(family, runs)
    every = ", ".join(sorted(shared_words(runs)))
    parts = [f"{MARK}\n# {family}", f"Every run: {every}." * bool(every), top, LEGEND,
             tables(folder / family, rows)]
    whole = "\n\n".join(filter(None, parts)) + "\n"
    write(page, lambda path: path.write_text(whole))
    return top


# ---- Results in texts ----
def fill(text: str, folder: Path = RESULTS) -> str:
    """The text with what the studies in a folder say between its marks. ValueError if they do not
    say it."""
    def filled(mark: re.Match) -> str:
        fields = [x.strip() for x in mark[2].split(";")]
        try:
            return mark[1] + number(folder, *fields) + "<!--end-->"
        except (KeyError, FileNotFoundError) as error:
            raise ValueError(f"{mark[1]}: {error} not found") from None
    return re.sub(r"(<!--([^;>]+(?:;[^;>]+){2,3})-->).*?<!--end-->", filled, text)


def number(folder: Path, study: str, run: str, metric: str, shape: str = "") -> str:
    """A run's mean ± standard deviation, or a difference's with its corrected p."""
    study, _, task = study.partition(" ")
    rows = pandas.read_csv(folder / f"{study}.csv")
    rows = rows[rows["task"] == (task or rows["task"][0])]
    if " − " not in run:
        values = rows.groupby("run")[metric].get_group(run)
        return shape.format(mean=values.mean(), std=values.std(), n=len(values)) or mean_std(values)
    for pairs in families_of(folder / study, rows).values():
        if run.split(" − ") in pairs:
            return in_words(differences(rows, metric, pairs).loc[run], shape)
    raise KeyError(run)


# ---- The command ----
def main(argv: list[str]) -> None:
    if argv[:1] == ["pack"] and len(argv) == 3:
        study = argv[2].removesuffix(".csv")
        pack(Path(argv[1]), Path(study))
        argv = [f"{study}.csv"]
    if argv[:1] == ["fill"]:
        for path in map(Path, argv[1:]):
            filled = fill(path.read_text())
            write(path, lambda temporary: temporary.write_text(filled))
    elif argv and all(name.endswith(".csv") for name in argv):
        for path in map(Path, argv):
            print(f"# {path.stem}\n\n{tables(path.with_suffix(''), pandas.read_csv(path))}\n")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"experiments.report: error: {error}")
