"""A projector that somebody published -> the weights of ours, for --pretrained_projector.

    a file -> names and shapes of its tensors -> which kind it is -> load_projector -> Projector

The file may hold a language model and a tower as well; only the projector's tensors are read.
"""

import re
from pathlib import Path

import torch

from model.pretrained.files import open_tensors
from model.projector import Projector

# Published names -> names in our Projector; some files put "model." in front of them.
LAYOUTS = (
    # LLaVA, by its authors: version 1.5 and version 1; and as transformers writes version 1.5.
    {"mm_projector.0": "fc1", "mm_projector.2": "fc2"},
    {"mm_projector": "fc1"},
    {"multi_modal_projector.linear_1": "fc1", "multi_modal_projector.linear_2": "fc2"},
    # MiniMind-V: minimind-3v and MiniMind2-V. The release between them (mlp.0, mlp.2) lays four
    # patches of a row side by side, and its tower takes images of any shape: not supported.
    {"vision_proj.mlp.0": "norm", "vision_proj.mlp.1": "fc1", "vision_proj.mlp.3": "fc2"},
    {"vision_proj.vision_proj.0": "fc1"},
)
PROJECTOR = re.compile(r"(model\.)?(mm_projector|multi_modal_projector|vision_proj)\.")
KINDS = {("fc1",): "linear", ("fc1", "fc2"): "mlp", ("fc1", "fc2", "norm"): "norm_mlp"}


def load_projector(projector: Projector, file) -> None:
    """Put the tensors of a .safetensors, .bin or .pth file into projector.

    Raises FileNotFoundError, or ValueError with the file, the tensor and both shapes.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no projector file {path}; expected a .safetensors, .bin or .pth")
    with open_tensors(path) as opened:
        held = {name.removeprefix("model."): name for name in opened.keys()
                 if PROJECTOR.match(name)}
        layout = next((layout for layout in LAYOUTS if with_biases(layout) == held.keys()), None)
        if layout is None:
            raise ValueError(
                f"{path}: no projector that is known here. Found: "
                f"{', '.join(held.values()) or 'none (a language model alone?)'}; expected "
                f"weight and bias of {' or of '.join(' and '.join(known) for known in LAYOUTS)}")
        tensors = {f"{layout[public]}.{last}": opened.get_tensor(held[f"{public}.{last}"])
                   for public in layout for last in ("weight", "bias")}
    target = projector.state_dict()
    if tensors.keys() != target.keys():
        kind = KINDS[tuple(sorted(layout.values()))]
        raise ValueError(f"{path} holds a projector of the kind {kind!r} "
                         f"({', '.join(held.values())}): give --projector {kind}")
    public = {ours: name for name, ours in layout.items()}
    for ours, tensor in tensors.items():
        if tensor.shape != target[ours].shape:
            layer, last = ours.split(".")
            raise ValueError(
                f"{path}: {held[f'{public[layer]}.{last}']} is {list(tensor.shape)}, and these "
                f"two towers ask for {list(target[ours].shape)}: it was trained between others")
    projector.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()})


def with_biases(layout: dict) -> set[str]:
    return {f"{name}.{last}" for name in layout for last in ("weight", "bias")}
