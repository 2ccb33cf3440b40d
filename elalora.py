# SPDX-License-Identifier: MIT
# elalora.py 2.0, a reference implementation of ElaLoRA (unofficial). Copy this file, it is enough.
"""ElaLoRA in one file: low-rank adapters whose ranks move to the matrices that need them.

A frozen weight W0 is fine-tuned through W = W0 + scaling P diag(Lambda) Q. A rank is a column of P,
its singular value in Lambda, and its row of Q. Its score is the smoothed sensitivity of the loss to
these weights, times the uncertainty of that sensitivity. At scheduled steps the b ranks with the
lowest scores are pruned, in whichever matrices they are. As many new ranks go to the matrices whose
weakest ranks have the highest scores. So the sum of all ranks never changes.

    inject(model, target_modules=["query", "value"], rank=2, modules_to_save=["head"])
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-4, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=1740)
    schedule = RankSchedule(
        total_steps=1740, warmup_steps=300, stabilize_steps=400, adjust_interval=50, b=2)
    allocator = RankAllocator(model, optimizer, schedule, k=1)
    for batch in loader:
        loss = model(**batch).loss + 0.1 * orthogonality_penalty(model)
        loss.backward()
        optimizer.step()
        allocator.step()  # after optimizer.step(), before zero_grad()
        scheduler.step()
        optimizer.zero_grad()
    merge(model)  # plain nn.Linear layers again

Sections, equations and tables are those of ElaLoRA (Chang et al. 2025, arXiv:2504.00254). P Lambda
Q and its regularizer are AdaLoRA's (arXiv:2303.10512), the scores are PLATON's (arXiv:2206.12562).
"Ours:" marks what this project decided where the paper is silent. The file depends only on torch
(>= 2.11) and Python >= 3.11; export_peft also needs safetensors.

Name here       In the paper    Shape or type       Meaning
base_layer      W^(0)           (d_out, d_in)       frozen nn.Linear; d1 and d2 in the paper
P               P               (d_out, r)          left singular vectors
Q               Q               (r, d_in)           right singular vectors
Lambda          Lambda          (r,)                singular values, the diagonal of Lambda
I_bar, U_bar    I-bar, U-bar    as P, Lambda or Q   sensitivity and uncertainty per weight, eq. 3
importance      S_i             (r,)                score of every rank, eq. 2
progress        P of eq. 4      0 to 1              share of the search that is done
budget(t)       b^(t)           integer             ranks to prune and to add at step t, eq. 5
k               k               integer             ranks pruned plus added per matrix, at most
"""

import json
import math
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

RANK_DIM = {"P": 1, "Lambda": 0, "Q": 0}  # the dimension of each factor that counts ranks


# ---- Section 3.1: SVD-based low-rank adaptation ----
class SVDLinear(nn.Module):
    """A frozen linear layer and its low-rank update, y = W0 x + bias + scaling P (Lambda * (Q x)).

    Ours: P and Q start orthonormal, so R(P, Q) = 0. Lambda starts at 0, and so does the update.
    scaling is alpha / rank, or after inject() alpha / mean rank. It stays the same when ranks move.
    Dropout acts on x before Q. weight (W0 and its update) and bias can be read, as those of a
    linear layer; they are defined below. Raises ValueError if base_layer is not a linear layer, if
    rank is not an integer in 1..min(d_out, d_in), or if alpha or dropout is out of range.
    """
    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float = 16.0, dropout: float = 0.0,
                 generator: torch.Generator | None = None):
        super().__init__()
        _check_layer("base_layer", base_layer, rank, alpha, dropout)
        device = base_layer.weight.device
        d_out, d_in = _sizes(base_layer)
        no_P = torch.empty(d_out, 0, dtype=torch.float32, device="cpu")  # begin with no ranks
        no_Q = no_P.new_empty(0, d_in)
        P, Q = new_directions(no_P, no_Q, rank, generator)
        self.P = nn.Parameter(P.contiguous().to(device))  # (d_out, r)
        self.Lambda = nn.Parameter(self.P.new_zeros(rank))  # (r,)
        self.Q = nn.Parameter(Q.contiguous().to(device))  # (r, d_in)
        self.register_buffer("scaling", self.P.new_tensor(alpha / rank))
        self.max_rank = min(d_out, d_in)
        self.dropout = nn.Dropout(dropout)
        self.base_layer = base_layer.requires_grad_(False)
        self.disabled = False  # see adapters_disabled()
        self.register_load_state_dict_pre_hook(_resize_to_load)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)  # (..., d_out)
        if self.disabled:
            return y
        h = nn.functional.linear(self.dropout(x).to(self.Q.dtype), self.Q)  # (..., r)
        h = (h * (self.scaling * self.Lambda)).to(y.dtype)  # (..., r)
        return _add_product(y, h, self.P)  # y + h @ P.T, but faster; (..., d_out)

    def delta_weight(self) -> Tensor:
        """The update of the weight, scaling P diag(Lambda) Q, (d_out, d_in)."""
        return (self.P * (self.scaling * self.Lambda)) @ self.Q

    @property
    def rank(self) -> int:
        """The present number of ranks, r."""
        return len(self.Lambda)


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """R(P, Q) = |P'P - I|_F^2 + |QQ' - I|_F^2 (section 3.1), a scalar.

    Ours: it is the mean over the adapted matrices. Add it to the loss, weighted by 0.1.
    """
    layers = _adapted(model)
    same_shape = defaultdict(list)  # few large operations are faster than many small ones
    for layer in layers.values():
        for rows in (layer.P.mT, layer.Q):  # (r, d), to be orthonormal
            same_shape[rows.shape, rows.device].append(rows)
    R = []
    for (shape, device), group in same_shape.items():
        A = torch.stack(group)  # (n, r, d)
        identity = torch.eye(shape[0], device=device)  # (r, r)
        with torch.autocast(device.type, enabled=False):  # bfloat16 is too coarse here
            gram = A @ A.mT  # (n, r, r)
        R.append((gram - identity).square().sum())
    return sum(x.to(R[0].device) for x in R) / len(layers)


