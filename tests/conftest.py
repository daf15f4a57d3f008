"""What several test files need: where real data and weights may lie, and a tiny tokenizer."""

import os
import sys
from pathlib import Path

import pytest
import tokenizers
import torch

from extras.convert.tiktoken import PIECES, SPECIAL_TOKENS

# The suite is about processors, several processes and numbers to the last bit. What a GPU does is
# checked by tests/test_cuda.py, when it is asked for by name; everything else finds none. (Of
# several processes the first one decides, the others inherit it.)
if "PYTEST_XDIST_WORKER" not in os.environ and not any("test_cuda" in a for a in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # tiny tensors: on a busy machine threads only wait for each other


def shared_dir() -> Path | None:
    """Real data for trying things out ($VLM_SHARED or ../shared); None where there is none."""
    return existing(os.environ.get("VLM_SHARED"), ROOT.parent / "shared")


def weights_dir() -> Path | None:
    """Real public weights ($VLM_WEIGHTS or ../weights); None where there are none."""
    return existing(os.environ.get("VLM_WEIGHTS"), ROOT.parent / "weights")


def existing(named: str | None, default: Path) -> Path | None:
    path = Path(named) if named else default
    return path if path.is_dir() else None


def needed(base: Path | None, name: str) -> Path:
    """base/name, or skip the test: needed(weights_dir(), "qwen")."""
    if base is None or not (base / name).exists():
        pytest.skip(f"needs real files: {name} under $VLM_SHARED or $VLM_WEIGHTS")
    return base / name


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory) -> Path:
    """A directory with a byte-level BPE tokenizer.json: Qwen's pieces and special tokens, and a
    few hundred merges learned on the spot."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = tokenizers.decoders.ByteLevel()
    text = ["user\n\nassistant\n\nsystem\n\nYou are a helpful assistant.\n\n What is in the "
            "picture? A red cat sits on the chair, left of two dogs. 图片里有什么？有一只猫。"] * 4
    backend.train_from_iterator(text, tokenizers.trainers.BpeTrainer(
        vocab_size=500, show_progress=False, special_tokens=SPECIAL_TOKENS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    directory = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(directory / "tokenizer.json"))
    return directory
