"""Algorithm 1's loop, with an evaluation and a checkpoint after every epoch."""

import csv
import importlib
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import tqdm
from torch import Tensor, nn

import elalora
from experiments import problem as shared
from experiments import report
from experiments.methods import Method
from experiments.problem import DEVICE, Problem, check_alike, mean_of_processes, seed_of, trained
from experiments.tables import FAMILY_OF, Config, Recipe

COLUMNS = ("step", "loss", "learning_rate", "gradient_norm", "ranks_moved")  # of log.csv
PHASES = ("warm-up", "search", "stabilization")


def make_problem(config: Config, recipe: Recipe) -> Problem:
    """By the module of the task's family."""
    family = importlib.import_module(f"experiments.{FAMILY_OF[config.task]}")
    return family.problem(config, recipe)


def rounded(values: Iterable, digits: int) -> list:
    """Floats with so many significant digits; what else there is stays as it is."""
    return [float(f"{x:.{digits}g}") if isinstance(x, float) else x for x in values]


def train_step(problem: Problem, batch: object, method: Method
               ) -> tuple[Tensor, Tensor, elalora.Adjustment | None]:
    """One iteration of Algorithm 1's loop. Returns its loss and its gradient norm, scalars, and
    its adjustment."""
    weights = [w for group in method.optimizer.param_groups for w in group["params"]]
    loss = problem.loss(problem.model, batch)
    loss.backward()
    penalty = method.penalty()
    if penalty is not None:
        penalty.backward()
    if shared.PROCESSES > 1:  # in one message; DistributedDataParallel cannot follow adjustments
        gradients = [w.grad for w in weights if w.grad is not None]
        mean = mean_of_processes(nn.utils.parameters_to_vector(gradients))
        nn.utils.vector_to_parameters(mean, gradients)
    norm = nn.utils.clip_grad_norm_(weights, 1.0)  # before clipping
    method.optimizer.step()
    method.scheduler.step()
    adjustment = method.step()  # scores, and where one is due, an adjustment
    method.optimizer.zero_grad()
    return loss.detach(), norm, adjustment


