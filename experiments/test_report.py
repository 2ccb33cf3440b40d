"""The laws of experiments/report.py: what it prints, tabulates and draws is what the runs wrote."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
import scipy.stats

import reproduce
from experiments import figures, problem, report


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
    layers = [f"bert.layer.{i}." for i in range(11)]
    ranks = {f"{x}{y}": 10 * i + j for i, x in enumerate(layers) for j, y in enumerate(kinds)}
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


def test_ranks_over_time_end_where_the_run_ended():
    """They begin at the same rank everywhere, and follow what each adjustment pruned and added."""
    adjustments = [
        dict(step=10, pruned={"layer.1.q": [0]}, expanded={"layer.0.q": 1}),
        dict(step=20, pruned={"layer.0.v": [1, 2, 3]}, expanded={"layer.0.q": 2, "layer.0.v": 1}),
    ]
    ranks = {"layer.0.q": 7, "layer.1.q": 3, "layer.0.v": 2}
    results = dict(rank=4, total_steps=30, ranks=ranks, adjustments=adjustments)
    found = report.ranks_over_time(results)
    assert found.to_dict("index") == {
        0: dict(q=4, v=4), 10: dict(q=4, v=4), 20: dict(q=5, v=2), 30: dict(q=5, v=2)
    }  # fmt: skip
    assert found.iloc[-1].to_dict() == report.mean_ranks(results["ranks"])


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


# ---- Numbers ----
@pytest.mark.parametrize(
    "x, digits, text",
    [(1234.5678, 2, "1,234.57"), (-0.0004, 3, "0.000"), (-0.5, 1, "-0.5"), (0, None, "0"),
     (0.123456, None, "0.1235"), (12.3456, None, "12.35"), (165888, None, "165,888")],
)  # fmt: skip
def test_numbers_have_the_digits_asked_for_or_four(x, digits, text):
    """Thousands are parted, whole numbers stay whole, and no zero is negative."""
    assert report.plain(x, digits) == text


def test_a_column_shows_two_digits_of_its_typical_deviation():
    """That is, of the median of those that are not 0."""
    assert report.decimals(pandas.Series([0.0123, 0.0456, 0.0789])) == 3
    assert report.decimals(pandas.Series([0, 0, 12.0])) == 0
    frame = pandas.DataFrame(dict(run=["a", "a", "b", "b", "c"], x=[1.0, 1.1, 2.0, 2.0, np.nan]))
    cells = report.means(frame.groupby("run"))["x"]
    assert cells.to_dict() == {"a": "1.050 ± 0.071", "b": "2", "c": ""}


def test_holms_correction_multiplies_the_least_p_by_their_number_and_so_on():
    """A p is never below a lesser one, nor above 1; what was not tested does not count."""
    p = pandas.Series(dict(a=0.02, b=0.004, c=np.nan, d=0.03, e=0.6))
    expected = dict(a=3 * 0.02, b=4 * 0.004, d=3 * 0.02, e=0.6)  # 2 * 0.03 is as much as 3 * 0.02
    found = report.holm(p)
    assert np.isnan(found.pop("c")) and found.to_dict() == pytest.approx(expected)
    assert report.holm(pandas.Series([0.5, 0.9])).tolist() == [1, 1]


@pytest.mark.parametrize("n, tests", [(5, 1), (20, 1), (5, 8)])
def test_the_detectable_difference_is_found_in_four_of_five_cases(n, tests):
    """By simulated pairs whose true mean is that difference, and t-tests at their share of 5%."""
    random = np.random.default_rng(n)
    pairs = random.normal(report.detectable(3.0, n, tests), 3.0, (20_000, n))
    test = scipy.stats.ttest_1samp(pairs, 0, axis=1)
    found = (test.pvalue < 0.05 / tests) & (test.statistic > 0)
    assert np.mean(found) == pytest.approx(0.8, abs=0.01)


def measurements(**metrics):
    """Rows as measured() makes them: run -> the metric for seeds 0, 1, ..."""
    return pandas.DataFrame(
        dict(run=run, seed=seed, accuracy=x)
        for run, values in metrics.items()
        for seed, x in enumerate(values)
    )


def test_differences_are_paired_by_seed_and_tested_from_five_pairs_on():
    """By Student's t, corrected by Holm; verdicts are those of the corrected p."""
    random = np.random.default_rng(1)
    ours, near, far = random.normal([[0.5], [0.497], [0.3]], 0.004, (3, 6))
    rows = measurements(ours=ours, near=near, far=far, few=near[:4], one=near[:1], same=ours)
    others = {other: ("ours", other) for other in ("near", "far", "few", "one", "same")}
    found = report.differences(rows, "accuracy", others)
    assert [*found.index] == ["near", "far", "few", "same"]
    p = {}
    for run, other in dict(near=near, far=far).items():
        mean, std = (ours - other).mean(), (ours - other).std(ddof=1)
        half = 2.5705818366 * std / np.sqrt(6)  # Student's t, 5 degrees of freedom, 97.5%
        p[run] = 2 * scipy.stats.t.sf(abs(mean) / std * np.sqrt(6), 5)
        expected = [mean, std, 6, mean - half, mean + half]
        got = found.loc[run, ["mean", "std", "n", "low", "high"]]
        assert got.tolist() == pytest.approx(expected)
    assert found["p"].dropna().to_dict() == pytest.approx(dict(near=p["near"], far=2 * p["far"]))
    least = [report.detectable(found.loc[run, "std"], 6, 2) for run in ("near", "far")]
    assert found.loc[["near", "far"], "detectable"].tolist() == pytest.approx(least)
    assert found.loc["few", "n"] == 4 and found.loc[["few", "same"], "low"].isna().all()
    verdicts = found.apply(report.verdict, axis=1).to_dict()
    assert verdicts == dict(
        near="inconclusive", far="higher", few="not tested", same="not tested"
    )
    reverse = report.differences(rows, "accuracy", {"reverse": ("far", "ours")})
    assert report.verdict(reverse.loc["reverse"]) == "lower"


