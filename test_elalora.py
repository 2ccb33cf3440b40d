"""The laws of elalora.py, in its order, then of reproduce.py and of the README.

Oracles are independent: NumPy in float64, brute force, exact fractions, an uninterrupted run.
"""

import ast
import copy
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import elalora
import reproduce
from elalora import (
    RANK_DIM,
    Adjustment,
    RankAllocator,
    RankSchedule,
    SVDLinear,
    adapter_state_dict,
    inject,
    load_adapter_state_dict,
    merge,
    new_directions,
    orthogonality_penalty,
    resize,
    select,
)

HERE = Path(__file__).parent
torch.set_num_threads(1)
settings.register_profile("laws", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("laws")
seeds = st.integers(0, 2**31 - 1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.dense = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x):
        return x + self.dense(torch.tanh(self.query(x)))


class Net(nn.Module):
    """Two blocks of 6 -> 5 -> 6 and a head; every matrix has a highest rank of 5."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(6, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


ADAPTED = [f"layers.{i}.{name}" for i in range(2) for name in ("query", "dense")]


def adapted_net(rank=2, seed=0, **kwargs):
    kwargs = {"modules_to_save": ["head"]} | kwargs
    return inject(Net(seed), ["query", "dense"], rank, **kwargs)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def training(model, b=2, k=2, optimizer=torch.optim.AdamW, schedule=None, **kwargs):
    """An optimizer, and an allocator that moves b ranks at every step unless given a schedule."""
    optimizer = optimizer(trainable(model), **{"lr": 0.05} | kwargs)
    schedule = schedule or RankSchedule(10**6, 0, 1, 1, b, "constant")
    return optimizer, RankAllocator(model, optimizer, schedule, k)


def loss_of(model, step=0):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
    return model(x).square().sum() + 0.1 * orthogonality_penalty(model)


def train_step(model, optimizer, allocator=None, step=0):
    loss_of(model, step).backward()
    optimizer.step()
    adjustment = allocator.step() if allocator else None
    optimizer.zero_grad()
    return adjustment


def randomize(layer, generator=None):
    """A layer in the middle of training: P and Q away from orthonormal, Lambda away from 0."""
    with torch.no_grad():
        for factor in (layer.P, layer.Lambda, layer.Q):
            factor.copy_(torch.randn(factor.shape, generator=generator))
    return layer


def array(tensor):
    return tensor.detach().double().numpy()


def test_elalora_needs_torch_alone():
    """It imports the standard library and torch, and in export_peft alone safetensors."""
    tree = ast.parse((HERE / "elalora.py").read_text())
    found = {}
    for owner in tree.body:
        for node in ast.walk(owner):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = (
                    [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else [n.name for n in node.names]
                )
                for name in names:
                    found.setdefault(name.split(".")[0], set()).add(getattr(owner, "name", "top"))
    others = {name: where for name, where in found.items() if name not in sys.stdlib_module_names}
    assert others == {"torch": {"top"}, "safetensors": {"export_peft"}}


# ---- Section 3.1 ----


@given(st.integers(1, 7), st.integers(1, 7), st.data(), seeds)
def test_the_layer_computes_its_formula(d_out, d_in, data, seed):
    """y = W0 x + bias + s P (Lambda * (Q x)) for x of any shape, and the gradients of that;
    delta_weight() is the update's matrix."""
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    shape = data.draw(st.sampled_from([(), (4,), (2, 3), (0,), (2, 1, 3)]))
    torch.manual_seed(seed)
    layer = randomize(SVDLinear(nn.Linear(d_in, d_out), rank, alpha=3.0))
    x = torch.randn(*shape, d_in, requires_grad=True)
    P, Lambda, Q, W, bias = map(
        array, (layer.P, layer.Lambda, layer.Q, layer.base_layer.weight, layer.base_layer.bias)
    )
    delta = 3.0 / rank * P @ np.diag(Lambda) @ Q
    np.testing.assert_allclose(
        array(layer(x)), array(x) @ (W + delta).T + bias, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(array(layer.delta_weight()), delta, rtol=1e-4, atol=1e-4)
    g = torch.randn(*shape, d_out)
    layer(x).backward(g)
    X, G, s = array(x).reshape(-1, d_in), array(g).reshape(-1, d_out), 3.0 / rank
    for w, expected in (
        (x, (G @ (W + delta)).reshape(*shape, d_in)),
        (layer.P, s * G.T @ (X @ Q.T * Lambda)),
        (layer.Lambda, s * ((G @ P) * (X @ Q.T)).sum(axis=0)),
        (layer.Q, s * (G @ P * Lambda).T @ X),
    ):
        np.testing.assert_allclose(array(w.grad), expected, rtol=1e-3, atol=1e-3)


@given(st.integers(1, 5), seeds)
def test_a_layer_starts_orthonormal_and_as_its_base(rank, seed):
    """P'P = QQ' = I, R(P, Q) = 0 and the output is the base's to the bit."""
    torch.manual_seed(seed)
    layer = SVDLinear(nn.Linear(6, 5), rank)
    np.testing.assert_allclose(array(layer.P.T @ layer.P), np.eye(rank), atol=1e-6)
    np.testing.assert_allclose(array(layer.Q @ layer.Q.T), np.eye(rank), atol=1e-6)
    assert orthogonality_penalty(layer).item() < 1e-10
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), layer.base_layer(x))


@given(st.lists(st.integers(1, 5), min_size=4, max_size=4), seeds)
def test_the_penalty_is_the_mean_of_section_3_1(ranks, seed):
    """|P'P - I|^2 + |QQ' - I|^2 in Frobenius norms, averaged over any ranks; and its gradient."""
    model = adapted_net(dict(zip(ADAPTED, ranks)), seed)
    expected, gradients = [], []
    for name in ADAPTED:
        layer = randomize(model.get_submodule(name))
        P, Q = array(layer.P), array(layer.Q)
        off_P, off_Q = P.T @ P - np.eye(layer.rank), Q @ Q.T - np.eye(layer.rank)
        expected += [np.linalg.norm(off_P) ** 2 + np.linalg.norm(off_Q) ** 2]
        gradients += [(layer.P, 4 * P @ off_P / 4), (layer.Q, 4 * off_Q @ Q / 4)]
    penalty = orthogonality_penalty(model)
    np.testing.assert_allclose(penalty.item(), np.mean(expected), rtol=1e-5)
    penalty.backward()
    for w, gradient in gradients:
        np.testing.assert_allclose(array(w.grad), gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_neither_the_penalty_nor_the_dtype_of_the_output(dtype):
    """R(P, Q) is float32's to the bit in a region of autocast; a float32 output stays one."""
    layer = randomize(SVDLinear(nn.Linear(6, 5), 2))
    layer.base_layer.forward = lambda x: torch.ones(3, 5)  # float32, as some quantized layers
    expected = orthogonality_penalty(layer)
    with torch.autocast("cpu", dtype):
        assert torch.equal(orthogonality_penalty(layer), expected)
        assert layer(torch.ones(3, 6)).dtype == torch.float32


class Written(TorchDispatchMode):
    """Counts the bytes that all operations write."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        shares = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        if isinstance(out, torch.Tensor) and not shares:  # a view writes nothing
            self.total += out.nbytes
        return out


def test_the_work_of_a_step_grows_linearly_with_the_number_of_matrices():
    """Eight times as many matrices make it write eight times as many bytes, not sixty-four."""
    written = []
    for n in (8, 64):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(n)))
        names = [str(i) for i in range(n)]
        inject(model, names, {name: 1 + i % 4 for i, name in enumerate(names)})
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        allocator = RankAllocator(model, optimizer, RankSchedule(9, 0, 0, 1, n // 4), k=1)
        with Written() as work:
            (orthogonality_penalty(model) + sum(m.Lambda.sum() for m in model)).backward()
            assert sum(allocator.step().expanded.values()) >= n // 8
        written.append(work.total)
    assert written[1] < 10 * written[0]  # which ranks move differs a little


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_float32_and_the_output_is_the_bases(dtype, autocast):
    """A bfloat16 base works, with and without autocast, and y has the dtype that the base gives."""
    layer = randomize(SVDLinear(nn.Linear(6, 5).to(dtype), 2))
    x = torch.randn(3, 6, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
        assert y.dtype == layer.base_layer(x).dtype
    assert {layer.P.dtype, layer.Lambda.dtype, layer.Q.dtype} == {torch.float32}
    y.sum().backward()
    assert layer.P.grad.dtype == torch.float32
    expected = array(x) @ array(layer.base_layer.weight + layer.delta_weight()).T
    np.testing.assert_allclose(array(y - layer.base_layer.bias), expected, rtol=0.1, atol=0.5)


class Quantized(nn.Linear):
    """Like the quantized layers of bitsandbytes: an nn.Linear whose weight is packed integers."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.weight = nn.Parameter((10 * self.weight.T.data).char(), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) / 10) + self.bias


def test_the_default_device_does_not_matter():
    """Factors and new directions are drawn on the CPU and live where their base does."""
    with torch.device("meta"):
        layer = SVDLinear(nn.Linear(6, 5, device="cpu"), 2)
        resize(layer, [0], 3, torch.Generator("cpu"), ())
        assert SVDLinear(nn.Linear(6, 5), 2).P.is_meta
    assert orthogonality_penalty(layer).item() < 1e-10 and layer.rank == 4


def test_quantized_bases_adapt_but_do_not_merge():
    """Only base_layer(x) is called; merging into integers is refused and changes nothing."""
    model = inject(nn.Sequential(Quantized(6, 5)), ["0"], 2)
    randomize(model[0])
    x = torch.randn(3, 6)
    expected = model[0].base_layer(x) + x @ model[0].delta_weight().T
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="'0' has a weight of torch.int8; dequantize"):
        merge(model)
    assert isinstance(model[0], SVDLinear)


def test_dropout_acts_on_the_input_of_the_update_alone():
    """Elements of x are dropped, and the others scaled up, before Q and not before the base."""
    layer = randomize(SVDLinear(nn.Linear(6, 5), 2, dropout=0.5))
    x = torch.randn(3, 6)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(y, layer.base_layer(x) + dropped @ layer.delta_weight().T)
    torch.testing.assert_close(layer.eval()(x), layer.base_layer(x) + x @ layer.delta_weight().T)


def test_inject_freezes_all_but_adapters_and_saved_modules():
    """After inject just P, Lambda, Q and the modules to save have gradients to come."""
    model = adapted_net()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    factors = {f"{name}.{factor}" for name in ADAPTED for factor in RANK_DIM}
    assert names == factors | {"head.weight", "head.bias"}


def test_names_match_by_whole_components_from_the_right():
    """`0.dense` matches `layers.0.dense`; `k` does not match `block`, nor `dense` `xdense`."""
    model = inject(Net(), ["0.dense"], 2)
    assert list(elalora._adapted(model)) == ["layers.0.dense"]
    model = nn.ModuleDict({"k": nn.Linear(3, 3), "block": nn.Linear(3, 3), "xk": nn.Linear(3, 3)})
    assert list(elalora._adapted(inject(model, ["k"], 1))) == ["k"]


