"""For PyTorch Lightning (2.6): accumulation, clipping, bf16, several processes, resuming.

    python lightning_module.py

Take Adapted, and put your model, loss and data in place of those here. Not the hooks
on_train_batch_end and on_before_zero_grad: they count micro-batches, or come after the checkpoint.
"""

import lightning
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from elalora import (
    RankAllocator, RankSchedule, adapter_state_dict, inject, orthogonality_penalty)


class Adapted(lightning.LightningModule):
    """An injected model. A checkpoint holds what is trained, not the base.

    To load one: Adapted.load_from_checkpoint(path, model=inject(...), schedule=schedule).
    """

    def __init__(self, model: nn.Module, schedule: RankSchedule):
        super().__init__()
        self.model, self.schedule = model, schedule

    def training_step(self, batch: list, index: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.model(x), y) + 0.1 * orthogonality_penalty(self.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        weights = [w for w in self.model.parameters() if w.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
        self.allocator = RankAllocator(self.model, optimizer, self.schedule, k=1)
        return optimizer  # its state, which holds the search, is in Lightning's checkpoints

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        wrapped = self.trainer.strategy.model
        if self.allocator.step() and isinstance(wrapped, DistributedDataParallel):
            wrapped.__init__(  # its buckets have the old shapes
                wrapped.module, wrapped.device_ids, init_sync=False,
                find_unused_parameters=wrapped.find_unused_parameters)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        trained = adapter_state_dict(self.model)
        checkpoint["state_dict"] = {f"model.{key}": x for key, x in trained.items()}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        trained = {f"model.{key}" for key in adapter_state_dict(self.model)}
        base = {key: x for key, x in self.state_dict().items() if key not in trained}
        checkpoint["state_dict"] = base | checkpoint["state_dict"]


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    inject(model, ["0", "2"], rank=2)
    x = torch.randn(960, 16)  # 60 steps of two micro-batches of 8 rows
    loader = DataLoader(TensorDataset(x, x.flip(-1)), batch_size=8)
    schedule = RankSchedule(
        total_steps=60, warmup_steps=10, stabilize_steps=15, adjust_interval=2, b=1)
    module = Adapted(model, schedule)
    trainer = lightning.Trainer(
        max_steps=schedule.total_steps, accumulate_grad_batches=2, gradient_clip_val=1.0,
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer.fit(module, loader)  # or trainer.fit(module, loader, ckpt_path=...)
    print(f"{module.allocator.t} steps, ranks {module.allocator.ranks()}; written: checkpoints/")
