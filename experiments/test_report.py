"""The laws of experiments/report.py: what it prints, tabulates and draws is what the runs wrote."""

import itertools
import json

import numpy as np
import pytest

from experiments import report


# ---- Files ----
def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """While it is written, and where that fails, the old one stays under its name."""
    path = tmp_path / "new/file"
    report.write(path, lambda temporary: temporary.write_text("old"))

    def fails(temporary):
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise OSError("disk full")

    with pytest.raises(OSError):
        report.write(path, fails)
    assert path.read_text() == "old"
    report.write(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"


# ---- Ranks ----
def cells(ranks):
    """Row -> column -> value of the grid, without what is missing."""
    table = report.grid(ranks).T.to_dict()
    return {row: {k: v for k, v in line.items() if v == v} for row, line in table.items()}


def test_a_grid_has_a_row_for_a_kind_and_a_column_for_a_layer():
    """In the order of the model, and without the name of the stack where there is only one."""
    kinds = ("attention.q", "out", "attention.output.out")
    ranks = {f"bert.layer.{i}.{kind}": 10 * i + j for i in range(11) for j, kind in enumerate(kinds)}
    grid = report.grid(ranks)
    assert [*grid.index] == [*kinds] and [*grid.columns] == [*map(str, range(11))]
    assert (grid.to_numpy() == [[10 * i + j for i in range(11)] for j in range(3)]).all()
    assert report.mean_ranks(ranks) == {kind: 50 + j for j, kind in enumerate(kinds)}


def test_a_grid_keeps_stacks_of_layers_apart():
    """An encoder's and a decoder's matrices of one name and number have a row each."""
    stacks = ("encoder", "decoder")
    names = [f"model.{stack}.layers.{i}.fc1" for stack in stacks for i in range(2)]
    names += [f"model.decoder.layers.{i}.cross.q" for i in range(2)]
    assert cells(dict(zip(names, range(6)))) == {
        "encoder.fc1": {"0": 0, "1": 1},
        "decoder.fc1": {"0": 2, "1": 3},
        "decoder.cross.q": {"0": 4, "1": 5},
    }


def test_a_matrix_without_a_layer_has_a_row_of_its_own():
    """Beside numbered ones; a number at the end of a name is no layer."""
    ranks = {"embed.proj": 1, "encoder.layers.0.fc": 2, "encoder.layers.1.fc": 3, "mlp.2": 4}
    found = {row: [*line.values()] for row, line in cells(ranks).items()}
    assert sorted(found.values()) == [[1], [2, 3], [4]]
    assert [*cells({"mlp.0": 1, "mlp.2": 2})] == ["mlp.0", "mlp.2"]


def test_two_matrices_in_one_cell_are_an_error():
    """Else one of them would go unseen."""
    with pytest.raises(ValueError, match="duplicate"):
        report.grid({"a.b.0.q": 1, "b.a.0.q": 2})


def test_pruned_ranks_are_counted_as_if_each_had_been_followed():
    """Through random adjustments, where every rank carries whether one of them had added it."""
    random = np.random.default_rng(0)
    followed, adjustments, pruned = {"a": [False] * 4, "b": [False] * 4}, [], []
    for _ in range(40):
        indices = {}
        for name, added in followed.items():
            lost = random.choice(len(added), random.integers(len(added)), replace=False)
            indices[name] = sorted(lost.tolist())
            pruned += [added[i] for i in lost]
            kept = [was for i, was in enumerate(added) if i not in lost]
            followed[name] = kept + [True] * int(random.integers(4))
        adjustments.append(dict(pruned=indices))
    results = dict(rank=4, ranks={name: len(x) for name, x in followed.items()})
    counts = report.count_pruned(results | dict(adjustments=adjustments))
    assert counts == (len(pruned), sum(pruned)) and 0 < sum(pruned) < len(pruned)


# ---- Printed lines and tables ----
def test_a_run_is_described_beside_what_it_is_compared_with():
    """Metrics with the floor's and the paper's, where these have them; mean ranks of each kind."""
    results = dict(
        task="mrpc", method="elalora", rank=4, seed=1, total_steps=1740, seconds=61.4,
        adapter_parameters=37152, trainable_parameters=40000, metrics=dict(accuracy=0.9, f1=0.8),
        floor=dict(accuracy=0.6838), floor_name="majority class", paper=dict(accuracy=0.9044),
        note="a note", ranks={f"layer.{i}.{kind}": r for i in (0, 1) for kind, r in
                              (("q", 3 + i), ("dense", 5))},
        planted_ranks={"layer.0.q": 2}, adjustments=[dict(pruned={"layer.0.q": [4, 0]})],
    )  # fmt: skip
    assert "\n".join(report.describe(results)).splitlines() == [
        "mrpc, elalora, rank 4, seed 1: 1740 steps, 61 s",
        "  37,152 adapter parameters, 40,000 in all trained",
        "  4 matrices, total rank 17, 3 to 5 each after 1 adjustments; of 2 ranks pruned, 1 had "
        "been added by them",
        "  accuracy        0.9000  (majority class 0.6838, the paper's ElaLoRA 0.9044)",
        "  f1              0.8000",
        "  a note",
        "  q     mean rank  3.50  (planted 2)",
        "  dense mean rank  5.00",
    ]


def test_the_tables_are_what_numpy_makes_of_the_runs(tmp_path, monkeypatch):
    """Means and deviations; paired differences, decided by Student's t from 5 seeds on; Spearman's
    correlations of the ranks; the commands; the scores at the end of the searches, drawn."""
    random, runs = np.random.default_rng(0), {}
    matrices = [f"layer.{i}.{matrix}" for i in range(3) for matrix in "abc"]
    for run, seeds, mean in (
        ("elalora-r4", 6, 0.3),
        ("lora-r4", 6, 0.1),
        ("adalora-r4", 3, 0.2),
        ("adalora-r2", 1, 0.2),
    ):
        for seed in range(seeds):
            runs[run, seed] = dict(
                method=run.split("-")[0], seed=seed,
                metrics=dict(accuracy=mean + random.normal() / 100),
                adapter_parameters=1234, seconds=90, history=[dict(train_loss=random.random())],
                ranks=dict(zip(matrices, random.permutation(9).tolist())),
                rank=4, adjustments=[dict(pruned={matrices[0]: [3]})] * (seed + 1),
                scores={"5": [1.0, 0.0], "9": [0.0, *random.random(4)] if run != "lora-r4" else []},
                command=f"python reproduce.py --seeds {seed % 2}",
                arguments=dict(task="mrpc", method=run.split("-")[0], rank=int(run[-1]), seed=seed,
                               targets=[""], set=[], epochs=4),
            )  # fmt: skip
            (folder := tmp_path / f"mrpc-{run}-s{seed}").mkdir()
            (folder / "results.json").write_text(json.dumps(runs[run, seed]))
    drawn = []
    monkeypatch.setattr(report, "plot_scores", lambda scores, path: drawn.append(scores))
    monkeypatch.setattr(report, "write", lambda path, write: write(path))
    arguments = runs["lora-r4", 0]["arguments"]
    for name, unlike in (("old", {}), ("longer", arguments | dict(epochs=5, seed=9))):
        (folder := tmp_path / f"mrpc-{name}").mkdir()  # left out
        (folder / "results.json").write_text(json.dumps(dict(arguments=unlike)))
    text = report.compare(tmp_path, arguments)
    page = (tmp_path / "table.md").read_text()
    commands = "".join(f"python reproduce.py --seeds {i}\n" for i in (0, 1))
    assert page == f"```sh\n{commands}```\n\n{report.LEGEND}\n\n{text}\n"
    assert drawn == [{f"{run}-s0": runs[run, 0]["scores"]["9"] for run, _ in runs}]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    start = rows.index(["mean ranks", *"abc"])
    table = {row[0]: row[1:] for row in rows[:start] if row}
    b = [runs["lora-r4", i]["ranks"][f"layer.{j}.b"] for i in range(6) for j in range(3)]
    means = np.reshape(b, (6, 3)).mean(axis=1)
    cell = dict((row[0], row[2]) for row in rows[start : start + 6])["lora-r4"]
    assert cell == f"{means.mean():.4f} ± {means.std(ddof=1):.4f}"

    def accuracy(run, seeds=6):
        return np.array([runs[run, i]["metrics"]["accuracy"] for i in range(seeds)])

    losses = [runs["lora-r4", i]["history"][-1]["train_loss"] for i in range(6)]
    for cell, values in zip(table["lora-r4"], (accuracy("lora-r4"), losses)):
        assert cell == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    pruned, again = np.arange(1, 7), np.arange(6)  # the first was an initial rank
    pruned, again = (f"{x.mean():.4f} ± {x.std(ddof=1):.4f}" for x in (pruned, again))
    assert table["lora-r4"][2:] == ["1,234 ± 0", "1.5000 ± 0.0000", pruned, again, *3 * [""], "6"]
    scores = [np.maximum(runs["elalora-r4", i]["scores"]["9"], 1e-20) for i in range(6)]
    for cell, share in zip(table["elalora-r4"][6:9], (0.1, 0.5, 0.9)):
        values = np.quantile(np.log10(scores), share, axis=1)
        assert cell == f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"
    difference = accuracy("elalora-r4") - accuracy("lora-r4")
    mean, std = difference.mean(), difference.std(ddof=1)
    half = 2.5705818366 * std / np.sqrt(6)  # Student's t, 5 degrees of freedom, 97.5%
    assert table["elalora-r4 − lora-r4"] == [
        f"{mean:+.4f} ± {std:.4f}", f"{mean - half:+.4f} to {mean + half:+.4f}", "higher"
    ]  # fmt: skip
    difference = accuracy("adalora-r4", 3) - accuracy("lora-r4", 3)
    assert table["adalora-r4 − lora-r4"] == [
        f"{difference.mean():+.4f} ± {difference.std(ddof=1):.4f}", "", "undecided at 3 seeds"
    ]  # fmt: skip
    assert len([name for name in table if "−" in name]) == 3  # none of adalora-r2, of one seed
    moving = ["adalora-r2", "adalora-r4", "elalora-r4"]
    start = rows.index(["rank correlations", *moving])
    correlations = {row[0]: dict(zip(moving, row[1:])) for row in rows[start + 2 :]}
    assert [*correlations] == moving
    for m, n in itertools.product(moving, repeat=2):
        pairs = [(a, b) for a, b in itertools.permutations(runs, 2) if (a[0], b[0]) == (m, n)]
        maps = [[[*runs[key]["ranks"].values()] for key in pair] for pair in pairs]
        found = [np.corrcoef(*pair)[0, 1] for pair in maps]
        spread = f"({min(found):.2f} to {max(found):.2f})" if found else ""
        assert correlations[m][n] == (f"{np.mean(found):.2f} {spread}" if found else "")


def test_a_single_run_is_compared_with_nothing(tmp_path):
    """No table is printed or written."""
    arguments = dict(task="mrpc", method="lora", rank=4, seed=0, targets=[""], set=[])
    (tmp_path / "mrpc-lora-r4-s0").mkdir()
    path = tmp_path / "mrpc-lora-r4-s0/results.json"
    path.write_text(json.dumps(dict(arguments=arguments)))
    assert report.compare(tmp_path, arguments) == "" and len([*tmp_path.iterdir()]) == 1
