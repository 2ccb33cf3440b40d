"""The laws of vtab.py, on images and models that are made here."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import elalora
import reproduce
from experiments import vtab
from experiments.common import matrices
from experiments.conftest import end_of
from experiments.problem import Config, recipe_of

PHASES = ["warmup=2", "stabilize=2", "interval=2", "batch_size=4"]
VISION = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
    image_size=16, patch_size=8,
)  # fmt: skip


def save_split(folder, split, n):
    """Pictures of three classes, by the part of them that is bright, and their list."""
    random, lines = np.random.default_rng(n), []
    (folder / "images" / split).mkdir(parents=True)
    for i in range(n):
        pixels = random.integers(0, 99, (20, 20, 3)).astype(np.uint8)
        bright = (pixels[:10], pixels[10:], pixels[:, :10])[i % 3]
        bright += 150
        name = f"images/{split}/{i:03}.{('png', 'jpg')[i % 2]}"
        Image.fromarray(pixels).save(folder / name)
        lines.append(f"{name} {i % 3}\n")
    (folder / f"{split}.txt").write_text("".join(lines))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with a model and its image processor in vit/, and data/vtab-1k/cifar."""
    root = tmp_path_factory.mktemp("vtab")
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(root / "vit")
    transformers.ViTImageProcessorPil(size=dict(height=16, width=16)).save_pretrained(root / "vit")
    for split, n in (("train800", 16), ("val200", 6), ("test", 9)):
        save_split(root / "data/vtab-1k/cifar", split, n)
    return root


@pytest.fixture
def given(original, tmp_path, monkeypatch):
    """A copy of that folder, in which the test runs."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    vtab.load_images.cache_clear()
    return tmp_path


COMMAND = "--task cifar --rank 2 --model vit --data-dir data --epochs 3 --set".split() + PHASES


def config_of(**changes):
    settings = dict(model="vit", data_dir="data", epochs=3, set=PHASES) | changes
    return Config("cifar", settings.pop("method", "elalora"), 2, 0, **settings)


def problem_of(config):
    torch.manual_seed(0)
    return vtab.problem(config, recipe_of(vtab.RECIPES["cifar"], config))


def adapted_kinds(model):
    model = elalora.inject(model, matrices(model, vtab.KINDS, config_of()), 1)
    names = [n for n, module in model.named_modules() if isinstance(module, elalora.SVDLinear)]
    return {re.sub(r".*\.\d+\.", "", name) for name in names}, len(names)


def test_adapters_have_the_size_of_table_4():
    """Query, key, value and both layers of the MLP of ViT-B/16 at rank 8: 1.19 M with a head."""
    with torch.device("meta"):
        model = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=10))
    elalora.inject(model, matrices(model, vtab.KINDS, config_of()), 8)
    sizes = {n: w.numel() for n, w in model.named_parameters() if w.requires_grad}
    singular_values = sum(size for name, size in sizes.items() if name.endswith(".Lambda"))
    assert sum(sizes.values()) - singular_values == 1_179_648 and singular_values == 60 * 8
    assert round((sum(sizes.values()) + model.classifier.weight.numel()) / 1e6, 2) == 1.19


def test_other_vision_transformers_are_adapted_by_the_same_names():
    """CLIP's and DINOv2's matrices are found; a model without them is refused by name."""
    clip = transformers.CLIPVisionConfig(**VISION)
    clip = transformers.CLIPConfig(vision_config=clip.to_dict(), num_labels=3)
    dino = transformers.Dinov2Config(**VISION, mlp_ratio=2, num_labels=3)
    for model in (
        transformers.CLIPForImageClassification(clip),
        transformers.Dinov2ForImageClassification(dino),
    ):
        kinds, n = adapted_kinds(model)
        assert n == 2 * 5 and {kind.split(".")[-1] for kind in kinds} == {*vtab.KINDS}
        assert any(name == "classifier" for name, _ in model.named_modules())
    convnext = transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="no matrices named q_proj, k_proj, v_proj, fc1, fc2"):
        matrices(transformers.ConvNextForImageClassification(convnext), vtab.KINDS, config_of())


def test_a_zip_and_its_folder_hold_the_same_examples(given):
    """Pixels are those of the checkpoint's own processor, labels those of the lists."""
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


