"""The laws of elalora.py, in its order.

Oracles are independent: NumPy in float64, brute force, exact fractions, torch's own optimizers, a
twin that is never saved, PEFT. Needs torch, numpy, hypothesis and pytest; without safetensors and
PEFT the tests of the export are skipped. The laws run on every device that is found: where there
is a GPU, `pytest test_elalora.py` proves them on it.
"""

import copy
import dataclasses
import io
import itertools
import json
import os
import re
import sys
import warnings
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (RuleBasedStateMachine, initialize, invariant, precondition, rule,
                                 run_state_machine_as_test)
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import elalora
from elalora import (RANK_DIM, SHAPES, Adjustment, RankAllocator, RankSchedule, SVDLinear,
                     adapter_state_dict, adapters_disabled, export_peft, gram_schmidt, inject,
                     load_adapter_state_dict, merge, orthogonality_penalty, parameter_groups,
                     resize, select)

torch.set_num_threads(1)
settings.register_profile("laws", deadline=None, max_examples=40, derandomize="CI" in os.environ)
settings.load_profile("laws")

DEVICES = ["cpu"]
DEVICES += ["cuda"] if torch.cuda.is_available() else []
DEVICES += ["mps"] if torch.backends.mps.is_available() else []
cpu_only = pytest.mark.parametrize("device", ["cpu"], indirect=True)
float64 = pytest.mark.skipif("mps" in DEVICES, reason="MPS has no float64")


@pytest.fixture(params=DEVICES, autouse=True)
def device(request):
    """New tensors are made on the device. What a test draws does not depend on other tests."""
    torch.set_default_device(request.param)
    torch.manual_seed(0)
    yield request.param
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


# ---- Strategies, models, and the invariants of Algorithm 1 ----
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.dense = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x):
        return x + self.dense(torch.tanh(self.query(x)))


class Net(nn.Module):
    """Two blocks of 6 -> 5 -> 6, a norm and a head; a matrix to adapt has at most 5 ranks."""

    def __init__(self, seed=0, norm=nn.LayerNorm):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm, self.head = norm(6), nn.Linear(6, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


ADAPTED = [f"layers.{i}.{name}" for i in range(2) for name in ("query", "dense")]
OPTIMIZERS = {
    "AdamW": (torch.optim.AdamW, dict(lr=0.02, weight_decay=0.0)),
    "Adam": (torch.optim.Adam, dict(lr=0.02, amsgrad=True)),
    "NAdam": (torch.optim.NAdam, dict(lr=0.02)),
    "SGD": (torch.optim.SGD, dict(lr=0.02)),
    "momentum": (torch.optim.SGD, dict(lr=0.02, momentum=0.9)),
    "RMSprop": (torch.optim.RMSprop, dict(lr=0.01, centered=True, momentum=0.5)),
    "Adagrad": (torch.optim.Adagrad, dict(lr=0.05)),
}
seeds = st.integers(0, 2**31 - 1)
rank_lists = st.lists(st.integers(1, 5), min_size=4, max_size=4)


@st.composite
def selections(draw, most=4):
    """Arguments of select() with up to that many matrices, of up to that rank, and many ties."""
    sizes = draw(st.lists(st.integers(1, most), min_size=1, max_size=most))
    score = st.sampled_from([0.0, 1.0, 2.0, 3.0]) | st.floats(0, 3)
    scores = {f"m{i}": draw(st.lists(score, min_size=n, max_size=n)) for i, n in enumerate(sizes)}
    max_ranks = {name: len(S) + draw(st.integers(0, 2)) for name, S in scores.items()}
    k, b = draw(st.integers(1, most + 1)), draw(st.integers(0, 2 * most - 2))
    return scores, max_ranks, k, b, draw(st.integers(1, 3))


@st.composite
def resizes(draw, max_rank=5):
    """A rank, the ranks to keep in any order, and the number to add."""
    rank = draw(st.integers(1, max_rank))
    keep = draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=rank, unique=True))
    return rank, keep, draw(st.integers(0, max_rank - len(keep)))


@st.composite
def schedules(draw):
    warmup, stabilize = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    search, b = draw(st.integers(1, 60)), draw(st.integers(0, 200))
    interval = draw(st.integers(1, min(20, search)))
    return RankSchedule(warmup + search + stabilize, warmup, stabilize, interval, b)


def randn(*shape, seed=0):
    """The same numbers on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cpu").to(torch.get_default_device())


def array(tensor):
    return tensor.detach().cpu().double().numpy()


def assert_same(got, expected):
    """Equal bit for bit, in any nesting of mappings and sequences."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def adapted_net(rank=2, seed=0, norm=nn.LayerNorm, **kwargs):
    kwargs = {"modules_to_save": ["head"]} | kwargs
    return inject(Net(seed, norm), ["query", "dense"], rank, **kwargs)


def adapted_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, SVDLinear)}


def factors(layer):
    return [layer.P, layer.Lambda, layer.Q]


def trainable(model):
    return [w for w in model.parameters() if w.requires_grad]


def randomized(model):
    """A model in the middle of training: P and Q away from orthonormal, Lambda away from 0."""
    for i, w in enumerate(w for layer in adapted_layers(model).values() for w in factors(layer)):
        w.data.copy_(randn(*w.shape, seed=i + 1))
    return model


def training(model, b=2, k=2, optimizer="AdamW", schedule=None, **kwargs):
    """An optimizer, and an allocator that moves b ranks at every step unless given a schedule."""
    kind, options = OPTIMIZERS[optimizer]
    optimizer = kind(trainable(model), **options)
    schedule = schedule or RankSchedule(10**6, 0, 1, 1, b, "constant")
    allocator = RankAllocator(model, optimizer, schedule, k, **kwargs)
    remember(model, allocator)
    return optimizer, allocator


def remember(model, allocator):
    """What assert_invariants() compares with."""
    frozen = {key: x.clone() for key, x in model.state_dict().items()
              if "base_layer" in key or "scaling" in key}
    allocator.first = allocator.ranks(), list(model.parameters()), frozen


def assert_invariants(model, allocator, before=None, adjustment=None):
    """All that Algorithm 1 never changes; and, of an adjustment, what it did to the state before:
    retained ranks stay bit for bit, new ones have no effect and are orthonormal to all."""
    ranks, parameters, frozen = allocator.first
    assert sum(allocator.ranks().values()) == sum(ranks.values())
    assert all(w is old for w, old in zip(model.parameters(), parameters, strict=True))
    held = {w for group in allocator.optimizer.param_groups for w in group["params"]}
    assert held <= set(parameters)
    state = model.state_dict()
    assert_same({key: state[key] for key in frozen}, frozen)
    for name, layer in adapted_layers(model).items():
        d_out, d_in = layer.base_layer.weight.shape
        assert min(allocator.min_rank, ranks[name]) <= layer.rank <= min(d_out, d_in)
        assert layer.rank == allocator.ranks()[name]
        shapes = [(d_out, layer.rank), (layer.rank,), (layer.rank, d_in)]
        for w, shape in zip(factors(layer), shapes):
            moments = allocator.optimizer.state.get(w, {}).values()
            assert w.shape == shape and w.is_leaf and (w.grad is None or w.grad.shape == shape)
            assert w.is_contiguous()  # as safetensors, FSDP and resuming bit for bit need it
            assert all(x.shape == shape for x in moments if getattr(x, "ndim", 0))
        if adjustment:
            pruned, n_new = adjustment.pruned.get(name, []), adjustment.expanded.get(name, 0)
            keep = [i for i in range(len(before[f"{name}.Lambda"])) if i not in pruned]
            for (factor, dim), w in zip(RANK_DIM.items(), factors(layer)):
                kept, new = w.split([len(keep), n_new], dim)
                old = before[f"{name}.{factor}"].index_select(dim, torch.tensor(keep))
                assert torch.equal(kept, old)
                assert w.grad is None or not (pruned or n_new)
                assert factor != "Lambda" or not new.any()
                if factor != "Lambda":
                    assert_orthonormal_to(*(array(x if dim else x.T) for x in (kept, new)))


def assert_orthonormal_to(present, new):
    np.testing.assert_allclose(new.T @ new, np.eye(new.shape[1]), atol=1e-5)
    lengths = np.maximum(np.linalg.norm(present, axis=0), 1e-30)
    np.testing.assert_allclose((present / lengths).T @ new, 0, atol=1e-5)


def loss_of(model, step=0):
    x = randn(4, 6, seed=step).requires_grad_()
    return model(x).square().mean() + 0.1 * orthogonality_penalty(model)