@given(st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_a_rank_map_sets_ranks_and_one_scaling(ranks):
    """Each matrix gets its rank, and all the scaling alpha / (mean of the map)."""
    model = adapted_net(dict(zip(ADAPTED, ranks)), alpha=8.0)
    layers = elalora._adapted(model)
    assert [layer.rank for layer in layers.values()] == ranks
    assert all(layer.scaling == pytest.approx(8.0 / np.mean(ranks)) for layer in layers.values())


def test_a_layer_in_two_places_stays_one_layer():
    """A shared nn.Linear is adapted once, in both places, and merged in both."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    inject(model, ["0"], 2)
    assert model[0] is model[2] and isinstance(model[0], SVDLinear)
    randomize(model[0])
    x = torch.randn(3, 4)
    y = model(x)
    merge(model)
    assert model[0] is model[2] is shared
    torch.testing.assert_close(model(x), y)


INJECT_ERRORS = {
    "no match": (
        dict(target_modules=["qeury"]),
        "'qeury' matches no module; linear: .*'layers.0.query",
    ),
    "one of two": (dict(target_modules=["query", "ky"]), "'ky' matches no module"),
    "nothing": (dict(target_modules=[]), "no targets"),
    "a string": (dict(target_modules="query"), "list of names, got the string 'query'"),
    "no linear": (
        dict(target_modules=["layers.0"]),
        "'layers.0' must be an nn.Linear, not a Block",
    ),
    "rank 0": (dict(rank=0), "'layers.0.query' must be an integer in 1..5, got 0"),
    "rank 6": (dict(rank=6), "in 1..5, got 6"),
    "rank 2.0": (dict(rank=2.0), "got 2.0"),
    "rank True": (dict(rank=True), "got True"),
    "map": (dict(rank={"layers.0.query": 1}), "layers.0.dense"),
    "map beyond": (dict(rank=dict.fromkeys([*ADAPTED, "x"], 1)), r"\['x'\]"),
    "last of map": (dict(rank=dict(zip(ADAPTED, (1, 1, 1, 9)))), "'layers.1.dense' .* got 9"),
    "both": (dict(modules_to_save=["layers.1"]), "'layers.1.query' would be both"),
    "both, same": (dict(modules_to_save=["dense"]), "both adapted and saved"),
    "no save": (dict(modules_to_save=["haed"]), "modules_to_save: 'haed' matches no module"),
    "alpha": (dict(alpha=0), "alpha must be positive, got 0"),
    "dropout": (dict(dropout=1.5), "dropout probability .* got 1.5"),
}


@pytest.mark.parametrize("arguments, message", INJECT_ERRORS.values(), ids=INJECT_ERRORS)
def test_inject_refuses_what_does_not_fit_and_changes_nothing(arguments, message):
    """A ValueError names the value, and the model is as it was."""
    model = Net()
    with pytest.raises(ValueError, match=message):
        inject(model, **dict(target_modules=["query", "dense"], rank=2) | arguments)
    assert not any(isinstance(module, SVDLinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_what_is_adapted_is_not_adapted_again_and_what_is_not_is_named():
    """A second injection, and every function without a first one, is a ValueError."""
    with pytest.raises(ValueError, match="adapted already"):
        inject(adapted_net(), ["head"], 1)
    with pytest.raises(ValueError, match="not a Embedding"):
        SVDLinear(nn.Embedding(3, 4), 1)
    for function in (merge, orthogonality_penalty, adapter_state_dict):
        with pytest.raises(ValueError, match="no SVDLinear; call inject"):
            function(Net())


# ---- Section 3.2 ----


class Scores:
    """Eq. 1-3 in NumPy float64 for one parameter."""

    def __init__(self, shape):
        self.I_bar, self.U_bar = np.zeros(shape), np.zeros(shape)

    def update(self, w, grad, beta1, beta2):
        I = np.abs(array(w) * array(grad))
        self.I_bar = beta1 * self.I_bar + (1 - beta1) * I
        self.U_bar = beta2 * self.U_bar + (1 - beta2) * np.abs(I - self.I_bar)

    @property
    def s(self):
        return self.I_bar * self.U_bar


@given(st.data(), st.floats(0.05, 0.99), st.floats(0.05, 0.99), seeds)
@settings(max_examples=50)
def test_importance_follows_equations_1_to_3(data, beta1, beta2, seed):
    """Any gradients, missing and non-finite ones among them, score as in float64 by hand."""
    model = adapted_net(3, seed)
    optimizer = torch.optim.SGD(trainable(model), 0.1)
    schedule = RankSchedule(100, 50, 10, 1, 0)
    allocator = RankAllocator(model, optimizer, schedule, 1, beta1, beta2)
    generator = torch.Generator().manual_seed(seed)
    oracle = {w: Scores(w.shape) for w in allocator.factors.values()}
    for layer in allocator.layers.values():
        randomize(layer, generator)
    for kind in data.draw(st.lists(st.sampled_from(["all", "some", "nan", "inf"]), max_size=6)):
        for i, w in enumerate(oracle):
            w.grad = torch.randn(w.shape, generator=generator)
            if kind == "some" and i % 3 == 1:
                w.grad = None
        if kind in ("nan", "inf"):
            next(iter(oracle)).grad[0, 0] = float(kind)
        else:
            for w, scores in oracle.items():
                if w.grad is not None:
                    scores.update(w, w.grad, beta1, beta2)
        allocator.step()
    for name, S in allocator.importance().items():
        layer = allocator.layers[name]
        s_P, s_Lambda, s_Q = (oracle[w].s for w in (layer.P, layer.Lambda, layer.Q))
        expected = s_Lambda + s_P.sum(axis=0) / len(s_P) + s_Q.sum(axis=1) / s_Q.shape[1]
        np.testing.assert_allclose(array(S), expected, rtol=2e-4, atol=1e-9)
        assert S.dtype == torch.float32 and S.shape == (3,)


def test_averages_stay_after_the_search_and_steps_are_counted_on():
    """Averages move up to total - stabilize; t counts every step, with gradients or without."""
    model = adapted_net()
    optimizer, allocator = training(model, schedule=RankSchedule(9, 1, 4, 2, 0))
    for step in range(9):
        before = copy.deepcopy(allocator.importance())
        train_step(model, optimizer, allocator, step)
        same = all(torch.equal(before[name], S) for name, S in allocator.importance().items())
        assert same == (step + 1 > 5)
    allocator.step()
    assert allocator.t == 10


def test_a_step_without_any_gradient_is_an_error_that_counts_for_nothing():
    """step() after zero_grad() says where it belongs and leaves the allocator as it was."""
    _, allocator = training(adapted_net())
    with pytest.raises(ValueError, match="between backward.. and zero_grad"):
        allocator.step()
    assert allocator.t == 0


# ---- Section 3.3: selection ----


def brute_force(scores, max_ranks, k, b):
    """By trying all subsets: the largest n, the n least to prune, the n greatest to grow."""
    keyed = {
        (S, order, i): name
        for order, (name, values) in enumerate(scores.items())
        for i, S in enumerate(values)
    }

    def lowest(name, count):
        return sorted(key for key, owner in keyed.items() if owner == name)[:count]

    candidates = [key for name in scores for key in lowest(name, k)]
    prunable = [key for name in scores for key in lowest(name, min(k, len(scores[name]) - 1))]
    for n in range(b, 0, -1):
        prunings = [sorted(subset) for subset in itertools.combinations(prunable, n)]
        if not prunings:
            continue
        gone = min(prunings)
        growths = []
        for subset in itertools.combinations([c for c in candidates if c not in gone], n):
            rank = {name: len(values) for name, values in scores.items()}
            for key in gone:
                rank[keyed[key]] -= 1
            for key in subset:
                rank[keyed[key]] += 1
            grown = {keyed[key] for key in subset}
            if all(rank[name] <= max_ranks[name] for name in grown):
                growths.append(sorted(subset, reverse=True))
        if growths:
            pruned = {
                keyed[key]: sorted(k[2] for k in gone if keyed[k] == keyed[key]) for key in gone
            }
            names = [keyed[key] for key in max(growths)]
            return pruned, {name: names.count(name) for name in names}
    return {}, {}


@st.composite
def selections(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    score = st.sampled_from([0.0, 1.0, 2.0, 3.0]) | st.floats(0, 3)  # ties are common
    scores = {f"m{i}": draw(st.lists(score, min_size=n, max_size=n)) for i, n in enumerate(sizes)}
    max_ranks = {name: len(S) + draw(st.integers(0, 2)) for name, S in scores.items()}
    return scores, max_ranks, draw(st.integers(1, 5)), draw(st.integers(0, 6))


@given(selections())
@settings(max_examples=400)
def test_selection_is_what_trying_everything_finds(selection):
    """Ties, rank-1 and full matrices, k and b too large: select() is the definition's answer."""
    assert select(*selection) == brute_force(*selection)


@given(selections())
@settings(max_examples=300)
def test_selection_conserves_the_sum_and_the_limits(selection):
    """As many go as come, at most b; nothing below 1, above its limit, or by more than k."""
    scores, max_ranks, k, b = selection
    pruned, expanded = select(*selection)
    assert sum(map(len, pruned.values())) == sum(expanded.values()) <= b
    for name, S in scores.items():
        gone, come = pruned.get(name, []), expanded.get(name, 0)
        assert len(gone) <= k and come <= k
        assert 1 <= len(S) - len(gone)
        assert len(S) - len(gone) + come <= max_ranks[name]


def test_a_matrix_at_rank_1_can_grow():
    """The released code never lets it; section 3.3 does, where it matters most."""
    pruned, expanded = select({"a": [1.0, 2.0], "b": [9.0]}, {"a": 5, "b": 5}, k=1, b=1)
    assert (pruned, expanded) == ({"a": [0]}, {"b": 1})


# ---- Section 3.3: resizing ----


@st.composite
def resizes(draw, max_rank=5):
    """A layer in the middle of training, the ranks to keep and the number to add."""
    rank = draw(st.integers(1, max_rank))
    keep = draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True))
    n_new = draw(st.integers(0, max_rank - len(keep)))
    torch.manual_seed(draw(seeds))
    return randomize(SVDLinear(nn.Linear(6, 5), rank)), sorted(keep), n_new


@given(resizes())
def test_pruning_removes_the_pruned_triplets_and_growing_changes_nothing(case):
    """The update after a resize is the sum of the kept triplets' s lambda_i P_i Q_i."""
    layer, keep, n_new = case
    P, Lambda, Q = map(array, (layer.P, layer.Lambda, layer.Q))
    expected = layer.scaling * sum(Lambda[i] * np.outer(P[:, i], Q[i]) for i in keep)
    x, scaling = torch.randn(3, 6), layer.scaling
    resize(layer, keep, 0, torch.Generator(), ())
    y = layer(x)
    resize(layer, range(len(keep)), n_new, torch.Generator(), ())
    np.testing.assert_allclose(array(layer.delta_weight()), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x), y, rtol=1e-6, atol=1e-5)
    assert layer.rank == len(keep) + n_new and layer.scaling == scaling
    assert np.array_equal(array(layer.P)[:, : len(keep)], P[:, keep])
    assert np.array_equal(array(layer.Q)[: len(keep)], Q[keep])
    assert np.array_equal(array(layer.Lambda), [*Lambda[keep], *[0.0] * n_new])


@given(st.integers(1, 8), st.data(), seeds)
def test_new_directions_are_orthonormal_and_orthogonal_to_the_present(d, data, seed):
    """Whatever the present columns are, dependent or of any length, and up to a full basis."""
    r = data.draw(st.integers(0, d - 1))
    n = data.draw(st.integers(1, d - r))
    torch.manual_seed(seed)
    lengths = 10.0 ** torch.randint(-4, 4, (r,))
    present = torch.randn(d, r) * lengths
    if r > 1 and data.draw(st.booleans()):
        present[:, 1] = 2 * present[:, 0]
    new = array(new_directions(present, n, torch.Generator().manual_seed(seed)))
    np.testing.assert_allclose(new.T @ new, np.eye(n), atol=1e-6)
    units = array(present) / np.maximum(np.linalg.norm(array(present), axis=0), 1e-30)
    np.testing.assert_allclose(units.T @ new, 0, atol=1e-6)


def test_new_directions_leave_the_users_random_stream_alone():
    """An adjustment draws from the allocator's own generator."""
    model = adapted_net()
    optimizer, allocator = training(model)
    loss_of(model).backward()
    optimizer.step()
    state = torch.get_rng_state()
    assert allocator.step().expanded
    assert torch.equal(state, torch.get_rng_state())


OPTIMIZERS = {
    "momentum": (torch.optim.SGD, dict(momentum=0.9)),
    "Adam": (torch.optim.Adam, dict(amsgrad=True)),
    "AdamW": (torch.optim.AdamW, dict(foreach=True)),
    "RMSprop": (torch.optim.RMSprop, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
}


@pytest.mark.parametrize("optimizer, options", OPTIMIZERS.values(), ids=OPTIMIZERS)
@given(
    keep=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True).map(sorted),
    n_new=st.integers(0, 2),
)
@settings(max_examples=15)
def test_retained_ranks_keep_optimizer_state_to_the_bit(optimizer, options, keep, n_new):
    """Kept ranks keep every moment and average, new ones have zeros, step counts stay."""
    model = adapted_net(3)
    optimizer, allocator = training(model, b=0, optimizer=optimizer, **options)
    for step in range(3):
        train_step(model, optimizer, allocator, step)
    layer = model.layers[0].query
    states = (optimizer.state, allocator.averages)
    before = copy.deepcopy([[state[getattr(layer, f)] for f in RANK_DIM] for state in states])
    resize(layer, keep, n_new, torch.Generator(), states)
    after = [[state[getattr(layer, f)] for f in RANK_DIM] for state in states]
    seen = 0
    for old_factors, new_factors in zip(before, after):
        for (factor, dim), old, new in zip(RANK_DIM.items(), old_factors, new_factors):
            assert old.keys() == new.keys()
            for key in old:
                if not isinstance(old[key], torch.Tensor) or old[key].dim() == 0:
                    assert old[key] == new[key]
                    continue
                kept, fresh = new[key].split([len(keep), n_new], dim)
                assert torch.equal(kept, old[key].index_select(dim, torch.tensor(keep)))
                assert old[key].abs().sum() > 0 and not fresh.any()
                assert new[key].shape == getattr(layer, factor).shape
                seen += 1
    assert seen >= 9  # two averages and at least one moment for each of P, Lambda, Q
    train_step(model, optimizer)


def test_an_optimizer_with_state_of_other_shapes_is_refused_and_nothing_changes():
    """Adafactor factors its second moment: the first adjustment names it and moves nothing."""
    model = adapted_net()
    optimizer, allocator = training(model, optimizer=torch.optim.Adafactor)
    loss_of(model).backward()
    optimizer.step()
    before = adapter_state_dict(model)
    with pytest.raises(ValueError, match="'row_var' has shape .* such as AdamW"):
        allocator.step()
    assert all(torch.equal(before[key], value) for key, value in adapter_state_dict(model).items())


# ---- Section 3.4 ----


@st.composite
def schedules(draw, shape="cubic"):
    warmup, search, stabilize = (
        draw(st.integers(0, 40)),
        draw(st.integers(1, 60)),
        draw(st.integers(0, 40)),
    )
    interval, b = draw(st.integers(1, min(20, search))), draw(st.integers(0, 200))
    return RankSchedule(warmup + search + stabilize, warmup, stabilize, interval, b, shape)


@given(schedules())
@example(RankSchedule(6, 0, 0, 1, 108))  # a tie at P = 5/6 that float arithmetic misses
def test_the_budget_is_equation_5_exactly(schedule):
    """b (1 - P^3) in whole numbers, ties to even, at warmup + m * interval, and 0 elsewhere."""
    span = schedule.total_steps - schedule.stabilize_steps - schedule.warmup_steps
    for step in range(-1, schedule.total_steps + 3):
        since = step - schedule.warmup_steps
        expected = 0
        if since in range(schedule.adjust_interval, span + 1, schedule.adjust_interval):
            whole, rest = divmod(schedule.b * (span**3 - since**3), span**3)
            expected = whole + (2 * rest > span**3 or (2 * rest == span**3 and whole % 2 == 1))
        assert schedule.budget(step) == expected


@given(st.sampled_from(sorted(elalora.SHAPES)).flatmap(lambda shape: schedules(shape)))
def test_every_shape_falls_from_b_to_its_end(schedule):
    """Budgets are in 0..b and never rise; all but the constant one are 0 where the search ends."""
    steps = range(
        schedule.warmup_steps + schedule.adjust_interval,
        schedule.search_end + 1,
        schedule.adjust_interval,
    )
    budgets = [schedule.budget(step) for step in steps]
    assert budgets == sorted(budgets, reverse=True)
    assert all(0 <= b <= schedule.b for b in budgets)
    if budgets and steps[-1] == schedule.search_end:
        assert budgets[-1] == (schedule.b if schedule.shape == "constant" else 0)


def test_the_other_shapes_are_their_formulas():
    """Linear b (1 - P) in fractions; exponential b (e^-5P - e^-5) / (1 - e^-5)."""
    linear, exponential = (RankSchedule(100, 20, 30, 1, 9, s) for s in ("linear", "exponential"))
    for t in range(21, 71):
        P = Fraction(t - 20, 50)
        assert linear.budget(t) == round(9 * (1 - P))
        share = (np.exp(-5 * float(P)) - np.exp(-5)) / (1 - np.exp(-5))
        assert exponential.budget(t) == round(9 * share)


TRAIN_SIZES = dict(
    mnli=392702, sst2=67349, cola=8551, qqp=363846, qnli=104743, rte=2490, mrpc=3668, stsb=5749
)


