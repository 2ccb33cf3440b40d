"""ElaLoRA in one file: low-rank adapters whose ranks move to the matrices that need them.

A frozen weight W0 is fine-tuned through W = W0 + scaling P diag(Lambda) Q. While it trains, every
rank (a column of P, its singular value, its row of Q) is scored by its smoothed sensitivity times
the uncertainty of that. At scheduled steps the b least important ranks of all matrices are pruned,
and matrices whose weakest ranks still matter gain b: the sum never changes. Depends only on torch
(>= 2.11).

Sections, equations and tables are those of ElaLoRA (Chang et al. 2025, arXiv:2504.00254). P Lambda
Q and its regularizer are AdaLoRA's (arXiv:2303.10512), the scores PLATON's (arXiv:2206.12562).

Glossary         symbol   shape
    base_layer   W^(0)    (d1, d2)              frozen pre-trained nn.Linear; d1 = d_out, d2 = d_in
    P, Q         P, Q     (d1, r) and (r, d2)   left and right singular vectors
    Lambda       Lambda   (r,)                  singular values, the diagonal of the paper's matrix
    I_bar, U_bar I, U-bar of P, Lambda or Q     smoothed sensitivity, uncertainty per weight (eq. 3)
    importance   S_i      (r,)                  score of every rank (eq. 2)
    budget(t)    b^(t)    integer               ranks to prune and to add at step t (eq. 5)
    k            k        integer               most ranks that a matrix loses or gains at a time
"""

import copy
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

RANK_DIM = {"P": 1, "Lambda": 0, "Q": 0}  # the dimension of each factor that counts ranks


# ---- Section 3.1: SVD-based low-rank adaptation ----
class SVDLinear(nn.Module):
    """A frozen linear layer and its low-rank update, y = W0 x + scaling P (Lambda * (Q x)).

    P and Q start orthonormal, Lambda at 0, all in float32; y has the dtype of the base's output.
    The base, of weight (d_out, d_in), is frozen and only called, so a quantized nn.Linear will do.
    scaling is alpha / initial rank (inject: / mean rank) and constant; dropout acts on x before Q.
    Raises ValueError if base_layer is sharded or no nn.Linear, or rank not in 1..min(d_out, d_in).
    """
    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float = 16.0, dropout: float = 0.0):
        super().__init__()
        _check_layer(str(base_layer), base_layer, rank)
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha!r}")
        device = base_layer.weight.device
        on_cpu = dict(dtype=torch.float32, device="cpu")  # so a seed starts alike on any device
        P = nn.init.orthogonal_(torch.empty(base_layer.out_features, rank, **on_cpu)).to(device)
        Q = nn.init.orthogonal_(torch.empty(rank, base_layer.in_features, **on_cpu)).to(device)
        self.P, self.Lambda, self.Q = map(nn.Parameter, (P, P.new_zeros(rank), Q))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("scaling", P.new_tensor(alpha / rank))
        self.steps = {"done": 0, "due": 0}  # of RankAllocator: so far, and until its search ends
        self.base_layer = base_layer.requires_grad_(False)

    @property
    def rank(self) -> int:
        """The present number of ranks, r."""
        return self.Lambda.numel()

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)  # (..., d_out)
        h = nn.functional.linear(self.dropout(x).to(self.Q.dtype), self.Q)  # (..., r)
        h = (h * (self.scaling * self.Lambda)).to(y.dtype).reshape(-1, self.rank)
        P_T = self.P.T.contiguous().to(y.dtype)  # (r, d_out); contiguous for a fast backward
        with torch.autocast(y.device.type, enabled=False):  # all have y's dtype already
            return torch.addmm(y.reshape(-1, len(self.P)), h, P_T).view_as(y)  # y + h P'

    def delta_weight(self) -> Tensor:
        """The update scaling P diag(Lambda) Q of the weight, (d_out, d_in)."""
        return (self.P * (self.scaling * self.Lambda)) @ self.Q

    @torch.no_grad()
    def _load_from_state_dict(self, state: dict, prefix: str, *args) -> None:
        for factor, dim in RANK_DIM.items():  # load_state_dict() restores any ranks
            w, given = getattr(self, factor), state.get(f"{prefix}{factor}")
            if given is not None and given.dim() == w.dim() and given.shape[dim] != w.shape[dim]:
                w.grad = None
                w.set_(w.new_empty(*w.shape[:dim], given.shape[dim], *w.shape[dim + 1 :]))
        super()._load_from_state_dict(state, prefix, *args)


