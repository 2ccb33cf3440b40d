"""A causal language model on XSum's articles and summaries, by ElaLoRATrainer.

    python -m experiments.language_model --model FOLDER --data-dir xsum
    python -m experiments.language_model --model FOLDER --data-dir xsum --method lora
    torchrun --nproc-per-node 2 -m experiments.language_model --model FOLDER --data-dir xsum

A step is of 2 rows: accumulated in one process, or one in each of two. Its loss is that of the
summaries. --method lora is PEFT's LoRA in the stock Trainer, at the same rank and learning rate.
"""

import argparse
import json
import resource
import shlex
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import peft
import torch
import transformers

import elalora
from experiments import problem as shared
from experiments import report, xsum
from experiments.common import check_files, load_splits, pretrained
from experiments.problem import versions
from experiments.trainer import ElaLoRATrainer

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARTICLE_TOKENS, SUMMARY_TOKENS, PROMPT = 64, 32, "\nSummary:"
ROWS, EVALUATION_ROWS = 2, 32  # of a step, and held out


class Log(transformers.TrainerCallback):
    """Seconds of every step, and the mean losses that the Trainer logs."""

    def __init__(self):
        self.seconds, self.history = [], []

    def on_step_begin(self, *args, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.history.append(dict(epoch=state.epoch, train_loss=float(logs["loss"]), metrics={}))


class Logged(ElaLoRATrainer):
    """Keeps what the adjustments did."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.adjustments = []

    def move_ranks(self):
        if adjustment := super().move_ranks():
            self.adjustments.append(asdict(adjustment))


def load_rows(args: argparse.Namespace, tokenizer) -> list[list[dict]]:
    """Of training, and of evaluation: an article, a prompt and its summary, which has labels."""
    def tokenize(row: dict) -> dict:
        article = tokenizer(row["document"]).input_ids[:ARTICLE_TOKENS]
        prompt = article + tokenizer(PROMPT, add_special_tokens=False).input_ids
        summary = tokenizer(" " + row["summary"], add_special_tokens=False).input_ids
        summary = [*summary[: SUMMARY_TOKENS - 1], tokenizer.eos_token_id]
        return dict(input_ids=prompt + summary, labels=[-100] * len(prompt) + summary)

    splits = load_splits(
        args.data_dir, xsum.HUB, None, ("document", "summary"), ("train", "validation"))
    sizes = ROWS * args.steps, EVALUATION_ROWS
    if short := [len(split) for split, n in zip(splits, sizes) if len(split) < n]:
        raise ValueError(f"--steps {args.steps} needs {sizes} rows, a split has {short[0]}")
    return [[tokenize(row) for row in split.select(range(n))] for split, n in zip(splits, sizes)]


def run(args: argparse.Namespace, arguments: dict, folder: Path) -> dict:
    """Trains, exports to PEFT, writes results.json, and returns its content."""
    transformers.set_seed(args.seed)
    tokenizer = pretrained(transformers.AutoTokenizer, args.model)
    model = pretrained(transformers.AutoModelForCausalLM, args.model, dtype=torch.float32)
    train, evaluation = load_rows(args, tokenizer)
    if args.method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(
            r=args.rank, lora_alpha=16, target_modules=[*KINDS], task_type="CAUSAL_LM"))
    else:
        elalora.inject(model, KINDS, args.rank)
    settings = transformers.TrainingArguments(
        str(folder / "trainer"), num_train_epochs=1, per_device_train_batch_size=1,
        gradient_accumulation_steps=ROWS // shared.PROCESSES, per_device_eval_batch_size=2,
        learning_rate=args.learning_rate, max_grad_norm=1.0, eval_strategy="no",
        logging_steps=max(1, args.steps // 10), save_strategy="no", report_to=[],
        disable_tqdm=True, seed=args.seed, use_cpu=shared.DEVICE == "cpu")
    log, kind = Log(), transformers.Trainer if args.method == "lora" else Logged
    trainer = kind(
        model, settings, transformers.DataCollatorForSeq2Seq(tokenizer), train, evaluation,
        callbacks=[log])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    metrics = dict(
        evaluation_loss=trainer.evaluate()["eval_loss"],
        seconds_a_step=statistics.median(log.seconds),
        peak_gigabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2)  # this process
    trained = sum(w.numel() for w in shared.trained(model).values())
    if args.method == "lora":
        names = [name.removeprefix("base_model.model.") for name, module in model.named_modules()
                 if isinstance(module, peft.tuners.lora.Linear)]
        ranks, adjustments, scores = dict.fromkeys(names, args.rank), [], []
    else:
        ranks, adjustments = trainer.allocator.ranks(), trainer.adjustments
        S = torch.cat([*trainer.allocator.importance().values()])
        scores = [float(f"{x:.3g}") for x in S.tolist()]
        elalora.export_peft(model, folder / "peft", args.model)
        base = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        loaded, row = peft.PeftModel.from_pretrained(base, folder / "peft"), evaluation[0]
        metrics["logits_differ_in_peft_by"] = largest_difference(model, loaded, row)
        model = loaded
    results = dict(
        task="xsum", method=args.method, rank=args.rank, seed=args.seed, metrics=metrics,
        floor=dict(evaluation_loss=before), floor_name="before training",
        total_steps=trainer.state.global_step, ranks=ranks, history=log.history,
        adjustments=adjustments, scores={"end": scores},
        adapter_parameters=trained, trainable_parameters=trained,
        seconds=round(sum(log.seconds), 1), versions=versions(), arguments=arguments,
        command=shlex.join(["python", "-m", "experiments.language_model", *sys.argv[1:]]),
        summary=summarize(model, tokenizer, evaluation[0]))
    if shared.PROCESS == 0:
        text = json.dumps(results, indent=1)
        report.write(folder / "results.json", lambda path: path.write_text(text))
    return results


@torch.no_grad()
def largest_difference(model: torch.nn.Module, other: torch.nn.Module, row: dict) -> float:
    """Of the logits of two models."""
    ids = torch.tensor([row["input_ids"]], device=shared.DEVICE)
    logits = [m.to(shared.DEVICE).eval()(input_ids=ids).logits for m in (model, other)]
    return (logits[0] - logits[1]).abs().max().item()


def summarize(model: torch.nn.Module, tokenizer, row: dict) -> str:
    """The summary that a model generates greedily for a row's article."""
    prompt = [token for token, label in zip(row["input_ids"], row["labels"]) if label == -100]
    ids = torch.tensor([prompt], device=shared.DEVICE)
    found = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
        max_new_tokens=SUMMARY_TOKENS)
    return tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="experiments.language_model", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", default="google/gemma-3-270m", help="default: %(default)s")
    add("--data-dir", help="XSum in the hub's layout; default: from the hub")
    add("--method", choices=("elalora", "lora"), default="elalora", help="default: elalora")
    add("--rank", type=int, default=4, help="default: 4")
    add("--steps", type=int, default=100, help="of 2 rows; default: 100")
    add("--learning-rate", type=float, default=1e-3, help="default: 1e-3")
    add("--seed", type=int, default=0, help="default: 0")
    add("--output-dir", default="runs", help="default: runs")
    args = parser.parse_args(argv)
    arguments = dict(
        task="xsum", method=args.method, rank=args.rank, seed=args.seed, targets=[""],
        set=[f"processes={shared.PROCESSES}"] * (shared.PROCESSES > 1), model=args.model,
        data_dir=args.data_dir, learning_rate=args.learning_rate)
    folder = Path(args.output_dir, f"xsum-{report.label(arguments)}-s{args.seed}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if args.rank < 1 or args.steps < 10 or ROWS % shared.PROCESSES:
            raise ValueError(f"needs --rank >= 1, --steps >= 10 and 1 or 2 processes, got "
                             f"{args.rank}, {args.steps} and {shared.PROCESSES}")
        check_files(args.model, args.data_dir, [folder])
        results = run(args, arguments, folder)
    except (ValueError, OSError) as error:
        print(f"experiments.language_model: error: {str(error).strip().splitlines()[0]}",
              file=sys.stderr)
        sys.exit(2)
    if shared.PROCESS == 0:
        print(*report.describe(results), results["summary"], f"written: {folder}", sep="\n")
        report.compare(Path(args.output_dir))


if __name__ == "__main__":
    main()
