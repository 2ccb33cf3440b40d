"""The laws of the recipes: each runs as a file, trains as Algorithm 1, resumes, saves, exports."""

import json
import re
from pathlib import Path

import accelerate
import averaged
import compiled
import numpy as np
import peft
import pytest
import torch
import transformers
from accelerate_loop import train as train_with_accelerate
from conftest import ROOT, WORDS, equal, llama, run, tokenizer, trainable
from reference import Reference
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainer import MoveRanks

from elalora import (
    RankAllocator, RankSchedule, SVDLinear, adapter_state_dict, export_peft, inject,
    load_adapter_state_dict, merge, orthogonality_penalty)

IDS = torch.randint(3, 40, (48, 6), generator=torch.Generator().manual_seed(0))
README = (ROOT / "recipes/README.md").read_text()


def close(x, y):
    torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


# ---- As files ----
@pytest.mark.parametrize("name, says", [
    ("toy", "{'A': 1, 'B': 2, 'C': 6}"),  # planted are 0, 2 and 7; each keeps one, the sum stays 9
    ("accelerate_loop", "60 steps"), ("averaged", "60 steps"), ("compiled", "compiled 1 time(s)"),
    ("lightning_module", "60 steps"), ("ddp", "60 steps")])
def test_a_recipe_runs_beside_elalora_alone(name, says, copied):
    """As a user would run it, without the rest of this project."""
    if name == "lightning_module":
        pytest.importorskip("lightning")
    assert says in run(copied, f"{name}.py", processes=2 * (name == "ddp"))


# ---- Any trainer ----
def rows_of(kind):
    """Rows as each trainer wants them."""
    if kind == "Trainer":
        return [dict(input_ids=x, labels=x) for x in IDS]
    datasets = pytest.importorskip("datasets")
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(WORDS[i] for i in torch.randint(16, (3,), generator=generator))
             for _ in range(48 * 4)]
    columns = dict(SFT=["prompt", "completion"], DPO=["prompt", "chosen", "rejected"],
                   KTO=["prompt", "completion", "label"], GRPO=["prompt"])[kind]
    rows = [dict(zip(columns, texts[4 * i :])) for i in range(48)]
    if kind == "KTO":
        rows = [row | dict(label=i % 2 > 0) for i, row in enumerate(rows)]
    return datasets.Dataset.from_list(rows)


def reward(completions, **_):
    return [float(len({*text.split()})) for text in completions]


def build(rank=2, base=None, saved=()):
    """A tiny model after inject(), with a penalty that is felt."""
    model = inject(base or llama(), ["q_proj", "down_proj"], rank, modules_to_save=saved)
    for name, w in model.named_parameters():
        w.data *= 1.5 if name.endswith(".P") else 1
    return model


