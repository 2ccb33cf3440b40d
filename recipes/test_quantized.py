"""The laws of adapters on quantized layers of bitsandbytes and torchao, on a CPU.

    pip install bitsandbytes==0.50.2 torchao==0.18.0  # else they are skipped
"""

from functools import partial

import peft
import pytest
import torch
import transformers
from conftest import llama, same, trainable
from safetensors.torch import load_file
from test_recipes import build, make_trainer
from torch import nn

from elalora import (
    RankAllocator, RankSchedule, adapter_state_dict, export_peft, inject, load_adapter_state_dict,
    merge)

KINDS = ["bitsandbytes 4 bits", "bitsandbytes 8 bits"]
KINDS += ["torchao int8", "torchao int4", "torchao float8"]
IDS = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore")


def base():
    return llama(hidden_size=64, intermediate_size=128, vocab_size=64)


def quantized(model, kind):
    """The model, of which all linear layers became quantized ones."""
    library, what = kind.split(maxsplit=1)
    if library == "torchao":
        ao = pytest.importorskip("torchao.quantization")
        int4 = partial(ao.IntxWeightOnlyConfig, torch.int4, ao.PerGroup(32))  # for CPUs, too
        configs = dict(int8=ao.Int8WeightOnlyConfig, int4=int4, float8=ao.Float8WeightOnlyConfig)
        ao.quantize_(model, configs[what]())
        return model
    bnb = pytest.importorskip("bitsandbytes").nn
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        shape = linear.in_features, linear.out_features, linear.bias is not None
        layer = bnb.Linear4bit(*shape, quant_type="nf4", quant_storage=torch.bfloat16)
        if what == "8 bits":
            layer = bnb.Linear8bitLt(*shape, has_fp16_weights=False)
        layer.load_state_dict(linear.state_dict())
        model.set_submodule(name, layer.to("cpu"))  # which quantizes
    return model


def training(kind, rank=2):
    """An adapted model, AdamW in 32 bits of bitsandbytes or torch, and an allocator that moves
    ranks at steps 4, 6 and 8."""
    model = inject(quantized(base(), kind), ["q_proj", "v_proj", "down_proj"], rank)
    optim = torch.optim
    if kind.startswith("bitsandbytes"):
        optim = pytest.importorskip("bitsandbytes.optim")
    optimizer = optim.AdamW(trainable(model), lr=0.05, weight_decay=0.0)
    return model, optimizer, RankAllocator(model, optimizer, RankSchedule(12, 2, 2, 2, b=2), k=1)


def train(model, optimizer, allocator, steps):
    """The losses."""
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model):
    return model.train()(input_ids=IDS).logits  # eval() lets bitsandbytes round its weights again


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_is_trained_on_resumed_and_exported(kind, tmp_path):
    """The loss falls, ranks move; resumed from the middle, and from another rank, training ends
    alike; PEFT computes the same over an equal base. merge() refuses it."""
    model, optimizer, allocator = training(kind)
    losses = train(model, optimizer, allocator, 6)
    torch.save((adapter_state_dict(model), optimizer.state_dict()), tmp_path / "middle.pt")
    later = train(model, optimizer, allocator, 6)
    assert len({*allocator.ranks().values()}) > 1 and later[-1] < 0.95 * losses[0]
    resumed, optimizer, allocator = training(kind, rank=1)
    adapters, search = torch.load(tmp_path / "middle.pt", weights_only=True)
    load_adapter_state_dict(resumed, adapters)
    optimizer.load_state_dict(search)
    assert train(resumed, optimizer, allocator, 6) == later
    same(adapter_state_dict(resumed), adapter_state_dict(model))
    export_peft(model, tmp_path, base_model_name="quantized")
    equal = quantized(base(), kind)  # marked as transformers does, for PEFT
    equal.is_loaded_in_4bit, equal.is_loaded_in_8bit = kind == KINDS[0], kind == KINDS[1]
    loaded = peft.PeftModel.from_pretrained(equal, tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="quantized"):
        merge(model)


@pytest.mark.parametrize("library", ["torchao.optim", "bitsandbytes.optim"])
def test_an_optimizer_of_packed_state_is_refused_at_the_first_step(library):
    """Before any rank moves, also where one layer alone is big enough for packed state."""
    model = inject(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 512)), ["0", "1"], rank=8)
    optimizer = pytest.importorskip(library).AdamW8bit(trainable(model))
    allocator = RankAllocator(model, optimizer, RankSchedule(12, 6, 2, 2, b=2), k=1)
    model(torch.randn(3, 16)).square().mean().backward()
    with torch.compiler.set_stance("force_eager"):  # torchao compiles, which takes long
        optimizer.step()
    with pytest.raises(ValueError, match="use an optimizer such as AdamW"):
        allocator.step()
    assert allocator.t == 0


def test_a_trainer_takes_a_quantized_model_once_it_is_not_marked_as_one(tmp_path):
    """Marked so, it is refused; then it trains, resumes bit for bit, and saves no base."""
    pytest.importorskip("bitsandbytes")
    base().save_pretrained(tmp_path / "base")
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def trained(marked, resume=None):
        model = build(base=transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=four_bits, dtype=torch.float32,
            device_map="cpu"))
        model.is_quantized = marked
        trainer, _ = make_trainer("Trainer", tmp_path, model)
        trainer.train(resume_from_checkpoint=resume)
        return adapter_state_dict(model)

    with pytest.raises(ValueError, match="purely quantized"):
        trained(marked=True)
    whole = trained(marked=False)
    assert len({len(x) for key, x in whole.items() if key.endswith("Lambda")}) > 1
    assert load_file(tmp_path / "checkpoint-12/model.safetensors").keys() == whole.keys()
    same(trained(marked=False, resume=str(tmp_path / "checkpoint-12")), whole)
