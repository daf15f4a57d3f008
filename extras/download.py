"""Fetch what a preset needs: models into the hub's cache, data to where the preset looks for it.

    python -m extras.download qwen2.5-siglip                  all of it
    python -m extras.download qwen2.5-siglip --part data      or language, or vision

    preset -> the hub's list of files, with sizes -> told -> fetched -> size and sha256 checked

What is there already is not fetched again, and an interrupted file goes on where it stopped.
HF_ENDPOINT names a mirror, HF_HOME another place for the cache. Without a network the program
says what to fetch elsewhere, how big it is and which flag then names it.

This is a command and no part of what training imports: so, unlike the rest of this directory, it
may ask the model's side which files the loader reads.
"""

import argparse
import os
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers

from extras.preset_list import download_size
from model.pretrained.files import sha256
from model.pretrained.hub import PICKLE_FILES, WANTED_FILES
from training.presets import PRESETS, Preset

PARTS = ("language", "vision", "data")



@dataclass(frozen=True)
class File:
    """One file on the hub."""

    repo: str
    kind: str  # "model" or "dataset"
    name: str  # in its repository, perhaps with directories
    size: int | None  # bytes; None: the hub does not say
    sha256: str | None  # of large files; the hub gives none for small ones
    to: str | None  # directory to put it into; None: the hub's cache

    def there(self) -> Path | None:
        """Where it lies already, complete; None: it is to be fetched."""
        if self.to is None:
            found = huggingface_hub.try_to_load_from_cache(self.repo, self.name,
                                                           repo_type=self.kind)
            path = Path(found) if isinstance(found, str) else None
        else:
            path = Path(self.to) / self.name
        if path is None or not path.is_file() or path.stat().st_size != self.size:
            return None
        return path

    def fetch(self) -> Path:
        if self.sha256:
            place = self.large_place()
            fetch_large(self, place)
            if self.to is not None:
                return place
        # Small files, and the cache's own entry for a large one, whose bytes it finds in place.
        return Path(huggingface_hub.hf_hub_download(
            self.repo, self.name, repo_type=self.kind, local_dir=self.to, endpoint=endpoint()))

    def large_place(self) -> Path:
        if self.to is not None:
            return Path(self.to) / self.name
        folder = repo_folder_name(repo_id=self.repo, repo_type=self.kind)
        return Path(huggingface_hub.constants.HF_HUB_CACHE) / folder / "blobs" / self.sha256

    def problem(self, path: Path) -> str | None:
        """What is wrong with the fetched file, if anything."""
        place = path.resolve()  # the cache names a file by a link: what the link leads to counts
        told, found = self.size, place.stat().st_size
        if told is not None and found != told:
            return f"{place}: {found:,} bytes, the hub says {told:,}"
        if self.sha256 and sha256(place) != self.sha256:
            return f"{place}: sha256 {sha256(place)}, the hub says {self.sha256}"
        return None


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m extras.download",
                                     description=__doc__.split("\n\n")[0])
    parser.add_argument("preset", choices=PRESETS, help="whose models and data")
    parser.add_argument("--part", choices=PARTS, help="only this (default: all three)")
    flags = parser.parse_args(arguments)
    preset, parts = PRESETS[flags.preset], [flags.part] if flags.part else list(PARTS)
    try:
        files = [file for part in parts for file in look_up(preset, part)]
        report(files)
        problems = download(files)
    except KeyboardInterrupt:
        raise SystemExit("\nstopped: the same command goes on from here") from None
    except Exception as error:  # no network, no such name, refused, full disk: one way out
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise SystemExit(f"{endpoint()}: {reason}\n\n{by_yourself(preset, parts)}") from error
    if problems:
        raise SystemExit("damaged:\n  " + "\n  ".join(problems)
                         + "\nDelete what is named here and run the same command again.")
    if files:
        print(f"{len(files)} files are complete, their sizes and sha256 are the hub's")
    for line in left_to_do(preset, parts):
        print(line)


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def look_up(preset: Preset, part: str) -> list[File]:
    """What the hub holds of a part, as far as it is read here."""
    if part == "data":
        return [file for download in preset.downloads if not download.source.startswith("http")
                for file in listed(download.source, "dataset", list(download.files), download.to)]
    name = getattr(preset, part)
    if download_size(name) == 0:  # it lies in this repository
        return []
    return listed(name, "model", WANTED_FILES, None)


