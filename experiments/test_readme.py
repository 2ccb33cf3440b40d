"""The laws of README.md and results/: its code runs, and what it says was measured was measured."""

import copy
import inspect
import re
import shlex
import shutil
import sys
import warnings
from types import SimpleNamespace

import accelerate
import numpy as np
import peft
import pytest
import torch
import transformers
from torch import nn

import reproduce
from elalora import (
    RankAllocator, RankSchedule, SVDLinear, adapter_state_dict, inject, merge,
    orthogonality_penalty)
from experiments import report, trainer
from experiments.conftest import ROOT, array, torchrun

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
    assert len(BLOCKS) == 8
    monkeypatch.chdir(tmp_path)
    loader = [{"x": torch.randn(4, 6)} for _ in range(1740)]
    injected = Net()
    names = dict(load_base_model=Net, model=injected, loader=loader, torch=torch)
    exec(compile(block_with('target_modules=["query'), "README.md", "exec"), names)
    held = [w for group in names["optimizer"].param_groups for w in group["params"]]
    assert held == trainable(injected)
    exec(compile(block_with("groups = {"), "README.md", "exec"), names)
    rates = {w: group["lr"] for group in names["optimizer"].param_groups for w in group["params"]}
    adapted = [layer for layer in injected.modules() if isinstance(layer, SVDLinear)]
    expected = {w: 5e-4 for w in trainable(injected)} | {layer.Lambda: 5e-3 for layer in adapted}
    assert rates == expected
    exec(compile(block_with("export_peft(model,"), "README.md", "exec"), names)
    assert not any(isinstance(module, SVDLinear) for module in names["model"].modules())
    x = torch.randn(4, 6)
    torch.testing.assert_close(names["model"](x).logits, injected(x).logits)
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()


def names_of_layers(config, kind):
    """A tiny model of one layer, and what the README's table names for it."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    sizes |= dict(d_model=16, encoder_layers=1, decoder_layers=1, num_key_value_heads=1)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(
        getattr(transformers, config)(**sizes, vocab_size=40, pad_token_id=0))
    name = config.removesuffix("Config").removesuffix("Text").rstrip("0123456789").removesuffix("V")
    (row,) = [row for row in README.splitlines() if re.match(rf"\| .*\b{name}", row, re.IGNORECASE)]
    return model, re.findall("`(.+?)`", row)


@pytest.mark.parametrize(
    "config, kind",
    [
        *[(f"{name}Config", "CausalLM") for name in ("Llama", "Qwen2", "Qwen3", "Mistral")],
        ("Gemma3TextConfig", "CausalLM"),
        *[(f"{n}Config", "SequenceClassification") for n in ("Bert", "Roberta", "DebertaV2")],
        ("BartConfig", "Seq2SeqLM"),
        ("ViTConfig", "ImageClassification"),
    ],
)  # fmt: skip
def test_the_names_of_the_readme_are_all_matrices_of_a_layer(config, kind):
    """What they leave out of the linear layers is the head."""
    model, names = names_of_layers(config, kind)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inject(model, names, 2)
    layers = {name for name, module in model.named_modules() if isinstance(module, SVDLinear)}
    heads = ("lm_head", "classifier", "pooler")
    assert layers == {name for name in linear if not name.removeprefix("bert.").startswith(heads)}


def test_the_trainer_of_the_readme_trains_and_exports(tmp_path, monkeypatch):
    """Word for word, with a tiny model in place of the reader's; test_trainer has its laws."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "trainer", trainer)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, vocab_size=40))  # fmt: skip
    arguments = transformers.TrainingArguments(
        "out", max_steps=12, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no")
    ids = torch.randint(40, (96, 6))
    names = dict(
        model=model, arguments=arguments, dataset=[dict(input_ids=x, labels=x) for x in ids])
    exec(compile(block_with("ElaLoRATrainer(").replace("rank=8", "rank=4"), "README.md", "exec"),
         names)  # fmt: skip
    assert names["trainer"].allocator.t == 12
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(merge(model)), "adapter")
    assert len(set(loaded.peft_config["default"].rank_pattern.values())) > 1


