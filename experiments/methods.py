"""The methods that are compared, behind one interface: the training loop does not know which.

A method is made of a problem, a run and its recipe. Making it adapts the problem's model and makes
the optimizer. All methods scale their updates by alpha / rank.
"""

from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import elalora
from experiments.problem import DEVICE, Problem, trained
from experiments.tables import Config, Recipe

NOISE = (  # warnings that PEFT causes, by how they begin
    "`is_gradient_checkpointing` is deprecated",  # it asks transformers for it
    "The following rank_pattern keys",  # of AdaLoRA's own
    "Adapter 'default'",  # of AdaLoRA's ranks of 0
)


class Method:
    """What the loop calls. Raises ValueError if the schedule or the ranks do not fit."""
    fast: str  # the end of the names of parameters whose learning rate is times lambda_rate
    has_singular_values = False
    moves_ranks = True  # False: b = 0

    def __init__(self, problem: Problem, config: Config, recipe: Recipe, ranks: dict[str, int]):
        """ranks: module -> its first rank; {}: config.rank for every module."""
        self.problem, self.config, self.recipe = problem, config, recipe
        total = recipe.epochs * problem.steps_per_epoch
        b = recipe.b if self.moves_ranks else 0
        self.schedule = elalora.RankSchedule(
            total, recipe.warmup, recipe.stabilize, recipe.interval, b, recipe.shape)
        self.adapt(ranks or dict.fromkeys(problem.targets, config.rank))
        rates = {1: [], recipe.lambda_rate: []}  # learning rate / the recipe's: one key if it is 1
        for name, w in trained(problem.model).items():
            rates[recipe.lambda_rate if name.endswith(self.fast) else 1].append(w)
        groups = [dict(params=ws, lr=rate * recipe.learning_rate) for rate, ws in rates.items()]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, foreach=True)
        self.scheduler = transformers.get_scheduler(
            recipe.lr_scheduler, self.optimizer, total // 10, total)

    @property
    def t(self) -> int:
        """The optimizer's steps so far."""
        return self.scheduler.last_epoch

    def adapt(self, ranks: dict[str, int]) -> None:
        """Puts adapters into the problem's model, and freezes the rest but for its heads."""

    def penalty(self) -> Tensor | None:
        """What is added to the loss, weighted; a scalar."""

    def step(self) -> elalora.Adjustment | None:
        """Called after every step of optimizer and scheduler, before gradients are zeroed."""

    def ranks(self) -> dict[str, int]:
        """Module -> its present rank."""
        return {}

    def importance(self) -> dict[str, Tensor]:
        """Module -> the scores of its ranks, (rank,)."""
        return {}

    def parameters(self) -> int:
        """How many weights the present ranks have: two vectors each, and a singular value."""
        count = 0
        for name, rank in self.ranks().items():
            shape = self.problem.model.get_submodule(name).base_layer.weight.shape
            count += rank * (sum(shape) + self.has_singular_values)
        return count

    def state_dict(self) -> dict:
        """What is neither in the trained weights nor in optimizer and scheduler, such as scores."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restores state_dict()."""

    def export(self, folder: Path) -> None:
        """Writes the adapter."""


class ElaLoRA(Method):
    """The paper's method, by elalora.py."""
    fast, has_singular_values = ".Lambda", True

    def __init__(self, problem: Problem, config: Config, recipe: Recipe, ranks: dict[str, int]):
        super().__init__(problem, config, recipe, ranks)
        self.allocator = elalora.RankAllocator(
            problem.model, self.optimizer, self.schedule, recipe.k, recipe.beta1, recipe.beta2,
            config.seed)

    def adapt(self, ranks: dict[str, int]) -> None:
        elalora.inject(self.problem.model, self.problem.targets, ranks, self.recipe.alpha,
                       modules_to_save=self.problem.heads)

    def penalty(self) -> Tensor:
        return self.recipe.gamma * elalora.orthogonality_penalty(self.problem.model)

    def step(self) -> elalora.Adjustment | None:
        return self.allocator.step()

    def ranks(self) -> dict[str, int]:
        return self.allocator.ranks()

    def importance(self) -> dict[str, Tensor]:
        return self.allocator.importance()

    def export(self, folder: Path) -> None:
        model = self.problem.model
        elalora.export_peft(model, folder / "peft", self.config.model or self.config.task)
        save_file(elalora.adapter_state_dict(model), folder / "adapter.safetensors")


class EvenRanks(ElaLoRA):
    """ElaLoRA whose ranks never move."""
    moves_ranks = False


class LoRA(Method):
    """PEFT's LoRA. Its B, which starts at 0 as Λ does, may learn faster, as in LoRA+
    (arXiv:2402.12354)."""
    fast = ".lora_B.default.weight"

    def adapt(self, ranks: dict[str, int]) -> None:
        self.adapted = peft.get_peft_model(self.problem.model, self.settings(
            target_modules=self.problem.targets, modules_to_save=self.problem.heads))
        self.layers = {name: module for name, module in self.problem.model.named_modules()
                       if hasattr(module, "lora_A")}

    def settings(self, **names: list[str]) -> peft.LoraConfig:
        return peft.LoraConfig(r=self.config.rank, lora_alpha=self.recipe.alpha, **names)

    def ranks(self) -> dict[str, int]:
        return {name: layer.r["default"] for name, layer in self.layers.items()}

    def export(self, folder: Path) -> None:
        self.adapted.save_pretrained(folder / "peft")


class AdaLoRA(LoRA):
    """PEFT's AdaLoRA: starts at init_ratio times the rank, prunes during ElaLoRA's search."""
    fast, has_singular_values = ".lora_E.default", True
    averages = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # attributes of PEFT's allocator

    def adapt(self, ranks: dict[str, int]) -> None:
        super().adapt(ranks)
        self.peft_config = self.adapted.peft_config["default"]
        self.allocator = self.adapted.base_model.rankallocator
        self.allocator.reset_ipt = lambda: None  # the last scores are kept, as ElaLoRA's are

    def settings(self, **names: list[str]) -> peft.AdaLoraConfig:
        rank, recipe, schedule = self.config.rank, self.recipe, self.schedule
        start = max(rank + 1, int(rank * recipe.init_ratio))
        return peft.AdaLoraConfig(
            init_r=start, target_r=rank,
            lora_alpha=recipe.alpha * start / rank,  # PEFT divides it by init_r
            orth_reg_weight=recipe.gamma, beta1=recipe.beta1, beta2=recipe.beta2,
            tinit=schedule.warmup_steps, tfinal=schedule.stabilize_steps,
            deltaT=schedule.adjust_interval, total_step=schedule.total_steps, **names)

    def step(self) -> None:
        self.adapted.base_model.update_and_allocate(self.t)

    def penalty(self) -> Tensor:
        """PEFT's. PEFT's model would add it to the loss of every chunk of a batch, and in bfloat16
        under autocast."""
        factors = [factor for layer in self.layers.values()
                   for factor in (layer.lora_A["default"], layer.lora_B["default"].T)]
        norms = [(X @ X.T - torch.eye(len(X), device=DEVICE)).norm() for X in factors]
        return self.recipe.gamma * (sum(norms) / len(norms))

    def kept(self) -> dict[str, list[bool]]:
        """Which ranks have not been pruned so far."""
        pattern = self.peft_config.rank_pattern or {}
        return {name: pattern.get(f"{name}.lora_E.default", [True] * layer.r["default"])
                for name, layer in self.layers.items()}

    def ranks(self) -> dict[str, int]:
        return {name: sum(kept) for name, kept in self.kept().items()}

    def importance(self) -> dict[str, Tensor]:
        """The scores of the ranks that it kept, by eq. 2 and 3, as ElaLoRA's."""
        score, scores = self.allocator._element_score, {}
        for name, kept in self.kept().items():
            S = (score(f"{name}.lora_E.default")[:, 0] + score(f"{name}.lora_A.default").mean(dim=1)
                 + score(f"{name}.lora_B.default").mean(dim=0))  # (first rank,)
            scores[name] = S[torch.tensor(kept, device=DEVICE)]
        return scores

    def state_dict(self) -> dict:
        averages = {name: getattr(self.allocator, name) for name in self.averages}
        return dict(averages=averages, rank_pattern=self.peft_config.rank_pattern)

    def load_state_dict(self, state: dict) -> None:
        for name, tensors in state["averages"].items():
            on_device = {parameter: x.to(DEVICE) for parameter, x in tensors.items()}
            setattr(self.allocator, name, on_device)
        self.peft_config.rank_pattern = state["rank_pattern"]

    def export(self, folder: Path) -> None:
        pattern = self.peft_config.rank_pattern
        super().export(folder)
        self.peft_config.rank_pattern = pattern  # PEFT renamed its keys


METHODS = {"elalora": ElaLoRA, "svd": EvenRanks, "lora": LoRA, "adalora": AdaLoRA}
