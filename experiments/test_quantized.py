"""The laws of adapters on quantized layers of bitsandbytes and torchao, on a CPU.

    pip install bitsandbytes==0.50.2 torchao==0.18.0  # else nearly all of them are skipped
"""

import importlib
import warnings
from functools import partial

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

from elalora import RankAllocator, RankSchedule, SVDLinear, adapter_state_dict, export_peft
from elalora import inject, load_adapter_state_dict, merge
from experiments.conftest import array
from experiments.test_readme import trainable
from experiments.trainer import ElaLoRATrainer

KINDS = ["bitsandbytes uint8", "bitsandbytes bfloat16", "bitsandbytes int8"]  # 4 bits in two dtypes
KINDS += ["torchao int8", "torchao int4", "torchao float8"]
kinds = pytest.mark.parametrize("kind", KINDS)
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(0))


def quantized(model, kind):
    """The model, of which all linear layers became quantized ones."""
    library, what = kind.split()
    if library == "torchao":
        ao = pytest.importorskip("torchao.quantization")
        int4 = partial(ao.IntxWeightOnlyConfig, torch.int4, ao.PerGroup(32))  # for CPUs, too
        configs = dict(int8=ao.Int8WeightOnlyConfig, int4=int4, float8=ao.Float8WeightOnlyConfig)
        ao.quantize_(model, configs[what]())
        return model
    bnb = pytest.importorskip("bitsandbytes").nn
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        shape = linear.in_features, linear.out_features, linear.bias is not None
        if what == "int8":
            layer = bnb.Linear8bitLt(*shape, has_fp16_weights=False)
        else:
            layer = bnb.Linear4bit(*shape, quant_type="nf4", quant_storage=getattr(torch, what))
        layer.load_state_dict(linear.state_dict())
        model.set_submodule(name, layer.to("cpu"))  # which quantizes
    return model


def llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=64)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config)


def training(kind, optimizer=torch.optim.AdamW, rank=2, **settings):
    """An adapted model, its optimizer, and an allocator that moves ranks at steps 4, 6 and 8."""
    model = inject(quantized(llama(), kind), TARGETS, rank)
    optimizer = optimizer(trainable(model), lr=0.05, weight_decay=0.0, **settings)
    return model, optimizer, RankAllocator(model, optimizer, RankSchedule(12, 2, 2, 2, b=2), k=1)