def inject(model: nn.Module, target_modules: Sequence[str], rank: int | Mapping[str, int],
           alpha: float = 16, dropout: float = 0, modules_to_save: Sequence[str] = ()) -> nn.Module:
    """Freezes a model and wraps its linear layers of the given names in SVDLinear; returns it.

    Names match by whole components from the right: "output.dense" matches "layer.0.output.dense",
    "k" never matches "block". rank is that of all, or a map like RankAllocator.ranks(); scaling is
    alpha / mean rank. modules_to_save, a new head for example, are trained in full. Raises
    ValueError, before any change, if a name matches nothing, a target is no nn.Linear, sharded or
    in a saved module, a rank is out of range, a map names others, or the model is adapted already.
    """
    if any(isinstance(module, SVDLinear) for module in model.modules()):
        raise ValueError("the model is adapted already; merge() it or load it anew")
    targets = _matching(model, target_modules, "target_modules")
    saved = _matching(model, modules_to_save, "modules_to_save")
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(targets, rank)
    if not targets or ranks.keys() != targets.keys():
        raise ValueError(f"no targets, or a rank map for others: {sorted(ranks.keys() ^ targets)}")
    for name, module in targets.items():
        _check_layer(repr(name), module, ranks[name])
        if any(module is part for root in saved.values() for part in root.modules()):
            raise ValueError(f"{name!r} would be both adapted and saved; name it in one list only")
    new = {m: SVDLinear(m, ranks[name], alpha, dropout) for name, m in targets.items()}
    model.requires_grad_(False)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:  # wherever it stands, so that a shared layer stays shared
            new[module].scaling.fill_(alpha * len(ranks) / sum(ranks.values()))
            model.set_submodule(name, new[module])
    for module in saved.values():
        module.requires_grad_(True).elalora_saved = True  # outlives wrapping and renaming
    return model


def _check_layer(name: str, layer: nn.Module, rank: int) -> None:
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} must be an nn.Linear, not a {type(layer).__name__}")
    if hasattr(layer.weight, "to_local") or layer.weight.dim() != 2:  # a DTensor, a flat shard
        raise ValueError(f"{name} is sharded (FSDP, ZeRO-3); use DistributedDataParallel instead")
    limit = min(layer.out_features, layer.in_features)
    if type(rank) is not int or not 1 <= rank <= limit:  # not True either
        raise ValueError(f"the rank of {name} must be an integer in 1..{limit}, got {rank!r}")


def _matching(model: nn.Module, names: Sequence[str], argument: str) -> dict[str, nn.Module]:
    if isinstance(names, str):
        raise ValueError(f"{argument} must be a list of names, got the string {names!r}")
    modules, found = dict(model.named_modules()), set()
    for wanted in names:
        if not (matches := {n for n in modules if n and f".{n}".endswith(f".{wanted}")}):
            linear = [name for name in modules if isinstance(modules[name], nn.Linear)]
            raise ValueError(f"{argument}: {wanted!r} matches no module; linear: {linear[-8:]}")
        found |= matches
    return {name: module for name, module in modules.items() if name in found}


def _adapted(model: nn.Module, ended: bool = False) -> dict[str, SVDLinear]:
    layers = {n: module for n, module in model.named_modules() if isinstance(module, SVDLinear)}
    if not layers:
        raise ValueError("the model has no SVDLinear; call inject(model, ...) first")
    for name, layer in layers.items():
        _check_layer(repr(name), layer.base_layer, layer.rank)
    if ended and layer.steps["done"] < layer.steps["due"]:
        warnings.warn("ranks were to move until step {due}, but RankAllocator.step() was called "
                      "{done} times".format(**layer.steps), stacklevel=4)
    return layers


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """Mean of R(P, Q) = |P'P - I|_F^2 + |QQ' - I|_F^2 over the adapted matrices (section 3.1)."""
    layers, by_shape, R = _adapted(model).values(), {}, 0
    for rows in [factor for layer in layers for factor in (layer.P.T, layer.Q)]:  # (r, d)
        by_shape.setdefault(rows.shape, []).append(rows)
    with torch.autocast(rows.device.type, enabled=False):  # bfloat16 would drown it
        for A in map(torch.stack, by_shape.values()):  # (n, r, d), few large operations
            R += (A @ A.mT - torch.eye(A.shape[1], device=A.device)).square().sum()
    return R / len(layers)