def train_step(model, optimizer, allocator, step=0, overflow=False, parts=1, to_none=True):
    """A step of a training loop, of several losses if need be, whose graphs are still alive at the
    next backward. If it overflows, the optimizer is skipped."""
    losses = [loss_of(model, 99 * part + step) / parts for part in range(parts)]
    for loss in losses:
        loss.backward(retain_graph=True)
    if overflow:
        model.head.weight.grad[0, 0] = torch.inf  # a GradScaler looks at all gradients
    else:
        optimizer.step()
    before = adapter_state_dict(model)
    adjustment = allocator.step()
    assert_invariants(model, allocator, before, adjustment)
    if adjustment:
        loss_of(model).backward()
    optimizer.zero_grad(set_to_none=to_none)
    return adjustment


def test_elalora_needs_torch_alone():
    """It imports the standard library and torch, and in export_peft alone safetensors."""
    source = Path(elalora.__file__).read_text()
    found = set(re.findall(r"^( *)(?:from|import) (\w+)", source, re.M))
    others = {(indent, name) for indent, name in found if name not in sys.stdlib_module_names}
    assert others == {("", "torch"), ("    ", "safetensors")}


# ---- Section 3.1: the layer ----
@float64
@given(st.integers(1, 7), st.integers(1, 7), st.data(), seeds)
@settings(max_examples=25)
def test_the_layer_computes_its_formula(d_out, d_in, data, seed):
    """For x of any shape, y = W0 x + bias + scaling P (Lambda * (Q x)), with its gradients. At
    first it is the base's bit for bit, and R(P, Q) = 0. Dropout acts on x before Q alone."""
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    shape = data.draw(st.sampled_from([(), (4,), (2, 3), (0,), (2, 1, 3)]))
    torch.manual_seed(seed)
    layer = SVDLinear(nn.Linear(d_in, d_out), rank, alpha=3.0, dropout=0.5).double()
    x = torch.randn(*shape, d_in, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer(x), layer.base_layer(x)) and orthogonality_penalty(layer) < 1e-10
    randomized(layer).eval()
    P, Lambda, Q = map(array, factors(layer))
    W, bias = array(layer.base_layer.weight), array(layer.base_layer.bias)
    delta = np.float32(3.0 / rank) * P @ np.diag(Lambda) @ Q
    np.testing.assert_allclose(array(layer(x)), array(x) @ (W + delta).T + bias, atol=1e-9)
    np.testing.assert_allclose(array(layer.delta_weight()), delta, atol=1e-9)
    np.testing.assert_allclose(array(layer.weight), W + delta, atol=1e-9)
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, *factors(layer)))
    torch.manual_seed(seed)
    y = layer.train()(x)
    torch.manual_seed(seed)
    dropped = array(nn.functional.dropout(x, 0.5))  # none of what the base gets
    np.testing.assert_allclose(array(y), array(x) @ W.T + bias + dropped @ delta.T, atol=1e-9)
    assert torch.autograd.gradcheck(lambda *_: layer.weight, factors(layer))


@given(rank_lists, rank_lists, st.integers(0, 3), seeds)
@settings(max_examples=15)
def test_the_seed_and_its_name_decide_where_a_matrix_starts(ranks, others, first, seed):
    """Other ranks and other targets change neither its first ranks nor what is drawn next; another
    seed does, and no two matrices start alike. All have the scaling alpha / mean rank."""

    def start(ranks, seed):
        layers = adapted_layers(inject(Net(seed), [*ranks], ranks, alpha=8.0, dropout=0.25))
        return {name: layer.P.T for name, layer in layers.items()}, layers, torch.rand(())

    P, layers, drawn = start(dict(zip(ADAPTED, ranks)), seed)
    fewer, same_layers, same = start(dict(zip(ADAPTED[first:], others)), seed)
    assert drawn == same and [*fewer] == ADAPTED[first:]
    for layer, rank in zip(layers.values(), ranks):
        assert (layer.rank, layer.dropout.p) == (rank, 0.25)
        assert layer.scaling.item() == pytest.approx(8.0 / np.mean(ranks))
    for name, rank in zip(ADAPTED[first:], map(min, ranks[first:], others)):
        torch.testing.assert_close(fewer[name][:rank], P[name][:rank])
        torch.testing.assert_close(same_layers[name].Q[:rank], layers[name].Q[:rank])
    other, *_ = start(dict(zip(ADAPTED, ranks)), seed + 1)
    columns = [column.tolist() for rows in (P, other) for P_T in rows.values() for column in P_T]
    assert len({*map(tuple, columns)}) == 2 * sum(ranks)


def test_default_device_and_dtype_do_not_matter():
    """Factors are float32 and live where their base does; they are drawn on the CPU."""
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        layer = SVDLinear(nn.Linear(6, 5, device="cpu"), 2)
        resize(layer, [0, 1], 2, torch.Generator("cpu"), {})
    assert orthogonality_penalty(layer).item() < 1e-10 and layer.scaling.item() == 8
    assert {w.dtype for w in factors(layer)} == {torch.float32}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_float32_and_the_output_has_the_dtype_of_the_bases(dtype, autocast, device):
    """A base of any dtype works, with autocast and without, which does not change R(P, Q)."""
    layer = randomized(SVDLinear(nn.Linear(6, 5).to(dtype), 2))
    x, R = torch.randn(3, 6, dtype=dtype), orthogonality_penalty(layer)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        y = layer(x)
        assert y.dtype == layer.base_layer(x).dtype and layer.weight.dtype == dtype
        assert torch.equal(orthogonality_penalty(layer), R)
    y.sum().backward()
    assert {w.dtype for w in factors(layer)} == {w.grad.dtype for w in factors(layer)}
    assert layer.P.dtype == torch.float32
    expected = array(x) @ array(layer.base_layer.weight + layer.delta_weight()).T
    np.testing.assert_allclose(array(y - layer.base_layer.bias), expected, rtol=0.1, atol=0.5)


# ---- Section 3.1: what reads a weight in place of calling the layer ----
PARENTS = {
    "attention": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), ["out_proj"]),
    "encoder": (lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
                ["out_proj", "linear1", "linear2"]),
}


@pytest.mark.parametrize("parent, names", PARENTS.values(), ids=PARENTS)
def test_a_weight_that_is_read_is_the_merged_one(parent, names):
    """Output and gradients are those of the merged model, in the fast path of inference, too."""
    model = randomized(inject(parent(), names, 2)).eval()
    merged = merge(copy.deepcopy(model)).requires_grad_(True)
    arguments = [torch.randn(2, 3, 6)] * (3 if "attention" in type(model).__name__.lower() else 1)
    output = lambda model: torch.hstack([*model(*arguments)[:1]])
    with torch.no_grad():  # where TransformerEncoderLayer has its fast path
        torch.testing.assert_close(output(model), output(merged), rtol=1e-4, atol=1e-5)
        with adapters_disabled(model):
            assert (output(model) - output(merged)).abs().max() > 1e-2
    output(model).square().sum().backward()
    output(merged).square().sum().backward()
    for name, layer in adapted_layers(model).items():
        dW = merged.get_submodule(name).weight.grad
        expected = torch.autograd.grad(layer.delta_weight(), factors(layer), dW)
        got = [w.grad for w in factors(layer)]
        torch.testing.assert_close(got, [*expected], rtol=1e-3, atol=1e-4)


class Quantized(nn.Linear):
    """Packed integers for a weight, and an output of x's dtype even under autocast."""

    def __init__(self, d_in, d_out):
        super().__init__(d_in, d_out)
        self.weight = nn.Parameter((10 * self.weight.T.data).char(), requires_grad=False)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return x @ (self.weight.to(x.dtype) / 10) + self.bias


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_a_quantized_base_can_be_adapted_and_read_but_not_computed_with(autocast, device):
    """base_layer(x) is called, autocast does not change its dtype; its weight has a type alone."""
    layer = randomized(SVDLinear(Quantized(6, 5), 2))
    x, base = torch.randn(3, 6), layer.base_layer
    with torch.autocast(device, autocast, enabled=bool(autocast)):
        y = layer(x)
    close = dict(rtol=0.1, atol=0.5) if autocast else {}
    torch.testing.assert_close(y, base(x) + x @ layer.delta_weight().T, **close)  # dtypes, too
    W = layer.weight
    assert (W.shape, W.dtype, W.device) == ((6, 5), torch.int8, base.weight.device)
    for compute in (lambda: x @ W, lambda: W.float(), lambda: nn.functional.linear(x, W)):
        with pytest.raises(ValueError, match="computes with the weight of an adapted layer"):
            compute()


