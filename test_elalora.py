"""The laws of elalora.py, in its order.

Oracles are independent: NumPy in float64, brute force, exact fractions, an uninterrupted run, PEFT.
Needs torch, numpy, hypothesis and pytest. Without PEFT the tests of the export are skipped.
"""

import ast
import copy
import io
import itertools
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

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
from elalora import (
    RANK_DIM,
    SHAPES,
    Adjustment,
    RankAllocator,
    RankSchedule,
    SVDLinear,
    adapter_state_dict,
    adapters_disabled,
    export_peft,
    inject,
    load_adapter_state_dict,
    merge,
    new_directions,
    orthogonality_penalty,
    resize,
    select,
)

torch.set_num_threads(1)
settings.register_profile("laws", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.load_profile("laws")
seeds = st.integers(0, 2**31 - 1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.dense = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x):
        return x + self.dense(torch.tanh(self.query(x)))


class Net(nn.Module):
    """Two blocks of 6 -> 5 -> 6 and a head; the highest rank of every matrix to adapt is 5."""

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


def adapted_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, SVDLinear)}


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


def adjusted(model, optimizer, allocator, step=0):
    """A training step in which ranks move."""
    adjustment = train_step(model, optimizer, allocator, step)
    assert adjustment.pruned and adjustment.expanded
    return adjustment


def randomize(layer, generator=None):
    """A layer in the middle of training: P and Q away from orthonormal, Lambda away from 0."""
    with torch.no_grad():
        for factor in (layer.P, layer.Lambda, layer.Q):
            factor.copy_(torch.randn(factor.shape, generator=generator))
    return layer


def array(tensor):
    return tensor.detach().double().numpy()


def assert_same(got, expected):
    """Equal bit for bit, in any nesting of mappings and sequences."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    """What a test draws without a seed of its own does not depend on the tests before it."""
    torch.manual_seed(0)


def test_elalora_needs_torch_alone():
    """It imports the standard library and torch, and in export_peft alone safetensors."""
    found = set()
    for owner in ast.parse(Path(elalora.__file__).read_text()).body:
        for node in ast.walk(owner):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None)] + [alias.name for alias in node.names]
                package = next(filter(None, names)).split(".")[0]
                found.add((package, getattr(owner, "name", "top")))
    others = {(name, where) for name, where in found if name not in sys.stdlib_module_names}
    assert others == {("torch", "top"), ("safetensors", "export_peft")}


# ---- Section 3.1: the layer ----


@given(st.integers(1, 7), st.integers(1, 7), st.data(), seeds)
def test_the_layer_computes_its_formula(d_out, d_in, data, seed):
    """For x of any shape, y = W0 x + bias + scaling P (Lambda * (Q x)), with its gradients."""
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    shape = data.draw(st.sampled_from([(), (4,), (2, 3), (0,), (2, 1, 3)]))
    torch.manual_seed(seed)
    layer, scaling = randomize(SVDLinear(nn.Linear(d_in, d_out), rank, alpha=3.0)), 3.0 / rank
    x, g = torch.randn(*shape, d_in, requires_grad=True), torch.randn(*shape, d_out)
    P, Lambda, Q, W, bias = map(
        array, (layer.P, layer.Lambda, layer.Q, layer.base_layer.weight, layer.base_layer.bias)
    )
    delta = scaling * P @ np.diag(Lambda) @ Q
    np.testing.assert_allclose(
        array(layer(x)), array(x) @ (W + delta).T + bias, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(array(layer.delta_weight()), delta, rtol=1e-4, atol=1e-4)
    layer(x).backward(g)
    X, G = array(x).reshape(-1, d_in), array(g).reshape(-1, d_out)
    for w, expected in (
        (x, (G @ (W + delta)).reshape(*shape, d_in)),
        (layer.P, scaling * G.T @ (X @ Q.T * Lambda)),
        (layer.Lambda, scaling * ((G @ P) * (X @ Q.T)).sum(axis=0)),
        (layer.Q, scaling * (G @ P * Lambda).T @ X),
    ):
        np.testing.assert_allclose(array(w.grad), expected, rtol=1e-3, atol=1e-3)


@given(st.integers(1, 5), seeds)
def test_a_layer_starts_orthonormal_and_as_its_base(rank, seed):
    """At first P'P = QQ' = I, R(P, Q) = 0, and the output is the base's bit for bit."""
    torch.manual_seed(seed)
    layer = SVDLinear(nn.Linear(6, 5), rank)
    np.testing.assert_allclose(array(layer.P.T @ layer.P), np.eye(rank), atol=1e-6)
    np.testing.assert_allclose(array(layer.Q @ layer.Q.T), np.eye(rank), atol=1e-6)
    assert orthogonality_penalty(layer).item() < 1e-10
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), layer.base_layer(x))


@given(*[st.lists(st.integers(1, 5), min_size=4, max_size=4)] * 2, st.integers(0, 3), seeds)
def test_the_seed_and_its_name_decide_where_a_matrix_starts(ranks, others, first, seed):
    """Other ranks and other targets change neither its first ranks nor what is drawn next; another
    seed does, and no two matrices start alike."""

    def start(ranks, seed):
        layers = adapted_layers(inject(Net(seed), [*ranks], ranks))
        return {name: layer.P.T for name, layer in layers.items()}, layers, torch.rand(())

    P, layers, drawn = start(dict(zip(ADAPTED, ranks)), seed)
    fewer, same_layers, same = start(dict(zip(ADAPTED[first:], others)), seed)
    assert drawn == same and [*fewer] == ADAPTED[first:]
    for name, rank in zip(ADAPTED[first:], map(min, ranks[first:], others)):
        torch.testing.assert_close(fewer[name][:rank], P[name][:rank])
        Q, same_Q = layers[name].Q, same_layers[name].Q
        torch.testing.assert_close(same_Q[:rank], Q[:rank])
    other, *_ = start(dict(zip(ADAPTED, ranks)), seed + 1)
    columns = [column.tolist() for rows in (P, other) for P_T in rows.values() for column in P_T]
    assert len({*map(tuple, columns)}) == 2 * sum(ranks)


