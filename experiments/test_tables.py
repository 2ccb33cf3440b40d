"""The laws of experiments/tables.py: the paper's rows, the settings of a run, its phases."""

import importlib
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elalora import RankSchedule
from experiments import glue
from experiments.methods import METHODS as CLASSES
from experiments.tables import (
    FAMILIES, FAMILY_OF, METHODS, SETTINGS, Config, fit_phases, papers_result, papers_run,
    recipe_of, settings_of,
)  # fmt: skip


def config(*words, task="mrpc", rank=4, **changes):
    return Config(task, "elalora", rank, 0, set=[*words], **changes)


def test_every_family_has_a_module_and_every_method_a_class():
    """So that what the command offers can be made."""
    for name in FAMILIES:
        assert callable(importlib.import_module(f"experiments.{name}").problem)
    assert [*METHODS] == [*CLASSES]


def test_glue_has_columns_for_every_task_and_reports_table_2s_metric_first():
    """The tasks of the tables, and those whose columns and metrics glue.py knows, are the same."""
    assert glue.TASKS.keys() == FAMILIES["glue"].tasks.keys()
    for task, metric in FAMILIES["glue"].columns.values():
        assert metric == glue.TASKS[task].metrics[0]


AVERAGES = {  # the last columns of Tables 2 and 4
    "glue": {2: dict(lora=87.51, adalora=87.39, elalora=88.01),
             4: dict(lora=87.63, adalora=87.89, elalora=88.72),
             10: dict(lora=87.75, adalora=88.58, elalora=88.84)},
    "vtab": {8: dict(lora=63.86, adalora=63.13, elalora=64.88)},
}  # fmt: skip


@pytest.mark.parametrize("family", AVERAGES)
def test_the_papers_averages_are_those_of_the_papers_columns(family):
    """So no number was mistyped; the paper rounds some of its averages down."""
    results = FAMILIES[family].results
    assert {rank for _, rank in results} == {*AVERAGES[family]}
    for (method, rank), (_, *percentages) in results.items():
        assert len(percentages) == len(FAMILIES[family].columns)
        mean = sum(percentages) / len(percentages)
        assert mean == pytest.approx(AVERAGES[family][rank][method], abs=0.0101)


@pytest.mark.parametrize("task", FAMILY_OF)
def test_every_row_searches(task):
    """In the paper's number of steps the first budget is b, and the last adjustment is in time."""
    for rank in FAMILIES[FAMILY_OF[task]].tasks[task].recipes:
        asked = config(task=task, rank=rank)
        recipe, total = papers_run(asked)
        assert fit_phases(recipe, asked, total) == recipe
        schedule = RankSchedule(
            total, recipe.warmup, recipe.stabilize, recipe.interval, recipe.b, recipe.shape
        )
        moves = {t: schedule.budget(t) for t in range(1, total + 1) if schedule.budget(t)}
        assert min(moves) == recipe.warmup + recipe.interval and moves[min(moves)] == recipe.b
        assert max(moves) <= total - recipe.stabilize


@pytest.mark.parametrize("task, steps", dict(
    mnli=30_680, sst2=21_060, cola=2_680, qqp=14_215, qnli=8_185, rte=1_950, mrpc=1_740,
    stsb=2_250, xsum=12_754, cifar=5_000, planted=1_000).items())  # fmt: skip
def test_the_papers_steps_are_its_epochs_of_whole_batches(task, steps):
    """Counted by hand from the data's sizes and the tables' batch sizes."""
    assert papers_run(config(task=task))[1] == steps


def test_a_rank_takes_the_row_of_the_nearest():
    """Of two rows as near, the lower."""
    for rank, row in {1: 2, 2: 2, 3: 2, 4: 4, 6: 4, 7: 4, 8: 10, 10: 10, 64: 10}.items():
        expected = FAMILIES["glue"].tasks["rte"].recipes[row]
        assert recipe_of(config(task="rte", rank=rank)) == expected