def test_a_weight_can_be_tied_after_inject_and_merging_leaves_the_embedding_alone():
    """What tie_weights() assigns to an adapted layer becomes the weight of its base."""
    model, x = randomized(inject(tied(), ["out"], 2)), torch.randn(3, 4)
    layer, tie = model["out"], nn.Parameter(torch.randn(7, 4))
    layer.weight, layer.bias = tie, nn.Parameter(torch.ones(7))
    assert layer.base_layer.weight is tie and layer.bias is layer.base_layer.bias
    before, y = tie.clone(), x @ (tie + layer.delta_weight()).T
    torch.testing.assert_close(layer(x), y + 1)
    layer.bias = None
    assert {name for name, _ in layer.named_parameters()} == {*RANK_DIM, "base_layer.weight"}
    torch.testing.assert_close(merge(model)["out"](x), y)
    assert torch.equal(tie, before)


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "out": nn.Linear(4, 7)})
    model["out"].weight = model["embed"].weight
    return model


# ---- Section 3.1: inject ----
def test_names_match_by_whole_components_from_the_right():
    """`0.dense` matches `layers.0.dense`, and `k` matches neither `block` nor `xk`. A model for
    inference stays one."""
    assert list(adapted_layers(inject(Net(), ["0.dense"], 2))) == ["layers.0.dense"]
    assert not any(module.training for module in inject(Net().eval(), ["dense"], 2).modules())
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("k", "block", "xk")})
    assert list(adapted_layers(inject(model, ["k"], 1))) == ["k"]


def twice():
    shared = nn.Linear(4, 4)
    return inject(nn.Sequential(shared, nn.Tanh(), shared), ["0"], 2)


def test_a_layer_in_two_places_stays_one_layer():
    """A shared nn.Linear is adapted once, in both places, and loaded and merged in both, after its
    ranks moved as well."""
    model, x = twice(), torch.randn(3, 4)
    resize(model[0], [0, 1], 1, torch.Generator("cpu"), {})
    randomized(model)
    assert model[0] is model[2] and isinstance(model[0], SVDLinear)
    y, fresh = model(x), twice()
    load_adapter_state_dict(fresh, adapter_state_dict(model))
    assert_same([fresh[0].P, fresh[2].Q], [model[0].P, model[2].Q])
    merge(model)
    assert model[0] is model[2] and type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


def test_experts_that_cannot_be_adapted_are_told_of():
    """inject() warns with the share of the weights that it cannot adapt. A convolution is none."""
    model = nn.ModuleDict({"q": nn.Linear(6, 3), "conv": nn.Conv1d(1, 6, 3)})
    model.gate_up_proj = nn.Parameter(torch.ones(2, 6, 6))
    with pytest.warns(UserWarning, match="62% of the weights are stacked in 3 dim") as told:
        inject(model, ["q"], 2)  # 72 of 72 + 21 + 24
    assert [warning.filename for warning in told] == [__file__]


