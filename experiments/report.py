"""From the runs' results.json to what is read: lines, tables, studies. Needs no torch.

    python -m experiments.report pack runs results/mrpc   # adds all runs in runs/ to a study
    python -m experiments.report results/*.csv            # prints the tables of studies
    python -m experiments.report fill README.md results/README.md
    python -m experiments.report new-ranks results/mrpc lives.png  # what becomes of added ranks

A study is two files. STUDY.csv has a row a run: what was asked, what it reached, what it took.
STUDY.jsonl.gz has a line a run: all of its results.json, "predictions" and "folder". contrasts.json
beside them names the differences to test: study -> family -> pairs of runs. Without it, ElaLoRA is
compared with every other run. `fill` writes results into texts, between <!--STUDY;RUN;METRIC-->
and <!--end-->. RUN may be a difference, "ElaLoRA − LoRA". STUDY may be followed by a task. A
fourth field says what is written, as {mean:.0%}; there are mean, std, n, and of differences low,
high, p, detectable.
"""

import gzip
import itertools
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
from scipy import optimize, stats

from experiments import figures
from experiments.tables import FAMILIES, METHODS, Config

TITLES = {name: title for name, (title, _) in METHODS.items()}
TITLES |= dict(final="ElaLoRA's final ranks", shuffled="shuffled ranks")  # in results/
ASKED = asdict(Config(None, None, None, None))  # the defaults of what older runs do not name
RESULTS = Path(__file__).parent.parent / "results"
LEGEND = """The heading says what all runs share. The first table is in percent. Mean ± standard
deviation over the seeds; (n) where only n of them are done. An average is over the tasks shown.
Parameters are counted at the end of a run; the paper counts AdaLoRA's at the start. Differences are
paired by seed and tested from five pairs on (Student's t, Holm's correction)."""
MARK = "<!-- made by experiments/report.py -->"


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
             Path(arguments["ranks"] or "").stem, *sorted(arguments["set"])]
    return "-".join(filter(None, words))


def words(results: dict) -> list[str]:
    """What tells a run from others, but for task and seed, for people.

    First comes the method, or a "name" that was added to the results. Rank 4 is not named.
    """
    asked = ASKED | results["arguments"]
    method = TITLES.get(asked["method"], asked["method"])
    if asked["ranks"]:
        method = f"ranks of {asked['ranks']}"
    found = [results.get("name", method)]
    if asked["rank"] != 4:
        found.append(f"rank {asked['rank']}")
    if any(asked["targets"]):
        found.append(f"only {' + '.join(asked['targets'])}")
    for setting in sorted(asked["set"]):
        found.append(setting.replace("learning_rate=", "lr ").replace("=", " = "))
    for name in ("model", "data_dir", "epochs", "holdout", "dtype", "processes"):
        if asked[name] != ASKED[name]:
            found.append(f"{name} {asked[name]}")
    return found


def shared_words(runs: list[dict]) -> set[str]:
    return set.intersection(*({*words(r)[1:]} for r in runs))


def titles(runs: list[dict]) -> list[str]:
    """The words of each run, without those that all runs share, and without the learning rate where
    the title is clear without it."""
    shared = shared_words(runs)
    own = pandas.Series([[word for word in words(r) if word not in shared] for r in runs])
    long = own.str.join(", ")
    short = long.str.replace(r", lr [^,]*", "", regex=True)
    clear = long.groupby(short).transform("nunique") == 1
    return short.where(clear, long).tolist()


# ---- One run ----
def grid(ranks: dict[str, int]) -> pandas.DataFrame:
    """A row for every matrix of a layer, a column for every layer.

    Where layers are numbered in several stacks, such as an encoder and a decoder, rows begin with
    what tells the stacks apart. Raises ValueError if two matrices would share a cell.
    """
    parts = pandas.Series([*ranks]).str.extract(r"^(?:(?:(.*?)\.)??(\d+)\.)?(.+)$").fillna("")
    stacks = [stack.split(".") for stack in parts[0]]
    shared = set.intersection(*map(set, stacks))
    rows = []
    for stack, kind in zip(stacks, parts[2]):
        own = [part for part in stack if part and part not in shared]
        rows.append(".".join([*own, kind]))
    index = pandas.MultiIndex.from_arrays([parts[1], rows])
    return pandas.Series([*ranks.values()], index).unstack(0, sort=False)


def mean_ranks(ranks: dict[str, int]) -> dict[str, float]:
    """The kinds of matrices and their mean ranks over the layers."""
    return grid(ranks).mean(axis="columns").to_dict() if ranks else {}


