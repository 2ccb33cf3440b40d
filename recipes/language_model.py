"""For fine-tuning a causal language model, such as Gemma 3 270M, on pairs of texts, with TRL.

    python language_model.py --model google/gemma-3-270m --data EdinburghNLP/xsum

Both may be folders. It needs trainer.py beside it, and pip install trl peft datasets. To show what
can be relied on, it also resumes from the middle, and loads its export into PEFT: the held-out loss
must be the same.
"""

import argparse
import resource
import time

import datasets
import peft
import torch
import transformers
import trl

from elalora import export_peft, inject
from trainer import MoveRanks

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="google/gemma-3-270m")
    parser.add_argument("--data", default="EdinburghNLP/xsum", help="with train and validation")
    parser.add_argument("--columns", nargs=2, default=["document", "summary"], help="text, answer")
    parser.add_argument("--words", type=int, default=50, help="of a text, at most")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=int, default=32, help="rows of validation")
    parser.add_argument("--output", default="language-model", help="folder")
    return parser.parse_args()


def load_rows(args: argparse.Namespace) -> datasets.DatasetDict:
    """Rows of prompt and completion, as TRL wants them: the loss is that of the completion."""
    def pair(row: dict) -> dict:
        text, answer = (row[column] for column in args.columns)
        text = " ".join(text.split()[: args.words])
        return dict(prompt=f"{text}\n\nSummary:", completion=f" {answer}")

    splits = datasets.load_dataset(args.data)
    sizes = dict(train=args.steps * args.batch_size, validation=args.held_out)
    rows = {name: splits[name].take(n) for name, n in sizes.items()}
    return datasets.DatasetDict(rows).map(pair, remove_columns=splits["train"].column_names)


def load_base(args: argparse.Namespace) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)


def make_trainer(model: torch.nn.Module, args: argparse.Namespace) -> trl.SFTTrainer:
    gpu = torch.cuda.is_available()
    settings = trl.SFTConfig(
        args.output, max_steps=args.steps, per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size, learning_rate=args.learning_rate,
        save_steps=args.steps // 2, logging_steps=max(1, args.steps // 10), report_to=[],
        bf16=gpu, use_cpu=not gpu, gradient_checkpointing=gpu)
    tokenizer, rows = transformers.AutoTokenizer.from_pretrained(args.model), load_rows(args)
    return trl.SFTTrainer(model, settings, train_dataset=rows["train"],
                          eval_dataset=rows["validation"], processing_class=tokenizer)


def main() -> None:
    args = parse_arguments()
    for checkpoint in (None, f"{args.output}/checkpoint-{args.steps // 2}"):  # whole, then resumed
        torch.manual_seed(0)
        trainer = make_trainer(inject(load_base(args), MATRICES, args.rank), args)
        moves = MoveRanks(trainer)
        trainer.add_callback(moves)
        before, start = trainer.evaluate()["eval_loss"], time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        minutes, after = (time.perf_counter() - start) / 60, trainer.evaluate()["eval_loss"]
        ranks = moves.allocator.ranks().values()
        print(f"{'resumed' if checkpoint else 'whole'}: held-out loss {before:.6f} before, "
              f"{after:.6f} after {minutes:.1f} minutes; ranks of {min(ranks)} to {max(ranks)}")
    export_peft(trainer.model, f"{args.output}/peft", args.model)
    loaded = peft.PeftModel.from_pretrained(load_base(args), f"{args.output}/peft")
    print(f"exported: {make_trainer(loaded, args).evaluate()['eval_loss']:.6f}, at most "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB of memory")


if __name__ == "__main__":
    main()
