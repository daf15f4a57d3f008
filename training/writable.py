"""Can what a command makes be written there? Asked before an hour's work, not after it.

    --out DIR, --attention FILE -> the nearest directory above that is there -> may it be written to

Nothing is made, so a command that then stops for another reason leaves nothing behind.
"""

import os
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path

from PIL import Image


def check_directory(name: str, path) -> None:
    """Raise ValueError where no directory `path` can be made, or nothing be written into it.

    name: of the flag, or of whatever else says path.
    """
    if not str(path) or (os.path.lexists(path) and not os.path.isdir(path)):
        raise ValueError(f"{name} {path}: expected a directory, or the name of a new one, and "
                         f"found {'a file' if str(path) else 'no name'}; give another name")
    try_to_write(name, path)


def check_image(name: str, path) -> None:
    """Raise ValueError where no image file `path` can be written; one that is there may be
    replaced. name: as above."""
    if os.path.isdir(path):
        raise ValueError(f"{name} {path}: expected the name of a file, and found a directory")
    if Image.registered_extensions().get(Path(path).suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{name} {path}: no kind of image that can be written ends in "
                         f"{Path(path).suffix!r}; give a name that ends in .png")
    try_to_write(name, path)


def try_to_write(name: str, path) -> None:
    """Open what is nearest to it for writing, and change nothing. Permissions alone do not tell:
    root has them all, also on a disk that can only be read."""
    target = above = Path(path).absolute()
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(target)  # raises what no path above would show: too long a name, say
        above = next(each for each in (target, *target.parents) if os.path.lexists(each))
        if above.is_dir():
            tempfile.TemporaryFile(dir=above).close()
        elif above == target:
            open(above, "ab").close()
        else:
            raise NotADirectoryError(0, "is not a directory")
    except (OSError, ValueError) as error:  # ValueError: no name at all, for it has a null byte
        raise ValueError(f"{name} {path}: cannot be written (tried at {above}: "
                         f"{getattr(error, 'strerror', error)}); give another name") from error


def free_name(directory: Path, name: str) -> Path:
    """DIRECTORY/NAME_1, or with the first number that is free: one in between may have been
    deleted."""
    return next(path for number in count(1)
                if not (path := directory / f"{name}_{number}").exists())
