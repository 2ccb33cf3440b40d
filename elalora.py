# SPDX-License-Identifier: MIT
# elalora.py 1.2, a reference implementation of ElaLoRA (unofficial). Copy this file, it is enough.
"""ElaLoRA in one file: low-rank adapters whose ranks move to the matrices that need them.

A frozen weight W0 is fine-tuned through W = W0 + scaling P diag(Lambda) Q. While the model trains,
every rank (a column of P, its singular value, its row of Q) gets a score: its smoothed sensitivity
times the uncertainty of that sensitivity. At scheduled steps up to b ranks are pruned, the least
important of all matrices, and as many are added where even the weakest rank matters. The sum of all
ranks never changes. The file depends only on torch (>= 2.11) and Python >= 3.11; export_peft also
needs safetensors.

    inject(model, ["query", "value"], rank=4, modules_to_save=["classifier"])
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-4, weight_decay=0.0)
    schedule = RankSchedule(
        total_steps=1740, warmup_steps=300, stabilize_steps=400, adjust_interval=50, b=2)
    allocator = RankAllocator(model, optimizer, schedule, k=1)
    for batch in loader:
        loss = model(**batch).loss + 0.1 * orthogonality_penalty(model)
        loss.backward()
        optimizer.step()
        allocator.step()  # after optimizer.step(), before zero_grad()
        optimizer.zero_grad()
    merge(model)  # plain nn.Linear layers again

To resume, make model, optimizer and allocator as at the start. Then load, in this order, with
load_adapter_state_dict(), optimizer.load_state_dict() and allocator.load_state_dict().

Sections, equations and tables are those of ElaLoRA (Chang et al. 2025, arXiv:2504.00254). P Lambda
Q and its regularizer are AdaLoRA's (arXiv:2303.10512), the scores are PLATON's (arXiv:2206.12562).
"Ours:" marks what this project decided where the paper is silent.

Name here       In the paper    Shape or type       Meaning
base_layer      W^(0)           (d1, d2)            frozen nn.Linear; d1 = d_out, d2 = d_in
P, Q            P, Q            (d1, r), (r, d2)    left and right singular vectors
Lambda          Lambda          (r,)                singular values, the diagonal of Lambda
I_bar, U_bar    I-bar, U-bar    as P, Lambda or Q   sensitivity and uncertainty per weight, eq. 3
importance      S_i             (r,)                score of every rank, eq. 2
progress        P               0 to 1              share of the search that is done, eq. 4
budget(t)       b^(t)           integer             ranks to prune and to add at step t, eq. 5
k               k               integer             ranks pruned plus added per matrix, at most
"""

import copy
import inspect
import json
import math
import re
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

RANK_DIM = {"P": 1, "Lambda": 0, "Q": 0}  # the dimension of each factor that counts ranks


