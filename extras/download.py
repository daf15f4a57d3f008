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
from training.preset_table import PRESETS, Download, Preset
from training.writable import check_directory

PARTS = (*TOWER_SETTINGS, "data")


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m extras.download",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("preset", choices=PRESETS, help="whose models and data")
    parser.add_argument("--part", choices=PARTS, help="only this (default: all three)")
    flags = parser.parse_args(arguments)
    preset, parts = PRESETS[flags.preset], [flags.part] if flags.part else PARTS
    sources, by_hand = sources_of(preset, parts)
    try:
        found = [(source, list_files(source)) for source in sources]
        for source, files in found:  # all sizes before the first file
            print_sizes(source, files)
        problems = [problem for source, files in found for problem in fetch(source, files)]
    except KeyboardInterrupt:
        raise SystemExit("\nstopped: the same command goes on with what is not complete") from None
    except Exception as error:  # no network, no such name, refused, full disk: one way out
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise SystemExit(f"{endpoint()}: {reason}\n\n{by_yourself(preset, parts)}") from error
    if problems:
        raise SystemExit("damaged:\n  " + "\n  ".join(problems)
                         + "\nDelete what is named here and run the same command again.")
    if found:
        print(f"{sum(len(files) for _, files in found)} files are complete, their sizes and "
              "sha256 are the hub's")
    for line in by_hand:
        print(line)


def sources_of(preset: Preset, parts) -> tuple[list[Download], list[str]]:
    """-> what the hub has; what no program can fetch, and archives that are to be unpacked."""
    names = [getattr(preset, TOWER_SETTINGS[part]) for part in parts if part in TOWER_SETTINGS]
    sources = [Download(name, (*WANTED_FILES,), None, download_size(name) / 1e9)
               for name in names if download_size(name)]  # 0: it is in this repository
    by_hand = []
    for data in preset.downloads if "data" in parts else ():
        if data.source.startswith("http"):
            by_hand.append(f"by hand: {data.source}{size(data)} -> {data.to}/: "
                           + ", ".join(data.files))
        else:
            sources.append(data)
        if data.unpack:
            archive = next(name for name in data.files if name.endswith(".zip"))
            by_hand.append(f"unpack:  python -m zipfile -e {data.to}/{archive} {data.unpack}")
    return sources, by_hand


def by_yourself(preset: Preset, parts) -> str:
    """Without the hub: what to fetch elsewhere, how big it is, where to put it, which flag."""
    sources, by_hand = sources_of(preset, parts)
    fetched = [f"{page_of(source)}/tree/main{size(source)}: {', '.join(source.files)} -> "
               f"{source.to or 'weights/' + source.source.split('/')[-1]}/" for source in sources]
    return "\n  ".join([
        "Set HF_ENDPOINT to a mirror (such as HF_ENDPOINT=https://hf-mirror.com) and run the same\n"
        "command again, or fetch these on another machine:", *fetched, *by_hand,
        "A model without model*.safetensors has pytorch_model*.bin. Then add for the models\n"
        "  --language_model DIR and --vision_tower DIR, and for data, if it is put elsewhere,\n"
        "  --data FILE --image_folder DIR"])


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def kind_of(source: Download) -> str:
    return "model" if source.to is None else "dataset"  # models go to the cache of the hub


def page_of(source: Download) -> str:
    return f"{endpoint()}/{'' if source.to is None else 'datasets/'}{source.source}"


def size(source: Download) -> str:
    return f" ({format_bytes(1e9 * source.gigabytes)})" if source.gigabytes else ""


def list_files(source: Download) -> list:
    """The files of a repository that are wanted: RepoSibling(rfilename, size, lfs)."""
    held = huggingface_hub.HfApi(endpoint=endpoint()).repo_info(
        source.source, repo_type=kind_of(source), files_metadata=True).siblings
    names, patterns = [file.rfilename for file in held], list(source.files)
    missing = [p for p in patterns if not any(fnmatch(name, p) for name in names)]
    if kind_of(source) == "model":
        patterns += PICKLE_FILES if "model*.safetensors" in missing else []
    elif missing:
        raise FileNotFoundError(f"{source.source} holds no {', '.join(missing)} any more, but "
                                f"{', '.join(sorted(names))}")
    return [file for file in held if any(fnmatch(file.rfilename, p) for p in patterns)]


def print_sizes(source: Download, files: list) -> None:
    """And stop where what is missing could not be kept."""
    place = ("the data's directory", source.to)
    if source.to is None:
        place = ("the cache of the hub (HF_HOME)", huggingface_hub.constants.HF_HUB_CACHE)
    print(f"{page_of(source)} -> {source.to or place[0]}")
    missing = 0
    for file in files:
        path = (huggingface_hub.try_to_load_from_cache(source.source, file.rfilename)
                if source.to is None else f"{source.to}/{file.rfilename}")
        there = (isinstance(path, str) and os.path.isfile(path)
                 and os.path.getsize(path) == file.size)
        missing += 0 if there else file.size
        print(f"  {format_bytes(file.size):>10}  {file.rfilename}{'  (there)' if there else ''}")
    print(f"  to fetch: {format_bytes(missing)} of {format_bytes(sum(f.size for f in files))}")
    try:
        if missing:
            check_directory(*place)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def fetch(source: Download, files: list) -> list[str]:
    """Fetch what is not there; check all of it. Returns what is wrong, a line for each file."""
    directory = Path(huggingface_hub.snapshot_download(
        source.source, repo_type=kind_of(source), local_dir=source.to, endpoint=endpoint(),
        allow_patterns=[file.rfilename for file in files]))
    problems = []
    for file in files:
        path = (directory / file.rfilename).resolve()  # the cache has links
        if path.stat().st_size != file.size:
            problems.append(f"{path}: {path.stat().st_size:,} bytes, the hub says {file.size:,}")
        elif file.lfs and sha256(path) != file.lfs.sha256:
            problems.append(f"{path}: sha256 {sha256(path)}, the hub says {file.lfs.sha256}")
    return problems


if __name__ == "__main__":
    main()
