"""The problem whose answer is known: ranks planted in random matrices, to be found again.

There are 72 frozen random matrices W0, with the names of DeBERTa's. Each has to become W0 + Delta*,
where Delta* has a known rank. With 4 ranks per matrix to spend, Eckart and Young give the least
residual |W - W0 - Delta*|^2 / |Delta*|^2 of any even allocation, and of the best one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from experiments import problem as shared
from experiments.problem import DEVICE, Problem, chosen, seed_of
from experiments.tables import Config, Recipe

WIDTH, STEPS_PER_EPOCH = 64, 100
KINDS = {  # of a DeBERTa layer's matrices, and the rank that is planted in each
    "attention.self.query_proj": 2, "attention.self.key_proj": 2, "attention.self.value_proj": 4,
    "attention.output.dense": 4, "intermediate.dense": 12, "output.dense": 0,
}
PLANTED = {f"deberta.encoder.layer.{i}.{kind}": r for i in range(12) for kind, r in KINDS.items()}


def singular_values(rank: int) -> Tensor:
    """The singular values of Delta*, (rank,)."""
    return torch.linspace(1, 0.5, rank)


def bounds(rank: int, names: Iterable[str]) -> tuple[float, float]:
    """The least residuals (Eckart-Young) if only the matrices of these names are adapted: with
    `rank` in each of them, and with the best ranks >= 1 of that sum."""
    squares = {name: singular_values(r).square() for name, r in PLANTED.items()}
    total = sum(s.sum() for s in squares.values())
    adapted = [squares.pop(name) for name in names]
    beyond_first = torch.cat([s[1:] for s in adapted]).sort(descending=True).values
    best = beyond_first[(rank - 1) * len(adapted) :].sum()
    even = sum(s[rank:].sum() for s in adapted)
    rest = sum(s.sum() for s in squares.values())
    return float((even + rest) / total), float((best + rest) / total)


def plant() -> tuple[nn.Module, Tensor]:
    """A model of the matrices W0, and all Delta*, (matrices, WIDTH, WIDTH)."""
    model, deltas = nn.Module(), []
    for name, r in PLANTED.items():
        *path, last = name.split(".")
        parent = model
        for component in path:
            parent = parent._modules.setdefault(component, nn.Module())
        parent.add_module(last, nn.Linear(WIDTH, WIDTH, bias=False))
        U = nn.init.orthogonal_(torch.empty(WIDTH, max(r, 1)))[:, :r]  # (WIDTH, r)
        V = nn.init.orthogonal_(torch.empty(WIDTH, max(r, 1)))[:, :r]
        deltas.append(U * singular_values(r) @ V.T)
    return model.to(DEVICE), torch.stack(deltas).to(DEVICE)


def problem(config: Config, recipe: Recipe) -> Problem:
    """A regression for every matrix, on Gaussian inputs. ValueError if --rank leaves no choice."""
    if not 1 < config.rank < max(PLANTED.values()):
        raise ValueError(f"--rank {config.rank}: 2 to 11 leave a choice of where to put the ranks")
    if recipe.examples:
        raise ValueError("--set examples=...: planted ranks have no end of examples")
    if DEVICE == "cpu":
        torch.set_num_threads(1)  # on matrices so small, several threads wait more than they work
    targets = chosen([*PLANTED], config)
    even, best = bounds(config.rank, targets)
    model, delta = plant()
    target = delta + torch.stack([model.get_submodule(name).weight.data for name in PLANTED])

    def batches(epoch: int) -> Iterable[Tensor]:
        generator = torch.Generator().manual_seed(seed_of(config, epoch))
        for _ in range(STEPS_PER_EPOCH):
            x = torch.randn(recipe.batch_size, WIDTH, generator=generator)
            yield x[shared.PROCESS :: shared.PROCESSES].to(DEVICE)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        outputs = torch.stack([model.get_submodule(name)(x) for name in PLANTED])  # (72, n, WIDTH)
        return (outputs - x @ target.mT).square().sum(dim=-1).mean()

    @torch.no_grad()
    def evaluate(last: bool) -> dict[str, float]:
        identity = torch.eye(WIDTH, device=DEVICE)  # a layer's output is (W0 + its update)'
        learned = torch.stack([model.get_submodule(name)(identity).T for name in PLANTED])
        residual = float((learned - target).square().sum() / delta.square().sum())
        found = dict(residual=residual, even_rank_bound=even, best_possible=best)
        gap = even - best
        return found | dict(gap_closed=(even - residual) / gap) if gap > 1e-6 else found

    def note(metrics: dict[str, float]) -> str:
        if "gap_closed" not in metrics:
            return ""
        return (f"It closed {metrics['gap_closed']:z.0%} of the gap between the best even ranks "
                f"(residual {even:.3f}) and the best ranks of at least 1 ({best:.3f}): ranks.png "
                "shows where ranks were planted and found.")

    return Problem(model, targets, [], STEPS_PER_EPOCH, batches, loss, evaluate,
                   planted_ranks=PLANTED, note=note)