@contextmanager
def reporter(name: str | None, folder: Path, config: Config, steps: int
             ) -> Iterator[Callable[[list], object]]:
    """Yields what sends a row of the log to the library of that name, after so many steps."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        with SummaryWriter(folder, purge_step=steps + 1) as writer:
            yield lambda row: [writer.add_scalar(name, x, row[0])
                               for name, x in zip(COLUMNS[1:], row[1:])]
    elif name == "wandb":
        import wandb
        with wandb.init(project="elalora", id=folder.name, dir=folder, config=asdict(config),
                        resume="allow") as run:
            yield lambda row: run.log(dict(zip(COLUMNS, row)), step=row[0])
    else:
        yield lambda row: None


def train(problem: Problem, method: Method, config: Config, checkpoint: Path,
          report_to: str | None = None) -> dict:
    """Trains all epochs that the checkpoint does not have; returns the log.

    log.csv beside the checkpoint gets a row after every step. What a run that goes on had logged
    after its checkpoint is written anew.
    """
    log = dict(seconds=0.0, history=[], adjustments=[], scores={}, steps=[])
    if checkpoint.exists():
        log = restore(checkpoint, config, problem.model, method)
    started = time.time() - log["seconds"]
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    rows = checkpoint.with_name("log.csv")
    if shared.PROCESS > 0:
        rows, report_to = os.devnull, None
    with (tqdm.tqdm(desc=f"{config.task} {config.method} {config.seed}", initial=method.t,
                    total=method.schedule.total_steps, mininterval=1,
                    disable=shared.PROCESS > 0) as bar,
          reporter(report_to, checkpoint.parent, config, len(log["steps"])) as report_row,
          open(rows, "w", buffering=1) as file):  # of lines, which survive a kill
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *log["steps"]])

        def log_step(row: list) -> None:
            log["steps"].append(row)
            writer.writerow(row)
            report_row(row)

        for epoch in range(len(log["history"]) + 1, method.recipe.epochs + 1):
            if log["history"]:  # the epoch before: its checkpoint is written, or was loaded
                evaluate(problem, method, log)
            torch.manual_seed(seed_of(config, epoch) * shared.PROCESSES + shared.PROCESS)  # dropout
            train_loss = train_epoch(problem, method, epoch, log, log_step, bar)
            check_alike(problem.model)
            log["history"].append(dict(epoch=epoch, train_loss=train_loss))
            log["seconds"] = time.time() - started
            save(checkpoint, config, problem.model, method, log)
    evaluate(problem, method, log)
    log["seconds"] = time.time() - started
    return log


def train_epoch(problem: Problem, method: Method, epoch: int, log: dict,
                log_step: Callable[[list], None], bar: tqdm.tqdm) -> float:
    """Trains on all batches of an epoch, adds to the log; returns the mean of the losses."""
    problem.model.train()
    losses, schedule = [], method.schedule
    total = sum(row[-1] for row in log["steps"])  # of ranks moved so far
    for batch in problem.batches(epoch):
        rate = method.optimizer.param_groups[0]["lr"]
        loss, norm, adjustment = train_step(problem, batch, method)
        losses.append(loss.item())
        moved = sum(map(len, adjustment.pruned.values())) if adjustment else 0
        total += moved
        log_step([method.t, *rounded((losses[-1], rate, norm.item()), 6), moved])
        if not math.isfinite(losses[-1]):
            raise ValueError(f"loss {losses[-1]} at step {method.t}: try float32 or another seed")
        if adjustment:
            check_alike(problem.model)
            scores = {name: rounded(S, 3) for name, S in adjustment.scores.items()}
            log["adjustments"].append(asdict(adjustment) | dict(scores=scores))
        if method.t in (schedule.warmup_steps, schedule.search_end):
            scores = itertools.chain(*(S.tolist() for S in method.importance().values()))
            log["scores"][method.t] = rounded(scores, 3)
        phase = PHASES[(method.t > schedule.warmup_steps) + (method.t > schedule.search_end)]
        bar.set_postfix(loss=f"{losses[-1]:.3f}", phase=phase, moved=total, refresh=False)
        bar.update()
    return float(mean_of_processes(torch.tensor(statistics.fmean(losses), device=DEVICE)))


def evaluate(problem: Problem, method: Method, log: dict) -> None:
    """Adds the metrics to the last epoch of the log."""
    problem.model.eval()
    epoch = log["history"][-1]
    epoch["metrics"] = problem.evaluate(epoch["epoch"] == method.recipe.epochs)


# ---- Checkpoints ----
def check_same(path: Path, had: dict, wanted: Config | Recipe) -> None:
    """Raises ValueError if the run in a file has other arguments, or another recipe."""
    for name, value in asdict(wanted).items():
        if had.get(name) != value:
            raise ValueError(f"{path} is of a run that has {name} {had.get(name)}, not {value}: "
                             "delete it or take another --output-dir")


def save(path: Path, config: Config, model: nn.Module, method: Method, log: dict) -> None:
    """Writes the state of a run after an epoch."""
    state = dict(
        arguments=asdict(config), recipe=asdict(method.recipe), trained=trained(model),
        optimizer=method.optimizer.state_dict(), scheduler=method.scheduler.state_dict(),
        method=method.state_dict(), log=log)
    if shared.PROCESS == 0:
        report.write(path, lambda temporary: torch.save(state, temporary))


def restore(path: Path, config: Config, model: nn.Module, method: Method) -> dict:
    """Loads a checkpoint, returns its log. ValueError if it is of another run."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    check_same(path, saved["arguments"], config)
    check_same(path, saved["recipe"], method.recipe)  # with less data it has other phases
    model.load_state_dict(saved["trained"], strict=False)  # before the optimizer: ranks
    method.optimizer.load_state_dict(saved["optimizer"])
    method.scheduler.load_state_dict(saved["scheduler"])
    method.load_state_dict(saved["method"])
    return saved["log"]