# ---- Section 3.2: importance scores ----
@torch.no_grad()
def update_averages(parameters: Sequence[Tensor], averages: Mapping[Tensor, Mapping[str, Tensor]],
                    beta1: float, beta2: float) -> None:
    """Eq. 1 and 3: w (after the update) and w.grad move averages[w]["I_bar"] and ["U_bar"]."""
    gradients = [w.grad.float() for w in parameters]
    I = torch._foreach_abs(torch._foreach_mul([w.float() for w in parameters], gradients))  # eq. 1
    I_bar, U_bar = ([averages[w][key] for w in parameters] for key in ("I_bar", "U_bar"))
    torch._foreach_lerp_(I_bar, I, 1 - beta1)  # eq. 3: beta1 I_bar + (1 - beta1) I
    deviation = torch._foreach_abs(torch._foreach_sub(I, I_bar))
    torch._foreach_lerp_(U_bar, deviation, 1 - beta2)  # beta2 U_bar + (1 - beta2) |I - new I_bar|


# ---- Section 3.3: dynamic rank learning ----
def select(scores: Mapping[str, Sequence[float]], max_ranks: Mapping[str, int], k: int,
           b: int) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Section 3.3: from scores S_i to the indices that each matrix loses, and the number it gains.

    As many come as go: the most, up to b, for which candidates suffice and every rank stays in
    1..max_ranks. A matrix loses at most k, gains at most k, or both. Ties: by matrix, then index.
    """
    candidates, prunable = [], []
    for order, (name, S) in enumerate(scores.items()):
        ascending = sorted((S[i], order, i, name) for i in range(len(S)))
        candidates += ascending[:k]  # step 1: the k least important ranks of each matrix
        prunable += ascending[: min(k, len(S) - 1)]  # the last may not go, but speaks for growth
    candidates, prunable = sorted(candidates), sorted(prunable)  # step 2: across all matrices
    for n in range(min(b, len(prunable)), 0, -1):  # fewer, if not so many can be added
        pruned: dict[str, list[int]] = {}
        for _, _, i, name in prunable[:n]:  # step 3: prune the n least important
            pruned[name] = sorted([*pruned.get(name, []), i])
        expanded: dict[str, int] = {}
        for _, _, i, name in reversed(candidates):  # step 4: grow where even the weakest matter
            rank = len(scores[name]) - len(pruned.get(name, [])) + expanded.get(name, 0)
            if i not in pruned.get(name, []) and rank < max_ranks[name]:
                expanded[name] = expanded.get(name, 0) + 1
                if sum(expanded.values()) == n:
                    return pruned, expanded
    return {}, {}


def new_directions(present: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Algorithm 1's Gram-Schmidt: n <= d - r random orthonormal columns, (d, n), orthogonal to the
    present ones, (d, r), be those orthonormal or not. In float64 on the CPU."""
    random = torch.randn(len(present), n, dtype=torch.float64, device="cpu", generator=generator)
    orthonormal, _ = torch.linalg.qr(torch.cat([present.cpu().double(), random], dim=1))
    return orthonormal[:, present.shape[1] :].to(present)  # the first r columns span the present