def test_the_default_device_does_not_matter():
    """Factors and new directions are drawn on the CPU and live where their base does."""
    base = nn.Linear(6, 5)
    torch.manual_seed(1)
    expected = SVDLinear(base, 2)
    with torch.device("meta"):
        torch.manual_seed(1)
        layer = SVDLinear(base, 2)
        assert_same(layer.state_dict(), expected.state_dict())
        resize(layer, [0], 3, torch.Generator("cpu"), ())
        assert SVDLinear(nn.Linear(6, 5), 2).P.is_meta
    assert orthogonality_penalty(layer).item() < 1e-10 and layer.rank == 4


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_float32_and_the_output_has_the_dtype_of_the_bases(dtype, autocast):
    """A base of any dtype works, with autocast and without."""
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
    """Packed integers for a weight, and an output of x's dtype even under autocast."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.weight = nn.Parameter((10 * self.weight.T.data).char(), requires_grad=False)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return x @ (self.weight.to(x.dtype) / 10) + self.bias


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_quantized_base_can_be_adapted(autocast):
    """Only base_layer(x) is called, and autocast does not change the dtype of its output."""
    model = inject(nn.Sequential(Quantized(6, 5)), ["0"], 2)
    randomize(model[0])
    x = torch.randn(3, 6)
    expected = model[0].base_layer(x) + x @ model[0].delta_weight().T
    with torch.autocast("cpu", autocast, enabled=bool(autocast)):
        y = model(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, **dict(rtol=0.1, atol=0.5) if autocast else {})


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half])
def test_casts_of_the_model_leave_the_factors_as_they_are(cast):
    """Only the base becomes shorter; the adapters train on in float32."""
    model = adapted_net()
    randomize(model.layers[0].query)
    before = {k: v for k, v in adapter_state_dict(model).items() if "head" not in k}
    cast(model)
    after = adapter_state_dict(model)
    assert_same({key: after[key] for key in before}, before)
    assert model.layers[0].query.base_layer.weight.dtype.itemsize == 2
    moved = adapted_net().to("meta", torch.bfloat16)
    assert moved.layers[0].query.P.is_meta and moved.layers[0].query.P.dtype == torch.float32
    assert adapted_net().double().layers[0].query.P.dtype == torch.float64


@pytest.mark.parametrize(
    "base, rank, alpha",
    [
        (nn.Embedding(6, 5), 1, 16.0),
        (nn.Linear(6, 5), 0, 16.0),
        (nn.Linear(6, 5), 6, 16.0),
        (nn.Linear(6, 5), 1, 0.0),
    ],
)
def test_a_layer_that_cannot_be_is_refused(base, rank, alpha):
    """Another base than an nn.Linear, a rank out of range and no scaling are a ValueError."""
    with pytest.raises(ValueError):
        SVDLinear(base, rank, alpha)
    assert all(w.requires_grad for w in base.parameters())


def test_dropout_acts_on_the_input_of_the_update_alone():
    """In training, some elements of x are dropped before Q but none before the base."""
    layer = randomize(SVDLinear(nn.Linear(6, 5), 2, dropout=0.5))
    x = torch.randn(3, 6)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(y, layer.base_layer(x) + dropped @ layer.delta_weight().T)
    torch.testing.assert_close(layer.eval()(x), layer.base_layer(x) + x @ layer.delta_weight().T)
    layers = adapted_layers(adapted_net(dropout=0.25)).values()
    assert [layer.dropout.p for layer in layers] == [0.25] * 4


# ---- Section 3.1: inject ----


@pytest.mark.parametrize("frozen_before", [False, True])
def test_adapters_and_saved_modules_alone_are_trained(frozen_before):
    """After inject() exactly P, Lambda, Q and the modules to save need gradients."""
    model = Net().requires_grad_(not frozen_before)
    inject(model, ["query", "dense"], 2, modules_to_save=["head"])
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    factors = {f"{name}.{factor}" for name in ADAPTED for factor in RANK_DIM}
    assert names == factors | {"head.weight", "head.bias"}


def test_names_match_by_whole_components_from_the_right():
    """`0.dense` matches `layers.0.dense`, and `k` matches neither `block` nor `xk`."""
    assert list(adapted_layers(inject(Net(), ["0.dense"], 2))) == ["layers.0.dense"]
    model = nn.ModuleDict({"k": nn.Linear(3, 3), "block": nn.Linear(3, 3), "xk": nn.Linear(3, 3)})
    assert list(adapted_layers(inject(model, ["k"], 1))) == ["k"]


@given(st.lists(st.integers(1, 5), min_size=4, max_size=4))
@settings(max_examples=15)
def test_a_rank_map_sets_ranks_and_one_scaling(ranks):
    """Each matrix gets its rank of the map, and all get the scaling alpha / mean rank."""
    layers = adapted_layers(adapted_net(dict(zip(ADAPTED, ranks)), alpha=8.0))
    assert [layer.rank for layer in layers.values()] == ranks
    assert all(layer.scaling == pytest.approx(8.0 / np.mean(ranks)) for layer in layers.values())


def test_a_layer_in_two_places_stays_one_layer():
    """A shared nn.Linear is adapted once, in both places, and merged in both."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    inject(model, ["0"], 2, alpha=2)
    assert model[0] is model[2] and isinstance(model[0], SVDLinear)
    randomize(model[0])
    x = torch.randn(3, 4)
    y = model(x)
    merge(model)
    assert model[0] is model[2] is shared
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(target_modules=["query", "qeury"]), "'qeury' matches .* end in dense, head, query"),
        (dict(target_modules="query"), "a list of names, got the string 'query'"),
        (dict(rank=dict(zip(ADAPTED, (1, 1, 1, 9)))), "'layers.1.dense' must be .* 1..5, got 9"),
        (dict(target_modules=[]), None),
        (dict(target_modules=["layers.0"]), None),  # no nn.Linear
        (dict(rank=0), None),
        (dict(rank=2.0), None),
        (dict(rank=True), None),
        (dict(rank={"layers.0.query": 1}), None),
        (dict(rank=dict.fromkeys([*ADAPTED, "x"], 1)), None),
        (dict(modules_to_save=["haed"]), None),
        (dict(modules_to_save=["dense"]), None),
        (dict(modules_to_save=["layers.1"]), None),  # an adapted layer stands in it
        (dict(alpha=0), None),
        (dict(dropout=1.5), None),
    ],
)
def test_inject_refuses_what_does_not_fit_and_changes_nothing(arguments, message):
    """After the ValueError the model is as it was."""
    model, before = Net(), Net().state_dict()
    with pytest.raises(ValueError, match=message):
        inject(model, **dict(target_modules=["query", "dense"], rank=2) | arguments)
    assert not adapted_layers(model) and len(trainable(model)) == len(before)
    assert_same(dict(model.state_dict()), dict(before))


def test_inject_comes_once_and_first():
    """A second inject() is a ValueError, and so is any other function before the first."""
    with pytest.raises(ValueError):
        inject(adapted_net(), ["head"], 1)
    for function in (merge, orthogonality_penalty, adapter_state_dict):
        with pytest.raises(ValueError):
            function(Net())


