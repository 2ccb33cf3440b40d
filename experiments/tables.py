"""What the paper sets: tasks, settings, and ElaLoRA's results in Tables 2 to 4. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

METHODS = {  # name -> what --help says of it
    "elalora": "the paper's method",
    "svd": "the same adapter, but its ranks never move: even ranks, or those of --ranks",
    "lora": "PEFT's LoRA",
    "adalora": "PEFT's AdaLoRA",
}
TAKE_RANKS = ("svd",)  # the methods that --ranks is for


@dataclass(frozen=True)
class Config:
    """One run, as the command line asks for it; results.json has it under "arguments"."""
    task: str
    method: str
    rank: int  # the mean over the adapted matrices
    seed: int
    model: str | None = None  # hub id or folder
    data_dir: str | None = None  # None: from the hub
    epochs: int | None = None  # None: the table's
    targets: list[str] = field(default_factory=lambda: [""])  # ends of names of matrices to adapt
    set: list[str] = field(default_factory=list)  # NAME=VALUE, in place of the table's
    holdout: bool = False  # evaluate on data that no result is reported on
    dtype: str | None = None  # of autocast
    processes: int = 1
    ranks: str | None = None  # file with the ranks that svd has in place of even ones


@dataclass(frozen=True)
class Recipe:
    """A row of Table 7, 8 or 10 at one rank, then what these tables leave open.

    Raises ValueError for a value that is out of range, unless elalora.py checks it.
    """
    batch_size: int
    learning_rate: float
    epochs: int
    warmup: int  # steps before the search for ranks ...
    stabilize: int  # ... and after it
    interval: int  # steps between two adjustments
    b: int  # ranks that the first adjustments move
    k: int  # ranks of a matrix that an adjustment may move
    paper: dict[str, float] = field(default_factory=dict)  # metric -> ElaLoRA's in the paper
    alpha: float = 16.0
    gamma: float = 0.1  # the weight of the orthogonality penalty
    beta1: float = 0.85
    beta2: float = 0.85
    lambda_rate: float = 1.0  # the learning rate of singular values / that of the rest
    init_ratio: float = 1.5  # AdaLoRA's first rank / its last
    shape: str = "cubic"  # of b over time
    lr_scheduler: str = "linear"
    examples: int = 0  # train on so many, at random but alike for every seed; 0: on all

    def __post_init__(self) -> None:
        for name in ("batch_size", "learning_rate", "epochs", "alpha", "lambda_rate", "init_ratio",
                     "gamma", "examples"):
            value, zero = getattr(self, name), name in ("gamma", "examples")
            if not (0 < value < math.inf or zero and value == 0):
                raise ValueError(f"{name} must be a number >{'=' * zero} 0, got {value!r}")
        right = ("linear", "cosine", "constant_with_warmup")
        if self.lr_scheduler not in right:
            raise ValueError(f"lr_scheduler must be one of {right}, got {self.lr_scheduler!r}")


SETTINGS = [f.name for f in fields(Recipe) if f.name not in ("epochs", "paper")]


class Task(NamedTuple):
    """What the paper trains on, and how."""
    examples: int  # of the training split
    recipes: dict[int, Recipe]  # by rank


class Family(NamedTuple):
    """The tasks of one module of experiments/, and the model that the paper fine-tunes on them."""
    model: str | None
    tasks: dict[str, Task]


def row(metric: str, ranks: Sequence[int], examples: int, *numbers: float | Sequence) -> Task:
    """A row that ends in b, k and ElaLoRA's percentages by rank; None where the paper has none."""
    *shared, b, k, percent = numbers
    paper = [{} if x is None else {metric: x / 100} for x in percent]
    by_rank = zip(ranks, b, k, paper, strict=True)
    return Task(examples, {rank: Recipe(*shared, *rest) for rank, *rest in by_rank})


# Training examples, batch size, learning rate, epochs, warm-up, stabilization, interval; then, for
# ranks 2, 4 and 10: b, k and Table 2
TABLE_7 = {
    "mnli": (392_702, 64, 5e-4, 5, 5000, 10000, 500, (1, 2, 4), (1, 1, 2), (89.32, 89.44, 89.51)),
    "sst2": (67_349, 64, 8e-4, 20, 3000, 10000, 500, (1, 2, 4), (1, 1, 2), (95.53, 95.64, 95.87)),
    "cola": (8_551, 64, 8e-4, 20, 300, 1500, 50, (1, 2, 4), (1, 1, 2), (67.38, 70.15, 70.19)),
    "qqp": (363_846, 128, 4e-4, 5, 3000, 5000, 100, (1, 2, 4), (1, 1, 2), (91.21, 91.26, 91.42)),
    "qnli": (104_743, 64, 5e-4, 5, 2000, 2000, 200, (1, 2, 4), (1, 1, 2), (93.70, 94.44, 94.36)),
    "rte": (2_490, 64, 1.2e-3, 50, 300, 500, 50, (1, 4, 8), (1, 2, 4), (85.92, 87.36, 88.81)),
    "mrpc": (3_668, 64, 5e-4, 30, 300, 400, 50, (2, 2, 4), (1, 1, 2), (90.44, 90.44, 88.98)),
    "stsb": (5_749, 64, 5e-3, 25, 300, 300, 150, (3, 4, 8), (1, 2, 4), (90.61, 91.10, 91.59)),
}
TABLE_7["sst2_heldout"] = (*TABLE_7["sst2"][:-1], [None] * 3)  # ours: evaluated on other data
TABLE_2 = {"cola": "matthews", "stsb": "pearson"}  # where it is not the accuracy
ROUGE = {2: dict(rouge1=0.3724, rouge2=0.1466, rougeL=0.2976),  # Table 3
         6: dict(rouge1=0.3800, rouge2=0.1530, rougeL=0.3042)}
