"""What the paper sets: tasks, settings, and its results in Tables 2 to 4. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

METHODS = {  # name -> its title in tables, what --help says of it
    "elalora": ("ElaLoRA", "the paper's method"),
    "svd": ("even ranks", "the same adapter, but its ranks never move: even ranks, or those of "
            "--ranks"),
    "lora": ("LoRA", "PEFT's LoRA"),
    "adalora": ("AdaLoRA", "PEFT's AdaLoRA"),
}
TAKE_RANKS = ("svd",)  # the methods that --ranks is for


@dataclass(frozen=True)
class Config:
    """One run, as the command line asks for it; results.json has it under "arguments"."""
    task: str
    method: str
    rank: int  # the mean over the adapted matrices
    seed: int
    targets: list[str] = field(default_factory=lambda: [""])  # ends of names of matrices to adapt
    set: list[str] = field(default_factory=list)  # NAME=VALUE, in place of the table's
    ranks: str | None = None  # file with the ranks that svd has in place of even ones
    model: str | None = None  # hub id or folder
    data_dir: str | None = None  # None: from the hub
    epochs: int | None = None  # None: the table's
    holdout: bool = False  # evaluate on data that no result is reported on
    dtype: str | None = None  # of autocast
    processes: int = 1


@dataclass(frozen=True)
class Recipe:
    """A row of Table 7, 8 or 10 at one rank, then what these tables leave open.

    Raises ValueError for a value that is out of range; some are checked only where they are used.
    """
    batch_size: int
    learning_rate: float
    epochs: int
    warmup: int  # steps before the search for ranks ...
    stabilize: int  # ... and after it
    interval: int  # steps between two adjustments
    b: int  # ranks that the first adjustments move
    k: int  # ranks of a matrix that an adjustment may move
    alpha: float = 16.0
    gamma: float = 0.1  # the weight of the orthogonality penalty
    beta1: float = 0.85
    beta2: float = 0.85
    lambda_rate: float = 1.0  # the learning rate of singular values (LoRA: of B) / of the rest
    init_ratio: float = 1.5  # AdaLoRA's first rank / its last
    shape: str = "cubic"  # of b over time
    lr_scheduler: str = "linear"  # or "cosine", "constant_with_warmup": transformers' names
    examples: int = 0  # train on so many, at random but alike for every seed; 0: on all

    def __post_init__(self) -> None:
        for name in ("batch_size", "learning_rate", "epochs", "alpha", "lambda_rate", "init_ratio",
                     "gamma", "examples"):
            value, zero = getattr(self, name), name in ("gamma", "examples")
            if not (0 < value < math.inf or zero and value == 0):
                raise ValueError(f"{name} must be a number >{'=' * zero} 0, got {value!r}")


SETTINGS = {f.name: f.type for f in fields(Recipe) if f.name != "epochs"}


class Task(NamedTuple):
    """What the paper trains on, and how."""
    examples: int  # of the training split
    row: tuple[float, ...]  # of Table 7, 8 or 10: a Recipe's values before b and k
    moves: dict[int, tuple[int, int]]  # rank -> b and k


class Family(NamedTuple):
    """The tasks of one module of experiments/, and what the paper reports of them."""
    model: str | None  # that the paper fine-tunes
    tasks: dict[str, Task]
    columns: dict[str, tuple[str, str]]  # of its table: name -> task, metric
    results: dict[tuple[str, int], Sequence[float]]  # method, rank -> parameters, then the columns


PLANTED = {"planted": Task(3_200, (32, 4e-2, 10, 100, 300, 20), {4: (6, 1)})}  # ours
TABLE_7 = {
    "mnli": Task(392_702, (64, 5e-4, 5, 5000, 10000, 500), {2: (1, 1), 4: (2, 1), 10: (4, 2)}),
    "sst2": Task(67_349, (64, 8e-4, 20, 3000, 10000, 500), {2: (1, 1), 4: (2, 1), 10: (4, 2)}),
    "cola": Task(8_551, (64, 8e-4, 20, 300, 1500, 50), {2: (1, 1), 4: (2, 1), 10: (4, 2)}),
    "qqp": Task(363_846, (128, 4e-4, 5, 3000, 5000, 100), {2: (1, 1), 4: (2, 1), 10: (4, 2)}),
    "qnli": Task(104_743, (64, 5e-4, 5, 2000, 2000, 200), {2: (1, 1), 4: (2, 1), 10: (4, 2)}),
    "rte": Task(2_490, (64, 1.2e-3, 50, 300, 500, 50), {2: (1, 1), 4: (4, 2), 10: (8, 4)}),
    "mrpc": Task(3_668, (64, 5e-4, 30, 300, 400, 50), {2: (2, 1), 4: (2, 1), 10: (4, 2)}),
    "stsb": Task(5_749, (64, 5e-3, 25, 300, 300, 150), {2: (3, 1), 4: (4, 2), 10: (8, 4)}),
}
TABLE_8 = {"xsum": Task(204_045, (32, 5e-4, 2, 1500, 3000, 200), {2: (2, 1), 6: (3, 2)})}
VTAB = (16, 1e-3, 100, 500, 1500, 200)
TABLE_10 = {
    "cifar": Task(800, VTAB, {8: (6, 3)}), "svhn": Task(800, VTAB, {8: (4, 2)}),
    "eurosat": Task(800, VTAB, {8: (4, 2)}), "resisc45": Task(800, VTAB, {8: (6, 3)}),
    "dsprites_ori": Task(800, VTAB, {8: (4, 2)}), "dmlab": Task(800, VTAB, {8: (6, 3)}),
    "caltech101": Task(800, VTAB, {8: (6, 3)}),  # of VTAB, but not in the paper
}
TABLE_2 = {  # millions of parameters, then percentages
    ("lora", 2): (0.33, 88.43, 94.49, 69.77, 90.92, 93.84, 83.03, 88.48, 91.13),
    ("adalora", 2): (0.49, 89.05, 94.95, 66.87, 90.99, 94.33, 84.84, 86.51, 91.60),
    ("elalora", 2): (0.33, 89.32, 95.53, 67.38, 91.21, 93.70, 85.92, 90.44, 90.61),
    ("lora", 4): (0.66, 89.46, 94.15, 67.15, 91.26, 93.84, 85.55, 88.48, 91.17),
    ("adalora", 4): (0.99, 88.92, 95.53, 67.70, 91.10, 94.12, 86.28, 87.74, 91.74),
    ("elalora", 4): (0.66, 89.44, 95.64, 70.15, 91.26, 94.44, 87.36, 90.44, 91.10),
    ("lora", 10): (1.66, 89.11, 92.31, 67.06, 91.34, 94.08, 87.72, 88.97, 91.40),
    ("adalora", 10): (2.49, 89.27, 95.76, 70.02, 91.16, 94.31, 87.73, 88.72, 91.67),
    ("elalora", 10): (1.66, 89.51, 95.87, 70.19, 91.42, 94.36, 88.81, 88.98, 91.59),
}
TABLE_3 = {
    ("lora", 2): (0.41, 36.61, 14.28, 29.23), ("lora", 6): (1.22, 37.64, 15.30, 30.19),
    ("adalora", 2): (0.41, 36.97, 14.42, 29.42), ("adalora", 6): (1.22, 37.80, 15.18, 30.28),
    ("elalora", 2): (0.41, 37.24, 14.66, 29.76), ("elalora", 6): (1.22, 38.00, 15.30, 30.42),
}
TABLE_4 = {
    ("lora", 8): (1.19, 53.75, 73.83, 93.85, 79.63, 40.62, 41.5),
    ("adalora", 8): (1.48, 53.90, 72.30, 93.22, 79.22, 40.54, 39.62),
    ("elalora", 8): (1.19, 61.25, 74.60, 94.26, 80.71, 39.2, 39.30),
}
METRICS = {"cola": "matthews", "stsb": "pearson"}  # where Table 2 has not the accuracy
FAMILIES = {
    "planted": Family(None, PLANTED, {"residual": ("planted", "residual")}, {}),
    "glue": Family("microsoft/deberta-v3-base", TABLE_7, {
        task: (task, METRICS.get(task, "accuracy")) for task in TABLE_7}, TABLE_2),
    "xsum": Family("facebook/bart-base", TABLE_8, {
        metric: ("xsum", metric) for metric in ("rouge1", "rouge2", "rougeL")}, TABLE_3),
    "vtab": Family("google/vit-base-patch16-224-in21k", TABLE_10, {
        task: (task, "accuracy") for task in TABLE_10 if task != "caltech101"}, TABLE_4),
}
TABLE_7["sst2_heldout"] = TABLE_7["sst2"]  # evaluated on other data
FAMILY_OF = {task: name for name, family in FAMILIES.items() for task in family.tasks}


# ---- The settings of a run ----
def settings_of(words: Sequence[str]) -> dict[str, int | float | str]:
    """Settings by name, sorted, from words NAME=VALUE. ValueError for others, and for repeats."""
    found = {}
    for word in words:
        name, equals, text = word.partition("=")
        if name not in SETTINGS or not equals:
            raise ValueError(f"--set {word}: takes NAME=VALUE of {', '.join(SETTINGS)}")
        if name in found:
            raise ValueError(f"--set {word}: {name} is set twice")
        try:
            found[name] = SETTINGS[name](text)
        except ValueError as error:
            raise ValueError(f"--set {word}: {error}") from None
    return dict(sorted(found.items()))


def papers_run(config: Config) -> tuple[Recipe, int]:
    """The table's row with b and k of the nearest rank, and how many steps the paper's run has.

    If two ranks are equally near, the lower is taken."""
    task = FAMILIES[FAMILY_OF[config.task]].tasks[config.task]
    nearest = min(task.moves, key=lambda rank: abs(rank - config.rank))
    recipe = Recipe(*task.row, *task.moves[nearest])
    return recipe, recipe.epochs * math.ceil(task.examples / recipe.batch_size)


def recipe_of(config: Config) -> Recipe:
    """The table's row with the run's epochs and --set. Its phases are still the table's.

    Raises ValueError if a setting is unknown or out of its range.
    """
    recipe, _ = papers_run(config)
    epochs = recipe.epochs if config.epochs is None else config.epochs
    return replace(recipe, epochs=epochs, **settings_of(config.set))


def fit_phases(recipe: Recipe, config: Config, total_steps: int) -> Recipe:
    """The recipe with phases that have the same shares of this run as of the paper's run, rounded
    down; but a phase that --set names stays as it is."""
    _, papers_steps = papers_run(config)
    phases = {name: max(least, getattr(recipe, name) * total_steps // papers_steps)
              for name, least in (("warmup", 0), ("stabilize", 0), ("interval", 1))}
    return replace(recipe, **phases | settings_of(config.set))