class Activation(nn.Module):
    """Calls one of its layers, and reads the weight of the other itself."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.readable = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight)


@pytest.mark.parametrize(
    "model, name, right",
    [
        (nn.MultiheadAttention(4, 2), "out_proj", None),
        (nn.TransformerEncoderLayer(4, 2, 8), "linear1", None),
        (nn.Sequential(Activation()), "read", ["called", "readable"]),
    ],
)
def test_a_layer_whose_weight_is_read_around_it_is_refused(model, name, right):
    """It would train without its adapter, or fail later; layers that are called are adapted."""
    with pytest.raises(ValueError, match=f"{name}' cannot be adapted: .* reads its weight"):
        inject(model, [name], 2)
    assert not adapted_layers(model)
    if right:
        inject(model, right, 2)


def test_a_weight_cannot_be_both_adapted_and_saved():
    """A tied weight in a saved module would be frozen and trained at once."""
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "out": nn.Linear(4, 7)})
    model["out"].weight = model["embed"].weight
    with pytest.raises(ValueError, match="'out' would be both adapted and saved"):
        inject(model, ["out"], 2, modules_to_save=["embed"])


@pytest.fixture
def fully_shard():
    """FSDP 2, on one process."""
    from torch.distributed import fsdp

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    yield lambda module, **kwargs: fsdp.fully_shard(module, mesh=mesh, **kwargs)
    torch.distributed.destroy_process_group()


def test_sharded_adapters_are_refused(fully_shard):
    """FSDP's DTensors and ZeRO-3's flat weights are a ValueError that says what to do."""
    state = adapter_state_dict(model := adapted_net())
    fully_shard(model)
    emptied = adapted_net()
    for layer in adapted_layers(emptied).values():
        layer.base_layer.weight.data = torch.empty(0)
    load = lambda model: load_adapter_state_dict(model, state)
    for function in (orthogonality_penalty, merge, adapter_state_dict, training, load):
        with pytest.raises(ValueError, match="a trained parameter is sharded; .*ignored_params="):
            function(model)
        with pytest.raises(ValueError, match="'layers.0.query' is in flat shards .*fully_shard"):
            function(emptied)
    fully_shard((saved := adapted_net()).head)
    for function in (training, adapter_state_dict):
        with pytest.raises(ValueError, match="a trained parameter is sharded"):
            function(saved)


@pytest.mark.parametrize("before", [False, True])
def test_a_sharded_base_trains_as_a_whole_one_does(before, fully_shard):
    """Whether it is sharded before inject() or after it, with whatever is trained left whole."""
    models = []
    for sharded in (False, True):
        model = Net()
        if sharded and before:
            fully_shard(model, ignored_params={*model.head.parameters()})
        inject(model, ["query", "dense"], 2, modules_to_save=["head"])
        if sharded and not before:
            fully_shard(model, ignored_params={*trainable(model)})
        optimizer, allocator = training(model)
        for step in range(4):
            adjusted(model, optimizer, allocator, step)
        models.append(model)
    whole, sharded = models
    assert_same(adapter_state_dict(sharded), adapter_state_dict(whole))
    assert hasattr(sharded.layers[0].query.base_layer.weight, "to_local")
    with pytest.raises(ValueError, match="quantized, sharded or parametrized"):
        merge(sharded)


# ---- Section 3.1: the penalty ----


@given(st.lists(st.integers(1, 5), min_size=4, max_size=4), seeds)
@settings(max_examples=40)
def test_the_penalty_is_the_mean_of_section_3_1(ranks, seed):
    """It is |P'P - I|^2 + |QQ' - I|^2 (Frobenius), averaged over matrices of any ranks."""
    model = adapted_net(dict(zip(ADAPTED, ranks)), seed)
    expected, gradients = [], []
    for layer in adapted_layers(model).values():
        randomize(layer)
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
def test_autocast_does_not_change_the_penalty(dtype):
    """Under autocast R(P, Q) is that of float32 bit for bit."""
    layer = randomize(SVDLinear(nn.Linear(6, 5), 2))
    expected = orthogonality_penalty(layer)
    with torch.autocast("cpu", dtype):
        assert torch.equal(orthogonality_penalty(layer), expected)


# ---- Section 3.2: importance scores ----


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


@given(
    st.lists(st.sampled_from(["all", "some", "nan", "inf"]), max_size=6),
    st.floats(0.05, 0.99),
    st.floats(0.05, 0.99),
    seeds,
)
@settings(max_examples=40)
def test_importance_follows_equations_1_to_3(kinds, beta1, beta2, seed):
    """Scores are those of float64 by hand, and steps with a non-finite gradient do not count."""
    model = adapted_net(3, seed)
    optimizer = torch.optim.SGD(trainable(model), 0.1)
    schedule = RankSchedule(100, 50, 10, 1, 0)
    allocator = RankAllocator(model, optimizer, schedule, 1, beta1, beta2)
    generator = torch.Generator().manual_seed(seed)
    oracle = {w: Scores(w.shape) for w in allocator.factors.values()}
    for layer in allocator.layers.values():
        randomize(layer, generator)
    for kind in kinds:
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
def selections(draw, most=4):
    """Arguments of select() with up to that many matrices, of up to that rank, and many ties."""
    sizes = draw(st.lists(st.integers(1, most), min_size=1, max_size=most))
    score = st.sampled_from([0.0, 1.0, 2.0, 3.0]) | st.floats(0, 3)
    scores = {f"m{i}": draw(st.lists(score, min_size=n, max_size=n)) for i, n in enumerate(sizes)}
    max_ranks = {name: len(S) + draw(st.integers(0, 2)) for name, S in scores.items()}
    return scores, max_ranks, draw(st.integers(1, most + 1)), draw(st.integers(0, 2 * most - 2))


@given(selections())
@settings(max_examples=300)
def test_selection_is_what_trying_everything_finds(selection):
    """select() meets its definition on ties, rank 1, full matrices, and k or b too large."""
    assert select(*selection) == brute_force(*selection)


@given(selections(most=8))
@settings(max_examples=100)
def test_selection_conserves_the_sum_and_the_limits(selection):
    """At most b ranks go, as many come, and each matrix stays within 1..max_ranks and k."""
    scores, max_ranks, k, b = selection
    pruned, expanded = select(*selection)
    assert sum(map(len, pruned.values())) == sum(expanded.values()) <= b
    for name, S in scores.items():
        gone, come = pruned.get(name, []), expanded.get(name, 0)
        assert len(gone) <= k and come <= k
        assert 1 <= len(S) - len(gone)
        assert len(S) - len(gone) + come <= max_ranks[name]


def test_a_matrix_at_rank_1_can_grow():
    """Its only rank may not be pruned but may speak for growth (never in the released code)."""
    pruned, expanded = select({"a": [1.0, 2.0], "b": [9.0]}, {"a": 5, "b": 5}, k=1, b=1)
    assert (pruned, expanded) == ({"a": [0]}, {"b": 1})


# ---- Section 3.3: new directions ----


@given(st.integers(1, 8), st.data(), seeds)
def test_new_directions_are_orthonormal_and_orthogonal_to_the_present(d, data, seed):
    """This holds for present columns that are dependent or of any length, up to a full basis."""
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


def test_the_seed_of_the_allocator_alone_decides_new_directions():
    """An adjustment neither reads nor moves the user's random stream."""

    def grown(seed, users_seed):
        model = adapted_net()
        optimizer = torch.optim.AdamW(trainable(model))
        schedule = RankSchedule(9, 0, 1, 1, 2, "constant")
        allocator = RankAllocator(model, optimizer, schedule, k=2, seed=seed)
        loss_of(model).backward()
        optimizer.step()
        torch.manual_seed(users_seed)
        stream = torch.get_rng_state()
        assert allocator.step().expanded
        assert torch.equal(stream, torch.get_rng_state())
        return adapter_state_dict(model)

    expected = grown(3, 0)
    assert_same(grown(3, 1), expected)
    other = grown(4, 0)
    assert any(not torch.equal(other[key], value) for key, value in expected.items())