def make(kind, folder, model, schedule=None, stock=transformers.Trainer, **settings):
    """A trainer of 24 steps, and its callback; 8 rows a step, whatever the number of processes."""
    settings = dict(
        max_steps=24, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        max_grad_norm=1.0, learning_rate=0.05, lr_scheduler_type="constant", save_steps=12,
        report_to=[], disable_tqdm=True, use_cpu=True, seed=5, bf16=False, optim="sgd",
        train_sampling_strategy="sequential", logging_strategy="no") | settings
    rows, options = rows_of(kind), {}
    if kind == "Trainer":
        arguments = transformers.TrainingArguments(str(folder), **settings)
        trainer = stock(model, arguments, train_dataset=rows, eval_dataset=rows[:8])
    else:
        trl = pytest.importorskip("trl")
        if kind == "GRPO":
            settings |= dict(num_generations=4, max_completion_length=4)
            options = dict(reward_funcs=reward)
        if kind in ("DPO", "KTO"):
            options = dict(ref_model=Reference(model))
        settings["optim"] = "adamw_torch"
        arguments = getattr(trl, f"{kind}Config")(str(folder), **settings)
        trainer = getattr(trl, f"{kind}Trainer")(
            model, args=arguments, train_dataset=rows, processing_class=tokenizer(), **options)
    moves = MoveRanks(trainer, schedule=schedule)
    trainer.add_callback(moves)
    return trainer, moves


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["Trainer", "SFT", "DPO", "KTO", "GRPO"])
class TestAnyTrainer:
    """What MoveRanks does for each trainer of transformers and TRL."""

    @pytest.fixture
    def done(self, kind, tmp_path):
        trainer, moves = make(kind, tmp_path, build())
        trainer.train()
        return trainer, moves

    def test_it_trains_the_adapters_and_moves_ranks_once_per_optimizer_step(self, done, kind):
        """With 4 micro-batches in each; the base keeps its bits, the ranks their sum."""
        model, allocator = done[0].model, done[1].allocator
        ranks = [*allocator.ranks().values()]
        assert allocator.t == 24 and sum(ranks) == 8 and len({*ranks}) > 1
        before, trained = build().state_dict(), adapter_state_dict(model)
        assert all(equal(x, before[key]) for key, x in model.state_dict().items()
                   if key not in trained)
        assert all(layer.Lambda.any() for layer in allocator.layers.values())

    def test_it_resumes_bit_for_bit_from_another_rank(self, done, kind, tmp_path):
        """From a checkpoint, in a new trainer whose model starts at rank 3."""
        resumed, moves = make(kind, tmp_path, build(rank=3))
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
        assert moves.allocator.t == resumed.state.global_step == 24
        assert equal(adapter_state_dict(resumed.model), adapter_state_dict(done[0].model))

    def test_a_checkpoint_holds_the_adapter_alone(self, done, kind, tmp_path):
        """And save_model() of the unmerged model, too; a merged one is saved whole."""
        trainer, _ = done
        trainer.save_model(str(tmp_path / "unmerged"))
        state = adapter_state_dict(trainer.model)
        assert equal(load_file(tmp_path / "unmerged/model.safetensors"), state)
        assert load_file(tmp_path / "checkpoint-12/model.safetensors").keys() == state.keys()
        merge(trainer.model)
        trainer.save_model(str(tmp_path / "merged"))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert equal(loaded.state_dict(), trainer.model.state_dict())

    def test_it_exports_to_peft_and_to_readers_that_know_one_rank(self, done, kind, tmp_path):
        """PEFT computes the same. vLLM, SGLang and llama.cpp compute W0 + alpha / r B A."""
        model = done[0].model.eval()
        export_peft(model, tmp_path, "llama")
        loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
        with torch.no_grad():
            close(loaded(IDS).logits, model(IDS).logits)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        base, merged = llama(), merge(model)
        for name in config["target_modules"]:
            A, B = (tensors.pop(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
            W0, W = (m.get_submodule(name).weight for m in (base, merged))
            assert len(A) == config["r"] == B.shape[1]
            close(W0 + config["lora_alpha"] / config["r"] * B @ A, W)
        assert not tensors and not config["modules_to_save"]


# ---- The Trainer of transformers ----
def plain_loop(model, schedule):
    """Algorithm 1 with whole batches: what the Trainer should be."""
    optimizer = torch.optim.SGD(trainable(model.train()), 0.05)
    allocator = RankAllocator(model, optimizer, schedule, 1)
    for step in range(24):
        ids = IDS[torch.arange(8 * step, 8 * step + 8) % 48]
        (model(input_ids=ids, labels=ids).loss + 0.1 * orthogonality_penalty(model)).backward()
        nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    return adapter_state_dict(model)


def test_the_trainer_is_the_plain_loop(tmp_path):
    """With accumulation, with a penalty that is clipped together with the loss's gradient."""
    trainer, moves = make("Trainer", tmp_path, build())
    trainer.train()
    close(adapter_state_dict(trainer.model), plain_loop(build(), moves.allocator.schedule))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("accepts", [False, True])
def test_the_penalty_does_not_depend_on_how_a_trainer_scales_its_loss(scaled, accepts, tmp_path):
    """A loss of 0: one step changes P and Q by the penalty's gradient alone, in 1 or 4 batches."""
    class Own(transformers.Trainer):
        loss_is_scaled_for_ga = scaled

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (0 * outputs.loss, outputs) if return_outputs else 0 * outputs.loss

    for size in (2, 8):
        model, expected = build(), build()
        model.accepts_loss_kwargs = accepts
        trainer, _ = make("Trainer", tmp_path, model, stock=Own, per_device_train_batch_size=size,
                          gradient_accumulation_steps=8 // size, max_steps=1, max_grad_norm=0.0)
        trainer.train()
        (0.1 * orthogonality_penalty(expected)).backward()
        for w, w0 in zip(trainable(model), trainable(expected)):
            close(w, w0 if w0.grad is None else w0 - 0.05 * w0.grad)


def test_what_was_unfrozen_by_hand_or_is_tied_is_saved_and_resumed(tmp_path):
    """Norms that inject() does not know of, and a head that is the embedding's weight."""
    def model():
        model = build(base=llama(tie_word_embeddings=True), saved=["lm_head"])
        model.model.norm.requires_grad_(True)
        return model

    trainer, _ = make("Trainer", tmp_path, model())
    trainer.train()
    assert "model.norm.weight" in load_file(tmp_path / "checkpoint-12/model.safetensors")
    resumed, _ = make("Trainer", tmp_path, model())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert equal(adapter_state_dict(resumed.model), adapter_state_dict(trainer.model))


def test_what_cannot_be_resumed_is_refused(tmp_path):
    """A checkpoint without the optimizer, a second train(), and a checkpoint of other adapters."""
    trainer, _ = make("Trainer", tmp_path, build(), save_only_model=True)
    trainer.train()
    resume = dict(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    with pytest.raises(ValueError, match="step 12, the optimizer is at step 0: .* no optimizer.pt"):
        make("Trainer", tmp_path, build())[0].train(**resume)
    with pytest.raises(ValueError, match="step 0, the optimizer is at step 24: .*make a new one"):
        trainer.train()
    path = tmp_path / "checkpoint-12/model.safetensors"
    state = load_file(path)
    state["other"] = state.pop("model.layers.0.mlp.down_proj.scaling")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="down_proj.scaling', 'other'"):
        make("Trainer", tmp_path, build())[0].train(**resume)


BEST = dict(schedule=RankSchedule(24, 2, 2, 2, 2, "constant"), learning_rate=0.5, bf16=True,
            eval_strategy="steps", eval_steps=6, save_steps=6, load_best_model_at_end=True,
            metric_for_best_model="eval_loss", greater_is_better=True,  # which is an early one
            gradient_checkpointing=True)


def test_the_best_checkpoint_is_loaded_with_its_ranks(tmp_path):
    """With evaluation, bfloat16 and gradient checkpointing; the loss evaluated has no penalty."""
    trainer, _ = make("Trainer", tmp_path, build(), **BEST)
    trainer.train()
    states = {path.parent.name: load_file(path) for path in tmp_path.glob("*/model.safetensors")}
    best = Path(trainer.state.best_model_checkpoint).name
    assert equal(adapter_state_dict(trainer.model), states[best]) and best != "checkpoint-24"
    ranks = [[len(x) for key, x in state.items() if "Lambda" in key] for state in states.values()]
    assert len(ranks) == 4 and any(found != ranks[0] for found in ranks)
    with torch.no_grad():
        loss = trainer.model.eval()(input_ids=IDS[:8], labels=IDS[:8]).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-2)


def test_the_reference_gives_the_losses_of_a_second_copy_of_the_base(tmp_path):
    """To the bit, in every step of DPO."""
    trl = pytest.importorskip("trl")
    losses = []
    for second_copy in (False, True):
        trainer, _ = make("DPO", tmp_path, build(), logging_strategy="steps", logging_steps=1)
        if second_copy:
            trainer.ref_model = llama().requires_grad_(False)
            trl.trainer.utils.add_fused_lm_head(trainer.ref_model)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1] and len(set(losses[0])) > 10


# ---- Loops of your own ----
SCHEDULE = RankSchedule(24, 4, 4, 2, 2)


def net(rank=2):
    """Two linear layers, both adapted."""
    torch.manual_seed(0)
    return inject(nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 16)), ["0", "2"], rank)


