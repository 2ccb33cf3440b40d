"""What ElaLoRA is compared with: PEFT's LoRA, EVA and AdaLoRA, and a frozen model.

Each class has RankAllocator's methods, so that the training loop need not know which one it has.
Updates are scaled by alpha / rank in all of them.
"""

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import BatchEncoding

from elalora import RankSchedule
from experiments import problem as shared
from experiments.problem import DEVICE, Config, Problem, Recipe

if TYPE_CHECKING:
    import peft


class LoRA:
    """PEFT's LoRA. Its ranks stay as they are."""
    penalty, averages = None, {}

    def __init__(self, problem: Problem, config: Config, recipe: Recipe, schedule: RankSchedule):
        import peft
        self.schedule, self.t = schedule, 0
        self.adapted = peft.get_peft_model(problem.model, self.settings(
            config.rank, recipe, schedule,
            dict(target_modules=problem.targets, modules_to_save=problem.heads)))
        self.layers = {n: m for n, m in problem.model.named_modules() if hasattr(m, "lora_A")}

    def settings(self, rank: int, recipe: Recipe, schedule: RankSchedule,
                 names: dict) -> "peft.LoraConfig":
        import peft
        return peft.LoraConfig(r=rank, lora_alpha=recipe.alpha, **names)

    def step(self) -> None:
        """Called once per optimizer step."""
        self.t += 1

    def ranks(self) -> dict[str, int]:
        return {name: layer.r["default"] for name, layer in self.layers.items()}

    def importance(self) -> dict[str, Tensor]:
        """LoRA scores nothing."""
        return {}

    def state_dict(self) -> dict:
        return dict(step=self.t)

    def load_state_dict(self, state: dict) -> None:
        self.t = state["step"]


def without_padding(x: Tensor, mask: Tensor) -> Tensor:
    """The rows (n, d) of a matrix's input x: of texts, (texts, tokens, d), those of tokens that the
    mask has; of DeBERTa's relative positions, (1, p, d), all."""
    return x[mask] if x.shape[:2] == mask.shape else x.flatten(0, -2)


class EVA(LoRA):
    """PEFT's LoRA that starts from the data (arXiv:2410.07170), for batches of texts.

    A starts with the directions in which the inputs of its matrix vary most. Before training, ranks
    go to the matrices where they explain most of that, up to twice the mean rank; some may get 0.
    """
    def __init__(self, problem: Problem, config: Config, recipe: Recipe, schedule: RankSchedule):
        import peft
        if shared.PROCESSES > 1:
            raise ValueError("--method eva: its start is computed by one process alone")
        super().__init__(problem, config, recipe, schedule)
        texts = [{**chunk} for batch in itertools.islice(problem.batches(0), 32) for chunk in batch]
        peft.initialize_lora_eva_weights(
            self.adapted, texts, show_progress_bar=False,
            forward_fn=lambda model, text: problem.loss(problem.model, [BatchEncoding(text)]),
            prepare_model_inputs_fn=lambda text, config: text["attention_mask"].bool(),
            prepare_layer_inputs_fn=lambda x, mask, name: without_padding(x[0], mask))
        self.targets = problem.targets
        self.layers = {n: m for n, m in problem.model.named_modules() if hasattr(m, "lora_A")}

    def ranks(self) -> dict[str, int]:
        return dict.fromkeys(self.targets, 0) | super().ranks()

    def settings(self, rank: int, recipe: Recipe, schedule: RankSchedule,
                 names: dict) -> "peft.LoraConfig":
        import peft
        return peft.LoraConfig(r=rank, lora_alpha=recipe.alpha, init_lora_weights="eva",
                               eva_config=peft.EvaConfig(use_label_mask=False), **names)


class AdaLoRA(LoRA):
    """PEFT's AdaLoRA: starts at init_ratio times the rank, prunes during ElaLoRA's search."""
    def __init__(self, problem: Problem, config: Config, recipe: Recipe, schedule: RankSchedule):
        super().__init__(problem, config, recipe, schedule)
        self.gamma, self.tuner = recipe.gamma, self.adapted.base_model.rankallocator
        self.tuner.reset_ipt = lambda: None  # the last scores are kept, as ElaLoRA's are

    def settings(self, rank: int, recipe: Recipe, schedule: RankSchedule,
                 names: dict) -> "peft.LoraConfig":
        import peft
        start = max(rank + 1, int(rank * recipe.init_ratio))
        return peft.AdaLoraConfig(
            init_r=start, target_r=rank,
            lora_alpha=recipe.alpha * start / rank,  # PEFT divides it by init_r
            orth_reg_weight=recipe.gamma, beta1=recipe.beta1, beta2=recipe.beta2,
            tinit=schedule.warmup_steps, tfinal=schedule.stabilize_steps,
            deltaT=schedule.adjust_interval, total_step=schedule.total_steps, **names)

    def step(self) -> None:
        super().step()
        self.adapted.base_model.update_and_allocate(self.t)

    def penalty(self) -> Tensor:
        """PEFT's, weighted. PEFT's model would add it to the loss of every chunk of a batch, and
        in bfloat16 under autocast."""
        factors = [factor for layer in self.layers.values()
                   for factor in (layer.lora_A["default"], layer.lora_B["default"].T)]
        norms = [(X @ X.T - torch.eye(len(X), device=DEVICE)).norm() for X in factors]
        return self.gamma * (sum(norms) / len(norms))

    @property
    def averages(self) -> dict[str, dict[str, Tensor]]:
        names = ("ipt", "exp_avg_ipt", "exp_avg_unc")
        return {name: getattr(self.tuner, name) for name in names}

    @property
    def kept(self) -> dict[str, list[bool]]:
        """Which ranks have not been pruned so far."""
        pattern = self.adapted.peft_config["default"].rank_pattern or {}
        return {name: pattern.get(f"{name}.lora_E.default", [True] * layer.r["default"])
                for name, layer in self.layers.items()}

    def ranks(self) -> dict[str, int]:
        return {name: sum(kept) for name, kept in self.kept.items()}

    def importance(self) -> dict[str, Tensor]:
        """The scores of the ranks that it kept, by eq. 2 and 3, as ElaLoRA's."""
        score = self.tuner._element_score
        return {n: (score(f"{n}.lora_E.default")[:, 0]
                    + score(f"{n}.lora_A.default").mean(dim=1)
                    + score(f"{n}.lora_B.default").mean(dim=0))[torch.tensor(kept, device=DEVICE)]
                for n, kept in self.kept.items()}

    def state_dict(self) -> dict:
        pattern = self.adapted.peft_config["default"].rank_pattern
        return super().state_dict() | dict(averages=self.averages, rank_pattern=pattern)

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        for key, tensors in state["averages"].items():
            setattr(self.tuner, key, {name: x.to(DEVICE) for name, x in tensors.items()})
        self.adapted.peft_config["default"].rank_pattern = state["rank_pattern"]


class Frozen:
    """The floor of the benchmark: forward and backward passes, in which only the heads train."""
    penalty, averages = None, {}

    def __init__(self, problem: Problem, config: Config, recipe: Recipe, schedule: RankSchedule):
        for name, w in problem.model.named_parameters():
            w.requires_grad_(not {*name.split(".")}.isdisjoint(problem.heads))
        problem.model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.requires_grad_())

    def step(self) -> None:
        """Nothing is scored or moved."""


BASELINES = {"lora": LoRA, "eva": EVA, "adalora": AdaLoRA, "frozen": Frozen}