# ---- Names ----
def arguments(method, rank=4, seed=0, targets=("",), set=(), epochs=4):
    varied = dict(method=method, rank=rank, targets=[*targets], set=[*set], seed=seed)
    return dict(task="mrpc", epochs=epochs) | varied


def test_every_method_and_setting_has_a_name_for_people():
    """In tables and figures; rank 4 and all matrices are not named."""
    assert reproduce.METHODS == tuple(report.METHODS)
    assert {*problem.SETTINGS} <= report.SETTINGS.keys()
    assert report.words(arguments("svd")) == ["even ranks"]
    words = report.words(arguments("lora", 2, 0, ["q", "k"], ["learning_rate=2e-3", "b=1"]))
    assert words == ["LoRA", "rank 2", "only q + k", "lr 2e-3", "b = 1"]
    assert report.label(arguments("lora", 2, 5, ["q", "k"], ["b=1"])) == "lora-r2-q+k-b=1"


# ---- Pages ----
MATRICES = [f"layer.{i}.{matrix}" for i in range(3) for matrix in "abc"]


def write_run(folder, arguments, random, mean=0.5, **metrics):
    """A run's results.json, of random numbers; returns what is in it."""
    moves = arguments["method"] == "elalora"
    results = dict(
        task="mrpc", method=arguments["method"], rank=arguments["rank"], seed=arguments["seed"],
        metrics=dict(accuracy=mean + random.normal() / 100, **metrics), arguments=arguments,
        adapter_parameters=1234, trainable_parameters=2345, total_steps=40, seconds=90.0,
        ranks=dict(zip(MATRICES, (random.permutation(9) ** 2).tolist())),
        adjustments=[dict(step=8, pruned={MATRICES[0]: [3]}, expanded={MATRICES[0]: 1})] *
        (arguments["seed"] + 1) * moves,
        scores={"5": [1.0, 0.0], "9": [0.0, *random.random(4)] if "lora" != arguments["method"]
                else []},
        command=f"python reproduce.py --seeds {arguments['seed'] % 2}",
        versions=dict(torch="2.13.0", hardware="CPU"), floor=dict(accuracy=0.25),
        floor_name="a guess",
    )  # fmt: skip
    results["history"] = [
        dict(epoch=i, train_loss=random.random(), metrics=results["metrics"]) for i in (1, 2)
    ]
    path = folder / f"mrpc-{report.label(arguments)}-s{arguments['seed']}/results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(results))
    return results


