"""The problem whose answer is known: ranks planted in random matrices, to be found again.

There are 72 frozen random matrices W0, with the names of DeBERTa's. Each has to become W0 + Delta*,
where Delta* has a known rank. With 4 ranks per matrix to spend, Eckart and Young give the least
residual |W - W0 - Delta*|^2 / |Delta*|^2 of any even allocation, and of the best one.
"""

from collections.abc import Iterable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from experiments import problem as shared
from experiments.problem import DEVICE, Config, Problem, Recipe, chosen, seed_of

RECIPES = {"planted": {4: Recipe(32, 2e-2, 10, 100, 300, 20, 6, 1)}}
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
    even, rest = sum(s[rank:].sum() for s in adapted), sum(s.sum() for s in squares.values())
    return float((even + rest) / total), float((best + rest) / total)


def problem(config: Config, recipe: Recipe) -> Problem:
    """A regression for every matrix, on Gaussian inputs. ValueError if --rank leaves no choice."""
    if not 1 < config.rank < max(PLANTED.values()):
        raise ValueError(f"--rank {config.rank}: 2 to 11 leave a choice of where to put the ranks")
    if recipe.examples:
        raise ValueError("--set examples=...: planted ranks have no end of examples")
    targets = chosen([*PLANTED], config)
    even, best = bounds(config.rank, targets)
    model, deltas = nn.Module(), []
    for name, r in PLANTED.items():
        (*path, last), parent = name.split("."), model
        for component in path:
            parent = parent._modules.setdefault(component, nn.Module())
        parent.add_module(last, nn.Linear(WIDTH, WIDTH, bias=False))
        U, V = (nn.init.orthogonal_(torch.empty(WIDTH, max(r, 1)))[:, :r] for _ in range(2))
        deltas.append(U * singular_values(r) @ V.T)
    model.to(DEVICE)
    delta = torch.stack(deltas).to(DEVICE)  # (72, 64, 64)
    target = delta + torch.stack([model.get_submodule(name).weight.data for name in PLANTED])

    def batches(epoch: int) -> Iterable[dict]:
        generator = torch.Generator().manual_seed(seed_of(config, epoch))
        for _ in range(STEPS_PER_EPOCH):
            x = torch.randn(recipe.batch_size, WIDTH, generator=generator)
            yield dict(x=x[shared.PROCESS :: shared.PROCESSES].to(DEVICE))

    def forward(x: Tensor) -> SimpleNamespace:
        outputs = torch.stack([model.get_submodule(name)(x) for name in PLANTED])
        return SimpleNamespace(loss=(outputs - x @ target.mT).square().sum(dim=-1).mean())

    @torch.no_grad()
    def evaluate(last: bool) -> dict[str, float]:
        identity = torch.eye(WIDTH, device=DEVICE)  # a layer's output is (W0 + its update)'
        learned = torch.stack([model.get_submodule(name)(identity).T for name in PLANTED])
        residual = float((learned - target).square().sum() / delta.square().sum())
        gap = even - best
        return dict(residual=residual, even_rank_bound=even, best_possible=best) | (
            dict(gap_closed=(even - residual) / gap) if gap > 1e-6 else {})

    model.forward = forward
    return Problem(model, targets, [], STEPS_PER_EPOCH, batches,
                   lambda model, batch: model(**batch).loss, evaluate,
                   planted_ranks=PLANTED,
                   note="(of the gap between those two; best_possible gives every matrix a rank)")
