"""The laws of the recipes in two processes: both have the same bits, nearly those of one."""

import functools
import os
import re
import sys
import textwrap
from pathlib import Path

import accelerate
import peft
import pytest
import torch
from conftest import llama, run, trainable  # before the recipes: it finds elalora.py
from test_recipes import (
    BEST, IDS, SCHEDULE, accelerated, batches, build, close, equal, make, net, own_loop)
from torch import distributed, nn

import ddp
import sharded
from elalora import (
    RankAllocator, SVDLinear, adapter_state_dict, export_peft, inject, load_adapter_state_dict,
    merge, orthogonality_penalty)

LOOP = textwrap.dedent(re.search(r"    for batch in.*zero_grad\(\)\n", sharded.__doc__, re.S)[0])
CASES = ["adapters", "adapters and a head"]


def injected(case):
    """Without a saved head the head is adapted: a layer of the root, of an odd number of rows."""
    names, head = ["q_proj", "down_proj"], ["lm_head"]
    base = llama(vocab_size=41, initializer_range=0.3)
    if case == "adapters":
        return inject(base, names + head, 2)
    return inject(base, names, 2, modules_to_save=head)


def training(model, weights):
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0, eps=1e-3)
    return optimizer, RankAllocator(model, optimizer, SCHEDULE, k=1)


def loop(model, weights, optimizer, allocator, steps, process=0, processes=1):
    """The loop of the recipe's docstring, with 4 rows a step."""
    rows = IDS.repeat(2, 1).view(24, 4, 6)[steps, process::processes]
    names = dict(
        model=model, weights=weights, optimizer=optimizer, allocator=allocator, torch=torch,
        orthogonality_penalty=orthogonality_penalty, average_gradients=sharded.average_gradients,
        loader=[dict(input_ids=x, labels=x) for x in rows])
    if processes == 1:
        names["average_gradients"] = lambda weights: None
    exec(LOOP, names)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS[:4]).logits


def in_shards(case, process, folder):
    """What a process has of a sharded model: trained, resumed in the middle, merged."""
    mesh = distributed.init_device_mesh("cpu", (2,))

    def fresh():
        model = injected(case)
        with torch.no_grad():  # shard() makes them alike
            for w in trainable(model):
                w += process
        weights = sharded.shard(model, model.model.layers, mesh=mesh)
        return model, weights, *training(model, weights)

    model, weights, optimizer, allocator = fresh()
    frozen = [w for w in model.parameters() if not w.requires_grad]
    got = dict(whole=sum(w.numel() for w in frozen),
               bytes=sum(w.to_local().untyped_storage().nbytes() for w in frozen))
    loop(model, weights, optimizer, allocator, slice(0, 13), process, 2)
    torch.save((adapter_state_dict(model), optimizer.state_dict()), f"{folder}/{process}-middle.pt")
    loop(model, weights, optimizer, allocator, slice(13, 24), process, 2)
    got |= dict(state=adapter_state_dict(model), logits=logits(model))
    export_peft(model, f"{folder}/{case}", base_model_name="llama")
    sharded.merge_sharded(model)
    got |= dict(merged=logits(model), left=[type(m).__name__ for m in model.modules()])
    model, weights, optimizer, allocator = fresh()
    adapter, search = torch.load(f"{folder}/{process}-middle.pt", weights_only=True)
    load_adapter_state_dict(model, adapter)
    optimizer.load_state_dict(search)
    loop(model, weights, optimizer, allocator, slice(13, 24), process, 2)
    return got | dict(resumed=adapter_state_dict(model))


def mean_gradients(process):
    """Two gradients on both processes, of two dtypes; one on the first alone; one on neither."""
    ones = [torch.ones(2, 3), torch.ones(2, dtype=torch.bfloat16), torch.ones(4), torch.ones(5)]
    weights = [nn.Parameter(w) for w in ones]
    for w in weights[: 3 - process]:
        w.grad = torch.full_like(w, 2 + 4 * process)
    sharded.average_gradients(weights)
    return [w.grad for w in weights]


def trained_by_trainer(folder, resume=None, evaluate_first=False, **settings):
    trainer, _ = make("Trainer", folder, build(), gradient_accumulation_steps=2, **settings)
    if evaluate_first:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return adapter_state_dict(trainer.model)