def batches(n=24, size=8):
    x = torch.randn(n, size, 16, generator=torch.Generator().manual_seed(0))
    return [(a, a.flip(-1)) for a in x]


def own_loop(model, data, schedule=SCHEDULE):
    """Algorithm 1, with clipping; the oracle of what follows."""
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    allocator = RankAllocator(model, optimizer, schedule, k=1)
    for x, y in data:
        (nn.functional.mse_loss(model(x), y) + 0.1 * orthogonality_penalty(model)).backward()
        nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    assert len({*allocator.ranks().values()}) > 1
    return adapter_state_dict(model)


def accelerated(model, folder, schedule=SCHEDULE, resume=False, **options):
    """24 steps of 8 rows, in two micro-batches, or one in each process; saved after step 12."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=False)
    accelerate.state.GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, **options)
    size = 8 // accelerator.num_processes // accelerator.gradient_accumulation_steps
    x, y = (torch.cat(part) for part in zip(*batches()))
    loader = DataLoader(TensorDataset(x, y), batch_size=size)
    return train_with_accelerate(accelerator, model, loader, schedule, str(folder), 12, resume)


def test_accelerates_loop_is_algorithm_1_and_resumes_bit_for_bit(tmp_path, monkeypatch, calm_adam):
    """The allocator steps once for two micro-batches; it resumes from another rank; the
    checkpoint holds the adapter alone."""
    model = net()
    options = dict(gradient_accumulation_steps=2)
    save = accelerate.Accelerator.save_state  # keep the checkpoint of step 12
    monkeypatch.setattr(accelerate.Accelerator, "save_state", lambda self, folder: (
        None if Path(folder).exists() else save(self, folder)))
    assert accelerated(model, tmp_path / "c", **options).t == 24
    close(adapter_state_dict(model), own_loop(net(), batches()))
    assert load_file(tmp_path / "c/model.safetensors").keys() == adapter_state_dict(model).keys()
    resumed = net(rank=3)
    assert accelerated(resumed, tmp_path / "c", resume=True, **options).t == 24
    assert equal(adapter_state_dict(resumed), adapter_state_dict(model))


def vectors(layer):
    """A row for each rank, in float64 NumPy."""
    parts = (layer.P.T, layer.Lambda[:, None], layer.Q)
    return np.concatenate([w.detach().double().numpy() for w in parts], axis=1)


def test_averaged_weights_follow_the_ranks(monkeypatch):
    """Every rank's average is that of the rank itself since it was added."""
    expected, moved = {}, []

    class Allocator(RankAllocator):  # follows every rank by itself
        def step(self):
            adjustment = super().step()
            moved.append(bool(adjustment and adjustment.expanded))
            for name, layer in self.layers.items():
                now = vectors(layer)
                if name in expected:  # else: the first update copies
                    lost = adjustment.pruned.get(name, []) if adjustment else []
                    kept = np.delete(expected[name], lost, axis=0)
                    now = 0.9 * np.concatenate([kept, now[len(kept) :]]) + 0.1 * now
                expected[name] = now
            return adjustment

    monkeypatch.setattr(averaged, "RankAllocator", Allocator)
    _, average = averaged.train(net(), batches(40), RankSchedule(40, 2, 2, 2, 2, "constant"), 0.9)
    assert sum(moved) > 10
    for name, own in expected.items():
        got = vectors(average.module.get_submodule(name))
        np.testing.assert_allclose(got, own, rtol=1e-4, atol=1e-5)


