"""Can what a command makes be written there? Asked before an hour's work, not after it.

    --out DIR, --attention FILE -> the nearest directory above that is there -> may it be written to

Nothing is made, so a command that then stops for another reason leaves nothing behind.
"""

import os
import tempfile
from itertools import count
from pathlib import Path

from PIL import Image


def check_directory(name: str, path) -> None:
    """Raise ValueError where no directory `path` can be made, or nothing be written into it.

    name: of the flag, or of whatever else says path.
    """
    if not str(path):
        raise ValueError(f"{name} '': expected the name of a directory")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ValueError(f"{name} {path}: expected a directory, or the name of a new one, and "
                         "found a file; give another name")
    try_to_write(name, path)


def check_file(name: str, path) -> None:
    """Raise ValueError where no file `path` can be written, with the directories above it; one
    that is there may be replaced. name: as above."""
    if not str(path):
        raise ValueError(f"{name} '': expected the name of a file")
    if os.path.isdir(path):
        raise ValueError(f"{name} {path}: expected the name of a file, and found a directory")
    try_to_write(name, path)


def check_image(name: str, path) -> None:
    """check_file, and ValueError where the name's end is that of no kind of image."""
    check_file(name, path)
    if Image.registered_extensions().get(Path(path).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{name} {path}: no kind of image that can be written ends in "
                         f"{Path(path).suffix!r}; give a name that ends in .png")


def try_to_write(name: str, path) -> None:
    """Open what is nearest to it for writing, and change nothing. Permissions alone do not tell:
    root has them all, also on a disk that can only be read."""
    try:
        target = above = Path(path).absolute()
        while not exists(above):
            above = above.parent
        if above.is_dir():
            tempfile.TemporaryFile(dir=above).close()
        elif above == target:
            open(above, "ab").close()
        else:
            raise NotADirectoryError(0, "is not a directory", str(above))
    except (OSError, ValueError) as error:  # ValueError: no name at all, for it has a null byte
        reason = f"tried at {above}: {error.strerror}" if isinstance(error, OSError) else error
        raise ValueError(f"{name} {path}: cannot be written ({reason}); give another name"
                         ) from error


def exists(path: Path) -> bool:
    """As os.path.lexists, but any other fault of the path raises: too long a name, say."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def free_name(directory: Path, name: str) -> Path:
    """DIRECTORY/NAME_1, or with the first number that is free: one in between may have been
    deleted."""
    return next(path for number in count(1)
                if not (path := directory / f"{name}_{number}").exists())
