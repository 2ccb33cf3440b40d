"""For Trainer of transformers, and SFTTrainer, DPOTrainer, KTOTrainer, GRPOTrainer of TRL.

    inject(model, ["q_proj", "v_proj"], rank=8)
    trainer = SFTTrainer(model, args=arguments, train_dataset=dataset)  # or another of them
    trainer.add_callback(MoveRanks(trainer))
    trainer.train()  # or trainer.train(resume_from_checkpoint=True)

A checkpoint holds what is trained, not the base: from_pretrained() cannot load it. To get it into
a model after inject(): load_adapter_state_dict(model, load_file("checkpoint-9/model.safetensors")).
For what serves or evaluates, export_peft() or merge() the model. The loss that the trainer logs is
its own, without the penalty. To train a second time, make a new trainer. TRL's configurations set
bf16=True: without a GPU, give them bf16=False and use_cpu=True.
"""

from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from elalora import (
    RankAllocator, RankSchedule, SVDLinear, adapter_state_dict, orthogonality_penalty)


@dataclass(eq=False)
class MoveRanks(TrainerCallback):
    """Algorithm 1 in a trainer, in one process or under torchrun. k, min_rank: of RankAllocator."""
    trainer: Trainer
    k: int = 1
    penalty: float = 0.1  # the weight of the orthogonality penalty
    schedule: RankSchedule | None = None  # None: ranks stay in the first 15% and the last 25%
    min_rank: int = 1

    def __post_init__(self):
        self.save_whole = self.trainer._save
        self.trainer._save = self.save
        self.trainer._issue_warnings_after_load = self.check_loaded

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, n = self.trainer, state.max_steps
        layers = sum(isinstance(module, SVDLinear) for module in trainer.model.modules())
        schedule = self.schedule or RankSchedule(  # up to 3% of the matrices move at once
            n, n * 15 // 100, n // 4, max(1, n // 33), b=max(1, round(0.03 * layers)))
        self.allocator = RankAllocator(
            trainer.model, trainer.optimizer, schedule, self.k, min_rank=self.min_rank)
        if self.allocator.t != state.global_step:
            raise ValueError(
                f"training begins at step {state.global_step}, the optimizer is at step "
                f"{self.allocator.t}: the checkpoint has no optimizer.pt (save_only_model), or "
                "this trainer has trained before; make a new one")

    def on_step_begin(self, *args, **kwargs):
        """The penalty's gradient is there before the loss's, so it is clipped and averaged, too."""
        layers = self.allocator.layers.values()
        weights = [w for layer in layers for w in (layer.P, layer.Q) if w.requires_grad]
        R = self.penalty * orthogonality_penalty(self.trainer.model)
        if scaler := self.trainer.accelerator.scaler:  # in float16
            R = scaler.scale(R)
        for w, gradient in zip(weights, torch.autograd.grad(R, weights)):
            w.grad = gradient.contiguous()

    def on_optimizer_step(self, *args, **kwargs):  # before the gradients are gone
        if self.allocator.step():
            for ddp in self.trainer.model_wrapped.modules():
                if isinstance(ddp, DistributedDataParallel):  # its buckets have the old shapes
                    options = self.trainer.accelerator.ddp_handler.to_kwargs()
                    ddp.__init__(ddp.module, ddp.device_ids, ddp.output_device,
                                 **options | dict(init_sync=False))

    def on_evaluate(self, *args, **kwargs):  # else accelerate leaves out DDP in a later train()
        self.trainer.model.__dict__.pop("_is_accelerate_prepared", None)

    def save(self, output_dir=None, state_dict=None):
        model = self.trainer.model
        before = getattr(model, "_keys_to_ignore_on_save", None)
        if any(isinstance(module, SVDLinear) for module in model.modules()):
            state_dict = adapter_state_dict(model)
            # Of a quantized model transformers would save all, and not the given state
            model._keys_to_ignore_on_save = model.state_dict().keys() - state_dict.keys()
        self.save_whole(output_dir, state_dict)  # as ever after merge()
        model._keys_to_ignore_on_save = before

    def check_loaded(self, result):
        """That the base is missing is as it should be."""
        wrong = adapter_state_dict(self.trainer.model).keys() & {*result.missing_keys}
        wrong |= {*result.unexpected_keys}
        if wrong:
            raise ValueError(f"the checkpoint is of another model or adapter: {sorted(wrong)[:4]} "
                             "are missing in it, or unknown to the model")