def train(model, optimizer, allocator, steps):
    """The losses, and the steps at which ranks moved."""
    losses, moves = [], []
    for step in steps:
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        if (adjustment := allocator.step()) and adjustment.pruned:
            moves.append(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, moves


def raw(value):
    """The bytes of a tensor, or of all tensors that make up a packed one or stand in a dict."""
    if hasattr(value, "__tensor_flatten__"):
        value = {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}
    if isinstance(value, dict):
        return {key: raw(part) for key, part in value.items()}
    if isinstance(value, torch.Tensor):
        return bytes(value.detach().flatten().contiguous().view(torch.uint8).numpy())
    return value


def base_of(model):
    trained = adapter_state_dict(model)
    return raw({key: w for key, w in model.state_dict().items() if key not in trained})


def assert_same_logits(*models):
    """In training mode: eval() lets bitsandbytes round its weights again on some CPUs."""
    with torch.no_grad():
        got, expected = (model.train()(input_ids=IDS).logits for model in models)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# ---- The base ----
@kinds
def test_an_adapted_layer_adds_its_update_to_what_the_quantized_layer_computes(kind):
    """As float64 NumPy does; so does the gradient of its input."""
    (base,) = quantized(nn.Sequential(nn.Linear(64, 32)), kind)
    x = torch.randn(3, 64, requires_grad=True)
    alone = base(x)
    (gradient,) = torch.autograd.grad(alone.sum(), x)
    layer = SVDLinear(base, rank=4)
    P, Lambda, Q = (array(w) for w in (layer.P, nn.init.normal_(layer.Lambda), layer.Q))
    update = 16 / 4 * P @ np.diag(Lambda) @ Q
    y = layer(x)
    (adapted,) = torch.autograd.grad(y.sum(), x)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(array(layer.delta_weight()), update)
    close(array(y), array(alone) + array(x) @ update.T)
    close(array(adapted), array(gradient) + update.sum(axis=0))


@kinds
def test_ranks_move_on_a_quantized_base_and_training_resumes_bit_for_bit(kind, tmp_path):
    """The loss falls, the base keeps its bytes, and states saved in the middle end alike."""
    model, optimizer, allocator = training(kind)
    before = base_of(model)
    losses, moves = train(model, optimizer, allocator, range(1, 7))
    states = adapter_state_dict(model), optimizer.state_dict(), allocator.state_dict()
    torch.save(states, tmp_path / "states.pt")
    later, later_moves = train(model, optimizer, allocator, range(7, 13))
    assert moves + later_moves == [4, 6, 8] and len({*allocator.ranks().values()}) > 1
    assert later[-1] < 0.95 * losses[0]
    assert base_of(model) == before
    other, optimizer, allocator = training(kind, rank=1)
    adapters, of_optimizer, of_allocator = torch.load(tmp_path / "states.pt", weights_only=True)
    load_adapter_state_dict(other, adapters)
    optimizer.load_state_dict(of_optimizer)
    allocator.load_state_dict(of_allocator)
    assert train(other, optimizer, allocator, range(7, 13)) == (later, later_moves)
    assert raw(other.state_dict()) == raw(model.state_dict())


@pytest.mark.parametrize("kind", [*KINDS, "bitsandbytes plain bfloat16", "plain float8"])
def test_merging_refuses_a_quantized_weight_before_any_change(kind):
    """An ordinary layer before it is not merged either."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    if kind == "plain float8":
        model[1].weight = nn.Parameter(model[1].weight.to(torch.float8_e4m3fn), False)
    else:
        model[1] = quantized(model[1:], kind.replace("plain ", ""))[0]
    if "plain" in kind:  # bitsandbytes expects that wrappers, such as FSDP, make its weights so
        model[1].weight = nn.Parameter(model[1].weight.data, False)
    bases = [*model]
    for layer in inject(model, ["0", "1"], 2):
        nn.init.normal_(layer.Lambda)
    before = raw(model.state_dict())
    with warnings.catch_warnings(action="error"), pytest.raises(ValueError, match="'1'.*quantized"):
        merge(model)
    assert raw(model.state_dict()) == before and [layer.base_layer for layer in model] == bases


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")
@kinds
def test_peft_computes_the_same_over_an_equal_quantized_base(kind, tmp_path):
    """What export_peft wrote after ranks moved gives the same logits."""
    model, *rest = training(kind)
    train(model, *rest, range(1, 13))
    export_peft(model, tmp_path, base_model_name="quantized")
    base = quantized(llama(), kind)  # marked as transformers does, for PEFT
    base.is_loaded_in_4bit = kind in KINDS[:2]
    base.is_loaded_in_8bit = kind == KINDS[2]
    assert_same_logits(peft.PeftModel.from_pretrained(base, tmp_path), model)


# ---- Optimizers ----
def optimizer_class(path):
    module, _, name = path.rpartition(".")
    pytest.importorskip(module.partition(".")[0])
    return getattr(importlib.import_module(module), name)


PACKED = [f"torchao.optim.{name}" for name in ("AdamW8bit", "AdamW4bit", "AdamWFp8")]
PACKED += [f"bitsandbytes.optim.{name}" for name in ("AdamW8bit", "PagedAdamW8bit", "Lion8bit")]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("sizes", [[512], [16, 16, 512]])
@pytest.mark.parametrize("path", PACKED)
def test_an_optimizer_of_packed_state_is_refused_at_the_first_step(path, sizes):
    """Long before an adjustment, also where one layer alone is big enough for packed state."""
    model = nn.Sequential(*(nn.Linear(16, size) for size in sizes))
    inject(model, [str(i) for i in range(len(sizes))], rank=8)
    optimizer = optimizer_class(path)(trainable(model))
    allocator = RankAllocator(model, optimizer, RankSchedule(12, 6, 2, 2, b=2), k=1)
    model(torch.randn(3, 16)).square().mean().backward()
    with torch.compiler.set_stance("force_eager"):  # torchao compiles, which takes long
        optimizer.step()
    everything = lambda: [raw(x) for x in (model.state_dict(), allocator.averages, optimizer.state)]
    before = everything()
    with pytest.raises(ValueError, match="use an optimizer whose state is plain tensors like"):
        allocator.step()
    assert everything() == before and allocator.t == 0


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    "name, settings", [("AdamW", {}), ("PagedAdamW", {}), ("SGD", dict(momentum=0.9))]
)
def test_bitsandbytes_optimizers_of_32_bits_train_as_those_of_torch(name, settings):
    """Ranks move at the same steps, to the same matrices, and the losses are nearly the same."""
    results = []
    for path in (f"bitsandbytes.optim.{name}", f"torch.optim.{name.removeprefix('Paged')}"):
        *parts, allocator = training("bitsandbytes uint8", optimizer_class(path), **settings)
        results.append((*train(*parts, allocator, range(1, 13)), allocator.ranks()))
    (losses, *moved), (expected, *expected_moves) = results
    assert moved == expected_moves and moved[0] == [4, 6, 8]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


# ---- The Hugging Face Trainer ----
def test_the_trainer_takes_a_quantized_model_once_it_is_not_marked_as_one(tmp_path, monkeypatch):
    """Marked so, it is refused; then ElaLoRATrainer trains it, saves, resumes; PEFT takes it."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("base")
    def load():
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        return transformers.AutoModelForCausalLM.from_pretrained(
            "base", quantization_config=config, dtype=torch.float32, device_map="cpu"
        )

    def run(marked, resume=None):
        torch.manual_seed(0)
        model = inject(load(), TARGETS, 2)
        before, model.is_quantized = base_of(model), marked
        arguments = transformers.TrainingArguments(
            "out", max_steps=24, per_device_train_batch_size=4, learning_rate=0.02, save_steps=12,
            logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        rows = [dict(input_ids=ids, labels=ids) for ids in IDS.repeat(24, 1)]
        trainer = ElaLoRATrainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        assert base_of(model) == before
        return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]

    with pytest.raises(ValueError, match="purely quantized"):
        run(marked=True)
    model, losses = run(marked=False)
    assert losses[-1] < 0.95 * losses[0]
    assert len({layer.rank for layer in model.modules() if isinstance(layer, SVDLinear)}) > 1
    export_peft(model, "adapter", "base")
    assert_same_logits(peft.PeftModel.from_pretrained(load(), "adapter"), model)
    resumed, losses_too = run(marked=False, resume="out/checkpoint-12")
    assert losses_too == losses and raw(resumed.state_dict()) == raw(model.state_dict())
