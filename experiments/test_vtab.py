"""The laws of experiments/vtab.py: what is read, what is evaluated."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from experiments import vtab
from experiments.conftest import config_of, make_problem
from experiments.tables import recipe_of


@pytest.mark.parametrize("zipped", [False, True])
def test_images_are_those_of_the_lists_as_the_checkpoint_processes_them(zipped, world, tmp_path):
    """In their order, though threads decode them, from a folder or a zip."""
    data_dir, model = world / "vtab", str(world / "vit")
    folder = data_dir / "vtab-1k/cifar"
    if zipped:
        shutil.make_archive(tmp_path / "vtab-1k", "zip", data_dir, "vtab-1k")
        data_dir = tmp_path
    *splits, classes = vtab.load_images("cifar", str(data_dir), model)
    assert classes == 3
    processor = transformers.AutoImageProcessor.from_pretrained(model, backend="pil")
    for name, split in zip(("train800", "val200", "test"), splits):
        lines = (folder / f"{name}.txt").read_text().splitlines()
        rows = split.__getitems__(range(len(split))) if name == "test" else split
        for line, row in zip(lines, rows, strict=True):
            path, label = line.split()
            image = Image.open(folder / path).convert("RGB")
            pixels = processor(image, return_tensors="pt")["pixel_values"][0]
            assert torch.equal(row["pixel_values"], pixels) and row["labels"] == int(label)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32])
def test_images_are_read_upright_and_with_8_bits_alone(kind, tmp_path):
    """After the quarter turn clockwise that their EXIF data ask for. With more bits, values beyond
    255 would be clipped: an error names the file."""
    gray = np.arange(256, dtype=kind).reshape(16, 16)
    name = "a.png" if kind is np.uint8 else "a.tif"  # Pillow itself turns TIFFs
    (tmp_path / "all.txt").write_text(f"{name} 0")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gray).save(tmp_path / name, exif=exif)
    images = vtab.Images(tmp_path, "all", None)
    if kind is np.uint8:
        assert (np.asarray(images.image(0)) == np.rot90(gray, -1)[..., None]).all()
    else:
        with pytest.raises(ValueError, match="a.tif is not an image .* not of 8 bits"):
            images.image(0)


def test_accuracies_and_losses_are_those_of_the_images(world):
    """On val200 after every epoch and on the test images after the last, counted by hand; with
    --holdout not on the test images."""
    config, held_out = (config_of(world, "cifar", holdout=holdout) for holdout in (False, True))
    problem = make_problem(config, recipe_of(config))
    problem.model.eval()
    assert problem.floor == {"val_accuracy": 2 / 6, "accuracy": 3 / 9}
    assert [*problem.evaluate(False)] == ["val_accuracy", "val_loss"]
    metrics = problem.evaluate(True)
    _, val, test, _ = vtab.load_images("cifar", config.data_dir, config.model)
    for split, prefix in ((val, "val_"), (test, "")):
        rows = [split[i] for i in range(len(split))]
        pixels = torch.stack([row["pixel_values"] for row in rows]).to(vtab.DEVICE)
        logits = problem.model(pixels).logits
        right = [a == row["labels"] for a, row in zip(logits.argmax(dim=1).tolist(), rows)]
        losses = [-x[row["labels"]].item() for x, row in zip(logits.log_softmax(dim=1), rows)]
        assert metrics[f"{prefix}accuracy"] == np.mean(right)
        assert metrics[f"{prefix}loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    problem = make_problem(held_out, recipe_of(held_out))
    assert [*problem.evaluate(True)] == ["val_accuracy", "val_loss"]
