"""The pictures of a run."""

from pathlib import Path

import pandas
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 9.0  # inches; GitHub shows some 900 pixels, so text of 10 points stays legible


def new_axes(columns: int = 1, rows: int = 1, height: float = 4.0, **kwargs
             ) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, [*axes.flat]


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=100, bbox_inches="tight", format="png", metadata={"Software": None})


def heatmaps(maps: dict[str, pandas.DataFrame], path: Path) -> None:
    """Ranks by matrix and layer, as Figures 2 and 8, side by side on one scale."""
    cells = next(iter(maps.values()))
    figure, axes = new_axes(len(maps), height=max(2, 0.9 + 0.36 * len(cells)), sharey=True)
    highest = max(int(cells.max(axis=None)) for cells in maps.values())
    for axis, (name, cells) in zip(axes, maps.items()):
        seaborn.heatmap(cells, annot=True, fmt=".0f", cmap="Blues", vmin=0, vmax=highest,
                        cbar=False, ax=axis)
        axis.set(xlabel="layer", title=name)
    save(figure, path)


def over_time(ranks: pandas.DataFrame, path: Path) -> None:
    """Mean ranks by kind of matrix (columns) until each adjustment and the end (steps)."""
    figure, (axis,) = new_axes()
    ranks = ranks.reindex([0, *ranks.index], method="bfill")
    axis.step(ranks.index, ranks, where="pre", label=ranks.columns)
    axis.set(xlabel="optimizer step", ylabel="mean rank over the layers")
    figure.legend(loc="outside right upper")
    save(figure, path)


def distributions(scores: dict[str, pandas.Series], path: Path) -> None:
    """How log10 of the importance scores is distributed (Figure 5), cumulatively."""
    figure, (axis,) = new_axes()
    for name, S in scores.items():
        axis.ecdf(S, label=name)
    axis.set(xlabel="log10 of the importance score (a score of 0 is drawn at -20)",
             ylabel="share of the ranks")
    figure.legend(loc="outside lower center", ncols=len(scores))
    save(figure, path)


def curve(log: Path, path: Path) -> None:
    """Of a log.csv: the loss, its mean over 2% of the run, the steps that moved ranks; below
    it the learning rate and the gradient norm."""
    figure, axes = new_axes(1, 3, 6.0, sharex=True, height_ratios=(3, 1, 1))
    steps = pandas.read_csv(log, index_col="step")
    axes[0].plot(steps["loss"], color="0.8", linewidth=0.8)
    axes[0].plot(steps["loss"].rolling(len(steps) // 50 + 1, 1).mean())
    for step in steps.index[steps["ranks_moved"] > 0]:
        axes[0].axvline(step, ymax=0.04, color="black", linewidth=0.8)
    for axis, name in zip(axes[1:], ("learning_rate", "gradient_norm")):
        axis.plot(steps[name], color="0.4", linewidth=0.8)
        axis.set_ylabel(name.replace("_", " "))
    axes[0].set(ylabel="loss", title="marks at the bottom: ranks moved", yscale="log")
    axes[2].set_xlabel("optimizer step")
    save(figure, path)


def lives(new: pandas.DataFrame, path: Path) -> None:
    """Of ranks that were added, by run: how many are still there after so many adjustments
    (Kaplan-Meier), and their median score / that of all ranks."""
    figure, (left, right) = new_axes(2, sharex=True)
    for run, rows in new.groupby("run", sort=False):
        by_age = rows.groupby("age")
        there = (1 - by_age["pruned"].mean()).cumprod()
        left.plot([0, *there.index], [1, *there], label=run)
        right.semilogy(by_age["score"].median())
    right.axhline(1, color="0.7")
    left.locator_params("x", integer=True)  # of both, which share it
    left.set(ylim=(0, 1.02), ylabel="share still there", xlabel="adjustments since it was added")
    right.set(ylabel="median score / that of all ranks", xlabel="adjustments since it was added")
    figure.legend(loc="outside lower center", ncols=2)
    save(figure, path)
