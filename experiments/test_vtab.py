"""The laws of experiments/vtab.py: what is adapted, what is read, what is evaluated."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from experiments import vtab
from experiments.conftest import config_of, make_problem
from experiments.tables import recipe_of


def test_a_zip_and_its_folder_hold_the_same_examples(world, tmp_path, monkeypatch):
    """Pixels are those of the checkpoint's own processor, labels those of the lists."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "vtab", "data")
    shutil.copytree(world / "vit", "vit")
    processor = transformers.AutoImageProcessor.from_pretrained("vit", backend="pil")
    splits = vtab.load_images("cifar", "data", "vit")
    with zipfile.ZipFile("data/vtab-1k.zip", "w") as archive:
        for path in Path("data/vtab-1k").rglob("*"):
            archive.write(path, path.relative_to("data"))
    shutil.rmtree("data/vtab-1k/cifar")
    Path("data/vtab-1k").rmdir()
    vtab.load_images.cache_clear()
    zipped = vtab.load_images("cifar", "data", "vit")
    assert splits[3] == zipped[3] == 3
    shutil.unpack_archive("data/vtab-1k.zip", "unpacked")
    for name, split, other in zip(("train800", "val200", "test"), splits, zipped):
        lines = Path(f"unpacked/vtab-1k/cifar/{name}.txt").read_text().splitlines()
        assert len(split) == len(other) == len(lines)
        for line, b in zip(lines, other):
            path, label = line.split()
            image = Image.open(f"unpacked/vtab-1k/cifar/{path}").convert("RGB")
            pixels = processor(image, return_tensors="pt")["pixel_values"][0]
            assert torch.equal(pixels, b["pixel_values"]) and b["labels"] == int(label)
    assert all(
        torch.equal(a["pixel_values"], b["pixel_values"])
        for old, new in zip(splits[:2], zipped[:2])
        for a, b in zip(old, new)
    )


def test_accuracies_and_losses_are_those_of_the_images(world):
    """On val200 after every epoch and on the test images after the last, counted by hand; with
    --holdout not on the test images."""
    config = config_of(world, "cifar")
    problem = make_problem(config, recipe_of(config))
    problem.model.eval()
    assert problem.floor == {"val_accuracy": 2 / 6, "accuracy": 3 / 9}
    assert [*problem.evaluate(False)] == ["val_accuracy", "val_loss"]
    metrics = problem.evaluate(True)
    _, val, test, _ = vtab.load_images("cifar", config.data_dir, config.model)
    for split, prefix in ((val, "val_"), (test, "")):
        guesses, losses = [], []
        for row in (split[i] for i in range(len(split))):
            logits = problem.model(pixel_values=row["pixel_values"][None].to(vtab.DEVICE)).logits
            guesses.append(int(logits.argmax()))
            losses.append(-logits.log_softmax(dim=1)[0, row["labels"]].item())
        right = sum(a == split[i]["labels"] for i, a in enumerate(guesses))
        assert metrics[f"{prefix}accuracy"] == right / len(split)
        assert metrics[f"{prefix}loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    held_out = config_of(world, "cifar", holdout=True)
    problem = make_problem(held_out, recipe_of(held_out))
    assert [*problem.evaluate(True)] == ["val_accuracy", "val_loss"]


def test_a_batch_has_its_images_in_their_order(world):
    """Though threads decode them, from a zip or a folder."""
    *_, test, _ = vtab.load_images("cifar", str(world / "vtab"), str(world / "vit"))
    order = [*range(len(test))][::-1]
    batch = test.__getitems__(order)
    assert [row["labels"] for row in batch] == [test[i]["labels"] for i in order]
    assert all(torch.equal(row["pixel_values"], test[i]["pixel_values"])
               for row, i in zip(batch, order))
