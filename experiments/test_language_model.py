"""The laws of language_model.py, on articles and a model that are made here."""

import argparse
import json

import pytest
import tokenizers
import torch
import transformers

from experiments import language_model, report
from experiments.conftest import torchrun
from experiments.test_xsum import WORDS, save_split


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a tiny Llama and its tokenizer in llama/, and XSum as the hub has it."""
    root = tmp_path_factory.mktemp("language")
    (root / "xsum/data").mkdir(parents=True)
    for split, n in (("train", 26), ("validation", 33)):
        save_split(root / "xsum/data", split, n)
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([" ".join(WORDS)] * 20, vocab_size=300, special_tokens=["<s>", "</s>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(root / "llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, vocab_size=300, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(root / "llama")
    return root


def command(given, *rest):
    return ["--model", str(given / "llama"), "--data-dir", str(given / "xsum"), "--rank", "2",
            "--steps", "12", *rest]  # fmt: skip


def results_of(name):
    return json.loads(open(f"runs/{name}/results.json").read())


def test_the_labels_are_the_summary_and_its_end(given):
    """All else of a row is the article's begin and the prompt, which nothing is learned of."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(given / "llama")
    args = argparse.Namespace(data_dir=str(given / "xsum"), steps=12)
    train, evaluation = language_model.load_rows(args, tokenizer)
    assert len(train) == 24 and len(evaluation) == 32
    source = language_model.load_splits(
        args.data_dir, "", None, ("document", "summary"), ("train", "validation"))  # fmt: skip
    for rows, split in zip((train, evaluation), source):
        for row, original in zip(rows, split):
            learned = [token for token in row["labels"] if token != -100]
            given_tokens = row["input_ids"][: -len(learned)]
            assert row["input_ids"] == given_tokens + learned and learned[-1] == 1
            assert f" {original['summary']}".startswith(tokenizer.decode(learned[:-1]))
            article, end, _ = tokenizer.decode(given_tokens).partition(language_model.PROMPT)
            assert end and original["document"].startswith(article.removeprefix("<s>"))


def test_two_processes_train_as_one_and_the_adapter_is_pefts(given, tmp_path, monkeypatch):
    """The same steps, losses and ranks; LoRA sees as many steps, and the page has all three."""
    monkeypatch.chdir(tmp_path)
    language_model.main(command(given))
    language_model.main(command(given, "--method", "lora"))
    result = torchrun("-m", "experiments.language_model", *command(given), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    one, lora = results_of("xsum-elalora-r2-s0"), results_of("xsum-lora-r2-s0")
    two = results_of("xsum-elalora-r2-processes=2-s0")
    for results in (one, two, lora):
        assert results["total_steps"] == 12 and sum(results["ranks"].values()) == 2 * 14
    assert one["ranks"] == two["ranks"] and one["adjustments"] and len({*one["ranks"].values()}) > 1
    assert one["metrics"]["logits_differ_in_peft_by"] < 1e-4
    losses = [[row["train_loss"] for row in r["history"]] for r in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    loss, other = (r["metrics"]["evaluation_loss"] for r in (one, two))
    assert loss == pytest.approx(other, rel=1e-3)  # a mean over batches, which are others
    page = (tmp_path / "runs/README.md").read_text()
    assert all(f"| {run} " in page for run in ("ElaLoRA", "ElaLoRA, 2 processes", "LoRA"))
    assert (tmp_path / "runs/curves.png").exists() and report.MARK in page


def test_the_evaluation_loss_is_that_of_the_summaries(given, tmp_path, monkeypatch):
    """The mean over the batches of two, of the model that PEFT loads from the export."""
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    language_model.main(command(given))
    base = transformers.AutoModelForCausalLM.from_pretrained(given / "llama")
    model = peft.PeftModel.from_pretrained(base, "runs/xsum-elalora-r2-s0/peft").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(given / "llama")
    args = argparse.Namespace(data_dir=str(given / "xsum"), steps=12)
    _, rows = language_model.load_rows(args, tokenizer)
    losses, counts = [], []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"])[1:]
            kept = labels != -100
            losses.append(torch.nn.functional.cross_entropy(logits[kept], labels[kept]).item())
            counts.append(kept.sum().item())
    pairs = [(losses[i] * counts[i] + losses[i + 1] * counts[i + 1]) / (counts[i] + counts[i + 1])
             for i in range(0, 32, 2)]  # fmt: skip
    expected = sum(pairs) / len(pairs)
    assert results_of("xsum-elalora-r2-s0")["metrics"]["evaluation_loss"] == pytest.approx(
        expected, rel=1e-3)  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rank", "0"], "needs --rank >= 1"),
        (["--steps", "9"], "--steps >= 10"),
        (["--steps", "14"], "--steps 14 needs"),
        (["--model", "./nowhere"], "--model: ./nowhere is no folder"),
        (["--data-dir", "nowhere"], "--data-dir: nowhere is no folder"),
    ],
)
def test_bad_input_is_an_error_before_any_work(arguments, message, given, refusal):
    """It names the value, and nothing is written."""
    assert message in refusal(*command(given), *arguments, main=language_model.main)


def test_what_is_exported_has_the_ranks_that_were_found(given, tmp_path, monkeypatch):
    """And the seed decides them: another run of it is the same to the last digit."""
    monkeypatch.chdir(tmp_path)
    runs = []
    for folder in ("a", "b"):
        language_model.main(command(given, "--output-dir", folder))
        results = json.loads(open(f"{folder}/xsum-elalora-r2-s0/results.json").read())
        config = json.loads(open(f"{folder}/xsum-elalora-r2-s0/peft/adapter_config.json").read())
        ranks = {name.removeprefix("^").replace("\\", ""): rank
                 for name, rank in config["rank_pattern"].items()}  # fmt: skip
        assert ranks == results["ranks"]
        runs.append((results["history"], results["ranks"], results["adjustments"]))
    assert runs[0] == runs[1]
