"""A projector that somebody published -> the weights of ours, for --pretrained_projector.

    a file -> names and shapes of its tensors -> which kind it is -> load_projector -> Projector

The file may hold a language model and a tower as well; only the projector's tensors are read.
"""

import re
from pathlib import Path

import torch

from extras.convert.public_files import read_tensors
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
KINDS = {1: "linear", 2: "mlp", 3: "norm_mlp"}  # by the number of layers


def load_projector(projector: Projector, file) -> None:
    """Put the tensors of a .safetensors, .bin or .pth file into projector.

    Raises FileNotFoundError, or ValueError with the file, the tensor and both shapes.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no projector file {path}; expected a .safetensors, .bin or .pth")
    tensors = {name: tensor for name, tensor in read_tensors(path).items() if PROJECTOR.match(name)}
    held = {name.removeprefix("model."): name for name in tensors}
    layouts = [{f"{public}.{last}": f"{ours}.{last}" for public, ours in layout.items()
                for last in ("weight", "bias")} for layout in LAYOUTS]
    layout = next((layout for layout in layouts if layout.keys() == held.keys()), None)
    if layout is None:
        raise ValueError(
            f"{path}: no projector that is known here. Found: "
            f"{', '.join(tensors) or 'none (a language model alone?)'}; expected "
            f"weight and bias of {' or of '.join(' and '.join(known) for known in LAYOUTS)}")
    target = projector.state_dict()
    if {*layout.values()} != target.keys():
        kind = KINDS[len(layout) // 2]
        raise ValueError(f"{path} holds a projector of the kind {kind!r} ({', '.join(tensors)}): "
                         f"give --projector {kind}")
    for public, ours in layout.items():
        tensor = tensors[held[public]]
        if tensor.shape != target[ours].shape:
            raise ValueError(
                f"{path}: {held[public]} is {list(tensor.shape)}, and these two towers ask for "
                f"{list(target[ours].shape)}: it was trained between others")
        target[ours] = tensor.to(torch.float32)
    projector.load_state_dict(target)
