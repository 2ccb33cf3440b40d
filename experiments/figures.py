"""The pictures of runs. The colour-blind can tell the colours apart; lines differ in dashes too."""

import itertools
from pathlib import Path

import pandas
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 9.0  # inches; GitHub shows some 900 pixels, so text of 10 points stays legible
COLORS = seaborn.color_palette("colorblind")
DASHES = ["-", "--", ":", "-."]


def new(rows: int = 1, columns: int = 1, height: float = 3.6,
        **kwargs) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, [*axes.flat]


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=100, bbox_inches="tight")


def styles():
    """Colour and dashes of the next line."""
    return (dict(color=color, linestyle=dash) for dash in DASHES for color in COLORS)


def heatmaps(grids: dict[str, pandas.DataFrame], path: Path) -> None:
    """Ranks by matrix and layer, as Figure 2, side by side on one scale."""
    cells = next(iter(grids.values()))
    figure, axes = new(1, len(grids), height=0.9 + 0.36 * len(cells), sharey=True)
    highest = max(int(cells.max(axis=None)) for cells in grids.values())
    for axis, (name, cells) in zip(axes, grids.items()):
        seaborn.heatmap(cells, annot=True, fmt=".0f", cmap="Blues", vmin=0, vmax=highest,
                        cbar=False, ax=axis)
        axis.set(xlabel="layer", title=name)
    save(figure, path)


def distributions(scores: dict[str, pandas.Series], path: Path) -> None:
    """How log10 of the importance scores is distributed (Figure 5), cumulatively."""
    figure, (axis,) = new(height=4)
    for (name, S), style in zip(scores.items(), styles()):
        axis.ecdf(S, label=name, **style)
    axis.set(xlabel="log10 of the importance score (a score of 0 is drawn at -20)",
             ylabel="share of the ranks")
    figure.legend(loc="outside right upper")
    save(figure, path)


def curves(frame: pandas.DataFrame, metrics: list[str], reference: str, path: Path) -> None:
    """Mean over the seeds and range from the lowest to the highest, by epoch and run. The
    reference's line is wider and on top."""
    figure, axes = new(1, len(metrics), height=4)
    for axis, metric in zip(axes, metrics):
        for (run, group), style in zip(frame.groupby("run", sort=False), styles()):
            by_epoch = group.groupby("epoch")[metric]
            width = dict(linewidth=2.5, zorder=3) if run == reference else dict(linewidth=1.3)
            axis.plot(by_epoch.mean(), label=run, marker="o", markersize=3, **width, **style)
            axis.fill_between(by_epoch.mean().index, by_epoch.min(), by_epoch.max(), alpha=0.08,
                              color=style["color"], linewidth=0)
        axis.set(xlabel="epoch", title=metric.replace("_", " "))
        axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save(figure, path)


def over_time(runs: list[pandas.DataFrame], planted: dict[str, float], path: Path) -> None:
    """Mean ranks of each kind of matrix by step, over all runs, with what was planted."""
    figure, (axis,) = new(height=4.4)
    steps = pandas.concat(runs)
    end = steps.index.max()
    for place, ((kind, values), style) in enumerate(zip(steps.items(), styles())):
        by_step = values.groupby(level=0)
        axis.plot(by_step.mean(), drawstyle="steps-post", label=kind, **style)
        axis.fill_between(by_step.mean().index, by_step.min(), by_step.max(), step="post",
                          alpha=0.15, color=style["color"], linewidth=0)
        if kind in planted:
            axis.plot(end * (1.03 + 0.02 * place), planted[kind], marker="<", markersize=8,
                      color=style["color"])
    if planted:
        axis.text(end * 1.13, max(planted.values()) + 0.6, "planted", ha="right")
    axis.set(xlabel="optimizer step", ylabel="mean rank over the layers")
    figure.legend(loc="outside right upper")
    save(figure, path)


def forest(panels: dict[str, pandas.DataFrame], path: Path) -> None:
    """Differences with their 95% intervals, coloured where they are significant.

    A panel's table has a row for every difference: mean, low, high, p (corrected), detectable. A
    true difference within the grey box would probably have gone unseen.
    """
    sizes = [*map(len, panels.values())]
    figure, axes = new(len(panels), 1, height=0.8 * len(panels) + 0.32 * sum(sizes),
                       height_ratios=sizes)
    for axis, (name, table) in zip(axes, panels.items()):
        for y, (_, row) in enumerate(table[::-1].iterrows()):
            axis.fill_betweenx([y - 0.36, y + 0.36], -row["detectable"], row["detectable"],
                               color="0.9", linewidth=0)
            color = "0.25" if row["p"] >= 0.05 else COLORS[0 if row["mean"] > 0 else 1]
            axis.plot([row["low"], row["high"]], [y, y], color=color, linewidth=2)
            axis.plot(row["mean"], y, marker="o", color=color)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(table)), [*table.index[::-1]], fontsize=9)
        axis.set_title(name, loc="left", fontsize=10)
    axes[-1].set_xlabel(
        "right of 0 the first is better; grey box: true differences that would probably go unseen")
    save(figure, path)


def dots(frame: pandas.DataFrame, metric: str, reference: str, path: Path) -> None:
    """Every seed of every setting, sorted by the mean; the line is the reference's mean."""
    means = frame.groupby("run")[metric].mean().sort_values()
    figure, (axis,) = new(height=0.8 + 0.32 * len(means))
    for y, run in enumerate(means.index):
        values = frame.loc[frame["run"] == run, metric]
        axis.plot(values, [y] * len(values), "o", color=COLORS[0], alpha=0.6, markersize=5)
        axis.plot(means[run], y, "|", color="black", markersize=14)
    axis.axvline(means[reference], color="0.6", linewidth=1)
    axis.set_yticks(range(len(means)), means.index)
    axis.set(xlabel=metric.replace("_", " "))
    save(figure, path)


def strips(rows: pandas.DataFrame, path: Path) -> None:
    """The loss of every truncated model, by how its ranks were chosen: a panel for every task and
    mean rank, a colour for every seed."""
    panels = [*rows[rows["rank"].isin([2, 4])].groupby(["task", "rank"])]
    figure, axes = new(1, len(panels), height=3, sharey=True)
    colors = dict(zip(rows["seed"].unique(), COLORS))
    for axis, ((task, rank), panel) in zip(axes, panels):
        seaborn.stripplot(panel, x="loss", y="map", hue="seed", palette=colors, size=4, dodge=True,
                          jitter=False, ax=axis)
        axis.set(title=f"{task}, mean rank {rank}", xlabel="loss", ylabel="")
        handles = axis.get_legend_handles_labels()
        axis.get_legend().remove()
    figure.legend(*handles, title="seed", loc="outside right upper")
    save(figure, path)


def bars(costs: dict[str, dict[str, float]], parts: list[str], path: Path) -> None:
    """The parts of a step in milliseconds, stacked, by method."""
    figure, (left, right) = new(1, 2, height=2.8, sharey=True)
    looks = {part: dict(color=color, hatch=hatch) for part, color, hatch in
             zip(parts, COLORS, itertools.cycle(["", "//", "..", "xx"]))}
    for axis, shown in ((left, parts), (right, parts[1:])):
        for y, cost in enumerate(costs.values()):
            start = 0.0
            for part in shown:
                axis.barh(y, cost[part], left=start, edgecolor="white", **looks[part],
                          label=part if y == 0 else None)
                start += cost[part]
        axis.set_yticks(range(len(costs)), [*costs])
        axis.set(xlabel="ms a step" if axis is left else "ms, without the passes")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(parts))
    save(figure, path)