# ---- Section 3.3: resizing ----


@st.composite
def resizes(draw, max_rank=5):
    """A rank, the ranks to keep in any order, and the number to add."""
    rank = draw(st.integers(1, max_rank))
    keep = draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True))
    return rank, keep, draw(st.integers(0, max_rank - len(keep)))


@given(resizes(), seeds)
def test_pruning_removes_the_pruned_triplets_and_growing_changes_nothing(case, seed):
    """After a resize the update is the sum of scaling lambda_i P_i Q_i over the kept ranks."""
    rank, keep, n_new = case
    torch.manual_seed(seed)
    layer = randomize(SVDLinear(nn.Linear(6, 5), rank).double())
    P, Lambda, Q = map(array, (layer.P, layer.Lambda, layer.Q))
    x, scaling = torch.randn(3, 6).double(), layer.scaling.item()
    expected = scaling * sum(Lambda[i] * np.outer(P[:, i], Q[i]) for i in keep)
    resize(layer, keep, 0, torch.Generator(), ())
    y = layer(x)
    resize(layer, range(len(keep)), n_new, torch.Generator(), ())
    np.testing.assert_allclose(array(layer.delta_weight()), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer(x), y, rtol=1e-9, atol=1e-9)
    assert layer.rank == len(keep) + n_new and layer.scaling == scaling
    assert np.array_equal(array(layer.P)[:, : len(keep)], P[:, keep])
    assert np.array_equal(array(layer.Q)[: len(keep)], Q[keep])
    assert np.array_equal(array(layer.Lambda), [*Lambda[keep], *[0.0] * n_new])


OPTIMIZERS = {
    "momentum": (torch.optim.SGD, dict(momentum=0.9)),
    "Adam": (torch.optim.Adam, dict(amsgrad=True)),
    "AdamW": (torch.optim.AdamW, dict(foreach=True)),
    "RMSprop": (torch.optim.RMSprop, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
}


@pytest.mark.parametrize("optimizer, options", OPTIMIZERS.values(), ids=OPTIMIZERS)
@given(
    keep=st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True),
    n_new=st.integers(0, 2),
)
@settings(max_examples=10)
def test_kept_ranks_keep_their_state_bit_for_bit(optimizer, options, keep, n_new):
    """Kept ranks keep moments and averages, new ranks have zeros, and step counts stay."""
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


@pytest.mark.parametrize("keep, n_new", [([], 1), ([0, 0], 0), ([0, 1], 4)])
def test_a_resize_that_cannot_be_is_refused_and_changes_nothing(keep, n_new):
    """No rank to keep, one kept twice, and more ranks than the matrix can have."""
    layer = randomize(SVDLinear(nn.Linear(6, 5), 3))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError):
        resize(layer, keep, n_new, torch.Generator(), ())
    assert_same(layer.state_dict(), before)


def test_an_unsuitable_optimizer_is_refused_at_the_first_step_and_nothing_changes():
    """Adafactor factors its second moment: that is said long before an adjustment is due."""
    model = adapted_net()
    schedule = RankSchedule(100, 50, 10, 10, 2)
    optimizer, allocator = training(model, schedule=schedule, optimizer=torch.optim.Adafactor)
    loss_of(model).backward()
    optimizer.step()
    before = copy.deepcopy((adapter_state_dict(model), allocator.state_dict()))
    with pytest.raises(ValueError, match="'row_var' is a Tensor of shape .* such as AdamW"):
        allocator.step()
    assert_same((adapter_state_dict(model), allocator.state_dict()), before)


def test_an_adjustment_that_cannot_be_made_in_all_layers_is_made_in_none():
    """State of a wrong shape in any layer is found before the first layer is resized."""
    model = adapted_net()
    optimizer, allocator = training(model, b=4, schedule=RankSchedule(10, 0, 0, 2, 4))
    train_step(model, optimizer, allocator)
    last = list(allocator.layers.values())[-1]
    optimizer.state[last.P]["exp_avg"] = torch.zeros(3)
    loss_of(model).backward()
    before = copy.deepcopy((adapter_state_dict(model), allocator.state_dict()))
    with pytest.raises(ValueError, match="'exp_avg' is a Tensor of shape"):
        allocator.step()
    assert_same((adapter_state_dict(model), allocator.state_dict()), before)


class Compressed(torch.Tensor):
    """What an 8-bit optimizer keeps: of the parameter's shape, but no plain tensor."""


def test_an_optimizer_whose_state_is_no_plain_tensor_is_refused():
    """Numbers in another code cannot be cut and joined, whatever their shape."""
    model = adapted_net()
    optimizer, allocator = training(model)
    loss_of(model).backward()
    optimizer.step()
    state = optimizer.state[list(allocator.layers.values())[-1].P]
    state["exp_avg"] = state["exp_avg"].as_subclass(Compressed)
    with pytest.raises(ValueError, match="'exp_avg' is a Compressed of shape"):
        allocator.step()


# ---- Section 3.4: the schedule ----


@st.composite
def schedules(draw, shape="cubic"):
    warmup, stabilize = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    search, b = draw(st.integers(1, 60)), draw(st.integers(0, 200))
    interval = draw(st.integers(1, min(20, search)))
    return RankSchedule(warmup + search + stabilize, warmup, stabilize, interval, b, shape)


@given(schedules())
@example(RankSchedule(6, 0, 0, 1, 108))  # a tie at a progress of 5/6, which floats miss
def test_the_budget_is_equation_5_exactly(schedule):
    """It is b (1 - progress^3), ties to even, at warmup + m interval and 0 at other steps."""
    span = schedule.total_steps - schedule.stabilize_steps - schedule.warmup_steps
    for step in range(-1, schedule.total_steps + 3):
        since = step - schedule.warmup_steps
        expected = 0
        if since in range(schedule.adjust_interval, span + 1, schedule.adjust_interval):
            whole, rest = divmod(schedule.b * (span**3 - since**3), span**3)
            expected = whole + (2 * rest > span**3 or (2 * rest == span**3 and whole % 2 == 1))
        assert schedule.budget(step) == expected