# ==== The method ==================================================================================
# ---- Section 3.1: SVD-based low-rank adaptation ----
class SVDLinear(nn.Module):
    """A frozen linear layer and its low-rank update, y = W0 x + scaling P (Lambda * (Q x)).

    The base, of weight (d_out, d_in), is frozen. forward() only calls it, so a quantized or sharded
    nn.Linear works. Lambda starts at 0, and y has the dtype of the base's output. Ours: P and Q
    start orthonormal, so that R(P, Q) = 0. They are drawn rank by rank, so that a generator of the
    same seed gives a layer of more ranks the same first ones. All three factors start as float32,
    and casts of the model to a shorter type, such as model.bfloat16(), leave them so. scaling =
    alpha / rank is fixed at construction (inject: alpha / mean rank). Dropout acts on x before Q.

    Raises ValueError if base_layer is no nn.Linear, if rank is not an integer in
    1..min(d_out, d_in), or if alpha is not a positive number.
    """
    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float = 16.0, dropout: float = 0.0,
                 generator: torch.Generator | None = None):
        super().__init__()
        _check_layer(str(base_layer), base_layer, rank)
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be a positive number, got {alpha!r}")
        sizes = (base_layer.out_features, base_layer.in_features)
        drawn = [torch.randn(sum(sizes), dtype=torch.float64, device="cpu", generator=generator)
                 for _ in range(rank)]  # one by one, and on the CPU: a seed starts alike anywhere
        P, Q_T = (torch.linalg.qr(columns)[0].to(base_layer.weight.device, torch.float32)
                  for columns in torch.stack(drawn, dim=1).split(sizes))
        factors = (P.contiguous(), P.new_zeros(rank), Q_T.T.contiguous())
        self.P, self.Lambda, self.Q = map(nn.Parameter, factors)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("scaling", P.new_tensor(alpha / rank))
        self.steps = {"done": 0, "due": 0}  # RankAllocator's, shared: so far, until its search ends
        self.disabled = False  # by adapters_disabled()
        self.base_layer = base_layer.requires_grad_(False)

    @property
    def rank(self) -> int:
        """The present number of ranks, r."""
        return self.Lambda.numel()

    @property
    def max_rank(self) -> int:
        """The most ranks that the layer can have, min(d_out, d_in)."""
        return min(len(self.P), self.Q.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)  # (..., d_out)
        if self.disabled:
            return y
        h = nn.functional.linear(self.dropout(x).to(self.Q.dtype), self.Q)  # (..., r)
        h = (h * (self.scaling * self.Lambda)).to(y.dtype).reshape(-1, self.rank)
        P_T = self.P.T.contiguous().to(y.dtype)  # (r, d_out); contiguous for a fast backward
        with torch.autocast(y.device.type, enabled=False):  # all have y's dtype already
            return torch.addmm(y.reshape(-1, len(self.P)), h, P_T).view_as(y)  # y + h P'

    def delta_weight(self) -> Tensor:
        """The update of the weight, scaling P diag(Lambda) Q, (d_out, d_in)."""
        return (self.P * (self.scaling * self.Lambda)) @ self.Q

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def move(w: Tensor) -> Tensor:  # half precision is too coarse to train factors in
            moved = fn(w)
            return moved if moved.dtype.itemsize >= 4 else w.to(moved.device)
        for child in self.children() if recurse else ():
            child._apply(fn)
        return super()._apply(move, recurse=False)

    @torch.no_grad()
    def _load_from_state_dict(self, state: dict, prefix: str, *args) -> None:
        given = {f: state[prefix + f].shape for f in RANK_DIM if prefix + f in state}
        shapes = self._shapes(rank := given.get("Lambda", self.Lambda.shape).numel())
        if given == shapes and 1 <= rank <= self.max_rank:
            for factor, shape in shapes.items():  # so that load_state_dict() restores any rank
                if (w := getattr(self, factor)).shape != shape:
                    w.grad = None
                    w.set_(w.new_empty(shape))
        super()._load_from_state_dict(state, prefix, *args)  # refuses what does not fit

    def _shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {"P": (len(self.P), rank), "Lambda": (rank,), "Q": (rank, self.Q.shape[1])}