@pytest.mark.parametrize("task", TRAIN_SIZES)
def test_every_row_of_table_7_searches(task):
    """With the task's real size the first budget is b, and the last adjustment is in time."""
    recipe = reproduce.RECIPES[task]
    total = recipe.epochs * -(-TRAIN_SIZES[task] // recipe.batch_size)
    for b in recipe.b:
        schedule = RankSchedule(total, recipe.warmup, recipe.stabilize, recipe.interval, b)
        moves = {t: schedule.budget(t) for t in range(1, total + 1) if schedule.budget(t)}
        assert min(moves) == recipe.warmup + recipe.interval and moves[min(moves)] == b
        assert max(moves) <= total - recipe.stabilize
        first = Fraction(recipe.interval, total - recipe.stabilize - recipe.warmup)
        assert abs(b * (1 - first**3) - b) < Fraction(1, 2)


@pytest.mark.parametrize(
    "numbers, message",
    [
        ((10, 5, 5, 1, 1), r"total_steps must hold .*total_steps=10, warmup_steps=5"),
        ((10, 1, 5, 5, 1), r"total_steps must hold .*interval.*adjust_interval=5"),
        ((10, 20, 5, 1, 1), "warmup_steps=20"),
        ((10, -1, 5, 1, 1), "warmup_steps must be an integer >= 0, got -1"),
        ((10, 1, 5, 0, 1), "adjust_interval must be an integer >= 1, got 0"),
        ((10, 1, 5, 1, -2), "b must be an integer >= 0, got -2"),
        ((10.5, 1, 5, 1, 2), "total_steps must be an integer >= 1, got 10.5"),
        ((10, 1, 5, 1, 2, "cubical"), "one of cubic, linear, exponential, constant, got 'cubical'"),
    ],
)
def test_schedules_that_cannot_be_are_refused(numbers, message):
    """A ValueError prints the numbers that do not fit together."""
    with pytest.raises(ValueError, match=message):
        RankSchedule(*numbers)


# ---- Algorithm 1 ----


class Training(RuleBasedStateMachine):
    """Training, adjusting, saving and merging in any order keep the invariants of Algorithm 1."""

    @initialize(
        rank=st.integers(1, 5), k=st.integers(1, 3), b=st.integers(1, 4), seed=st.integers(0, 99)
    )
    def start(self, rank, k, b, seed):
        self.k, self.b, self.clock = k, b, 0
        self.model = adapted_net(rank, seed)
        self.total = 4 * rank
        self.base = {n: p.clone() for n, p in self.model.named_parameters() if "base_layer" in n}
        self.remember()

    def remember(self):
        self.optimizer, self.allocator = training(self.model, self.b, self.k)
        self.parameters = list(self.model.parameters())

    def tick(self, allocator=None):
        self.clock += 1
        return train_step(self.model, self.optimizer, allocator, self.clock)

    @rule(steps=st.integers(1, 3))
    def train(self, steps):
        for _ in range(steps):
            self.tick()

    @rule()
    def adjust(self):
        before = self.allocator.ranks()
        adjustment = self.tick(self.allocator)
        assert isinstance(adjustment, Adjustment) and adjustment.step == self.allocator.t
        for name, rank in self.allocator.ranks().items():
            change = adjustment.expanded.get(name, 0) - len(adjustment.pruned.get(name, []))
            assert rank == before[name] + change

    @rule(rank=st.integers(1, 5))
    def save_and_load(self, rank):
        file = io.BytesIO()
        states = (
            adapter_state_dict(self.model),
            self.optimizer.state_dict(),
            self.allocator.state_dict(),
        )
        torch.save(states, file)
        file.seek(0)
        adapters, optimizer, allocator = torch.load(file, weights_only=True)
        old = self.model
        self.model = adapted_net(rank)
        self.model.load_state_dict(self.base, strict=False)
        load_adapter_state_dict(self.model, adapters)
        self.remember()
        self.optimizer.load_state_dict(optimizer)
        self.allocator.load_state_dict(allocator)
        x = torch.randn(3, 6)
        assert torch.equal(self.model(x), old(x))

    @rule()
    def merge_a_copy(self):
        merged, x = merge(copy.deepcopy(self.model)), torch.randn(3, 6)
        assert not any(isinstance(module, SVDLinear) for module in merged.modules())
        torch.testing.assert_close(merged(x), self.model(x), rtol=1e-4, atol=1e-4)

    @invariant()
    def ranks_are_within_limits_and_their_sum_never_changes(self):
        ranks = self.allocator.ranks().values()
        assert sum(ranks) == self.total and all(1 <= rank <= 5 for rank in ranks)

    @invariant()
    def shapes_agree(self):
        for layer in self.allocator.layers.values():
            d_out, d_in = layer.base_layer.weight.shape
            shapes = {"P": (d_out, layer.rank), "Lambda": (layer.rank,), "Q": (layer.rank, d_in)}
            for factor, shape in shapes.items():
                w = getattr(layer, factor)
                assert w.shape == shape and w.grad is None
                tensors = [*self.allocator.averages[w].values(), *self.optimizer.state[w].values()]
                assert all(t.shape == shape for t in tensors if t.dim())

    @invariant()
    def base_weights_are_unchanged_to_the_bit(self):
        parameters = dict(self.model.named_parameters())
        assert all(torch.equal(parameters[name], value) for name, value in self.base.items())

    @invariant()
    def parameters_are_the_same_objects(self):
        pairs = itertools.zip_longest(self.parameters, self.model.parameters())
        assert all(old is new for old, new in pairs)


TestTraining = Training.TestCase
TestTraining.settings = settings(max_examples=25, stateful_step_count=15)


def test_algorithm_1_adjusts_at_its_steps_from_the_scores_of_that_step():
    """step() returns an Adjustment at schedule steps alone, by select() of the scores then."""
    model = adapted_net(3)
    schedule = RankSchedule(30, 4, 6, 5, 3, "linear")
    optimizer, allocator = training(model, k=2, schedule=schedule)
    for t in range(1, 31):
        train_step(model, optimizer, step=t)
        loss_of(model, t).backward()
        probe = copy.deepcopy(allocator)
        probe.schedule = RankSchedule(30, 4, 6, 5, 0)
        for w, own in zip(probe.factors.values(), allocator.factors.values()):
            w.grad = own.grad.clone()
        probe.step()
        scores = {name: S.tolist() for name, S in probe.importance().items()}
        adjustment = allocator.step()
        assert (adjustment is not None) == (t in (9, 14, 19))
        if adjustment:
            expected = select(scores, dict.fromkeys(ADAPTED, 5), 2, schedule.budget(t))
            assert (adjustment.pruned, adjustment.expanded) == expected
            assert (adjustment.step, adjustment.b) == (t, schedule.budget(t))


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    """Adapters, head, optimizer and allocator through a file into a model of another rank."""
    schedule = RankSchedule(40, 3, 5, 4, 3)

    def steps(model, optimizer, allocator, first, last):
        return [train_step(model, optimizer, allocator, t) for t in range(first, last)]

    whole = adapted_net(2)
    optimizer, allocator = training(whole, schedule=schedule)
    adjustments = steps(whole, optimizer, allocator, 0, 40)

    part = adapted_net(2)
    optimizer, allocator = training(part, schedule=schedule)
    steps(part, optimizer, allocator, 0, 17)
    states = (adapter_state_dict(part), optimizer.state_dict(), allocator.state_dict())
    torch.save(states, tmp_path / "checkpoint")
    resumed = adapted_net(5, alpha=1.0)
    optimizer, allocator = training(resumed, schedule=schedule)
    adapters, optimizer_state, allocator_state = torch.load(
        tmp_path / "checkpoint", weights_only=True
    )
    load_adapter_state_dict(resumed, adapters)
    optimizer.load_state_dict(optimizer_state)
    allocator.load_state_dict(allocator_state)
    assert steps(resumed, optimizer, allocator, 17, 40) == adjustments[17:]
    assert any(adjustment and adjustment.expanded for adjustment in adjustments[17:])
    got, expected = adapter_state_dict(resumed), adapter_state_dict(whole)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)


def test_allocators_and_states_that_do_not_fit_are_refused():
    """k, betas, a stray optimizer, foreign or misshapen states: a ValueError, and no change."""
    model = adapted_net()
    optimizer, allocator = training(model)
    for arguments, message in [
        (dict(k=0), "k must be an int >= 1, betas .*: 0, 0.85, 0.85"),
        (dict(beta1=1.0), r"betas in \(0, 1\): 1, 1.0, 0.85"),
        (dict(beta2=0.0), "1, 0.85, 0.0"),
        (dict(optimizer=torch.optim.SGD(model.head.parameters())), "not hold 'layers.0.query.P'"),
    ]:
        arguments = dict(optimizer=optimizer, schedule=allocator.schedule, k=1) | arguments
        with pytest.raises(ValueError, match=message):
            RankAllocator(model, **arguments)
    train_step(model, optimizer, allocator)
    state, fresh = allocator.state_dict(), training(adapted_net(4))[1]
    with pytest.raises(ValueError, match="does not fit; call load_adapter_state_dict"):
        fresh.load_state_dict(state)
    assert fresh.t == 0
    adapters = adapter_state_dict(model)
    before = adapter_state_dict(other := adapted_net(3))
    name = "layers.0.query"
    for change, message in [
        ({f"{name}.P": None}, f"missing in the state, or unknown to the model: {name}.P"),
        ({"layers.9.query.P": torch.zeros(1)}, "unknown to the model: layers.9.query.P"),
        (
            {f"{name}.P": torch.zeros(5, 9)},
            rf"{name}.P has shape \[5, 9\], the model needs \[5, \d\]",
        ),
        ({f"{name}.Lambda": torch.zeros(0)}, f"'{name}' must be an integer in 1..5, got 0"),
        ({"head.bias": torch.zeros(7)}, r"head.bias has shape \[7\], the model needs \[2\]"),
    ]:
        wrong = {key: value for key, value in (adapters | change).items() if value is not None}
        with pytest.raises(ValueError, match=message):
            load_adapter_state_dict(other, wrong)
        assert all(
            torch.equal(before[key], value) for key, value in adapter_state_dict(other).items()
        )


# ---- Life around the allocator ----


def adjusted(model, optimizer, allocator, step=0):
    adjustment = train_step(model, optimizer, allocator, step)
    assert adjustment.pruned and adjustment.expanded
    return adjustment


def test_an_old_loss_may_stay_alive_across_an_adjustment():
    """A kept graph of before does not break the next backward."""
    model = adapted_net()
    optimizer, allocator = training(model)
    adjusted(model, optimizer, allocator)
    old = loss_of(model, 1)
    old.backward(retain_graph=True)
    optimizer.step()
    assert allocator.step().expanded
    optimizer.zero_grad()
    adjusted(model, optimizer, allocator, 2)
    assert old.item() > 0


def test_lists_of_parameters_stay_good():
    """A list made before training still clips and counts every adapter after adjustments."""
    model = adapted_net()
    parameters = trainable(model)
    optimizer, allocator = training(model)
    for step in range(3):
        adjusted(model, optimizer, allocator, step)
    loss_of(model, 9).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in parameters)
    nn.utils.clip_grad_norm_(parameters, 1e-3)
    norm = torch.cat([p.grad.flatten() for p in trainable(model)]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_gradients_of_an_old_shape_never_stay():
    """After an adjustment, zero_grad(set_to_none=False) and accumulated gradients both go on."""
    model = adapted_net()
    optimizer, allocator = training(model)
    for step in range(4):
        for part in range(2):
            (loss_of(model, 2 * step + part) / 2).backward()
        optimizer.step()
        moved = allocator.step()
        for name in {**moved.pruned, **moved.expanded}:
            layer = allocator.layers[name]
            assert layer.P.grad is layer.Lambda.grad is layer.Q.grad is None
        optimizer.zero_grad(set_to_none=False)


def test_a_learning_rate_scheduler_keeps_its_optimizer():
    """The rate that a scheduler sets is the rate of the next update, adjustments or not."""
    model = adapted_net()
    optimizer, allocator = training(model, optimizer=torch.optim.SGD, lr=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    for step in range(3):
        adjusted(model, optimizer, allocator, step)
        rate.step()
    loss_of(model, 5).backward()
    w = model.layers[0].query.P
    expected = w - 0.01 / 8 * w.grad
    optimizer.step()
    torch.testing.assert_close(w, expected)


def test_compiled_models_follow_adjustments():
    """torch.compile(dynamic=True) gives the eager output before and after ranks moved."""
    model = adapted_net()
    optimizer, allocator = training(model)
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    for step in range(3):
        x = torch.randn(4, 6)
        torch.testing.assert_close(compiled(x), model(x))
        compiled(x).square().sum().backward()
        optimizer.step()
        assert allocator.step().expanded
        optimizer.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    """Recomputed activations see the resized factors."""
    model = adapted_net()
    optimizer, allocator = training(model)
    for step in range(3):
        x = torch.randn(4, 6, requires_grad=True)
        y = x
        for layer in model.layers:
            y = checkpoint(layer, y, use_reentrant=reentrant)
        model.head(y).square().sum().backward()
        got = [p.grad.clone() for p in trainable(model)]
        optimizer.zero_grad()
        model(x).square().sum().backward()
        torch.testing.assert_close(got, [p.grad for p in trainable(model)])
        optimizer.step()
        assert allocator.step().expanded
        optimizer.zero_grad()


# ---- After training ----


@given(
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
    st.sampled_from(["float32", "bfloat16"]),
    seeds,
)
def test_a_merged_model_computes_what_the_adapted_one_did(ranks, dtype, seed):
    """W0 + s P diag(Lambda) Q, in the base's dtype, in plain nn.Linears."""
    model = adapted_net(dict(zip(ADAPTED, ranks)), seed)
    expected = {}
    for name in ADAPTED:
        layer = randomize(model.get_submodule(name))
        layer.base_layer.to(getattr(torch, dtype))
        expected[name] = array(layer.base_layer.weight) + array(layer.delta_weight())
    x = torch.randn(3, 6)
    before = model(x) if dtype == "float32" else None
    assert merge(model) is model
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == "float32" else dict(rtol=1e-2, atol=1e-2)
    for name in ADAPTED:
        linear = model.get_submodule(name)
        assert type(linear) is nn.Linear and linear.weight.dtype == getattr(torch, dtype)
        np.testing.assert_allclose(array(linear.weight), expected[name], **tolerance)
    if dtype == "float32":
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    inject(model, ["query"], 1)  # what is merged can be adapted anew
    assert not any(key.startswith("head") for key in adapter_state_dict(model))


def test_merging_leaves_a_tied_weight_alone():
    """A weight that an embedding shares is not changed under the embedding."""
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "out": nn.Linear(4, 7)})
    model["out"].weight = model["embed"].weight
    inject(model, ["out"], 2)
    randomize(model["out"])
    before = model["embed"].weight.clone()
    merge(model)
    assert torch.equal(model["embed"].weight, before)
    assert not torch.equal(model["out"].weight, before)


def test_adapter_state_restores_saved_modules_and_scaling():
    """Another alpha and another head are overwritten; what comes back are copies."""
    model = adapted_net(2, alpha=4.0)
    optimizer, allocator = training(model)
    adjusted(model, optimizer, allocator)
    state = adapter_state_dict(model)
    other = adapted_net(4, alpha=1.0)
    nn.init.zeros_(other.head.weight)
    load_adapter_state_dict(other, state)
    x = torch.randn(3, 6)
    expected = model(x)
    assert torch.equal(other(x), expected)
    for value in state.values():
        value.zero_()
    assert torch.equal(model(x), expected) and torch.equal(other(x), expected)


def test_a_search_that_did_not_end_is_told_and_nothing_else():
    """merge() warns where the allocator never stepped or stopped early, and only there."""

    def merged_after(steps, b=2, fresh=False):
        model = adapted_net()
        optimizer, allocator = training(model, schedule=RankSchedule(9, 1, 4, 2, b))
        for step in range(steps):
            train_step(model, optimizer, allocator, step)
        if fresh:  # a model that only loads what was trained
            load_adapter_state_dict(other := adapted_net(1), adapter_state_dict(model))
            model = other
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            merge(model)
        return [str(warning.message) for warning in told]

    for steps in (0, 1, 4):
        (message,) = merged_after(steps)
        assert message == (
            f"ranks were to move until step 5, but RankAllocator.step() was called {steps} times"
        )
    assert merged_after(5) == merged_after(12) == merged_after(0, b=0) == []
    assert merged_after(0, fresh=True) == []


