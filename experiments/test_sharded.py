"""The laws of sharded.py, ElaLoRA under FSDP2, with two processes over gloo and a tiny Llama."""

import json
import re
import textwrap

import pytest
import torch
from torch import nn

from elalora import (
    RankAllocator, RankSchedule, SVDLinear, adapter_state_dict, inject, load_adapter_state_dict,
    merge,
)  # fmt: skip
from experiments import sharded
from experiments.conftest import torchrun

LOOP = textwrap.dedent(re.search(r"    for batch in.*zero_grad\(\)\n", sharded.__doc__, re.S)[0])
CASES = ["adapters", "adapters and a head"]
SCRIPT = f"""
import sys

import torch
import transformers
from torch import distributed
from elalora import (
    RankAllocator, RankSchedule, adapter_state_dict, export_peft, inject, load_adapter_state_dict,
    orthogonality_penalty,
)
from experiments.sharded import average_gradients, merge_sharded, shard

IDS = torch.randint(41, (24, 4, 6), generator=torch.Generator().manual_seed(0))
CONFIG = transformers.LlamaConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=41, initializer_range=0.3)

def base():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(CONFIG)

def injected(case, seed=0):
    # Without a saved head the head is adapted: a layer of the root, of a number of rows that is odd
    model = base()
    torch.manual_seed(seed)
    if case == "adapters":
        return inject(model, ["q_proj", "down_proj", "lm_head"], 2)
    return inject(model, ["q_proj", "down_proj"], 2, modules_to_save=["lm_head"])

def training(model, weights):
    # With Adam's usual eps, a gradient that is 0 but for rounding moves a weight like any other
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0, eps=1e-3)
    return optimizer, RankAllocator(model, optimizer, RankSchedule(24, 4, 4, 2, 2), k=1)

def train(model, weights, optimizer, allocator, steps, process=0, processes=1):
    names = dict(
        globals(), model=model, weights=weights, optimizer=optimizer, allocator=allocator,
        loader=[dict(input_ids=x, labels=x) for x in IDS[steps, process::processes]])
    if processes == 1:
        names["average_gradients"] = lambda weights: None
    exec({LOOP!r}, names)

@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS[0]).logits

def run(case, process, folder):
    mesh = distributed.init_device_mesh("cpu", (2,))
    def fresh(checkpointing=False):
        model = injected(case, seed=process)  # shard() makes adapters and head alike
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.model.layers[0].gradient_checkpointing
        weights = shard(model, model.model.layers, mesh=mesh)
        return model, weights, *training(model, weights)
    def states():
        return adapter_state_dict(model), optimizer.state_dict(), allocator.state_dict()
    model, weights, optimizer, allocator = fresh()
    frozen = [w for w in model.parameters() if not w.requires_grad]
    got = dict(whole=sum(w.numel() for w in frozen),
               local=sum(w.to_local().numel() for w in frozen),
               bytes=sum(w.to_local().untyped_storage().nbytes() for w in frozen))
    train(model, weights, optimizer, allocator, slice(0, 13), process, 2)
    torch.save(states(), f"{{folder}}/middle-{{process}}.pt")
    train(model, weights, optimizer, allocator, slice(13, 24), process, 2)
    got |= dict(state=states(), logits=logits(model), ranks=allocator.ranks())
    export_peft(model, f"{{folder}}/{{case}}", base_model_name="llama")
    assert merge_sharded(model) is model
    got |= dict(merged=logits(model), left=[type(m).__name__ for m in model.modules()])
    model, weights, optimizer, allocator = fresh()
    before = torch.load(f"{{folder}}/middle-{{process}}.pt", weights_only=True)
    load_adapter_state_dict(model, before[0])
    optimizer.load_state_dict(before[1])
    allocator.load_state_dict(before[2])
    train(model, weights, optimizer, allocator, slice(13, 24), process, 2)
    got["resumed"] = states()
    model, weights, optimizer, allocator = fresh(checkpointing=True)
    train(model, weights, optimizer, allocator, slice(0, 24), process, 2)
    return got | dict(checkpointed=states())

def averages(process):
    # Two gradients on both processes, of two dtypes; one on the first alone; one on neither
    ones = [torch.ones(2, 3), torch.ones(2, dtype=torch.bfloat16), torch.ones(4), torch.ones(5)]
    weights = [torch.nn.Parameter(w) for w in ones]
    for w in weights[: 3 - process]:
        w.grad = torch.full_like(w, 2 + 4 * process)
    calls, all_reduce = [], distributed.all_reduce
    distributed.all_reduce = lambda *args: calls.append(all_reduce(*args))
    average_gradients(w for w in weights)
    distributed.all_reduce = all_reduce
    return [w.grad for w in weights], len(calls)

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    process, folder = distributed.get_rank(), sys.argv[1]
    got = {{case: run(case, process, folder) for case in {CASES}}}
    torch.save(got | dict(averages=averages(process)), f"{{folder}}/{{process}}.pt")
    distributed.destroy_process_group()
"""
alone = {"__name__": "alone"}  # the script's functions, in this process
exec(SCRIPT, alone)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both processes left what they got."""
    folder = tmp_path_factory.mktemp("sharded")
    (script := folder / "script.py").write_text(SCRIPT)
    result = torchrun(script, folder, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture
def both(folder, case):
    """What each of the two processes got."""
    return [torch.load(folder / f"{i}.pt")[case] for i in range(2)]


def unsharded(case, got):
    """A model in one process, with adapters of a sharded one."""
    load_adapter_state_dict(model := alone["injected"](case, seed=7), got["state"][0])
    return model


def equal(x, y):
    """Whether two trees of tensors have the same bits."""
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x)
    return all(map(equal, x, y)) and len(x) == len(y) if isinstance(x, (list, tuple)) else x == y


def close(x, y):
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


# ---- Training ----
def test_every_process_has_the_same_adapters_ranks_and_optimizer(both):
    """After 24 steps all states of both processes have the same bits, and ranks have moved."""
    assert equal(both[0]["state"], both[1]["state"]) and equal(both[0]["ranks"], both[1]["ranks"])
    assert len(set(both[0]["ranks"].values())) > 1


def test_two_processes_equal_one_with_the_whole_batch(both, case):
    """Adapters, head and ranks are nearly those of a model that was never sharded."""
    model = alone["injected"](case)
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer, allocator = alone["training"](model, weights)
    alone["train"](model, weights, optimizer, allocator, slice(0, 24))
    assert allocator.ranks() == both[0]["ranks"]
    close(both[0]["state"][0], adapter_state_dict(model))


def test_every_process_holds_half_of_the_base(both):
    """The parts add up to the frozen weights, and neither takes over 1% more memory than half."""
    whole = both[0]["whole"]
    assert sum(got["local"] for got in both) == whole
    assert all(got["bytes"] < 4 * 0.505 * whole for got in both)


def test_a_sharded_run_that_was_stopped_ends_with_the_same_bits(both):
    """From the three states, saved after 13 of 24 steps and loaded after shard()."""
    assert all(equal(got["resumed"], got["state"]) for got in both)


def test_gradient_checkpointing_changes_nothing(both):
    """It runs the forward pass of a block again, with its weights gathered again."""
    for got in both:
        assert equal(got["checkpointed"][2]["step"], 24)
        close(got["checkpointed"][0], got["state"][0])


def test_gradients_are_averaged_by_one_all_reduce(folder):
    """Each keeps its dtype; None counts as 0, but stays None if no process has a gradient."""
    for process in range(2):
        (first, second, third, fourth), calls = torch.load(folder / f"{process}.pt")["averages"]
        assert calls == 1 and fourth is None
        assert equal(first, torch.full((2, 3), 4.0)) and equal(third, torch.full((4,), 1.0))
        assert second.dtype == torch.bfloat16 and second.tolist() == [4.0, 4.0]


# ---- Saving, exporting, merging ----
def test_the_state_of_a_sharded_model_loads_into_an_unsharded_one(both, case):
    """adapter_state_dict() of either process gives the logits that the sharded model gave."""
    for got in both:
        close(alone["logits"](unsharded(case, got)), got["logits"])


def test_peft_loads_what_all_processes_exported_at_once(folder, both, case):
    """Both wrote into the same folder; PEFT's logits are those of the sharded model."""
    from peft import PeftModel

    assert sorted(path.name for path in (folder / case).iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    close(alone["logits"](PeftModel.from_pretrained(alone["base"](), folder / case)),
          both[0]["logits"])  # fmt: skip
    mapping = json.loads((folder / case / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping["base_model_class"] == "LlamaForCausalLM"  # not FSDP's own class
    assert mapping["parent_library"].startswith("transformers.")


def test_merge_sharded_is_merge(both, case):
    """The sharded model computes as the merged unsharded one, and no adapter is left in it."""
    expected = alone["logits"](merge(unsharded(case, both[0])))
    for got in both:
        close(got["merged"], expected)
        assert "SVDLinear" not in got["left"]


@pytest.fixture
def mesh():
    """Of one process."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_merge_sharded_rounds_a_bfloat16_base_as_merge_does(mesh):
    """To the same bits, since the sum is taken in float32."""
    model, other = (alone["injected"](CASES[0]).bfloat16() for _ in range(2))
    for layer in (*model.modules(), *other.modules()):
        if isinstance(layer, SVDLinear):
            nn.init.constant_(layer.Lambda, 0.01)
    sharded.shard(model, model.model.layers, mesh=mesh)
    got, expected = sharded.merge_sharded(model).state_dict(), merge(other).state_dict()
    assert equal({key: w.full_tensor() for key, w in got.items()}, expected)


# ---- What is refused ----
def test_sharded_adapters_are_refused(mesh):
    """A model that was sharded with its adapters: the ValueError says how to leave them whole."""
    torch.distributed.fsdp.fully_shard(model := alone["injected"](CASES[0]), mesh=mesh)
    optimizer = torch.optim.AdamW(w for w in model.parameters() if w.requires_grad)
    for refuse in (
        lambda: RankAllocator(model, optimizer, RankSchedule(4, 1, 1, 1, 1), k=1),
        lambda: adapter_state_dict(model),
    ):
        with pytest.raises(ValueError, match="ignored_params="):
            refuse()


def test_a_sharded_head_is_refused(mesh):
    """Adapters that are whole do not help, if a module to save is sharded."""
    model = alone["injected"](CASES[1])
    trained = {w for w in model.parameters() if w.requires_grad}
    ignored = trained - {model.lm_head.weight}
    torch.distributed.fsdp.fully_shard(model, mesh=mesh, ignored_params=ignored)
    optimizer = torch.optim.AdamW(w for w in model.parameters() if w.requires_grad)
    with pytest.raises(ValueError, match="ignored_params="):
        RankAllocator(model, optimizer, RankSchedule(4, 1, 1, 1, 1), k=1)


def test_merge_refuses_a_sharded_base(mesh):
    """A ValueError, and the model computes as before."""
    model = alone["injected"](CASES[0])
    sharded.shard(model, model.model.layers, mesh=mesh)
    with torch.no_grad():
        model.lm_head.Lambda.fill_(1.0)
    before = alone["logits"](model)
    with pytest.raises(ValueError, match="sharded"):
        merge(model)
    assert equal(alone["logits"](model), before)


def test_merge_sharded_refuses_tied_weights(mesh):
    """Else the update of the head would change the embedding, too."""
    model = alone["base"]()
    model.lm_head.weight = model.model.embed_tokens.weight
    inject(model, ["q_proj", "lm_head"], 2)
    sharded.shard(model, model.model.layers, mesh=mesh)
    nn.init.ones_(model.model.layers[0].self_attn.q_proj.Lambda)
    before = alone["logits"](model)
    with pytest.raises(ValueError, match="untie"):
        sharded.merge_sharded(model)
    assert equal(alone["logits"](model), before)
