"""The laws of the recipes in two processes: both have the same bits, nearly those of one."""

import os
import re
import sys
import textwrap
from pathlib import Path

import peft
import pytest
import torch
from conftest import CalmAdamW, close, llama, run, same, trainable  # it finds elalora.py
from test_recipes import (
    IDS, SCHEDULE, X, accelerated, build, expected_of_llama, expected_of_net, make_trainer, net)
from torch import distributed, nn

import ddp
import sharded
from elalora import (
    RankAllocator, SVDLinear, adapter_state_dict, export_peft, inject, load_adapter_state_dict,
    merge, orthogonality_penalty)

LOOP = textwrap.dedent(re.search(r"    for batch in.*zero_grad\(\)\n", sharded.__doc__, re.S)[0])


def base():
    return llama(vocab_size=41, initializer_range=0.3)


def injected():
    """Adapted are layers in blocks and the head, in the root, of an odd number of rows. The
    embedding, in the root as well, is trained."""
    targets = ["q_proj", "down_proj", "lm_head"]
    return inject(base(), targets, 2, modules_to_save=["embed_tokens"])


def loop(model, weights, optimizer, allocator, steps, process):
    """The loop of the recipe's docstring, with 4 rows a step."""
    rows = IDS.repeat(2, 1).view(24, 4, 6)[steps, process::2]
    exec(LOOP, dict(
        model=model, weights=weights, optimizer=optimizer, allocator=allocator, torch=torch,
        orthogonality_penalty=orthogonality_penalty, average_gradients=sharded.average_gradients,
        loader=[dict(input_ids=x, labels=x) for x in rows]))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS[:4]).logits


def in_shards(process, folder):
    """What a process has of a sharded model: trained, resumed in the middle, merged."""
    mesh = distributed.init_device_mesh("cpu", (2,))

    def fresh():
        model = injected()
        with torch.no_grad():  # shard() makes them alike
            for w in trainable(model):
                w += process
        weights = sharded.shard(model, model.model.layers, mesh=mesh)
        optimizer = CalmAdamW(weights, lr=1e-2, weight_decay=0.0)
        return model, weights, optimizer, RankAllocator(model, optimizer, SCHEDULE, k=1)

    model, weights, optimizer, allocator = fresh()
    frozen = [w for w in model.parameters() if not w.requires_grad]
    share = sum(w.to_local().numel() for w in frozen) / sum(w.numel() for w in frozen)
    assert 0.49 < share < 0.51  # every process holds half of the base
    loop(model, weights, optimizer, allocator, slice(0, 13), process)
    torch.save((adapter_state_dict(model), optimizer.state_dict()), f"{folder}/{process}-middle.pt")
    loop(model, weights, optimizer, allocator, slice(13, 24), process)
    got = dict(state=adapter_state_dict(model), logits=logits(model))
    export_peft(model, f"{folder}/peft", base_model_name="llama")
    sharded.merge_sharded(model)
    got |= dict(merged=logits(model), left=[type(m).__name__ for m in model.modules()])
    model, weights, optimizer, allocator = fresh()
    adapter, search = torch.load(f"{folder}/{process}-middle.pt", weights_only=True)
    load_adapter_state_dict(model, adapter)
    optimizer.load_state_dict(search)
    loop(model, weights, optimizer, allocator, slice(13, 24), process)
    return got | dict(resumed=adapter_state_dict(model))


def mean_gradients(process):
    """Two gradients on both processes, of two dtypes; one on the first alone; one on neither."""
    ones = [torch.ones(2, 3), torch.ones(2, dtype=torch.bfloat16), torch.ones(4), torch.ones(5)]
    weights = [nn.Parameter(w) for w in ones]
    for w in weights[: 3 - process]:
        w.grad = torch.full_like(w, 2 + 4 * process)
    sharded.average_gradients(weights)
    return [w.grad for w in weights]


def main(folder):
    """What each of the two processes does."""
    process = int(os.environ["RANK"])
    torch.optim.AdamW = CalmAdamW
    trainer, _ = make_trainer("Trainer", folder, build(), SCHEDULE, gradient_accumulation_steps=2)
    trainer.evaluate()  # after which accelerate would leave out DDP
    trainer.train()
    trained = dict(trainer=adapter_state_dict(trainer.model))
    model = net()
    accelerated(model, folder / "accelerate")
    trained["accelerate"] = adapter_state_dict(model)
    model = net()
    own_part = X.repeat(2, 1, 1)[:, process::2]
    ddp.train(model, [(x, x.flip(-1)) for x in own_part], SCHEDULE)
    trained["ddp"] = adapter_state_dict(model)
    got = dict(trained=trained, sharded=in_shards(process, folder), means=mean_gradients(process))
    torch.save(got, folder / f"{process}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both processes left what they got."""
    folder = tmp_path_factory.mktemp("processes")
    run(folder, __file__, folder, processes=2)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    """What each of the two processes got."""
    return [torch.load(folder / f"{i}.pt") for i in range(2)]


def test_two_processes_are_one(both, calm_adam):
    """All that is trained has the same bits in both, by DDP and in shards."""
    one, other = both
    same(one["trained"], other["trained"])
    close(one["trained"]["trainer"], expected_of_llama(build(), 8))
    for kind in ("accelerate", "ddp"):
        close(one["trained"][kind], expected_of_net())
    state = one["sharded"]["state"]
    same(state, other["sharded"]["state"])
    close(state, expected_of_llama(injected(), 4))
    assert len({len(x) for key, x in state.items() if key.endswith("Lambda")}) > 1


def test_shards_resume_bit_for_bit(both):
    """From adapter and optimizer, saved after 13 of 24 steps and loaded after shard()."""
    for got in both:
        same(got["sharded"]["resumed"], got["sharded"]["state"])


def test_state_export_and_merge_compute_as_the_sharded_model(both, folder):
    """In an unsharded model, in PEFT, and merged in shards."""
    model, one = injected(), both[0]["sharded"]
    load_adapter_state_dict(model, one["state"])
    loaded = peft.PeftModel.from_pretrained(base(), folder / "peft")
    for got in (logits(model), logits(loaded), one["merged"], both[1]["sharded"]["merged"]):
        close(got, one["logits"])
    assert "SVDLinear" not in one["left"]


def test_gradients_are_averaged_where_a_process_has_one(both):
    """Each keeps its dtype; None counts as 0, but stays None if no process has a gradient."""
    for got in both:
        *means, none = got["means"]
        same(means, [torch.full((2, 3), 4.0), torch.tensor([4.0, 4.0]).bfloat16(), torch.ones(4)])
        assert none is None


@pytest.fixture
def mesh():
    """Of one process."""
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_merge_sharded_rounds_a_bfloat16_base_as_merge_does(mesh):
    model, other = (injected().bfloat16() for _ in range(2))
    for layer in (*model.modules(), *other.modules()):
        if isinstance(layer, SVDLinear):
            nn.init.constant_(layer.Lambda, 0.01)
    sharded.shard(model, model.model.layers, mesh=mesh)
    merged, expected = sharded.merge_sharded(model), merge(other)
    same(merged.lm_head.weight.full_tensor(), expected.lm_head.weight.data)


def test_merge_sharded_refuses_a_tied_weight_before_any_change(mesh):
    model = inject(llama(tie_word_embeddings=True), ["q_proj", "lm_head"], 2)
    sharded.shard(model, model.model.layers, mesh=mesh)
    with pytest.raises(ValueError, match="tied"):
        sharded.merge_sharded(model)
    assert isinstance(model.lm_head, SVDLinear)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