@torch.no_grad()
def resize(layer: SVDLinear, keep: Sequence[int], n_new: int, generator: torch.Generator,
           states: Sequence[Mapping[Tensor, dict]]) -> None:
    """Keeps the given ranks of a layer, in that order, appends n_new of singular value and score 0.

    Parameters stay the same objects. What states (as optimizer.state) hold for them moves along to
    the bit, 0 for new ranks: with the old step count, Adam's updates of those start up to 6.6 times
    as long. ValueError, before any change, if a state is no scalar nor of its parameter's shape.
    """
    factors = {getattr(layer, factor): dim for factor, dim in RANK_DIM.items()}
    resized = [(w, state[w], key) for w in factors for state in states
               for key, value in state.get(w, {}).items() if getattr(value, "ndim", 0)]
    for w, slots, key in resized:
        if slots[key].shape != w.shape:
            raise ValueError(f"the optimizer's {key!r} has shape {list(slots[key].shape)}, its "
                             f"parameter {list(w.shape)}; take one of like shapes, such as AdamW")
    index = torch.tensor(keep, device=layer.Lambda.device)
    new_P = new_directions(layer.P[:, index], n_new, generator)
    new_Q = new_directions(layer.Q[index].T, n_new, generator).T
    new = dict(zip(factors, (new_P, new_P.new_zeros(n_new), new_Q)))
    for w, slots, key in resized:
        zeros = torch.zeros_like(new[w], dtype=slots[key].dtype)
        slots[key] = torch.cat([slots[key].index_select(factors[w], index), zeros], factors[w])
    for w, dim in factors.items():
        w.grad = None  # of the old shape
        # Not through .data: the next backward would fail while a graph of before is alive.
        w.set_(torch.cat([w.index_select(dim, index), new[w]], dim))


# ---- Section 3.4: dynamic rank scheduler ----
SHAPES = {  # progress (the paper's P) in 0..1 -> share of b
    "cubic": lambda progress: 1 - progress**3,  # eq. 5
    "linear": lambda progress: 1 - progress,
    "exponential": lambda progress: (
        (math.exp(-5 * progress) - math.exp(-5)) / (1 - math.exp(-5))),
    "constant": lambda progress: 1,
}


@dataclass(frozen=True)
class RankSchedule:
    """Section 3.3's phases and 3.4's b^(t), in optimizer steps; ValueError if inconsistent."""
    total_steps: int
    warmup_steps: int  # ranks stay as they are in these first ...
    stabilize_steps: int  # ... and in these last steps
    adjust_interval: int  # the first adjustment is at warmup_steps + adjust_interval
    b: int  # ranks that the first adjustments prune and add; 0 for none ever
    shape: str = "cubic"

    def __post_init__(self) -> None:
        least = dict(total_steps=1, warmup_steps=0, stabilize_steps=0, adjust_interval=1, b=0)
        for name, minimum in least.items():
            if not isinstance(value := getattr(self, name), int) or value < minimum:
                raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")
        if self.warmup_steps + self.adjust_interval > self.search_end:
            raise ValueError(f"total_steps must hold warm-up, an interval, stabilization: {self}")
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")

    @property
    def search_end(self) -> int:
        """The last step at which ranks may move."""
        return self.total_steps - self.stabilize_steps

    def budget(self, step: int) -> int:
        """b^(t) = b (1 - progress^3) at an adjustment (eq. 5), 0 at any other step.

        progress is the share of the search that is done (the paper's P, eq. 4)."""
        searched = step - self.warmup_steps
        if searched <= 0 or step > self.search_end or searched % self.adjust_interval:
            return 0
        span = self.search_end - self.warmup_steps
        progress = Fraction(searched, span)  # exact, so that halves round predictably
        return round(self.b * SHAPES[self.shape](progress))


# ---- Algorithm 1 ----
@dataclass(frozen=True)
class Adjustment:
    """What one adjustment did."""
    step: int
    b: int  # b^(t); fewer ranks are moved if select() finds no more
    pruned: dict[str, list[int]]  # module name -> indices that the removed ranks had
    expanded: dict[str, int]  # module name -> number of ranks added