@pytest.fixture
def runs(tmp_path):
    """Title and seed -> results, of runs whose files are in tmp_path / "runs"."""
    random, found = np.random.default_rng(0), {}
    for title, seeds, mean, method, rank in (
        ("AdaLoRA, rank 2", 1, 0.2, "adalora", 2),
        ("AdaLoRA", 3, 0.2, "adalora", 4),
        ("ElaLoRA", 6, 0.3, "elalora", 4),
        ("LoRA", 6, 0.1, "lora", 4),
    ):
        for seed in range(seeds):
            asked = arguments(method, rank, seed, set=["k=1"])  # shared by all, so not in titles
            found[title, seed] = write_run(tmp_path / "runs", asked, random, mean)
    return found


def tables_of(page):
    """Heading -> row -> column -> cell."""
    found = {}
    for part in page.split("\n## "):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
        heading = part.partition("\n")[0] if not part.startswith(report.MARK) else ""
        found[heading] = {row[0]: dict(zip(rows[0], row)) for row in rows[2:]}
    return found


def close(cell, *expected):
    """Whether a cell has these numbers, to the digits that it shows."""
    numbers = re.findall(r"[-+]?[\d,]+(?:\.\d+)?", cell)
    assert len(numbers) == len(expected), cell
    digits = [len(number.partition(".")[2]) for number in numbers]
    return all(
        abs(float(number.replace(",", "")) - x) <= 0.501 * 10**-n
        for number, n, x in zip(numbers, digits, expected)
    )


def mean_std(values):
    return np.mean(values), np.std(values, ddof=1)


def test_the_tables_of_a_page_are_what_numpy_makes_of_the_runs(runs, tmp_path):
    """Means and deviations, differences to ElaLoRA, mean ranks, correlations of ranks, scores."""
    write_run(tmp_path / "runs", arguments("lora", 4, 9, epochs=5), np.random.default_rng(1))
    text = report.compare(tmp_path / "runs", runs["LoRA", 0]["arguments"])
    page = (tmp_path / "runs/README.md").read_text()
    assert text in page and "python reproduce.py --seeds 0\npython reproduce.py --seeds 1\n" in page
    tables = tables_of(page)
    guess = tables[""].pop("a guess")
    assert guess["accuracy"] == "0.2500" and guess["seeds"] == ""
    assert [*tables[""]] == ["AdaLoRA, rank 2", "AdaLoRA", "ElaLoRA", "LoRA"]  # none of 5 epochs

    def of(title, value, seeds=6):
        return [value(runs[title, seed]) for seed in range(seeds)]

    accuracy = {x: of(x, lambda r: r["metrics"]["accuracy"]) for x in ("ElaLoRA", "LoRA")}
    for title, row in tables[""].items():
        if title in accuracy:
            assert close(row["accuracy"], *mean_std(accuracy[title]))
            losses = of(title, lambda r: r["history"][-1]["train_loss"])
            assert close(row["train loss"], *mean_std(losses))
        assert row["adapter parameters"] == "1,234" and row["minutes"] == "1.5"
    assert [row["seeds"] for row in tables[""].values()] == ["1", "3", "6", "6"]
    moved = [(row["pruned"], row["of those added"]) for row in tables[""].values()]
    assert moved == [("", ""), ("", ""), ("4", "2"), ("", "")]  # of 1 to 6 the first was not added
    rows = tables["ElaLoRA minus the other runs, accuracy"]
    assert [*rows] == ["AdaLoRA", "LoRA"]  # of one seed there is no deviation
    difference = np.subtract(accuracy["ElaLoRA"], accuracy["LoRA"])
    assert close(rows["LoRA"]["difference"], *mean_std(difference))
    assert rows["LoRA"]["verdict"] == "higher" and rows["LoRA"]["pairs"] == "6"
    assert rows["AdaLoRA"]["verdict"] == "not tested" and rows["AdaLoRA"]["pairs"] == "3"
    assert "ElaLoRA minus the other runs, train loss" in tables
    means = of("LoRA", lambda r: np.mean([r["ranks"][f"layer.{i}.b"] for i in range(3)]))
    assert close(tables["Mean ranks"]["LoRA"]["b"], *mean_std(means))
    (heading,) = (heading for heading in tables if heading.startswith("log10 of the scores"))
    scores = of("ElaLoRA", lambda r: np.log10(np.maximum(r["scores"]["9"], 1e-20)))
    for share in (0.1, 0.5, 0.9):
        cell = tables[heading]["ElaLoRA"][str(share)]
        assert close(cell, *mean_std(np.quantile(scores, share, axis=1)))
    assert "LoRA" not in tables[heading]  # it has no scores
    correlations = tables["Rank correlations (Spearman)"]
    moving = ["AdaLoRA", "AdaLoRA, rank 2", "ElaLoRA"]
    assert sorted({*correlations} - {"rank correlations"}) == moving
    for m, n in itertools.product(moving, repeat=2):
        pairs = [(a, b) for a, b in itertools.permutations(runs, 2) if (a[0], b[0]) == (m, n)]
        maps = [[np.sqrt([*runs[key]["ranks"].values()]) for key in pair] for pair in pairs]
        found = [np.corrcoef(*pair)[0, 1] for pair in maps]  # of 0, 1, ... 8
        expected = (np.mean(found), min(found), max(found)) if found else ()
        assert close(correlations[m][n], *expected)