# ---- Settings ----
def test_set_replaces_values_and_keeps_their_types():
    """Numbers and words of the recipe change, and nothing else does."""
    recipe = recipe_of(config("learning_rate=2e-3", "b=0", "shape=linear", "beta1=0.9", "warmup=7"))
    changes = dict(learning_rate=2e-3, b=0, shape="linear", beta1=0.9, warmup=7)
    assert recipe == replace(recipe_of(config()), **changes)
    assert type(recipe.b) is type(recipe.warmup) is int and type(recipe.beta1) is float


def test_settings_in_another_order_or_spelling_are_the_same():
    """1e-3 is 0.001, and names are sorted."""
    expected = [("b", 1), ("learning_rate", 0.001)]
    for words in (["b=1", "learning_rate=1e-3"], ["learning_rate=0.0010", "b=01"]):
        assert [*settings_of(words).items()] == expected


@pytest.mark.parametrize("word", ["ranks=3", "paper=1", "epochs=2", "__class__=1", "b 1", ""])
def test_what_is_no_setting_is_refused_with_all_that_are(word):
    """Epochs have an argument of their own; the paper's results are not a setting."""
    with pytest.raises(ValueError, match=f"--set {word}: takes NAME=VALUE of batch_size, "):
        settings_of([word])


def test_a_setting_that_is_named_twice_is_refused():
    with pytest.raises(ValueError, match="--set b=2: b is set twice"):
        settings_of(["b=1", "b=2"])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_out_of_its_range_is_refused(name):
    """Here, or when the schedule is made; tests of methods and elalora.py have k and the betas."""
    wrong = ["much"] if name not in ("shape", "lr_scheduler") else []
    wrong += ["-1"] if name not in ("k", "beta1", "beta2") else []
    if name in ("batch_size", "learning_rate", "alpha", "lambda_rate", "init_ratio", "interval"):
        wrong += ["0"]
    for text in wrong:
        with pytest.raises(ValueError, match=name):
            r = recipe_of(config(f"{name}={text}"))
            RankSchedule(1740, r.warmup, r.stabilize, r.interval, r.b, r.shape)


# ---- Phases ----
@given(st.integers(2, 5_000), st.sampled_from(sorted(FAMILY_OF)))
def test_phases_keep_their_shares_of_any_run(total, task):
    """To less than a step, so that a run of two steps and more always has a schedule."""
    asked = config(task=task)
    table, steps = papers_run(asked)
    recipe = fit_phases(table, asked, total)
    for name in ("warmup", "stabilize", "interval"):
        share = Fraction(getattr(table, name), steps)
        least = 1 if name == "interval" else 0
        assert getattr(recipe, name) == max(least, int(share * total))
    RankSchedule(total, recipe.warmup, recipe.stabilize, recipe.interval, recipe.b)


def test_a_phase_that_set_names_stays_as_it_is():
    """The others follow the run: with twice the batches of MRPC, twice its phases."""
    asked = config("batch_size=32", "interval=7")
    recipe = fit_phases(recipe_of(asked), asked, 3480)
    assert (recipe.warmup, recipe.stabilize, recipe.interval) == (600, 800, 7)


def test_a_result_is_compared_with_the_papers_only_if_set_up_as_that_was():
    """The paper's model, methods, ranks, steps, settings, all matrices, the dev split."""
    asked = config(model="microsoft/deberta-v3-base", dtype="float32")
    assert papers_result(asked, 1740) == dict(accuracy=0.9044)
    assert papers_result(replace(asked, seed=3, epochs=30), 1740) == dict(accuracy=0.9044)
    assert papers_result(replace(asked, rank=10), 1740) == dict(accuracy=0.8898)
    assert papers_result(replace(asked, method="adalora"), 1740) == dict(accuracy=0.8774)
    bart = replace(asked, task="xsum", rank=6, model="facebook/bart-base")
    assert papers_result(bart, 12_754) == dict(rouge1=0.38, rouge2=0.153, rougeL=0.3042)
    assert papers_result(asked, 1739) == {}
    for changes in (
        dict(rank=3), dict(model="roberta-base"), dict(method="svd"), dict(holdout=True),
        dict(targets=["dense"]), dict(set=["b=2"]),
    ):  # fmt: skip
        assert papers_result(replace(asked, **changes), 1740) == {}, changes
