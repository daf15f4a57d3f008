"""Fetch what a preset needs: models into the hub's cache, data to where the preset looks for it.

    python -m extras.download qwen2.5-siglip                  all of it
    python -m extras.download qwen2.5-siglip --part data      or language, or vision

    preset -> the hub's list of files, their sizes printed -> snapshot_download -> size and sha256

Files that are there already are not fetched again. HF_ENDPOINT names a mirror, HF_HOME another
directory for the cache. Without a network the program says what to fetch elsewhere, how big it is
and which flag then names it.
"""

import argparse
import os
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub

from extras.preset_list import download_size, format_bytes
from model.pretrained.files import sha256
from model.pretrained.hub import PICKLE_FILES, TOWER_SETTINGS, WANTED_FILES
from training.preset_table import PRESETS, Preset
from training.writable import check_directory

PARTS = ("language", "vision", "data")


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m extras.download",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("preset", choices=PRESETS, help="whose models and data")
    parser.add_argument("--part", choices=PARTS, help="only this (default: all three)")
    flags = parser.parse_args(arguments)
    preset, parts = PRESETS[flags.preset], [flags.part] if flags.part else list(PARTS)
    try:
        sources = [(*source, list_files(*source)) for source in sources_of(preset, parts)]
        for source in sources:  # all sizes before the first file
            print_sizes(*source)
        problems = [problem for source in sources for problem in fetch(*source)]
    except KeyboardInterrupt:
        raise SystemExit("\nstopped: the same command goes on with what is not complete") from None
    except Exception as error:  # no network, no such name, refused, full disk: one way out
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise SystemExit(f"{endpoint()}: {reason}\n\n{by_yourself(preset, parts)}") from error
    if problems:
        raise SystemExit("damaged:\n  " + "\n  ".join(problems)
                         + "\nDelete what is named here and run the same command again.")
    if sources:
        print(f"{sum(len(files) for *_, files in sources)} files are complete, their sizes and "
              "sha256 are the hub's")
    for line in left_to_do(preset, parts):
        print(line)


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def sources_of(preset: Preset, parts: list[str]) -> list[tuple]:
    """[(repository, "model" or "dataset", patterns of files, directory or None: the cache)]"""
    models = [getattr(preset, TOWER_SETTINGS[part]) for part in parts if part != "data"]
    return [*((name, "model", WANTED_FILES, None) for name in models if download_size(name)),
            *((part.source, "dataset", list(part.files), part.to) for part in data_of(preset, parts)
              if not part.source.startswith("http"))]


def data_of(preset: Preset, parts: list[str]) -> tuple:
    return preset.downloads if "data" in parts else ()


def list_files(repo: str, kind: str, patterns: list[str], to: str | None) -> list:
    """The files of a repository that fit a pattern: RepoSibling(rfilename, size, lfs)."""
    held = huggingface_hub.HfApi(endpoint=endpoint()).repo_info(
        repo, repo_type=kind, files_metadata=True).siblings
    if kind == "model" and not any(fnmatch(f.rfilename, "model*.safetensors") for f in held):
        patterns = patterns + PICKLE_FILES
    missing = [pattern for pattern in patterns
               if not any(fnmatch(file.rfilename, pattern) for file in held)]
    if kind == "dataset" and missing:
        raise FileNotFoundError(f"{repo} holds no {', '.join(missing)} any more, but "
                                f"{', '.join(sorted(file.rfilename for file in held))}")
    return [file for file in held if any(fnmatch(file.rfilename, p) for p in patterns)]


def path_of(repo: str, kind: str, to: str | None, name: str) -> Path | None:
    """Where a file lies, or would lie; None: it is not in the cache."""
    path = (Path(to) / name if to is not None
            else huggingface_hub.try_to_load_from_cache(repo, name, repo_type=kind))
    return Path(path).resolve() if isinstance(path, str | Path) else None  # the cache has links


def print_sizes(repo: str, kind: str, patterns, to: str | None, files: list) -> None:
    """And stop where what is missing could not be kept."""
    print(f"{endpoint()}/{'datasets/' if kind == 'dataset' else ''}{repo}"
          f" -> {to or 'the cache of the hub'}")
    missing, whole = [], format_bytes(sum(file.size or 0 for file in files))
    for file in files:
        path = path_of(repo, kind, to, file.rfilename)
        there = path is not None and path.is_file() and path.stat().st_size == file.size
        missing += [] if there else [file.size or 0]
        size = "?" if file.size is None else format_bytes(file.size)
        print(f"  {size:>10}  {file.rfilename}{'  (there)' if there else ''}")
    print(f"  to fetch: {format_bytes(sum(missing))} of {whole}")
    try:
        if missing:
            check_directory(*(("the data's directory", to) if to is not None else
                              ("the cache of the hub (HF_HOME)",
                               huggingface_hub.constants.HF_HUB_CACHE)))
    except ValueError as error:
        raise SystemExit(str(error)) from error


def fetch(repo: str, kind: str, patterns, to: str | None, files: list) -> list[str]:
    """Fetch what is not there; check all of it. Returns what is wrong, a line for each file."""
    huggingface_hub.snapshot_download(repo, repo_type=kind, local_dir=to, endpoint=endpoint(),
                                      allow_patterns=[file.rfilename for file in files])
    problems = []
    for file in files:
        path = path_of(repo, kind, to, file.rfilename)
        if file.size not in (None, path.stat().st_size):
            problems.append(f"{path}: {path.stat().st_size:,} bytes, the hub says {file.size:,}")
        elif file.lfs and sha256(path) != file.lfs.sha256:
            problems.append(f"{path}: sha256 {sha256(path)}, the hub says {file.lfs.sha256}")
    return problems


def gigabytes(part) -> str:
    return f" ({part.gigabytes:g} GB)" if part.gigabytes else ""


def left_to_do(preset: Preset, parts: list[str]) -> list[str]:
    """What no program can fetch, and archives that are to be unpacked."""
    lines = []
    for part in data_of(preset, parts):
        if part.source.startswith("http"):
            lines.append(f"by hand: {part.source}{gigabytes(part)} -> {part.to}/: "
                         + ", ".join(part.files))
        if part.unpack:
            archive = next(name for name in part.files if name.endswith(".zip"))
            lines.append(f"unpack:  python -m zipfile -e {part.to}/{archive} {part.unpack}")
    return lines


def by_yourself(preset: Preset, parts: list[str]) -> str:
    """Without the hub: what to fetch elsewhere, how big it is, where to put it, which flag."""
    lines = ["Set HF_ENDPOINT to a mirror (such as HF_ENDPOINT=https://hf-mirror.com) and run the "
             "same command again,", "or fetch these on another machine:"]
    for part in parts:
        name = getattr(preset, TOWER_SETTINGS.get(part, ""), None)
        if part != "data" and download_size(name):
            directory = f"weights/{name.rsplit('/', 1)[-1]}"
            lines += [f"  {endpoint()}/{name}/tree/main ({format_bytes(download_size(name))}): "
                      + ", ".join(WANTED_FILES), f"    (or pytorch_model*.bin) -> {directory}/",
                      f"    then add: --{TOWER_SETTINGS[part]} {directory}"]
    for part in data_of(preset, parts):
        if not part.source.startswith("http"):
            lines += [f"  {endpoint()}/datasets/{part.source}/tree/main{gigabytes(part)}: "
                      + ", ".join(part.files), f"    -> {part.to}/, or to any other directory: "
                      "then add --data FILE --image_folder DIR"]
    return "\n".join(lines + [f"  {line}" for line in left_to_do(preset, parts)])


if __name__ == "__main__":
    main()