# ---- Section 3.2: importance scores ----
def update_averages(w: Tensor, gradient: Tensor, I_bar: Tensor, U_bar: Tensor, beta1: float,
                    beta2: float) -> tuple[Tensor, Tensor]:
    """Eq. 1 and 3: the next I_bar and U_bar of weights w; all have the shape of w.

    Algorithm 1 scores after the update: w is the new weight, the gradient is that at the old one.
    """
    I = (w * gradient).abs()  # eq. 1
    I_bar = beta1 * I_bar + (1 - beta1) * I  # eq. 3
    U_bar = beta2 * U_bar + (1 - beta2) * (I - I_bar).abs()  # eq. 3, with the new I_bar
    return I_bar, U_bar


# ---- Section 3.3: dynamic rank learning ----
class Candidate(NamedTuple):
    """One of the k lowest ranks of a matrix. Sorts by score, then position, then index."""
    score: float
    position: int  # of the matrix in the model
    index: int  # of the rank in the matrix
    name: str  # of the matrix


def select(scores: Mapping[str, Sequence[float]], max_ranks: Mapping[str, int], k: int, b: int,
           min_rank: int = 1) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Steps 1 to 4 of section 3.3: which ranks each matrix loses, and how many it gains.

    scores has S_i of every rank by matrix. Returns matrix -> indices of the ranks to prune, and
    matrix -> number of ranks to add. For example, with room everywhere, k = 2 and b = 2:

        scores            A: 1, 5, 6        B: 2, 7        C: 9
        1. candidates     A: 1, 5           B: 2, 7        C: 9     the k lowest of each matrix
        2. sorted         1 (A), 2 (B), 5 (A), 7 (B), 9 (C)
        3. prune          1 (A), 2 (B)                              b from the front
        4. grow           C and B (which swaps one)                 b from the back, one rank each

    A candidate is pruned, or wins its matrix one rank, or neither. So losses and gains of a matrix
    are at most k together. Ours: candidates that min_rank keeps from being pruned can still win. No
    matrix grows beyond max_ranks. If b moves are impossible, as many as are possible are made. Of
    equal scores, pruning takes the first in the model, and growth the last.
    """
    candidates: list[Candidate] = []
    prunable: list[Candidate] = []
    for position, (name, S) in enumerate(scores.items()):
        ascending = sorted(Candidate(S_i, position, i, name) for i, S_i in enumerate(S))
        candidates += ascending[:k]  # step 1
        prunable += ascending[: min(k, max(0, len(S) - min_rank))]  # leaves min_rank
    candidates.sort()  # step 2
    prunable.sort()
    for n in range(min(b, len(prunable)), 0, -1):  # the largest n with room for n ranks
        pruned = prunable[:n]  # step 3
        ranks = Counter({name: len(S) for name, S in scores.items()})
        ranks.subtract(candidate.name for candidate in pruned)
        grown: list[str] = []
        for candidate in reversed(candidates):  # step 4
            name = candidate.name
            if len(grown) < n and candidate not in pruned and ranks[name] < max_ranks[name]:
                grown.append(name)
                ranks[name] += 1
        if len(grown) == n:
            indices = defaultdict(list)
            for candidate in sorted(pruned, key=lambda candidate: candidate.index):
                indices[candidate.name].append(candidate.index)
            return dict(indices), dict(Counter(grown))
    return {}, {}


def new_directions(P: Tensor, Q: Tensor, n: int, generator: torch.Generator | None
                   ) -> tuple[Tensor, Tensor]:
    """n columns to append to P (d_out, r), and n rows to append to Q (r, d_in).

    Drawn on the CPU, rank by rank: what is drawn for a rank depends neither on n nor on the device.
    """
    if n == 0:
        return P[:, :0], Q[:0]
    sizes = [len(P), Q.shape[1]]  # d_out, d_in
    drawn = [torch.randn(sum(sizes), dtype=torch.float64, device="cpu", generator=generator)
             for _ in range(n)]
    for_P, for_Q = torch.stack(drawn, dim=1).split(sizes)  # (d_out, n), (d_in, n)
    return gram_schmidt(P, for_P), gram_schmidt(Q.T, for_Q).T


def gram_schmidt(present: Tensor, drawn: Tensor) -> Tensor:
    """Algorithm 1's Gram-Schmidt, by QR: makes the drawn columns (d, n) orthonormal, and orthogonal
    to the present ones (d, r), whether or not these are orthonormal. r + n <= d."""
    device = "cpu" if present.device.type == "mps" else present.device  # MPS has no float64
    drawn = drawn.to(device, non_blocking=True)
    columns = torch.cat([present.to(device, torch.float64), drawn], dim=1)  # (d, r + n)
    orthonormal, _ = torch.linalg.qr(columns)  # (d, r + n); the first r span the present columns
    return orthonormal[:, present.shape[1] :].to(present)


@torch.no_grad()
def resize(layer: SVDLinear, keep: Sequence[int], n_new: int, generator: torch.Generator | None,
           states: Mapping[Tensor, dict]) -> None:
    """Keeps the given ranks of a layer, in that order, and appends n_new new ones.

    Ours: a new rank has a singular value of 0, so the output does not change. Parameters stay the
    same objects. In states (optimizer.state, or {}) kept ranks keep their entries, new ranks get 0.
    Adam's step count stays, so the first updates of a new rank can be longer than usual: with its
    default betas at most 0.1 / (0.001 (1 - 0.9^2 / 0.999))^0.5 = 7.3 learning rates. Raises
    ValueError, before any change, if keep is empty or not distinct, or if there is no room.
    """
    _check_resize(layer, keep, n_new)
    kept = {factor: _take(getattr(layer, factor), keep, dim) for factor, dim in RANK_DIM.items()}
    new_P, new_Q = new_directions(kept["P"], kept["Q"], n_new, generator)
    new = {"P": new_P, "Lambda": layer.Lambda.new_zeros(n_new), "Q": new_Q}
    for factor, dim in RANK_DIM.items():
        w = getattr(layer, factor)
        state = states.get(w, {})
        for key in _keys_per_weight(state):  # I_bar, U_bar, Adam's moments
            zeros = torch.zeros_like(new[factor], dtype=state[key].dtype)
            state[key] = torch.cat([_take(state[key], keep, dim), zeros], dim)
        w.grad = None  # of the old shape
        # w.data = ... would make the next backward() fail while an earlier graph is alive.
        w.set_(torch.cat([kept[factor], new[factor]], dim))


# ---- Section 3.4: dynamic rank scheduler ----
SHAPES = {  # progress -> share of b
    "cubic": lambda p: 1 - p**3,  # eq. 5
    "linear": lambda p: 1 - p,
    "exponential": lambda p: (math.exp(-5 * p) - math.exp(-5)) / (1 - math.exp(-5)),
    "constant": lambda p: 1,  # section 4.7: no scheduler
}


@dataclass(frozen=True)
class RankSchedule:
    """Warm-up, search and stabilization (section 3.3), and b^(t) (section 3.4), in optimizer steps.

    The search is the paper's dynamic rank adjustment. Raises ValueError if a number is out of
    range, or if the phases do not fit into total_steps.
    """
    total_steps: int
    warmup_steps: int  # the first steps, in which ranks stay as they are
    stabilize_steps: int  # the last steps, in which ranks stay as they are
    adjust_interval: int  # the first adjustment is at warmup_steps + adjust_interval
    b: int  # b^(t) falls from here to 0; with b = 0 ranks never move
    shape: str = "cubic"

    def __post_init__(self) -> None:
        _check_schedule(self)

    @property
    def search_end(self) -> int:
        """The last step of the search."""
        return self.total_steps - self.stabilize_steps

    def budget(self, step: int) -> int:
        """b^(t) = round(b (1 - progress^3)) at an adjustment (eq. 4 and 5), 0 at any other step."""
        searched = step - self.warmup_steps
        if searched <= 0 or step > self.search_end or searched % self.adjust_interval:
            return 0
        progress = Fraction(searched, self.search_end - self.warmup_steps)  # eq. 4, exact
        return round(self.b * SHAPES[self.shape](progress))  # eq. 5; Python rounds halves to even


# ---- Algorithm 1 ----
@dataclass(frozen=True)
class Adjustment:
    """What one adjustment did."""
    step: int
    b: int  # b^(t); fewer ranks are moved if select() finds no more
    pruned: dict[str, list[int]]  # module name -> indices that the removed ranks had
    expanded: dict[str, int]  # module name -> number of ranks added
    scores: dict[str, list[float]]  # module name -> S_i of every rank, before the adjustment


class RankAllocator:
    """Algorithm 1: moves ranks between the matrices of an injected model while it trains.

    optimizer.state_dict() has the step, I_bar and U_bar. To resume, load the model's state (it sets
    the ranks), then the optimizer's. The betas are those of update_averages(), k and min_rank those
    of select(). A layer with a frozen factor keeps its ranks. Raises ValueError if a number is out
    of range, if the optimizer lacks weights of an adapter, or if a factor is coarser than float32.
    """
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: RankSchedule,
                 k: int, beta1: float = 0.85, beta2: float = 0.85, seed: int = 0,
                 min_rank: int = 1):
        self.layers = _adapted(model)  # module name -> SVDLinear
        self.optimizer, self.schedule, self.k = optimizer, schedule, k
        self.beta1, self.beta2, self.seed, self.min_rank = beta1, beta2, seed, min_rank
        _check_allocator(self)

    @property
    def t(self) -> int:
        """The number of steps so far."""
        return self.optimizer.param_groups[0].get("elalora_step", 0)

    def step(self) -> Adjustment | None:
        """One iteration of Algorithm 1's loop; returns the adjustment, None where b^(t) = 0.

        Call it once per optimizer step, after optimizer.step() and before zero_grad(). After an
        adjustment, wrap the model anew in DistributedDataParallel, or gradients are not averaged.
        Ours: a step whose gradient is not finite is counted, but changes no score. Raises
        ValueError, before any rank moves, if the loss reaches no adapter, if all scores are 0, if
        parameters were replaced, or if the optimizer's state cannot be resized. Warns if the loss
        misses an adapter.
        """
        _check_step(self)
        t = self.t + 1
        self.optimizer.param_groups[0]["elalora_step"] = t
        if t <= self.schedule.search_end:
            _update_states(self)  # update_averages() of every factor with a gradient
        b = self.schedule.budget(t)
        if b == 0:
            return None
        scores = _scores_on_host(self)  # S_i if no factor is frozen; the only wait for the device
        max_ranks = {name: self.layers[name].max_rank for name in scores}
        pruned, expanded = select(scores, max_ranks, self.k, b, self.min_rank)
        for name, layer in self.layers.items():
            if name in pruned or name in expanded:
                keep = [i for i in range(layer.rank) if i not in pruned.get(name, [])]
                own_seed = zlib.crc32(f"{self.seed} {t} {name}".encode())
                generator = torch.Generator("cpu").manual_seed(own_seed)
                resize(layer, keep, expanded.get(name, 0), generator, self.optimizer.state)
        return Adjustment(t, b, pruned, expanded, scores)

    def importance(self) -> dict[str, Tensor]:
        """Module name -> S_i = s(Lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij), (rank,).

        s = I_bar * U_bar: a weight whose use is uncertain is not pruned early (PLATON).
        """
        S = {}
        for name, layer in self.layers.items():
            s = {}
            for factor in RANK_DIM:
                I_bar, U_bar = _averages(self.optimizer, getattr(layer, factor))  # shaped as factor
                s[factor] = I_bar * U_bar  # eq. 3
            S[name] = s["Lambda"] + s["P"].mean(dim=0) + s["Q"].mean(dim=1)  # eq. 2
        return S

    def ranks(self) -> dict[str, int]:
        """Module name -> present rank, a map that inject() takes."""
        return {name: layer.rank for name, layer in self.layers.items()}


# ==== You may stop reading here: what follows is around the method ================================


# ---- Adapting and merging a model ----
def inject(model: nn.Module, target_modules: Sequence[str], rank: int | Mapping[str, int],
           alpha: float = 16.0, dropout: float = 0.0, modules_to_save: Sequence[str] = ()
           ) -> nn.Module:
    """Freezes a model and wraps the linear layers of the given names in SVDLinear; returns it.

    Names match by whole components from the right: "output.dense" matches "layer.0.output.dense",
    and "k" never matches "block". rank is that of every matrix, or a map from names to ranks such
    as RankAllocator.ranks(). The modules_to_save, such as a new head, are trained in full. Cast the
    model, and add tokens to it, before inject(). Torch's seed and a module's name decide where its
    P and Q start, whichever other matrices are adapted. Warns if the model has stacked experts.

    Raises ValueError, before any change, if a name matches nothing, if a target is not a linear
    layer, lies in a saved module or shares its weight, if a number is out of range, if the rank map
    names other modules, or if the model has adapters already.
    """
    inner = _unwrapped(model)
    _warn_of_experts(inner)
    targets = _matching(inner, target_modules, "target_modules")
    saved = _matching(inner, modules_to_save, "modules_to_save")
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(targets, rank)
    _check_injection(inner, targets, saved, ranks)
    seed = int(torch.randint(2**62, (), device="cpu"))
    layers: dict[nn.Module, SVDLinear] = {}
    for name, base_layer in targets.items():
        generator = torch.Generator("cpu").manual_seed(seed ^ zlib.crc32(name.encode()))
        layer = SVDLinear(base_layer, ranks[name], alpha, dropout, generator)
        layer.scaling.fill_(alpha * len(ranks) / sum(ranks.values()))
        layer.train(base_layer.training)
        layers[base_layer] = layer
    inner.requires_grad_(False)
    for name, module in list(inner.named_modules(remove_duplicate=False)):
        if module in layers:  # in every place where it stands
            inner.set_submodule(name, layers[module])
    for module in saved.values():
        module.requires_grad_(True)
    return model


def parameter_groups(model: nn.Module, lr: float, lambda_rate: float | None = None
                     ) -> list[dict]:
    """Groups for an optimizer: all that is trained, with a learning rate of lambda_rate * lr for
    Lambda and of lr for the rest.

    Ours: Lambda starts at 0, and with one rate it is slow in wide matrices. By default lambda_rate
    is (d_out / 32)^0.5 of each matrix, but at least 1: a rule for short runs. There the best was 1
    to 2 at a width of 64, and 3 to 10 at 384. In longer runs, of 1,740 steps, 1 did as well. The
    paper has one rate: lambda_rate = 1. Raises ValueError if lambda_rate is not positive.
    """
    _require(lambda_rate is None or 0 < lambda_rate < math.inf,
             f"lambda_rate must be a positive number, got {lambda_rate!r}")
    rates = {}
    for layer in _adapted(model).values():
        rates[layer.Lambda] = lambda_rate or max(1.0, math.sqrt(len(layer.P) / 32))
    groups = defaultdict(list)
    for w in model.parameters():
        if w.requires_grad:
            groups[lr * rates.get(w, 1)].append(w)
    return [dict(params=weights, lr=rate) for rate, weights in groups.items()]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block, adapted layers compute what their base layers do, as DPO's reference does.
    Whatever else was trained stays as it is."""
    enabled = [layer for layer in _adapted(model).values() if not layer.disabled]
    for layer in enabled:
        layer.disabled = True
    try:
        yield model
    finally:
        for layer in enabled:
            layer.disabled = False


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Adds every update to its base weight, puts the frozen base layer back; returns the model.

    Raises ValueError, before any change, if a weight is not a plain floating-point matrix.
    """
    layers = _adapted(model)
    for name, layer in layers.items():
        _require(_is_plain(layer), f"the weight of {name!r} is quantized, sharded, "
                 "parametrized or on the meta device; make it a plain one before merging")
    for layer in layers.values():
        base = layer.base_layer
        delta = _turned(base, layer.delta_weight())
        merged = (base.weight + delta).to(base.weight.dtype)
        merged = torch.where(delta == 0, base.weight, merged)  # -0.0 + 0.0 would be 0.0
        base.weight = nn.Parameter(merged, False)  # a new one: others may hold the old one
    inner = _unwrapped(model)
    for name, module in list(inner.named_modules(remove_duplicate=False)):
        if isinstance(module, SVDLinear) and name:
            inner.set_submodule(name, module.base_layer)
    return model.base_layer if isinstance(model, SVDLinear) else model


# ---- Saving, loading, exporting ----
def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all that training changes: the factors and their scaling, whatever else is trained,
    and the running statistics of batch norms. Names are those of the model inside its wrappers."""
    return {key: x.clone() for key, x in _changed_by_training(_unwrapped(model)).items()}