def test_a_resumed_search_is_told_of_by_its_own_steps():
    """An allocator that loads the state of an ended search is at its end."""
    model = adapted_net()
    optimizer, allocator = training(model, schedule=RankSchedule(9, 1, 4, 2, 2))
    for step in range(6):
        train_step(model, optimizer, allocator, step)
    load_adapter_state_dict(other := adapted_net(1), adapter_state_dict(model))
    resumed = training(other, schedule=allocator.schedule)[1]
    resumed.load_state_dict(allocator.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(other)


def test_plain_load_state_dict_takes_any_ranks():
    """A whole state_dict of other ranks loads into the same Parameters, strictly, scaling too."""
    model = adapted_net(3, alpha=4.0)
    adjusted(model, *training(model))
    other = adapted_net(1, seed=1)
    loss_of(other).backward()
    parameters = list(other.parameters())
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(old is new for old, new in zip(parameters, other.parameters(), strict=True))
    x = torch.randn(3, 6)
    assert torch.equal(other(x), model(x))
    assert all(p.grad is None or p.grad.shape == p.shape for p in parameters)


def test_sharded_weights_are_refused():
    """FSDP's DTensors and ZeRO-3's empty local weights: a ValueError from every function."""
    from torch.distributed.fsdp import fully_shard

    model, emptied = adapted_net(), adapted_net()
    for layer in elalora._adapted(emptied).values():
        layer.base_layer.weight.data = torch.empty(0)
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    try:
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        for sharded in (model, emptied):
            for function in (orthogonality_penalty, merge, adapter_state_dict):
                with pytest.raises(ValueError, match="'layers.0.query' is sharded .FSDP, ZeRO-3"):
                    function(sharded)
            with pytest.raises(ValueError, match="is sharded"):
                training(sharded)
        fully_shard(plain := Net(), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="is sharded .* DistributedDataParallel instead"):
            inject(plain, ["query"], 2)
    finally:
        torch.distributed.destroy_process_group()


def test_a_step_that_grad_scaler_skips_neither_scores_nor_breaks():
    """float16 with GradScaler: an overflow leaves weights and averages, adjustments go on."""
    model = adapted_net()
    schedule = RankSchedule(10**6, 0, 1, 2, 2, "constant")
    optimizer, allocator = training(model, schedule=schedule, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for t in range(1, 9):
        overflow = t in (1, 4, 5)
        x = torch.randn(4, 6) * (1e6 if overflow else 1)  # beyond float16's 65504
        with torch.autocast("cpu", torch.float16):
            loss = model(x).square().mean()
        scaler.scale(loss + 0.1 * orthogonality_penalty(model)).backward()
        weights, scores = adapter_state_dict(model), copy.deepcopy(allocator.importance())
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trainable(model), 1.0)
        scaler.step(optimizer)
        scaler.update()
        after = adapter_state_dict(model)
        assert overflow == all(torch.equal(after[key], value) for key, value in weights.items())
        adjustment = allocator.step()
        assert (adjustment is not None) == (t % 2 == 0)
        assert sum(allocator.ranks().values()) == 8
        if t % 2:
            same = all(torch.equal(allocator.importance()[n], S) for n, S in scores.items())
            assert same == overflow
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_overflow_in_the_head_alone_is_not_scored_either():
    """GradScaler skips a step for any gradient that the optimizer holds."""
    model = adapted_net()
    optimizer, allocator = training(model, b=0)
    train_step(model, optimizer, allocator)
    scores = copy.deepcopy(allocator.importance())
    loss_of(model, 1).backward()
    model.head.weight.grad[0, 0] = torch.inf
    allocator.step()
    assert all(torch.equal(allocator.importance()[name], S) for name, S in scores.items())


def test_ranks_that_were_loaded_under_an_allocator_are_told():
    """Its averages belong to the old ranks: a ValueError says what to load."""
    model = adapted_net(2)
    optimizer, allocator = training(model, optimizer=torch.optim.SGD)
    for rank in (1, 3):
        load_adapter_state_dict(model, adapter_state_dict(adapted_net(rank)))
        loss_of(model).backward()
        with pytest.raises(ValueError, match="not the allocator's own load_state_dict"):
            allocator.step()


@pytest.mark.parametrize(
    "base, autocast", [("bfloat16", False), ("bfloat16", True), ("float32", True)]
)
def test_low_precision_training_follows_float32(base, autocast):
    """With a bfloat16 base or autocast the loss falls alike, and adapters stay float32."""

    def losses(dtype, enabled):
        model = inject(Net().to(dtype), ["query", "dense"], 2, modules_to_save=["head"])
        optimizer, allocator = training(model, schedule=RankSchedule(20, 4, 6, 5, 2), lr=0.02)
        x, found = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), []
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(x.to(dtype)).float().square().mean()
            loss.backward()
            optimizer.step()
            allocator.step()
            optimizer.zero_grad()
            found.append(loss.item())
        assert all(w.dtype == torch.float32 for w in allocator.factors.values())
        assert sum(allocator.ranks().values()) == 8
        return np.array(found)

    expected = losses(torch.float32, False)
    assert expected[-1] < 0.8 * expected[0]
    np.testing.assert_allclose(losses(getattr(torch, base), autocast), expected, rtol=0.1)


# ---- PEFT ----


def deberta():
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(**TINY, intermediate_size=32, relative_attention=True)
    config.update(dict(pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8))
    return DebertaV2ForSequenceClassification(config)


def bert(**changes):
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**TINY, intermediate_size=32, **changes))


def bart():
    from transformers import BartConfig, BartForSequenceClassification

    sizes = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in BART.items()}
    return BartForSequenceClassification(BartConfig(d_model=16, vocab_size=40, **sizes))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TINY, intermediate_size=24, num_key_value_heads=1))


TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
BART = dict(layers=2, attention_heads=2, ffn_dim=32)
ARCHITECTURES = {
    "DeBERTaV2": (deberta, ["query_proj", "value_proj", "output.dense"], ["pooler", "classifier"]),
    "BERT": (bert, ["query", "intermediate.dense"], ["pooler", "classifier"]),
    "BART": (bart, ["q_proj", "fc1", "encoder_attn.v_proj"], ["classification_head"]),
    "Llama": (llama, ["q_proj", "k_proj", "down_proj"], ["lm_head"]),
    "Llama, heads apart": (llama, ["q_proj", "up_proj"], []),
}


@pytest.mark.parametrize("build, targets, heads", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_an_exported_adapter_gives_the_same_logits_in_peft(build, targets, heads, tmp_path):
    """After ranks moved, PEFT's model and its merge_and_unload agree with ours, to 1e-5."""
    import peft

    base = build().eval()
    model = inject(copy.deepcopy(base), targets, 2, modules_to_save=heads)
    optimizer, allocator = training(model, k=1, schedule=RankSchedule(6, 0, 1, 3, 1, "constant"))
    ids = torch.randint(3, 40, (3, 7))
    ids[:, -1] = 2  # BART reads the state of the end token
    for _ in range(6):
        logits = model(ids).logits
        (logits.square().mean() + orthogonality_penalty(model)).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    assert len(set(allocator.ranks().values())) > 1
    elalora.export_peft(model, tmp_path / "peft", "a/base")
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    assert loaded.peft_config["default"].base_model_name_or_path == "a/base"
    expected = model(ids).logits
    assert (expected - base(ids).logits).abs().max() > 1e-2
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(ids).logits, expected, **close)
    unloaded, merged = loaded.merge_and_unload(), merge(model)
    torch.testing.assert_close(unloaded(ids).logits, merged(ids).logits, **close)
    torch.testing.assert_close(merged(ids).logits, expected, **close)
    ours, theirs = merged.state_dict(), unloaded.state_dict()
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(dict(ours), dict(theirs), **close)


class Tails(nn.Module):
    """Names that are the tails of others: of adapted ones, of saved ones, of both."""

    NAMES = ["fc", "block.fc", "head", "overhead", "xhead", "ahead.fc", "ahead.rest", "Xfc"]

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            parent, _, last = name.rpartition(".")
            if parent not in dict(self.named_modules()):
                self.add_module(parent, nn.Module())
            self.get_submodule(parent).add_module(last, nn.Linear(6, 6))

    def forward(self, x):
        for name in self.NAMES:
            x = x + torch.tanh(self.get_submodule(name)(x))
        return x


@pytest.mark.parametrize(
    "adapted", [["fc", "xhead"], ["Xfc", "ahead.fc"], ["fc", "block.fc", "ahead.fc"]]
)
def test_peft_finds_each_module_where_names_are_tails_of_others(adapted, tmp_path):
    """Adapters and saved modules come to where they were, and other modules stay as they are."""
    import peft

    base = Tails()
    ranks = {name: 1 + i for i, name in enumerate(elalora._matching(base, adapted, ""))}
    model = inject(copy.deepcopy(base), adapted, ranks, modules_to_save=["head"])
    for name, layer in elalora._adapted(model).items():
        randomize(layer)
        if name not in adapted:  # "fc" adapts "block.fc" too
            model.set_submodule(name, layer.base_layer)
    nn.init.normal_(model.head.weight)
    elalora.export_peft(model, tmp_path, "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(4, 6)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loaded.merge_and_unload()(x), merge(model)(x), rtol=1e-5, atol=1e-4)


def test_what_peft_would_adapt_wrongly_is_not_exported(tmp_path):
    """A layer in two places, a bare one, or none that it would adapt: a ValueError, no file."""
    shared = nn.Linear(4, 4)
    model = inject(nn.Sequential(shared, nn.Tanh(), shared), ["0"], 2)
    none = inject(Tails(), ["overhead"], 2, modules_to_save=["head"])
    for refused in (model, SVDLinear(nn.Linear(4, 4), 2), none):
        with pytest.raises(ValueError, match="it stands twice, or ends like a saved module"):
            elalora.export_peft(refused, tmp_path / "peft", "base")
    assert not (tmp_path / "peft").exists()


# ---- The method ----


def test_planted_ranks_are_found():
    """On matrices of planted rank 6, 1, 1, 0 the residual ends below any even allocation's."""
    torch.manual_seed(0)
    planted, d = [6, 1, 1, 0], 16
    model = nn.Sequential(*(nn.Linear(d, d, bias=False) for _ in planted))
    deltas = torch.stack(
        [nn.init.orthogonal_(torch.empty(d, d))[:, :r] @ torch.eye(d)[:r] for r in planted]
    )
    targets = torch.stack([layer.weight.data.clone() for layer in model]) + deltas
    inject(model, ["0", "1", "2", "3"], 2)
    optimizer = torch.optim.AdamW(trainable(model), 2e-2, weight_decay=0.0)
    allocator = RankAllocator(model, optimizer, RankSchedule(500, 60, 150, 20, 1), k=1)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 500)
    for _ in range(500):
        x = torch.randn(32, d)
        outputs = torch.stack([layer(x) for layer in model])
        loss = (outputs - x @ targets.mT).square().sum(dim=-1).mean()
        (loss + 0.1 * orthogonality_penalty(model)).backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        rate.step()
    found = torch.stack([layer.delta_weight() for layer in model]).detach()
    residual = ((found - deltas).square().sum() / deltas.square().sum()).item()
    assert residual < (6 - 2) / 8  # Eckart-Young at rank 2 everywhere
    assert residual < (6 - 5) / 8 + 0.01  # nearly the best that 8 ranks can do
    assert list(allocator.ranks().values()) == [5, 1, 1, 1]


# ---- reproduce.py ----


@pytest.mark.parametrize("names", ["abc", "ac", "b"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_planted_bounds_are_what_trying_all_allocations_finds(rank, names, monkeypatch):
    """The even bound, and the least residual of any ranks >= 1 of the same sum."""
    monkeypatch.setattr(reproduce, "PLANTED", planted := {"a": 4, "b": 2, "c": 0})
    squares = {name: np.linspace(1, 0.5, r) ** 2 for name, r in planted.items()}
    total = sum(s.sum() for s in squares.values())
    rest = sum(squares[name].sum() for name in planted if name not in names)
    residuals = {
        ranks: (rest + sum(squares[n][r:].sum() for n, r in zip(names, ranks))) / total
        for ranks in itertools.product(range(1, 3 * rank + 1), repeat=len(names))
        if sum(ranks) == len(names) * rank
    }
    expected = residuals[(rank,) * len(names)], min(residuals.values())
    assert reproduce.planted_bounds(rank, names) == pytest.approx(expected, abs=1e-6)


def recipe_of(task="mrpc", rank=4, epochs=None, **settings):
    settings = [f"{name}={value}" for name, value in settings.items()]
    return reproduce.recipe_of(Namespace(task=task, rank=rank, epochs=epochs, set=settings))


def test_other_epochs_scale_the_phases_and_other_ranks_take_the_nearest_row():
    """max(1, floor(x * epochs / the table's)); ties between rows go to the smaller rank."""
    recipe, table = recipe_of(epochs=7), reproduce.RECIPES["rte"]
    assert (recipe.epochs, recipe.warmup, recipe.stabilize, recipe.interval) == (7, 70, 93, 11)
    assert recipe_of(epochs=30) == recipe_of() == reproduce.RECIPES["mrpc"]._replace(b=2, k=1)
    assert recipe_of("cola", epochs=1).interval == 2 and recipe_of("rte", epochs=1).interval == 1
    for rank, row in {1: 0, 2: 0, 3: 0, 4: 1, 6: 1, 7: 1, 8: 2, 10: 2, 64: 2}.items():
        recipe = recipe_of("rte", rank)
        assert (recipe.b, recipe.k) == (table.b[row], table.k[row])


def test_set_replaces_a_field_and_keeps_its_type():
    """Any number or name of a recipe within its range; else it is refused with all that are."""
    recipe = recipe_of(learning_rate="2e-3", b=0, shape="linear", beta1=0.9)
    expected = recipe_of()._replace(learning_rate=2e-3, b=0, shape="linear", beta1=0.9)
    assert recipe == expected and type(recipe.b) is int
    assert recipe_of(gamma=0).gamma == 0
    wrong = dict(
        ranks=3, b=0.5, gamma="much", paper=1, count=1, _fields=1, k=0, shape="cube", moments=0
    )
    for name, value in [*wrong.items(), ("alpha", -1), ("beta1", 1), ("gamma", "nan")]:
        with pytest.raises(ValueError, match=f"--set {name}={value}: takes NAME=VALUE, .* gamma="):
            recipe_of(**{name: value})


TSV = {
    "header": ("index\tsentence1\tlabel\n", "no column 'sentence2'"),
    "columns": (
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\n",
        "line 2: more or fewer than 4 columns",
    ),
    "label": (
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n",
        "line 2: the label is 'maybe', not",
    ),
    "empty": ("index\tsentence1\tsentence2\tlabel\n", "no examples"),
    "nothing": ("", "no column"),
}


@pytest.mark.parametrize("text, message", TSV.values(), ids=TSV)
def test_bad_tsv_files_are_named_with_line_and_reason(text, message, tmp_path):
    """The error carries the file, the line and what would be right."""
    path = tmp_path / "train.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"train.tsv.*{message}"):
        reproduce.read_tsv(path, reproduce.TASKS["rte"])


def test_tsv_files_are_read_literally(tmp_path):
    """Quotes, a byte-order mark and other line separators are text; CoLA has no header."""
    path = tmp_path / "train.tsv"
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    path.write_bytes((header + '1\t2\t3\t" a\u2028b\t""\r\n').encode())
    assert reproduce.read_tsv(path, reproduce.TASKS["mrpc"]) == ([['" a\u2028b'], ['""']], [1])
    path.write_text("gj04\t0\t*\tThem is late.\n")
    assert reproduce.read_tsv(path, reproduce.TASKS["cola"]) == ([["Them is late."]], [0])


@st.composite
def tsv_files(draw):
    """A task, good rows of it, and the bytes of a file of them, whole or damaged somewhere."""
    task = reproduce.TASKS[draw(st.sampled_from(sorted(reproduce.TASKS)))]
    text = st.text(
        st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]), max_size=8
    )
    label = st.sampled_from(task.labels) if task.labels else st.floats(0, 5).map(str)
    rows = draw(st.lists(st.tuples(label, *[text] * len(task.texts)), min_size=1, max_size=5))
    header = task.header or draw(st.permutations(["index", task.tsv_label, *task.tsv_texts]))
    lines = [] if task.header else ["\t".join(header)]
    for values in rows:
        cells = dict(zip((task.tsv_label, *task.tsv_texts), values))
        lines.append("\t".join(cells.get(name, "x") for name in header))
    content = "\n".join(lines).encode() + draw(st.sampled_from([b"", b"\n"]))
    damage = draw(st.sampled_from(["none", "none", "bytes", "cut", "label"]))
    if damage == "bytes":
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(min_size=1, max_size=3)) + content[at:]
    elif damage == "cut":
        content = content[: draw(st.integers(0, len(content) - 1))]
    elif damage == "label":
        wrong = draw(st.sampled_from(["", "2", "nan", "inf", "Entailment", " "]))
        lines[-1] = "\t".join(wrong if n == task.tsv_label else "x" for n in header)
        content = "\n".join(lines).encode()
    return task, rows, content, damage