@pytest.fixture
def process_group():
    """One process of torch.distributed."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


@cpu_only
@pytest.mark.parametrize("before", [False, True])
def test_a_base_may_be_sharded_but_no_adapter(before, process_group):
    """FSDP 2 of what is frozen trains as a whole model does; of what is trained it is refused."""
    from torch.distributed import device_mesh, fsdp
    mesh = device_mesh.init_device_mesh("cpu", (1,))
    whole, model = adapted_net(), Net()
    if before:
        fsdp.fully_shard(model, mesh=mesh, ignored_params={*model.head.parameters()})
    inject(model, ["query", "dense"], 2, modules_to_save=["head"])
    if not before:
        fsdp.fully_shard(model, mesh=mesh, ignored_params={*trainable(model)})
    for net in (model, whole):
        optimizer = torch.optim.AdamW(trainable(net), 0.05)
        allocator = RankAllocator(net, optimizer, RankSchedule(9, 0, 1, 1, 2, "constant"), k=2)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            optimizer.step()
            assert allocator.step().expanded
    assert_same(adapter_state_dict(model), adapter_state_dict(whole))
    weight = model.layers[0].query.weight
    assert hasattr(model.layers[0].query.base_layer.weight, "to_local")
    assert (weight.shape, weight.dtype) == ((5, 6), torch.float32)
    with pytest.raises(ValueError, match="quantized, sharded, parametrized"):
        merge(model)
    model, head = adapted_net(), adapted_net()
    fsdp.fully_shard(model, mesh=mesh)
    fsdp.fully_shard(head.head, mesh=mesh)
    for call, net in [(training, head), (adapter_state_dict, head), (orthogonality_penalty, model)]:
        with pytest.raises(ValueError, match="a trained parameter is sharded; .*ignored_params="):
            call(net)


# ---- Ours: the learning rate of Lambda ----
@pytest.mark.parametrize("rate", [None, 1, 7])
def test_a_step_of_adam_moves_every_weight_by_its_rate(rate):
    """Nothing that is trained is left out: heads, P, Q by lr, Lambda by its multiple of lr."""
    model = adapted_net()
    lengths = {w: 1e-3 for w in trainable(model)}
    for layer in adapted_layers(model).values():
        lengths[layer.Lambda] = 1e-3 * (rate or max(1, len(layer.P) / 32) ** 0.5)
    groups = parameter_groups(model, 1e-3, rate)
    assert len(groups) == (1 if rate == 1 else len({*lengths.values()}))
    optimizer = torch.optim.Adam(groups, eps=1e-30)
    before = {w: w.detach().clone() for w in lengths}
    for w in lengths:
        w.grad = torch.ones_like(w)
    optimizer.step()
    for w, length in lengths.items():
        torch.testing.assert_close(before[w] - w, torch.full_like(w, length), rtol=1e-3, atol=1e-7)


# ---- Section 3.1: the penalty ----
@float64
@given(rank_lists, seeds)
@settings(max_examples=15)
def test_the_penalty_is_the_mean_of_section_3_1(ranks, seed):
    """It is |P'P - I|^2 + |QQ' - I|^2 (Frobenius), averaged over matrices of any ranks."""
    model = randomized(adapted_net(dict(zip(ADAPTED, ranks)), seed)).double()
    expected, columns = [], []
    for layer in adapted_layers(model).values():
        P, Q, I = array(layer.P), array(layer.Q), np.eye(layer.rank)
        expected += [np.linalg.norm(P.T @ P - I) ** 2 + np.linalg.norm(Q @ Q.T - I) ** 2]
        columns += [layer.P, layer.Q]
    np.testing.assert_allclose(orthogonality_penalty(model).item(), np.mean(expected), rtol=1e-9)
    assert torch.autograd.gradcheck(lambda *_: orthogonality_penalty(model), columns[:4])


# ---- Section 3.2: importance scores ----
@given(st.lists(st.sampled_from(["all", "some", "nan", "inf", "inf in the head"]), max_size=6),
       st.floats(0.05, 0.99), st.floats(0.05, 0.99), seeds)
@example(["all", "inf in the head"], 0.85, 0.85, 0)  # GradScaler skips a step for any gradient
def test_importance_follows_equations_1_to_3(kinds, beta1, beta2, seed):
    """Scores are those of float64 by hand, and steps with a non-finite gradient do not count."""
    model = randomized(adapted_net(3, seed))
    optimizer = torch.optim.SGD(trainable(model), 0.1)
    allocator = RankAllocator(model, optimizer, RankSchedule(99, 50, 10, 1, 0), 1, beta1, beta2)
    layers = adapted_layers(model)
    oracle = {w: (0.0, 0.0) for layer in layers.values() for w in factors(layer)}
    for step, kind in enumerate(kinds):
        for i, w in enumerate([*oracle, model.head.weight]):
            absent = kind == "some" and i % 3 == 2
            w.grad = None if absent else randn(*w.shape, seed=seed + 99 * step + i)
        poisoned = model.head.weight if kind == "inf in the head" else next(iter(oracle))
        if kind not in ("all", "some"):
            poisoned.grad[0, 0] = float(kind[:3])
        else:
            for w in oracle:
                if w.grad is not None:
                    I, (I_bar, U_bar) = np.abs(array(w) * array(w.grad)), oracle[w]  # eq. 1
                    I_bar = beta1 * I_bar + (1 - beta1) * I  # eq. 3
                    oracle[w] = I_bar, beta2 * U_bar + (1 - beta2) * np.abs(I - I_bar)
        allocator.step()
    assert allocator.t == len(kinds)
    for name, S in allocator.importance().items():
        s = [np.zeros(w.shape) + I_bar * U_bar  # eq. 3
             for w in factors(layers[name]) for I_bar, U_bar in [oracle[w]]]
        expected = s[1] + s[0].sum(axis=0) / len(s[0]) + s[2].sum(axis=1) / s[2].shape[1]
        np.testing.assert_allclose(array(S), expected, rtol=2e-4, atol=1e-9)
        assert S.dtype == torch.float32 and S.shape == (3,)


# ---- Section 3.3: selection ----
def brute_force(scores, max_ranks, k, b, min_rank):
    """By trying all subsets: the largest n, the n least to prune, the n greatest to grow."""
    keyed = {(S, order, i): name for order, (name, values) in enumerate(scores.items())
             for i, S in enumerate(values)}

    def lowest(name, count):
        return sorted(key for key, owner in keyed.items() if owner == name)[:count]

    spare = {name: max(0, len(values) - min_rank) for name, values in scores.items()}
    candidates = [key for name in scores for key in lowest(name, k)]
    prunable = [key for name in scores for key in lowest(name, min(k, spare[name]))]
    for n in range(min(b, len(prunable)), 0, -1):
        gone = min(sorted(subset) for subset in itertools.combinations(prunable, n))
        growths = []
        for subset in itertools.combinations([c for c in candidates if c not in gone], n):
            rank = Counter({name: len(values) for name, values in scores.items()})
            rank.subtract(keyed[key] for key in gone)
            rank.update(keyed[key] for key in subset)
            if all(rank[keyed[key]] <= max_ranks[keyed[key]] for key in subset):
                growths.append(sorted(subset, reverse=True))
        if growths:
            pruned = {keyed[x]: sorted(y[2] for y in gone if keyed[y] == keyed[x]) for x in gone}
            return pruned, dict(Counter(keyed[key] for key in max(growths)))
    return {}, {}


@given(selections())
@settings(max_examples=300)
@example(({"a": [1.0, 2.0], "b": [9.0]}, {"a": 5, "b": 5}, 1, 1, 1))  # rank 1 can grow
@example(({"a": [1.0, 2.0], "b": [9.0]}, {"a": 5, "b": 5}, 1, 1, 3))  # fewer ranks than min_rank
def test_selection_is_what_trying_everything_finds(selection):
    """select() meets its definition on ties, rank 1, full matrices, and k or b too large."""
    assert select(*selection) == brute_force(*selection)


# ---- Section 3.3: new ranks, resizing ----
@given(st.integers(1, 8), st.data(), seeds)
def test_new_directions_are_orthonormal_and_orthogonal_to_the_present(d, data, seed):
    """This holds for present columns that are dependent or of any length, up to a full basis."""
    r = data.draw(st.integers(0, d - 1))
    n = data.draw(st.integers(1, d - r))
    torch.manual_seed(seed)
    present = torch.randn(d, r) * 10.0 ** torch.randint(-4, 4, (r,))
    if r > 1 and data.draw(st.booleans()):
        present[:, 1] = 2 * present[:, 0]
    new = gram_schmidt(present, randn(d, n, seed=seed))
    assert new.dtype == present.dtype and new.shape == (d, n)
    assert_orthonormal_to(array(present), array(new))


def test_seed_step_and_name_alone_decide_new_directions():
    """An adjustment neither reads nor moves the user's random stream, nor repeats itself. Two equal
    matrices with equal gradients differ, as does one at another step with equal weights."""

    def grown(seed=3, users_seed=0, earlier_steps=0):
        model = inject(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), ["0", "1"], 2)
        model[1].load_state_dict(randomized(model)[0].state_dict())
        schedule = RankSchedule(9, earlier_steps, 1, 1, 2, "constant")
        _, allocator = training(model, optimizer="SGD", schedule=schedule, seed=seed)
        torch.manual_seed(users_seed)
        stream = torch.get_rng_state()
        for _ in range(earlier_steps + 1):
            for w in trainable(model):
                w.grad = torch.ones_like(w)
            adjustment = allocator.step()
        assert adjustment.expanded == {"0": 1, "1": 1}
        assert torch.equal(stream, torch.get_rng_state())
        return {tuple(layer.P[:, -1].tolist()) for layer in model}

    assert grown(users_seed=1) == grown()
    assert len(grown() | grown(seed=4) | grown(earlier_steps=1)) == 6


@pytest.mark.parametrize("kind, options", OPTIMIZERS.values(), ids=OPTIMIZERS)
@given(resizes(), st.integers(1, 3))
@settings(max_examples=8)
def test_retained_ranks_train_on_as_in_a_twin_that_never_moved(kind, options, case, steps):
    """The twin is torch's optimizer on all ranks that ever are. A new rank has gradients of 0
    until it is there; a pruned one has them from then on."""
    rank, keep, n_new = case
    layer = randomized(SVDLinear(nn.Linear(6, 5), rank))
    own = dict(zip(factors(layer), RANK_DIM.values()))
    twins = [nn.Parameter(torch.cat([w.data, w.data.narrow(dim, 0, 1).expand(
        [n_new if i == dim else -1 for i in range(w.ndim)])], dim)) for w, dim in own.items()]
    present = torch.arange(rank)
    later = torch.tensor([*keep, *range(rank, rank + n_new)])
    optimizer, twin_optimizer = kind([*own], **options), kind(twins, **options)
    for step in range(2 * steps):
        if step == steps:
            resize(layer, keep, n_new, torch.Generator("cpu"), optimizer.state)
            for (w, dim), twin in zip(own.items(), twins):
                fresh = w.data.narrow(dim, len(keep), n_new)
                twin.data.narrow(dim, rank, n_new).copy_(fresh)
        now = present if step < steps else later
        for i, ((w, dim), twin) in enumerate(zip(own.items(), twins)):
            w.grad = randn(*w.shape, seed=9 * step + i)
            twin.grad = torch.zeros_like(twin).index_copy(dim, now, w.grad)
        optimizer.step()
        twin_optimizer.step()
    for (w, dim), twin in zip(own.items(), twins):
        state, expected = optimizer.state[w], twin_optimizer.state[twin]
        assert state.keys() == expected.keys()
        pairs = [(w.data, twin.data)] + [(x, expected[key]) for key, x in state.items()]
        for x, y in pairs:
            y = y.index_select(dim, later) if getattr(y, "ndim", 0) else y
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


# ---- Section 3.4: the schedule ----
@given(schedules(), st.sampled_from(sorted(SHAPES)))
@example(RankSchedule(6, 0, 0, 1, 108), "cubic")  # a tie at a progress of 5/6, which floats miss
def test_the_budget_is_equation_5_exactly(schedule, shape):
    """It is b (1 - progress^3), or of another shape, rounded half to even, at warmup + m interval;
    and 0 at other steps."""
    schedule, end = dataclasses.replace(schedule, shape=shape), Decimal(-5).exp()
    span = schedule.total_steps - schedule.stabilize_steps - schedule.warmup_steps
    for step in range(-1, schedule.total_steps + 3):
        since = step - schedule.warmup_steps
        exponential = ((Decimal(-5 * since) / span).exp() - end) / (1 - end)
        shares = dict(cubic=1 - Fraction(since, span) ** 3, linear=1 - Fraction(since, span),
                      constant=1, exponential=Fraction(exponential))
        due = since in range(schedule.adjust_interval, span + 1, schedule.adjust_interval)
        whole, rest = divmod(schedule.b * shares[shape], 1)
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
        assert schedule.budget(step) == (whole + up if due else 0)


# ---- Algorithm 1 ----
class Training(RuleBasedStateMachine):
    """Steps, skipped steps and freezing in any order keep the invariants. A twin that is saved
    and resumed at random moments equals the run that is not, bit for bit."""

    @initialize(ranks=rank_lists, k=st.integers(1, 3), b=st.integers(1, 4), seed=st.integers(0, 99),
                interval=st.integers(1, 2), optimizer=st.sampled_from(sorted(OPTIMIZERS)),
                min_rank=st.integers(1, 2))
    def start(self, ranks, seed, b, interval, **options):
        self.clock, self.real_steps, self.frozen = 0, 0, set()
        schedule = RankSchedule(10**6, 1, 1, interval, b, "constant")
        self.seed, self.options = seed, options | dict(schedule=schedule, seed=seed)
        self.run, self.twin = (self.built(dict(zip(ADAPTED, ranks))) for _ in range(2))

    def built(self, ranks):
        """A model of which a norm is trained by hand, and a batch norm follows what it sees."""
        model = adapted_net(ranks, self.seed, nn.BatchNorm1d)
        model.norm.bias.requires_grad_(True)
        return model, *training(model, **self.options)

    def both_step(self, **kwargs):
        self.clock += 1
        found = [train_step(*run, self.clock, **kwargs) for run in (self.run, self.twin)]
        assert found[0] == found[1]
        assert self.run[2].t == self.twin[2].t == self.clock
        for moved in (found[0].pruned, found[0].expanded, found[0].scores) if found[0] else ():
            assert moved.keys().isdisjoint(name for name, _ in self.frozen)

    @rule(parts=st.integers(1, 2), to_none=st.booleans())
    def step(self, parts, to_none):
        self.both_step(parts=parts, to_none=to_none)
        self.real_steps += 1

    @precondition(lambda self: self.real_steps or self.clock == 0)
    @rule()
    def skipped_step(self):
        """As GradScaler has it, at the very first step, too."""
        before = copy.deepcopy(self.twin[2].importance())
        self.both_step(overflow=True)
        if not self.options["schedule"].budget(self.clock):
            assert_same(self.twin[2].importance(), before)

    @precondition(lambda self: len(self.frozen) < 3)
    @rule(name=st.sampled_from(ADAPTED[1:]), factor=st.sampled_from([*RANK_DIM]))
    def freeze(self, name, factor):
        self.set_frozen(self.frozen | {(name, factor)})

    @rule()
    def thaw(self):
        self.set_frozen(set())

    def set_frozen(self, frozen):
        for model, optimizer, _ in (self.run, self.twin):
            optimizer.zero_grad()
            for name, factor in self.frozen | frozen:
                w = getattr(model.get_submodule(name), factor)
                w.requires_grad_((name, factor) not in frozen)
        self.frozen = frozen

    @rule(rank=st.integers(1, 5), whole=st.booleans())
    def resume(self, rank, whole):
        """From a file, by what is trained or by a whole state_dict, into a model of other ranks."""
        model, optimizer, _ = self.twin
        state = dict(model.state_dict()) if whole else adapter_state_dict(model)
        file = io.BytesIO()
        torch.save((state, optimizer.state_dict()), file)
        file.seek(0)
        state, optimizer_state = torch.load(file, weights_only=True)
        self.twin = resumed, optimizer, allocator = self.built(rank)
        parameters = list(resumed.parameters())
        loss_of(resumed).backward()  # gradients of the old shape go, the Parameters stay
        resumed.load_state_dict(state) if whole else load_adapter_state_dict(resumed, state)
        assert all(w is old for w, old in zip(resumed.parameters(), parameters, strict=True))
        assert all(w.grad is None or w.grad.shape == w.shape for w in parameters)
        optimizer.load_state_dict(optimizer_state)
        remember(resumed, allocator)
        self.set_frozen(self.frozen)

    @invariant()
    def the_twins_are_equal(self):
        (model, optimizer, allocator), (twin, twin_optimizer, twin_allocator) = self.run, self.twin
        assert_same(adapter_state_dict(twin), adapter_state_dict(model))
        assert_same(twin_optimizer.state_dict()["state"], optimizer.state_dict()["state"])
        assert_same(twin_allocator.importance(), allocator.importance())


@float64
def test_training_in_any_order_keeps_the_invariants_and_resumes_bit_for_bit():
    """See Training."""
    steps = settings(max_examples=40, stateful_step_count=15)
    run_state_machine_as_test(Training, settings=steps)


@pytest.mark.parametrize("min_rank", [1, 2])
def test_an_adjustment_follows_the_scores_of_its_step(min_rank):
    """step() adjusts at the steps of its schedule alone, by select() of the scores then."""
    model = adapted_net(3)
    schedule = RankSchedule(30, 4, 6, 5, 9, "linear")  # there is not always room for b
    optimizer, allocator = training(model, k=2, schedule=schedule, min_rank=min_rank)
    for t in range(1, 31):
        loss_of(model, t).backward()
        optimizer.step()
        probe_model, probe = copy.deepcopy((model, allocator))
        probe.schedule = RankSchedule(30, 4, 6, 5, 0)
        for w, own in zip(probe_model.parameters(), model.parameters()):
            w.grad = own.grad
        assert probe.step() is None
        scores = {name: S.tolist() for name, S in probe.importance().items()}
        adjustment, b = allocator.step(), schedule.budget(t)
        expected = select(scores, dict.fromkeys(ADAPTED, 5), 2, b, min_rank)
        assert adjustment == (Adjustment(t, b, *expected, scores) if t in (9, 14, 19) else None)
        optimizer.zero_grad()


def test_averages_move_until_the_search_ends_and_steps_are_counted_on():
    """Scores stay as they are after the search, and its steps need no gradients."""
    model = adapted_net()
    optimizer, allocator = training(model, schedule=RankSchedule(9, 1, 4, 2, 0))
    for step in range(7):
        before = copy.deepcopy(allocator.importance())
        if step == 5:
            assert allocator.step() is None
        else:
            assert train_step(model, optimizer, allocator, step) is None
        same = all(torch.equal(before[name], S) for name, S in allocator.importance().items())
        assert same == (step + 1 > 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert allocator.step() is allocator.step() is None
    with pytest.warns(UserWarning, match="more often than total_steps = 9; .* not for") as told:
        allocator.step()
    assert allocator.t == 10 and [warning.filename for warning in told] == [__file__]


def test_adapters_that_the_loss_does_not_reach_are_told_of_once():
    """The penalty reaches them all, so P and Q have a gradient, but Lambda has none."""
    model = adapted_net()
    model.layers[1].query.forward = lambda x: x[:, :5]  # nobody calls what is inside
    optimizer, allocator = training(model, schedule=RankSchedule(9, 5, 1, 1, 1))
    expected = "the loss reaches 3 of 4 adapters, but not 'layers.1.query.Lambda': is it called"
    for step in range(2):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loss_of(model).backward()
            optimizer.step()
            allocator.step()
        assert [expected in str(warning.message) for warning in told] == [True] * (step == 0)
        assert all(warning.filename == __file__ for warning in told)


# ---- What a step waits for, and where tensors are ----
class Crossings(TorchDispatchMode):
    """Counts the copies from a device to the CPU."""
    to_the_host = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        inputs = [x for x in args if isinstance(x, torch.Tensor)]
        here = isinstance(out, torch.Tensor) and out.device.type == "cpu"
        self.to_the_host += here and any(x.device.type != "cpu" for x in inputs)
        return out


@cpu_only
@pytest.mark.parametrize("places", [["cuda:0", "cuda:1"] * 2, ["cuda:0", "cpu"] * 2])
def test_tensors_of_two_devices_never_meet_and_only_an_adjustment_waits(places, monkeypatch):
    """On fake devices, which refuse to mix tensors of two, and to tell a number to the host, the
    scores of an adjustment are read as one list, and nothing is read in any other step."""
    reads = []

    class Numbers(np.ndarray):
        """What was copied to the host."""

        def split(self, sizes):
            return np.split(self, np.cumsum(sizes)[:-1])

    def read(scores):
        reads.append(scores)
        return np.arange(1.0, scores.numel() + 1).view(Numbers)

    def sliced(x, slices):
        for dim, part in enumerate(slices if isinstance(slices, tuple) else (slices,)):
            start, stop, _ = part.indices(x.shape[dim])
            x = x.narrow(dim, start, stop - start)
        return x

    def moved(x, *to, **options):
        to = (to[0].device, to[0].dtype) if isinstance(to[0], torch.Tensor) else to
        return torch.Tensor.to(x, *to, **options)

    monkeypatch.setattr(elalora, "Tensor", FakeTensor)  # the plain tensors of this world
    monkeypatch.setattr(FakeTensor, "cpu", read, raising=False)
    monkeypatch.setattr(nn.Linear, "reset_parameters", lambda _: None)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: 7)  # the seed is a number of the host
    monkeypatch.setattr(FakeTensor, "to", moved, raising=False)  # these ask for a build with CUDA
    monkeypatch.setattr(FakeTensor, "__getitem__", sliced, raising=False)
    monkeypatch.setattr(FakeTensor, "contiguous", lambda x: torch.clone(x), raising=False)
    monkeypatch.setattr(torch.Tensor, "new_tensor", lambda x, n: torch.full((), n, device=x.device))
    with FakeTensorMode(allow_non_fake_inputs=False), Crossings() as crossings:
        model = nn.Sequential(*(nn.Linear(6, 5 + i % 2, device=d) for i, d in enumerate(places)))
        inject(model, ["0", "1", "2", "3"], dict(zip("0123", (1, 2, 2, 3))))
        optimizer = torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9)
        allocator = RankAllocator(model, optimizer, RankSchedule(9, 2, 2, 2, 2, "constant"), k=1)
        for t in range(1, 10):
            with torch.no_grad():  # the engine has no queue for a device that is not there
                assert orthogonality_penalty(model).device == model[0].P.device
                for layer, place in zip(model, places):
                    y = layer(torch.ones(2, 6, device=place)) @ layer.delta_weight()
                    assert y.device == layer.P.device == torch.device(place)
            for w in trainable(model):
                w.grad = torch.ones_like(w)
            optimizer.step()
            before = crossings.to_the_host
            adjustment = allocator.step()
            assert bool(adjustment and adjustment.expanded) == (t in (4, 6)) == len(reads)
            assert "cpu" in places or crossings.to_the_host == before
            reads.clear()


# ---- After training: merging ----
@float64
@given(rank_lists, st.sampled_from(["float64", "float32", "bfloat16", "float16"]), seeds)
def test_a_merged_model_computes_what_the_adapted_one_did(ranks, dtype, seed):
    """Frozen nn.Linears of the base's dtype hold W0 + scaling P diag(Lambda) Q, rounded once. An
    update of 0 changes no bit, neither the last ones of float64 nor the sign of -0.0."""
    model, dtype = randomized(adapted_net(dict(zip(ADAPTED, ranks)), seed)), getattr(torch, dtype)
    before, expected = {}, {}
    for name, layer in adapted_layers(model).items():
        layer.P.data[0] = 0.0
        W0 = layer.base_layer.to(dtype).weight.data
        W0 += torch.rand((), dtype=torch.float64) * 1e-9
        W0[0, :3] = -0.0
        before[name], expected[name] = W0.clone(), array(W0) + array(layer.delta_weight())
    assert merge(model) is model
    for name in ADAPTED:
        linear = model.get_submodule(name)
        assert type(linear) is nn.Linear and not linear.weight.requires_grad
        assert linear.weight.dtype == dtype
        bits = [W[0].view(torch.uint8) for W in (linear.weight, before[name])]
        assert torch.equal(*bits)
        half, error = torch.finfo(dtype).eps * 0.501, 1e-12 if dtype == torch.float64 else 3e-6
        np.testing.assert_allclose(array(linear.weight), expected[name], rtol=half, atol=error)
    assert [*adapted_layers(inject(model, ["query"], 1))] == ["layers.0.query", "layers.1.query"]
    assert not any(key.startswith("head") for key in adapter_state_dict(model))


def test_a_bare_layer_saves_and_merges():
    """An SVDLinear that stands in no model has a state, and merges into its nn.Linear."""
    layer, other = randomized(SVDLinear(nn.Linear(6, 5), 3)), SVDLinear(nn.Linear(6, 5), 1)
    state, x = adapter_state_dict(layer), torch.randn(3, 6)
    assert state.keys() == {"P", "Lambda", "Q", "scaling"}
    load_adapter_state_dict(other, state)
    assert torch.equal(other.delta_weight(), layer.delta_weight()) and other.rank == 3
    y = layer(x)
    assert merge(layer) is layer.base_layer
    torch.testing.assert_close(layer.base_layer(x), y, rtol=1e-4, atol=1e-4)


def test_disabled_adapters_leave_the_base():
    """Within adapters_disabled() the base answers; a loss of both models, as DPO's, trains."""
    base, model = Net(), randomized(adapted_net(modules_to_save=[]))
    x, layer = torch.randn(3, 6), model.layers[0].query
    expected, state = model(x), adapter_state_dict(model)
    with adapters_disabled(model) as same:
        with adapters_disabled(model):
            assert same is model and torch.equal(model(x), base(x))
        assert torch.equal(model(x), base(x))
        assert torch.equal(layer.weight, layer.base_layer.weight)
        assert_same(adapter_state_dict(model), state)  # what is saved or merged is the adapter
        merged = merge(copy.deepcopy(model))
    with pytest.raises(KeyError), adapters_disabled(model):
        raise KeyError
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(merged(x), expected, rtol=1e-3, atol=1e-3)
    (expected - base(x)).square().sum().backward()
    assert all(w.grad.any() for w in trainable(model))