def _changed_by_training(inner: nn.Module) -> dict[str, Tensor]:
    """What adapter_state_dict() copies."""
    changed = [f"{name}.{part}" for name in _adapted(inner) for part in (*RANK_DIM, "scaling")]
    changed += [name for name, w in inner.named_parameters(remove_duplicate=False)
                if w.requires_grad]
    for name, module in inner.named_modules(remove_duplicate=False):
        trained = [w.requires_grad for w in module.parameters()]
        moves = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        if moves or trained and all(trained):
            changed.append(name)  # with its buffers
    changed = {_plain_name(name) for name in changed}
    state = {_plain_name(key): x for key, x in inner.state_dict().items()}
    state = {key: x for key, x in state.items() if _is_in(key, changed)}
    _check_whole(state.values())
    return state


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restores adapter_state_dict() into a model with the same modules injected, at any ranks.

    What this model has frozen is loaded, too, and stays frozen. Raises ValueError, and leaves the
    model as it was, if a tensor is missing, unknown or has a wrong shape.
    """
    inner = _unwrapped(model)
    own = inner.state_dict()
    known = {_plain_name(key) for key in own}
    wrong = (_changed_by_training(inner).keys() - state.keys()) | (state.keys() - known)
    _require(not wrong, f"missing in the state, or unknown to the model: {sorted(wrong)[:8]}")
    before = {key: x.clone() for key, x in own.items() if _plain_name(key) in state}
    try:
        inner.load_state_dict({key: state[_plain_name(key)] for key in before}, strict=False)
    except RuntimeError as error:
        inner.load_state_dict(before, strict=False)
        raise ValueError(f"the state does not fit the model: {error}") from error


@torch.no_grad()
def _resize_to_load(layer: SVDLinear, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Lets load_state_dict() restore any rank. Torch then refuses what does not fit."""
    given = {f: state[prefix + f].shape for f in RANK_DIM if prefix + f in state}
    rank = given["Lambda"].numel() if "Lambda" in given else 0
    fitting = {"P": (len(layer.P), rank), "Lambda": (rank,), "Q": (rank, layer.Q.shape[1])}
    if given == fitting and 1 <= rank <= layer.max_rank and rank != layer.rank:
        for factor, shape in given.items():
            w = getattr(layer, factor)
            w.grad = None
            w.set_(w.new_empty(shape))


