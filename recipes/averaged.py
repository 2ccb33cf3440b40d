"""For averaged weights (EMA): a copy of the model that follows its ranks.

    python averaged.py

Take follow(), and call it as the loop below does. Then evaluate, merge() or export_peft() the model
averaged.module. To resume, save adapter_state_dict(averaged.module) and averaged.n_averaged beside
what you save of the model.
"""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from elalora import (
    Adjustment, RankAllocator, RankSchedule, inject, orthogonality_penalty, resize)


@torch.no_grad()
def follow(averaged: nn.Module, model: nn.Module, adjustment: Adjustment) -> None:
    """Prunes and adds the same ranks in the copy. New ones begin as they are in the model."""
    for name in adjustment.pruned.keys() | adjustment.expanded.keys():
        copy, layer = averaged.get_submodule(name), model.get_submodule(name)
        kept = [i for i in range(copy.rank) if i not in adjustment.pruned.get(name, [])]
        resize(copy, kept, layer.rank - len(kept), torch.Generator(), {})
        copy.P[:, len(kept) :] = layer.P[:, len(kept) :]  # (d_out, new)
        copy.Q[len(kept) :] = layer.Q[len(kept) :]  # (new, d_in)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    inject(model, ["0", "2"], rank=2)
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    schedule = RankSchedule(
        total_steps=60, warmup_steps=10, stabilize_steps=15, adjust_interval=2, b=1)
    allocator = RankAllocator(model, optimizer, schedule, k=1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay=0.9))
    for x in torch.randn(60, 16, 16):  # 60 batches of 16
        loss = nn.functional.mse_loss(model(x), x.flip(-1)) + 0.1 * orthogonality_penalty(model)
        loss.backward()
        optimizer.step()
        adjustment = allocator.step()
        if adjustment:
            follow(averaged.module, model, adjustment)
        averaged.update_parameters(model)
        optimizer.zero_grad()
    print(f"{allocator.t} steps, ranks {allocator.ranks()}")