@given(st.sampled_from(sorted(SHAPES)).flatmap(schedules))
def test_every_shape_falls_from_b_to_its_end(schedule):
    """Budgets are in 0..b and never rise; all but constant ones are 0 where the search ends."""
    first = schedule.warmup_steps + schedule.adjust_interval
    steps = range(first, schedule.search_end + 1, schedule.adjust_interval)
    budgets = [schedule.budget(step) for step in steps]
    assert budgets == sorted(budgets, reverse=True)
    assert all(0 <= b <= schedule.b for b in budgets)
    if steps[-1] == schedule.search_end:
        assert budgets[-1] == (schedule.b if schedule.shape == "constant" else 0)


def test_the_other_shapes_are_their_formulas():
    """Linear is 1 - progress, exponential (e^(-5 progress) - e^-5) / (1 - e^-5), constant 1."""
    shapes = ("linear", "exponential", "constant")
    linear, exponential, constant = (RankSchedule(100, 20, 30, 1, 9, shape) for shape in shapes)
    for t in range(21, 71):
        progress = Fraction(t - 20, 50)
        assert linear.budget(t) == round(9 * (1 - progress))
        share = (np.exp(-5 * float(progress)) - np.exp(-5)) / (1 - np.exp(-5))
        assert exponential.budget(t) == round(9 * share)
        assert constant.budget(t) == 9


