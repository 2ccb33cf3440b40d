"""The laws of README.md and results/: its code runs, and what it says was measured was measured."""

import inspect
import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

import reproduce
from elalora import RankAllocator, SVDLinear, adapter_state_dict, inject, orthogonality_penalty
from experiments import report
from experiments.conftest import ROOT, torchrun

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.dense = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x):
        return x + self.dense(torch.tanh(self.query(x)))


class Net(nn.Module):
    """What stands for the reader's model: two blocks of 6 -> 5 -> 6 and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.head = nn.Sequential(Block(), Block()), nn.Linear(6, 2)

    def forward(self, x):
        logits = self.head(self.layers(x))
        return SimpleNamespace(loss=logits.square().mean(), logits=logits)


def block_with(text):
    """The only block in which the text occurs."""
    (block,) = (block for block in BLOCKS if text in block)
    return block


def trainable(model):
    return [w for w in model.parameters() if w.requires_grad]


# ---- Its code ----
def test_the_loops_of_the_readme_train_save_load_and_merge(tmp_path, monkeypatch):
    """With a model and data in place of the reader's; singular values get a rate of their own."""
    assert len(BLOCKS) == 5
    monkeypatch.chdir(tmp_path)
    loader = [{"x": torch.randn(4, 6)} for _ in range(1740)]
    injected = Net()
    names = dict(load_base_model=Net, model=injected, loader=loader, torch=torch)
    exec(compile(block_with("for batch in loader:\n    loss = model("), "README.md", "exec"), names)
    held = [w for group in names["optimizer"].param_groups for w in group["params"]]
    assert held == trainable(injected)
    exec(compile(block_with("groups = {"), "README.md", "exec"), names)
    rates = {w: group["lr"] for group in names["optimizer"].param_groups for w in group["params"]}
    adapted = [layer for layer in injected.modules() if isinstance(layer, SVDLinear)]
    expected = {w: 5e-4 for w in trainable(injected)} | {layer.Lambda: 5e-3 for layer in adapted}
    assert rates == expected
    exec(compile(block_with("export_peft(model"), "README.md", "exec"), names)
    assert not any(isinstance(module, SVDLinear) for module in names["model"].modules())
    x = torch.randn(4, 6)
    torch.testing.assert_close(names["model"](x).logits, injected(x).logits)
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()


SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)


@pytest.mark.parametrize("kind", ["classifier", "language model"])
def test_the_trainer_of_the_readme_trains_like_algorithm_1_and_resumes(kind, tmp_path, monkeypatch):
    """With accumulation, clipping and a checkpoint it is the plain loop; resumed, it ends alike."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (48, 6), generator=generator)
    if kind == "classifier":
        targets, heads, labels = ["query", "output.dense"], ["pooler", "classifier"], ids[:, 0] % 2
        config = transformers.BertConfig(
            **SIZES, intermediate_size=32, hidden_dropout_prob=0, attention_probs_dropout_prob=0
        )
        base = transformers.BertForSequenceClassification
    else:  # whose loss the Trainer would divide by its number of tokens; rows of unlike length
        targets, heads, labels = ["q_proj", "down_proj"], [], ids.clone()
        labels[::3, 2:] = -100
        config = transformers.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1)
        base = transformers.LlamaForCausalLM
    rows = [dict(input_ids=x, labels=y) for x, y in zip(ids, labels)]

    def fresh():
        torch.manual_seed(0)
        return inject(base(config), targets, 2, modules_to_save=heads)

    def train(model, **kwargs):
        arguments = transformers.TrainingArguments(
            "out", max_steps=24, per_device_train_batch_size=2, gradient_accumulation_steps=4,
            max_grad_norm=1.0, learning_rate=0.05, lr_scheduler_type="constant", save_steps=12,
            optim="sgd", report_to=[], disable_tqdm=True, use_cpu=True, seed=5,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        names = dict(injected=model, arguments=arguments, dataset=rows)
        resumed = "trainer.train(resume_from_checkpoint=True)" if kwargs else "trainer.train()"
        code = block_with("class ElaLoRATrainer").replace("trainer.train()", resumed)
        exec(compile(code, "README.md", "exec"), names)
        return names["trainer"]

    trainer = train(fresh())
    allocators = [getattr(c, "allocator", None) for c in trainer.callback_handler.callbacks]
    (allocator,) = filter(None, allocators)
    assert allocator.t == 24 and len(set(allocator.ranks().values())) > 1
    # The plain loop
    plain = fresh()
    optimizer = torch.optim.SGD(trainable(plain), 0.05)
    own = RankAllocator(plain, optimizer, allocator.schedule, 1)
    plain.train()
    for step in range(24):
        index = torch.arange(8 * step, 8 * step + 8) % 48
        parts = list(zip(ids[index].split(2), labels[index].split(2)))
        for x, y in parts:
            (plain(input_ids=x, labels=y).loss / 4).backward()
        (0.1 * orthogonality_penalty(plain)).backward()
        nn.utils.clip_grad_norm_(trainable(plain), 1.0)
        optimizer.step()
        own.step()
        optimizer.zero_grad()
    assert own.ranks() == allocator.ranks()
    expected = adapter_state_dict(plain)
    torch.testing.assert_close(adapter_state_dict(trainer.model), expected, rtol=1e-3, atol=1e-4)
    # From the checkpoint of step 12
    whole = adapter_state_dict(trainer.model)
    shutil.rmtree("out/checkpoint-24")
    resumed = train(fresh(), resume=True)
    assert resumed.state.global_step == 24
    got = adapter_state_dict(resumed.model)
    assert all(torch.equal(got[key], value) for key, value in whole.items())


DDP = f"""
import sys
from types import SimpleNamespace

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from elalora import RankAllocator, RankSchedule, adapter_state_dict, inject, orthogonality_penalty

