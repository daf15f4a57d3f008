"""Files of a model: JSON, hashes, and the tensors in weight files.

    config.json -> read_json -> dict;   a directory -> weight_files -> all_tensors -> tensors
"""

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError with the file's name for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; fetch the file again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {str(content)[:40]!r}; expected an object {{name: value}}")
    return content


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """About a second for each gigabyte."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_hashes(source) -> dict[str, str]:
    """{file name: sha256} of the weight files of a directory."""
    return {path.name: sha256(path) for path in weight_files(source)}


@contextmanager
def with_filename(path: Path):
    """Put the file's name in front of a ValueError about what was read from it."""
    try:
        yield
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


# ---------------------------------------------------------------- weight files


def weight_files(directory, single: str = "model.safetensors") -> list[Path]:
    """The files with the weights of a public directory: one, or the shards that an index names.

    Where both lie, the one, as in transformers: what is merged is often written beside old shards.
    """
    directory = Path(directory)
    index = directory / f"{single}.index.json"
    alone = (directory / single).is_file() or not index.is_file()
    names = [single] if alone else shards(index)
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing)}; weights are read from {single}, or from the "
            f"shards that an index ({index.name}) names")
    return [directory / name for name in names]


def shards(index: Path) -> list[str]:
    """The files that an index names. They lie beside it: no name may lead elsewhere."""
    weight_map = read_json(index).get("weight_map")
    if (not weight_map or not isinstance(weight_map, dict)
            or not all(isinstance(file, str) for file in weight_map.values())):
        raise ValueError(f"{index} has no 'weight_map' of {{tensor: file}}; fetch it again")
    for name, file in weight_map.items():
        if Path(file).name != file or "\\" in file:
            raise ValueError(f"{index}: the file of {name} is {file!r}; expected a file beside the "
                             "index, nothing else is opened")
    return sorted(set(weight_map.values()))


def open_tensors(path: Path):
    """A .safetensors file, to be used in `with`; memory-mapped: nothing is read before it is used.
    """
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}. It may be cut short: "
                         "compare its size, download it again") from error


def all_tensors(path: Path) -> dict[str, torch.Tensor]:
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}