def listed(repo: str, kind: str, patterns: list[str], to: str | None) -> list[File]:
    """The files of a repository on the hub that fit one of the patterns, with their facts."""
    api = huggingface_hub.HfApi(endpoint=endpoint())
    ask = api.dataset_info if kind == "dataset" else api.model_info
    held = {file.rfilename: file for file in ask(repo, files_metadata=True).siblings}

    def fitting(patterns):
        return [name for name in held if any(fnmatch(name, pattern) for pattern in patterns)]

    if kind == "model" and not fitting(["model*.safetensors"]):
        patterns = patterns + PICKLE_FILES
    if kind == "dataset":
        missing = [pattern for pattern in patterns if not fitting([pattern])]
        if missing:
            raise FileNotFoundError(f"{repo} holds no {', '.join(missing)} any more, but "
                                    f"{', '.join(sorted(held))}")
    return [File(repo, kind, name, held[name].size,
                 held[name].lfs.sha256 if held[name].lfs else None, to)
            for name in sorted(fitting(patterns))]


def report(files: list[File]) -> None:
    """Every file with its size, before the first of them is fetched."""
    repo = None
    for file in files:
        if file.repo != repo:
            repo = file.repo
            print(f"{endpoint()}/{'datasets/' if file.kind == 'dataset' else ''}{repo}"
                  f" -> {file.to or 'the cache of the hub'}")
        print(f"  {size(file.size):>10}  {file.name}{'  (there)' if file.there() else ''}")
    if files:
        wanted = [file for file in files if not file.there()]
        print(f"to fetch: {size(sum(file.size or 0 for file in wanted))} of "
              f"{size(sum(file.size or 0 for file in files))}")


def download(files: list[File]) -> list[str]:
    """Fetch what is not there; check everything. Returns what is wrong, a line for each file."""
    problems = [file.problem(file.there() or file.fetch()) for file in files]
    return [problem for problem in problems if problem]


def fetch_large(file: File, place: Path) -> None:
    """Go on where an earlier attempt stopped; huggingface_hub shows the progress.

    Left to itself, its newer versions begin an interrupted file anew, and Qwen-7B's files have two
    gigabytes each. The hash in the name keeps the beginnings of two releases apart.
    """
    part = place.with_name(f"{place.name}.{file.sha256[:8]}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as opened:
        http_get(huggingface_hub.hf_hub_url(file.repo, file.name, repo_type=file.kind,
                                            endpoint=endpoint()),
                 opened, resume_size=part.stat().st_size, expected_size=file.size,
                 headers=build_hf_headers())
    os.replace(part, place)


def size(number: float | None) -> str:
    """988000000 -> "988.0 MB"; 1 MB is 1,000,000 bytes, as the hub counts."""
    if number is None:
        return "? MB"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number:.0f} bytes"


def left_to_do(preset: Preset, parts: list[str]) -> list[str]:
    """What no program can fetch, and archives that are to be unpacked."""
    lines = []
    for part in preset.downloads if "data" in parts else ():
        if part.source.startswith("http"):
            told = f" ({part.gigabytes:g} GB)" if part.gigabytes else ""
            lines.append(f"by hand: {part.source}{told} -> {part.to}/: {', '.join(part.files)}")
        if part.unpack:
            archive = next(name for name in part.files if name.endswith(".zip"))
            lines.append(f"unpack:  python -m zipfile -e {part.to}/{archive} {part.unpack}")
    return lines


def by_yourself(preset: Preset, parts: list[str]) -> str:
    """Without the hub: what to fetch elsewhere, how big it is, where to put it, which flag."""
    lines = ["Set HF_ENDPOINT to a mirror (such as HF_ENDPOINT=https://hf-mirror.com) and run the "
             "same command again,", "or fetch these on another machine:"]
    for part in parts:
        name = getattr(preset, part, None)
        if part != "data" and download_size(name):
            directory = f"weights/{name.rsplit('/', 1)[-1]}"
            companion = ("tokenizer*, *.tiktoken" if part == "language"
                         else "preprocessor_config.json")
            lines += [f"  {endpoint()}/{name}/tree/main ({size(download_size(name))}):",
                      f"    config.json, {companion}, model*.safetensors (or pytorch_model*.bin)",
                      f"    -> {directory}/",
                      f"    then add: --{part} {directory}"]
    for part in preset.downloads if "data" in parts else ():
        if part.source.startswith("http"):
            continue  # said below
        told = f" ({part.gigabytes:g} GB)" if part.gigabytes else ""
        lines += [f"  {endpoint()}/datasets/{part.source}/tree/main{told}: "
                  f"{', '.join(part.files)}",
                  f"    -> {part.to}/, or to any other place: then add --data FILE --images DIR"]
    return "\n".join(lines + [f"  {line}" for line in left_to_do(preset, parts)])


if __name__ == "__main__":
    main()
