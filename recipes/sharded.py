"""For a model that outgrew one GPU: under FSDP2 the frozen base is sharded, what is trained is not.

Take this file, and start your script with torchrun. Every process first loads the whole base on
the CPU.

    torch.distributed.init_process_group()  # and torch.cuda.set_device(LOCAL_RANK)
    model = inject(model, ["q_proj", "v_proj"], rank=8)
    weights = shard(model, model.model.layers)
    optimizer = torch.optim.AdamW(weights, lr=5e-4, weight_decay=0.0)
    allocator = RankAllocator(model, optimizer, schedule, k=1)
    for batch in loader:  # this process's part: each part's mean loss counts the same
        loss = model(**batch).loss + 0.1 * orthogonality_penalty(model)
        loss.backward()
        average_gradients(weights)  # before clipping; without it processes drift apart, in silence
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()

Every process then has the same adapters and moves the same ranks. adapter_state_dict(), loading,
resuming and export_peft() work as ever, and one process may save alone; merge_sharded() takes the
place of merge(). All processes must run the model equally often, also to evaluate it.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import distribute_tensor

from elalora import SVDLinear


def shard(model: nn.Module, blocks: Iterable[nn.Module], **options) -> list[Tensor]:
    """Shards what inject() froze, block by block; returns what is trained, as process 0 has it.

    Call it after inject() and before the optimizer is made. The options are fully_shard's. With an
    mp_policy, cast the modules_to_save to its param_dtype first, since they stay as they are.
    """
    trained = [w for w in model.parameters() if w.requires_grad]
    for module in (*blocks, model):
        fully_shard(module, ignored_params=set(trained), **options)
    device = next(w.device for w in model.parameters() if not w.requires_grad)
    for w in trained:
        w.data = w.data.to(device)  # fully_shard moved only what it shards
        distributed.broadcast(w.data, 0)
    return trained


def average_gradients(weights: Sequence[Tensor]) -> None:
    """Gives every process the mean gradient, in float32 and by one all_reduce.

    A gradient that is None on some processes counts as 0 there; None on all of them stays None.
    """
    gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
    given = torch.tensor([w.grad is not None for w in weights], device=weights[0].device)
    flat = torch.cat([part.flatten().float() for part in (*gradients, given)])
    distributed.all_reduce(flat.div_(distributed.get_world_size()))
    *means, given = flat.split([*(w.numel() for w in weights), len(weights)])
    for w, mean, share in zip(weights, means, given.tolist()):
        w.grad = mean.view_as(w).to(w.dtype) if share else None


@torch.no_grad()
def merge_sharded(model: nn.Module) -> nn.Module:
    """Adds every update to its sharded base weight, puts the nn.Linear back; returns the model.

    Then torch.distributed.checkpoint.state_dict.get_model_state_dict() can gather all weights.
    Raises ValueError, before any change, if such a weight is tied to another module's.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass the root's weights are whole
    layers = [module for module in model.modules() if isinstance(module, SVDLinear)]
    held = [id(w) for module in model.modules() for w in module.parameters(recurse=False)]
    if any(held.count(id(layer.base_layer.weight)) > 1 for layer in layers):
        raise ValueError("an adapted weight is tied to another; untie it before shard()")
    for layer in layers:
        w, delta = layer.base_layer.weight, layer.delta_weight()
        # Every process has delta, and takes its part of it without sending anything
        w.add_(distribute_tensor(delta, w.device_mesh, w.placements, src_data_rank=None))
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, SVDLinear):
            model.set_submodule(name, module.base_layer)
    return model
