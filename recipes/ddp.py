"""For a loop of your own under DistributedDataParallel, one model on every process.

    torchrun --nproc-per-node 2 ddp.py

Take train(), and put your model, loss and data in place of those of main().
"""

import os

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from elalora import RankAllocator, RankSchedule, export_peft, inject, orthogonality_penalty


def train(model: nn.Module, batches: list, schedule: RankSchedule) -> RankAllocator:
    """All processes must begin with the same adapters, and each has its own part of a batch."""
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    allocator = RankAllocator(model, optimizer, schedule, k=1)  # of the model itself
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, devices)
    for x, y in batches:
        loss = nn.functional.mse_loss(wrapped(x), y) + 0.1 * orthogonality_penalty(model)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if allocator.step():  # scores and seed are the same everywhere, so the ranks are
            wrapped = DistributedDataParallel(model, devices)  # the old one knows the old shapes
        optimizer.zero_grad()
    return allocator


def main() -> None:
    gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    process, processes = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)  # the same everywhere
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    x = torch.randn(60, 16, 16)  # 60 batches of 16
    y = model(x).detach() + torch.tanh(x @ torch.randn(16, 2) @ torch.randn(2, 16))
    inject(model, ["0", "2"], rank=2).to(device)
    batches = [(a[process::processes].to(device), b[process::processes].to(device))
               for a, b in zip(x, y)]
    schedule = RankSchedule(total_steps=60, warmup_steps=10, stabilize_steps=15,
                            adjust_interval=2, b=1)
    allocator = train(model, batches, schedule)
    if process == 0:
        export_peft(model, "adapter", base_model_name="yours")
        print(f"{allocator.t} steps, ranks {allocator.ranks()}; written: adapter/")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