def ranks_over_time(results: dict) -> pandas.DataFrame:
    """Mean ranks by kind of matrix (columns) until each adjustment and the end (steps)."""
    maps = {moves["step"]: {name: len(S) for name, S in moves["scores"].items()}
            for moves in results["adjustments"]}
    maps[results["total_steps"]] = results["ranks"]
    return pandas.DataFrame({step: mean_ranks(ranks) for step, ranks in maps.items()}).T


def log_scores(S: list[float]) -> pandas.Series:
    """log10, of 0 -20."""
    return np.log10(pandas.Series(S, dtype=float).clip(lower=1e-20))


def describe(results: dict) -> list[str]:
    """What is printed of a run: its metrics and mean ranks beside those that were planted and those
    of a guess."""
    sizes = results["ranks"].values()
    columns = {
        "found": results["metrics"] | mean_ranks(results["ranks"]),
        "planted": mean_ranks(results["planted_ranks"]),
        results["floor_name"]: results["floor"]}
    table = pandas.DataFrame({name: x for name, x in columns.items() if x})
    lines = [
        "{task}, {method}, rank {rank}, seed {seed}: ".format(**results["arguments"])
        + "{total_steps} steps, {seconds:.0f} s".format(**results),
        f"  {len(sizes)} matrices, total rank {sum(sizes)}, {min(sizes)} to {max(sizes)} each; "
        "metrics and mean ranks:",
        table.to_string(float_format="{:.4g}".format, na_rep="")]
    if results["note"]:
        lines.append(f"  {results['note']}")
    return lines


# ---- Studies ----
def read(folder: Path) -> list[dict]:
    """All runs in a folder of run folders."""
    runs = []
    for path in sorted(folder.rglob("results.json")):
        results = json.loads(path.read_text())
        results["folder"] = path.parent.relative_to(folder).as_posix()
        predictions = path.with_name("predictions.json")
        if predictions.exists():
            results["predictions"] = json.loads(predictions.read_text())
        runs.append(results)
    return runs


def read_study(study: Path) -> list[dict]:
    """All runs of STUDY.jsonl.gz."""
    with gzip.open(f"{study}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def pack(folder: Path, study: Path) -> None:
    """Adds the runs in a folder to a study's two files. ValueError if the folder has no run, or if
    the study has another run in a folder of the same name."""
    added = read(folder)
    if not added:
        raise ValueError(f"{folder} has no run, which is a folder with a results.json")
    found = {r["folder"]: r for r in read_study(study)} if Path(f"{study}.csv").exists() else {}
    for r in added:
        if found.setdefault(r["folder"], r) != r:
            raise ValueError(f"{study} has another run in a folder of the name {r['folder']}")
    runs = [found[name] for name in sorted(found)]
    table = frame(runs).to_csv(index=False)
    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in runs)
    packed = gzip.compress(lines.encode(), mtime=0)  # the same runs make the same file
    write(Path(f"{study}.jsonl.gz"), lambda path: path.write_bytes(packed))
    write(Path(f"{study}.csv"), lambda path: path.write_text(table))


def frame(runs: list[dict]) -> pandas.DataFrame:
    """What STUDY.csv has. ValueError if two runs have the same task, title and seed."""
    asked = pandas.DataFrame([ASKED | r["arguments"] for r in runs])[[*ASKED]]
    for name in ("targets", "set"):
        asked[name] = asked[name].map(sorted).str.join(" ")
    found = []
    for r in runs:
        pruned = [len(x) for moves in r["adjustments"] for x in moves["pruned"].values()]
        row = dict(
            train_loss=r["history"][-1]["train_loss"], adapter_parameters=r["adapter_parameters"],
            seconds=r["seconds"], commit=r.get("commit"), rank_correlation=math.nan,
            pruned=sum(pruned) if r["adjustments"] else math.nan)
        if has_scores(r):
            new = new_ranks(r)
            row["pruned_next"] = new["pruned"][new["age"] == 1].mean()  # share of what came
            row["survived"] = 1 - new["pruned"].sum() / sum(pruned)
        found.append(row)
    metrics = pandas.DataFrame([r["metrics"] for r in runs])
    ranks = pandas.DataFrame([mean_ranks(r["ranks"]) for r in runs])
    parts = [asked, metrics, pandas.DataFrame(found), ranks.add_prefix("rank of ")]
    rows = pandas.concat(parts, axis="columns")
    rows.insert(0, "run", "")
    for _, of_task in rows.groupby("task"):
        rows.loc[of_task.index, "run"] = titles([runs[i] for i in of_task.index])
    twice = rows["run"][rows.duplicated(["task", "run", "seed"])]
    if len(twice):
        raise ValueError(f'{twice.iloc[0]}: two runs are alike; add a "name" to a results.json')
    for _, alike in rows.groupby(["task", "run"]):  # with the ranks of the other seeds
        maps = pandas.DataFrame({i: runs[i]["ranks"] for i in alike.index})
        pairs = maps.corr("spearman").mask(np.eye(len(alike), dtype=bool))
        rows.loc[alike.index, "rank_correlation"] = pairs.mean()
    return rows


