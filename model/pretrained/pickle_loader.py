"""Weights that torch.save wrote (pytorch_model.bin, MiniMind's .pth), read as tensors and no more.

Such a file is a pickle: a program that builds objects, which can do anything when it is run.
weights_only=True runs none of it but the making of tensors, and refuses the rest. That is the one
way in which this project opens them: weights here, and training_state.pt of a run.
"""

import pickle
import zipfile
from pathlib import Path

import torch


class PickleFile:
    """Opens like a safetensors file: with PickleFile(path) as file: file.get_tensor(name)."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "PickleFile":
        self.tensors = read_tensors(self.path)
        return self

    def __exit__(self, *error) -> None:
        self.tensors = {}

    def keys(self):
        return self.tensors.keys()

    def get_slice(self, name: str) -> "Slice":
        return Slice(self.tensors[name])

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


class Slice:
    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a file that holds nothing else; memory-mapped, so nothing is read yet."""
    content = load_plain(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a dictionary "
                         "{name: tensor} is needed")
    others = [name for name, value in content.items()
              if not isinstance(value, torch.Tensor) or not isinstance(name, str)]
    if others:
        raise ValueError(
            f"{path} holds {', '.join(map(repr, others[:4]))}, which are no tensors: it looks like "
            "the state of a training run. Give the file with the weights alone")
    return content


def load_plain(path: Path):
    """What torch.save wrote, as far as it is tensors, numbers, texts, lists and dictionaries."""
    try:
        # Files from before PyTorch 1.6 (2020) are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True,
                          mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and opening it all would run code that came with "
            f"it: refused ({reason(error)}). Get the weights as safetensors, or as the plain "
            "state_dict() of the model") from error
    except Exception as error:  # a damaged pickle fails in a dozen ways
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as a file of torch.save: {first}. "
                         "It may be cut short: compare its size, download it again") from error


def reason(error: Exception) -> str:
    """torch's message without its advice to open the file all the same."""
    lines = [line.strip() for line in str(error).splitlines()
             if line.strip() and "load failed" not in line and "weights_only" not in line]
    return lines[0].split(". Please")[0] if lines else "no list of tensors"