@given(tsv_files())
@settings(max_examples=400)
def test_every_tsv_file_loads_or_ends_in_an_error_that_names_it(case):
    """Good files give their rows literally; damaged ones load or are named by a ValueError."""
    task, rows, content, damage = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.tsv")
        path.write_bytes(content)
        try:
            texts, labels = reproduce.read_tsv(path, task)
        except ValueError as error:
            assert str(error).startswith(str(path)) and damage != "none"
            return
    assert damage != "label" or labels[-1] == 2
    assert len(texts) == len(task.texts) and {len(column) for column in texts} == {len(labels)}
    if task.labels:
        assert all(label in range(len(task.labels)) for label in labels)
    else:
        assert all(np.isfinite(labels))
    if damage == "none":
        expected = [task.labels.index(row[0]) if task.labels else float(row[0]) for row in rows]
        assert labels == expected and list(zip(*texts)) == [row[1:] for row in rows]


def test_an_empty_sentence_trains(tiny, tmp_path, monkeypatch):
    """A text without characters is legal: special tokens alone."""
    shutil.copytree(tiny, tmp_path / "given")
    path = tmp_path / "given/RTE/train.tsv"
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    for line in lines[1::2]:
        line[1:3] = "", ""
    path.write_text("\n".join("\t".join(line) for line in lines))
    monkeypatch.chdir(tmp_path)
    reproduce.load_examples.cache_clear()
    command = ["--task", "rte", "--model", "given/deberta", "--data-dir", "given", "--epochs", "1"]
    reproduce.main(command)
    assert Path("runs/rte-elalora-r4-s0/results.json").exists()


@pytest.fixture(scope="module")
def deberta_tokenizer(tmp_path_factory):
    """A DebertaV2Tokenizer with a SentencePiece model of many characters, and that model."""
    import sentencepiece
    import transformers

    folder = tmp_path_factory.mktemp("spm")
    ascii = [chr(i) for i in range(33, 127)]
    (folder / "text").write_text("\n".join(f"{a}{b} {b}{a} ... 1/2" for a in ascii for b in ascii))
    tokens = {f"{name}_id": i for i, name in enumerate(("pad", "bos", "eos", "unk"))}
    names = dict(pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spm"), vocab_size=150,
        character_coverage=1.0, minloglevel=2, model_type="unigram", **tokens, **names,
    )  # fmt: skip
    (folder / "config.json").write_text('{"model_type": "deberta-v2"}')
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    return transformers.AutoTokenizer.from_pretrained(folder), pieces


@given(
    st.lists(
        st.sampled_from(["…", "½", "\u00a0", "ＦＵＬＬ", "％", "ﬁ", "™", "\u200b", "é", "e\u0301"])
        | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=4),
        max_size=8,
    ).map("".join)
)
@settings(max_examples=300)
@example("½ cup… of\u00a0tea, ＦＵＬＬ")
def test_deberta_texts_are_split_as_sentencepiece_splits_them(deberta_tokenizer, text):
    """With its character map restored, transformers' tokenizer gives SentencePiece's own pieces."""
    tokenizer, pieces = deberta_tokenizer
    mapped = reproduce.character_map(tokenizer)
    got = tokenizer(mapped(text), add_special_tokens=False)["input_ids"]
    assert got == pieces.encode(text)
    assert mapped(text) == text or not text.isascii()


def test_the_character_map_is_needed_and_for_sentencepiece_alone(deberta_tokenizer):
    """Left to transformers, these texts are other tokens; a WordPiece tokenizer is left alone."""
    tokenizer, pieces = deberta_tokenizer
    for text in ("…", "½", "a\u00a0b", "ＦＵＬＬ"):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] != pieces.encode(text)
    assert reproduce.character_map(SimpleNamespace(vocab_file="vocab.txt"))("½…") == "½…"


@pytest.mark.skipif("GLUE_DIR" not in os.environ, reason="GLUE_DIR names no folder of GLUE's TSVs")
@pytest.mark.parametrize(
    "task, train, dev",
    [
        ("mrpc", 3668, 408),
        ("rte", 2490, 277),
        ("stsb", 5749, 1500),
        ("sst2", 67349, 872),
    ],
)
def test_the_real_files_have_the_published_sizes(task, train, dev):
    """Table 6's and GLUE's numbers of examples, with all labels understood."""
    task = reproduce.TASKS[task]
    for stem, size in (("train", train), ("dev", dev)):
        texts, labels = reproduce.read_tsv(
            Path(os.environ["GLUE_DIR"], task.folder, f"{stem}.tsv"), task
        )
        assert {len(labels), *map(len, texts)} == {size}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model folder as microsoft/deberta-v3-base on the hub, and RTE and STS-B, all tiny."""
    import sentencepiece
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    root = tmp_path_factory.mktemp("tiny")
    model, words = root / "deberta", "the a cat dog sat ran on under mat house red blue".split()
    model.mkdir()
    torch.manual_seed(0)
    rows = [
        [" ".join(words[i] for i in torch.randint(12, (n,))) for n in (5, 4)] for _ in range(1950)
    ]
    (root / "text").write_text("\n".join(a for a, _ in rows))
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "text"),
        model_prefix=str(model / "spm"),
        vocab_size=40,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (model / "spm.vocab").unlink()
    config = dict(
        model_type="deberta-v2",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        vocab_size=64,
        num_attention_heads=2,
        relative_attention=True,
        position_buckets=16,
        pos_att_type="p2c|c2p",
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        type_vocab_size=0,
        position_biased_input=False,
    )
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    net = DebertaV2ForSequenceClassification(DebertaV2Config(**{**config, "model_type": None}))
    encoder = {k: v.half() for k, v in net.state_dict().items() if k.startswith("deberta.")}
    torch.save(encoder, model / "pytorch_model.bin")
    for folder, header, label in [
        (
            "RTE",
            "index\tsentence1\tsentence2\tlabel",
            lambda a: ("not_" * ("red" in a)) + "entailment",
        ),
        ("STS-B", "index\tsentence1\tsentence2\tscore", lambda a: f"{a.count('a') / 2:.3f}"),
    ]:
        (root / folder).mkdir()
        for stem, part in (("train", rows), ("dev", rows[:40])):
            lines = [f"{i}\t{a}\t{b}\t{label(a)}" for i, (a, b) in enumerate(part)]
            (root / folder / f"{stem}.tsv").write_text("\n".join([header, *lines, ""]))
    return root


def python(*command, cwd, threads=2):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd.parent / "empty")}
    environment = os.environ | offline | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(HERE)}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def reproduce_py(*arguments, cwd):
    return python(HERE / "reproduce.py", *arguments, cwd=cwd)


def torchrun(script, *arguments, cwd):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    return python(*launch, script, *arguments, cwd=cwd, threads=1)


@pytest.mark.parametrize(
    "task, metrics", [("rte", ["accuracy"]), ("stsb", ["pearson", "spearman"])]
)
def test_reproduce_runs_end_to_end_on_the_hubs_layout(
    task, metrics, tiny, tmp_path, monkeypatch, capsys
):
    """A run from a float16 checkpoint without head and tokenizer.json writes all it promises."""
    arguments = ["--task", task, "--rank", 3, "--epochs", 1]
    arguments += ["--model", tiny / "deberta", "--data-dir", tiny]
    result = reproduce_py(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / f"runs/{task}-elalora-r3-s0"
    names = {"results.json", "ranks.png", "importance.png", "adapter.safetensors", "peft"}
    assert {path.name for path in folder.iterdir()} == names
    results = json.loads((folder / "results.json").read_text())
    assert list(results["metrics"]) == metrics
    assert results["total_steps"] == 31 and len(results["history"]) == 1
    ranks = results["ranks"]
    assert len(ranks) == 12 and sum(ranks.values()) == 36 and results["adjustments"]
    size = {"intermediate.dense": 16 + 32, "output.dense": 32 + 16}
    expected = sum(
        r * (size.get(re.sub(r".*layer\.\d+\.", "", name), 32) + 1) for name, r in ranks.items()
    )
    assert results["adapter_parameters"] == expected
    head = 16 * 16 + 16 + (17 if task == "stsb" else 34)
    assert results["trainable_parameters"] == expected + head
    # The adapter, put on a fresh base, is the model that was measured.
    config = Namespace(**results["arguments"])
    recipe = reproduce.recipe_of(config)
    problem = reproduce.glue_problem(config, recipe)
    inject(problem.model, problem.targets, ranks, modules_to_save=problem.heads)
    from safetensors.torch import load_file

    load_adapter_state_dict(problem.model, load_file(folder / "adapter.safetensors"))
    problem.model.to(reproduce.DEVICE).eval()
    assert problem.evaluate() == pytest.approx(results["metrics"], abs=1e-3)
    # So it is in PEFT.
    import peft

    base, _, _ = reproduce.load_model(config, 2 if task == "rte" else 1)
    loaded = peft.PeftModel.from_pretrained(base, folder / "peft").eval()
    ids = torch.randint(4, 40, (5, 9))
    torch.testing.assert_close(loaded(ids).logits, problem.model(ids).logits, rtol=0, atol=1e-5)
    # Again: finished before. With other arguments: refused.
    monkeypatch.chdir(tmp_path)
    reproduce.main(list(map(str, arguments)))
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        reproduce.main([*map(str, arguments), "--dtype", "bfloat16"])
    message = "it has dtype float32, not bfloat16; delete it or take another --output-dir"
    assert message in capsys.readouterr().err


def rte_config(tiny, **arguments):
    config = dict(task="rte", data_dir=str(tiny), model=str(tiny / "deberta"), dtype="float32")
    config |= dict(seed=0, rank=2, method="elalora", targets=[""], holdout=False)
    return Namespace(**config | arguments)


def rte_problem(tiny, **arguments):
    return reproduce.glue_problem(rte_config(tiny, **arguments), reproduce.RECIPES["rte"])


def test_the_loss_of_a_batch_in_parts_is_the_loss_of_the_batch(tiny):
    """Sorting a batch by length and padding its parts apart changes neither loss nor gradient."""
    problem = rte_problem(tiny)
    problem.model.eval()
    parts = next(iter(problem.batches(1)))
    assert len(parts) == (4 if reproduce.DEVICE == "cpu" else 1)
    pad, _ = reproduce.load_examples("rte", str(tiny), str(tiny / "deberta"))
    rows = [
        {
            key: values[i][part["attention_mask"][i].bool()] if key != "labels" else values[i]
            for key, values in part.items()
        }
        for part in parts
        for i in range(len(part["labels"]))
    ]
    assert len(rows) == 64
    loss = problem.loss(problem.model, parts)
    expected = problem.model(**pad(rows[::-1]).to(reproduce.DEVICE)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    weights = [p for p in problem.model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad(x, weights, allow_unused=True) for x in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone(tiny):
    """Whatever was drawn before, an epoch's batches are the same; other epochs and seeds differ."""

    def order(seed, epoch):
        batches = rte_problem(tiny, seed=seed).batches(epoch)
        return [part["input_ids"].tolist() for parts in batches for part in parts]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)


def test_planted_runs_repeat_to_the_bit(tmp_path, monkeypatch):
    """Two runs of a seed end alike, two seeds do not; the sum of the ranks is kept."""
    monkeypatch.chdir(tmp_path)
    reproduce.main(["--epochs", "1", "--seeds", "0", "1"])
    reproduce.main(["--epochs", "1", "--output-dir", "again"])
    folders = ("runs/planted-elalora-r4-s0", "again/planted-elalora-r4-s0")
    folders += ("runs/planted-elalora-r4-s1",)
    results = [json.loads(Path(folder, "results.json").read_text()) for folder in folders]
    same, other, seed_1 = [(r["metrics"], r["ranks"], r["adjustments"]) for r in results]
    assert same == other != seed_1
    assert sum(results[0]["ranks"].values()) == 288
    assert results[0]["adapter_parameters"] == 288 * 129


def test_pruned_ranks_are_counted_as_if_each_had_been_followed():
    """Through random adjustments, where every rank carries whether one of them had added it."""
    random = np.random.default_rng(0)
    followed, adjustments, pruned = {"a": [False] * 4, "b": [False] * 4}, [], []
    for _ in range(40):
        indices = {}
        for name, added in followed.items():
            lost = random.choice(len(added), random.integers(len(added)), replace=False)
            indices[name] = sorted(lost.tolist())
            pruned += [added[i] for i in lost]
            kept = [was for i, was in enumerate(added) if i not in lost]
            followed[name] = kept + [True] * int(random.integers(4))
        adjustments.append(dict(pruned=indices))
    results = dict(rank=4, ranks={name: len(x) for name, x in followed.items()})
    counts = reproduce.count_pruned(results | dict(adjustments=adjustments))
    assert counts == (len(pruned), sum(pruned)) and 0 < sum(pruned) < len(pruned)