# ---- After training: saving and loading ----
def by_hand(model, owner=""):
    """What users train beside adapters: a norm, a head that was replaced, a bare parameter."""
    model.norm.weight.requires_grad_(True)
    model.head = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    model.head.register_buffer("ema", torch.zeros(2))
    if owner is not None:
        model.get_submodule(owner).scale = nn.Parameter(torch.ones(3))
    return model


def test_what_is_trained_is_what_is_saved():
    """Factors and scalings, whatever else is trained, and moving statistics; copies of no more."""
    model = by_hand(adapted_net(norm=nn.BatchNorm1d, modules_to_save=[]))
    keys = {f"{name}.{part}" for name in ADAPTED for part in (*RANK_DIM, "scaling")}
    keys |= {key for key in model.state_dict() if key.startswith(("head", "norm", "scale"))}
    assert adapter_state_dict(model).keys() == keys and {"norm.running_var", "head.ema"} <= keys
    assert adapter_state_dict(adapted_net(modules_to_save=[])).keys() == {
        key for key in keys if key.startswith("layers")}
    state = adapter_state_dict(randomized(model))
    other = by_hand(adapted_net(5, alpha=1.0, norm=nn.BatchNorm1d, modules_to_save=[]))
    other.requires_grad_(False)  # for inference: it takes what it does not train
    load_adapter_state_dict(other, state)
    x = torch.randn(3, 6)
    y = model.eval()(x)
    assert torch.equal(other.eval()(x), y) and not trainable(other)
    assert_same(dict(other.named_parameters())["scale"].data, model.scale.data)
    for value in state.values():
        value.zero_()
    assert torch.equal(other(x), y) and torch.equal(model(x), y)