def inject(model: nn.Module, target_modules: Sequence[str], rank: int | Mapping[str, int],
           alpha: float = 16, dropout: float = 0, modules_to_save: Sequence[str] = ()) -> nn.Module:
    """Freezes a model and wraps the linear layers of the given names in SVDLinear; returns it.

    Names match by whole components from the right: "output.dense" matches "layer.0.output.dense",
    and "k" never matches "block". rank is that of every matrix, or a map from names to ranks such
    as RankAllocator.ranks(). The modules_to_save, such as a new head, are trained in full.

    Torch's seed and a module's name decide where its P and Q start. So runs of one seed are easily
    compared: other ranks or other targets do not change the start, nor what is drawn after it.

    Raises ValueError, before any change, if a name matches nothing, a target is no nn.Linear, lies
    in a saved module or shares its weight, the module around a target reads its weight instead of
    calling it, a rank is out of range, a map names other modules, or the model is adapted already.
    """
    if any(isinstance(module, SVDLinear) for module in model.modules()):
        raise ValueError("the model is adapted already; merge() it, or load it again")
    targets = _matching(model, target_modules, "target_modules")
    saved = _matching(model, modules_to_save, "modules_to_save")
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(targets, rank)
    if not targets or ranks.keys() != targets.keys():
        raise ValueError(f"no targets, or a rank map of others: {sorted(ranks.keys() ^ targets)}")
    trained = {w for module in saved.values() for w in module.parameters()}
    for name, module in targets.items():
        _check_layer(repr(name), module, ranks[name])
        if trained.intersection(module.parameters()):
            raise ValueError(f"{name!r} would be both adapted and saved; name it in one list only "
                             "(tied weights count as one)")
        _check_parent(model, name)
    seed = int(torch.randint(2**62, (), device="cpu"))
    own = {name: torch.Generator("cpu").manual_seed(seed ^ zlib.crc32(name.encode()))
           for name in targets}
    new = {m: SVDLinear(m, ranks[n], alpha, dropout, own[n]) for n, m in targets.items()}
    model.requires_grad_(False)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:  # wherever it stands, so that a shared layer stays shared
            new[module].scaling.fill_(alpha * len(ranks) / sum(ranks.values()))
            model.set_submodule(name, new[module])
    for module in saved.values():
        module.requires_grad_(True).elalora_saved = True  # outlives wrapping and renaming
    return model


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """R(P, Q) = |P'P - I|_F^2 + |QQ' - I|_F^2 (section 3.1), a scalar.

    Ours: it is the mean over the adapted matrices. Add it to the loss, weighted by 0.1.
    """
    layers, by_shape, R = _adapted(model).values(), {}, 0
    for rows in [factor for layer in layers for factor in (layer.P.T, layer.Q)]:  # (r, d)
        by_shape.setdefault(rows.shape, []).append(rows)
    with torch.autocast(rows.device.type, enabled=False):  # bfloat16 is too coarse for it
        for A in map(torch.stack, by_shape.values()):  # (n, r, d), few large operations
            R += (A @ A.mT - torch.eye(A.shape[1], device=A.device)).square().sum()
    return R / len(layers)


# ---- Section 3.2: importance scores ----
@torch.no_grad()
def update_averages(parameters: Sequence[Tensor], averages: Mapping[Tensor, Mapping[str, Tensor]],
                    beta1: float, beta2: float) -> None:
    """Eq. 1 and 3 for each parameter w, where averages[w] holds I_bar and U_bar, shaped as w.

        I = |w * w.grad|                                            eq. 1
        I_bar = beta1 * I_bar + (1 - beta1) * I                     eq. 3
        U_bar = beta2 * U_bar + (1 - beta2) * |I - I_bar|           eq. 3, with the new I_bar

    Algorithm 1 scores after the update: w is the new weight, w.grad the gradient at the old one.
    The _foreach_ functions compute that for all parameters at once.
    """
    gradients = [w.grad.float() for w in parameters]
    I = torch._foreach_abs(torch._foreach_mul([w.float() for w in parameters], gradients))
    I_bar, U_bar = ([averages[w][key] for w in parameters] for key in ("I_bar", "U_bar"))
    torch._foreach_lerp_(I_bar, I, 1 - beta1)
    torch._foreach_lerp_(U_bar, torch._foreach_abs(torch._foreach_sub(I, I_bar)), 1 - beta2)


