"""The laws of experiments/report.py: what it prints, packs and tabulates is what runs wrote.

The last ones hold of results/ itself.
"""

import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
import scipy.stats

from experiments import report


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """While it is written, and where that fails, the old one stays under its name."""
    path = tmp_path / "new/file"
    report.write(path, lambda temporary: temporary.write_text("old"))

    def fails(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        report.write(path, fails)
    assert path.read_text() == "old"


# ---- One run ----
@pytest.mark.parametrize("cells", [
    {"q": {"0": "bert.layer.0.q", "1": "bert.layer.1.q", "10": "bert.layer.10.q"},
     "attention.out": {"0": "bert.layer.0.attention.out", "10": "bert.layer.10.attention.out"}},
    {"encoder.fc1": {"0": "model.encoder.layers.0.fc1", "1": "model.encoder.layers.1.fc1"},
     "decoder.fc1": {"0": "model.decoder.layers.0.fc1"}},
    {"mlp.0": {"": "mlp.0"}, "mlp.2": {"": "mlp.2"}, "x": {"0": "0.x"}},
])  # fmt: skip
def test_a_grid_has_a_row_for_a_kind_and_a_column_for_a_layer(cells):
    """Several stacks of layers are told apart; a number at the end of a name is no layer."""
    ranks = {name: i for i, name in enumerate(n for row in cells.values() for n in row.values())}
    grid = report.grid(ranks)
    for kind, row in cells.items():
        expected = {layer: ranks[name] for layer, name in row.items()}
        assert grid.loc[kind].dropna().to_dict() == expected
        assert report.mean_ranks(ranks)[kind] == np.mean([*expected.values()])
    assert [*grid.index] == [*cells]
    with pytest.raises(ValueError, match="duplicate"):  # else one of two would go unseen
        report.grid({"a.b.0.q": 1, "b.a.0.q": 2})


def test_a_run_is_described_beside_what_it_is_compared_with():
    """Metrics beside a guess's, mean ranks beside the planted ones, the note."""
    results = dict(
        arguments=dict(task="mrpc", method="elalora", rank=4, seed=1),
        total_steps=1740, seconds=61.4, metrics=dict(accuracy=0.9, f1=0.8),
        floor=dict(accuracy=0.6838), floor_name="majority class",
        ranks={f"layer.{i}.{kind}": r for i in (0, 1) for kind, r in (("q", 3 + i), ("dense", 5))},
        planted_ranks={"layer.0.q": 2}, note="a note")  # fmt: skip
    lines = "\n".join(report.describe(results)).splitlines()
    assert lines[0] == "mrpc, elalora, rank 4, seed 1: 1740 steps, 61 s"
    assert lines[1].startswith("  4 matrices, total rank 17, 3 to 5 each")
    assert [re.split("  +", line.strip()) for line in lines[2:]] == [
        ["found", "planted", "majority class"], ["accuracy", "0.9", "0.6838"], ["f1", "0.8"],
        ["q", "3.5", "2"], ["dense", "5"], ["a note"]]
    alone = results | dict(planted_ranks={}, floor={}, note="")
    assert report.describe(alone)[2].split()[0] == "found" and len(report.describe(alone)) == 3


def test_ranks_over_time_are_what_the_moves_make_of_the_first_ones():
    """From a record of losses and gains by matrix."""
    random = np.random.default_rng(0)
    names = [f"layer.{i}.{kind}" for i in range(3) for kind in ("query", "key")]
    ranks, moves, expected = dict.fromkeys(names, 4), [], {}

    def means():
        return [np.mean([ranks[name] for name in kind]) for kind in (names[::2], names[1::2])]

    for step in (30, 40, 70):
        expected[step] = means()
        loses, grows = random.choice(names, 2, replace=False)
        moves.append(dict(step=step, pruned={loses: [0]}, expanded={grows: 1},
                          scores={name: [0.5] * rank for name, rank in ranks.items()}))
        ranks = ranks | {loses: ranks[loses] - 1, grows: ranks[grows] + 1}
    expected[90] = means()
    found = report.ranks_over_time(dict(adjustments=moves, ranks=ranks, total_steps=90))
    assert found.T.to_dict("list") == expected and [*found] == ["query", "key"]


def test_a_score_of_0_is_drawn_at_minus_20():
    assert report.log_scores([0.0, 1e-3, 10]).tolist() == pytest.approx([-20, -3, 1])


# ---- Numbers ----
@pytest.mark.parametrize(
    "values, text",
    [([0.3602, 0.3478], "0.3540 ± 0.0088"), ([1.0, 1.2], "1.100 ± 0.141"), ([0.123456], "0.1235"),
     ([165888, 165888], "165,888"), ([1, 1 + 1e-12], "1"), ([np.nan], ""),
     ([1.0, np.nan, 1.2], "1.100 ± 0.141 (2)"), ([1000.0, 5000.0], "3,000 ± 2,828")],
)  # fmt: skip
def test_a_mean_shows_two_digits_of_the_deviation_or_three_that_begin_with_1(values, text):
    """What does not vary has no deviation, what is whole stays whole; (n) if some are missing."""
    assert report.mean_std(pandas.Series(values)) == text


def test_holms_correction_multiplies_the_least_p_by_their_number_and_so_on():
    """A p is never below a lesser one, nor above 1; what was not tested does not count."""
    found = report.holm(pandas.Series(dict(a=0.02, b=0.004, c=np.nan, d=0.03, e=0.6, f=0.7)))
    assert np.isnan(found.pop("c"))
    assert found.to_dict() == pytest.approx(dict(a=0.08, b=0.02, d=0.09, e=1, f=1))
    assert report.holm(pandas.Series([0.02, 0.03])).tolist() == pytest.approx([0.04, 0.04])


@pytest.mark.parametrize("n, tests", [(5, 8), (20, 1)])
def test_the_detectable_difference_is_found_in_four_of_five_cases(n, tests):
    """By simulated pairs whose true mean is that difference, and t-tests at their share of 5%."""
    random = np.random.default_rng(n)
    pairs = random.normal(report.detectable(3.0, n, tests), 3.0, (20_000, n))
    test = scipy.stats.ttest_1samp(pairs, 0, axis=1)
    found = (test.pvalue < 0.05 / tests) & (test.statistic > 0)
    assert np.mean(found) == pytest.approx(0.8, abs=0.01)


def test_differences_are_paired_by_seed_and_tested_from_five_pairs_on():
    """The first minus the second, by Student's t, corrected by Holm."""
    ours, near, far = np.random.default_rng(1).normal([[0.5], [0.497], [0.3]], 0.004, (3, 6))
    runs = dict(ours=ours, near=near, far=far, few=near[:4], one=near[:1], same=ours)
    rows = pandas.DataFrame(dict(run=run, seed=seed, accuracy=x)
                            for run, values in runs.items() for seed, x in enumerate(values))
    pairs = [("ours", other) for other in ("near", "far", "few", "one", "same")]
    found = report.differences(rows.sample(frac=1, random_state=0), "accuracy", pairs)
    assert [*found.index] == [f"ours − {other}" for other in ("near", "far", "few", "same")]
    for run, values, times in (("near", ours - near, 1), ("far", ours - far, 2)):  # Holm's
        mean, std = values.mean(), values.std(ddof=1)
        half = 2.5705818366 * std / np.sqrt(6)  # Student's t, 5 degrees of freedom, 97.5%
        p = times * 2 * scipy.stats.t.sf(abs(mean) / std * np.sqrt(6), 5)
        expected = dict(mean=mean, std=std, n=6, low=mean - half, high=mean + half, p=p,
                        detectable=report.detectable(std, 6, 2))
        x = found.loc[f"ours − {run}"]
        assert x.to_dict() == pytest.approx(expected)
        assert report.in_words(x).lstrip("+") == f"{shown(values)} (p = {p:.2g})"
    few = found.loc["ours − few"]
    assert few["n"] == 4 and report.in_words(few).endswith(" (not tested)")
    assert found.loc[["ours − few", "ours − same"], "low":].isna().all(axis=None)


# ---- Names ----
def arguments(method, rank=4, seed=0, targets=("",), set=(), ranks=None, **others):
    varied = dict(method=method, rank=rank, targets=[*targets], set=[*set], seed=seed, ranks=ranks)
    return dict(task="mrpc") | varied | others


def test_a_title_says_what_tells_a_run_from_the_others():
    """What all share is not said, nor a learning rate by which no two runs differ."""
    runs = [
        arguments("elalora", set=["learning_rate=1", "b=8", "k=1"]),
        arguments("elalora", set=["learning_rate=1", "k=1"]),
        arguments("lora", set=["learning_rate=2", "k=1"]),
        arguments("lora", set=["learning_rate=3", "k=1"]),
        arguments("svd", set=["k=1"], ranks="found.json", epochs=3),
        arguments("new", set=["k=1"], holdout=True),
    ]
    assert report.titles([dict(arguments=asked) for asked in runs]) == [
        "ElaLoRA, b = 8", "ElaLoRA", "LoRA, lr 2", "LoRA, lr 3", "ranks of found.json, epochs 3",
        "new, holdout True"]
    assert report.titles([dict(arguments=runs[0], name="mine")]) == ["mine"]
    for settings in itertools.permutations(["learning_rate=2e-3", "k=3"]):  # in any order
        run = arguments("lora", 2, 5, ["q", "k"], settings)
        assert report.label(run) == "lora-r2-q+k-k=3-learning_rate=2e-3"
        assert report.words(dict(arguments=run)) == [
            "LoRA", "rank 2", "only q + k", "k = 3", "lr 2e-3"]


# ---- Runs and studies ----
def write_run(folder, arguments, random):
    """A run's folder, of random numbers; returns what is in its results.json."""
    names = [f"layer.{i}.{matrix}" for i in range(3) for matrix in "abc"]
    moves = [dict(pruned={"layer.0.a": [3, 1]}), dict(pruned={"layer.0.b": [2]})]
    results = dict(
        metrics=dict(accuracy=random.normal()), arguments=arguments, adapter_parameters=123400,
        seconds=90.0, ranks=dict(zip(names, (random.permutation(9) ** 2).tolist())), commit="abc",
        adjustments=moves * (arguments["method"] == "elalora"), text="½",
        history=[dict(train_loss=random.random()) for _ in range(2)])
    path = folder / f"{arguments['task']}-{report.label(arguments)}-s{arguments['seed']}"
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(results))
    (path / "predictions.json").write_text(json.dumps(dict(loss=random.random(3).tolist())))
    return results