@torch.no_grad()
def export_peft(model: nn.Module, directory: str | Path, base_model_name: str) -> None:
    """Writes a LoRA adapter that peft.PeftModel.from_pretrained(base, directory) loads.

    A is Q and B is P diag(Lambda), both padded with zeros to the largest rank of all matrices. So
    one rank and one alpha hold for all of them, which every reader of LoRA files understands.
    Whatever else was trained is written in whole modules. Needs safetensors. Raises ValueError for
    what PEFT cannot name.
    """
    from safetensors.torch import save_file
    inner = _unwrapped(model)
    layers = {_plain_name(name): layer for name, layer in _adapted(inner).items()}
    modules = {_plain_name(name): module
               for name, module in inner.named_modules(remove_duplicate=False)}
    owners = {key.rpartition(".")[0] for key in _changed_by_training(inner)} - layers.keys()
    saved = sorted(name for name in owners if not _is_in(name, owners - {name}))
    whole = [name for name in modules if name.endswith(tuple(saved))]  # as PEFT matches names
    _check_names(layers, modules, whole)
    first = next(iter(layers.values()))
    scaling = first.scaling.item()
    r = max(layer.rank for layer in layers.values())
    tensors = {}
    for name, layer in layers.items():
        missing = r - layer.rank
        A = nn.functional.pad(layer.Q, (0, 0, 0, missing))  # (r, d_in)
        B = layer.P * layer.Lambda * (layer.scaling / scaling)  # (d_out, rank)
        B = nn.functional.pad(B, (0, missing))  # (d_out, r)
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    for name in whole:
        tensors |= modules[name].state_dict(prefix=f"{name}.")
    tensors = {f"base_model.model.{_plain_name(key)}": x.contiguous().clone()
               for key, x in tensors.items()}
    is_causal_lm = type(inner).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    config = dict(
        peft_type="LORA", task_type="CAUSAL_LM" if is_causal_lm else None, r=r,
        lora_alpha=scaling * r, lora_dropout=first.dropout.p,
        base_model_name_or_path=base_model_name, target_modules=[*layers],
        modules_to_save=saved or None,
        fan_in_fan_out=any(_is_conv1d(layer.base_layer) for layer in layers.values()))
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def _check_names(layers: Mapping[str, SVDLinear], modules: Mapping[str, nn.Module],
                 whole: Sequence[str]) -> None:
    places = [name for name, module in modules.items() if isinstance(module, SVDLinear)]
    inside = [name for name in layers if _is_in(name, whole)]
    _require("" not in layers and "" not in whole, "PEFT cannot name the model itself")
    _require(places == [*layers], f"PEFT cannot name {[*places]}: a layer stands in two places")
    _require(not inside, f"PEFT cannot adapt {inside}: PEFT saves the whole module around it")


