"""For a lecture: three 16 x 16 matrices with planted ranks 0, 2 and 7, and every move of a rank.

    python toy.py    # beside elalora.py; needs matplotlib, writes toy.png within a minute

Each matrix begins at rank 3. b = k = 1: an adjustment takes a rank from one matrix, the one whose
lowest score is the lowest among those above rank 1, and gives it to the one whose lowest score is
the highest.
"""

import torch
from matplotlib import pyplot
from torch import nn

from elalora import RankAllocator, RankSchedule, inject, orthogonality_penalty

PLANTED = {"A": 0, "B": 2, "C": 7}

torch.manual_seed(0)
model = nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in PLANTED})
target = {}
for name, rank in PLANTED.items():
    delta = torch.randn(16, rank) @ torch.randn(rank, 16) / 16  # of the planted rank
    target[name] = model[name].weight.detach() + delta  # (16, 16)
inject(model, [*PLANTED], rank=3)
weights = [w for w in model.parameters() if w.requires_grad]
optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
schedule = RankSchedule(
    total_steps=400, warmup_steps=50, stabilize_steps=100, adjust_interval=20, b=1)
allocator = RankAllocator(model, optimizer, schedule, k=1)
figure, panels = pyplot.subplots(1, 3, figsize=(12, 4), sharey=True, layout="constrained")

for step in range(1, schedule.total_steps + 1):
    x = torch.randn(32, 16)
    errors = [(model[name](x) - x @ target[name].T).square().mean() for name in PLANTED]
    (sum(errors) + 0.1 * orthogonality_penalty(model)).backward()
    optimizer.step()
    adjustment = allocator.step()
    optimizer.zero_grad()
    if adjustment is None:
        continue
    pruned, grown = adjustment.pruned, adjustment.expanded
    for panel, (name, S) in zip(panels, adjustment.scores.items()):
        candidate = min(S)  # the only one of its matrix, since k = 1
        print(f"scores of {name}:", *(f"{s:.1e}" for s in S), f"(candidate: {candidate:.1e})")
        panel.semilogy([step] * len(S), S, "o", color="0.75")
        panel.annotate(len(S), (step, 2 * max(S)), ha="center")
        look = "rX" if name in pruned else "g^" if name in grown else "ko"
        panel.semilogy(step, candidate, look)
    print(f"step {step}: pruned {pruned}, grown {grown} -> {allocator.ranks()}\n")

for panel, (name, rank) in zip(panels, allocator.ranks().items()):
    panel.set(title=f"{name}: planted rank {PLANTED[name]}, ends at {rank}",
              xlabel="step", ylabel="score $S_i$")
for look, label in [("ko", "candidate"), ("rX", "pruned"), ("g^", "grows its matrix")]:
    panels[0].plot([], [], look, label=label)
panels[0].legend(title="A dot is a rank. Above: how many")
figure.savefig("toy.png", dpi=120)