@pytest.mark.parametrize(
    "numbers, message",
    [
        ((10, 5, 5, 1, 1), r"total_steps must hold .*total_steps=10, warmup_steps=5"),
        ((10, 1, 5, 5, 1), None),  # no room for an interval
        ((10, 20, 5, 1, 1), None),
        ((10.5, 1, 5, 1, 2), None),
        ((10, True, 5, 1, 2), None),
        ((10, -1, 5, 1, 1), None),
        ((10, 1, -5, 1, 1), None),
        ((10, 1, 5, 0, 1), None),
        ((10, 1, 5, 1, -2), None),
        ((10, 1, 5, 1, 2, "cubical"), None),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(numbers, message):
    """Phases that do not fit into the steps, and values out of range, are a ValueError."""
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

    def update(self):
        self.clock += 1
        loss_of(self.model, self.clock).backward()
        self.optimizer.step()

    @rule(steps=st.integers(1, 3))
    def train(self, steps):
        for _ in range(steps):
            self.update()
            self.optimizer.zero_grad()

    @rule()
    def adjust(self):
        """The pruned ranks go, the others stay bit for bit, and new ones have singular value 0."""
        self.update()
        before = adapter_state_dict(self.model)
        adjustment = self.allocator.step()
        self.optimizer.zero_grad()
        assert isinstance(adjustment, Adjustment) and adjustment.step == self.allocator.t
        for name, layer in self.allocator.layers.items():
            ranks = range(len(before[f"{name}.Lambda"]))
            keep = torch.tensor([i for i in ranks if i not in adjustment.pruned.get(name, [])])
            sizes = [len(keep), adjustment.expanded.get(name, 0)]
            for factor, dim in RANK_DIM.items():
                kept, new = getattr(layer, factor).split(sizes, dim)
                assert torch.equal(kept, before[f"{name}.{factor}"].index_select(dim, keep))
                assert factor != "Lambda" or not new.any()

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
        with pytest.warns(UserWarning, match="ranks were to move"):
            merged = merge(copy.deepcopy(self.model))
        x = torch.randn(3, 6)
        assert not adapted_layers(merged)
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
    def base_weights_are_unchanged_bit_for_bit(self):
        parameters = dict(self.model.named_parameters())
        assert all(torch.equal(parameters[name], value) for name, value in self.base.items())

    @invariant()
    def parameters_are_the_same_objects(self):
        pairs = itertools.zip_longest(self.parameters, self.model.parameters())
        assert all(old is new for old, new in pairs)


TestTraining = Training.TestCase
TestTraining.settings = settings(max_examples=25, stateful_step_count=15)


def test_an_adjustment_follows_the_scores_of_its_step():
    """step() adjusts at the steps of its schedule alone, by select() of the scores then."""
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


def test_averages_move_until_the_search_ends_and_steps_are_counted_on():
    """Scores stay as they are after the search, and its steps need no gradients."""
    model = adapted_net()
    optimizer, allocator = training(model, schedule=RankSchedule(9, 1, 4, 2, 0))
    for step in range(9):
        before = copy.deepcopy(allocator.importance())
        train_step(model, optimizer, allocator, step)
        same = all(torch.equal(before[name], S) for name, S in allocator.importance().items())
        assert same == (step + 1 > 5)
    with pytest.warns(UserWarning, match="more often than total_steps = 9; .* not for every micro"):
        allocator.step()
    assert allocator.t == 10


def test_gradients_that_are_all_0_are_warned_of():
    """zero_grad(set_to_none=False) before step() leaves nothing to score."""
    model = adapted_net()
    optimizer, allocator = training(model)
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with pytest.warns(UserWarning, match="all gradients are 0: .* before zero_grad") as told:
        allocator.step()
    assert [warning.filename for warning in told] == [__file__]


@pytest.mark.parametrize("when", ["before the optimizer is made", "in the middle", "thawed later"])
def test_a_frozen_adapter_keeps_its_ranks(when):
    """The others exchange ranks among themselves; their sum stays."""
    model = adapted_net()
    frozen = model.layers[0].dense
    if when == "in the middle":
        optimizer, allocator = training(model, b=4)
        adjusted(model, optimizer, allocator)
        frozen.requires_grad_(False)
    else:
        frozen.requires_grad_(False)
        optimizer, allocator = training(model, b=4)
        frozen.requires_grad_(when == "thawed later")  # but the optimizer does not have it
    before, ranks = copy.deepcopy(frozen.state_dict()), allocator.ranks()
    for step in range(8):
        adjusted(model, optimizer, allocator, step)
    assert_same(dict(frozen.state_dict()), dict(before))
    assert sum(allocator.ranks().values()) == sum(ranks.values())


def test_a_step_without_any_gradient_is_an_error_that_counts_for_nothing():
    """step() after zero_grad() says where it belongs and leaves the allocator as it was."""
    _, allocator = training(adapted_net())
    with pytest.raises(ValueError, match="after optimizer.step.. and before zero_grad"):
        allocator.step()
    assert allocator.t == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda model: dict(optimizer=torch.optim.SGD(model.head.parameters())),
         "the optimizer does not hold 'layers.0.query.P'; .* one for all adapters"),
        (lambda model: dict(k=0), None),
        (lambda model: dict(k=1.5), None),
        (lambda model: dict(k=True), None),
        (lambda model: dict(beta1=1.0), None),
        (lambda model: dict(beta2=0.0), None),
    ],
)  # fmt: skip
def test_an_allocator_that_cannot_work_is_refused(arguments, message):
    """An optimizer without the factors, and k or betas out of range, are a ValueError."""
    model = adapted_net()
    good = dict(optimizer=torch.optim.SGD(trainable(model)), schedule=RankSchedule(9, 0, 1, 1, 1))
    with pytest.raises(ValueError, match=message):
        RankAllocator(model, **good | dict(k=1) | arguments(model))


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
    """With eight times as many matrices it writes about eight times as many bytes."""
    written = []
    for n in (8, 64):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(n)))
        names = [str(i) for i in range(n)]
        inject(model, names, {name: 1 + i % 4 for i, name in enumerate(names)})
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        allocator = RankAllocator(model, optimizer, RankSchedule(9, 0, 0, 1, n // 4), k=1)
        with Written() as work:
            (orthogonality_penalty(model) + sum(m.Lambda.sum() for m in model)).backward()
            assert sum(allocator.step().expanded.values()) >= n // 8
        written.append(work.total)
    assert written[1] < 10 * written[0]  # which ranks move differs a little


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    """A file restores adapters, head, optimizer and allocator into a model of another rank."""
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
    assert_same(adapter_state_dict(resumed), adapter_state_dict(whole))


def test_an_allocator_takes_no_state_of_other_ranks_or_modules():
    """load_state_dict() raises a ValueError and leaves the allocator as it was."""
    model = adapted_net()
    optimizer, allocator = training(model)
    train_step(model, optimizer, allocator)
    for other in (adapted_net(4), inject(Net(), ["query"], allocator.ranks()["layers.0.query"])):
        fresh = training(other)[1]
        before = fresh.state_dict()
        with pytest.raises(ValueError):
            fresh.load_state_dict(allocator.state_dict())
        assert_same(fresh.state_dict(), before)
    halved = copy.deepcopy(before := allocator.state_dict())
    del halved["averages"]["layers.0.query.P"]["U_bar"]
    with pytest.raises(ValueError):
        allocator.load_state_dict(halved)
    assert_same(allocator.state_dict(), before)


# ---- Life around the allocator ----


def test_an_old_loss_may_stay_alive_across_an_adjustment():
    """A graph that was kept from before does not break the next backward."""
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


def test_lists_of_parameters_stay_valid():
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
    """Across adjustments the rate that a scheduler sets is the rate of the next update."""
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
    model = inject(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6)), ["0", "1"], 2)
    optimizer, allocator = training(model, b=1, k=1)
    compiled, ranks = torch.compile(model, dynamic=True, backend="aot_eager"), []
    for _ in range(2):
        ranks.append(allocator.ranks())
        x = torch.randn(4, 6)
        torch.testing.assert_close(compiled(x), model(x))
        compiled(x).square().sum().backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    assert ranks[0] != ranks[1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    """Recomputed activations see the factors as they are after adjustments."""
    model = adapted_net()
    optimizer, allocator = training(model)
    for _ in range(3):
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


def test_a_step_that_grad_scaler_skips_neither_scores_nor_breaks():
    """In float16 an overflow leaves weights and averages alone, and adjustments go on."""
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
    assert_same(allocator.importance(), scores)


@pytest.mark.parametrize(
    "base, autocast", [("bfloat16", False), ("bfloat16", True), ("float32", True)]
)
def test_low_precision_training_follows_float32(base, autocast):
    """With a bfloat16 base or autocast the loss falls alike, and factors stay float32."""

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


def test_parameters_that_are_replaced_under_an_allocator_are_refused():
    """load_state_dict(assign=True) leaves the optimizer with parameters of no use; at any step."""
    model = adapted_net()
    optimizer, allocator = training(model, schedule=RankSchedule(100, 50, 10, 10, 2))
    train_step(model, optimizer, allocator)
    model.load_state_dict(model.state_dict(), assign=True)
    loss_of(model).backward()
    with pytest.raises(ValueError, match="parameters of 'layers.0.query' were replaced, as assign"):
        allocator.step()


def test_ranks_that_are_loaded_under_an_allocator_are_refused():
    """The averages belong to the old ranks, so step() says what else to load."""
    model = adapted_net(2)
    _, allocator = training(model, optimizer=torch.optim.SGD)
    for rank in (1, 3):
        load_adapter_state_dict(model, adapter_state_dict(adapted_net(rank)))
        loss_of(model).backward()
        for function in (allocator.step, allocator.importance):
            with pytest.raises(ValueError, match="not the allocator's own load_state_dict"):
                function()


# ---- After training: merging ----


@given(
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
    st.sampled_from(["float32", "bfloat16"]),
    seeds,
)
@settings(max_examples=40)
def test_a_merged_model_computes_what_the_adapted_one_did(ranks, dtype, seed):
    """Frozen nn.Linears of the base's dtype hold W0 + scaling P diag(Lambda) Q."""
    model = adapted_net(dict(zip(ADAPTED, ranks)), seed)
    expected = {}
    for name, layer in adapted_layers(model).items():
        randomize(layer).base_layer.to(getattr(torch, dtype))
        expected[name] = array(layer.base_layer.weight) + array(layer.delta_weight())
    x = torch.randn(3, 6)
    before = model(x) if dtype == "float32" else None
    assert merge(model) is model
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == "float32" else dict(rtol=1e-2, atol=1e-2)
    for name in ADAPTED:
        linear = model.get_submodule(name)
        assert type(linear) is nn.Linear and linear.weight.dtype == getattr(torch, dtype)
        assert not linear.weight.requires_grad
        np.testing.assert_allclose(array(linear.weight), expected[name], **tolerance)
    if dtype == "float32":
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)


def test_a_merged_model_can_be_adapted_anew():
    """Nothing of the first adapters is left, nor of what was saved beside them."""
    model = inject(merge(adapted_net()), ["query"], 1)
    assert list(adapted_layers(model)) == ["layers.0.query", "layers.1.query"]
    assert not any(key.startswith("head") for key in adapter_state_dict(model))


def test_a_bare_layer_merges_into_its_base():
    """merge() of an SVDLinear that stands in no model returns its nn.Linear."""
    layer = randomize(SVDLinear(nn.Linear(6, 5), 2))
    x = torch.randn(3, 6)
    y = layer(x)
    assert merge(layer) is layer.base_layer
    torch.testing.assert_close(layer.base_layer(x), y)


