"""The laws of experiments/problem.py: recipes and their settings, the matrices chosen."""

from dataclasses import replace

import pytest

from experiments import glue
from experiments.problem import (
    CHOICES, MAY_BE_ZERO, SETTINGS, Config, Recipe, by_rank, chosen, recipe_of,
)  # fmt: skip


def configured(*settings, task="mrpc", rank=4, epochs=None):
    config = Config(task, "elalora", rank, 0, epochs=epochs, set=[*settings])
    return recipe_of(glue.RECIPES[task], config)


def test_other_epochs_keep_the_shares_of_the_phases():
    """A phase has max(1, floor(its steps * epochs / the table's epochs)) steps."""
    recipe = configured(epochs=7)
    assert (recipe.epochs, recipe.warmup, recipe.stabilize, recipe.interval) == (7, 70, 93, 11)
    assert configured(epochs=30) == configured() == glue.RECIPES["mrpc"][4]
    assert configured(task="cola", epochs=1).interval == 2
    assert configured(task="rte", epochs=1).interval == 1


def test_a_rank_takes_the_row_of_the_nearest():
    """Of two rows as near, the lower."""
    rows = {1: 2, 2: 2, 3: 2, 4: 4, 6: 4, 7: 4, 8: 10, 10: 10, 64: 10}
    for rank, row in rows.items():
        assert configured(task="rte", rank=rank) == glue.RECIPES["rte"][row]


def test_by_rank_gives_every_rank_its_own_b_k_and_result():
    """Everything else is the same for all ranks; lists of unlike length are an error."""
    numbers, results = (64, 1e-3, 5, 10, 20, 3), [dict(accuracy=0.5), {}]
    recipes = by_rank((2, 6), *numbers, b=(1, 2), k=(3, 4), paper=results)
    assert recipes == {2: Recipe(*numbers, 1, 3, results[0]), 6: Recipe(*numbers, 2, 4, {})}
    with pytest.raises(ValueError):
        by_rank((2, 6), *numbers, b=(1, 2), k=(3,), paper=results)


def test_set_replaces_values_and_keeps_their_types():
    """Numbers and words of the recipe change, and nothing else does."""
    recipe = configured("learning_rate=2e-3", "b=0", "shape=linear", "beta1=0.9", "warmup=7")
    changes = dict(learning_rate=2e-3, b=0, shape="linear", beta1=0.9, warmup=7)
    assert recipe == replace(configured(), **changes)
    assert type(recipe.b) is type(recipe.warmup) is int and type(recipe.beta1) is float


@pytest.mark.parametrize("setting", ["ranks=3", "paper=1", "epochs=2", "__class__=1", "b 1", ""])
def test_what_is_no_setting_is_refused_with_all_that_are(setting):
    """Epochs have an argument of their own; the paper's results are no setting."""
    message = f"--set {setting}: takes NAME=VALUE of {', '.join(SETTINGS)}"
    with pytest.raises(ValueError, match=message):
        configured(setting)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_out_of_its_range_is_refused(name):
    """By --set or in a table: 0 only where it has a meaning, betas below 1, words that exist."""
    beta, zero = name.startswith("beta"), name in MAY_BE_ZERO
    wrong = ["-1", "nan", "inf", "much", *["0"] * (not zero), *["1"] * beta]
    wrong += ["0.5"] * (type(getattr(configured(), name)) is int)
    for text in wrong:
        with pytest.raises(ValueError, match=f"^--set {name}={text}: "):
            configured(f"{name}={text}")
    with pytest.raises(ValueError, match=f"^{name} must be "):
        replace(configured(), **{name: -1})
    for value in CHOICES.get(name, [0.5] if beta else [1] + [0] * zero):
        assert getattr(configured(f"{name}={value}"), name) == value


def test_targets_choose_matrices_by_the_ends_of_their_names():
    """In the order of the model; a target that fits nothing is named."""
    names = ["0.query", "0.dense", "1.query", "1.dense"]

    def choose(*targets):
        return chosen(names, Config("mrpc", "elalora", 4, 0, targets=[*targets]))

    assert choose("") == names and choose("dense") == names[1::2]
    assert choose("1.dense", "query") == ["0.query", "1.query", "1.dense"]
    with pytest.raises(ValueError, match="--targets bias: none of .*1.dense ends so"):
        choose("dense", "bias")
