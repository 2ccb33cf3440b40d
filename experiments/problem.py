"""What an experiment is: its problem, the device, seeds, and the processes that share it."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, distributed, nn

from experiments.tables import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROCESS, PROCESSES = 0, 1  # this one's number, and how many share every batch
if distributed.is_torchelastic_launched():  # by torchrun
    PROCESS, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


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
    note: Callable[[dict[str, float]], str] = lambda metrics: ""  # a sentence on the last metrics


def chosen(names: list[str], config: Config) -> list[str]:
    """The names that end as --targets asks. ValueError if nothing ends so."""
    for target in config.targets:
        if not any(name.endswith(target) for name in names):
            raise ValueError(f"--targets {target}: none of {', '.join(names[-6:])} ends so")
    return [name for name in names if name.endswith(tuple(config.targets))]


def seed_of(config: Config, epoch: int) -> int:
    """Every epoch starts from its own random state, so a resumed run needs no other."""
    return 100_003 * config.seed + epoch


def autocast(config: Config) -> torch.autocast:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=config.dtype == "bfloat16")


def best_dtype() -> str:
    """Of autocast: bfloat16 on a GPU that computes in it."""
    fast = DEVICE == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight, for every weight that a run changes."""
    return {name: w for name, w in model.named_parameters() if w.requires_grad}


def mean_of_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, bit for bit alike in each."""
    if PROCESSES > 1:
        distributed.all_reduce(x)
    return x / PROCESSES


def check_alike(model: nn.Module) -> None:
    """Raises RuntimeError if the trained weights of two processes differ in a bit, by sums."""
    if PROCESSES > 1:
        bits = [w.detach().view(torch.int32) for w in trained(model).values()]
        own, found = [(x.shape, x.sum().item()) for x in bits], [None] * PROCESSES
        distributed.all_gather_object(found, own)
        if any(sums != own for sums in found):
            raise RuntimeError("the weights of the processes differ, they train different models")


def versions() -> dict[str, str]:
    """Of the packages and the hardware that decide a run's numbers."""
    hardware = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    packages = {package: version(package) for package in ("torch", "transformers", "peft")}
    return packages | {"hardware": f"{hardware}, {torch.get_num_threads()} threads"}


def commit() -> str | None:
    """The git commit of this code, "+changes" if files differ from it; None without git."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or not shutil.which("git"):  # git looks in the folders above
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return found.stdout.strip() or None