# ---- Section 3.3: dynamic rank learning ----
def select(scores: Mapping[str, Sequence[float]], max_ranks: Mapping[str, int], k: int,
           b: int) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Steps 1 to 4 of section 3.3: which ranks each matrix loses, and how many it gains.

    scores has S_i of every rank by matrix. Returns matrix -> indices of the ranks to prune, and
    matrix -> number of ranks to add. For example, with room everywhere, k = 2 and b = 2:

        scores            A: 1, 5, 6        B: 2, 7        C: 9
        1. candidates     A: 1, 5           B: 2, 7        C: 9     the k lowest of each matrix
        2. sorted         1 (A), 2 (B), 5 (A), 7 (B), 9 (C)
        3. prune          1 (A), 2 (B)                              b from the front
        4. grow           C and B                                   b from the back, one rank each

    Ours: the last rank of a matrix cannot be pruned, but its score can win growth, as C's does. As
    many ranks are added as pruned: the most, up to b, that the candidates and max_ranks allow. A
    candidate is either pruned or retained, so losses plus gains of a matrix are at most k. Equal
    scores are ordered by matrix, then by index: pruning takes the earlier, growth the later.
    """
    candidates, prunable = [], []  # (score, position of the matrix, index of the rank, matrix)
    for position, (name, S) in enumerate(scores.items()):
        ascending = sorted((S[i], position, i, name) for i in range(len(S)))
        candidates += ascending[:k]  # step 1
        prunable += ascending[: min(k, len(S) - 1)]
    candidates, prunable = sorted(candidates), sorted(prunable)  # step 2
    ranks = {name: len(S) for name, S in scores.items()}
    for n in range(min(b, len(prunable)), 0, -1):  # fewer than b, if not so many can grow
        pruned = prunable[:n]  # step 3
        grown = _place_growth(candidates, pruned, ranks, max_ranks, n)  # step 4
        if len(grown) == n:
            indices: dict[str, list[int]] = {}
            for _, _, i, name in pruned:
                indices.setdefault(name, []).append(i)
            return {name: sorted(lost) for name, lost in indices.items()}, dict(Counter(grown))
    return {}, {}


def _place_growth(candidates: Sequence[tuple], pruned: Sequence[tuple], ranks: Mapping[str, int],
                  max_ranks: Mapping[str, int], n: int) -> list[str]:
    """The matrices of the n highest retained candidates with room for a rank; fewer if need be."""
    ranks, gone, grown = Counter(ranks), {*pruned}, []
    ranks.subtract(name for *_, name in pruned)
    for candidate in reversed(candidates):
        *_, name = candidate
        if candidate not in gone and ranks[name] < max_ranks[name] and len(grown) < n:
            ranks[name] += 1
            grown.append(name)
    return grown


def new_directions(present: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Algorithm 1's Gram-Schmidt: n random orthonormal columns, (d, n), orthogonal to the present
    ones, (d, r), whether or not these are orthonormal. n <= d - r. In float64 on the CPU."""
    random = torch.randn(len(present), n, dtype=torch.float64, device="cpu", generator=generator)
    orthonormal, _ = torch.linalg.qr(torch.cat([present.cpu().double(), random], dim=1))
    return orthonormal[:, present.shape[1] :].to(present)  # the first r columns span the present


@torch.no_grad()
def resize(layer: SVDLinear, keep: Sequence[int], n_new: int, generator: torch.Generator,
           states: Sequence[Mapping[Tensor, dict]]) -> None:
    """Keeps the given ranks of a layer, in that order, and appends n_new new ones.

    Ours: a new rank has a singular value of 0, so the output does not change, and a score of 0.
    Parameters stay the same objects. What states, such as optimizer.state, hold for a retained rank
    stays bit for bit; a new rank has zeros. Adam's step count stays as well, so its first updates
    of a new rank can be up to 6.6 times as long as usual (with the default betas).

    Raises ValueError, before any change, for ranks to keep that are none or not distinct, for too
    many new ones, or for a state of another shape than its parameter's.
    """
    if not 0 < len(keep) == len(set(keep)):
        raise ValueError(f"keep must have distinct ranks, and one at least, got {list(keep)}")
    _check_layer("the resized layer", layer.base_layer, len(keep) + n_new)
    factors = {getattr(layer, factor): dim for factor, dim in RANK_DIM.items()}
    slots = _state_slots(layer, states)
    index = torch.tensor(keep, device=layer.Lambda.device)
    new_P = new_directions(layer.P[:, index], n_new, generator)
    new_Q = new_directions(layer.Q[index].T, n_new, generator).T
    new = dict(zip(factors, (new_P, new_P.new_zeros(n_new), new_Q)))
    for w, state, key in slots:
        zeros = torch.zeros_like(new[w], dtype=state[key].dtype)
        state[key] = torch.cat([state[key].index_select(factors[w], index), zeros], factors[w])
    for w, dim in factors.items():
        w.grad = None  # of the old shape
        # Not through .data: the next backward would fail while an earlier graph still exists.
        w.set_(torch.cat([w.index_select(dim, index), new[w]], dim))


