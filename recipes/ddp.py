"""For a loop of your own under DistributedDataParallel, one model on every process.

    torchrun --nproc-per-node 2 ddp.py

Take train(), and put your model, loss and data in place of those below it.
"""

import os

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from elalora import RankAllocator, RankSchedule, inject, orthogonality_penalty


def train(model: nn.Module, batches: list, schedule: RankSchedule) -> RankAllocator:
    """All processes must begin with the same adapters, and each has its own part of a batch."""
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    allocator = RankAllocator(model, optimizer, schedule, k=1)  # of the model itself
    wrapped = DistributedDataParallel(model)
    for x, y in batches:
        loss = nn.functional.mse_loss(wrapped(x), y) + 0.1 * orthogonality_penalty(model)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if allocator.step():  # scores and seed are the same everywhere, so the ranks are
            wrapped = DistributedDataParallel(model)  # the old one knows the old shapes
        optimizer.zero_grad()
    return allocator


if __name__ == "__main__":
    distributed.init_process_group()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    process, processes = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)  # the same everywhere
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    inject(model, ["0", "2"], rank=2).to(device)
    own_part = torch.randn(60, 16, 16)[:, process::processes].to(device)  # of 60 batches of 16
    schedule = RankSchedule(
        total_steps=60, warmup_steps=10, stabilize_steps=15, adjust_interval=2, b=1)
    allocator = train(model, [(x, x.flip(-1)) for x in own_part], schedule)
    if process == 0:  # which may save or export alone
        print(f"{allocator.t} steps, ranks {allocator.ranks()}")
    distributed.destroy_process_group()