TABLE_8 = {2: Recipe(32, 5e-4, 2, 1500, 3000, 200, 2, 1, ROUGE[2]),
           6: Recipe(32, 5e-4, 2, 1500, 3000, 200, 3, 2, ROUGE[6])}
TABLE_10 = {  # b, k and Table 4; Caltech101 is of VTAB, but not in the paper
    "cifar": (6, 3, 61.25), "svhn": (4, 2, 74.60), "eurosat": (4, 2, 94.26),
    "resisc45": (6, 3, 80.71), "dsprites_ori": (4, 2, 39.2), "dmlab": (6, 3, 39.30),
    "caltech101": (6, 3, None),
}
FAMILIES = {
    "planted": Family(None, {  # ours
        "planted": Task(3_200, {4: Recipe(32, 4e-2, 10, 100, 300, 20, 6, 1)})}),
    "glue": Family("microsoft/deberta-v3-base", {
        task: row(TABLE_2.get(task, "accuracy"), (2, 4, 10), *numbers)
        for task, numbers in TABLE_7.items()}),
    "xsum": Family("facebook/bart-base", {"xsum": Task(204_045, TABLE_8)}),
    "vtab": Family("google/vit-base-patch16-224-in21k", {
        task: row("accuracy", [8], 800, 16, 1e-3, 100, 500, 1500, 200, [b], [k], [percent])
        for task, (b, k, percent) in TABLE_10.items()}),
}
FAMILY_OF = {task: name for name, family in FAMILIES.items() for task in family.tasks}


# ---- The settings of a run ----
def settings_of(words: Sequence[str]) -> dict[str, int | float | str]:
    """Settings by name, sorted, from words NAME=VALUE. ValueError for others, and for repeats."""
    kinds = {f.name: f.type for f in fields(Recipe)}
    found = {}
    for word in words:
        name, equals, text = word.partition("=")
        if name not in SETTINGS or not equals:
            raise ValueError(f"--set {word}: takes NAME=VALUE of {', '.join(SETTINGS)}")
        if name in found:
            raise ValueError(f"--set {word}: {name} is set twice")
        try:
            found[name] = kinds[name](text)
        except ValueError as error:
            raise ValueError(f"--set {word}: {error}") from None
    return dict(sorted(found.items()))


def papers_run(config: Config) -> tuple[Recipe, int]:
    """The table's row for the nearest rank, of two as near for the lower; and how many steps the
    paper's run has."""
    task = FAMILIES[FAMILY_OF[config.task]].tasks[config.task]
    recipe = task.recipes[min(task.recipes, key=lambda rank: abs(rank - config.rank))]
    return recipe, recipe.epochs * math.ceil(task.examples / recipe.batch_size)


def recipe_of(config: Config) -> Recipe:
    """The table's row with the run's epochs and --set. Its phases are still the table's.

    Raises ValueError if a setting is unknown or out of its range.
    """
    recipe, _ = papers_run(config)
    recipe = replace(recipe, **settings_of(config.set))
    return recipe if config.epochs is None else replace(recipe, epochs=config.epochs)


def fit_phases(recipe: Recipe, config: Config, total_steps: int) -> Recipe:
    """The recipe with phases that have the same shares of this run as of the paper's run, rounded
    down; but a phase that --set names stays as it is."""
    _, papers_steps = papers_run(config)
    phases = {name: max(least, getattr(recipe, name) * total_steps // papers_steps)
              for name, least in (("warmup", 0), ("stabilize", 0), ("interval", 1))}
    return replace(recipe, **phases | settings_of(config.set))


def papers_result(config: Config, total_steps: int) -> dict[str, float]:
    """ElaLoRA's result in the paper, if this run has the paper's model, data and settings."""
    recipe, papers_steps = papers_run(config)
    family = FAMILIES[FAMILY_OF[config.task]]
    as_paper = replace(config, method="elalora", model=family.model, targets=[""], set=[],
                       holdout=False)
    in_table = config.rank in family.tasks[config.task].recipes
    return recipe.paper if in_table and (config, total_steps) == (as_paper, papers_steps) else {}
