"""Layouts that the loader does not read -> public files, once.

    MiniMind's .pth or its own config.json -> convert -> OUT: config.json, model.safetensors and the
    tokenizer's files, as a llama or a qwen3

    python -m extras.convert SOURCE OUT

A directory or file of that kind that --language_model names is converted by itself, into a
directory "converted_NAME" beside its weight file.
"""

import os
import shutil
from pathlib import Path

from extras.convert.minimind import load_minimind, weight_file
from model.pretrained.files import read_json, write_json
from model.pretrained.save import save_language

SMALL_FILES = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json",
               "generation_config.json")


def convert(source: Path, out: Path) -> None:
    """ValueError says what is no MiniMind; then nothing was written."""
    model = load_minimind(source)
    save_language(model, out)
    directory = source if source.is_dir() else source.parent
    for pattern in SMALL_FILES:
        for file in directory.glob(pattern):
            shutil.copyfile(file, out / file.name)
    write_json(out / "converted_from.json", origin(source))


def origin(source: Path) -> dict:
    """{file name: [bytes, time of its last change]} of what a conversion depends on."""
    file = weight_file(source)
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns]
            for path in (file, file.parent / "config.json") if path.is_file()}


def converted(source: Path) -> Path:
    """The directory beside the weight file with the public files; made unless it is up to date."""
    file = weight_file(source)
    out = file.parent / f"converted_{file.stem}"
    record = out / "converted_from.json"
    if record.is_file() and read_json(record) == origin(source):
        return out
    # Under another name first: another process may do the same, or this one may be stopped.
    partial = file.parent / f".{out.name}_{os.getpid()}"
    try:
        convert(source, partial)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except OSError as error:
        if not (record.is_file() and read_json(record) == origin(source)):  # not made by another
            raise OSError(f"{source} is converted to public files into {out}, which failed: "
                          f"{error}. Run python -m extras.convert {source} OUT, and give OUT in "
                          "its place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out