@pytest.fixture
def runs(tmp_path):
    """Title and seed -> results, of runs in tmp_path / "runs"."""
    random, found = np.random.default_rng(0), {}
    for title, seeds in (("AdaLoRA", 3), ("ElaLoRA", 6), ("LoRA", 6)):
        for seed in range(seeds):
            asked = arguments(title.lower(), 2, seed, set=["k=1"])  # k and r: shared by all
            found[title, seed] = write_run(tmp_path / "runs", asked, random)
    return found


def cells_of(text):
    """Row -> column -> cell."""
    lines = [re.split(r"\s*\|\s*", line)[1:-1] for line in text.splitlines() if "|" in line]
    return {name: dict(zip(lines[0][1:], cells)) for name, *cells in lines[2:]}


def shown(values):
    """Their mean and deviation, as a law above has it."""
    return report.mean_std(pandas.Series(values))


def test_the_tables_of_a_page_are_what_numpy_makes_of_the_runs(runs, tmp_path):
    """Means and deviations, ranks and how they correlate, differences to ElaLoRA. The same runs
    make the same page, whatever time they took, and by whatever commits they were made."""
    write_run(tmp_path / "runs", arguments("lora") | dict(task="rte"), np.random.default_rng(1))
    report.compare(tmp_path / "runs", "glue")
    _, reached, differences, rte = (tmp_path / "runs/glue.md").read_text().split("\n## ")
    assert differences.startswith("mrpc, first minus second: ElaLoRA and others\n")
    assert reached.startswith("mrpc\n") and rte.startswith("rte\n")
    reached, differences = cells_of(reached), cells_of(differences)
    accuracy = {}
    for title, n, pruned in (("AdaLoRA", 3, ""), ("ElaLoRA", 6, "3"), ("LoRA", 6, "")):
        of_title = [runs[title, seed] for seed in range(n)]
        accuracy[title] = np.array([r["metrics"]["accuracy"] for r in of_title])
        losses = [r["history"][-1]["train_loss"] for r in of_title]
        means = [np.mean([r["ranks"][f"layer.{i}.b"] for i in range(3)]) for r in of_title]
        maps = np.corrcoef([np.sqrt([*r["ranks"].values()]) for r in of_title])  # 0, 1, ... 8
        expected = dict(
            accuracy=shown(accuracy[title]), train_loss=shown(losses), pruned=pruned,
            rank_correlation=shown((maps.sum(0) - 1) / (n - 1)), seeds=str(n),
            adapter_parameters="123,400") | {"rank of b": shown(means)}
        assert {name: reached[name][title] for name in expected} == expected
    assert {*reached} == {*expected, "rank of a", "rank of c"}  # neither seconds nor commits
    text, _, p = differences["ElaLoRA − LoRA"]["accuracy"].partition(" (p = ")
    assert text.lstrip("+") == shown(accuracy["ElaLoRA"] - accuracy["LoRA"]) and p
    assert differences["ElaLoRA − AdaLoRA"]["train_loss"].endswith("(not tested)")