def _state_slots(layer: SVDLinear, states: Iterable[Mapping[Tensor, dict]]) -> list[tuple]:
    """(parameter, its state, key) of all that has to be resized with a layer."""
    slots = [(w, state[w], key) for w in (getattr(layer, factor) for factor in RANK_DIM)
             for state in states for key, value in state.get(w, {}).items()
             if getattr(value, "ndim", 0)]
    for w, state, key in slots:
        value = state[key]
        if type(value) is not Tensor or (value.shape, value.device) != (w.shape, w.device):
            raise ValueError(
                f"the optimizer's {key!r} is a {type(value).__name__} of shape {[*value.shape]} on "
                f"{value.device}, its parameter has {[*w.shape]} on {w.device}; use an optimizer "
                "whose state is plain tensors like their parameters, such as AdamW")
    return slots


# ---- Section 3.4: dynamic rank scheduler ----
SHAPES = {  # progress -> share of b
    "cubic": lambda progress: 1 - progress**3,  # eq. 5
    "linear": lambda progress: 1 - progress,
    "exponential": lambda progress: (
        (math.exp(-5 * progress) - math.exp(-5)) / (1 - math.exp(-5))),
    "constant": lambda progress: 1,
}


@dataclass(frozen=True)
class RankSchedule:
    """The three phases of section 3.3 and b^(t) of section 3.4, in optimizer steps.

    Raises ValueError if a number is out of range, or the phases do not fit into total_steps.
    """
    total_steps: int
    warmup_steps: int  # ranks stay as they are in these first ...
    stabilize_steps: int  # ... and in these last steps
    adjust_interval: int  # the first adjustment is at warmup_steps + adjust_interval
    b: int  # ranks that the first adjustments prune and add; 0: ranks never move
    shape: str = "cubic"

    def __post_init__(self) -> None:
        least = dict(total_steps=1, warmup_steps=0, stabilize_steps=0, adjust_interval=1, b=0)
        for name, minimum in least.items():
            if type(value := getattr(self, name)) is not int or value < minimum:
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
        """b^(t) = round(b (1 - progress^3)) at an adjustment (eq. 4 and 5), 0 at any other step."""
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

    The state of the optimizer must have the shapes of its parameters, as Adam's has. k is
    explained at select(), beta1 and beta2 at update_averages(). The seed decides new directions.
    Raises ValueError if a number is out of range, or if the optimizer lacks an adapter's weights.
    """
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: RankSchedule,
                 k: int, beta1: float = 0.85, beta2: float = 0.85, seed: int = 0):
        if not (type(k) is int and k >= 1 and 0 < beta1 < 1 and 0 < beta2 < 1):
            raise ValueError(f"k must be an integer >= 1 and betas in (0, 1), got {k!r}, {beta1!r}"
                             f" and {beta2!r}")
        self.layers, self.optimizer, self.schedule = _adapted(model), optimizer, schedule
        self.k, self.beta1, self.beta2 = k, beta1, beta2
        self.optimized = {w for group in optimizer.param_groups for w in group["params"]}
        self.factors = {_key(name, factor): getattr(layer, factor)
                        for name, layer in self.layers.items() for factor in RANK_DIM}
        self.averages = {}  # parameter -> name -> tensor, like optimizer.state
        _check_whole(self.optimized)
        for name, w in self.factors.items():
            if w.requires_grad and w not in self.optimized:
                raise ValueError(f"the optimizer does not hold {name!r}; make it after inject(), "
                                 "one for all adapters")
            self.averages[w] = {key: torch.zeros_like(w).float() for key in ("I_bar", "U_bar")}
        self.t, self.generator = 0, torch.Generator("cpu").manual_seed(seed)
        moves = (t for t in range(schedule.search_end, 0, -1) if schedule.budget(t))
        self.steps = {"done": 0, "due": next(moves, 0)}
        for layer in self.layers.values():
            layer.steps = self.steps  # so that merge() can tell of steps to come

    def step(self) -> Adjustment | None:
        """One iteration of Algorithm 1's loop; returns the adjustment, None where b^(t) = 0.

        Call it once per optimizer step, after optimizer.step() and before zero_grad(). Ours: a step
        with a gradient that is not finite changes no score, but it counts as a step, and ranks may
        move at it. A layer of which a factor is frozen keeps its ranks.

        Raises ValueError, before any change, if there is no gradient to score, if parameters were
        replaced, or if the optimizer's state cannot be resized. Warns if all gradients are 0, and
        when there are more steps than the schedule's total_steps.
        """
        if self.t == self.schedule.total_steps:
            warnings.warn(f"step() is called more often than total_steps = {self.t}; call it once "
                          "per optimizer step, not for every micro-batch", stacklevel=2)
        if self.t < self.schedule.search_end:  # from the first step, so that averages settle
            self._update_averages()
        self.t = self.steps["done"] = self.t + 1
        if (b := self.schedule.budget(self.t)) == 0:
            return None
        scores = {name: S.tolist() for name, S in self.importance().items()
                  if all(w.requires_grad and w in self.optimized
                         for w in self.layers[name].parameters(recurse=False))}
        max_ranks = {name: layer.max_rank for name, layer in self.layers.items()}
        pruned, expanded = select(scores, max_ranks, self.k, b)
        for name, layer in self.layers.items():
            if name in pruned or name in expanded:
                keep = [i for i in range(layer.rank) if i not in pruned.get(name, [])]
                resize(layer, keep, expanded.get(name, 0), self.generator,
                       (self.optimizer.state, self.averages))
        return Adjustment(self.t, b, pruned, expanded)

    def _update_averages(self) -> None:
        scored = [w for w in self.factors.values() if w.grad is not None]
        if not scored or self.t == 0 or self.schedule.budget(self.t + 1):  # an adjustment is next
            self._check()
        if not scored:
            raise ValueError(
                "no gradients: call step() after optimizer.step() and before zero_grad()")
        self._check_averages()
        gradients = [w.grad for w in self.optimized if w.grad is not None]
        norms = torch._foreach_norm(gradients, math.inf)
        largest = torch.stack([norm.to(norms[0].device) for norm in norms]).max().item()
        if largest == 0:
            warnings.warn("all gradients are 0: call step() before zero_grad()", stacklevel=3)
        if math.isfinite(largest):
            update_averages(scored, self.averages, self.beta1, self.beta2)

    def _check_averages(self) -> None:
        if any(average["I_bar"].shape != w.shape for w, average in self.averages.items()):
            raise ValueError("ranks were loaded, but not the allocator's own load_state_dict()")

    def _check(self) -> None:
        """Of all layers, before any of them is resized."""
        for name, layer in self.layers.items():
            if any(self.factors[_key(name, f)] is not getattr(layer, f) for f in RANK_DIM):
                raise ValueError(f"the parameters of {name!r} were replaced, as assign=True does "
                                 "when loading; make optimizer and allocator after that")
            _state_slots(layer, [self.optimizer.state])

    def importance(self) -> dict[str, Tensor]:
        """Module name -> S_i = s(Lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij), (rank,), float32.

        Raises ValueError if ranks were loaded without load_state_dict().
        """
        self._check_averages()
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
        """Restores state_dict(), once load_adapter_state_dict() has restored the ranks.

        Raises ValueError, before any change, if modules or ranks differ.
        """
        given = {(name, key): average.shape for name, averages in state["averages"].items()
                 for key, average in averages.items()}
        needed = {(name, key): w.shape for name, w in self.factors.items()
                  for key in ("I_bar", "U_bar")}
        if wrong := sorted(dict(given.items() ^ needed.items())):
            raise ValueError(f"{wrong[0][0]!r} does not fit; call load_adapter_state_dict() first")
        self.generator.set_state(state["generator"].cpu())
        self.t = self.steps["done"] = state["step"]
        for name, w in self.factors.items():
            saved = state["averages"][name]
            self.averages[w] = {key: saved[key].to(w.device, copy=True) for key in saved}


# ==== Around the method: merging, saving, exporting, checks =======================================
@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Adds every update to its base weight, puts the frozen nn.Linear back; returns the model.

    Raises ValueError, before any change, if a weight is no plain floating-point matrix, but
    quantized, sharded or parametrized.
    """
    layers = _adapted(model)
    _warn_if_unfinished(layers)
    for name, layer in layers.items():
        weight = layer.base_layer._parameters.get("weight")  # weight_norm() takes it out of there
        if (type(weight) is not nn.Parameter or weight.shape != (len(layer.P), layer.Q.shape[1])
                or not weight.is_floating_point() or weight.element_size() < 2):  # scaled float8
            raise ValueError(f"{name!r} has a weight that is quantized, sharded or parametrized: "
                             "make it a plain one (dequantize it) before merging")
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
    own = {_key(name, key) for name in _adapted(model) for key in (*RANK_DIM, "scaling")}
    saved = tuple(f"{n}." for n, m in model.named_modules() if hasattr(m, "elalora_saved"))
    state = {key: value.clone() for key, value in model.state_dict().items()
             if key in own or key.startswith(saved)}
    _check_whole(state.values())
    return state


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the adapted layers compute as their bases, such as for DPO's reference model.

    The modules_to_save stay as they were trained.
    """
    before = {layer: layer.disabled for layer in _adapted(model).values()}
    try:
        for layer in before:
            layer.disabled = True
        yield model
    finally:
        for layer, disabled in before.items():
            layer.disabled = disabled


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restores adapter_state_dict() into a model with the same modules injected, at any ranks.

    Raises ValueError, before any change, if a tensor is missing, unknown or has a wrong shape.
    """
    layers, present = _adapted(model), adapter_state_dict(model)
    if wrong := sorted(present.keys() ^ state.keys()):
        raise ValueError(f"missing in the state, or unknown to the model: {', '.join(wrong[:8])}")
    shapes = {key: tuple(value.shape) for key, value in present.items()}
    for name, layer in layers.items():
        rank = state[_key(name, "Lambda")].numel()
        _check_layer(repr(name), layer.base_layer, rank)
        shapes |= {_key(name, factor): shape for factor, shape in layer._shapes(rank).items()}
    for key, shape in shapes.items():
        if state[key].shape != shape:
            raise ValueError(f"{key} has shape {list(state[key].shape)}, the model needs "
                             f"{list(shape)}")
    model.load_state_dict(state, strict=False)


