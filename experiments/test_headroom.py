"""The laws of experiments/headroom.py: which ranks a cut update keeps, and what it computes."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reproduce
from experiments import headroom, report
from experiments.conftest import arguments_of, array

wanted = st.lists(st.floats(0, 6), min_size=1, max_size=4)


def allocations(n, total, least):
    """All lists of n ranks of this sum."""
    return [x for x in itertools.product(range(least, total + 1), repeat=n) if sum(x) == total]


@given(wanted, st.integers(0, 6))
def test_rounded_ranks_are_those_of_this_sum_next_to_the_wanted(wanted, more):
    """By brute force over all maps of ranks >= 1: none of this sum is nearer."""
    total = len(wanted) + more
    found = headroom.rounded({str(i): x for i, x in enumerate(wanted)}, total)
    distance = lambda ranks: sum((a - b) ** 2 for a, b in zip(ranks, wanted))
    least = min(map(distance, allocations(len(wanted), total, 1)))
    assert sum(found.values()) == total and min(found.values()) >= 1
    assert distance(found.values()) == pytest.approx(least)


@given(st.lists(st.tuples(*[st.floats(0, 9)] * 3), min_size=1, max_size=3), st.data())
def test_the_largest_singular_values_lose_least(values, data):
    """By brute force over all maps: none of this sum leaves out a smaller sum of squares."""
    total = data.draw(st.integers(0, 3 * len(values)))
    values = [sorted(S, reverse=True) for S in values]
    found = headroom.largest({str(i): torch.tensor(S) for i, S in enumerate(values)}, total)
    left_out = lambda ranks: sum(s**2 for S, r in zip(values, ranks) for s in S[r:])
    possible = [x for x in allocations(len(values), total, 0) if max(x) <= 3]
    assert sum(found.values()) == total
    assert left_out(found.values()) == pytest.approx(min(map(left_out, possible)), abs=1e-4)


@pytest.fixture(scope="module")
def truncated(tiny, tmp_path_factory):
    """A LoRA run of rank 64, ElaLoRA runs of ranks 2 and 4, and what headroom.py writes of them."""
    folder = tmp_path_factory.mktemp("headroom")
    common = [*arguments_of(tiny, "stsb"), "--epochs", "1", "--output-dir", str(folder / "runs")]
    common += ["--set", "batch_size=16", "learning_rate=0.05", "warmup=2", "stabilize=3"]
    for arguments in (["--method", "lora", "--rank", "64"], ["--rank", "2", "4"]):
        reproduce.main([*common, "interval=2", *arguments])
    arguments = ["stsb", folder / "runs", "--maps", folder / "runs", "--shuffles", "3"]
    headroom.main([*map(str, arguments), "--output-dir", str(folder / "found")])
    return folder


def test_an_update_that_is_not_cut_computes_what_was_trained(truncated):
    """All of the update gives the metrics of the LoRA run; none of it other ones; fewer ranks
    others again. Every map that is shuffled is evaluated."""
    rows = json.loads((truncated / "found/stsb-truncated.json").read_text())["rows"]
    (results,) = truncated.glob("runs/stsb-lora-*/results.json")
    metrics = json.loads(results.read_text())["metrics"]
    by_map = {row["map"]: {name: row[name] for name in metrics} for row in rows if row["rank"] != 2}
    assert by_map["whole update"] == pytest.approx(metrics, abs=1e-4)
    assert by_map["no update"] != pytest.approx(metrics, abs=1e-2)
    assert by_map["even"] != pytest.approx(metrics, abs=1e-4)
    names = ["even", "largest singular values", "ElaLoRA's", *["ElaLoRA's, shuffled"] * 3]
    assert [row["map"] for row in rows] == ["no update", "whole update", *2 * names]


def test_the_svd_is_that_of_the_update_which_peft_adds(truncated, tiny):
    """Of every matrix, U S V' is what PEFT's own merge adds to its weight, and no more of it is
    added than a map says."""
    import peft

    from experiments import glue
    from experiments.conftest import tiny_problem

    (folder,) = (path.parent for path in truncated.glob("runs/stsb-lora-*/results.json"))
    problem, base = (tiny_problem(tiny, task="stsb") for _ in range(2))
    update = headroom.learned(folder, problem)
    merged = peft.PeftModel.from_pretrained(base.model, folder / "peft").merge_and_unload()
    for name, (U, S, Vh) in update.items():
        before = array(problem.model.get_submodule(name).weight)
        added = array(merged.get_submodule(name).weight) - before
        np.testing.assert_allclose(array(U * S @ Vh), added, atol=1e-5)
        assert np.abs(added).max() > 1e-3
    assert len(update) == 12 and glue.find_heads(problem.model) == ["pooler", "classifier"]
    for head in ("pooler", "classifier"):
        expected = merged.get_submodule(head).state_dict()
        torch.testing.assert_close(problem.model.get_submodule(head).state_dict(), expected)


def test_the_doses_are_twice_what_elaloras_mean_map_has_beyond_even_ranks(truncated):
    """Added and subtracted, as far as every matrix keeps a rank."""
    for rank in (2, 4):
        (results,) = truncated.glob(f"runs/stsb-elalora-r{rank}-*/results.json")
        found = json.loads(results.read_text())["ranks"]
        assert len({*found.values()}) > 1
        for times in (2, -2):
            dose = json.loads((truncated / f"found/stsb-r{rank}-dose{times:+}.json").read_text())
            wanted = [rank + times * (r - rank) for r in found.values()]
            if min(wanted) >= 1:
                assert [*dose.values()] == wanted
            assert sum(dose.values()) == rank * len(found) and min(dose.values()) >= 1


def test_the_page_has_a_row_for_every_way_to_cut(truncated):
    """With the number of evaluations, and a picture."""
    report.main([str(truncated / "found")])
    page = (truncated / "found/README.md").read_text()
    for row in ("no update, mean rank 0 ", "whole update, mean rank 64 ", "even, mean rank 2 "):
        assert f"| {row}" in page
    assert (truncated / "found/truncated.png").exists()