def test_new_ranks_are_followed_until_they_are_pruned(tmp_path):
    """Their ages, scores and ends are those of a record that knows every rank by itself."""
    random, matrices, moves, expected = np.random.default_rng(0), {"a": 3, "b": 4}, [], []
    there = {name: [(None, random.random()) for _ in range(n)] for name, n in matrices.items()}
    for number in range(12):
        scores = {name: [score for _, score in ranks] for name, ranks in there.items()}
        every = sorted(sum(scores.values(), []))
        pruned = {name: [int(i) for i in random.permutation(len(ranks))[:2]]
                  for name, ranks in there.items() if random.random() < 0.8}
        grown = {name: len(lost) for name, lost in zip("ba", pruned.values())}
        for name, ranks in there.items():
            for i, (since, score) in enumerate(ranks):
                if since is not None:
                    expected.append((number - since, score / every[3], i in pruned.get(name, [])))
            left = [x for i, x in enumerate(ranks) if i not in pruned.get(name, [])]
            there[name] = left + [(number, random.random()) for _ in range(grown.get(name, 0))]
        moves.append(dict(scores=scores, pruned=pruned, expanded=grown))
    new = report.new_ranks(dict(adjustments=moves))
    assert [*new.itertuples(index=False, name=None)] == expected and new["pruned"].any()
    run = write_run(tmp_path, arguments("elalora"), random) | dict(adjustments=moves)
    row = report.frame([run]).iloc[0]
    came = sum(sum(x["expanded"].values()) for x in moves)
    still = sum(since is not None for ranks in there.values() for since, _ in ranks)
    assert row["survived"] == pytest.approx(still / came)
    first = [lost for age, _, lost in expected if age == 1]
    assert row["pruned_next"] == np.mean(first)


