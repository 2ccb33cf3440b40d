"""What a training step costs, as a ratio to a step of PEFT's LoRA.

    python -m experiments.benchmark --rank 4

The model has DeBERTaV3-base's size and random weights. Every round is a step of each method on the
same batch of random tokens, in random order. A ratio is of two steps of one round, so that a
machine that slows down for a while slows both. (`reproduce.py --dry-run` times a step on a task.)
"""

import argparse
import random
from dataclasses import replace

import pandas
import torch.utils.benchmark
import tqdm
import transformers
from torch import nn

from experiments import glue
from experiments.data import matrices
from experiments.methods import METHODS
from experiments.problem import DEVICE, Problem, autocast, best_dtype, commit, versions
from experiments.tables import Config, Recipe
from experiments.training import train_step

ROUNDS, WARM_UP, TEXTS, TOKENS = 40, 5, 8, 128
STEP = Recipe(TEXTS, 1e-4, 1, 0, 0, 5, 4, 1, shape="constant")  # every fifth step moves 4 ranks
ENCODER = dict(
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    relative_attention=True, position_buckets=256, pos_att_type=["p2c", "c2p"],
    share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False)
timer = torch.utils.benchmark.timer  # waits for the GPU


def random_tokens(config: Config) -> Problem:
    """Texts of one length for an encoder of random weights."""
    encoder = transformers.DebertaV2Config(**ENCODER)
    model = transformers.DebertaV2ForSequenceClassification(encoder).to(DEVICE)
    targets = matrices(model, glue.adapted_kinds(model), config)
    ids = torch.randint(5, encoder.vocab_size, (ROUNDS, TEXTS, TOKENS)).to(DEVICE)
    batches = [dict(input_ids=x, labels=x[:, 0] % 2) for x in ids]

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        with autocast(config):
            return model(**batch).loss

    return Problem(model, targets, glue.find_heads(model), ROUNDS, lambda epoch: batches, loss,
                   lambda last: {})


def measure(config: Config) -> pandas.DataFrame:
    """Milliseconds of a step: a row a round after the warm-up, a column a method."""
    problems, methods = {}, {}
    for name in METHODS:
        transformers.set_seed(config.seed)
        problems[name] = random_tokens(config)
        methods[name] = METHODS[name](problems[name], replace(config, method=name), STEP, {})
        problems[name].model.train()
    rows = []
    for batch in tqdm.tqdm(problems["lora"].batches(1)):
        row = {}
        for name in random.sample([*methods], len(methods)):
            start = timer()
            train_step(problems[name], batch, methods[name])
            row[name] = 1000 * (timer() - start)
        rows.append(row)
    return pandas.DataFrame(rows, columns=[*methods])[WARM_UP:]


def table(ms: pandas.DataFrame) -> str:
    """A row a method, from what measure() returns."""
    rows = ms.div(ms["lora"], axis="index").quantile([0.25, 0.5, 0.75]).T
    rows.columns = [f"step / LoRA's, {name}" for name in ("1st quartile", "median", "3rd")]
    return rows.assign(**{"median ms": ms.median()}).to_markdown(floatfmt=".3f")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="experiments.benchmark", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rank", type=int, default=4, help="default: 4")
    rank = parser.parse_args(argv).rank
    ms = measure(Config("random tokens", "lora", rank, 0, dtype=best_dtype()))
    print(f"{table(ms)}\n\nrank {rank}, {best_dtype()}, {versions()}, {commit()}")


if __name__ == "__main__":
    main()