# ---- What a linear layer computes, and what other code reads and writes of it ----
class _NoNumbers(Tensor):
    """Stands for a quantized or sharded weight: it has a shape, a type and a device alone."""

    @classmethod
    def __torch_dispatch__(cls, function: object, *_: object) -> None:
        raise ValueError(f"{function} computes with the weight of an adapted layer, whose base is "
                         "quantized or sharded; do not adapt this layer")


def _updated_weight(layer: SVDLinear) -> Tensor:
    """W0 + delta_weight(), shaped as W0, with gradient, for code that reads it and does not call
    the layer. Every read computes the whole matrix. Of a quantized or sharded base, only shape,
    type and device can be read: computing with this weight raises ValueError."""
    base = layer.base_layer
    W0 = base.weight
    if not _is_plain(layer):
        return Tensor._make_wrapper_subclass(_NoNumbers, W0.shape, dtype=W0.dtype, device=W0.device)
    return W0 if layer.disabled else (W0 + _turned(base, layer.delta_weight())).to(W0.dtype)


def _add_product(y: Tensor, h: Tensor, P: Tensor) -> Tensor:
    """y + h P' in one operation, which saves some 5% of a training step on a CPU. All are cast to
    the type of y, (..., d_out)."""
    P_T = P.T.contiguous().to(y.dtype)  # (r, d_out); contiguous for a fast backward
    with torch.autocast(y.device.type, enabled=False):
        product = torch.addmm(y.reshape(-1, len(P)), h.reshape(-1, P.shape[1]), P_T)
    return product.view_as(y)


