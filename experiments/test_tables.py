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
    FAMILIES, FAMILY_OF, METHODS, SETTINGS, Config, fit_phases, papers_run, recipe_of, settings_of,
)  # fmt: skip


def config(*words, task="mrpc", rank=4, **changes):
    return Config(task, "elalora", rank, 0, set=[*words], **changes)


def schedule_of(recipe, total):
    return RankSchedule(total, recipe.warmup, recipe.stabilize, recipe.interval, recipe.b,
                        recipe.shape)  # fmt: skip


def test_what_the_command_offers_can_be_made():
    """Every family has a module, every method a class, every task of GLUE its columns and, first,
    Table 2's metric."""
    for name in FAMILIES:
        assert callable(importlib.import_module(f"experiments.{name}").problem)
    assert [*METHODS] == [*CLASSES]
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
    _, _, columns, results = FAMILIES[family]
    assert {rank for _, rank in results} == {*AVERAGES[family]}
    for (method, rank), (_, *percentages) in results.items():
        mean = sum(percentages) / len(columns)
        assert mean == pytest.approx(AVERAGES[family][rank][method], abs=0.0101)


@pytest.mark.parametrize("task", FAMILY_OF)
def test_every_row_searches(task):
    """In the paper's number of steps the first budget is b, and the last adjustment is in time."""
    for rank in FAMILIES[FAMILY_OF[task]].tasks[task].moves:
        asked = config(task=task, rank=rank)
        recipe, total = papers_run(asked)
        assert fit_phases(recipe, asked, total) == recipe
        schedule = schedule_of(recipe, total)
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
    """Of two rows as near, the lower. RTE's b and k are 1 and 1, 4 and 2, 8 and 4."""
    expected = {2: (1, 1), 4: (4, 2), 10: (8, 4)}
    for rank, row in {1: 2, 2: 2, 3: 2, 4: 4, 6: 4, 7: 4, 8: 10, 10: 10, 64: 10}.items():
        recipe = recipe_of(config(task="rte", rank=rank))
        assert (recipe.b, recipe.k) == expected[row]


# ---- Settings ----
def test_set_replaces_values_and_keeps_their_types():
    """Numbers and words of the recipe change, and nothing else does. Names are sorted, and 1e-3 is
    0.0010, so that one run has one name."""
    words = ["warmup=7", "learning_rate=2e-3", "b=0", "shape=linear", "beta1=0.9"]
    changes = dict(b=0, beta1=0.9, learning_rate=2e-3, shape="linear", warmup=7)
    assert str(settings_of(words)) == str(settings_of(words[::-1])) == str(changes)
    assert settings_of(["learning_rate=2e-3", "b=0"]) == settings_of(["b=00", "learning_rate=.002"])
    assert recipe_of(config(*words)) == replace(recipe_of(config()), **changes)


@pytest.mark.parametrize("words", ["ranks=3", "epochs=2", "b", "", "b=1 b=2"])
def test_what_is_no_setting_or_set_twice_is_refused(words):
    """With all that are; epochs have an argument of their own."""
    *_, last = words.split(" ")
    right = "b is set twice" if last == "b=2" else "takes NAME=VALUE of batch_size, learning_rate,"
    with pytest.raises(ValueError, match=f"--set {last}: {right}"):
        settings_of(words.split(" "))


@pytest.mark.parametrize("name", SETTINGS.keys() - {"k", "beta1", "beta2", "lr_scheduler"})
def test_a_setting_out_of_its_range_is_refused(name):
    """Here, or when the schedule is made; the others when the method is made."""
    wrong = ["-1"] if name == "shape" else ["-1", "much"]
    if name in ("batch_size", "learning_rate", "alpha", "lambda_rate", "init_ratio", "interval"):
        wrong += ["0"]
    for text in wrong:
        with pytest.raises(ValueError, match=name):
            schedule_of(recipe_of(config(f"{name}={text}")), 1740)


# ---- Phases ----
@given(st.integers(2, 5_000), st.sampled_from(sorted(FAMILY_OF)))
def test_phases_keep_their_shares_of_any_run(total, task):
    """To less than a step, so that a run of two steps and more always has a schedule."""
    asked = config(task=task)
    table, steps = papers_run(asked)
    recipe = fit_phases(table, asked, total)
    for name in ("warmup", "stabilize", "interval"):
        share = Fraction(getattr(table, name), steps)
        assert getattr(recipe, name) == max(name == "interval", int(share * total))
    schedule_of(recipe, total)


def test_a_phase_that_set_names_stays_as_it_is():
    """The others follow the run: with twice the batches of MRPC, twice its phases."""
    asked = config("batch_size=32", "interval=7")
    recipe = fit_phases(recipe_of(asked), asked, 3480)
    assert (recipe.warmup, recipe.stabilize, recipe.interval) == (600, 800, 7)
