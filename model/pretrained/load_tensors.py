"""The tensors of weight files -> an empty model, by the names of its family.

Every tensor is accounted for on both sides: one that is needed and missing, one in the file that
nobody knows, one of another shape or of no finite fractions raises with its name. What a file
holds and is knowingly left alone is listed as the family's `unread`.

The files are memory-mapped and a model is built under meta_device, so a tensor goes straight
from the file to where it belongs: there is never a second copy of the weights.
"""

from fnmatch import fnmatch
from pathlib import Path

import torch

from model.pretrained.families import Family, public_names, public_shape
from model.pretrained.files import open_tensors, weight_files
from model.pretrained.meta_device import meta_device


def load_tensors(kind: type, config, source: Path, family: Family, dtype: torch.dtype | None):
    """A model of this kind and config, with the tensors of the weight files of source."""
    with meta_device():
        model = kind(config)
    files, held = {}, {}
    for path in weight_files(source):
        with open_tensors(path) as file:
            files.update(dict.fromkeys(file.keys(), path))
    expected, prefix = public_names(model, family), family.prefix
    if not any(name.startswith(prefix) for name in files):
        expected = {name.removeprefix(prefix): ours for name, ours in expected.items()}
    for path in weight_files(source):
        with open_tensors(path) as file:
            held.update({name: file.get_tensor(name) for name in file.keys() if name in expected})
    problems = [f"missing: {name}" for name in sorted(expected.keys() - files.keys())]
    problems += [f"unknown: {name}" for name in sorted(files.keys() - expected.keys())
                 if not any(fnmatch(name.removeprefix(prefix), u) for u in family.unread)]
    state, tensors = model.state_dict(), {}
    for name, tensor in held.items():
        ours = expected[name]
        shape = public_shape(ours, state[ours], family)
        if list(tensor.shape) != shape:
            problems.append(f"misshapen: {name} is {list(tensor.shape)} in the file, and "
                            f"config.json asks for {shape}")
        elif not problems:  # else its numbers need not be read
            if reason := unusable(tensor):
                problems.append(f"{reason}: {name} in {files[name].name}")
            else:
                tensors[ours] = tensor.to(dtype or tensor.dtype).view(state[ours].shape)
    if problems:
        more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(f"{source}: the weights do not fit a {model.config.model_type} as "
                         "config.json describes it:\n  " + "\n  ".join(problems[:12]) + more)
    model.load_state_dict(tensors, assign=True)
    return model


def unusable(tensor: torch.Tensor) -> str:
    """Why it cannot be a weight; "" if it can. Reads the tensor once, which loading it would do."""
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.is_floating_point():
        return f"no plain fractions but {str(tensor.dtype).removeprefix('torch.')}"
    # A NaN or an infinity comes through a sum. (The smallest dtypes cannot be summed.)
    wide = tensor.float() if tensor.itemsize < 2 else tensor
    return "" if wide.sum(dtype=torch.float32).isfinite() else "not finite"