def _set_attribute(layer: SVDLinear, name: str, value: object) -> None:
    """Hands a new weight or bias to the base layer, as tie_weights() of transformers needs it."""
    if name not in ("weight", "bias"):
        return nn.Module.__setattr__(layer, name, value)
    present = getattr(layer.base_layer, name)
    if isinstance(value, Tensor) and isinstance(present, Tensor):
        _require(value.shape == present.shape, f"the {name} of an adapted layer cannot become "
                 f"{[*value.shape]}; resize the model (add tokens) before inject()")
    setattr(layer.base_layer, name, value)


SVDLinear.weight = property(_updated_weight)
SVDLinear.bias = property(lambda layer: layer.base_layer.bias, doc="The bias of the base layer.")
SVDLinear.__setattr__ = _set_attribute


def _is_conv1d(base: nn.Module) -> bool:
    """GPT-2's linear layer, of transformers. Its weight is (d_in, d_out)."""
    return f"{type(base).__module__}.{type(base).__name__}" == "transformers.pytorch_utils.Conv1D"


def _sizes(base: nn.Module) -> tuple[int, int]:
    """d_out, d_in."""
    return (base.nf, base.nx) if _is_conv1d(base) else (base.out_features, base.in_features)


def _turned(base: nn.Module, delta: Tensor) -> Tensor:
    """An update (d_out, d_in), as the base has its weight."""
    return delta.T if _is_conv1d(base) else delta


def _is_plain(layer: SVDLinear) -> bool:
    """Whether the base's weight is a matrix of numbers that can be added to."""
    weight = layer.base_layer._parameters.get("weight")  # weight_norm() takes it out of there
    return (type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta
            and weight.dim() == 2 and weight.element_size() > 1)  # float8 would need its scale


# ---- What RankAllocator reads and writes ----
def _factors(allocator: RankAllocator) -> dict[str, nn.Parameter]:
    """Name -> parameter, for every factor."""
    return {f"{name}.{factor}": getattr(layer, factor)
            for name, layer in allocator.layers.items() for factor in RANK_DIM}


def _optimized(optimizer: torch.optim.Optimizer) -> dict[Tensor, None]:
    """All parameters of an optimizer, in their order."""
    return {w: None for group in optimizer.param_groups for w in group["params"]}


def _averages(optimizer: torch.optim.Optimizer, w: Tensor) -> tuple[Tensor, Tensor]:
    """I_bar and U_bar of a factor; 0 before its first gradient."""
    state = optimizer.state.get(w, {})
    if "I_bar" not in state:
        return torch.zeros_like(w), torch.zeros_like(w)
    _require(state["I_bar"].shape == w.shape, "the averages have other ranks than the model: "
             "ranks were loaded without the optimizer's state")
    return state["I_bar"], state["U_bar"]


