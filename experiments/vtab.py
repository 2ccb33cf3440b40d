"""Section 4.4: a vision transformer, ViT-B/16 in the paper, on VTAB-1k (Table 4).

A task is a folder of vtab-1k.zip: lists train800.txt, val200.txt and test.txt, whose lines are a
path below the folder, a blank and a label, and the images.
"""

import math
import statistics
import zipfile
from collections.abc import Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import torch
import transformers
from PIL import Image, ImageOps
from torch import nn

from experiments.data import (
    epoch_batches, guesses, matrices, predictions, pretrained, some, with_new_head)
from experiments.problem import DEVICE, Problem, autocast
from experiments.tables import Config, Recipe

HUB, ZIP = "XiN0919/VTAB-1k", "vtab-1k.zip"
KINDS = ("q_proj", "k_proj", "v_proj", "fc1", "fc2")
EVALUATION_BATCH = 64


class Images:
    """The images of a list, decoded and processed when asked for: dict(pixel_values, labels).

    Raises ValueError if the list has a bad line.
    """
    def __init__(self, folder: Path | zipfile.Path, split: str, processor):
        self.processor, self.paths, self.labels = processor, [], []
        path = folder / f"{split}.txt"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            name, _, label = line.rpartition(" ")
            if not name or not label.isdecimal():
                raise ValueError(f"{path}, line {number}: {line!r} is not a path and a label >= 0")
            self.paths.append(folder / name)
            self.labels.append(int(label))
        if not self.labels:
            raise ValueError(f"{path}: no images")

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Image.Image:
        """Upright, as its EXIF data say. ValueError if there is no such file, if it is broken, or
        if it has more than 8 bits a channel, which would be clipped."""
        try:
            with self.paths[i].open("rb") as file:
                upright = ImageOps.exif_transpose(Image.open(file))
                if upright.mode.startswith(("I", "F")):
                    raise ValueError(f"it is of mode {upright.mode}, not of 8 bits")
                return upright.convert("RGB")
        except Exception as error:  # broken files raise all kinds
            raise ValueError(f"{self.paths[i]} is not an image that can be read, "
                             f"{type(error).__name__}: {error}") from None

    def __getitem__(self, i: int) -> dict:
        pixels = self.processor(self.image(i), return_tensors="pt")["pixel_values"][0]
        return dict(pixel_values=pixels, labels=self.labels[i])

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """A batch, by threads: processes could not share a zip."""
        with ThreadPoolExecutor() as pool:
            return [*pool.map(self.__getitem__, indices)]


@cache
def load_images(task: str, data_dir: str | None, model: str) -> tuple[list, list, Images, int]:
    """The training and validation images in memory, the test images, the number of classes.

    Every image is decoded once, so that a broken one is found before training. OSError if there is
    neither the folder vtab-1k nor the zip, ValueError if it has no such task.
    """
    if data_dir is None:
        from huggingface_hub import hf_hub_download
        data_dir = Path(hf_hub_download(HUB, ZIP, repo_type="dataset")).parent
    root = Path(data_dir, "vtab-1k")
    if not root.is_dir():
        root = zipfile.Path(Path(data_dir, ZIP), "vtab-1k/")
    if not (root / task).is_dir():
        tasks = sorted(path.name for path in root.iterdir())
        raise ValueError(f"{data_dir}: no folder vtab-1k/{task}; there are {tasks}")
    processor = pretrained(transformers.AutoImageProcessor, model, backend="pil")
    lists = ("train800", "val200", "test")
    train, val, test = (Images(root / task, name, processor) for name in lists)
    for i in range(len(test)):
        test.image(i)
    classes = 1 + max(train.labels + val.labels + test.labels)
    train, val = (split.__getitems__(range(len(split))) for split in (train, val))
    return train, val, test, classes


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
    labels = {"val_": [row["labels"] for row in val], "": test.labels}
    outputs: dict[str, Sequence] = {}

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        with autocast(config):
            return model(**{key: x.to(DEVICE, non_blocking=True) for key, x in batch.items()}).loss

    def measure(images: Sized, prefix: str) -> dict[str, float]:
        found = predictions(images, EVALUATION_BATCH, partial(guesses, model), None, config)
        outputs["prediction"], outputs["loss"] = zip(*found)
        right = statistics.fmean(a == b for a, b in zip(outputs["prediction"], labels[prefix]))
        return {f"{prefix}accuracy": right, f"{prefix}loss": statistics.fmean(outputs["loss"])}

    def evaluate(last: bool) -> dict[str, float]:
        found = measure(val, "val_")
        return measure(test, "") | found if last and not config.holdout else found

    majority = statistics.mode(row["labels"] for row in train)
    floor = {f"{prefix}accuracy": y.count(majority) / len(y) for prefix, y in labels.items()}
    return Problem(
        model, targets, ["classifier"], math.ceil(len(train) / recipe.batch_size),
        lambda epoch: epoch_batches(train, recipe.batch_size, config, epoch), loss, evaluate, floor,
        outputs=outputs)