{inspect.getsource(Block)}
{inspect.getsource(Net)}

def train(wrap, process, processes):
    model = inject(Net(), ["query", "dense"], 2, modules_to_save=["head"])
    optimizer = torch.optim.SGD((w for w in model.parameters() if w.requires_grad), lr=0.1)
    allocator = RankAllocator(model, optimizer, RankSchedule(24, 4, 4, 4, 2), k=1)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 6, generator=generator) for _ in range(24)]
    names = dict(model=model, optimizer=optimizer, allocator=allocator,
                 orthogonality_penalty=orthogonality_penalty, DistributedDataParallel=wrap,
                 loader=[dict(x=x[process::processes]) for x in batches])
    exec({block_with("DistributedDataParallel(")!r}, names)
    assert allocator.t == 24
    return adapter_state_dict(model)

if __name__ == "__main__":
    distributed.init_process_group("gloo")
    process = distributed.get_rank()
    torch.save(train(DistributedDataParallel, process, 2), f"{{sys.argv[1]}}/{{process}}.pt")
"""


def test_the_readmes_distributed_data_parallel_equals_one_process(tmp_path):
    """Two gloo processes have the same bits, and nearly what one with the whole batch has."""
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    result = torchrun(script, tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    zero, one = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    assert zero.keys() == one.keys() and all(torch.equal(zero[key], one[key]) for key in zero)
    alone = {"__name__": "alone"}
    exec(DDP, alone)
    expected = alone["train"](lambda model: model, 0, 1)
    torch.testing.assert_close(zero, expected, rtol=1e-3, atol=1e-4)
    assert len({value.numel() for key, value in expected.items() if "Lambda" in key}) > 1


# ---- What was measured ----
OVERVIEW = ROOT / "results/README.md"
PAGES = {page.parent.name: page for page in sorted(ROOT.glob("results/*/README.md"))}


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_of_results_are_what_report_makes_of_the_runs_beside_them(
    name, tmp_path, monkeypatch
):
    """Nobody wrote in them by hand. (Pictures are not drawn here.)"""
    folder, write = tmp_path / name, report.write
    shutil.copytree(PAGES[name].parent, folder, ignore=shutil.ignore_patterns("*.png", "*.md"))
    monkeypatch.setattr(report, "write", lambda path, *x: path.suffix == ".md" and write(path, *x))
    report.costs(folder) if name.startswith("benchmark-") else report.compare(folder)
    assert (folder / "README.md").read_text() == PAGES[name].read_text()


def measured(text):
    """Numbers of two decimals or more, but no versions, and pairs of them: (word between, ...)."""
    number = r"(?<![\d.,])[-+]?\d[\d,]*\.\d\d+(?!\.?\d)"
    pairs = re.findall(rf"({number})(?: (±|to) ({number}))?", text)
    return [(word, a, *[b] * bool(b)) for a, word, b in pairs]


def says(page, word, *quoted):
    """Whether a page has these numbers, with their signs, to the digits that are quoted."""
    value = lambda x: float(x.replace(",", ""))
    unit = lambda x: 10 ** -len(x.partition(".")[2])
    return any(
        word == other and all(abs(value(x) - value(y)) < 0.501 * unit(x) for x, y in zip(quoted, z))
        for other, *z in measured(page)
    )


def test_numbers_in_the_overview_are_in_the_pages_that_it_links_beside_them():
    """In its paragraphs and rows of tables: numbers of two decimals or more, deviations,
    intervals."""
    checked = 0
    for paragraph in re.split(r"\n\n+|\n(?=\|)", OVERVIEW.read_text()):
        names = re.findall(r"\]\(([\w-]+)/README.md\)", paragraph)
        if not names or names[0].startswith("benchmark-"):
            continue  # whose intervals are columns
        pages = "\n".join(PAGES[name].read_text() for name in names)
        singles = re.sub(" (±|to) ", " | ", pages)  # the first of a pair is a number, too
        for word, *quoted in measured(paragraph):
            assert says(pages if word else singles, word, *quoted), (word, quoted, paragraph)
            checked += 1
    assert checked > 40


@pytest.mark.parametrize("path", [ROOT / "README.md", OVERVIEW], ids=["README", "results"])
def test_every_mean_and_interval_is_in_a_page_of_results(path):
    """Whatever is given as mean ± deviation, or as an interval with signs."""
    pages = "".join(page.read_text() for page in PAGES.values())
    text = " ".join(path.read_text().split())
    quoted = re.findall(r"[-+]?[\d.,]+ ± [\d.,]*\d|[-+][\d.]+ to [-+][\d.]*\d", text)
    assert [part for part in quoted if part.lstrip("+") not in pages] == []


@pytest.mark.parametrize("path", [ROOT / "README.md", OVERVIEW], ids=["README", "results"])
def test_what_is_linked_is_there(path):
    """Files and folders of this project, and the pictures."""
    links = re.findall(r"\]\(([^)#]+)", path.read_text())
    local = [link for link in links if "://" not in link and "/commit/" not in link]
    assert local and [link for link in local if not (path.parent / link).exists()] == []


def test_every_command_is_one_that_reproduce_takes():
    """In the README and on the pages of results."""
    commands = [
        line
        for page in (ROOT / "README.md", OVERVIEW, *PAGES.values())
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
        for line in block.splitlines()
        if line.startswith("python reproduce.py")
    ]
    assert len(commands) > 40
    for command in commands:
        reproduce.parse_arguments(shlex.split(command, comments=True)[2:])