class RankAllocator:
    """Algorithm 1: moves ranks between the matrices of an injected model while it trains.

    The optimizer's state must have its parameters' shapes, as Adam's. For k see select(), for beta1
    and beta2 eq. 3; seed is for new directions. ValueError if a number or the optimizer is wrong.
    """
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: RankSchedule,
                 k: int, beta1: float = 0.85, beta2: float = 0.85, seed: int = 0):
        if not (isinstance(k, int) and k >= 1 and 0 < beta1 < 1 and 0 < beta2 < 1):
            raise ValueError(f"k must be an int >= 1, betas in (0, 1): {k!r}, {beta1!r}, {beta2!r}")
        self.layers, self.optimizer, self.schedule = _adapted(model), optimizer, schedule
        self.k, self.beta1, self.beta2 = k, beta1, beta2
        self.optimized = {w for group in optimizer.param_groups for w in group["params"]}
        self.factors = {f"{name}.{factor}": getattr(layer, factor)
                        for name, layer in self.layers.items() for factor in RANK_DIM}
        self.averages = {}  # parameter -> name -> tensor, like optimizer.state
        for name, w in self.factors.items():
            if w not in self.optimized:
                raise ValueError(f"the optimizer does not hold {name!r}; make it after inject()")
            self.averages[w] = {key: torch.zeros_like(w).float() for key in ("I_bar", "U_bar")}
        self.t, self.generator = 0, torch.Generator("cpu").manual_seed(seed)
        self.steps = {"done": 0, "due": schedule.search_end if schedule.b else 0}
        for layer in self.layers.values():
            layer.steps = self.steps  # so that merge() can tell of steps to come

    def step(self) -> Adjustment | None:
        """A turn of Algorithm 1's loop, once per optimizer.step(), after it and before zero_grad().
        Returns what it adjusted, None where b^(t) = 0. ValueError if it has nothing to score."""
        if self.t < self.schedule.search_end:  # from the first step, for averages to settle
            if not (scored := [w for w in self.factors.values() if w.grad is not None]):
                raise ValueError("no gradients: step() belongs between backward() and zero_grad()")
            if any(self.averages[w]["I_bar"].shape != w.shape for w in scored):
                raise ValueError("ranks were loaded, but not the allocator's own load_state_dict()")
            gradients = [w.grad for w in self.optimized if w.grad is not None]
            norms = torch._foreach_norm(gradients, math.inf)
            if torch.stack(norms).isfinite().all():  # else GradScaler skipped the optimizer's step
                update_averages(scored, self.averages, self.beta1, self.beta2)
        self.t = self.steps["done"] = self.t + 1
        if (b := self.schedule.budget(self.t)) == 0:
            return None
        S = torch.cat(list(self.importance().values())).cpu()  # one transfer
        scores = dict(zip(self.layers, map(Tensor.tolist, S.split([*self.ranks().values()]))))
        max_ranks = {n: min(len(layer.P), layer.Q.shape[1]) for n, layer in self.layers.items()}
        pruned, expanded = select(scores, max_ranks, self.k, b)
        for name, layer in self.layers.items():
            if name in pruned or name in expanded:
                keep = [i for i in range(layer.rank) if i not in pruned.get(name, [])]
                resize(layer, keep, expanded.get(name, 0), self.generator,
                       (self.optimizer.state, self.averages))
        return Adjustment(self.t, b, pruned, expanded)

    def importance(self) -> dict[str, Tensor]:
        """Module name -> S_i = s(Lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij), (rank,), float32."""
        s = {w: a["I_bar"] * a["U_bar"] for w, a in self.averages.items()}  # eq. 3
        return {name: s[layer.Lambda] + s[layer.P].mean(dim=0) + s[layer.Q].mean(dim=1)
                for name, layer in self.layers.items()}  # eq. 2

    def ranks(self) -> dict[str, int]:
        """Module name -> present rank, a map that inject() takes."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def state_dict(self) -> dict:
        """Step, averages and random state; torch.load(weights_only=True) reads them back."""
        averages = {name: copy.deepcopy(self.averages[w]) for name, w in self.factors.items()}
        return {"step": self.t, "averages": averages, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping) -> None:
        """Restores state_dict(), once load_adapter_state_dict() has restored the ranks. Raises
        ValueError, and changes nothing, if modules or ranks differ."""
        given = {name: average["I_bar"].shape for name, average in state["averages"].items()}
        needed = {name: w.shape for name, w in self.factors.items()}
        if wrong := sorted(dict(given.items() ^ needed.items())):
            raise ValueError(f"{wrong[0]!r} does not fit; call load_adapter_state_dict() first")
        for name, w in self.factors.items():
            saved = state["averages"][name]
            self.averages[w] = {key: saved[key].to(w.device, copy=True) for key in saved}
        self.generator.set_state(state["generator"].cpu())
        self.t = self.steps["done"] = state["step"]


# ---- After training ----
@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Adds every update to its base weight, puts the frozen nn.Linear back; returns the model.
    Raises ValueError, before any change, if a weight is not floating point but quantized."""
    layers = _adapted(model, ended=True)
    for name, layer in layers.items():
        if not (dtype := layer.base_layer.weight.dtype).is_floating_point:
            raise ValueError(f"{name!r} has a weight of {dtype}; dequantize it before merging")
    for layer in layers.values():
        weight = layer.base_layer.weight
        merged = (weight.to(layer.P.dtype) + layer.delta_weight()).to(weight.dtype)
        layer.base_layer.weight = nn.Parameter(merged, False)  # new: others may hold the old one
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, SVDLinear) and name:
            model.set_submodule(name, module.base_layer)
        module.__dict__.pop("elalora_saved", None)
    return model.base_layer if isinstance(model, SVDLinear) else model


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of P, Lambda, Q, scaling of every adapted module, and all of every module_to_save."""
    own = {f"{name}.{key}" for name in _adapted(model) for key in (*RANK_DIM, "scaling")}
    saved = tuple(f"{n}." for n, m in model.named_modules() if hasattr(m, "elalora_saved"))
    return {key: value.clone() for key, value in model.state_dict().items()
            if key in own or key.startswith(saved)}


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restores adapter_state_dict() into a model with the same modules injected, at any ranks.
    Raises ValueError, before any change, if a tensor is missing, unknown or misshapen."""
    layers, present = _adapted(model), adapter_state_dict(model)
    if wrong := sorted(present.keys() ^ state.keys()):
        raise ValueError(f"missing in the state, or unknown to the model: {', '.join(wrong[:8])}")
    for name, layer in layers.items():
        _check_layer(repr(name), layer.base_layer, state[f"{name}.Lambda"].numel())
    for key, value in present.items():
        shape, (name, _, factor) = list(value.shape), key.rpartition(".")
        if name in layers and factor in RANK_DIM:
            shape[RANK_DIM[factor]] = state[f"{name}.Lambda"].numel()
        if list(state[key].shape) != shape:
            raise ValueError(f"{key} has shape {list(state[key].shape)}, the model needs {shape}")
    model.load_state_dict(state, strict=False)