def test_a_page_has_tasks_and_methods_beside_the_paper(tmp_path, monkeypatch):
    """Percentages with their deviations, averages of the seeds that did all tasks, the paper's
    numbers and their mean; in the heading, what all runs share; at the end, what was not run. A
    row is of one setting. A task beyond the paper's has a column, too."""
    folder, random, accuracy = tmp_path / "runs", np.random.default_rng(0), {}
    for task, method, seed in itertools.product(("rte", "mrpc"), ("elalora", "lora"), range(3)):
        if (task, method, seed) != ("rte", "lora", 2):
            r = write_run(folder, arguments(method, 2, seed, model="m") | dict(task=task), random)
            accuracy.setdefault((method, task), []).append(100 * r["metrics"]["accuracy"])
    write_run(folder, arguments("svd", 10, model="m"), random)
    monkeypatch.setitem(report.FAMILIES["glue"].columns, "new", ("new", "accuracy"))
    text = report.compare(folder, "glue")
    assert f"\n# glue, model m\n\n{text}\n" in (folder / "glue.md").read_text()
    *rows, _, missing = text.splitlines()
    names = ("LoRA", "AdaLoRA", "ElaLoRA")
    others = [f"{name} at rank {rank}" for rank in (4, 10) for name in names]
    assert missing == "Not run: " + ", ".join([
        "mnli, sst2, cola, qqp, qnli, stsb, new, AdaLoRA at rank 2", *others]) + "."
    header, _, ours, paper, lora, papers_lora, svd = (
        re.split(r"\s*\|\s*", line)[1:-1] for line in rows)
    assert header == ["rank", "run", "parameters, M", "rte", "mrpc", "average"]
    assert ours[:3] == ["2", "ElaLoRA", "0.12"] and lora[:3] == ["2", "LoRA", "0.12"]
    assert paper == ["2", "ElaLoRA, the paper", "0.33", "85.92", "90.44", "88.18"]
    assert papers_lora == ["2", "LoRA, the paper", "0.33", "83.03", "88.48", "85.75"]
    for line, method, n in ((ours, "elalora", 3), (lora, "lora", 2)):
        rte, mrpc = accuracy[method, "rte"], accuracy[method, "mrpc"]
        average, some = np.mean([rte, mrpc[:n]], axis=0), " (2)" * (n == 2)
        assert line[3:] == [shown(rte) + some, shown(mrpc), shown(average) + some]
    assert svd[:2] == ["10", "even ranks"] and svd[3] == svd[5] == ""
    for task, setting in (("rte", "k=1"), ("mrpc", "k=2")):
        write_run(tmp_path / "more", arguments("lora", set=[setting]) | dict(task=task), random)
    text = report.compare(tmp_path / "more", "glue")
    assert "LoRA, k = 1 " in text and "LoRA, k = 2 " in text


