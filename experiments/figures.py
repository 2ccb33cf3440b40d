"""The pictures. A method has one colour in all of them; no picture has more than five curves.

    python -m experiments.figures   # makes those of results/ again, in results/figures/
"""

import itertools
from pathlib import Path

import matplotlib
import pandas
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import report

WIDTH = 9.0  # inches; GitHub shows some 900 pixels, so text of 10 points stays legible
COLORS = dict(zip(("ElaLoRA", "LoRA", "AdaLoRA", "even ranks"),  # the colour-blind can tell them
                  seaborn.color_palette("colorblind")))
BETTER = "← first is better          loss: first − second          second is better →"


def new(columns: int = 1, rows: int = 1, height: float = 4.0,
        **kwargs) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, [*axes.flat]


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=100, bbox_inches="tight", format="png", metadata={"Software": None})


def color_of(title: str) -> object:
    """Of a run's method; black for what is no method."""
    return COLORS.get(title.split(", ")[0], "black")


def heatmaps(maps: dict[str, pandas.DataFrame], path: Path) -> None:
    """Ranks by matrix and layer, as Figures 2 and 8, side by side on one scale."""
    cells = next(iter(maps.values()))
    figure, axes = new(len(maps), height=0.9 + 0.36 * len(cells), sharey=True)
    highest = max(int(cells.max(axis=None)) for cells in maps.values())
    for axis, (name, cells) in zip(axes, maps.items()):
        seaborn.heatmap(cells, annot=True, fmt=".0f", cmap="Blues", vmin=0, vmax=highest,
                        cbar=False, ax=axis)
        axis.set(xlabel="layer", title=name)
    save(figure, path)


def distributions(scores: dict[str, pandas.Series], path: Path) -> None:
    """How log10 of the importance scores is distributed (Figure 5), cumulatively. The second curve
    of a colour is dashed."""
    figure, (axis,) = new()
    dashes = {}
    for name, S in scores.items():
        color = color_of(name)
        dash = next(dashes.setdefault(color, itertools.cycle(("-", "--", ":"))))
        axis.ecdf(S, label=name, color=color, linestyle=dash)
    axis.set(xlabel="log10 of the importance score (a score of 0 is drawn at -20)",
             ylabel="share of the ranks")
    figure.legend(loc="outside lower center", ncols=len(scores))
    save(figure, path)