# ---- What becomes of ranks that were added ----
def has_scores(results: dict) -> bool:
    """Whether ranks moved, and the scores by which they did are there."""
    return any("scores" in moves for moves in results["adjustments"])


def new_ranks(results: dict) -> pandas.DataFrame:
    """A row for every rank that was added, at every adjustment after that: how many adjustments
    ago it came, its score / the median score of all ranks, and whether it is pruned now."""
    rows, came = [], {}  # came: matrix -> the adjustment that added each of its ranks, or None
    for number, moves in enumerate(results["adjustments"]):
        median = np.median([*itertools.chain(*moves["scores"].values())])
        for name, S in moves["scores"].items():
            pruned, here = moves["pruned"].get(name, []), came.get(name, [None] * len(S))
            for i, since in enumerate(here):
                if since is not None:
                    rows.append((number - since, S[i] / median, i in pruned))
            kept = [since for i, since in enumerate(here) if i not in pruned]
            came[name] = kept + [number] * moves["expanded"].get(name, 0)
    return pandas.DataFrame(rows, columns=["age", "score", "pruned"])


# ---- Differences ----
def detectable(std: float, n: int, tests: int = 1) -> float:
    """The least mean difference that a t-test of n pairs finds in 80% of all cases, at 5% shared
    equally by so many tests, which is Holm's first step."""
    critical = stats.t.isf(0.025 / tests, n - 1)
    power = lambda d: stats.nct.sf(critical, n - 1, d * math.sqrt(n))
    return std * optimize.brentq(lambda d: power(d) - 0.8, 0.01, 50)


def holm(p: pandas.Series) -> pandas.Series:
    """p-values corrected for their number (Holm's step-down method)."""
    ordered = p.dropna().sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def differences(rows: pandas.DataFrame, metric: str, pairs: list[list[str]]) -> pandas.DataFrame:
    """The first run minus the second, by name, paired by seed; tested from five pairs on."""
    by_seed, found = rows.pivot(index="seed", columns="run", values=metric), {}
    for first, second in pairs:
        values = (by_seed[first] - by_seed[second]).dropna()
        x = dict(mean=values.mean(), std=values.std(), n=len(values))
        if len(values) >= 5 and values.std() > 0:
            test = stats.ttest_1samp(values, 0)
            x["low"], x["high"] = test.confidence_interval(0.95)
            x["p"] = test.pvalue
        found[f"{first} − {second}"] = x
    table = pandas.DataFrame(found, ["mean", "std", "n", "low", "high", "p", "detectable"]).T
    for name, x in table.dropna(subset="p").iterrows():
        table.loc[name, "detectable"] = detectable(x["std"], x["n"], table["p"].count())
    return table.assign(p=holm(table["p"]))[table["n"] > 1]


def families_of(study: Path, rows: pandas.DataFrame) -> dict[str, list[list[str]]]:
    """The pairs of runs to compare, of runs of one task: those that contrasts.json names, else
    ElaLoRA (with the settings that most runs share) and each other run."""
    path, present = study.with_name("contrasts.json"), rows["run"].unique()
    named = json.loads(path.read_text()).get(study.name) if path.exists() else None
    ours = rows["method"] == "elalora"
    found = {}
    if named:
        for family, pairs in named.items():
            run = [pair for pair in pairs if {*pair} <= {*present}]
            found[f"{family}, {len(run)} of {len(pairs)} named beforehand"] = run
    elif ours.any():
        settings = rows["run"].str.partition(", ")[2]
        alike = settings.groupby(settings).transform("size")
        reference = rows["run"][ours & (alike == alike[ours].max())].min()
        found["ElaLoRA and others"] = [[reference, x] for x in present if x != reference]
    return found


# ---- Tables ----
def digits(std: float) -> int:
    """The decimals that show two digits of a standard deviation, or three if the first is a 1."""
    return max(0, 1 - math.floor(math.log10(std / 2))) if std > 0 else 4


def mean_std(values: pandas.Series) -> str:
    """Only the mean if nothing varies; how many there are, if some are missing."""
    mean, std, n = values.mean(), values.std(), values.count()
    if n == 0:
        return ""
    text = f"{mean:,.0f}" if mean == round(mean) else f"{mean:,.4g}"
    if std > 1e-9 * abs(mean):
        text = f"{mean:,.{digits(std)}f} ± {std:,.{digits(std)}f}"
    return text if n == len(values) else f"{text} ({n})"


