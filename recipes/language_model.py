"""For fine-tuning a causal language model, such as Gemma 3 270M, on pairs of texts, with TRL.

    python language_model.py    # after changing the constants; needs pip install trl peft datasets

It needs trainer.py beside it. To show what can be relied on, it also resumes from the middle, and
loads its export into PEFT: the held-out loss must be the same.
"""

import datasets
import peft
import torch
import transformers
import trl

from elalora import export_peft, inject, parameter_groups
from trainer import MoveRanks

MODEL = "google/gemma-3-270m"  # on the hub, or a folder
DATA = "EdinburghNLP/xsum"  # on the hub, or a folder; with the splits train and validation
TEXT, ANSWER, WORDS = "document", "summary", 50  # two columns; so much of the text, at most
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, STEPS, BATCH_SIZE, LEARNING_RATE, HELD_OUT = 8, 60, 2, 1e-3, 24
OUTPUT = "language-model"  # a folder


def pair(row: dict) -> dict:
    """As TRL wants it: the loss is that of the completion."""
    text = " ".join(row[TEXT].split()[:WORDS])
    return dict(prompt=f"{text}\n\nSummary:", completion=f" {row[ANSWER]}")


def load_base() -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def make_trainer(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
                 ) -> trl.SFTTrainer:
    gpu = torch.cuda.is_available()
    settings = trl.SFTConfig(
        OUTPUT, max_steps=STEPS, save_steps=STEPS // 2,
        per_device_train_batch_size=BATCH_SIZE, per_device_eval_batch_size=BATCH_SIZE,
        logging_steps=10, report_to=[], bf16=gpu, use_cpu=not gpu, gradient_checkpointing=gpu)
    rows = datasets.load_dataset(DATA)
    rows["train"] = rows["train"].take(STEPS * BATCH_SIZE)
    rows["validation"] = rows["validation"].take(HELD_OUT)
    rows = rows.map(pair, remove_columns=rows["train"].column_names)
    return trl.SFTTrainer(
        model, settings, train_dataset=rows["train"], eval_dataset=rows["validation"],
        optimizers=(optimizer, None),
        processing_class=transformers.AutoTokenizer.from_pretrained(MODEL))


def main() -> None:
    for checkpoint in (None, f"{OUTPUT}/checkpoint-{STEPS // 2}"):  # whole, then resumed
        torch.manual_seed(0)
        model = inject(load_base(), MATRICES, RANK)
        groups = parameter_groups(model, LEARNING_RATE)  # Lambda learns faster
        trainer = make_trainer(model, torch.optim.AdamW(groups, weight_decay=0.0))
        moves = MoveRanks(trainer)
        trainer.add_callback(moves)
        print(f"held-out loss before: {trainer.evaluate()['eval_loss']:.6f}")
        trainer.train(resume_from_checkpoint=checkpoint)
        print(f"held-out loss after: {trainer.evaluate()['eval_loss']:.6f}")
    print(f"ranks: {moves.allocator.ranks()}")
    export_peft(trainer.model, f"{OUTPUT}/peft", MODEL)
    loaded = peft.PeftModel.from_pretrained(load_base(), f"{OUTPUT}/peft")
    print(f"held-out loss of the export: {make_trainer(loaded).evaluate()['eval_loss']:.6f}")


if __name__ == "__main__":
    main()
