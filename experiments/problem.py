"""What an experiment is: a run as asked for, its recipe, its problem; devices and seeds."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version

import torch
from torch import Tensor, distributed, nn

import elalora

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROCESS, PROCESSES = 0, 1  # this one's number, and how many share every batch
if distributed.is_torchelastic_launched():  # by torchrun
    PROCESS, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@dataclass(frozen=True)
class Config:
    """One run, as the command line asks for it; results.json has it under "arguments"."""
    task: str
    method: str
    rank: int  # the mean over the adapted matrices
    seed: int
    model: str | None = None  # hub id or folder
    data_dir: str | None = None  # None: from the hub
    epochs: int | None = None  # None: the recipe's
    targets: list[str] = field(default_factory=lambda: [""])  # ends of names of matrices to adapt
    set: list[str] = field(default_factory=list)  # NAME=VALUE, in place of the recipe's
    holdout: bool = False  # evaluate on data that no result is reported on
    dtype: str | None = None  # of autocast
    processes: int = 1
    ranks: str | None = None  # file with the ranks that svd has in place of even ones


def check_arguments(had: dict, config: Config) -> None:
    """Raises ValueError if an existing run was asked for with other arguments."""
    for name, wanted in asdict(config).items():
        if had.get(name) != wanted:
            raise ValueError(f"it has {name} {had.get(name)}, not {wanted}")


CHOICES = dict(shape=(*elalora.SHAPES,), lr_scheduler=("linear", "cosine", "constant_with_warmup"))
MAY_BE_ZERO = ("warmup", "stabilize", "b", "gamma", "examples")


@dataclass(frozen=True)
class Recipe:
    """A row of Table 7, 8 or 10 at one rank, then what these tables leave open.

    Raises ValueError if a value is out of its range.
    """
    batch_size: int
    learning_rate: float
    epochs: int
    warmup: int  # steps before the search for ranks ...
    stabilize: int  # ... and after it
    interval: int  # steps between two adjustments
    b: int
    k: int
    paper: dict[str, float] = field(default_factory=dict)  # metric -> ElaLoRA's in the paper
    alpha: float = 16.0
    gamma: float = 0.1  # the weight of the orthogonality penalty
    beta1: float = 0.85
    beta2: float = 0.85
    lambda_rate: float = 1.0  # the learning rate of singular values / that of the rest
    init_ratio: float = 1.5  # AdaLoRA's first rank / its last
    shape: str = "cubic"
    lr_scheduler: str = "linear"
    examples: int = 0  # train on so many, at random but alike for every seed; 0: on all

    def __post_init__(self) -> None:
        for name in SETTINGS:
            value = getattr(self, name)
            if name in CHOICES:
                right, allowed = f"one of {', '.join(CHOICES[name])}", value in CHOICES[name]
            else:
                high = 1 if name in ("beta1", "beta2") else math.inf
                zero = name in MAY_BE_ZERO
                right = f"a number {'>=' if zero else '>'} 0" + " and < 1" * (high == 1)
                allowed = 0 < value < high or zero and value == 0
            if not allowed:
                raise ValueError(f"{name} must be {right}, got {value!r}")


def by_rank(ranks: Sequence[int], *numbers: float, b: Sequence[int], k: Sequence[int],
            paper: Sequence[dict[str, float]]) -> dict[int, Recipe]:
    """A row of a table that lists b, k and the paper's results by rank: rank -> recipe."""
    return {rank: Recipe(*numbers, *rest) for rank, *rest in zip(ranks, b, k, paper, strict=True)}


SETTINGS = [f.name for f in fields(Recipe) if f.name not in ("epochs", "paper")]


def recipe_of(by_rank: dict[int, Recipe], config: Config) -> Recipe:
    """The recipe of the nearest rank (of two as near, the lower), with the run's epochs and --set.

    With other epochs, warm-up, stabilization and interval keep their shares of the run. Raises
    ValueError if a setting is unknown or out of its range.
    """
    recipe = by_rank[min(by_rank, key=lambda rank: abs(rank - config.rank))]
    epochs = config.epochs or recipe.epochs
    phases = {name: max(1, getattr(recipe, name) * epochs // recipe.epochs)
              for name in ("warmup", "stabilize", "interval")}
    recipe = replace(recipe, epochs=epochs, **phases)
    for setting in config.set:
        name, equals, text = setting.partition("=")
        if name not in SETTINGS or not equals:
            raise ValueError(f"--set {setting}: takes NAME=VALUE of {', '.join(SETTINGS)}")
        kind = type(getattr(recipe, name))
        try:
            recipe = replace(recipe, **{name: kind(text)})
        except ValueError as error:
            raise ValueError(f"--set {setting}: takes a value of type {kind.__name__}; "
                             f"{error}") from None
    return recipe


@dataclass
class Problem:
    """What training needs to know of a task. A batch is what batches yields and loss takes."""
    model: nn.Module
    targets: list[str]  # modules to adapt
    heads: list[str]  # modules to train in full
    steps_per_epoch: int
    batches: Callable[[int], Iterable]  # this process's share of the batches of an epoch
    loss: Callable[[nn.Module, object], Tensor]  # the mean over a batch, a scalar
    evaluate: Callable[[bool], dict[str, float]]  # the metrics; True: after the last epoch
    floor: dict[str, float] = field(default_factory=dict)  # metrics of a guess without a model
    floor_name: str = "majority class"
    outputs: dict[str, list] = field(default_factory=dict)  # of every example evaluated last
    planted_ranks: dict[str, int] = field(default_factory=dict)  # module -> what is to be found
    note: str = ""  # printed below the metrics


def chosen(names: list[str], config: Config) -> list[str]:
    """The names that end as --targets asks. ValueError if nothing ends so."""
    for target in config.targets:
        if not any(name.endswith(target) for name in names):
            raise ValueError(f"--targets {target}: none of {', '.join(names[-6:])} ends so")
    return [name for name in names if name.endswith(tuple(config.targets))]


# ---- Seeds, precision, processes ----
def seed_of(config: Config, epoch: int) -> int:
    """Every epoch starts from its own random state, so a resumed run needs no other."""
    return 100_003 * config.seed + epoch


def autocast(config: Config) -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=config.dtype == "bfloat16")


def mean_of_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, bit for bit alike in each."""
    if PROCESSES > 1:
        distributed.all_reduce(x)
    return x / PROCESSES


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight, for every weight that a run changes."""
    return {name: w for name, w in model.named_parameters() if w.requires_grad}


def check_alike(model: nn.Module) -> None:
    """Compares the bits of every trained weight, summed up, between the processes."""
    if PROCESSES > 1:
        sums = [w.detach().view(torch.int32).sum() + w.numel() for w in trained(model).values()]
        own = torch.stack([*sums, *(-x for x in sums)])
        distributed.all_reduce(highest := own.clone(), distributed.ReduceOp.MAX)
        if not torch.equal(own, highest):  # equal, x is the highest, and -x, so x is the lowest too
            raise RuntimeError("the weights of the processes differ, they train different models")


def versions() -> dict[str, str]:
    """Of the packages and the hardware that decide a run's numbers."""
    hardware = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    return {package: version(package) for package in ("torch", "transformers", "peft")} | {
        "hardware": f"{hardware}, {torch.get_num_threads()} threads"}