def test_the_tables_are_what_numpy_makes_of_the_runs(tmp_path, monkeypatch):
    """Means and deviations; paired differences, decided by Student's t from 5 seeds on; Spearman's
    correlations of the ranks; the commands; the scores at the end of the searches, drawn."""
    random, runs = np.random.default_rng(0), {}
    matrices = [f"layer.{i}.{matrix}" for i in range(3) for matrix in "abc"]
    for run, seeds, mean in (
        ("elalora-r4", 6, 0.3),
        ("lora-r4", 6, 0.1),
        ("adalora-r4", 3, 0.2),
        ("adalora-r2", 1, 0.2),
    ):
        for seed in range(seeds):
            runs[run, seed] = dict(
                method=run.split("-")[0], seed=seed,
                metrics=dict(accuracy=mean + random.normal() / 100),
                adapter_parameters=1234, seconds=90, history=[dict(train_loss=random.random())],
                ranks=dict(zip(matrices, random.permutation(9).tolist())),
                rank=4, adjustments=[dict(pruned={matrices[0]: [3]})] * (seed + 1),
                scores={"5": [1.0, 0.0], "9": [0.0, *random.random(4)] if run != "lora-r4" else []},
                command=f"python reproduce.py --seeds {seed % 2}",
                arguments=dict(task="mrpc", method=run.split("-")[0], rank=int(run[-1]), seed=seed,
                               targets=[""], set=[], epochs=4),
            )  # fmt: skip
            (folder := tmp_path / f"mrpc-{run}-s{seed}").mkdir()
            (folder / "results.json").write_text(json.dumps(runs[run, seed]))
    drawn = []
    monkeypatch.setattr(reproduce, "plot_scores", lambda scores, path: drawn.append(scores))
    monkeypatch.setattr(reproduce, "replace", lambda path, write: write(path))
    config = Namespace(**runs["lora-r4", 0]["arguments"])
    for other, arguments in (("old", {}), ("longer", vars(config) | dict(epochs=5, seed=9))):
        (folder := tmp_path / f"mrpc-{other}").mkdir()  # left out
        (folder / "results.json").write_text(json.dumps(dict(arguments=arguments)))
    text = reproduce.compare(tmp_path, config)
    page = (tmp_path / "table.md").read_text()
    commands = "".join(f"python reproduce.py --seeds {i}\n" for i in (0, 1))
    assert page == f"```sh\n{commands}```\n\n{reproduce.LEGEND}\n\n{text}\n"
    assert drawn == [{f"{run}-s0": runs[run, 0]["scores"]["9"] for run, _ in runs}]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    start = rows.index(["mean ranks", *"abc"])
    table = {row[0]: row[1:] for row in rows[:start] if row}
    b = [runs["lora-r4", i]["ranks"][f"layer.{j}.b"] for i in range(6) for j in range(3)]
    means = np.reshape(b, (6, 3)).mean(axis=1)
    cell = dict((row[0], row[2]) for row in rows[start : start + 6])["lora-r4"]
    assert cell == f"{means.mean():.4f} ± {means.std(ddof=1):.4f}"

    def accuracy(run, seeds=6):
        return np.array([runs[run, i]["metrics"]["accuracy"] for i in range(seeds)])

    losses = [runs["lora-r4", i]["history"][-1]["train_loss"] for i in range(6)]
    for cell, values in zip(table["lora-r4"], (accuracy("lora-r4"), losses)):
        assert cell == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    pruned, again = np.arange(1, 7), np.arange(6)  # at first an initial rank
    pruned, again = (f"{x.mean():.4f} ± {x.std(ddof=1):.4f}" for x in (pruned, again))
    assert table["lora-r4"][2:] == ["1,234 ± 0", "1.5000 ± 0.0000", pruned, again, *3 * [""], "6"]
    scores = [np.maximum(runs["elalora-r4", i]["scores"]["9"], 1e-20) for i in range(6)]
    for cell, share in zip(table["elalora-r4"][6:9], (0.1, 0.5, 0.9)):
        values = np.quantile(np.log10(scores), share, axis=1)
        assert cell == f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"
    difference = accuracy("elalora-r4") - accuracy("lora-r4")
    mean, std = difference.mean(), difference.std(ddof=1)
    half = 2.5705818366 * std / np.sqrt(6)  # Student's t, 5 degrees of freedom, 97.5%
    assert table["elalora-r4 − lora-r4"] == [
        f"{mean:+.4f} ± {std:.4f}", f"{mean - half:+.4f} to {mean + half:+.4f}", "higher"
    ]  # fmt: skip
    difference = accuracy("adalora-r4", 3) - accuracy("lora-r4", 3)
    assert table["adalora-r4 − lora-r4"] == [
        f"{difference.mean():+.4f} ± {difference.std(ddof=1):.4f}", "", "undecided at 3 seeds"
    ]  # fmt: skip
    assert len([name for name in table if "−" in name]) == 3  # none of adalora-r2, of one seed
    moving = ["adalora-r2", "adalora-r4", "elalora-r4"]
    start = rows.index(["rank correlations", *moving])
    cells = {row[0]: dict(zip(moving, row[1:])) for row in rows[start + 2 :]}
    assert [*cells] == moving
    for m, n in itertools.product(moving, repeat=2):
        pairs = [(a, b) for a, b in itertools.permutations(runs, 2) if (a[0], b[0]) == (m, n)]
        maps = [[[*runs[key]["ranks"].values()] for key in pair] for pair in pairs]
        found = [np.corrcoef(*pair)[0, 1] for pair in maps]
        spread = f"({min(found):.2f} to {max(found):.2f})" if found else ""
        assert cells[m][n] == (f"{np.mean(found):.2f} {spread}" if found else "")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "wnli"], "invalid choice: 'wnli'"),
        (["--rank", "0"], "--rank and --epochs take integers >= 1"),
        (["--rank", "four"], "invalid int value: 'four'"),
        (["--task", "mrpc", "--data-dir", "nowhere"], "No such file .* 'nowhere/MRPC/train.tsv'"),
        (["--task", "mrpc", "--model", "./nowhere"], "nowhere is no folder with a config.json"),
        (["--rank", "1"], "--rank 1: 2 to 11 leave a choice"),
        (["--epochs", "0"], "--rank and --epochs take integers >= 1"),
        (["--rank", "12"], "--rank 12: 2 to 11 leave a choice"),
        (["--dtype", "bfloat16"], "--model, --data-dir, --dtype, --holdout are for GLUE"),
        (["--rank", "-4"], "--rank and --epochs take integers >= 1"),
        (["--seeds", "-1"], "--seeds integers >= 0"),
        (["--seeds", "3", "1", "3"], r"--seeds \[3, 1, 3\]: name each but once"),
        (["--rank", "4", "4"], r"--rank \[4, 4\]: name each but once"),
        (["--benchmark", "--rank", "2", "4"], "--benchmark takes one rank, one seed and one"),
        (["--benchmark", "--set", "b=2"], "no --method, --set, --epochs, --holdout"),
        (
            ["--benchmark", "--dtype", "bfloat16"],
            "--model, --data-dir, --dtype, --holdout are for GLUE",
        ),
        (["--benchmark", "--model", "./nowhere"], "nowhere is no folder with a config.json"),
        (["--targets", "dense", "bias"], "--targets bias: none of .*output.dense ends so"),
        (["--set", "b=1", "--set", "k=two"], "--set k=two: takes NAME=VALUE, .* b=1, "),
        (["--set", "epochs=2"], "--set epochs=2: takes NAME=VALUE, like Recipe"),
        (["--output-dir", "/dev/null/runs"], "--output-dir: cannot write in /dev/null: Not a dir"),
        (["--output-dir", "/proc/runs"], "--output-dir: cannot write in /proc"),
    ],
)
def test_bad_arguments_end_in_one_line_and_exit_code_2(
    arguments, message, tmp_path, monkeypatch, capsys
):
    """What does not fit is named before any work, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        reproduce.main(arguments)
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert not list(tmp_path.iterdir())


def edit(name, old, new, count=1):
    def change(folder):
        (folder / name).write_bytes((folder / name).read_bytes().replace(old, new, count))

    return change


def without_weights(folder):
    (folder / "deberta/pytorch_model.bin").unlink()


def cut(name):
    def change(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:-500])

    return change


def without_pad_token(folder, **tokens):
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **tokens)
    tokenizer.save_pretrained(folder / "deberta")
    (folder / "deberta/spm.model").unlink()


def unlike_bert(folder):
    import transformers

    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, pad_token_id=0)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(folder / "deberta")
    without_pad_token(folder, pad_token="b")


def few_rows(folder):
    lines = (folder / TRAIN).read_text().splitlines()
    (folder / TRAIN).write_text("\n".join(lines[:101]))


TRAIN = "RTE/train.tsv"
HOSTILE = {  # what is done to a good folder, further arguments, the error
    "header alone": (lambda f: (f / TRAIN).write_text("index\tsentence1\tsentence2\tlabel\n"), [],
                     "train.tsv: no examples"),
    "nothing": (lambda f: (f / TRAIN).write_text(""), [], "train.tsv, line 0: no column"),
    "truncated": (lambda f: (f / TRAIN).write_bytes((f / TRAIN).read_bytes()[:5000]), [],
                  r"train.tsv, line \d+: (more or fewer than 4 columns|the label is)"),
    "columns": (edit(TRAIN, b"\tsentence2", b""), [], "line 1: no column 'sentence2'"),
    "a tab more": (edit(TRAIN, b"\n3\t", b"\n3\t\t"), [], "line 5: more or fewer than 4 columns"),
    "label": (edit(TRAIN, b"\tentailment\n", b"\tEntailment\n"), [], "label is 'Entailment', not"),
    "UTF-8": (edit("RTE/dev.tsv", b"\n3\t", b"\n3\xff\t"), [], "dev.tsv, line .*'utf-8' codec"),
    "carriage return": (edit(TRAIN, b"\n3\t", b"\n3 \r \t"), [], "train.tsv, line .*new-line"),
    "no weights": (without_weights, [], "no file named .*pytorch_model.bin.* in .*deberta"),
    "cut weights": (cut("deberta/pytorch_model.bin"), [], "--model: .*deberta cannot be loaded"),
    "cut tokenizer": (cut("deberta/spm.model"), [], "--model: .*deberta cannot be loaded"),
    "config": (edit("deberta/config.json", b'"', b""), [], "deberta/config.json.* valid JSON"),
    "no pad token": (without_pad_token, [], "--model: the tokenizer of .*deberta has no pad token"),
    "GPT-2": (unlike_bert, [], "--model: .*deberta is not built like DeBERTa, BERT or RoBERTa"),
    "huge rank": (lambda f: None, ["--rank", "99999"], r"must be an integer in 1\.\.16, got 99999"),
    "phases": (few_rows, [], "total_steps must hold warm-up, .*total_steps=100, warmup_steps=300"),
}  # fmt: skip


@pytest.mark.parametrize("change, arguments, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_end_in_one_line_and_exit_code_2(
    change, arguments, message, tiny, tmp_path, monkeypatch, capsys
):
    """Whatever is wrong with data or model is named before training, and nothing is written."""
    shutil.copytree(tiny, tmp_path / "given")
    monkeypatch.chdir(tmp_path)
    change(tmp_path / "given")
    reproduce.load_examples.cache_clear()
    command = ["--task", "rte", "--model", "given/deberta", "--data-dir", "given", *arguments]
    with pytest.raises(SystemExit) as exit:
        reproduce.main(command)
    assert exit.value.code == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert re.match("reproduce.py: error: .*" + message, last), last
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"arguments": 3}', '{"arguments": {}}'])
def test_results_that_are_broken_or_anothers_are_named(content, tmp_path, monkeypatch, capsys):
    """A results.json that is not this run's is neither taken for it nor overwritten."""
    monkeypatch.chdir(tmp_path)
    path = Path("runs/planted-elalora-r4-s0/results.json")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(SystemExit) as exit:
        reproduce.main([])
    assert exit.value.code == 2 and path.read_text() == content
    assert re.search(f"error: {path}: .*; delete it or take", capsys.readouterr().err)


def test_a_run_folder_that_is_a_file_is_told_before_training(tmp_path, monkeypatch, capsys):
    """Where a run's folder cannot be made, exit code 2 says so at once."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/planted-elalora-r4-s1").write_text("")
    with pytest.raises(SystemExit) as exit:
        reproduce.main(["--seeds", "0", "1"])
    assert exit.value.code == 2
    assert "cannot write in runs/planted-elalora-r4-s1" in capsys.readouterr().err


def test_an_unreachable_hub_is_told_in_one_line(tmp_path):
    """The last line names what to use without it; no traceback, and nothing is written."""
    result = reproduce_py("--task", "mrpc", cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].endswith("--model FOLDER --data-dir FOLDER)")
    assert not list(tmp_path.iterdir())


# ---- The other methods ----


def small_planted(method, monkeypatch, targets=("",), **settings):
    """Two of the planted problem's layers, for 4 epochs of 10 steps."""
    full = {name: r for name, r in reproduce.PLANTED.items() if re.search(r"layer\.[01]\.", name)}
    monkeypatch.setattr(reproduce, "PLANTED", full)
    monkeypatch.setattr(reproduce, "STEPS_PER_EPOCH", 10)
    recipe = reproduce.Recipe(32, 2e-2, 4, 6, 12, 2, 3, 1, None, **settings)
    config = Namespace(task="planted", method=method, rank=4, seed=0, targets=targets)
    torch.manual_seed(0)
    return reproduce.planted_problem(config, recipe), config, recipe


@pytest.mark.parametrize("method", ["svd", "lora", "adalora"])
def test_every_method_resumes_to_the_bit(method, monkeypatch, tmp_path):
    """A run that was interrupted in its third and fourth epochs ends as one that was not."""

    def interrupted(batches, last):
        for step, batch in enumerate(batches, 1):
            if step == last:
                raise KeyboardInterrupt
            yield batch

    ends = []
    for stops in ((), (3, 4)):
        path = tmp_path / f"{len(stops)}.pt"
        for stop in stops:
            problem, *rest = small_planted(method, monkeypatch)
            whole = problem.batches
            problem.batches = lambda e: interrupted(whole(e), 5 if e == stop else 0)
            with pytest.raises(KeyboardInterrupt):
                reproduce.train(problem, *rest, None, path)
            assert len(torch.load(path)["log"]["history"]) == stop - 1
        problem, *rest = small_planted(method, monkeypatch)
        allocator, log = reproduce.train(problem, *rest, None, path)
        del log["seconds"]
        weights = {name: w.tolist() for name, w in reproduce.trained(problem.model).items()}
        ends.append((weights, allocator.ranks(), log))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("names, count", [(("intermediate.dense",), 2), (("key_proj", "dense"), 8)])
@pytest.mark.parametrize("method", ["elalora", "lora"])
def test_targets_alone_are_adapted(method, names, count, monkeypatch):
    """What is not named keeps its weights; the bounds are those of what is."""
    problem, config, recipe = small_planted(method, monkeypatch, targets=names)
    allocator = reproduce.prepare(problem, config, recipe)["allocator"]
    assert len(allocator.ranks()) == count
    assert all(name.endswith(names) for name in allocator.ranks())
    residuals = problem.evaluate()
    assert residuals["residual"] == pytest.approx(1) and residuals["best_possible"] < 1
    assert ("gap_closed" in residuals) == (count == 8)  # else all matrices need as many ranks
    expected = reproduce.planted_bounds(4, [n for n in reproduce.PLANTED if n.endswith(names)])
    assert (residuals["even_rank_bound"], residuals["best_possible"]) == expected


@pytest.mark.parametrize("method", ["elalora", "adalora"])
def test_lambda_rate_multiplies_the_rate_of_singular_values_alone(method, monkeypatch):
    """Adam's first step is one learning rate long: lambda_rate of them for singular values."""
    problem, config, recipe = small_planted(method, monkeypatch, lambda_rate=7.0)
    parts = reproduce.prepare(problem, config, recipe)
    trained = reproduce.trained(problem.model)
    singular = {name for name in trained if name.endswith((".Lambda", ".lora_E.default"))}
    assert len(singular) == 12
    before = {name: nn.init.ones_(w).detach().clone() for name, w in trained.items()}
    for group in parts["optimizer"].param_groups:
        group["lr"] = group["initial_lr"]  # else 0 at the start of the warm-up
    reproduce.train_step(problem, next(iter(problem.batches(1))), **parts)
    for name, w in trained.items():
        change = (w - before[name]).abs().max().item()
        assert change == pytest.approx((7 if name in singular else 1) * 2e-2, rel=1e-3)


@pytest.mark.parametrize("moments", reproduce.WORDS["moments"])
def test_moments_of_new_ranks_are_zero_or_their_matrix_mean_or_all_are_dropped(
    moments, monkeypatch, tmp_path
):
    """After an adjustment, as --set moments asks."""
    problem, *rest = small_planted("elalora", monkeypatch, moments=moments)
    prepare, batches, parts, found = reproduce.prepare, problem.batches, {}, []

    def watched(epoch):
        for batch in batches(epoch):
            yield batch
            if parts["allocator"].t != 8:  # the first adjustment's step
                continue
            planted = [
                n for n, rank in reproduce.PLANTED.items() if rank
            ]  # others have no gradient
            for layer in map(parts["allocator"].layers.get, planted):
                new = layer.Lambda == 0
                for w, dim in ((layer.P, 1), (layer.Lambda, 0), (layer.Q, 0)):
                    state = copy.deepcopy(parts["optimizer"].state.get(w))
                    found.append((state, new.tolist(), dim))

    monkeypatch.setattr(reproduce, "prepare", lambda *a: parts.update(prepare(*a)) or parts)
    problem.batches = watched
    reproduce.train(problem, *rest, None, tmp_path / "checkpoint.pt")
    assert len(found) == 30 and sum(sum(new) for _, new, _ in found) == 9  # of 3 ranks
    for state, new, dim in found:
        if moments == "dropped":
            assert not state
            continue
        first, second = (
            np.moveaxis(array(state[key]), dim, 0) for key in ("exp_avg", "exp_avg_sq")
        )
        kept = ~np.array(new)
        assert (first[new] == 0).all() and (first[kept] != 0).any() and (second[kept] > 0).any()
        expected = second[kept].mean(axis=0) if moments == "mean" else 0 * second[0]
        expected = np.broadcast_to(expected, second[new].shape)
        np.testing.assert_allclose(second[new], expected, rtol=1e-5)


