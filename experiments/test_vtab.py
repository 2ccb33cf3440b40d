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
    if zipped:
        (tmp_path / "vtab-1k.zip").write_bytes(b"PK")  # a download that was cut
        with pytest.raises(ValueError, match=f"{tmp_path} has no folder .* no whole vtab-1k.zip"):
            vtab.load_images("cifar", str(tmp_path), model)
        shutil.make_archive(tmp_path / "vtab-1k", "zip", data_dir, "vtab-1k")
        data_dir = tmp_path
    *splits, classes = vtab.load_images("cifar", str(data_dir), model)
    processor = transformers.AutoImageProcessor.from_pretrained(model, backend="pil")
    folder = world / "vtab/vtab-1k/cifar"
    assert classes == 3
    for name, split in zip(("train800", "val200", "test"), splits):
        lines = (folder / f"{name}.txt").read_text().splitlines()[::-1]
        order = [*range(len(split))][::-1]
        rows = split.__getitems__(order) if name == "test" else split[::-1]
        for line, row in zip(lines, rows, strict=True):
            path, label = line.split()
            image = Image.open(folder / path).convert("RGB")
            pixels = processor(image, return_tensors="pt")["pixel_values"][0]
            assert torch.equal(row["pixel_values"], pixels) and row["labels"] == int(label)


GRAY = np.arange(256, dtype=np.uint8).reshape(16, 16)
IMAGES = {  # the file, what is in it, and what is read or what the error says
    "8 bits": ("a.png", GRAY, GRAY),
    "16 bits": ("a.png", GRAY * np.uint16(257) - np.uint16(100) * (GRAY > 0), GRAY),  # rounded
    "16 bits, big-endian": ("a.tif", (GRAY * np.uint16(257)).astype(">u2"), GRAY),
    "32 bits that hold 16": ("a.tif", GRAY * np.int32(257), GRAY),
    "32 bits": ("a.tif", GRAY * np.int32(300), "from 0 to 76500, not from 0 to 65535"),
    "floats": ("a.tif", GRAY / np.float32(255), GRAY),
    "large floats": ("a.tif", GRAY + np.float32(0), "from 0 to 255, not from 0 to 1"),
    "negative": ("a.tif", GRAY / np.float32(255) - 1, "from -1 to 0, not from 0 to 1"),
    "no numbers": ("a.tif", GRAY + np.float32("nan"), "from nan to nan"),
}


@pytest.mark.parametrize("name, pixels, expected", IMAGES.values(), ids=IMAGES)
def test_images_are_read_upright_and_in_8_bits(name, pixels, expected, tmp_path):
    """After the quarter turn clockwise that their EXIF data ask for. Nothing is clipped; an error
    names the file and its range."""
    (tmp_path / "all.txt").write_text(f"{name} 0")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    images = vtab.Images(tmp_path, "all", None)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=f"{name} is not an image .*{expected}"):
            images.image(0)
    else:
        assert (np.asarray(images.image(0)) == np.rot90(expected, -1)[..., None]).all()


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