@torch._dynamo.config.patch(force_parameter_static_shapes=True)  # which the recipe changes
def test_a_compiled_model_is_compiled_once():
    """For more adjustments than torch would compile for, with matrices that fall to 2 ranks."""
    torch.manual_seed(0)
    graphs, seen = [], set()
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(6)))
    inject(model, [str(i) for i in range(6)], rank=3)
    run_compiled = compiled.compile_adapted(
        model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)

    def watched(x):
        seen.add(tuple(m.rank for m in model if isinstance(m, SVDLinear)))
        y = run_compiled(x)
        torch.testing.assert_close(y, model(x))
        return y

    data = [(torch.randn(4, 24), torch.randn(4, 24)) for _ in range(60)]
    compiled.train(model, watched, data, RankSchedule(60, 0, 2, 1, 2, "constant"))
    assert len(seen) > torch._dynamo.config.recompile_limit
    assert min(map(min, seen)) == 2 and len(graphs) == 1


@pytest.fixture
def lit():
    """Fits a module: 24 steps of 8 rows, in two micro-batches; two epochs, saved after one."""
    lightning = pytest.importorskip("lightning")
    from lightning_module import Adapted

    def fit(folder, rank=2, checkpoint=None, **options):
        module = Adapted(net(rank), SCHEDULE)
        saving = lightning.pytorch.callbacks.ModelCheckpoint(
            folder, every_n_train_steps=12, save_top_k=-1, filename="{step}")
        x, y = (torch.cat(part) for part in zip(*batches(12)))
        options = dict(accelerator="cpu", devices=1, accumulate_grad_batches=2) | options
        trainer = lightning.Trainer(
            max_steps=24, callbacks=[saving], gradient_clip_val=1.0, logger=False,
            enable_progress_bar=False, enable_model_summary=False, **options)
        loader = DataLoader(TensorDataset(x, y), 8 // options["accumulate_grad_batches"])
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=False)
        return module

    return fit


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_is_algorithm_1_and_resumes_bit_for_bit(lit, precision, tmp_path, calm_adam):
    """The allocator steps once for two micro-batches, and is in the checkpoint of its step."""
    module = lit(tmp_path, precision=precision)
    whole = adapter_state_dict(module.model)
    if precision == "32-true":
        close(whole, own_loop(net(), batches(12) * 2))
    path = tmp_path / "step=12.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint["state_dict"].keys() == {f"model.{key}" for key in whole}
    (optimizer,) = checkpoint["optimizer_states"]
    assert optimizer["param_groups"][0]["elalora_step"] == checkpoint["global_step"] == 12
    resumed = lit(tmp_path, rank=3, checkpoint=path, precision=precision)
    assert resumed.allocator.t == module.allocator.t == 24
    assert equal(adapter_state_dict(resumed.model), whole)
    loaded = type(module).load_from_checkpoint(
        tmp_path / "step=24.ckpt", model=net(1), schedule=SCHEDULE, weights_only=False)
    assert equal(adapter_state_dict(loaded.model), whole)


