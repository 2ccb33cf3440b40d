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
}  # fmt: skip


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