def test_a_page_of_somebody_elses_is_not_overwritten(tmp_path):
    (tmp_path / "glue.md").write_text("# My project")
    with pytest.raises(ValueError, match="glue.md is not a page of runs"):
        report.compare(tmp_path, "glue")
    assert (tmp_path / "glue.md").read_text() == "# My project"


def test_only_differences_that_were_named_are_tested(runs, tmp_path):
    """Each family is corrected for its own number; a heading says how many were run."""
    named = {"b = 1": [["LoRA", "ElaLoRA"], ["ElaLoRA", "EVA"]], "others": [["LoRA", "AdaLoRA"]]}
    (tmp_path / "runs/contrasts.json").write_text(json.dumps(dict(glue=named)))
    report.compare(tmp_path / "runs", "glue")
    _, _, *families = (tmp_path / "runs/glue.md").read_text().split("\n## ")
    assert [(text.splitlines()[0].partition(": ")[2], *cells_of(text)) for text in families] == [
        ("b = 1, 1 of 2 named beforehand", "LoRA − ElaLoRA"),
        ("others, 1 of 1 named beforehand", "LoRA − AdaLoRA")]


def test_a_study_has_all_of_each_run_bit_for_bit(runs, tmp_path):
    """A row and a line each."""
    study = tmp_path / "study.1"
    report.main(["pack", str(tmp_path / "runs"), str(study)])
    packed = report.read_study(study)
    assert len(packed) == len(runs)
    for r in packed:
        folder, predictions = tmp_path / "runs" / r.pop("folder"), r.pop("predictions")
        assert json.dumps(r) == (folder / "results.json").read_text()
        assert json.dumps(predictions) == (folder / "predictions.json").read_text()
    csv = pandas.read_csv(f"{study}.csv", index_col=["run", "seed"])
    for key, r in runs.items():
        expected = r["metrics"]["accuracy"], "abc", "k=1", 2, 90
        assert (*csv.loc[key, ["accuracy", "commit", "set", "rank", "seconds"]],) == expected


