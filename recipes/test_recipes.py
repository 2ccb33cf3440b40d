"""The laws of the recipes: each runs as a file, trains as Algorithm 1, resumes, saves."""

import json
import re
from pathlib import Path

import accelerate
import datasets
import pytest
import torch
import transformers
from accelerate_loop import train as train_with_accelerate
from averaged import follow
from conftest import ROOT, WORDS, close, llama, run, same, tokenizer, trainable
from reference import Reference
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainer import MoveRanks

from elalora import (
    Adjustment, RankAllocator, RankSchedule, SVDLinear, adapter_state_dict, inject, merge,
    orthogonality_penalty, resize)

IDS = torch.randint(3, 40, (48, 6), generator=torch.Generator().manual_seed(0))
SCHEDULE = RankSchedule(24, 4, 4, 2, 2)
README = (ROOT / "recipes/README.md").read_text()
pytestmark = [pytest.mark.usefixtures("calm_adam"), pytest.mark.filterwarnings("ignore")]


# ---- As files ----
@pytest.mark.parametrize("name, says", [
    ("toy", "{'A': 1, 'B': 2, 'C': 6}"),  # planted are 0, 2 and 7; each keeps one, the sum stays 9
    ("accelerate_loop", "60 steps"), ("averaged", "60 steps"), ("compiled", "compiled 1 time(s)"),
    ("lightning_module", "60 steps"), ("ddp", "60 steps")])
def test_a_recipe_runs_beside_elalora_alone_and_moves_ranks(name, says, copied):
    """As a user would run it, without the rest of this project."""
    if name == "lightning_module":
        pytest.importorskip("lightning")
    said = run(copied, f"{name}.py", processes=2 * (name == "ddp"))
    assert says in said and len({*re.findall(r"'\w': (\d)", said)}) > 1


def test_the_language_model_resumes_and_exports_with_the_same_loss(copied):
    """A tiny model on tiny texts: what it prints of the held-out loss is alike to 1e-5."""
    pytest.importorskip("trl")
    llama(vocab_size=19).save_pretrained(copied / "model")
    tokenizer().save_pretrained(copied / "model")
    (copied / "data").mkdir()
    rows = [dict(document=" ".join(WORDS[i:]), summary=WORDS[i]) for i in [*range(12)] * 2]
    for split in ("train", "validation"):
        lines = [json.dumps(row) + "\n" for row in rows]
        (copied / f"data/{split}.jsonl").write_text("".join(lines))
    constants = dict(MODEL="model", DATA="data", RANK=2, STEPS=12, LEARNING_RATE=0.05)
    said = run(copied, "-c", "import language_model as recipe\n"
               f"vars(recipe).update({constants})\nrecipe.main()")
    before, after, again, resumed, exported = map(float, re.findall(r"held-out .*: (.*)", said))
    assert before == again and after < before and after == resumed
    assert exported == pytest.approx(after, abs=1e-5)


# ---- Trainers and loops: tiny models, and Algorithm 1 ----
def build(rank=2, base=None, saved=()):
    """A tiny model after inject(), with a penalty that is felt."""
    model = inject(base or llama(), ["q_proj", "down_proj"], rank, modules_to_save=saved)
    for name, w in model.named_parameters():
        w.data *= 1.5 if name.endswith(".P") else 1
    return model


def net(rank=2):
    """Two linear layers, both adapted."""
    torch.manual_seed(0)
    return inject(nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16)), ["0", "2"], rank)


X = torch.randn(12, 8, 16, generator=torch.Generator().manual_seed(0))  # 12 batches of 8 rows


def loader(epochs, size):
    x = X.repeat(epochs, 1, 1).flatten(0, 1)  # (rows, 16)
    return DataLoader(TensorDataset(x, x.flip(-1)), size)


