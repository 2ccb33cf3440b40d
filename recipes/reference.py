"""For DPOTrainer and KTOTrainer of TRL: a reference model that is no second copy of the base.

    inject(model, ["q_proj", "v_proj"], rank=8)  # no modules_to_save: they are not disabled
    trainer = DPOTrainer(model, Reference(model), args=arguments, train_dataset=dataset)
    trainer.add_callback(MoveRanks(trainer))

KTOTrainer takes it alike. GRPOTrainer has a reference only if its beta is not 0. It loads one by
itself: after making the trainer, put trainer.ref_model = Reference(model) in its place.
"""

import torch

from elalora import adapters_disabled


class Reference(torch.nn.Module):
    """Computes what the policy's base does."""

    def __init__(self, policy: torch.nn.Module):
        super().__init__()
        self.policy, self.config = policy, policy.config

    def __call__(self, *args, **kwargs):  # not forward(), which TRL replaces
        with adapters_disabled(self.policy):
            return self.policy(*args, **kwargs)