def in_words(x: pandas.Series, shape: str = "") -> str:
    """A difference, by default its mean ± standard deviation with the corrected p."""
    shape = shape or "{mean:+.{d}f} ± {std:.{d}f} (p = {p:.2g})"
    return shape.format(d=digits(x["std"]), **x).replace("(p = nan)", "(not tested)")


def tables(study: Path, rows: pandas.DataFrame) -> str:
    """What the runs of each task reached, their ranks, and the differences."""
    found = {}
    for task, of_task in rows.groupby("task", sort=False):
        measured = of_task.dropna(axis="columns", how="all").columns
        measured = [*measured.difference([*ASKED, "run", "commit"], sort=False)]
        groups = of_task.groupby("run", sort=False)
        found[task] = groups[measured].agg(mean_std).assign(seeds=groups.size()).T
        for family, pairs in families_of(study, of_task).items():
            cells = pandas.DataFrame()
            for metric in sorted({"loss", measured[0], "train_loss"} & {*measured}):
                for name, x in differences(of_task, metric, pairs).iterrows():
                    cells.loc[name, metric] = in_words(x)
            found[f"{task}, first minus second: {family}"] = cells
    return "\n\n".join(f"## {heading}\n\n{table.to_markdown(disable_numparse=True)}"
                       for heading, table in found.items() if table.size)


def papers_table(family: str, rows: pandas.DataFrame) -> str:
    """A family's tasks × methods in percent, beside the paper's rows; then, what was not run."""
    keys, first = ["rank", "method", "run"], "parameters, M"
    columns, results = FAMILIES[family].columns, FAMILIES[family].results
    rows = rows.replace({"run": r", rank \d+"}, "", regex=True)
    for name, (task, metric) in columns.items():
        if metric in rows:
            rows[name] = 100 * rows[metric].where(rows["task"] == task)
    done = [name for name in columns if name in rows and rows[name].notna().any()]
    by_seed = rows.groupby([*keys, "seed"])[done].mean()
    by_seed["average"] = by_seed.mean(axis="columns", skipna=False)
    cells = by_seed.groupby(keys).agg(mean_std)
    parameters = rows.groupby(keys)["adapter_parameters"].mean() / 1e6
    cells.insert(0, first, parameters.map("{:.2f}".format))
    paper = {row: dict(zip([first, *columns], numbers)) for row, numbers in results.items()}
    paper = pandas.DataFrame(paper).reindex([first, *done])  # nan for tasks beyond the paper's
    paper.loc["average"] = paper.loc[done].mean()
    run = {(method, rank) for rank, method, _ in cells.index}
    missing = [name for name in columns if name not in done]
    for method, rank in paper:
        if (method, rank) not in run:
            missing.append(f"{TITLES[method]} at rank {rank}")
        else:
            numbers = paper[method, rank].map("{:.2f}".format)
            cells.loc[(rank, method, f"{TITLES[method]}, the paper"), :] = numbers
    table = cells.sort_index().droplevel("method").reset_index()
    text = table.to_markdown(index=False, disable_numparse=True)
    return text + f"\n\nNot run: {', '.join(missing)}." * bool(missing)


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
    top = papers_table(family, rows.assign(run=titles(runs)))
    heading = ", ".join([family, *sorted(shared_words(runs))])
    parts = [f"{MARK}\n# {heading}", top, LEGEND, tables(folder / family, rows)]
    write(page, lambda path: path.write_text("\n\n".join(parts) + "\n"))
    return top


# ---- Results in texts ----
def fill(text: str, folder: Path = RESULTS) -> str:
    """The text with what the studies in a folder say between its marks. KeyError or
    FileNotFoundError if they do not say it."""
    def filled(mark: re.Match) -> str:
        fields = [field.strip() for field in mark[2].split(";")]
        return mark[1] + number(folder, *fields) + "<!--end-->"
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
    match argv:
        case ["pack", folder, study]:
            pack(Path(folder), Path(study))
        case ["fill", *texts]:
            for path in map(Path, texts):
                filled = fill(path.read_text())
                write(path, lambda temporary: temporary.write_text(filled))
        case ["new-ranks", study, picture]:
            runs = [r for r in read_study(Path(study)) if has_scores(r)]
            new = pandas.concat([*map(new_ranks, runs)], keys=titles(runs), names=["run"])
            figures.lives(new, Path(picture))
        case [_, *_]:
            for path in map(Path, argv):
                print(f"# {path.stem}\n\n{tables(path.with_suffix(''), pandas.read_csv(path))}\n")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