def test_accelerates_loop_of_the_readme_is_algorithm_1():
    """The allocator steps once for four micro-batches; ranks and weights are the plain loop's."""
    accelerate.state.GradientState._reset_state()  # of the Trainers before
    results = []
    micro = [dict(x=torch.randn(2, 6)) for _ in range(48)]
    for accelerator in (accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4), None):
        model = inject(Net(), ["query", "dense"], 2, modules_to_save=["head"])
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        allocator = RankAllocator(model, optimizer, RankSchedule(12, 2, 2, 2, 2), k=1)
        if accelerator:
            names = dict(
                accelerator=accelerator, model=model, allocator=allocator, loader=micro,
                orthogonality_penalty=orthogonality_penalty,
                optimizer=accelerator.prepare(optimizer))  # fmt: skip
            exec(block_with("accelerator.accumulate("), names)
        else:
            for i in range(0, 48, 4):
                loss = sum(model(**batch).loss for batch in micro[i : i + 4]) / 4
                (loss + 0.1 * orthogonality_penalty(model)).backward()
                optimizer.step()
                allocator.step()
                optimizer.zero_grad()
        assert allocator.t == 12 and len(set(allocator.ranks().values())) > 1
        results.append(adapter_state_dict(model))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_averaged_weights_of_the_readme_follow_the_ranks(tmp_path, monkeypatch):
    """Every rank's average is that of the rank itself since it was added, in float64 NumPy."""
    monkeypatch.chdir(tmp_path)
    model = inject(Net(), ["query", "dense"], 2, modules_to_save=["head"])
    model.layers[0].query.requires_grad_(False)  # a layer that no adjustment changes
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    allocator = RankAllocator(model, optimizer, RankSchedule(40, 2, 2, 2, 2, "constant"), k=1)
    vectors = lambda layer: np.concatenate([array(layer.P), array(layer.Lambda)[None],
                                            array(layer.Q).T]).T  # fmt: skip
    expected, moved = None, 0

    class Step:  # stands for the allocator, and follows every rank by itself
        def step(self):
            nonlocal expected, moved
            adjustment = allocator.step()
            present = {name: vectors(layer) for name, layer in allocator.layers.items()}
            if expected is None:
                expected = present  # the first update copies
                return adjustment
            moved += bool(adjustment and adjustment.expanded)
            for name, now in present.items():
                lost = adjustment.pruned.get(name, []) if adjustment else []
                kept = np.delete(expected[name], lost, axis=0)
                old = np.concatenate([kept, now[len(kept) :]])
                expected[name] = 0.9 * old + 0.1 * now
            return adjustment

    names = dict(
        model=model, optimizer=optimizer, allocator=Step(),
        loader=[dict(x=torch.randn(4, 6)) for _ in range(40)],
        orthogonality_penalty=orthogonality_penalty)  # fmt: skip
    with warnings.catch_warnings(action="error"):  # such as that the search has not ended
        exec(block_with("def follow(").replace("0.999", "0.9"), names)
    assert moved > 10 and (tmp_path / "averaged/adapter_model.safetensors").exists()
    for name, own in expected.items():
        averaged = vectors(names["averaged"].module.get_submodule(name))
        np.testing.assert_allclose(averaged, own, rtol=1e-4, atol=1e-5)


@torch._dynamo.config.patch(force_parameter_static_shapes=True)  # which the README changes
def test_the_readmes_model_is_compiled_once(monkeypatch):
    """Marked as the README says, it follows more adjustments than torch would compile for."""
    names = [str(i) for i in range(6)]
    model = inject(nn.Sequential(*(nn.Linear(24, 24) for _ in names)), names, 12)
    graphs, stock = [], torch.compile
    backend = lambda graph, inputs: graphs.append(graph) or graph.forward
    monkeypatch.setattr(torch, "compile", lambda model: stock(model, backend=backend))
    names = dict(model=model)
    exec(block_with("torch.compile(model)"), names)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    allocator = RankAllocator(model, optimizer, RankSchedule(12, 0, 2, 1, 1, "constant"), k=1)
    seen = set()
    for _ in range(11):
        seen.add(tuple(allocator.ranks().values()))
        x = torch.randn(4, 24)
        y = names["compiled"](x)
        torch.testing.assert_close(y, model(x))
        y.square().sum().backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    assert len(seen) > torch._dynamo.config.recompile_limit
    assert len(graphs) == 1


DDP = f"""
import sys
from types import SimpleNamespace
from unittest import mock

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
                 orthogonality_penalty=orthogonality_penalty,
                 loader=[dict(x=x[process::processes]) for x in batches])
    with mock.patch("torch.nn.parallel.DistributedDataParallel", wrap):
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
    report.write_page(folder)
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