def test_the_language_model_resumes_and_exports_with_the_same_loss(copied, tmp_path):
    """A tiny model on tiny texts: what it prints of the held-out loss is alike to 1e-5."""
    pytest.importorskip("trl")
    base = llama(vocab_size=19)
    base.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        rows = [dict(document=" ".join(WORDS[i:]), summary=WORDS[i]) for i in range(12)]
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"data/{split}.jsonl").write_text("".join(lines))
    for path in copied.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    said = run(tmp_path, "language_model.py", "--model", "model", "--data", "data", "--rank", 2,
               "--steps", 12, "--learning-rate", "0.05")
    before, after, again, resumed, exported = map(
        float, re.findall(r"(?:loss|before,|exported:) (\d+\.\d+)", said))
    assert before == again and after < before and after == resumed
    assert exported == pytest.approx(after, abs=1e-5)


# ---- README.md ----
def tiny(config, kind):
    """A model of one layer."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    sizes |= dict(d_model=16, encoder_layers=1, decoder_layers=1, num_key_value_heads=1)
    sizes |= dict(n_embd=16, n_layer=1, n_head=2, vocab_size=40, pad_token_id=0)
    config = getattr(transformers, f"{config}Config")(**sizes)
    return getattr(transformers, f"AutoModelFor{kind}").from_config(config)


@pytest.mark.parametrize("row, config, kind", [
    *[("Llama", name, "CausalLM") for name in ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma3Text")],
    *[("BERT", name, "SequenceClassification") for name in ("Bert", "Roberta")],
    ("DeBERTaV3", "DebertaV2", "SequenceClassification"), ("BART", "Bart", "Seq2SeqLM"),
    ("ViT", "ViT", "ImageClassification"), ("GPT-2", "GPT2", "CausalLM")])
def test_the_names_of_the_table_are_all_matrices_of_a_layer(row, config, kind):
    """What they leave out of the linear layers is the head."""
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row}")]
    model = tiny(config, kind)
    linear = {name for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    inject(model, re.findall("`(.+?)`", line), 2)
    layers = {name for name, module in model.named_modules() if isinstance(module, SVDLinear)}
    heads = ("lm_head", "classifier", "pooler")
    assert layers == {name for name in linear if not name.removeprefix("bert.").startswith(heads)}