def query_of_rank(r, **others):
    """Factors that agree on a rank, and some that do not."""
    shapes = {"P": (5, r), "Lambda": (r,), "Q": (r, 6)} | others
    return {f"layers.0.query.{key}": torch.zeros(shape) for key, shape in shapes.items()}


MISFITS = {
    "too many": query_of_rank(6), "none": query_of_rank(0), "P": query_of_rank(2, P=(5, 3)),
    "Lambda": query_of_rank(2, Lambda=(3,)), "head": {"head.bias": torch.zeros(7)},
    "unknown": {"layers.9.P": torch.zeros(1)}}


@pytest.mark.parametrize("wrong", MISFITS.values(), ids=MISFITS)
def test_a_state_that_does_not_fit_changes_nothing(wrong):
    """load_adapter_state_dict() says what is wrong, and the whole model is as it was."""
    model, state = adapted_net(1), adapter_state_dict(adapted_net(3, seed=1)) | wrong
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="layers.0.query.[PQ]|head.bias|layers.9.P"):
        load_adapter_state_dict(model, state)
    assert_same(model.state_dict(), before)


def test_a_factor_alone_cannot_change_the_rank():
    """Neither load_adapter_state_dict() nor a load_state_dict() that is not strict takes it."""
    model, state = adapted_net(1), adapter_state_dict(adapted_net(3))
    del state["layers.0.query.Q"]
    before = copy.deepcopy(factors(model.layers[0].query))
    with pytest.raises(ValueError, match="missing .*layers.0.query.Q"):
        load_adapter_state_dict(model, state)
    with pytest.raises(RuntimeError, match="layers.0.query.P"):
        model.load_state_dict(state, strict=False)
    assert_same(factors(model.layers[0].query), before)


# ---- After training: export to PEFT ----
class Named(nn.Module):
    """Layers whose names are the tails of others, and an embedding tied to a head."""

    def __init__(self):
        super().__init__()
        self.block, self.fc, self.Xfc = nn.Sequential(), nn.Linear(6, 6), nn.Linear(6, 6)
        self.block.fc, self.head, self.overhead = (nn.Linear(6, 6) for _ in range(3))
        self.embed = nn.Embedding(6, 6)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = x + torch.tanh(self.block(x) + self.Xfc(torch.tanh(self.fc(x))))
        tokens = (2 * x[:, 0].abs()).long().clamp(max=5)
        return self.overhead(x) + self.head(x) + self.embed(tokens)


def named(ranks, saved=()):
    return inject(Named(), [*ranks], ranks, modules_to_save=saved)


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapper
    model.layers[0] = wrapper.checkpoint_wrapper(model.layers[0])
    return model


def gpt2_like():
    """Of GPT-2's linear layers, whose weights are (d_in, d_out), after a resize and a load."""
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D
    models = [inject(nn.Sequential(conv(5, 6), nn.Tanh(), conv(6, 5)), ["0", "2"], rank)
              for rank in (2, {"0": 1, "2": 3})]
    resize(models[1][0], [0], 4, torch.Generator("cpu"), {})
    load_adapter_state_dict(models[0], adapter_state_dict(models[1]))
    assert models[0][0].rank == 5 and models[0][0].weight.shape == (6, 5)
    return models[0]


