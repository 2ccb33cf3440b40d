"""For a loop of your own with Accelerate: accumulation, mixed precision, processes, resuming.

    accelerate launch accelerate_loop.py    # or python accelerate_loop.py

Take train() and leave_out_base(), and put your model, loss and data in place of those below them.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from elalora import (
    RankAllocator, RankSchedule, adapter_state_dict, inject, load_adapter_state_dict,
    orthogonality_penalty)


def leave_out_base(accelerator: Accelerator, model: nn.Module) -> None:
    """Makes save_state() and load_state() write and read what is trained, and not the base."""
    def save(models: list, weights: list, folder: str) -> None:
        weights[:] = [adapter_state_dict(model)]

    def load(models: list, folder: str) -> None:
        models.clear()
        load_adapter_state_dict(model, load_file(Path(folder, "model.safetensors")))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def train(accelerator: Accelerator, model: nn.Module, loader: DataLoader, schedule: RankSchedule,
          folder: str, save_every: int, resume: bool = False) -> RankAllocator:
    """One epoch of an injected model. For a shuffled loader, give the Accelerator
    DataLoaderConfiguration(use_seedable_sampler=True), or it does not resume where it stopped."""
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    allocator = RankAllocator(model, optimizer, schedule, k=1)  # of the model itself
    leave_out_base(accelerator, model)
    if resume:
        accelerator.load_state(folder)  # with the optimizer it restores the search
        micro_batches = allocator.t * accelerator.gradient_accumulation_steps
        loader = accelerator.skip_first_batches(loader, micro_batches)
    for x, y in loader:
        with accelerator.accumulate(wrapped):
            loss = nn.functional.mse_loss(wrapped(x), y) + 0.1 * orthogonality_penalty(model)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(weights, 1.0)
            optimizer.step()  # does nothing until the last micro-batch; nor may the allocator
            if accelerator.sync_gradients and allocator.step():
                if isinstance(wrapped, DistributedDataParallel):  # its buckets have the old shapes
                    wrapped.__init__(model, wrapped.device_ids, init_sync=False)
            optimizer.zero_grad()
        if accelerator.sync_gradients and allocator.t % save_every == 0:
            accelerator.save_state(folder)
    return allocator


if __name__ == "__main__":
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    inject(model, ["0", "2"], rank=2)
    x = torch.randn(960, 16)  # 60 steps of two micro-batches of 8 rows, on all processes together
    loader = DataLoader(TensorDataset(x, x.flip(-1)), batch_size=8 // accelerator.num_processes)
    schedule = RankSchedule(
        total_steps=60, warmup_steps=10, stabilize_steps=15, adjust_interval=2, b=1)
    allocator = train(accelerator, model, loader, schedule, "checkpoint", save_every=30)
    accelerator.print(f"{allocator.t} steps, ranks {allocator.ranks()}; written: checkpoint/")