@pytest.mark.parametrize("name", reproduce.WORDS["lr_scheduler"])
def test_learning_rate_rises_for_a_tenth_and_then_as_named(name, monkeypatch):
    """After that it falls to 0, in a line or a half cosine, or it stays."""
    problem, config, recipe = small_planted("elalora", monkeypatch, lr_scheduler=name)
    parts, rates = reproduce.prepare(problem, config, recipe), []
    for _ in range(40):
        rates.append(parts["rate"].get_last_lr()[0] / recipe.learning_rate)
        parts["optimizer"].step()
        parts["rate"].step()
    progress = np.arange(36) / 36
    falls = dict(linear=1 - progress, cosine=(1 + np.cos(np.pi * progress)) / 2)
    expected = [*np.arange(4) / 4, *falls.get(name, np.ones(36))]
    np.testing.assert_allclose(rates, expected, atol=1e-12)


def test_adaloras_scores_are_equation_2s_of_the_ranks_it_kept(monkeypatch, tmp_path):
    """Averages times uncertainties, summed over a rank's weights as in eq. 2; 4 ranks per matrix
    are left at the end of the search, of 6."""
    problem, config, recipe = small_planted("adalora", monkeypatch)
    allocator, log = reproduce.train(problem, config, recipe, None, tmp_path / "checkpoint.pt")
    begin, end = log["scores"].values()
    assert (len(begin), len(end)) == (12 * 6, 12 * 4) and sum(allocator.ranks().values()) == 12 * 4
    expected, tuner = [], allocator.tuner
    for name, kept in allocator.kept.items():
        names = {factor: f"{name}.lora_{factor}.default" for factor in "AEB"}
        s = {f: array(tuner.exp_avg_ipt[n]) * array(tuner.exp_avg_unc[n]) for f, n in names.items()}
        S = s["A"].mean(axis=1) + s["E"][:, 0] + s["B"].mean(axis=0)
        expected += [score for score, keep in zip(S, kept) if keep]
    np.testing.assert_allclose(end, expected, rtol=6e-3)


def test_final_and_shuffled_train_at_the_ranks_that_elalora_found(monkeypatch, tmp_path, capsys):
    """From the start and to the end, at the same scaling; without ElaLoRA's run that is told."""
    _, _, recipe = small_planted("elalora", monkeypatch)
    recipe = recipe._replace(b=(3, 3, 3), k=(1, 1, 1))
    monkeypatch.setitem(reproduce.RECIPES, "planted", recipe)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        reproduce.main(["--method", "svd", "final"])
    message = "takes the ranks of runs/planted-elalora-r4-s0: run elalora first"
    assert message in capsys.readouterr().err and not Path("runs").exists()
    reproduce.main(["--method", "shuffled", "final", "elalora"])
    ranks, scalings = {}, set()
    for method in ("elalora", "final", "shuffled"):
        folder = Path(f"runs/planted-{method}-r4-s0")
        results = json.loads((folder / "results.json").read_text())
        assert bool(results["adjustments"]) == (method == "elalora")
        ranks[method] = results["ranks"]
        from safetensors.torch import load_file

        state = load_file(folder / "adapter.safetensors")
        scalings |= {value.item() for key, value in state.items() if key.endswith("scaling")}
    assert ranks["final"] == ranks["elalora"] != ranks["shuffled"]
    assert sorted(ranks["final"].values()) == sorted(ranks["shuffled"].values()) != [4] * 12
    assert scalings == {4.0}
    shutil.rmtree("runs/planted-final-r4-s0")
    with pytest.raises(SystemExit):
        reproduce.main(["--method", "final", "--epochs", "3"])
    assert (
        "planted-elalora-r4-s0/results.json: it has epochs None, not 3" in capsys.readouterr().err
    )


def test_the_held_out_tenth_is_of_the_training_split_and_not_trained_on(tiny, monkeypatch):
    """Nine tenths are trained on, the rest is evaluated, whatever the seed; the dev split rests."""
    pad, (train, dev) = reproduce.load_examples("rte", str(tiny), str(tiny / "deberta"))
    rows = [dict(row, labels=i) for i, row in enumerate(train)]
    monkeypatch.setattr(reproduce, "load_examples", lambda *_: (pad, [rows, dev]))
    seen = []
    monkeypatch.setattr(reproduce, "compute_metrics", lambda *a: seen.append(a[2]) or {})
    for seed in (0, 1):
        problem = rte_problem(tiny, holdout=True, seed=seed)
        used = [i for b in problem.batches(1) for part in b for i in part["labels"].tolist()]
        assert len(used) == 1755 and sorted(used + seen[-1]) == list(range(1950))
    assert seen[0] == seen[1]


def test_the_adapters_of_other_methods_load_in_peft(tiny, tmp_path, monkeypatch):
    """What LoRA's and AdaLoRA's runs write gives the metrics of the run, with as many weights as
    the run says: those of the ranks that AdaLoRA kept."""
    import peft
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    arguments = ["--task", "rte", "--epochs", "1", "--model", str(tiny / "deberta")]
    reproduce.main([*arguments, "--data-dir", str(tiny), "--method", "lora", "adalora"])
    for method in ("lora", "adalora"):
        folder = tmp_path / f"runs/rte-{method}-r4-s0"
        results = json.loads((folder / "results.json").read_text())
        problem = rte_problem(tiny)
        loaded = peft.PeftModel.from_pretrained(problem.model, folder / "peft").eval()
        assert loaded.base_model.model is problem.model
        assert problem.evaluate() == pytest.approx(results["metrics"], abs=1e-3)
        state = load_file(folder / "peft/adapter_model.safetensors")
        size = sum(w.numel() for name, w in state.items() if ".lora_" in name)
        assert results["adapter_parameters"] == size
        assert sum(results["ranks"].values()) == 4 * 12


# ---- The benchmark ----


def prepared(method, tiny, total=20, **settings):
    """A method about to train for some steps, of which the last two keep the ranks."""
    recipe = reproduce.Recipe(8, 1e-2, 1, 2, 2, 4, 4, 1, None, **settings)
    config = rte_config(tiny, method=method)
    torch.manual_seed(0)
    problem = reproduce.random_tokens(config, recipe)
    problem.steps_per_epoch = total
    parts = reproduce.prepare(problem, config, recipe)
    return problem, parts


@pytest.mark.parametrize("method", ["elalora", "lora", "adalora"])
def test_every_method_starts_as_the_base_and_adapts_the_same_at_the_same_scale(method, tiny):
    """Same first outputs; the same matrices and heads train; alpha / rank scales every update."""
    problem, parts = prepared(method, tiny)
    base = prepared("frozen", tiny)[0].model.eval()
    ids = torch.randint(5, 40, (3, 7))
    model = problem.model.eval()
    torch.testing.assert_close(model(ids).logits, base(ids).logits)
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "base_layer")}
    assert len(layers) == 12
    for layer in layers.values():
        if method == "adalora":
            scale = layer.scaling["default"] / layer.ranknum["default"].item()
        else:
            scale = layer.scaling if method == "elalora" else layer.scaling["default"]
        assert float(scale) == pytest.approx(16 / 2)
    trained = {name for name, w in model.named_parameters() if w.requires_grad}
    factors = {name for name in trained if any(name.startswith(f"{layer}.") for layer in layers)}
    assert len(factors) == 12 * (2 if method == "lora" else 3)
    assert {name.split(".")[0] for name in trained - factors} == {"pooler", "classifier"}
    assert len(trained - factors) == 4
    held = {w for group in parts["optimizer"].param_groups for w in group["params"]}
    assert held == {w for w in model.parameters() if w.requires_grad}


def test_adaloras_penalty_is_pefts(tiny):
    """What PEFT's own model adds to the loss: gamma times the mean over 2N of |A A' - I|."""
    problem, parts = prepared("adalora", tiny)
    model, batch = problem.model.eval(), problem.batches(1)[0]
    norms = []
    for name, w in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            A = array(w if "lora_A" in name else w.T)
            norms.append(np.linalg.norm(A @ A.T - np.eye(len(A))))
    penalty = problem.penalty().item()
    assert len(norms) == 2 * 12 and penalty == pytest.approx(0.1 * np.mean(norms))
    whole = parts["allocator"].adapted.base_model(**batch).loss.item()
    assert problem.loss(model, batch).item() + penalty == pytest.approx(whole)


@pytest.mark.parametrize("ratio, start", [(1.5, 3), (3.0, 6)])
def test_adalora_ends_at_the_rank_of_the_others(tiny, ratio, start):
    """It starts at a multiple of the rank; after its search as many are left as elsewhere."""
    problem, parts = prepared("adalora", tiny, init_ratio=ratio)
    E = [w for name, w in problem.model.named_parameters() if "lora_E" in name]
    assert sum(w.numel() for w in E) == 12 * start
    for step, batch in zip(range(20), problem.batches(1)):
        reproduce.timed_step(problem, batch, **parts)
    assert sum(w.count_nonzero() for w in E) == 12 * 2


def test_the_frozen_floor_goes_back_to_the_embeddings_and_trains_the_head_alone(tiny):
    """Gradients reach the first layer's input, as they must for any method, but no base weight."""
    problem, parts = prepared("frozen", tiny)
    reached = []
    embeddings = problem.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda m, x, y: y.register_hook(reached.append) and None)
    before = copy.deepcopy(problem.model.state_dict())
    for batch in problem.batches(1)[:4]:  # the first at a learning rate of 0
        reproduce.timed_step(problem, batch, **parts)
    assert reached[-1].abs().sum() > 0
    moved = {k for k, v in problem.model.state_dict().items() if not torch.equal(v, before[k])}
    assert {name.split(".")[0] for name in moved} == {"pooler", "classifier"}


def test_a_step_of_training_is_algorithm_1s(tiny, monkeypatch):
    """Weights, averages and adjustments are those of the plain loop that the README shows."""
    monkeypatch.setattr(torch.optim, "AdamW", torch.optim.SGD)  # Adam would blow up roundings
    ends = []
    for plain in (False, True):
        problem, (optimizer, rate, allocator) = (p := prepared("elalora", tiny))[0], p[1].values()
        for layer in allocator.layers.values():
            randomize(layer)
        torch.manual_seed(1)
        problem.model.train()
        adjusted = []
        for batch in problem.batches(1)[:12]:
            if plain:
                loss = problem.model(**batch).loss + 0.1 * orthogonality_penalty(problem.model)
                loss.backward()
                nn.utils.clip_grad_norm_(problem.model.parameters(), 1.0)
                optimizer.step()
                rate.step()
                adjusted.append(allocator.step())
                optimizer.zero_grad()
            else:
                adjusted.append(reproduce.train_step(problem, batch, *p[1].values())[1])
        assert any(adjusted)
        ends.append((adapter_state_dict(problem.model), allocator.state_dict()))
        ends[-1] += (list(filter(None, adjusted)),)
    assert ends[0][2] == ends[1][2]
    torch.testing.assert_close(ends[0][:2], ends[1][:2], rtol=1e-4, atol=1e-6)


