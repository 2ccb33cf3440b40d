"""Hugging Face's Trainer (transformers 5.23) for a model after inject(), to copy beside elalora.py.

    inject(model, ["q_proj", "v_proj"], rank=8)
    trainer = ElaLoRATrainer(model, arguments, train_dataset=dataset)
    trainer.train()  # or trainer.train(resume_from_checkpoint=True)
    export_peft(trainer.model, "adapter", base_model_name="google/gemma-3-270m")

It runs in one process, or in several under torchrun. Loss and gradients are the Trainer's own, plus
the orthogonality penalty once per optimizer step. Ranks stay during the first 15% of the steps and
the last 25%: edit create_scheduler() to choose other settings. A checkpoint holds what is trained,
not the base, so from_pretrained() cannot load it. After inject(), this can:

    load_adapter_state_dict(model, safetensors.torch.load_file("checkpoint-9/model.safetensors"))
"""

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from elalora import (
    RankAllocator, RankSchedule, SVDLinear, adapter_state_dict, orthogonality_penalty)


class MoveRanks(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_optimizer_step(self, *args, **kwargs):  # before the gradients are gone
        self.trainer.move_ranks()


class ElaLoRATrainer(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(MoveRanks(self))

    def train(self, *args, **kwargs):
        # After evaluate(), accelerate takes the model for prepared, and would leave out DDP
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        return super().train(*args, **kwargs)

    def create_scheduler(self, num_training_steps, *args, **kwargs):  # the optimizer exists by now
        b = round(0.03 * sum(isinstance(m, SVDLinear) for m in self.model.modules()))
        n = num_training_steps
        schedule = RankSchedule(n, n * 15 // 100, n // 4, max(1, n // 33), max(1, b))
        self.allocator = RankAllocator(self.model, self.optimizer, schedule, k=1)
        return super().create_scheduler(n, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            summed = self.compute_loss_func or (  # else the Trainer divides the loss by n
                self.model_accepts_loss_kwargs and num_items_in_batch is not None)
            n = self.current_gradient_accumulation_steps
            loss = loss + 0.1 * orthogonality_penalty(self.model) / (n if summed else 1)
        return (loss, outputs) if return_outputs else loss

    def move_ranks(self):
        adjustment = self.allocator.step()
        ddp = getattr(self.model_wrapped, "_orig_mod", self.model_wrapped)  # within torch.compile
        if adjustment and isinstance(ddp, DistributedDataParallel):  # its buckets have old shapes
            options = self.accelerator.ddp_handler.to_kwargs() | dict(init_sync=False)
            ddp.__init__(ddp.module, ddp.device_ids, ddp.output_device, **options)
        return adjustment

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, adapter_state_dict(self.model))

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.allocator.state_dict(), f"{output_dir}/allocator.pt")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        state = torch.load(f"{checkpoint}/allocator.pt", weights_only=True)
        self.allocator.load_state_dict(state)

    def _issue_warnings_after_load(self, result):  # that the base is missing is as it should be
        if missing := adapter_state_dict(self.model).keys() & {*result.missing_keys}:
            raise ValueError(f"the checkpoint has no {min(missing)}; is it of this model?")