def test_a_bare_layer_saves_and_restores_its_adapter():
    """A model that is an SVDLinear itself has an adapter state, at any rank."""
    layer, other = (SVDLinear(nn.Linear(6, 5), rank) for rank in (3, 1))
    randomize(layer)
    state = adapter_state_dict(layer)
    assert state.keys() == {"P", "Lambda", "Q", "scaling"}
    load_adapter_state_dict(other, state)
    assert torch.equal(other.delta_weight(), layer.delta_weight()) and other.rank == 3


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


def scaled_float8(linear):
    linear.weight = nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    return linear


NO_PLAIN_WEIGHT = {
    "packed integers": Quantized(6, 5),
    "scaled float8": scaled_float8(nn.Linear(6, 5)),
    "weight norm": nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
    "spectral norm": nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)).eval(),
    "old spectral norm": nn.utils.spectral_norm(nn.Linear(6, 5)),
}


@pytest.mark.parametrize("base", NO_PLAIN_WEIGHT.values(), ids=NO_PLAIN_WEIGHT)
def test_weights_that_are_no_plain_matrices_are_not_merged(base):
    """One of them among others is a ValueError, and no layer of the model is merged then."""
    model = inject(nn.ModuleDict(dict(plain=nn.Linear(6, 6), other=base)), ["plain", "other"], 2)
    for layer in model.values():
        randomize(layer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'other' has a weight that is quantized, .* parametrized"):
        merge(model)
    assert list(adapted_layers(model)) == ["plain", "other"]
    assert_same(dict(model.state_dict()), dict(before))


def test_merging_warns_of_a_search_that_did_not_end():
    """merge() warns its caller if the allocator never stepped or stopped early, not otherwise."""

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
        assert all(warning.filename == __file__ for warning in told)
        return [str(warning.message) for warning in told]

    for steps in (0, 1, 2):  # at step 5, the end of the search, b is 0
        (message,) = merged_after(steps)
        assert message == (
            f"ranks were to move until step 3, but RankAllocator.step() was called {steps} times"
        )
    assert merged_after(3) == merged_after(9) == merged_after(0, b=0) == []
    assert merged_after(0, fresh=True) == []


def test_merging_does_not_warn_of_a_search_that_was_resumed_and_had_ended():
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


# ---- After training: saving and loading ----


def test_the_adapter_state_is_all_that_was_trained_and_no_more():
    """It holds P, Lambda, Q and scaling of every layer, and saved modules with their buffers."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.BatchNorm1d(4))
    inject(model, ["0"], 2, modules_to_save=["2"])
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"0.{key}" for key in (*RANK_DIM, "scaling")} | {f"2.{key}" for key in parts}
    assert adapter_state_dict(model).keys() == expected


def test_adapter_state_restores_saved_modules_and_scaling():
    """It overwrites another alpha, other ranks and another head."""
    model = adapted_net(2, alpha=4.0)
    adjusted(model, *training(model))
    other = adapted_net(4, alpha=1.0)
    nn.init.zeros_(other.head.weight)
    load_adapter_state_dict(other, adapter_state_dict(model))
    x = torch.randn(3, 6)
    assert torch.equal(other(x), model(x))


def test_states_are_copies():
    """A state shares no memory with what it was taken from, nor with what it was loaded into."""
    model = adapted_net()
    optimizer, allocator = training(model)
    adjusted(model, optimizer, allocator)
    states = adapter_state_dict(model), allocator.state_dict()
    before = copy.deepcopy(states)
    other = adapted_net(allocator.ranks())
    load_adapter_state_dict(other, states[0])
    others_optimizer, others_allocator = training(other)
    others_allocator.load_state_dict(states[1])
    train_step(model, optimizer, allocator)
    train_step(other, others_optimizer, others_allocator)
    assert_same(states, before)
    x = torch.randn(3, 6)
    expected = model(x), other(x)
    for value in states[0].values():
        value.zero_()
    assert_same((model(x), other(x)), expected)


def test_ranks_is_a_map_that_inject_takes():
    """A model injected at the ranks that were found has each of them where it was found."""
    model = adapted_net()
    optimizer, allocator = training(model)
    adjusted(model, optimizer, allocator)
    ranks = allocator.ranks()
    assert len(set(ranks.values())) > 1
    layers = adapted_layers(adapted_net(ranks))
    assert {name: layer.rank for name, layer in layers.items()} == ranks


def query_of_rank(r):
    """Factors that agree on a rank."""
    shapes = {"P": (5, r), "Lambda": (r,), "Q": (r, 6)}
    return {f"layers.0.query.{factor}": torch.zeros(shape) for factor, shape in shapes.items()}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers.0.query.P": None}, "missing in the state, or unknown .*: layers.0.query.P"),
        ({"layers.9.query.P": torch.zeros(1)}, None),
        ({"layers.0.query.P": torch.zeros(5, 9)}, None),
        ({"head.bias": torch.zeros(7)}, None),
        (query_of_rank(0), None),
        (query_of_rank(6), None),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    """Keys that are missing or unknown, shapes that differ, and ranks out of range do not load."""
    state = adapter_state_dict(adapted_net(2, seed=1)) | change
    state = {key: value for key, value in state.items() if value is not None}
    before = adapter_state_dict(model := adapted_net(3))
    with pytest.raises(ValueError, match=message):
        load_adapter_state_dict(model, state)
    assert_same(adapter_state_dict(model), before)


def test_plain_load_state_dict_takes_any_ranks():
    """A whole state_dict of other ranks loads strictly, into the same Parameters."""
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


@pytest.mark.parametrize("wrong", [query_of_rank(6), query_of_rank(0), {"layers.0.query.Q": None},
                                   {"layers.0.query.P": torch.zeros(3, 3)},
                                   {"layers.0.query.Lambda": torch.zeros(2)}])  # fmt: skip
@pytest.mark.parametrize("strict", [True, False])
def test_plain_load_state_dict_refuses_factors_that_do_not_fit_each_other(wrong, strict):
    """They are named, and the layer that they are of has its ranks and its numbers."""
    state = {**adapted_net(3, seed=1).state_dict(), **wrong}
    state = {key: value for key, value in state.items() if value is not None}
    model = adapted_net(1)
    layer = model.layers[0].query
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match="layers.0.query"):
        model.load_state_dict(state, strict=strict)
    assert layer.rank == 1
    shared = {key for key in before if key in RANK_DIM}
    assert_same({k: layer.state_dict()[k] for k in shared}, {k: before[k] for k in shared})


def test_disabled_adapters_leave_the_base():
    """Within adapters_disabled() the base answers; a loss of both models, as DPO's, trains."""
    base, model = Net(), adapted_net(modules_to_save=[])
    for layer in adapted_layers(model).values():
        randomize(layer)
    x = torch.randn(3, 6)
    expected = model(x)
    policy = model(x)
    state = adapter_state_dict(model)
    with adapters_disabled(model) as same:
        with adapters_disabled(model):
            assert same is model and torch.equal(model(x), base(x))
        assert torch.equal(model(x), base(x))
        assert_same(adapter_state_dict(model), state)  # what is saved meanwhile is the adapter
    with pytest.raises(KeyError), adapters_disabled(model):
        raise KeyError
    assert torch.equal(model(x), expected)
    policy.square().sum().backward()
    gradients = [w.grad for w in trainable(model)]
    model.zero_grad()
    expected.square().sum().backward()
    assert_same(gradients, [w.grad for w in trainable(model)])


# ---- After training: export to PEFT ----


@pytest.fixture(scope="module")
def peft():
    """The oracle, with the transformers and safetensors that it brings."""
    return pytest.importorskip("peft")


TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
BART = dict(layers=2, attention_heads=2, ffn_dim=32)


def deberta():
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(**TINY, intermediate_size=32, relative_attention=True)
    config.update(dict(pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8))
    return DebertaV2ForSequenceClassification(config)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**TINY, intermediate_size=32))