def algorithm_1(model, losses, schedule):
    """With clipping; the oracle of what follows."""
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    allocator = RankAllocator(model, optimizer, schedule, k=1)
    for loss in losses:  # which is computed when its step has come
        (loss + 0.1 * orthogonality_penalty(model)).backward()
        nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    return adapter_state_dict(model)


def expected_of_llama(model, rows, schedule=SCHEDULE):
    ids = IDS.repeat(rows // 2, 1).split(rows)  # 24 batches
    return algorithm_1(model, (model(input_ids=x, labels=x).loss for x in ids), schedule)


def expected_of_net():
    model = net()
    losses = (nn.functional.mse_loss(model(x), x.flip(-1)) for x in X.repeat(2, 1, 1))
    return algorithm_1(model, losses, SCHEDULE)


# ---- Trainers and loops: 24 steps, 8 rows in each, whatever the number of processes ----
def make_trainer(kind, folder, model, schedule=None, **settings):
    """A trainer and its callback."""
    settings = dict(
        max_steps=24, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        max_grad_norm=1.0, learning_rate=1e-2, lr_scheduler_type="constant", save_steps=12,
        report_to=[], disable_tqdm=True, use_cpu=True, bf16=False,
        train_sampling_strategy="sequential", logging_strategy="no") | settings
    if kind == "Trainer":
        arguments = transformers.TrainingArguments(str(folder), **settings)
        rows = [dict(input_ids=x, labels=x) for x in IDS]
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows, eval_dataset=rows[:8])
    else:
        trainer = trl_trainer(kind, folder, model, settings)
    moves = MoveRanks(trainer, schedule=schedule)
    trainer.add_callback(moves)
    return trainer, moves


def trl_trainer(kind, folder, model, settings):
    trl = pytest.importorskip("trl")
    columns, options = ["prompt", "chosen", "rejected"], {}
    if kind == "SFT":
        columns = ["prompt", "completion"]
    elif kind == "GRPO":
        settings |= dict(num_generations=4, max_completion_length=4)
        options = dict(reward_funcs=different_words)
    else:
        options = dict(ref_model=Reference(model))
    texts = torch.randint(16, (48, 3, 3), generator=torch.Generator().manual_seed(0)).tolist()
    words = [[" ".join(WORDS[i] for i in text) for text in row] for row in texts]
    rows = datasets.Dataset.from_list([dict(zip(columns, row)) for row in words])
    arguments = getattr(trl, f"{kind}Config")(str(folder), **settings)
    return getattr(trl, f"{kind}Trainer")(
        model, args=arguments, train_dataset=rows, processing_class=tokenizer(), **options)


def different_words(completions, **_):
    return [float(len({*text.split()})) for text in completions]