@torch.no_grad()
def export_peft(model: nn.Module, directory: str | Path, base_model_name: str) -> None:
    """Writes a LoRA adapter that peft.PeftModel.from_pretrained(base, directory) loads.

    A is Q, B is P diag(Lambda), and alpha is scaling times rank. PEFT takes any module for a saved
    one whose name ends like a saved one's: all of these are written in whole. Needs safetensors.
    Raises ValueError for a layer that PEFT cannot name.
    """
    from safetensors.torch import save_file
    layers, modules = _adapted(model), dict(model.named_modules(remove_duplicate=False))
    _warn_if_unfinished(layers)
    saved = [name for name, module in modules.items() if hasattr(module, "elalora_saved")]
    trained = {w for name in saved for w in modules[name].parameters()}
    saved += [name for name, module in modules.items()  # the other ends of tied weights
              if trained.intersection(module.parameters(recurse=False))
              and not f"{name}.".startswith(tuple(f"{s}." for s in saved))]
    whole = [name for name in modules if name.endswith(tuple(saved))]
    lora = {n: m for n, m in layers.items() if not any(f"{n}.".startswith(f"{w}.") for w in whole)}
    if not lora or [n for n, m in modules.items() if n and isinstance(m, SVDLinear)] != [*layers]:
        raise ValueError("PEFT cannot name a layer: it stands in two places, or its name ends like "
                         "a saved module's")
    with warnings.catch_warnings(action="ignore"):  # already warned above
        source = model if lora == layers else merge(copy.deepcopy(model))
    tensors = {f"{name}.lora_A.weight": layer.Q for name, layer in lora.items()}
    tensors |= {f"{name}.lora_B.weight": layer.P * layer.Lambda for name, layer in lora.items()}
    for name in whole:
        tensors |= source.get_submodule(name).state_dict(prefix=f"{name}.")
    ranks = {f"^{re.escape(name)}": layer.rank for name, layer in lora.items()}
    alphas = {f"^{re.escape(n)}": layer.rank * layer.scaling.item() for n, layer in lora.items()}
    kind = next(c for c in type(model).__mro__ if "torch.distributed" not in c.__module__)  # FSDP's
    auto = dict(base_model_class=kind.__name__, parent_library=kind.__module__)
    config = dict(
        peft_type="LORA", base_model_name_or_path=base_model_name, modules_to_save=saved,
        auto_mapping=auto,  # for PEFT's AutoPeftModel classes
        target_modules="|".join(map(re.escape, lora)), r=max(ranks.values()), rank_pattern=ranks,
        lora_alpha=max(alphas.values()), alpha_pattern=alphas)
    (folder := Path(directory)).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:  # several processes may export at once
        save_file({f"base_model.model.{key}": tensor.clone(memory_format=torch.contiguous_format)
                   for key, tensor in tensors.items()}, f"{own}/adapter_model.safetensors")
        Path(own, "adapter_config.json").write_text(json.dumps(config, indent=1))
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            Path(own, file).replace(folder / file)