@torch.no_grad()
def _update_states(allocator: RankAllocator) -> None:
    """update_averages() for all factors that have a gradient, as one long vector on each device.

    If a gradient is not finite, nothing changes. That is decided on the device, so nothing waits.
    """
    optimizer = allocator.optimizer
    gradients = [w.grad for w in _optimized(optimizer) if w.grad is not None]
    finite = nn.utils.get_total_norm(gradients, math.inf).isfinite()  # ()
    by_device = defaultdict(list)
    for w in _factors(allocator).values():
        # Adam initializes its state only while that is empty, and a GradScaler may put the first
        # update off. So the averages wait for it, but not for SGD, whose state can stay empty.
        has_started = optimizer.state.get(w) or "dampening" in optimizer.param_groups[0]
        if w.grad is not None and has_started:
            by_device[w.device].append(w)
    for device, weights in by_device.items():
        w, gradient = _flat(weights), _flat([w.grad for w in weights])  # (n,)
        old = [_flat(averages) for averages in zip(*(_averages(optimizer, w) for w in weights))]
        new = update_averages(w, gradient, *old, allocator.beta1, allocator.beta2)
        for key, before, after in zip(("I_bar", "U_bar"), old, new):  # (n,)
            kept = torch.where(finite.to(device), after, before)
            for w, part in zip(weights, kept.split([w.numel() for w in weights])):
                optimizer.state[w][key] = part.view_as(w)


def _scores_on_host(allocator: RankAllocator) -> dict[str, list[float]]:
    """Module name -> S_i, of the layers whose factors are all trained."""
    _check_states(allocator)
    S = {name: importance for name, importance in allocator.importance().items()
         if all(w.requires_grad for w in allocator.layers[name].parameters(recurse=False))}
    if not S:
        return {}
    device = next(iter(S.values())).device
    numbers = _flat(importance.to(device) for importance in S.values()).cpu()
    _require(0 < numbers.max() < math.inf, f"the highest score is {numbers.max():g}, it must be a "
             "positive number; call step() after optimizer.step() and before zero_grad()")
    parts = numbers.split([len(importance) for importance in S.values()])
    return {name: part.tolist() for name, part in zip(S, parts)}


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def _take(x: Tensor, keep: Sequence[int], dim: int) -> Tensor:
    """These slices of x along a dimension. An index tensor would have to be sent to the device."""
    return torch.cat([x.narrow(dim, i, 1) for i in keep], dim)


def _keys_per_weight(state: Mapping) -> list[str]:
    """What an optimizer holds for every single weight; not its step count, which has no shape."""
    return [key for key, value in state.items() if getattr(value, "ndim", 0)]


# ---- Names and modules ----
def _unwrapped(model: nn.Module) -> nn.Module:
    """The model within the wrappers of torch.compile and DistributedDataParallel."""
    while isinstance(model, torch._dynamo.OptimizedModule | nn.parallel.DistributedDataParallel):
        model = model._modules.get("_orig_mod") or model.module
    return model


def _adapted(model: nn.Module) -> dict[str, SVDLinear]:
    """Module name -> SVDLinear. ValueError if there is none, or if it is sharded."""
    modules = _unwrapped(model).named_modules()
    layers = {name: module for name, module in modules if isinstance(module, SVDLinear)}
    _require(bool(layers), "the model has no SVDLinear; call inject(model, ...) first")
    _check_whole(layer.P for layer in layers.values())
    return layers


def _is_in(name: str, others: Iterable[str]) -> bool:
    """Whether a name is one of the others, or within one."""
    return f"{name}.".startswith(tuple(f"{other}." for other in others))


def _plain_name(name: str) -> str:
    """The name without the components that wrappers of modules add, and without an empty one."""
    wrappers = ("", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _matching(model: nn.Module, names: Sequence[str], argument: str) -> dict[str, nn.Module]:
    """The modules that the names match, by whole components from the right."""
    _require(not isinstance(names, str), f"{argument} must be a list, got the string {names!r}")
    modules = dict(model.named_modules())
    linear = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear)}
    found = set()
    for wanted in names:
        matches = {name for name in modules if name and f".{name}".endswith(f".{wanted}")}
        _require(bool(matches), f"{argument}: {wanted!r} matches no module (it is a name, no "
                 f"pattern); linear layers end in {', '.join(sorted(linear)[:12])}")
        found |= matches
    return {name: module for name, module in modules.items() if name in found}


def _warn_of_experts(model: nn.Module) -> None:
    """The experts of Mixtral and Qwen3-MoE, for example, are parameters of three dimensions."""
    stacked = {w for module in model.modules() if not isinstance(module, nn.modules.conv._ConvNd)
               for w in module.parameters(recurse=False) if w.ndim == 3 and len(w) > 1}
    share = sum(w.numel() for w in stacked) / max(1, sum(w.numel() for w in model.parameters()))
    if share > 0.1:
        warnings.warn(f"{share:.0%} of the weights are stacked in 3 dimensions, as experts are; "
                      "they cannot be adapted", stacklevel=3)


# ---- Checks of input ----
def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_integers(owner: object, **least: int) -> None:
    for name, minimum in least.items():
        value = getattr(owner, name)
        _require(type(value) is int and value >= minimum,  # bools are refused, too
                 f"{name} must be an integer >= {minimum}, got {value!r}")


def _check_layer(name: str, layer: nn.Module, rank: int, alpha: float = 1, dropout: float = 0
                 ) -> None:
    _require(isinstance(layer, nn.Linear) or _is_conv1d(layer),
             f"{name} must be a torch.nn.Linear, not {type(layer)}")
    _require(layer.weight.dim() == 2, f"{name} is in flat shards (FSDP 1, ZeRO-3); use FSDP 2: "
             "fully_shard(module, ignored_params=what is trained)")
    limit = min(_sizes(layer))
    _require(type(rank) is int and 1 <= rank <= limit,
             f"the rank of {name} must be an integer in 1..{limit}, got {rank!r}")
    _require(0 < alpha < math.inf, f"alpha must be a positive number, got {alpha!r}")
    _require(0 <= dropout < 1, f"dropout must be in [0, 1), got {dropout!r}")