def bart():
    from transformers import BartConfig, BartForSequenceClassification

    sizes = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in BART.items()}
    return BartForSequenceClassification(BartConfig(d_model=16, vocab_size=40, **sizes))


def llama(**kwargs):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(intermediate_size=24, num_key_value_heads=1)
    return LlamaForCausalLM(LlamaConfig(**TINY, **sizes, **kwargs))


ARCHITECTURES = {
    "DeBERTaV2": (deberta, ["query_proj", "value_proj", "output.dense"], ["pooler", "classifier"]),
    "BERT": (bert, ["query", "intermediate.dense"], ["pooler", "classifier"]),
    "BART": (bart, ["q_proj", "fc1", "encoder_attn.v_proj"], ["classification_head"]),
    "Llama": (llama, ["q_proj", "k_proj", "down_proj"], ["lm_head"]),
    "Llama, no head": (llama, ["q_proj", "up_proj"], []),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("build, targets, heads", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_an_exported_adapter_gives_the_same_logits_in_peft(build, targets, heads, tmp_path, peft):
    """After ranks moved, PEFT's model and its merge_and_unload() agree with ours to 1e-5."""
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
    export_peft(model, tmp_path / "peft", "a/base")
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


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_tied_weights_are_exported_at_both_ends(saved, tmp_path, peft):
    """PEFT's copy of a saved module is tied to nothing, so the other end is saved as well."""
    base = llama(tie_word_embeddings=True).eval()
    model = inject(copy.deepcopy(base), ["q_proj"], 2, modules_to_save=saved)
    with torch.no_grad():
        model.lm_head.weight += torch.randn(40, 16)
    export_peft(model, tmp_path, "a/base")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ids = torch.randint(3, 40, (3, 7))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_pefts_auto_classes_find_the_base(tmp_path, peft):
    """AutoPeftModel loads an exported adapter with its base, by the class that the base had."""
    base = llama().eval()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/tokenizer_config.json").touch()  # else it would ask the hub for one
    model = inject(copy.deepcopy(base), ["q_proj"], 2)
    randomize(model.model.layers[0].self_attn.q_proj)
    export_peft(model, tmp_path / "adapter", str(tmp_path / "base"))
    (tmp_path / "adapter/tokenizer_config.json").unlink()
    os.environ["HF_HUB_OFFLINE"] = "1"
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.randint(3, 40, (3, 7))
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("peft")
def test_several_writers_may_export_at_once(tmp_path):
    """As all processes under torchrun may: no temporary file is shared, and none is left."""
    model = adapted_net()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: export_peft(model, tmp_path, "base"), range(40)))
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


class Tails(nn.Module):
    """Names that are the tails of others: of adapted ones, of saved ones, of both."""

    NAMES = ("fc", "block.fc", "head", "overhead", "xhead", "ahead.fc", "ahead.rest", "Xfc")

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
def test_peft_finds_each_module_where_names_are_tails_of_others(adapted, tmp_path, peft):
    """Adapters and saved modules come to where they were, and other modules stay as they are."""
    base = Tails()
    tails = tuple(f".{name}" for name in adapted)  # "fc" adapts "block.fc" too
    ranks = {n: 1 + i for i, n in enumerate(n for n in base.NAMES if f".{n}".endswith(tails))}
    model = inject(copy.deepcopy(base), adapted, ranks, modules_to_save=["head"])
    for name, layer in adapted_layers(model).items():
        randomize(layer)
        if name not in adapted:
            model.set_submodule(name, layer.base_layer)
    nn.init.normal_(model.head.weight)
    export_peft(model, tmp_path, "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(4, 6)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(loaded.merge_and_unload()(x), merge(model)(x), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("peft")
def test_what_peft_would_adapt_wrongly_is_not_exported(tmp_path):
    """A layer in two places, a bare one, or none to adapt is a ValueError and writes no file."""
    shared = nn.Linear(4, 4)
    model = inject(nn.Sequential(shared, nn.Tanh(), shared), ["0"], 2)
    none = inject(Tails(), ["overhead"], 2, modules_to_save=["head"])
    for refused in (model, SVDLinear(nn.Linear(4, 4), 2), none):
        with pytest.raises(ValueError):
            export_peft(refused, tmp_path / "peft", "base")
    assert not (tmp_path / "peft").exists()


@pytest.mark.usefixtures("peft")
def test_exporting_warns_of_a_search_that_did_not_end(tmp_path):
    """export_peft() warns its caller as merge() does, and leaves the model adapted."""
    model = adapted_net()
    optimizer, allocator = training(model)
    train_step(model, optimizer, allocator)
    before = adapter_state_dict(model)
    with pytest.warns(UserWarning, match="ranks were to move") as told:
        export_peft(model, tmp_path, "base")
    assert [warning.filename for warning in told] == [__file__]
    assert_same(adapter_state_dict(model), before)


def test_exporting_warns_once_where_an_adapted_layer_is_saved_in_whole(tmp_path):
    """PEFT takes inner.head for the saved head: merging the layer in it adds no warning."""
    pytest.importorskip("safetensors")
    model = nn.ModuleDict(
        dict(
            inner=nn.ModuleDict(dict(head=nn.ModuleDict(dict(query=nn.Linear(4, 4))))),
            head=nn.Linear(4, 2),
            query=nn.Linear(4, 4),
        )
    )
    inject(model, ["query"], 2)
    model["head"].requires_grad_(True).elalora_saved = True
    training(model, schedule=RankSchedule(10, 0, 1, 1, 1))
    with pytest.warns(UserWarning, match="until step 7") as warned:
        elalora.export_peft(model, tmp_path, "base")
    assert len(warned) == 1 and warned[0].filename == __file__


# ---- The method ----


def test_planted_ranks_are_found():
    """On matrices of planted rank 6, 1, 1, 0 the residual ends below any even allocation's."""
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