def _adapted(model: nn.Module) -> dict[str, SVDLinear]:
    layers = {n: module for n, module in model.named_modules() if isinstance(module, SVDLinear)}
    if not layers:
        raise ValueError("the model has no SVDLinear; call inject(model, ...) first")
    for name, layer in layers.items():
        _check_layer(repr(name), layer.base_layer, layer.rank)
    _check_whole(layer.P for layer in layers.values())
    return layers


def _key(name: str, factor: str) -> str:
    return f"{name}.{factor}" if name else factor  # no name: the model itself is an SVDLinear


def _matching(model: nn.Module, names: Sequence[str], argument: str) -> dict[str, nn.Module]:
    if isinstance(names, str):
        raise ValueError(f"{argument} must be a list of names, got the string {names!r}")
    modules, found = dict(model.named_modules()), set()
    for wanted in names:
        if not (matches := {n for n in modules if n and f".{n}".endswith(f".{wanted}")}):
            ends = {n.rpartition(".")[2] for n in modules if isinstance(modules[n], nn.Linear)}
            raise ValueError(f"{argument}: {wanted!r} matches no module (it is a name, no pattern);"
                             f" linear layers end in {', '.join(sorted(ends)[:12])}")
        found |= matches
    return {name: module for name, module in modules.items() if name in found}