def test_a_run_reports_the_accuracy_of_the_adapter_that_it_wrote(given, capsys):
    """On val200 after every epoch and on the test images after the last, counted by hand."""
    reproduce.main(COMMAND)
    (folder,) = Path("runs").glob("*-s0")
    results = json.loads((folder / "results.json").read_text())
    assert [[*epoch["metrics"]] for epoch in results["history"]] == [
        ["val_accuracy", "val_loss"],
        ["val_accuracy", "val_loss"],
        ["accuracy", "loss", "val_accuracy", "val_loss"],
    ]
    assert results["floor"] == {"val_accuracy": 2 / 6, "accuracy": 3 / 9}
    assert "(majority class 0.3333)" in capsys.readouterr().out
    assert len(results["ranks"]) == 10 and sum(results["ranks"].values()) == 20
    assert results["adjustments"] and results["total_steps"] == 12
    from safetensors.torch import load_file

    problem = problem_of(config_of())
    elalora.inject(problem.model, problem.targets, 1, modules_to_save=problem.heads)
    elalora.load_adapter_state_dict(problem.model, load_file(folder / "adapter.safetensors"))
    problem.model.eval()
    _, val, test, _ = vtab.load_images("cifar", "data", "vit")
    outputs = json.loads((folder / "predictions.json").read_text())
    for split, prefix in ((val, "val_"), (test, "")):
        guesses, losses = [], []
        for row in (split[i] for i in range(len(split))):
            logits = problem.model(pixel_values=row["pixel_values"][None].to(vtab.DEVICE)).logits
            guesses.append(int(logits.argmax()))
            losses.append(-logits.log_softmax(dim=1)[0, row["labels"]].item())
        right = sum(a == split[i]["labels"] for i, a in enumerate(guesses))
        assert results["metrics"][f"{prefix}accuracy"] == right / len(split)
        assert results["metrics"][f"{prefix}loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert outputs == dict(prediction=guesses, loss=pytest.approx(losses, rel=1e-3))


def test_held_out_runs_do_not_see_the_test_images(given):
    """With --holdout only val200 is evaluated."""
    problem = problem_of(config_of(holdout=True))
    assert [*problem.evaluate(True)] == ["val_accuracy", "val_loss"]


@pytest.mark.parametrize("method", ["elalora", "lora", "adalora"])
def test_an_interrupted_run_ends_bit_for_bit_as_one_that_was_not(method, given):
    """Every method goes on from the checkpoint of the epoch before."""
    recipe = recipe_of(vtab.RECIPES["cifar"], config := config_of(method=method))
    make = lambda: (problem_of(config), config, recipe)
    assert end_of(make, Path("resumed.pt"), (3,)) == end_of(make, Path("whole.pt"))


def spoil(name, content):
    path = Path("data/vtab-1k/cifar", name)
    path.write_bytes(content(path.read_bytes()))


def other_model():
    shutil.rmtree("vit")
    transformers.BertModel(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained("vit")


BAD = {
    "no task": (lambda: shutil.move("data/vtab-1k/cifar", "data/vtab-1k/svhn"),
                r"data: no folder vtab-1k/cifar; there are \['svhn'\]"),
    "no data": (lambda: shutil.move("data/vtab-1k", "data/vtab"), "holds neither vtab-1k.zip nor"),
    "a bad line": (lambda: spoil("val200.txt", lambda x: x.replace(b" 1\n", b" one\n", 1)),
                   "val200.txt, line 2: .*001.jpg one' is not a path and a label >= 0"),
    "a broken test image": (lambda: spoil("images/test/007.jpg", lambda x: x[:300]),
                            "images/test/007.jpg is no image that can be read"),
    "an empty split": (lambda: spoil("train800.txt", lambda x: b""), "train800.txt: no examples"),
    "a model of text": (other_model, "vit"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line_and_exit_code_2(change, message, given, capsys):
    """What is wrong is named before training, and nothing is written."""
    change()
    with pytest.raises(SystemExit) as exit:
        reproduce.main(COMMAND)
    assert exit.value.code == 2 and not Path("runs").exists()
    *_, last = capsys.readouterr().err.splitlines()
    assert re.match(f"reproduce.py: error: .*{message}", last), last