def main(folder):
    """What each of the two processes does."""
    process = int(os.environ["RANK"])
    torch.optim.AdamW = functools.partial(torch.optim.AdamW, eps=1e-3)  # as in calm_adam
    got = dict(trainer=trained_by_trainer(folder / "whole", evaluate_first=True))
    got["trainer, resumed"] = trained_by_trainer(folder / "whole", folder / "whole/checkpoint-12")
    got["best"] = trained_by_trainer(folder / "best", **BEST)
    model = net()
    accelerated(model, folder / "accelerate")
    assert accelerate.PartialState().num_processes == 2
    got["accelerate"] = adapter_state_dict(model)
    model = net()
    ddp.train(model, [(x[process::2], y[process::2]) for x, y in batches()], SCHEDULE)
    got["ddp"] = adapter_state_dict(model)
    got |= {case: in_shards(case, process, folder) for case in CASES}
    torch.save(got | dict(means=mean_gradients(process)), folder / f"{process}.pt")
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


def test_all_that_is_trained_has_the_same_bits_in_both(both):
    assert equal(both[0].keys(), both[1].keys())
    for key, got in both[0].items():
        got, other = (x.get("state", x) if isinstance(x, dict) else x for x in (got, both[1][key]))
        assert key == "means" or equal(got, other), key


def test_two_processes_of_the_trainer_are_one_and_resume(both, tmp_path):
    """Also after an evaluation, after which accelerate would leave DDP out."""
    trainer, _ = make("Trainer", tmp_path, build())
    trainer.train()
    close(both[0]["trainer"], adapter_state_dict(trainer.model))
    assert equal(both[0]["trainer"], both[0]["trainer, resumed"])
    trainer, _ = make("Trainer", tmp_path, build(), **BEST)
    trainer.train()
    shapes = lambda state: {key: x.shape for key, x in state.items()}
    assert shapes(both[0]["best"]) == shapes(adapter_state_dict(trainer.model))


@pytest.mark.parametrize("kind", ["ddp", "accelerate"])
def test_two_processes_of_a_loop_are_one(kind, both, calm_adam):
    close(both[0][kind], own_loop(net(), batches()))


@pytest.mark.parametrize("case", CASES)
class TestSharded:
    def test_two_processes_equal_one_and_resume_bit_for_bit(self, case, both):
        """From adapter and optimizer, saved after 13 of 24 steps and loaded after shard()."""
        model = injected(case)
        loop(model, trainable(model), *training(model, trainable(model)), slice(0, 24))
        assert len({layer.rank for layer in model.modules() if isinstance(layer, SVDLinear)}) > 1
        for got in both:
            close(got[case]["state"], adapter_state_dict(model))
            assert equal(got[case]["resumed"], got[case]["state"])

    def test_every_process_holds_half_of_the_base(self, case, both):
        assert all(g[case]["bytes"] < 4 * 0.505 * g[case]["whole"] for g in both)

    def test_state_export_and_merge_compute_as_the_sharded_model(self, case, both, folder):
        """In an unsharded model, in PEFT, and merged in shards."""
        model = injected(case)
        load_adapter_state_dict(model, both[0][case]["state"])
        base = llama(vocab_size=41, initializer_range=0.3)
        loaded = peft.PeftModel.from_pretrained(base, folder / case)
        expected = both[0][case]["logits"]
        for got in (logits(model), logits(loaded), logits(merge(model)), both[1][case]["merged"]):
            close(got, expected)
        assert "SVDLinear" not in both[0][case]["left"]


def test_gradients_are_averaged_where_a_process_has_one(both):
    """Each keeps its dtype; None counts as 0, but stays None if no process has a gradient."""
    for got in both:
        first, second, third, fourth = got["means"]
        assert equal(first, torch.full((2, 3), 4.0)) and equal(third, torch.full((4,), 1.0))
        assert second.dtype == torch.bfloat16 and second.tolist() == [4.0, 4.0] and fourth is None


@pytest.fixture
def mesh():
    """Of one process."""
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_merge_sharded_rounds_a_bfloat16_base_as_merge_does(mesh):
    model, other = (injected("adapters").bfloat16() for _ in range(2))
    for layer in (*model.modules(), *other.modules()):
        if isinstance(layer, SVDLinear):
            nn.init.constant_(layer.Lambda, 0.01)
    sharded.shard(model, model.model.layers, mesh=mesh)
    got, expected = sharded.merge_sharded(model).state_dict(), merge(other).state_dict()
    assert equal({key: w.full_tensor() for key, w in got.items()}, expected)


def test_merge_sharded_refuses_a_tied_weight_before_any_change(mesh):
    model = inject(llama(tie_word_embeddings=True), ["q_proj", "lm_head"], 2)
    sharded.shard(model, model.model.layers, mesh=mesh)
    with pytest.raises(ValueError, match="tied"):
        sharded.merge_sharded(model)
    assert isinstance(model.lm_head, SVDLinear)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