def test_the_benchmark_writes_what_it_prints(tiny, tmp_path, monkeypatch, capsys):
    """Every table is printed and kept; parts add up, and states have the bytes they must have."""
    monkeypatch.chdir(tmp_path)
    for name, value in dict(ROUNDS=10, TEXTS=2, TOKENS=6).items():
        monkeypatch.setattr(reproduce, name, value)
    reproduce.main(["--benchmark", "--model", str(tiny / "deberta"), "--rank", "2"])
    folder = Path("runs/benchmark-random-deberta-r2")
    assert (folder / "table.md").read_text() in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    factors = 2 * sum(a + b for a, b in [(16, 16)] * 4 + [(16, 32)] * 2) * 2  # of P and Q
    head = 16 * 16 + 16 + 34
    for method, extra, states in (
        ("frozen", 0, 0),
        ("lora", factors, 0),
        ("adalora", factors * 3 // 2 + 36, 3),
        ("elalora", None, 2),  # its ranks move between matrices of other sizes
    ):
        costs = results["costs"][method]
        extra = costs["trained"] - head if extra is None else extra
        assert costs["trained"] == head + extra
        assert costs["optimizer_bytes"] == 4 * 2 * (head + extra)  # AdamW's moments
        assert costs["allocator_bytes"] == 4 * states * extra
        assert costs["total"] > costs["passes"] > 0 and costs["memory_bytes"] >= 0
    assert len(results["ratios"]) == 8 and len(results["growth"]) == 9
    for ratio in results["ratios"].values():
        assert 0 < ratio["0.25"] <= ratio["0.5"] <= ratio["0.75"]


# ---- Several processes ----


SHARED_PLANTED = """
import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import distributed

import elalora
import reproduce

def planted(folder):
    torch.set_num_threads(1)
    reproduce.PLANTED = dict(list(reproduce.PLANTED.items())[:12])
    reproduce.STEPS_PER_EPOCH = 30
    recipe = reproduce.Recipe(32, 2e-2, 3, 30, 20, 5, 4, 1, None)
    config = Namespace(task="planted", method="elalora", rank=4, seed=3, targets=[""])
    torch.manual_seed(3)
    problem = reproduce.planted_problem(config, recipe)
    parts, log = reproduce.train(problem, config, recipe, None, Path(folder, "checkpoint.pt"))
    return problem.model, log

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    model, log = planted(sys.argv[1])
    torch.save((elalora.adapter_state_dict(model), log), f"{sys.argv[1]}/{reproduce.PROCESS}.pt")
    if reproduce.PROCESS == 1:  # one bit
        weight = next(p for p in model.parameters() if p.requires_grad)
        weight.data.view(torch.int32)[0, 0] ^= 1
    reproduce.check_alike(model)
"""


def test_two_processes_train_the_model_that_one_trains(tmp_path, monkeypatch):
    """Alike to the bit, like one process to 1e-4 before the first adjustment; checked."""
    script = tmp_path / "shared_planted.py"
    script.write_text(SHARED_PLANTED)
    result = torchrun(script, tmp_path, cwd=tmp_path)
    assert result.stderr.count("RuntimeError: the weights of the processes differ") == 2
    assert result.stderr.count(" 0/90 ") == 1  # one progress bar
    (zero, log), (one, _) = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    assert zero.keys() == one.keys() and all(torch.equal(zero[key], one[key]) for key in zero)
    assert [adjustment["step"] for adjustment in log["adjustments"]][0] == 35
    assert len({value.numel() for key, value in zero.items() if "Lambda" in key}) > 1
    monkeypatch.setattr(reproduce, "PLANTED", reproduce.PLANTED)
    monkeypatch.setattr(reproduce, "STEPS_PER_EPOCH", 30)
    alone = {"__name__": "alone"}
    exec(SHARED_PLANTED, alone)
    (tmp_path / "alone").mkdir()
    _, expected = alone["planted"](tmp_path / "alone")
    first, other = expected["history"][0], log["history"][0]
    assert other["train_loss"] == pytest.approx(first["train_loss"], abs=1e-4)
    assert other["metrics"] == pytest.approx(first["metrics"], abs=1e-4)
    assert first["metrics"]["residual"] < 0.9


def test_torchrun_shares_the_examples_and_writes_once(tiny, tmp_path):
    """With dropout, through the command line: one report, one folder, all examples in an epoch."""
    arguments = ["--task", "rte", "--epochs", 1, "--model", tiny / "deberta", "--data-dir", tiny]
    result = torchrun(HERE / "reproduce.py", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("rte, elalora, rank 4, seed 0: 31 steps") == 1
    results = json.loads((tmp_path / "runs/rte-elalora-r4-s0/results.json").read_text())
    assert results["arguments"]["processes"] == 2 and results["adjustments"]
    refused = reproduce_py(*arguments, cwd=tmp_path)
    assert refused.returncode == 2 and "it has processes 2, not 1" in refused.stderr


@pytest.mark.parametrize("task", ["planted", "mrpc"])
def test_batches_that_processes_cannot_share_are_refused(task, monkeypatch):
    """Shards of unlike size would weigh unlike: a ValueError before any work, for every task."""
    monkeypatch.setattr(reproduce, "PROCESSES", 3)
    with pytest.raises(ValueError, match="3 processes cannot share batches of"):
        reproduce.run_all(reproduce.parse_arguments(["--task", task]))


@pytest.mark.parametrize("size, processes", [(10, 1), (10, 2), (11, 2), (12, 3)])
def test_the_shards_of_an_epoch_are_the_batches_of_one_process(size, processes, tiny, monkeypatch):
    """Batch by batch the shards of all processes join to what one process would take."""

    def batches(process, processes):
        monkeypatch.setattr(reproduce, "PROCESS", process)
        monkeypatch.setattr(reproduce, "PROCESSES", processes)
        pad, (train, dev) = reproduce.load_examples("rte", str(tiny), str(tiny / "deberta"))
        rows = [dict(row, labels=i) for i, row in enumerate(train[:size])]
        monkeypatch.setattr(reproduce, "load_examples", lambda *_: (pad, [rows, dev]))
        recipe = reproduce.RECIPES["rte"]._replace(batch_size=6)
        problem = reproduce.glue_problem(rte_config(tiny), recipe)
        found = [
            sorted(i for part in b for i in part["labels"].tolist()) for b in problem.batches(1)
        ]
        monkeypatch.undo()
        assert len(found) == problem.steps_per_epoch
        return found

    whole = batches(0, 1)
    assert sorted(sum(whole, [])) == list(range(size))
    shards = [batches(process, processes) for process in range(processes)]
    for expected, *parts in zip(whole, *shards, strict=True):
        assert len({len(part) for part in parts}) == 1
        joined = sum(parts, [])
        assert set(joined) >= set(expected) and len(joined) - len(expected) < processes


# ---- Killed, interrupted, broken ----


@pytest.fixture
def short_rte(tiny, tmp_path, monkeypatch):
    """Arguments of a run of 60 epochs of 3 steps, with dropout, and what runs it in a fork."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    (tmp_path / "RTE").mkdir()
    for stem, size in (("train", 160), ("dev", 40)):
        lines = (tiny / f"RTE/{stem}.tsv").read_text().splitlines()
        (tmp_path / f"RTE/{stem}.tsv").write_text("\n".join(lines[: size + 1]))
    recipe = reproduce.Recipe(64, 5e-3, 60, 12, 40, 8, (3, 3, 3), (2, 2, 2), None)
    monkeypatch.setitem(reproduce.RECIPES, "rte", recipe)
    monkeypatch.chdir(tmp_path)
    arguments = ["--task", "rte", "--model", str(tiny / "deberta"), "--data-dir", str(tmp_path)]
    reproduce.compute_metrics(["f1"], [1], [1])  # forks share what is imported

    def start(*more):
        """The process of a run whose stderr goes to a file."""
        if pid := os.fork():
            return pid
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
            sys.stdout = sys.stderr = open("stderr", "w", buffering=1)
            torch.set_num_threads(1)
            reproduce.load_examples.cache_clear()
            reproduce.main([*arguments, *more])
            code = 0
        except SystemExit as exit:
            code = exit.code
        finally:
            os._exit(code)

    return start


def wait_for(path, since=0):
    """Until the file is there, written after that time in ns; returns when it was."""
    while not path.exists() or path.stat().st_mtime_ns <= since:
        time.sleep(0.01)
    return path.stat().st_mtime_ns


def ended(pid):
    """A process's exit code; negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder):
    """All of a run's results but the times, and the bytes of its adapters."""
    results = json.loads((folder / "results.json").read_text())
    del results["seconds"]
    names = ("adapter.safetensors", "peft/adapter_model.safetensors", "peft/adapter_config.json")
    return results, [(folder / name).read_bytes() for name in names]


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(short_rte, tmp_path):
    """SIGKILL at random moments, then --resume: the same weights and metrics to the bit."""
    started, pid = time.time(), short_rte("--output-dir", "whole")
    wait_for(Path("whole/rte-elalora-r4-s0/checkpoint.pt"))
    startup = time.time() - started
    assert ended(pid) == 0, Path("stderr").read_text()
    expected = outcome(Path("whole/rte-elalora-r4-s0"))
    epoch = json.loads(Path("whole/rte-elalora-r4-s0/results.json").read_text())["seconds"] / 60
    random = np.random.default_rng()
    folder, written, resumed = Path("killed/rte-elalora-r4-s0"), 0, set()
    for _ in range(12):
        pid = short_rte("--output-dir", "killed", "--resume")
        epochs = random.integers(4)  # 12 times 3, and a little more each, are fewer than 60
        for _ in range(epochs):
            written = wait_for(folder / "checkpoint.pt", written)
        time.sleep(random.uniform(0, epoch if epochs else startup))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        if (folder / "checkpoint.pt").exists():
            resumed.add(len(torch.load(folder / "checkpoint.pt")["log"]["history"]))
    assert len(resumed) > 2
    assert ended(short_rte("--output-dir", "killed", "--resume")) == 0, Path("stderr").read_text()
    assert not (folder / "checkpoint.pt").exists()
    assert (got := outcome(folder)) == expected
    assert got[0]["adjustments"] and len(set(got[0]["ranks"].values())) > 1


def test_an_interrupted_run_says_so_in_one_line_and_goes_on(short_rte):
    """Ctrl-C exits with 130; the command alone is refused then, with --resume it goes on."""
    pid, folder = short_rte(), Path("runs/rte-elalora-r4-s0")
    wait_for(folder / "checkpoint.pt")
    os.kill(pid, signal.SIGINT)
    assert ended(pid) == 130
    last = Path("stderr").read_text().splitlines()[-1]
    assert last == "reproduce.py: interrupted; --resume goes on after the last whole epoch, if any"
    assert "Traceback" not in Path("stderr").read_text()
    before = len(torch.load(folder / "checkpoint.pt")["log"]["history"])
    assert ended(short_rte()) == 2
    assert "has an unfinished run: --resume goes on with it" in Path("stderr").read_text()
    assert ended(short_rte("--resume")) == 0
    history = json.loads((folder / "results.json").read_text())["history"]
    assert [part["epoch"] for part in history] == list(range(1, 61)) and before < 60


def test_a_checkpoint_that_is_not_this_runs_is_named_and_refused(short_rte):
    """Truncated, foreign or of other arguments: exit code 2, the file named, nothing changed."""
    pid, path = short_rte(), Path("runs/rte-elalora-r4-s0/checkpoint.pt")
    wait_for(path)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    whole, state = path.read_bytes(), torch.load(path)
    key = next(key for key in state["trained"] if key.endswith(".Lambda"))

    def saved(change):
        torch.save(change, file := io.BytesIO())
        return file.getvalue()

    for broken, reason in [
        (whole[:-1000], ""),
        (whole[: len(whole) // 2], ""),
        (b"", ""),
        (b"weights", ""),
        (saved({"weights": torch.zeros(3)}), "KeyError: 'arguments'"),
        (saved(state | {"arguments": state["arguments"] | {"seed": 7}}), "it has seed 7, not 0"),
        (saved(state | {"trained": state["trained"] | {key: torch.zeros(2)}}), "does not fit"),
        (
            saved(state | {"trained": {key: state["trained"][key]}}),
            "missing or unknown: classifier",
        ),
        (saved(state | {"allocator": {}}), "KeyError: 'averages'"),
    ]:
        path.write_bytes(broken)
        assert ended(short_rte("--resume")) == 2
        *_, last = Path("stderr").read_text().splitlines()
        start = f"reproduce.py: error: {path} is no checkpoint of this run, delete it to start anew"
        assert last.startswith(start) and reason in last
        assert "Traceback" not in Path("stderr").read_text() and path.read_bytes() == broken
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


# ---- README.md ----


def readme_blocks():
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def readme_block(text):
    """The only block in which the text occurs."""
    (block,) = (block for block in readme_blocks() if text in block)
    return block


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    """Its loop, and what saves and loads, with a model and data in place of the reader's."""
    assert len(readme_blocks()) == 5
    blocks = readme_blocks()[:3]

    class Classifier(Net):
        def forward(self, x):
            logits = super().forward(x)
            return SimpleNamespace(loss=logits.square().mean(), logits=logits)

    monkeypatch.chdir(tmp_path)
    batches = [{"x": torch.randn(4, 6)} for _ in range(1740)]
    names = {
        "load_base_model": Classifier,
        "model": (injected := Classifier()),
        "loader": batches,
        "torch": torch,
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    rates = {w: group["lr"] for group in names["optimizer"].param_groups for w in group["params"]}
    adapted = [layer for layer in injected.modules() if isinstance(layer, SVDLinear)]
    expected = {w: 5e-4 for w in trainable(injected)} | {layer.Lambda: 5e-3 for layer in adapted}
    assert rates == expected
    assert not any(isinstance(module, SVDLinear) for module in names["model"].modules())
    assert names["model"](torch.randn(4, 6)).loss.isfinite()
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_the_trainer_of_the_readme_trains_like_algorithm_1_and_resumes(kind, tmp_path, monkeypatch):
    """With accumulation, clipping and a checkpoint it is the plain loop; resumed, it ends alike."""
    from transformers import TrainingArguments

    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (48, 6), generator=generator)
    if kind == "classifier":
        targets, heads, labels = ["query", "output.dense"], ["pooler", "classifier"], ids[:, 0] % 2
    else:  # whose loss the Trainer would divide by its number of tokens; rows of unlike length
        targets, heads, labels = ["q_proj", "down_proj"], [], ids.clone()
        labels[::3, 2:] = -100
    rows = [dict(input_ids=x, labels=y) for x, y in zip(ids, labels)]

    def fresh():
        torch.manual_seed(0)
        no_dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        base = bert(**no_dropout) if kind == "classifier" else llama()
        return inject(base, targets, 2, modules_to_save=heads)

    def train(model, **kwargs):
        arguments = TrainingArguments(
            "out", max_steps=24, per_device_train_batch_size=2, gradient_accumulation_steps=4,
            max_grad_norm=1.0, learning_rate=0.05, lr_scheduler_type="constant", save_steps=12,
            optim="sgd", report_to=[], disable_tqdm=True, use_cpu=True, seed=5,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        names = dict(injected=model, arguments=arguments, dataset=rows)
        resumed = "trainer.train(resume_from_checkpoint=True)" if kwargs else "trainer.train()"
        code = readme_block("class ElaLoRATrainer").replace("trainer.train()", resumed)
        exec(compile(code, "README.md", "exec"), names)
        return names["trainer"]

    trainer = train(fresh())
    allocators = [getattr(c, "allocator", None) for c in trainer.callback_handler.callbacks]
    (allocator,) = filter(None, allocators)
    assert allocator.t == 24 and len(set(allocator.ranks().values())) > 1
    # The plain loop
    plain = fresh()
    optimizer = torch.optim.SGD(trainable(plain), 0.05)
    own = RankAllocator(plain, optimizer, allocator.schedule, 1)
    plain.train()
    for step in range(24):
        index = torch.arange(8 * step, 8 * step + 8) % 48
        parts = list(zip(ids[index].split(2), labels[index].split(2)))
        for x, y in parts:
            (plain(input_ids=x, labels=y).loss / 4).backward()
        (0.1 * orthogonality_penalty(plain)).backward()
        nn.utils.clip_grad_norm_(trainable(plain), 1.0)
        optimizer.step()
        own.step()
        optimizer.zero_grad()
    assert own.ranks() == allocator.ranks()
    expected = adapter_state_dict(plain)
    torch.testing.assert_close(adapter_state_dict(trainer.model), expected, rtol=1e-3, atol=1e-4)
    # From the checkpoint of step 12
    whole = adapter_state_dict(trainer.model)
    shutil.rmtree("out/checkpoint-24")
    resumed = train(fresh(), resume=True)
    assert resumed.state.global_step == 24
    got = adapter_state_dict(resumed.model)
    assert all(torch.equal(got[key], value) for key, value in whole.items())


README_DDP = """
import sys
from types import SimpleNamespace

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from test_elalora import ADAPTED, Net, readme_block, training
from elalora import RankSchedule, adapter_state_dict, inject, orthogonality_penalty

class Classifier(Net):
    def forward(self, x):
        return SimpleNamespace(loss=super().forward(x).square().mean())

def train(wrap, process, processes):
    model = inject(Classifier(), ["query", "dense"], 2, modules_to_save=["head"])
    schedule = RankSchedule(24, 4, 4, 4, 2)
    optimizer, allocator = training(model, 2, 1, torch.optim.SGD, schedule, lr=0.1)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 6, generator=generator) for _ in range(24)]
    names = dict(model=model, optimizer=optimizer, allocator=allocator,
                 orthogonality_penalty=orthogonality_penalty, DistributedDataParallel=wrap,
                 loader=[dict(x=x[process::processes]) for x in batches])
    exec(readme_block("DistributedDataParallel("), names)
    assert allocator.t == 24
    return adapter_state_dict(model)

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    process = distributed.get_rank()
    torch.save(train(DistributedDataParallel, process, 2), f"{sys.argv[1]}/{process}.pt")
"""


def test_the_readmes_distributed_data_parallel_equals_one_process(tmp_path):
    """Two gloo processes end alike to the bit, and as one process with the whole batch does."""
    script = tmp_path / "ddp.py"
    script.write_text(README_DDP)
    result = torchrun(script, tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    zero, one = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    assert zero.keys() == one.keys() and all(torch.equal(zero[key], one[key]) for key in zero)
    alone = {"__name__": "alone"}
    exec(README_DDP, alone)
    expected = alone["train"](lambda model: model, 0, 1)
    torch.testing.assert_close(zero, expected, rtol=1e-3, atol=1e-4)
    assert len({value.numel() for key, value in expected.items() if "Lambda" in key}) > 1


RUNS = sorted(HERE.glob("results/*/results.json"))


@pytest.mark.parametrize("path", RUNS, ids=[path.parent.name for path in RUNS])
def test_the_readme_quotes_every_measured_run(path):
    """The metrics of the last epoch of each run in results/ stand in the README, to four digits;
    so do the medians of each benchmark's ratios, to two."""
    results, readme = json.loads(path.read_text()), (HERE / "README.md").read_text()
    assert results["versions"]["torch"] in readme
    if "ratios" in results:
        assert all(f"{ratio['0.5']:.2f}" in readme for ratio in results["ratios"].values())
        return
    assert all(f"{value:.4f}" in readme for value in results["metrics"].values())
    assert f"{results['adapter_parameters']:,}" in readme


PAGES = sorted(set(HERE.glob("results/*/table.md")) - {run.with_name("table.md") for run in RUNS})


@pytest.mark.parametrize("page", PAGES, ids=[page.parent.name for page in PAGES])
def test_the_tables_in_results_are_those_of_the_runs_beside_them(page, tmp_path):
    """Nobody wrote in them by hand."""
    shutil.copytree(page.parent, tmp_path / "runs")
    results = json.loads(next(page.parent.glob("*/results.json")).read_text())
    reproduce.compare(tmp_path / "runs", Namespace(**results["arguments"]))
    assert (tmp_path / "runs/table.md").read_text() == page.read_text()


def test_every_mean_and_interval_of_the_readme_is_in_a_table_of_results():
    """Whatever the README gives as mean ± deviation, or as an interval, a run's table has."""
    tables = "".join(page.read_text() for page in PAGES)
    readme = " ".join((HERE / "README.md").read_text().split())
    quoted = re.findall(r"[-+]?[\d.,]+ ± [\d.,]+\d|[-+][\d.]+ to [-+][\d.]+\d", readme)
    assert [text for text in quoted if text not in tables] == []
