"""Section 4.4: a vision transformer, ViT-B/16 in the paper, on VTAB-1k (Table 4).

A task is a folder of vtab-1k.zip: lists train800.txt, val200.txt and test.txt, whose lines are a
path below the folder, a blank and a label, and the images.
"""

import functools
import math
import statistics
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import Dataset

from experiments.data import (
    epoch_batches, guesses, matrices, predictions, pretrained, some, with_new_head)
from experiments.problem import DEVICE, Problem, autocast
from experiments.tables import Config, Recipe

HUB, ZIP = "XiN0919/VTAB-1k", "vtab-1k.zip"
KINDS = ("q_proj", "k_proj", "v_proj", "fc1", "fc2")
EVALUATION_BATCH = 64


def open_task(task: str, data_dir: str | None) -> Path | zipfile.Path:
    """The task's folder, unpacked or within the zip. ValueError if there is none."""
    if data_dir is None:
        from huggingface_hub import hf_hub_download
        archive, root = Path(hf_hub_download(HUB, ZIP, repo_type="dataset")), None
    else:
        archive, root = Path(data_dir, ZIP), Path(data_dir, "vtab-1k")
    if root is None or not root.is_dir():
        if not archive.is_file():
            raise ValueError(f"--data-dir: {data_dir} holds neither {ZIP} nor a folder vtab-1k")
        try:
            root = zipfile.Path(archive, "vtab-1k/")
        except zipfile.BadZipFile as error:
            raise ValueError(f"{archive}: {error}; download it again") from None
    if not (root / task).is_dir():
        tasks = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        raise ValueError(f"{archive.parent}: no folder vtab-1k/{task}; there are {tasks}")
    return root / task


def in_eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits, or of floats from 0 to 1, scaled to 8 bits; any other as it is."""
    if image.mode == "F" or image.mode.startswith("I"):
        highest = 1 if image.mode == "F" else 2**16 - 1
        values = np.asarray(image, dtype=float)
        least, most = values.min(), values.max()
        if not 0 <= least <= most <= highest:
            raise ValueError(f"values are from {least:g} to {most:g}, not from 0 to {highest}")
        image = Image.fromarray((values * 255 / highest).round().astype(np.uint8))
    return image


class Images(Dataset):
    """The images of a list, decoded and processed when asked for: dict(pixel_values, labels).

    Raises ValueError if the list is missing, empty or has a bad line.
    """
    def __init__(self, folder: Path | zipfile.Path, split: str, processor):
        self.folder, self.processor, self.rows = folder, processor, []
        path = folder / f"{split}.txt"
        if not path.is_file():
            raise ValueError(f"{path}: no such list of images")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            name, _, label = line.rpartition(" ")
            if not name or not label.isdecimal():
                raise ValueError(f"{path}, line {number}: {line!r} is not a path and a label >= 0")
            self.rows.append((name, int(label)))
        if not self.rows:
            raise ValueError(f"{path}: no examples")

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, i: int) -> Image.Image:
        """Upright, as its EXIF data say. ValueError if there is no such file, or it is broken."""
        path = self.folder / self.rows[i][0]
        try:
            with path.open("rb") as file:
                upright = ImageOps.exif_transpose(Image.open(file))
                return in_eight_bits(upright).convert("RGB")
        except Exception as error:  # broken files raise all kinds
            raise ValueError(f"{path} is not an image that can be read, {type(error).__name__}: "
                             f"{error}") from None

    def __getitem__(self, i: int) -> dict:
        pixels = self.processor(self.image(i), return_tensors="pt")["pixel_values"][0]
        return dict(pixel_values=pixels, labels=self.rows[i][1])

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """A batch, by threads: processes could not share a zip."""
        with ThreadPoolExecutor() as pool:
            return [*pool.map(self.__getitem__, indices)]


@functools.cache
def load_images(task: str, data_dir: str | None, model: str) -> tuple[list, list, Images, int]:
    """The training and validation images in memory, the test images, the number of classes.

    Every image is decoded once, so that a broken one is found before training.
    """
    folder = open_task(task, data_dir)
    processor = pretrained(transformers.AutoImageProcessor, model, backend="pil")
    train, val, test = (Images(folder, name, processor) for name in ("train800", "val200", "test"))
    for i in range(len(test)):
        test.image(i)
    classes = 1 + max(label for split in (train, val, test) for _, label in split.rows)
    in_memory = [[split[i] for i in range(len(split))] for split in (train, val)]
    return *in_memory, test, classes


def problem(config: Config, recipe: Recipe) -> Problem:
    """A classifier of images with a new head, trained on 800 images.

    The accuracy on val200 is computed after every epoch; after the last one, the accuracy on the
    test images, but with --holdout.
    """
    train, val, test, classes = load_images(config.task, config.data_dir, config.model)
    train = some(train, recipe)
    model = with_new_head(transformers.AutoModelForImageClassification, config.model, classes)
    targets = matrices(model, KINDS, config)
    model.to(DEVICE)

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        with autocast(config):
            return model(**{key: x.to(DEVICE, non_blocking=True) for key, x in batch.items()}).loss

    def predict(batch: dict) -> list[tuple[int, float]]:
        logits = model(pixel_values=batch["pixel_values"].to(DEVICE)).logits.float()
        return guesses(logits, batch["labels"].to(DEVICE))

    outputs: dict[str, Sequence] = {}

    def measure(split: Dataset | list, labels: list[int], prefix: str) -> dict[str, float]:
        found = predictions(split, EVALUATION_BATCH, predict, None, config)
        outputs["prediction"], outputs["loss"] = zip(*found)
        accuracy = statistics.fmean(a == b for a, b in zip(outputs["prediction"], labels))
        return {f"{prefix}accuracy": accuracy, f"{prefix}loss": statistics.fmean(outputs["loss"])}

    def evaluate(last: bool) -> dict[str, float]:
        found = measure(val, [row["labels"] for row in val], "val_")
        if last and not config.holdout:
            found = measure(test, [label for _, label in test.rows], "") | found
        return found

    majority = statistics.mode(row["labels"] for row in train)
    floor = dict(val_accuracy=statistics.fmean(row["labels"] == majority for row in val),
                 accuracy=statistics.fmean(label == majority for _, label in test.rows))
    return Problem(
        model, targets, ["classifier"], math.ceil(len(train) / recipe.batch_size),
        lambda epoch: epoch_batches(train, recipe.batch_size, config, epoch), loss, evaluate, floor,
        outputs=outputs)