def curve(steps: pandas.DataFrame, path: Path) -> None:
    """The rows of log.csv: the loss, its mean over 2% of the run, the steps that moved ranks; below
    it the learning rate and the gradient norm."""
    figure, axes = new(1, 3, 6.0, sharex=True, height_ratios=(3, 1, 1))
    steps = steps.set_index("step")
    axes[0].plot(steps["loss"], color="0.8", linewidth=0.8)
    axes[0].plot(steps["loss"].rolling(len(steps) // 50 + 1, 1).mean(), color=COLORS["ElaLoRA"])
    for step in steps.index[steps["ranks_moved"] > 0]:
        axes[0].axvline(step, ymax=0.04, color="black", linewidth=0.8)
    for axis, name in zip(axes[1:], ("learning_rate", "gradient_norm")):
        axis.plot(steps[name], color="0.4", linewidth=0.8)
        axis.set_ylabel(name.replace("_", " "))
    axes[0].set(ylabel="loss", title="marks at the bottom: ranks moved", yscale="log")
    axes[2].set_xlabel("optimizer step")
    save(figure, path)


def over_time(runs: list[pandas.DataFrame], words: dict[float, str], path: Path) -> None:
    """Mean ranks (columns: what was planted) by step, mean and range over all runs. A triangle
    marks what was planted; words has the matrices' names."""
    figure, (axis,) = new()
    steps = pandas.concat(runs).groupby(level=0)
    mean, end = steps.mean(), max(x.index.max() for x in runs)
    for planted, color in zip(mean, matplotlib.colormaps["viridis"]([0.0, 0.35, 0.6, 0.85])):
        axis.plot(mean[planted], drawstyle="steps-post", color=color)
        axis.fill_between(mean.index, steps.min()[planted], steps.max()[planted], step="post",
                          alpha=0.2, color=color, linewidth=0)
        axis.plot(end * 1.03, planted, marker="<", markersize=9, color=color, clip_on=False)
        axis.text(end * 1.06, planted, words[planted], va="center", color=color)
    axis.text(end * 1.03, max(mean) + 0.8, "planted", ha="center")
    axis.set(xlabel="optimizer step", ylabel="mean rank of the matrices", xlim=(0, end * 1.05),
             ylim=(-0.5, None))
    save(figure, path)


def forest(panels: dict[str, pandas.DataFrame], path: Path) -> None:
    """Differences with their 95% intervals, a panel for each family of tests.

    A panel's table has a row for every difference: mean, low, high, p (corrected), detectable. What
    is significant has the colour of the better method. A true difference within the grey box would
    probably have gone unseen.
    """
    sizes = [len(table) + 1.5 for table in panels.values()]
    figure, axes = new(1, len(panels), 0.33 * sum(sizes), height_ratios=sizes)
    for axis, (name, table) in zip(axes, panels.items()):
        for y, (runs, x) in enumerate(table[::-1].iterrows()):
            axis.fill_betweenx([y - 0.36, y + 0.36], -x["detectable"], x["detectable"],
                               color="0.9", linewidth=0)
            better = runs.split(" − ")[int(x["mean"] > 0)]
            color = "0.25" if x["p"] >= 0.05 else color_of(better)
            axis.plot([x["low"], x["high"]], [y, y], color=color, linewidth=2)
            axis.plot(x["mean"], y, marker="o", color=color)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(table)), table.index[::-1].str.replace(" − ", " against "),
                        fontsize=9)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel(BETTER, fontsize=9)
        limit = max(map(abs, axis.get_xlim()))
        axis.set_xlim(-limit, limit)
    save(figure, path)


def runs_of(study: Path, title: str) -> list[dict]:
    """The runs of one title; line n of the file with all of each run is row n of the CSV."""
    names = pandas.read_csv(f"{study}.csv")["run"]
    return [r for r, name in zip(report.read_study(study), names, strict=True) if name == title]


def main(results: Path = report.RESULTS) -> None:
    """All pictures of results/figures/, from the studies."""
    draw = lambda name, picture, *data: report.write(
        results / "figures" / name, lambda path: picture(*data, path))
    planted = runs_of(results / "planted-again", "ElaLoRA")
    kinds = pandas.Series(report.mean_ranks(planted[0]["planted_ranks"]))
    times = [report.ranks_over_time(r).T.groupby(kinds).mean().T for r in planted]
    words = {rank: ", ".join(kind.removeprefix("attention.self.") for kind in names)
             for rank, names in kinds.index.groupby(kinds).items()}
    draw("planted-ranks.png", over_time, times, words)
    draw("stsb-ranks.png", heatmaps, {
        f"seed {r['arguments']['seed']}": report.grid(r["ranks"])
        for r in runs_of(results / "stsb", "ElaLoRA, lambda_rate = 10")[:3]})
    mrpc = {name: runs_of(results / "mrpc", f"{name}, lambda_rate = 10")[0]["scores"]
            for name in ("ElaLoRA", "even ranks", "AdaLoRA")}
    curves = {f"{name}, after the search": S["179"] for name, S in mrpc.items()}
    curves["ElaLoRA, after the warm-up"] = mrpc["ElaLoRA"]["40"]
    draw("mrpc-scores.png", distributions, {x: report.log_scores(S) for x, S in curves.items()})
    panels = {}
    for study in ("sst2-short", "stsb-short"):
        rows = pandas.read_csv(results / f"{study}.csv")
        for family, pairs in report.families_of(results / study, rows).items():
            panels[family] = report.differences(rows, "loss", pairs)
    draw("forest.png", forest, panels)


if __name__ == "__main__":
    main()
