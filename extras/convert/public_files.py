"""Layouts that the loader does not read -> public files, once.

    MiniMind's .pth or config.json    -> a llama or a qwen3          minimind.py
    Qwen-7B's config.json and names   -> a qwen2                     qwen.py
    qwen.tiktoken                     -> tokenizer.json              tiktoken.py
    pytorch_model.bin                 -> model.safetensors           here

    python -m extras.convert SOURCE OUT

A directory or file of that kind that --language_model or --vision_tower names is converted by
itself, into a directory "converted_NAME" beside its weights. One weight file at a time: what does
not fit the memory at once need not.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from extras.convert.minimind import minimind_config, minimind_tensors
from extras.convert.qwen import qwen2_config, qwen2_tensors
from model.pretrained.files import (
    all_tensors,
    read_json,
    weight_files,
    with_filename,
    write_json,
)
from model.pretrained.pickle_loader import load_plain
from model.pretrained.public_config import write_config

MINIMIND, QWEN = ("minimind", "minimind-v"), "qwen"  # config.json's model_type
SMALL_FILES = ("tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
               "special_tokens_map.json", "generation_config.json", "preprocessor_config.json",
               "processor_config.json")
RECORD = "converted_from.json"


def converted(source: Path) -> Path:
    """source itself where its files are public ones; else the directory beside its weights with
    the public files made of it, unless they are up to date."""
    directory, files, public = parts_of(source)
    if not (public.get("model_type") in (*MINIMIND, QWEN) or needs_tokenizer(directory)
            or any(file.suffix != ".safetensors" for file in files)):
        return source
    pth = files and files[0].suffix == ".pth"
    out = directory / f"converted_{files[0].stem if pth else 'model'}"
    if is_up_to_date(source, out):
        return out
    hint = ". Its chat template: --template qwen" if public.get("model_type") == QWEN else ""
    print(f"{source} is converted to public files, once: {out}{hint}", file=sys.stderr)
    try:
        convert(source, out)
    except OSError as error:
        if not is_up_to_date(source, out):  # else another process did the same
            raise OSError(f"{source} is converted to public files into {out}, which failed: "
                          f"{error}. Run python -m extras.convert {source} OUT, and give OUT in "
                          "its place") from error
    return out


def is_up_to_date(source: Path, out: Path) -> bool:
    return (out / RECORD).is_file() and read_json(out / RECORD) == origin(source)


def origin(source: Path) -> dict:
    """{file name: [bytes, time of its last change]} of what a conversion depends on."""
    directory, files, _ = parts_of(source)
    files = {*files, *(file for pattern in ("config.json", "qwen.tiktoken", *SMALL_FILES)
                       for file in directory.glob(pattern))}
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}


def convert(source: Path, out: Path) -> None:
    """ValueError: why source is none of the layouts; then nothing of out is left."""
    directory, files, public = parts_of(source)
    config, rename = layout_of(files, public) if files else ({}, dict)
    # Under another name first: another process may do the same.
    partial = out.with_name(f".{out.name}_{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        write_weights(files, rename, partial)
        for file in [file for pattern in SMALL_FILES for file in directory.glob(pattern)]:
            shutil.copyfile(file, partial / file.name)
        if needs_tokenizer(directory):
            from extras.convert.tiktoken import read_tiktoken  # here: Qwen's first files alone

            read_tiktoken(directory / "qwen.tiktoken").save(str(partial / "tokenizer.json"))
            # In place of the class that comes with Qwen-7B as code.
            write_json(partial / "tokenizer_config.json",
                       {"tokenizer_class": "PreTrainedTokenizerFast"})
        if config:
            write_json(partial / "config.json", config)
        write_json(partial / RECORD, origin(source))
        if not is_up_to_date(source, out):  # by another process, meanwhile
            shutil.rmtree(out, ignore_errors=True)
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def parts_of(source: Path) -> tuple[Path, list[Path], dict]:
    """-> its directory, the weight files in it, its config.json ({}: it has none)."""
    directory = source if source.is_dir() else source.parent
    config = directory / "config.json"
    public = read_json(config) if config.is_file() else {}
    if source.is_file():
        return directory, [source], public
    for single in ("model.safetensors", "pytorch_model.bin"):
        if [*directory.glob(f"{single}*")]:
            return directory, weight_files(directory, single), public
    files = sorted(directory.glob("*.pth"))
    if len(files) > 1:
        raise ValueError(f"{source} holds {len(files)} .pth files: give the path of the one to "
                         f"read, such as {files[0]}")
    return directory, files, public


def needs_tokenizer(directory: Path) -> bool:
    return (directory / "qwen.tiktoken").is_file() and not (directory / "tokenizer.json").is_file()


def layout_of(files: list[Path], public: dict):
    """-> the public config.json, and what gives the tensors of a file their public names."""
    model_type = public.get("model_type")
    if model_type == QWEN:
        with with_filename(files[0].with_name("config.json")):
            return qwen2_config(public), qwen2_tensors
    if model_type not in MINIMIND and files[0].suffix != ".pth":
        return public, dict  # the names are public ones
    shapes = {name: tensor.shape for file in files for name, tensor in read_tensors(file).items()}
    with with_filename(files[0]):
        config = minimind_config(shapes, public)
    return write_config(config), lambda tensors: minimind_tensors(tensors, config)


def write_weights(files: list[Path], rename, out: Path) -> None:
    """One weight file after the other, each tensor in its own dtype; for several an index."""
    weight_map, total = {}, 0
    for number, file in enumerate(files, 1):
        part = f"-{number:05}-of-{len(files):05}" if len(files) > 1 else ""
        written = f"model{part}.safetensors"
        with with_filename(file):
            try:
                # Copied, because safetensors stores no tensor that is a part of another one.
                tensors = {name: tensor.clone(memory_format=torch.contiguous_format)
                           for name, tensor in rename(read_tensors(file)).items()}
                save_file(tensors, out / written, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(f"cannot save {out / written}: {error}") from error
            except RuntimeError as error:  # a shape that cannot be split
                raise ValueError(f"it cannot be converted: {error}") from error
        weight_map.update(dict.fromkeys(tensors, written))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        write_json(out / "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": weight_map})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Of a .safetensors, or of what torch.save wrote; memory-mapped, so nothing is read yet."""
    if path.suffix == ".safetensors":
        return all_tensors(path)
    content = load_plain(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a dictionary "
                         "{name: tensor} is needed")
    others = [name for name, value in content.items()
              if not isinstance(name, str) or not isinstance(value, torch.Tensor)
              or value.is_meta or value.layout != torch.strided]
    if others:
        raise ValueError(f"{path} holds {', '.join(map(repr, others[:4]))}, which are no tensors "
                         "of plain numbers: it looks like the state of a training run. Give the "
                         "file with the weights alone")
    return content