def accelerated(model, folder, resume=False, **options):
    """Saved after step 16."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=False)
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, **options)
    size = 8 // accelerator.num_processes // accelerator.gradient_accumulation_steps
    return train_with_accelerate(
        accelerator, model, loader(2, size), SCHEDULE, str(folder), 16, resume)


def lit(folder, rank, checkpoint=None, precision="32-true"):
    """An Adapted; two epochs, saved after one."""
    lightning = pytest.importorskip("lightning")
    from lightning_module import Adapted
    module = Adapted(net(rank), SCHEDULE)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, every_n_train_steps=12, save_top_k=-1, filename="{step}")
    trainer = lightning.Trainer(
        max_steps=24, accumulate_grad_batches=2, gradient_clip_val=1.0, precision=precision,
        accelerator="cpu", devices=1, callbacks=[saving], logger=False,
        enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, loader(1, 4), ckpt_path=checkpoint, weights_only=False)
    return module


def fit(kind, folder, rank=2, resume=False):
    """The model and its allocator after training, perhaps from a checkpoint in the folder."""
    if kind == "Accelerate":
        model = net(rank)
        return model, accelerated(model, folder, resume, gradient_accumulation_steps=2)
    if kind.startswith("Lightning"):
        precision = "bf16-mixed" if kind.endswith("bfloat16") else "32-true"
        module = lit(folder, rank, folder / "step=12.ckpt" if resume else None, precision)
        return module.model, module.allocator
    model = build(rank)
    if kind == "Trainer of a tied head":
        model = build(rank, llama(tie_word_embeddings=True), saved=["lm_head"])
        model.model.norm.requires_grad_(True)  # by hand
    trainer, moves = make_trainer(kind.partition(" ")[0], folder, model)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-12" if resume else None)
    return model, moves.allocator


def saved_names(kind, folder):
    """Of the checkpoint from which fit() resumes."""
    if kind.startswith("Lightning"):
        checkpoint = torch.load(folder / "step=12.ckpt", weights_only=False)
        return {key.removeprefix("model.") for key in checkpoint["state_dict"]}
    file = "model.safetensors" if kind == "Accelerate" else "checkpoint-12/model.safetensors"
    return load_file(folder / file).keys()


# ---- Trainers and loops: their laws ----
@pytest.fixture(scope="module", params=[
    "Trainer", "Trainer of a tied head", "SFT", "DPO", "KTO", "GRPO", "Accelerate", "Lightning",
    "Lightning in bfloat16"])
def done(request, calm_adam, tmp_path_factory):
    """The kind, the folder of its checkpoints, the trained model and its allocator."""
    folder = tmp_path_factory.mktemp("done")
    return request.param, folder, *fit(request.param, folder)


def test_ranks_move_once_per_optimizer_step(done):
    """Not once per micro-batch; all adapters are trained, and the sum of ranks stays."""
    _, _, _, allocator = done
    ranks = [*allocator.ranks().values()]
    assert allocator.t == 24 and sum(ranks) == 2 * len(ranks) and len({*ranks}) > 1
    assert all(layer.Lambda.any() for layer in allocator.layers.values())


def test_training_resumes_bit_for_bit_from_another_rank(done):
    """From a checkpoint, which holds no frozen weight, in a new model that starts at rank 3."""
    kind, folder, model, _ = done
    expected = adapter_state_dict(model)
    assert saved_names(kind, folder) <= expected.keys()
    resumed, allocator = fit(kind, folder, rank=3, resume=True)
    assert allocator.t == 24
    same(adapter_state_dict(resumed), expected)


@pytest.mark.parametrize("done", ["Trainer", "Accelerate", "Lightning"], indirect=True)
def test_training_is_algorithm_1(done):
    """Micro-batches give what whole batches do, with a penalty that is clipped with the loss."""
    kind, _, model, allocator = done
    if kind == "Trainer":
        expected = expected_of_llama(build(), 8, allocator.schedule)
    else:
        expected = expected_of_net()
    close(adapter_state_dict(model), expected)


def test_save_model_writes_the_adapter_alone_until_it_is_merged(tmp_path):
    trainer, _ = make_trainer("Trainer", tmp_path, build())
    trainer.save_model(str(tmp_path / "adapted"))
    same(load_file(tmp_path / "adapted/model.safetensors"), adapter_state_dict(trainer.model))
    merge(trainer.model)
    trainer.save_model(str(tmp_path / "merged"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    same(loaded.state_dict(), trainer.model.state_dict())


def test_what_cannot_be_resumed_is_refused(tmp_path):
    """A checkpoint without the optimizer, a second train(), and a checkpoint of other adapters."""
    trainer, _ = make_trainer("Trainer", tmp_path, build(), save_only_model=True)
    trainer.train()
    resume = dict(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    with pytest.raises(ValueError, match="step 12, the optimizer is at step 0: .* no optimizer.pt"):
        make_trainer("Trainer", tmp_path, build())[0].train(**resume)
    with pytest.raises(ValueError, match="step 0, the optimizer is at step 24: .*make a new one"):
        trainer.train()
    path = tmp_path / "checkpoint-12/model.safetensors"
    state = load_file(path)
    state["other"] = state.pop("model.layers.0.mlp.down_proj.scaling")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="down_proj.scaling', 'other'"):
        make_trainer("Trainer", tmp_path, build())[0].train(**resume)


def test_the_best_checkpoint_is_loaded_with_its_ranks(tmp_path):
    """With evaluation, bfloat16 and gradient checkpointing; the loss evaluated has no penalty."""
    trainer, _ = make_trainer(
        "Trainer", tmp_path, build(), RankSchedule(24, 2, 2, 2, 2, "constant"), bf16=True,
        gradient_checkpointing=True, eval_strategy="steps", eval_steps=6, save_steps=6,
        load_best_model_at_end=True, greater_is_better=True)  # the best is an early one
    trainer.train()
    states = {path.parent.name: load_file(path) for path in tmp_path.glob("*/model.safetensors")}
    best = Path(trainer.state.best_model_checkpoint).name
    same(adapter_state_dict(trainer.model), states[best])
    shapes = [[x.shape for x in state.values()] for state in states.values()]
    assert best != "checkpoint-24" and any(found != shapes[0] for found in shapes)
    with torch.no_grad():
        loss = trainer.model.eval()(input_ids=IDS[:8], labels=IDS[:8]).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-2)


def test_the_reference_gives_the_losses_of_a_second_copy_of_the_base(tmp_path):
    """To the bit, in every step of DPO."""
    trl = pytest.importorskip("trl")
    losses = []
    for second_copy in (False, True):
        trainer, _ = make_trainer("DPO", tmp_path, build(), logging_strategy="steps",
                                  logging_steps=1)
        if second_copy:
            trainer.ref_model = llama().requires_grad_(False)
            trl.trainer.utils.add_fused_lm_head(trainer.ref_model)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1] and len({*losses[0]}) > 10


def test_averaged_weights_follow_the_ranks():
    """Ranks that stay keep their averages to the bit, new ones begin as they are in the model."""
    model, copy = net(rank=3), net(rank=3)
    for w in trainable(copy):
        w.data += 1
    before = adapter_state_dict(copy)
    for name, keep, n_new in [("0", [0, 2], 2), ("2", [1], 0)]:
        resize(model.get_submodule(name), keep, n_new, None, {})
    follow(copy, model, Adjustment(1, 2, {"0": [1], "2": [0, 2]}, {"0": 2}, {}))
    same(copy[0].P.data, torch.cat([before["0.P"][:, [0, 2]], model[0].P[:, 2:]], dim=1))
    same(copy[0].Lambda.data, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    same(copy[0].Q.data, torch.cat([before["0.Q"][[0, 2]], model[0].Q[2:]]))
    same([copy[2].P.data, copy[2].Q.data], [before["2.P"][:, [1]], before["2.Q"][[1]]])


# ---- README.md ----
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=1, vocab_size=40, pad_token_id=0)
SIZES |= dict(d_model=16, encoder_layers=1, decoder_layers=1, n_embd=16, n_layer=1, n_head=2)


@pytest.mark.parametrize("row, config", [
    ("Llama", "Llama"), ("Llama", "Qwen2"), ("Llama", "Qwen3"), ("Llama", "Mistral"),
    ("Llama", "Gemma3Text"), ("BERT", "Bert"), ("BERT", "Roberta"), ("DeBERTaV3", "DebertaV2"),
    ("BART", "Bart"), ("ViT", "ViT"), ("GPT-2", "GPT2")])
def test_the_names_of_the_table_are_all_matrices_of_a_layer(row, config):
    """What they leave out of a model without a head is the pooler."""
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row}")]
    model = transformers.AutoModel.from_config(
        getattr(transformers, f"{config}Config")(**SIZES))
    linear = {name for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    inject(model, re.findall("`(.+?)`", line), 2)
    layers = {name for name, module in model.named_modules() if isinstance(module, SVDLinear)}
    assert layers == linear - {"pooler.dense"}