def test_a_page_shows_the_figures_beside_it(runs, tmp_path):
    """Learning curves, or the results by setting where many were tried; ranks over time and by
    matrix, scores."""
    others = ["ranks-over-time.png", "rank-maps.png", "scores.png"]
    random = np.random.default_rng(0)
    for b, seed in itertools.product(range(13), range(2)):
        write_run(tmp_path / "many", arguments("elalora", seed=seed, set=[f"b={b}"]), random)
    for folder, first in ((tmp_path / "runs", "curves.png"), (tmp_path / "many", "settings.png")):
        report.compare(folder)
        shown = re.findall(r"!\[.*\]\((.*)\)", (folder / "README.md").read_text())
        assert shown == [first, *others]
        assert all((folder / name).read_bytes()[1:4] == b"PNG" for name in shown)


def test_tasks_of_one_folder_have_pages_of_their_own(runs, tmp_path):
    """The first has README.md, a further one a page and figures with its name."""
    report.compare(tmp_path / "runs")
    first = (tmp_path / "runs/README.md").read_text()
    other = runs["ElaLoRA", 0] | dict(task="rte")
    other["arguments"] = other["arguments"] | dict(task="rte")
    (tmp_path / "runs/rte-elalora-s0").mkdir()
    (tmp_path / "runs/rte-elalora-s0/results.json").write_text(json.dumps(other))
    report.compare(tmp_path / "runs", other["arguments"])
    page = (tmp_path / "runs/rte.md").read_text()
    assert "(rte-curves.png)" in page and (tmp_path / "runs/rte-curves.png").exists()
    assert (tmp_path / "runs/README.md").read_text() == first


def test_a_page_of_somebody_elses_is_not_overwritten(runs, tmp_path):
    """Such as a project's own README.md."""
    (path := tmp_path / "runs/README.md").write_text("# My project")
    with pytest.raises(ValueError, match="README.md is not a page of runs"):
        report.compare(tmp_path / "runs")
    assert path.read_text() == "# My project"