@torch.no_grad()
def export_peft(model: nn.Module, directory: str | Path, base_model_name: str) -> None:
    """Writes a LoRA adapter that peft.PeftModel.from_pretrained(base, directory) loads.

    A is Q, B is P diag(Lambda), alpha is scaling r. What PEFT takes for saved modules, by any end
    of a name, is written in whole. Raises ValueError for what it cannot name. Needs safetensors.
    """
    from safetensors.torch import save_file
    layers, modules = _adapted(model, ended=True), dict(model.named_modules(remove_duplicate=False))
    saved = [name for name, module in modules.items() if hasattr(module, "elalora_saved")]
    whole = [name for name in modules if name.endswith(tuple(saved))]
    lora = {n: m for n, m in layers.items() if not any(f"{n}.".startswith(f"{w}.") for w in whole)}
    if not lora or [n for n, m in modules.items() if n and isinstance(m, SVDLinear)] != [*layers]:
        raise ValueError("PEFT cannot name a layer: it stands twice, or ends like a saved module")
    source = model if lora == layers else merge(copy.deepcopy(model))
    tensors = {f"{name}.lora_A.weight": layer.Q for name, layer in lora.items()}
    tensors |= {f"{name}.lora_B.weight": layer.P * layer.Lambda for name, layer in lora.items()}
    for name in whole:
        tensors |= source.get_submodule(name).state_dict(prefix=f"{name}.")
    ranks = {f"^{re.escape(name)}": layer.rank for name, layer in lora.items()}
    alphas = {f"^{re.escape(n)}": layer.rank * layer.scaling.item() for n, layer in lora.items()}
    config = dict(
        peft_type="LORA", base_model_name_or_path=base_model_name, modules_to_save=saved,
        target_modules="|".join(map(re.escape, lora)), r=max(ranks.values()), rank_pattern=ranks,
        lora_alpha=max(alphas.values()), alpha_pattern=alphas)
    (folder := Path(directory)).mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{key}": tensor.clone(memory_format=torch.contiguous_format)
               for key, tensor in tensors.items()}, folder / "tmp-adapter_model.safetensors")
    (folder / "tmp-adapter_config.json").write_text(json.dumps(config, indent=1))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / f"tmp-{file}").replace(folder / file)
