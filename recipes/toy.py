"""For a lecture: three 16 x 16 matrices with planted ranks 0, 2 and 7, and every move of a rank.

    python toy.py    # ten seconds; needs matplotlib, writes toy.png

Each matrix begins at rank 3. b = k = 1: an adjustment takes a rank from one matrix, the one whose
lowest score is the lowest, and gives it to the one whose lowest score is the highest.
"""

import torch
from matplotlib import pyplot
from torch import nn

from elalora import Adjustment, RankAllocator, RankSchedule, inject, orthogonality_penalty

PLANTED = {"A": 0, "B": 2, "C": 7}
SCHEDULE = RankSchedule(
    total_steps=400, warmup_steps=50, stabilize_steps=100, adjust_interval=20, b=1)


def train() -> list[tuple[Adjustment, dict[str, int]]]:
    """Learns y = (W0 + Delta*) x of each matrix; returns the adjustments, and the ranks after."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in PLANTED})
    target = {}
    for name, rank in PLANTED.items():
        delta = torch.randn(16, rank) @ torch.randn(rank, 16) / 16  # of the planted rank
        target[name] = model[name].weight.detach() + delta  # (16, 16)
    inject(model, [*PLANTED], rank=3)
    optimizer = torch.optim.AdamW(
        (w for w in model.parameters() if w.requires_grad), lr=1e-2, weight_decay=0.0)
    allocator = RankAllocator(model, optimizer, SCHEDULE, k=1)
    moves = []
    for _ in range(SCHEDULE.total_steps):
        x = torch.randn(32, 16)
        errors = [(model[name](x) - x @ target[name].T).square().mean() for name in PLANTED]
        (sum(errors) + 0.1 * orthogonality_penalty(model)).backward()
        optimizer.step()
        adjustment = allocator.step()
        if adjustment:
            moves.append((adjustment, allocator.ranks()))
        optimizer.zero_grad()
    return moves


def tell(adjustment: Adjustment, ranks: dict[str, int]) -> None:
    print(f"step {adjustment.step}")
    for name, S in adjustment.scores.items():
        marks = ["*" if score == min(S) else " " for score in S]  # the candidate, since k = 1
        print(f"  scores of {name}: ", *(f"{s:9.1e}{mark}" for s, mark in zip(S, marks)))
    print(f"  * candidates; pruned {adjustment.pruned}, grown {adjustment.expanded} -> {ranks}")


def draw(moves: list[tuple[Adjustment, dict[str, int]]]) -> None:
    figure, axes = pyplot.subplots(2, 3, figsize=(10, 5.5), sharex=True, sharey="row",
                                   layout="constrained", height_ratios=[3, 2])
    end = SCHEDULE.total_steps
    for (name, planted), (above, below) in zip(PLANTED.items(), axes.T):
        for adjustment, _ in moves:
            S, t = adjustment.scores[name], adjustment.step
            above.semilogy([t] * len(S), S, "o", color="0.75")
            above.semilogy(t, min(S), "o", color="black")
            if name in adjustment.expanded:
                above.semilogy(t, min(S), "^", color="tab:green", markersize=10)
            if name in adjustment.pruned:
                above.semilogy(t, min(S), "X", color="tab:red", markersize=10)
        steps = [0, *(adjustment.step for adjustment, _ in moves), end]
        rank = [3, *(ranks[name] for _, ranks in moves), moves[-1][1][name]]
        below.axhline(planted, color="tab:blue", linestyle=":", label="planted")
        below.step(steps, rank, where="post", color="black", label="present")
        above.set_title(f"{name}: planted rank {planted}")
        below.set_xlabel("step")
        for panel in (above, below):
            panel.axvspan(0, SCHEDULE.warmup_steps, color="0.93")
            panel.axvspan(SCHEDULE.search_end, end, color="0.93", label="ranks stay")
    axes[0, 0].set_ylabel("score $S_i$ of every rank")
    axes[1, 0].set_ylabel("rank")
    styles = {"rank": ("0.75", "o"), "candidate: lowest of its matrix": ("black", "o"),
              "pruned": ("tab:red", "X"), "grows its matrix": ("tab:green", "^")}
    for label, (color, marker) in styles.items():
        axes[0, 2].plot([], [], marker, color=color, label=label)
    axes[0, 2].legend(loc="lower center")
    axes[1, 0].legend(loc="upper center")
    figure.savefig("toy.png", dpi=120)


if __name__ == "__main__":
    history = train()
    for move in history:
        tell(*move)
    draw(history)