def test_packing_loses_no_run(runs, tmp_path):
    """New runs are added; what is there already changes no byte. Another run of the same name, of
    the same title and seed, or none at all is an error that leaves the study as it was."""
    study, new = tmp_path / "study", arguments("adalora", 2, 7, set=["k=1"])
    for folder in ("more", "other", "alike/again"):
        write_run(tmp_path / folder, new, np.random.default_rng(len(folder)))
    report.pack(tmp_path / "runs", study)
    report.pack(tmp_path / "more", study)
    folders = [r["folder"] for r in report.read_study(study)]
    assert folders == sorted(folders) and len(folders) == len(runs) + 1
    files = [Path(f"{study}{end}").read_bytes() for end in (".csv", ".jsonl.gz")]
    assert files[1][4:8] == bytes(4)  # no time of packing
    for folder, match in dict(other="another run in a folder of the name mrpc-adalora",
                              alike="AdaLoRA: two runs are alike",
                              empty="empty has no run").items():
        with pytest.raises(ValueError, match=match):
            report.pack(tmp_path / folder, study)
    report.pack(tmp_path / "runs", study)
    assert files == [Path(f"{study}{end}").read_bytes() for end in (".csv", ".jsonl.gz")]


def test_what_stands_between_marks_is_what_the_study_says(runs, tmp_path):
    """The rest of a text stays; a mark that nothing answers is an error."""
    report.pack(tmp_path / "runs", tmp_path / "s")
    ours, lora = ([runs[title, seed]["metrics"]["accuracy"] for seed in range(6)]
                  for title in ("ElaLoRA", "LoRA"))
    difference, text = np.subtract(ours, lora), "a <!-- no; mark --> b\n"
    p = scipy.stats.ttest_rel(ours, lora).pvalue  # the only one that is tested
    right = {"s; ElaLoRA; accuracy": shown(ours),
             "s; ElaLoRA; accuracy; {mean:.3f} of {n}": f"{np.mean(ours):.3f} of 6",
             "s mrpc; LoRA; accuracy; {std:.1%}": f"{np.std(lora, ddof=1):.1%}",
             "s; ElaLoRA − LoRA; accuracy": f"{shown(difference)} (p = {p:.2g})",
             "s; ElaLoRA − LoRA; accuracy; {mean:.4f}": f"{np.mean(difference):.4f}"}
    for mark, value in right.items():
        filled = report.fill(f"{text}<!-- {mark} -->old<!--end-->, c", tmp_path)
        assert filled.replace("+", "") == f"{text}<!-- {mark} -->{value}<!--end-->, c"
    for mark in ("s; EVA; accuracy", "s; LoRA; loss", "t; LoRA; accuracy", "s; LoRA − EVA; loss"):
        with pytest.raises((KeyError, FileNotFoundError)):
            report.fill(f"<!-- {mark} --><!--end-->", tmp_path)


# ---- results/ ----
STUDIES = [path.with_suffix("") for path in sorted(report.RESULTS.glob("*.csv"))]


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_the_csv_of_a_study_is_what_its_runs_say(study):
    """Row by row and bit by bit; two studies are not of runs."""
    runs = report.read_study(study)
    if study.name not in ("cost", "cuts"):
        made = pandas.read_csv(io.StringIO(report.frame(runs).to_csv(index=False)), dtype=str)
        kept = pandas.read_csv(f"{study}.csv", dtype=str)
        older = {"pruned_again", "score_median"}  # what studies of older code have as well
        assert {*kept} - {*made} in (set(), older)
        pandas.testing.assert_frame_equal(made, kept[[*made]])
    assert report.tables(study, pandas.read_csv(f"{study}.csv"))


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_numbers_in_texts_are_those_of_the_studies(name):
    """`python -m experiments.report fill README.md results/README.md` writes them."""
    text = (report.RESULTS.parent / name).read_text()
    assert report.fill(text) == text
