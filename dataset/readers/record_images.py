"""The images of a record: file names and bytes -> paths that exist in the image folder, and bytes.

    {"image": "a.jpg"}, {"images": [{"bytes": ...}]}, ... -> find_images -> [Path or bytes]

Data comes from strangers, and a file name may lead anywhere: no name leaves the image folder.
"""

import os
from pathlib import Path

from dataset.readers.bad_sample import BadSample, MissingImage, shown

IMAGE_KEYS = ("image", "images", "image_bytes", "image_id")


def find_images(record: dict, images_dir: Path, where: str) -> list:
    """-> paths and bytes. A name is looked up now: a missing file should be reported with its
    line, not by whoever opens it later."""
    key = image_key(record)
    if key is None:
        return []
    found = record[key]
    if isinstance(found, str):  # "a.jpg", or "a.jpg, b.jpg" as minimind-v writes several
        found = found.split(",")
    images = []
    for item in found if isinstance(found, list) else [found]:
        if isinstance(item, dict):  # as the datasets library stores an image
            item = item.get("bytes") or item.get("path")
        if isinstance(item, bytes) and item:
            images.append(item)
        elif isinstance(item, str):
            if item.strip():
                images.append(image_path(images_dir, item.strip(), where))
        else:
            raise BadSample(where, f"{key!r} is {shown(item)}, not an image; expected a "
                                   "file name, the bytes of an image file, or a list of them")
    return images


def image_key(record: dict) -> str | None:
    """The key that holds the images; None: there are none."""
    key = next((key for key in IMAGE_KEYS if record.get(key) is not None), None)
    return None if key == "image_id" and "caption" not in record else key


def image_path(images_dir: Path, name: str, where: str) -> Path:
    """The file that a name in the data means. Only what lies in the image folder is ever opened:
    neither "..", an absolute path nor a symbolic link may lead out of it."""
    path = images_dir / name
    try:
        folder, real = os.path.realpath(images_dir), os.path.realpath(path)
    except ValueError:  # a zero byte or half a character: no file can have such a name
        folder = real = None
    if folder and not Path(real).is_relative_to(folder):
        raise BadSample(where, f"the image {name!r} leads out of the image folder {folder}, to "
                               f"{real}: not opened; give a folder that holds all the images")
    if not os.path.isfile(path):
        if os.path.exists(path):  # opening a pipe would wait for ever
            raise MissingImage(where, f"no image: {path} is a directory, pipe or device")
        raise MissingImage(where, f"no image {path}; is the image directory right?")
    return path