EXPORTS = {
    "head": lambda: adapted_net(dropout=0.125),
    "trained by hand": lambda: by_hand(adapted_net(), None),
    "batch norm": lambda: adapted_net(norm=nn.BatchNorm1d, modules_to_save=[]),
    "compiled": lambda: inject(torch.compile(Net()), ["query"], 2, modules_to_save=["head"]),
    "DDP": lambda: nn.parallel.DistributedDataParallel(adapted_net()),
    "wrapped inside": lambda: checkpointed(adapted_net()),
    "Conv1D": gpt2_like,
    "tied, head": lambda: named({"Xfc": 2}, ["head"]),
    "tied, embedding": lambda: named({"block.fc": 1, "Xfc": 2}, ["embed"]),
    "tails": lambda: named({"block.fc": 1, "fc": 2}),
}


def assert_readers_agree(model, config, tensors):
    """By the formulas of PEFT and vLLM, of llama.cpp and diffusers, and of SGLang."""
    layers = {name.replace("_checkpoint_wrapped_module.", ""): layer
              for name, layer in adapted_layers(model).items()}
    alpha, r = config["lora_alpha"], config["r"]
    assert config["target_modules"] == [*layers]  # SGLang refuses a pattern, vLLM reads none
    assert not {"rank_pattern", "alpha_pattern"} & config.keys()
    assert config["lora_dropout"] == next(iter(layers.values())).dropout.p
    assert config["base_model_name_or_path"] == "a/base"
    linear = all(isinstance(layer.base_layer, nn.Linear) for layer in layers.values())
    assert config["fan_in_fan_out"] == (not linear)
    for name, layer in layers.items():
        A, B = (array(tensors[f"base_model.model.{name}.lora_{x}.weight"]) for x in "AB")
        P, Lambda, Q = map(array, factors(layer))
        expected = layer.scaling.item() * P @ np.diag(Lambda) @ Q
        assert len(A) == B.shape[1] == r  # some read the file's, some each tensor's
        assert np.linalg.norm(alpha / r * B @ A - expected) <= 2e-7 * np.linalg.norm(expected)


@cpu_only
@pytest.mark.parametrize("build", EXPORTS.values(), ids=EXPORTS)
def test_peft_computes_what_the_exported_model_computes(build, tmp_path, process_group):
    """Loaded into the base, and merged there, with all that was trained and all that moved. The
    names are those of the model within its wrappers."""
    peft = pytest.importorskip("peft")
    wrapped = build()
    model = getattr(wrapped, "_orig_mod", getattr(wrapped, "module", wrapped))
    base = copy.deepcopy(model)
    for name, layer in adapted_layers(base).items():
        base.set_submodule(name, layer.base_layer)
    for i, layer in enumerate(getattr(base, "layers", [])):
        base.layers[i] = getattr(layer, "_checkpoint_wrapped_module", layer)
    randomized(model)
    for i, layer in enumerate(adapted_layers(model).values()):
        layer.scaling += i / 4  # as a model has it that was put together
    for key, w in model.named_parameters():
        w.data += torch.randn(w.shape) * (w.requires_grad and not key.endswith(tuple(RANK_DIM)))
    for seed in range(3):
        model(randn(8, 6, seed=seed))  # batch norms follow
    before = adapter_state_dict(model)
    assert_same(adapter_state_dict(wrapped), before)
    assert training(wrapped)[1].ranks().keys() == adapted_layers(model).keys()
    export_peft(wrapped, tmp_path, "a/base")
    assert_same(adapter_state_dict(model), before)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert_readers_agree(model, config, import_module("safetensors.torch").load_file(
        tmp_path / "adapter_model.safetensors"))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    x = torch.randn(4, 6)
    expected = model.eval()(x)
    assert (expected - base.eval()(x)).abs().max() > 1e-2
    unloaded = copy.deepcopy(loaded).merge_and_unload()
    load_adapter_state_dict(wrapped, before)
    assert merge(wrapped) is wrapped
    for other in (loaded, unloaded, model):
        torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["XForCausalLM", "XLMHeadModel", "XForTokenClassification"])
