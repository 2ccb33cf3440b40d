"""The laws of trainer.py: in one process and in two it is Algorithm 1's loop."""

import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from elalora import RankAllocator, adapter_state_dict, inject, orthogonality_penalty
from experiments.conftest import torchrun
from experiments.trainer import ElaLoRATrainer

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
IDS = torch.randint(3, 40, (48, 6), generator=torch.Generator().manual_seed(0))
LABELS = {"classifier": IDS[:, 0] % 2, "language model": IDS.clone()}
LABELS["language model"][::3, 2:] = -100  # batches of unlike numbers of tokens
LABELS["module"] = LABELS["classifier"]


class Module(nn.Module):
    """A classifier that is not asked to divide its loss: the Trainer does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels):
        return dict(self.model(input_ids=input_ids, labels=labels))


def build(kind):
    """A tiny model after inject(), with a penalty that is felt."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, intermediate_size=24, num_key_value_heads=1, pad_token_id=0)
    if kind == "language model":
        model, heads = transformers.LlamaForCausalLM(config), []
    else:
        model, heads = transformers.LlamaForSequenceClassification(config), ["score"]
    model = inject(Module(model) if kind == "module" else model, ["q_proj", "down_proj"], 2,
                   modules_to_save=heads)  # fmt: skip
    for name, w in model.named_parameters():
        w.data *= 1.5 if name.endswith(".P") else 1
    return model


def train(kind, folder, resume=None, accumulate=4, total=24, evaluate_first=False, **kwargs):
    """24 steps of 8 rows, whatever the number of processes."""
    arguments = transformers.TrainingArguments(**dict(
        output_dir=str(folder), max_steps=total, per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate, max_grad_norm=1.0, learning_rate=0.05,
        lr_scheduler_type="constant", save_steps=12, optim="sgd", report_to=[], disable_tqdm=True,
        use_cpu=True, seed=5, train_sampling_strategy="sequential", logging_steps=1) | kwargs)
    rows = [dict(input_ids=x, labels=y) for x, y in zip(IDS, LABELS[kind])]
    trainer = ElaLoRATrainer(build(kind), arguments, train_dataset=rows, eval_dataset=rows[:8])
    if evaluate_first:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def plain_loop(kind, schedule):
    """Algorithm 1 with whole batches: what the Trainer should be."""
    model = build(kind).train()
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.SGD(weights, 0.05)
    allocator = RankAllocator(model, optimizer, schedule, 1)
    for step in range(24):
        index = torch.arange(8 * step, 8 * step + 8) % 48
        loss = model(input_ids=IDS[index], labels=LABELS[kind][index])["loss"]
        if kind == "classifier":
            loss = 4 * loss  # the stock Trainer adds up the means of a classifier's micro-batches
        (loss + 0.1 * orthogonality_penalty(model)).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    return model, allocator


SHARED = ("classifier", "language model")
BEST = dict(eval_strategy="steps", eval_steps=6, save_steps=6, load_best_model_at_end=True,
            gradient_checkpointing=True, bf16=True, learning_rate=0.5)  # fmt: skip


def in_processes(folder):
    """What each of two processes does for test_two_processes...; saves what it ends with."""
    process = int(os.environ["RANK"])
    for kind in SHARED:
        whole = train(kind, folder / kind, accumulate=2, evaluate_first=True)
        again = train(kind, folder / kind, folder / kind / "checkpoint-12", accumulate=2)
        best = train(kind, folder / f"{kind} best", accumulate=2, **BEST)
        states = [adapter_state_dict(trainer.model) for trainer in (whole, again, best)]
        torch.save(states, folder / f"{kind}-{process}.pt")


@pytest.mark.parametrize("kind", LABELS)
def test_one_process_is_the_plain_loop_and_resumes(kind, tmp_path):
    """With accumulation and clipping; from a checkpoint it ends with the same bits."""
    trainer = train(kind, tmp_path)
    allocator = trainer.allocator
    assert allocator.t == 24 and len(set(allocator.ranks().values())) > 1
    model, own = plain_loop(kind, allocator.schedule)
    assert own.ranks() == allocator.ranks()
    whole = adapter_state_dict(trainer.model)
    torch.testing.assert_close(whole, adapter_state_dict(model), rtol=1e-3, atol=1e-5)
    resumed = train(kind, tmp_path, tmp_path / "checkpoint-12")
    assert resumed.state.global_step == 24
    assert_same(adapter_state_dict(resumed.model), whole)


def test_two_processes_are_one(tmp_path):
    """Both end with the same bits, resumed or not, and with nearly those of one process."""
    result = torchrun(__file__, tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    for kind in SHARED:
        zero, one = (torch.load(tmp_path / f"{kind}-{process}.pt") for process in range(2))
        assert_same(zero, one)
        whole, resumed, best = zero
        assert_same(resumed, whole)
        alone = adapter_state_dict(train(kind, tmp_path / "alone").model)
        torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-5)
        best_alone = train(kind, tmp_path / "best alone", **BEST)
        ranks = {k: len(v) for k, v in best.items() if k.endswith("Lambda")}
        assert ranks == {f"{n}.Lambda": r for n, r in best_alone.allocator.ranks().items()}


def test_a_checkpoint_holds_what_is_trained_and_the_best_one_is_loaded(tmp_path):
    """The base is in no checkpoint; load_best_model_at_end brings back the best one's ranks."""
    highest = dict(metric_for_best_model="eval_loss", greater_is_better=True)  # an early one
    trainer = train("classifier", tmp_path, **BEST, **highest)
    folders = {path.parent: load_file(path) for path in tmp_path.glob("*/model.safetensors")}
    assert len(folders) == 4
    for state in folders.values():
        assert state.keys() == adapter_state_dict(trainer.model).keys()
    best = Path(trainer.state.best_model_checkpoint)
    ranks = {folder: [len(w) for key, w in state.items() if "Lambda" in key]
             for folder, state in folders.items()}  # fmt: skip
    assert any(ranks[folder] != ranks[best] for folder in folders) and best.name != "checkpoint-24"
    assert_same(adapter_state_dict(trainer.model), folders[best])
    with torch.no_grad():  # the loss that is evaluated has no penalty
        loss = trainer.model.eval()(input_ids=IDS[:8], labels=LABELS["classifier"][:8]).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-2)


def test_a_checkpoint_without_adapters_is_refused(tmp_path):
    """Of another adapter's names, say, where the Trainer would only warn."""
    train("classifier", tmp_path)
    path = tmp_path / "checkpoint-12/model.safetensors"
    state = load_file(path)
    del state["score.weight"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no score.weight"):
        train("classifier", tmp_path, path.parent)


if __name__ == "__main__":
    in_processes(Path(sys.argv[1]))
