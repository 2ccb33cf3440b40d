"""For torch.compile (2.13): a model that is compiled once, while its ranks move.

    python compiled.py

Call compile_adapted() after inject(), and give the RankAllocator the model, not what it returns.
Without it torch compiles anew at every adjustment, and gives up after eight. Dynamic sizes begin at
2, so with min_rank=1 it compiles again for nearly every matrix that falls to rank 1. CUDA graphs
(mode="reduce-overhead", or captured by hand) have fixed shapes: begin with them after the search.
"""

import torch
from torch import nn

from elalora import (
    RANK_DIM, RankAllocator, RankSchedule, SVDLinear, inject, orthogonality_penalty)


def compile_adapted(model: nn.Module, **options) -> nn.Module:
    """torch.compile(model, **options), which is told which dimensions count ranks."""
    torch._dynamo.config.force_parameter_static_shapes = False
    for layer in model.modules():
        if isinstance(layer, SVDLinear):
            for factor, dim in RANK_DIM.items():
                torch._dynamo.maybe_mark_dynamic(getattr(layer, factor), dim)
    return torch.compile(model, **options)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    inject(model, [str(i) for i in range(6)], rank=3)  # so that some can move above the least of 2
    compiled = compile_adapted(model)
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    schedule = RankSchedule(
        total_steps=60, warmup_steps=10, stabilize_steps=15, adjust_interval=2, b=2)
    allocator = RankAllocator(model, optimizer, schedule, k=1, min_rank=2)
    for x in torch.randn(60, 16, 16):  # 60 batches of 16
        loss = nn.functional.mse_loss(compiled(x), x.flip(-1)) + 0.1 * orthogonality_penalty(model)
        loss.backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"{allocator.t} steps, compiled {graphs} time(s), ranks {allocator.ranks()}")
