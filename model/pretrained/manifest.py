"""What each file of a checkpoint must be: noticed are files that a crash or a copy left torn.

    files of a directory -> write_manifest -> manifest.json -> check_whole -> silence, or TornError

    {"model.safetensors": {"bytes": 7600, "sha256": "9f86d0..."}, ...}
"""

import hashlib
import json
from pathlib import Path

NAME = "manifest.json"


class TornError(ValueError):
    """A checkpoint is not as it was saved; the text names the file."""


def write_manifest(directory: Path) -> None:
    """Call it last: it speaks of all files that are there."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    told = {path.relative_to(directory).as_posix():
            {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    (directory / NAME).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def check_whole(directory: Path) -> None:
    """Raise TornError when a file is missing, cut short or changed; about a second for each
    gigabyte. Checkpoints from before there were manifests cannot be checked, and pass."""
    manifest = Path(directory) / NAME
    if not manifest.is_file():
        return
    try:
        told = json.loads(manifest.read_text(encoding="utf-8"))
        expected = [(Path(directory) / name, f["bytes"], f["sha256"]) for name, f in told.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TornError(f"{manifest} is torn: {error!r}") from error
    for path, size, _ in expected:  # sizes first: they cost nothing
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise TornError(f"{path} is torn: expected {size:,} bytes, found "
                            + ("no such file" if found is None else f"{found:,}"))
    for path, _, digest in expected:
        if (found := sha256(path)) != digest:
            raise TornError(f"{path} is not what was saved: sha256 {found[:16]}..., expected "
                            f"{digest[:16]}.... If you changed it yourself, delete {manifest}")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