def test_the_forest_draws_every_difference_with_its_interval(tmp_path, monkeypatch):
    """A point at the mean, and a line from the lower to the upper end of the interval."""
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    table = pandas.DataFrame(
        dict(mean=[1, -2], low=[0.5, -3], high=[1.5, -1], p=[0.01, 0.2], detectable=[1, 2]),
        index=["LoRA", "even ranks"],
    )
    figures.forest({"a task": table}, tmp_path / "forest.png")
    (axis,) = drawn[0].axes
    lines = [tuple(line.get_xdata()) for line in axis.lines]
    assert {x for x in lines if len(x) == 1} == {(1.0,), (-2.0,)}
    assert {(0.5, 1.5), (-3.0, -1.0)} <= {*lines}
    assert [text.get_text() for text in axis.get_yticklabels()] == ["even ranks", "LoRA"]


def test_named_contrasts_are_the_only_ones_tested(tmp_path, monkeypatch):
    """They are named without learning rates, and their picture has the second's loss minus the
    first's. A name of two runs is refused."""
    random, panels = np.random.default_rng(0), []
    losses = {}
    for method, rate in dict(elalora="8e-3", svd="8e-3", lora="1e-3").items():
        for seed in range(5):
            asked = arguments(method, seed=seed, set=[f"learning_rate={rate}"])
            results = write_run(tmp_path, asked, random, loss=random.random())
            losses.setdefault(method, []).append(results["metrics"]["loss"])
    names = [["LoRA", "even ranks"], ["ElaLoRA", "even ranks"], ["ElaLoRA", "EVA"]]
    (tmp_path / "contrasts.json").write_text(json.dumps(names))
    report.compare(tmp_path)
    tables = tables_of((tmp_path / "README.md").read_text())
    heading = "2 of 3 contrasts named before the runs"
    found = [table for name, table in tables.items() if name.startswith(heading)]
    assert found and not any("minus the other runs" in heading for heading in tables)
    for table in found:
        assert [*table] == ["LoRA − even ranks", "ElaLoRA − even ranks"]
    monkeypatch.setattr(figures, "forest", lambda found, path: panels.append(found) or path.touch())
    report.forest([tmp_path], tmp_path / "forest.png")
    (table,) = panels[0].values()
    expected = np.mean(losses["svd"]) - np.mean(losses["lora"])
    assert table.loc["LoRA against even ranks", "mean"] == pytest.approx(expected)
    write_run(tmp_path, arguments("lora", set=["learning_rate=2e-3"]), random)
    with pytest.raises(ValueError, match="'LoRA' could be 'LoRA, lr 1e-3' or 'LoRA, lr 2e-3'"):
        report.compare(tmp_path)


def test_a_single_run_has_a_page_and_is_compared_with_nothing(tmp_path):
    """So nothing is printed, and no table has differences."""
    results = write_run(tmp_path, arguments("elalora"), np.random.default_rng(0))
    assert report.compare(tmp_path, results["arguments"]) == ""
    tables = tables_of((tmp_path / "README.md").read_text())
    assert [*tables[""]] == ["ElaLoRA", "a guess"] and [*tables["Mean ranks"]] == ["ElaLoRA"]
    assert not any(table for heading, table in tables.items() if "minus" in heading)


def test_the_command_makes_every_page_and_the_picture_of_all_differences(
        tmp_path, capsys, monkeypatch):
    """The picture has a part for each folder that names contrasts, also of the same task."""
    random, drawn, draw = np.random.default_rng(0), [], figures.forest
    monkeypatch.setattr(
        figures, "forest", lambda found, path: drawn.append(found) or draw(found, path))
    for name, method in itertools.product("xy", ("elalora", "svd", "lora")):
        for seed in range(5):
            write_run(tmp_path / name, arguments(method, seed=seed), random, loss=random.random())
    for name in "xy":
        (tmp_path / name / "contrasts.json").write_text('[["ElaLoRA", "LoRA"]]')
    write_run(tmp_path / "z", arguments("lora"), random)
    report.main([str(tmp_path / name) for name in "xyz"])
    pages = [tmp_path / name / "README.md" for name in "xyz"]
    assert capsys.readouterr().out.split() == [*map(str, pages)] and all(map(Path.exists, pages))
    assert [title.partition(":")[0][-3:] for title in drawn[0]] == ["(x)", "(y)"]
    assert (tmp_path / "forest.png").read_bytes()[1:4] == b"PNG"