def test_the_task_type_is_pefts(name, tmp_path):
    """By the name of the class."""
    pytest.importorskip("safetensors")
    net = adapted_net()
    net.__class__ = type(name, (Net,), {})
    export_peft(net, tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == ("CAUSAL_LM" if "LM" in name else None)
    assert config["modules_to_save"] == ["head"]


# ---- What is refused ----
class Stage:
    """All that a refused call could change: a model that may be plain; and an adapted one in
    training, with a gradient, whose next step is an adjustment."""

    def __init__(self, folder):
        self.folder, self.plain = folder, Net()
        self.start("AdamW", steps=1)

    def start(self, optimizer, steps=0):
        self.model = adapted_net()
        self.query = self.model.layers[0].query
        kind, options = OPTIMIZERS.get(optimizer, (optimizer, {}))
        self.optimizer = kind(trainable(self.model), **options)
        schedule = RankSchedule(100, steps, 1, 1, 2)
        self.allocator = RankAllocator(self.model, self.optimizer, schedule, k=2)
        for step in range(steps):
            self.backward()
            self.allocator.step()
            self.optimizer.zero_grad()
        self.backward()

    def backward(self):
        loss_of(self.model).backward()
        self.optimizer.step()

    def use(self, model, name=None, part=None):
        """Another model, or another part of it, in place of the plain one."""
        self.plain = model
        if name:
            model.register_module(name, part)

    def inject(self, **arguments):
        inject(self.plain, **dict(target_modules=["query", "dense"], rank=2) | arguments)

    def allocate(self, **arguments):
        good = dict(optimizer=self.optimizer, schedule=RankSchedule(9, 0, 1, 1, 1), k=1)
        RankAllocator(self.model, **good | arguments)

    def export(self):
        pytest.importorskip("safetensors")
        export_peft(self.plain, self.folder / "peft", "base")

    def step(self):
        self.allocator.step()

    def penalty_alone(self):
        self.optimizer.zero_grad()
        orthogonality_penalty(self.model).backward()

    def last(self, key, change):
        state = self.optimizer.state[self.model.layers[1].dense.P]
        state[key] = change(state[key])

    def replace(self):
        self.model.load_state_dict(self.model.state_dict(), assign=True)
        self.backward()

    def other_ranks(self):
        load_adapter_state_dict(self.model, adapter_state_dict(adapted_net(3)))
        loss_of(self.model).backward()

    def snapshot(self, late):
        """Facts that can be compared, and copies of tensors."""
        facts, tensors = [*self.folder.iterdir(), late or self.allocator.t], {}
        for model in (self.plain, self.model):
            facts += [(name, type(module)) for name, module in model.named_modules()]
            facts += [(key, w.requires_grad, w.shape) for key, w in model.named_parameters()]
            tensors |= {(len(facts), key): x for key, x in model.state_dict().items()}
            tensors |= {(-len(facts), key): w.grad for key, w in model.named_parameters()}
        for i, state in self.optimizer.state_dict()["state"].items():
            state = {key: x for key, x in state.items() if not late or "bar" not in key}
            facts += [(key, type(x)) for key, x in state.items()]
            tensors |= {(i, key): x for key, x in state.items()}
        tensors = {key: x.detach().as_subclass(torch.Tensor).clone()
                   for key, x in tensors.items() if isinstance(x, torch.Tensor)}
        return facts, {key: x for key, x in tensors.items() if not x.is_meta}


class EightBit(torch.Tensor):
    """What an 8-bit optimizer keeps: of the parameter's shape, but no plain tensor."""


def of_module(module, name, base=nn.Module):
    """A module of a class as another library has it."""
    return type(name, (base,), dict(__module__=module, __qualname__=name))()


def beside(base):
    """An adapted layer that cannot be merged beside one that can."""
    return inject(nn.ModuleDict(dict(plain=nn.Linear(6, 6), other=base)), ["plain", "other"], 2)


def flat(linear=None):
    """A linear layer as FSDP 1 and ZeRO-3 have it."""
    linear = linear or nn.Linear(6, 5)
    linear.weight.data = torch.empty(0)
    return linear


NAN, INF = float("nan"), float("inf")

# (message, call, what comes before it)
REFUSED = [
    *[(f"{key} .*got {value}", lambda s, change={key: value}: SVDLinear(
        **dict(base_layer=s.plain.head, rank=1) | change)) for key, values in dict(
            rank=(0, 3, 2.0, True), alpha=(0, NAN, INF), dropout=(1, -0.1)).items()
      for value in values],
    ("base_layer must be a torch.nn.Linear, not <class 'awq.nn.Linear'>",
     lambda s: SVDLinear(of_module("awq.nn", "Linear"), 1)),
    # inject
    (r"target_modules: 'qeury' matches no module .*end in dense, head, query$",
     lambda s: s.inject(target_modules=["query", "qeury"])),
    ("a list, got the string 'head'", lambda s: s.inject(modules_to_save="head")),
    ("'layers.1.dense' must be an integer in 1..5, got 9",
     lambda s: s.inject(rank=dict(zip(ADAPTED, (1, 1, 1, 9))))),
    ("alpha .* got 0", lambda s: s.inject(alpha=0)),
    ("no targets", lambda s: s.inject(target_modules=[])),
    ("'layers.0' must .* not .*elalora.Block", lambda s: s.inject(target_modules=["layers.0"])),
    (r"other modules: \['layers.0.dense',", lambda s: s.inject(rank={"layers.0.query": 1})),
    (r"other modules: \['x'\]", lambda s: s.inject(rank=dict.fromkeys([*ADAPTED, "x"], 1))),
    ("'layers.1.query' would be both", lambda s: s.inject(modules_to_save=["layers.1"])),
    ("'out' would be both", lambda s: s.inject(target_modules=["out"], modules_to_save=["embed"]),
     lambda s: s.use(tied())),
    ("the model has adapters already", lambda s: s.inject(),
     lambda s: s.use(Net(), "lora", of_module("peft.tuners.lora", "Linear", nn.Identity))),
    ("the model has adapters already", lambda s: inject(s.model, ["head"], 1)),
    ("'q' is in flat shards .*fully_shard", lambda s: s.inject(target_modules=["query", "q"]),
     lambda s: s.use(Net(), "q", flat())),
    ("the weight of 'q' is on the meta device", lambda s: s.inject(target_modules=["query", "q"]),
     lambda s: s.use(Net(), "q", nn.Linear(6, 5, device="meta"))),
    *[("lambda_rate .*got", lambda s, rate=rate: parameter_groups(s.model, 1e-3, rate))
      for rate in (0, -1.0, NAN, INF)],
    # what needs inject()
    *[("call inject.model, .... first", lambda s, call=call: call(s.plain))
      for call in (merge, orthogonality_penalty, adapter_state_dict, training,
                   lambda model: adapters_disabled(model).__enter__())],
    # resizing
    *[(message, lambda s, keep=keep, n=n: resize(s.query, keep, n, None, s.optimizer.state))
      for message, keep, n in [
        (r"keep must have distinct ranks of 0..1, at least one, got \[\]", [], 1),
        (r"keep .* got \[0, 0\]", [0, 0], 0), (r"keep .* got \[1, 2\]", [1, 2], 0),
        ("the rank of the resized layer must .* 1..5, got 6", [0, 1], 4)]],
    # the schedule
    *[(message, lambda s, numbers=numbers: RankSchedule(*numbers)) for message, numbers in [
        ("total_steps must hold .*total_steps=10, warmup_steps=5", (10, 5, 5, 1, 1)),
        ("total_steps must be an integer >= 1, got 10.5", (10.5, 1, 5, 1, 2)),
        ("warmup_steps must be an integer >= 0, got True", (10, True, 5, 1, 2)),
        ("warmup_steps .* got -1", (10, -1, 5, 1, 1)),
        ("stabilize_steps must be an integer >= 0, got -5", (10, 1, -5, 1, 1)),
        ("adjust_interval must be an integer >= 1, got 0", (10, 1, 5, 0, 1)),
        ("b must be an integer >= 0, got -2", (10, 1, 5, 1, -2)),
        ("shape must be one of cubic, .*, got 'cubical'", (10, 1, 5, 1, 2, "cubical"))]],
    # the allocator
    *[(f"{key} .*must be .*, got {value}", lambda s, change={key: value}: s.allocate(**change))
      for key, value in [("k", 0), ("min_rank", 0), ("beta1", 0.0), ("beta2", 1.0)]],
    ("the optimizer does not hold 'layers.0.query.P'; .* one for all adapters",
     lambda s: s.allocate(optimizer=torch.optim.SGD(s.model.head.parameters()))),
    ("initial_accumulator_value must be 0", lambda s: s.allocate(optimizer=torch.optim.Adagrad(
        trainable(s.model), initial_accumulator_value=0.1))),
    ("'layers.0.query.P' is torch.bfloat16, which is too coarse",
     lambda s: s.allocate(), lambda s: s.model.bfloat16()),
    # a step
    ("the loss reaches no adapter: no Lambda has a gradient. Call .* and before", Stage.step,
     lambda s: s.optimizer.zero_grad()),
    ("With reentrant checkpointing, pass use_reentrant=False", Stage.step, Stage.penalty_alone),
    ("the optimizer does not hold .'layers.0.query.P'.; .*assign=True", Stage.step, Stage.replace),
    ("the optimizer's 'prev' of 'layers.0.query.P', a Tensor .* cannot follow when ranks .*AdamW",
     Stage.step, lambda s: s.start(torch.optim.Rprop)),
    # weights
    (r"the weight of an adapted layer cannot become \[9, 6\]; resize the model",
     lambda s: setattr(s.query, "weight", nn.Parameter(torch.ones(9, 6)))),
    *[("the weight of 'other' is quantized, sharded, parametrized or on the meta device",
       lambda s: merge(s.plain), lambda s, base=base: s.use(beside(base())))
      for base in [lambda: Quantized(6, 5), lambda: nn.Linear(6, 5).to(torch.float8_e4m3fn),
                   lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))]],
    ("the weight of 'layers.0.query' is .* or on the meta device", lambda s: merge(s.model),
     lambda s: s.query.base_layer.to("meta")),
    ("the weight of 'layers.0.query' is quantized, sharded", lambda s: merge(s.model),
     lambda s: flat(s.query.base_layer)),
    # the export
    (r"name \['0', '2'\]: a layer stands in two", Stage.export, lambda s: s.use(twice())),
    ("name the model itself", Stage.export, lambda s: s.use(SVDLinear(nn.Linear(4, 4), 2))),
    ("name the model itself", Stage.export, lambda s: s.use(by_hand(adapted_net()))),
    (r"PEFT cannot adapt \['layers.0.query', 'layers.0.dense'\]: PEFT saves the whole",
     Stage.export, lambda s: s.use(by_hand(adapted_net(), "layers.0"))),
    (r"PEFT cannot adapt \['overhead'\]", Stage.export,
     lambda s: s.use(named({"overhead": 1}, ["head"]))),
    # found where scores are read or follow their weights: the step counts, but no rank changes
    ("late", "the averages have other ranks than the model: ranks were", Stage.step,
     Stage.other_ranks),
    *[("late", f"'exp_avg' of 'layers.1.dense.P', a {what}", Stage.step,
       lambda s, change=change: s.last("exp_avg", change)) for what, change in [
        (r"Tensor of shape \[3\]", lambda x: torch.zeros(3)),
        ("EightBit", lambda x: x.as_subclass(EightBit)),
        ("Tensor .* on meta", lambda x: x.to("meta"))]],
    *[("late", f"the highest score is {x}", Stage.step,
       lambda s, x=x: s.last("I_bar", lambda I_bar: I_bar + x)) for x in (INF, NAN)],
    ("late", "the highest score is 0, .*; call step.. after optimizer.step.. and before",
     Stage.step, lambda s: (s.start("AdamW"), s.optimizer.zero_grad(set_to_none=False))),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row[row[0] == "late"][:40])
def test_what_is_refused_has_changed_nothing(row, tmp_path):
    """A ValueError says what is wrong. Weights, gradients, states and modules are as they were."""
    late = row[0] == "late"
    message, call, *before = row[late:]
    stage = Stage(tmp_path)
    for prepare in before:
        prepare(stage)
    facts, tensors = stage.snapshot(late)
    with pytest.raises(ValueError, match=message):
        call(stage)
    facts_after, tensors_after = stage.snapshot(late)
    assert facts_after == facts
    assert_same(tensors_after, tensors)


# ---- The method ----
def test_planted_ranks_are_found():
    """On matrices of planted rank 6, 1, 1, 0 the residual ends below any even allocation's."""
    planted, d = [6, 1, 1, 0], 16
    model = nn.Sequential(*(nn.Linear(d, d, bias=False) for _ in planted))
    deltas = torch.stack([nn.init.orthogonal_(torch.empty(d, d))[:, :r] @ torch.eye(d)[:r]
                          for r in planted])
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
    assert residual < (6 - 5) / 8 + 0.01  # nearly the best of 8 ranks; the even 2 leave (6 - 2) / 8
    assert list(allocator.ranks().values()) == [5, 1, 1, 1]
