"""What the tests of the recipes share: tiny models, and running a file as a user would."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
WORDS = [*"abcdefghijklmnop"]
same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-5)


def llama(**sizes):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, vocab_size=40, pad_token_id=0) | sizes
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def tokenizer():
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")


def trainable(model):
    return [w for w in model.parameters() if w.requires_grad]


class CalmAdamW(torch.optim.AdamW):
    """With the usual eps, a gradient that is 0 but for rounding moves a weight like any other."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options | dict(eps=1e-3))


@pytest.fixture(scope="module")
def calm_adam():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", CalmAdamW)
        yield


@pytest.fixture
def copied(tmp_path):
    """A folder with elalora.py and the recipes beside it, and nothing else."""
    for path in (ROOT / "elalora.py", *(ROOT / "recipes").glob("*.py")):
        if not path.name.startswith(("test_", "conftest")):
            shutil.copy(path, tmp_path)
    return tmp_path


def run(folder, *command, processes=0):
    """A Python process, or several under torchrun, on one thread; returns what it prints."""
    if processes:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launch, *command]
    environment = {key: x for key, x in os.environ.items() if key != "PYTHONPATH"}
    environment |= dict(OMP_NUM_THREADS="1", MPLBACKEND="agg")
    result = subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