def _check_layer(name: str, layer: nn.Module, rank: int) -> None:
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} must be an nn.Linear, not a {type(layer).__name__}")
    if layer.weight.dim() != 2:
        raise ValueError(f"{name} is in flat shards (FSDP 1, ZeRO-3); use FSDP 2: "
                         "fully_shard(module, ignored_params=what is trained)")
    limit = min(layer.out_features, layer.in_features)
    if type(rank) is not int or not 1 <= rank <= limit:  # bools are rejected too
        raise ValueError(f"the rank of {name} must be an integer in 1..{limit}, got {rank!r}")


def _check_whole(trained: Iterable[Tensor]) -> None:
    if any(hasattr(w, "to_local") for w in trained):  # a DTensor
        raise ValueError("a trained parameter is sharded; shard what is frozen alone: "
                         "fully_shard(module, ignored_params=what is trained)")


def _check_parent(model: nn.Module, name: str) -> None:
    """Looks into the source code of the module around the layer."""
    path, _, child = name.rpartition(".")
    parent = type(model.get_submodule(path))
    try:
        source = inspect.getsource(parent.forward)
    except (OSError, TypeError):  # there is none, as in an interactive session
        return
    if re.search(rf"\bself\.{child}\.weight\b", source):  # MultiheadAttention's out_proj, T5's wo
        raise ValueError(f"{name!r} cannot be adapted: {parent.__name__}.forward() reads its "
                         "weight, and would not use the adapter")


def _warn_if_unfinished(layers: Mapping[str, SVDLinear]) -> None:
    steps = max((layer.steps for layer in layers.values()), key=lambda steps: steps["done"])
    if steps["done"] < steps["due"]:
        warnings.warn("ranks were to move until step {due}, but RankAllocator.step() was called "
                      "{done} times".format(**steps), stacklevel=4)