def _check_injection(model: nn.Module, targets: Mapping[str, nn.Module],
                     saved: Mapping[str, nn.Module], ranks: Mapping[str, int]) -> None:
    for module in model.modules():
        is_adapter = isinstance(module, SVDLinear) or type(module).__module__.startswith("peft.")
        _require(not is_adapter, "the model has adapters already, of this file or of PEFT; merge "
                 "them first, or load the model again")
    _require(bool(targets) and ranks.keys() == targets.keys(),
             f"no targets, or the rank map names other modules: {sorted(ranks.keys() ^ targets)}")
    trained = {w for module in saved.values() for w in module.parameters()}
    for name, module in targets.items():
        _check_layer(repr(name), module, ranks[name])
        _require(not module.weight.is_meta, f"the weight of {name!r} is on the meta device: it was "
                 "offloaded, or not loaded yet; load the whole model first")
        _require(trained.isdisjoint(module.parameters()), f"{name!r} would be both adapted and "
                 "saved; name it in one list only (tied weights count as one)")


def _check_whole(trained: Iterable[Tensor]) -> None:
    _require(not any(hasattr(w, "to_local") for w in trained),  # a DTensor
             "a trained parameter is sharded; shard what is frozen alone: "
             "fully_shard(module, ignored_params=what is trained)")


def _check_resize(layer: SVDLinear, keep: Sequence[int], n_new: int) -> None:
    _require(0 < len(keep) == len(set(keep).intersection(range(layer.rank))),
             f"keep must have distinct ranks of 0..{layer.rank - 1}, at least one, got {[*keep]}")
    _check_layer("the resized layer", layer.base_layer, len(keep) + n_new)


def _check_schedule(schedule: RankSchedule) -> None:
    _check_integers(
        schedule, total_steps=1, warmup_steps=0, stabilize_steps=0, adjust_interval=1, b=0)
    _require(schedule.warmup_steps + schedule.adjust_interval <= schedule.search_end,
             f"total_steps must hold warm-up, an interval, stabilization: {schedule}")
    _require(schedule.shape in SHAPES,
             f"shape must be one of {', '.join(SHAPES)}, got {schedule.shape!r}")


def _check_allocator(allocator: RankAllocator) -> None:
    _check_integers(allocator, k=1, min_rank=1)
    for beta in (allocator.beta1, allocator.beta2):
        _require(0 < beta < 1, f"beta1 and beta2 must be in (0, 1), got {beta!r}")
    groups = allocator.optimizer.param_groups
    _require(not any(group.get("initial_accumulator_value") for group in groups),
             "initial_accumulator_value must be 0: new ranks start with it")
    optimized = _optimized(allocator.optimizer)
    _check_whole(optimized)
    for name, w in _factors(allocator).items():
        _require(w in optimized or not w.requires_grad, f"the optimizer does not hold {name!r}; "
                 "make it after inject(), one for all adapters")
        _require(w.dtype.itemsize >= 4, f"{name!r} is {w.dtype}, which is too coarse to train in; "
                 "cast the model before inject(), not after it")


def _check_step(allocator: RankAllocator) -> None:
    """All that can be told without waiting for a device."""
    t, schedule = allocator.t, allocator.schedule
    if t == schedule.total_steps:
        warnings.warn(f"step() is called more often than total_steps = {t}; call it once per "
                      "optimizer step, not for every micro-batch", stacklevel=3)
    if t >= schedule.search_end:
        return
    factors, optimized = _factors(allocator), _optimized(allocator.optimizer)
    others = [name for name, w in factors.items() if w.grad is not None and w not in optimized]
    _require(not others, f"the optimizer does not hold {others[:1]}; make optimizer and allocator "
             "after loading with assign=True")
    # Lambda has a gradient from the loss alone; P and Q have one from the penalty, too.
    Lambdas = {name: w for name, w in factors.items() if w.ndim == 1 and w.requires_grad}
    missed = [name for name, w in Lambdas.items() if w.grad is None]
    _require(not missed or len(missed) < len(Lambdas), "the loss reaches no adapter: no Lambda has "
             "a gradient. Call step() after optimizer.step() and before zero_grad(). With "
             "reentrant checkpointing, pass use_reentrant=False")
    if t == 0:
        _check_states(allocator)
        if missed:
            warnings.warn(f"the loss reaches {len(Lambdas) - len(missed)} of {len(Lambdas)} "
                          f"adapters, but not {missed[0]!r}: is it called?", stacklevel=3)


FRESH_AT_ZERO = {  # what is 0 for a weight before its first update, by the optimizer that has it
    "I_bar", "U_bar",  # RankAllocator
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf",  # Adam, AdamW, NAdam, RAdam, Adamax
    "momentum_buffer", "square_avg", "grad_avg", "sum",  # SGD, RMSprop, Adagrad
    "state1", "state2",  # bitsandbytes in 32 bits
}


def _check_states(allocator: RankAllocator) -> None:
    """Whether new ranks can have zeros in the optimizer's state; of all layers at once."""
    for name, w in _factors(allocator).items():
        state = allocator.optimizer.state.get(w, {})
        for key in _keys_per_weight(state):
            x = state[key]
            alike = type(x) is Tensor and (x.shape, x.device) == (w.shape, w.device)
            _require(alike and key in FRESH_AT_ZERO, f"the optimizer's {key!r} of {name!r}, a "
                     f"{type(x).__name__} of shape {[*x.shape]} on {x.device}, cannot follow when "
                     "ranks move; use an optimizer such as AdamW, Adam, SGD, RMSprop or Adagrad")
