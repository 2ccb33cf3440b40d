"""The laws of experiments/baselines.py: LoRA, AdaLoRA and the frozen model are fair comparisons."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import reproduce
from experiments import baselines, glue
from experiments.conftest import (
    arguments_of, array, end_of, prepared, tiny_config, tiny_problem)
from experiments.problem import DEVICE, trained


@pytest.mark.parametrize("method", ["elalora", "lora", "adalora"])
def test_every_method_starts_as_the_base_and_adapts_the_same_at_the_same_scale(method, tiny):
    """Same first outputs; the same matrices and heads train; alpha / rank scales every update."""
    problem, training = prepared(method, tiny)
    base = prepared("frozen", tiny)[0].model.eval()
    ids = torch.randint(5, 40, (3, 7)).to(DEVICE)
    model = problem.model.eval()
    torch.testing.assert_close(model(ids).logits, base(ids).logits)
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "base_layer")}
    assert len(layers) == 12 and layers.keys() == training.allocator.ranks().keys()
    for layer in layers.values():
        if method == "adalora":
            scale = layer.scaling["default"] / layer.ranknum["default"].item()
        else:
            scale = layer.scaling if method == "elalora" else layer.scaling["default"]
        assert float(scale) == pytest.approx(16 / 2)
    names = {*trained(model)}
    factors = {name for name in names if any(name.startswith(f"{layer}.") for layer in layers)}
    assert len(factors) == 12 * (2 if method == "lora" else 3)
    assert {name.split(".")[0] for name in names - factors} == {"pooler", "classifier"}
    assert len(names - factors) == 4
    held = {w for group in training.optimizer.param_groups for w in group["params"]}
    assert held == {*trained(model).values()}


def test_adaloras_penalty_is_pefts(tiny):
    """What PEFT's own model adds to the loss: gamma times the mean over 2N of |A A' - I|."""
    problem, training = prepared("adalora", tiny)
    model, batch = problem.model.eval(), problem.batches(1)[0]
    norms = []
    for name, w in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            A = array(w if "lora_A" in name else w.T)
            norms.append(np.linalg.norm(A @ A.T - np.eye(len(A))))
    penalty = training.penalty().item()
    assert len(norms) == 2 * 12 and penalty == pytest.approx(0.1 * np.mean(norms))
    whole = training.allocator.adapted.base_model(**batch).loss.item()
    assert problem.loss(model, batch).item() + penalty == pytest.approx(whole)


def test_eva_sees_tokens_and_no_padding():
    """And all relative positions of DeBERTa, which are no texts."""
    x, mask = torch.randn(3, 4, 5), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    tokens = torch.stack([x[0, 0], x[0, 1], *x[1], x[2, 0]])
    assert torch.equal(baselines.without_padding(x, mask), tokens)
    assert torch.equal(baselines.without_padding(x[:1], mask), x[0])


def test_eva_starts_with_the_directions_in_which_inputs_vary_most(tiny):
    """By NumPy's SVD of all inputs of a matrix but for padding; the ranks are as many as elsewhere,
    and B = 0, so that the model computes what its base does."""
    config = tiny_config(tiny, method="eva")
    recipe = replace(glue.RECIPES["rte"][2], warmup=0, stabilize=0, interval=1)
    base, inputs = tiny_problem(tiny), {}
    chunks = [chunk for batch in base.batches(0) for chunk in batch]

    def record(name, x):
        mask = chunk["attention_mask"].bool()
        tokens = x[mask] if x.shape[:2] == mask.shape else x[0]  # relative positions
        inputs.setdefault(name, []).append(array(tokens))

    for name in base.targets:
        hook = lambda module, args, output, name=name: record(name, args[0])
        base.model.get_submodule(name).register_forward_hook(hook)
    base.model.eval()
    for chunk in chunks:
        base.loss(base.model, [chunk])
    problem = tiny_problem(tiny)
    allocator = reproduce.prepare(problem, config, recipe).allocator
    assert sum(allocator.ranks().values()) == 2 * 12 and max(allocator.ranks().values()) <= 4
    found = allocator.ranks()
    name, layer = allocator.layers.popitem()  # as PEFT removes a layer that gets no rank
    assert allocator.ranks() == found | {name: 0} and {*found} == {*problem.targets}
    allocator.layers[name] = layer
    for name, layer in allocator.layers.items():
        x = np.concatenate(inputs[name])
        _, _, Vh = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
        first = array(layer.lora_A["default"].weight)[0]
        assert abs(first @ Vh[0]) / np.linalg.norm(first) > 0.9
        assert not layer.lora_B["default"].weight.any()


def test_eva_resumes_bit_for_bit(tiny, tmp_path):
    """Its ranks are found again before the checkpoint is loaded."""
    config = tiny_config(tiny, method="eva")
    recipe = replace(glue.RECIPES["rte"][2], epochs=3, warmup=0, stabilize=0, interval=1)

    def make():
        torch.manual_seed(0)
        return tiny_problem(tiny), config, recipe

    expected = end_of(make, tmp_path / "whole.pt")
    assert end_of(make, tmp_path / "parts.pt", stops=[2, 3]) == expected


@pytest.mark.parametrize("ratio, start", [(1.5, 3), (3.0, 6)])
def test_adalora_ends_at_the_rank_of_the_others(tiny, ratio, start):
    """It starts at a multiple of the rank; after its search as many are left as elsewhere."""
    problem, training = prepared("adalora", tiny, init_ratio=ratio)
    E = [w for name, w in problem.model.named_parameters() if "lora_E" in name]
    assert sum(w.numel() for w in E) == 12 * start
    for _, batch in zip(range(20), problem.batches(1)):
        reproduce.train_step(problem, batch, training)
    assert sum(w.count_nonzero() for w in E) == 12 * 2 == sum(training.allocator.ranks().values())


def test_adaloras_scores_are_equation_2s_of_the_ranks_it_kept(small_planted, tmp_path):
    """Averages times uncertainties, summed over a rank's weights as in eq. 2; of 6 ranks in each
    matrix 4 are left in the mean at the end of the search."""
    problem, config, recipe = small_planted("adalora")
    allocator, log = reproduce.train(problem, config, recipe, None, tmp_path / "checkpoint.pt")
    assert [*log["scores"]] == [recipe.warmup, 40 - recipe.stabilize]
    begin, end = log["scores"].values()
    assert (len(begin), len(end)) == (12 * 6, 12 * 4) and sum(allocator.ranks().values()) == 12 * 4
    expected, tuner = [], allocator.tuner
    for name, kept in allocator.kept.items():
        names = {factor: f"{name}.lora_{factor}.default" for factor in "AEB"}
        s = {f: array(tuner.exp_avg_ipt[n]) * array(tuner.exp_avg_unc[n]) for f, n in names.items()}
        S = s["A"].mean(axis=1) + s["E"][:, 0] + s["B"].mean(axis=0)
        expected += [score for score, keep in zip(S, kept) if keep]
    np.testing.assert_allclose(end, expected, rtol=6e-3)  # the log has three digits


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # by PEFT, of AdaLoRA's own
def test_the_adapters_of_other_methods_load_in_peft(tiny, tmp_path, monkeypatch):
    """What their runs write gives the metrics of the run, with as many weights as the run says:
    those of the ranks that AdaLoRA kept."""
    import peft
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    settings = ["batch_size=16", "learning_rate=0.05", "warmup=2", "stabilize=3", "interval=2"]
    methods = ["lora", "eva", "adalora"]
    arguments = [*arguments_of(tiny, "stsb"), "--epochs", "1", "--method", *methods]
    reproduce.main([*arguments, "--set", *settings])
    for method in methods:
        (folder,) = tmp_path.glob(f"runs/stsb-{method}-r4-*-s0")
        results = json.loads((folder / "results.json").read_text())
        problem = tiny_problem(tiny, task="stsb")
        before = problem.evaluate(True)
        loaded = peft.PeftModel.from_pretrained(problem.model, folder / "peft").eval()
        assert loaded.base_model.model is problem.model
        assert problem.evaluate(True) == pytest.approx(results["metrics"], abs=1e-3)
        assert before != pytest.approx(results["metrics"], abs=0.02)
        state = load_file(folder / "peft/adapter_model.safetensors")
        size = sum(w.numel() for name, w in state.items() if ".lora_" in name)
        assert results["adapter_parameters"] == size
        assert sum(results["ranks"].values()) == 4 * 12


def test_the_frozen_floor_goes_back_to_the_embeddings_and_trains_the_head_alone(tiny):
    """Gradients reach the first layer's input, as they must for any method, but no base weight."""
    problem, training = prepared("frozen", tiny)
    reached = []
    embeddings = problem.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda m, x, y: y.register_hook(reached.append) and None)
    before = copy.deepcopy(problem.model.state_dict())
    for batch in problem.batches(1)[:4]:  # the first at a learning rate of 0
        reproduce.train_step(problem, batch, training)
    assert reached[-1].abs().sum() > 0
    moved = {k for k, v in problem.model.state_dict().items() if not torch.equal(v, before[k])}
    assert {name.split(".")[0] for name in moved} == {"pooler", "classifier"}
