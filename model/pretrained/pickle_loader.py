"""What torch.save wrote (a run's training_state.pt; weights, for extras.convert), and no code.

Such a file is a pickle: a program that builds objects, which can do anything when it is run.
weights_only=True runs none of it but the making of tensors, and refuses the rest. That is the one
way in which this project opens them.
"""

import pickle
import zipfile
from pathlib import Path

import torch


def load_plain(path: Path):
    """The tensors, numbers, texts, lists and dictionaries in it; memory-mapped: not read yet."""
    try:
        # Files from before PyTorch 1.6 (2020) are no zip archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True,
                          mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # torch's message without its advice to open the file all the same.
        lines = [line.strip() for line in str(error).splitlines()
                 if line.strip() and "load failed" not in line and "weights_only" not in line]
        reason = lines[0].split(". Please")[0] if lines else "no list of tensors"
        raise ValueError(
            f"{path} holds more than tensors, and opening it all would run code that came with "
            f"it: refused ({reason}). Get the weights as safetensors, or as the plain "
            "state_dict() of the model") from error
    except Exception as error:  # a damaged pickle fails in a dozen ways
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as a file of torch.save: {first}. "
                         "It may be cut short: compare its size, download it again") from error
