"""The images of a record: file names, bytes and base64 -> paths in the image folder, and bytes.

    {"image": "a.jpg"}, {"images": [{"bytes": ...}]}, ...        -> find_images -> [Path or bytes]
    a turn's content, a text or [{"type": "image", ...}, ...]    -> read_content -> text, images

Data comes from strangers, and a file name may lead anywhere: no name leaves the image folder, and
nothing is fetched from the network.
"""

import base64
import os
import re
from dataclasses import dataclass
from pathlib import Path

from dataset.chat import IMAGE
from dataset.readers.bad_sample import BadSample, MissingImage, shown

# Keys of a record that hold its images, in the words of many data sets; one of them counts.
IMAGE_KEYS = ("image", "images", "image_bytes", "image_path", "image_paths", "image_file",
              "image_files", "image_url", "image_urls", "img", "img_path", "file_name",
              "file_names", "image_id")
PART_KEYS = ("image", "image_url", "path", "url", "bytes")  # of a part of a turn that is an image
DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")
BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk0)[A-Za-z0-9+/\s]{40,}={0,2}\s*")
ENDINGS = "jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|heic|avif|ppm|pgm|jp2"  # of image files
IMAGE_FILE = re.compile(rf"[^\n]{{1,2000}}\.(?:{ENDINGS})\s*", re.IGNORECASE)
ADDRESS = re.compile(r"\w{2,}://", re.ASCII)


@dataclass(frozen=True)
class ImageFolder:
    """A directory that a user has named. follow_links: links in it are the user's own, not the
    data's, and may lead to other disks; a name in the data leads out by itself in no case."""

    path: Path
    follow_links: bool = False

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def holds(self, path: Path) -> bool:
        """Whether a name in the data may lead to this file."""
        # ".." behind a link is not the folder that it seems to be.
        named_inside = (path.is_relative_to(self.path)
                        and ".." not in path.relative_to(self.path).parts)
        if self.follow_links:
            return named_inside
        # A snapshot in the hub's cache is made of links to the blobs beside it.
        blobs = [above.parent / "blobs" for above in Path(os.path.abspath(self.path), "x").parents
                 if above.name == "snapshots"]
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(os.path.realpath(folder))
                   for folder in (self.path, *(blobs if named_inside else ())))


def find_images(record: dict, images_dir: ImageFolder, where: str) -> list:
    """-> paths and bytes. A name is looked up now: a missing file should be reported with its
    line, not by whoever opens it later."""
    key = image_key(record)
    if key is None:
        return []
    found = record[key]
    if isinstance(found, str) and "," in found and not (
            DATA_URI.match(found) or is_file(images_dir, found)):
        found = found.split(",")  # "a.jpg, b.jpg" as minimind-v writes several
    images = []
    for item in found if isinstance(found, list) else [found]:
        image = read_image(item, images_dir, where, key)
        images += [] if image is None else [image]
    return images


def image_key(record: dict) -> str | None:
    """The key that holds the images; None: there are none."""
    for key in IMAGE_KEYS:
        value = record.get(key)
        first = value[0] if isinstance(value, list) and value else value
        own = key in IMAGE_KEYS[:3]  # what is there must be an image
        if value is None or (not own and is_nothing(value)) or (
                key == "image_id" and "caption" not in record):
            continue
        if not key.startswith("file_") or (isinstance(first, str) and IMAGE_FILE.fullmatch(first)):
            return key
    return None


def is_nothing(value, depth: int = 4) -> bool:
    """null, "", [], {"bytes": null}, NaN: a table has a place for it and this row nothing there."""
    if isinstance(value, (list, dict)) and depth:
        return all(is_nothing(each, depth - 1)
                   for each in (value.values() if isinstance(value, dict) else value))
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan", "none", "null")
    return value is None or value is False or value == b"" or value != value


def read_image(item, images_dir: ImageFolder, where: str, key: str) -> Path | bytes | None:
    """One image as a record or a part names it: a file, bytes, base64, or an object with one of
    them; None: an empty name."""
    for _ in range(2):  # {"image_url": {"url": ...}}
        if isinstance(item, dict):  # as the datasets library stores an image, or OpenAI's parts
            item = next((item[name] for name in ("bytes", "path", "url") if item.get(name)), item)
    if isinstance(item, bytes) and item:
        return item
    if not isinstance(item, str):
        raise BadSample(where, f"{key!r} is {shown(item)}, not an image; expected a "
                               "file name, the bytes of an image file, or a list of them")
    uri = DATA_URI.match(item)
    if uri or BASE64.fullmatch(item):
        try:
            return base64.b64decode(item[uri.end() if uri else 0:], validate=False)
        except ValueError as error:
            raise BadSample(where, f"{key!r} is no base64: {error}") from error
    if ADDRESS.match(item) and not is_file(images_dir, item):
        raise BadSample(where, f"{key!r} is {shown(item)}: nothing is fetched from the network "
                               "while data is read; download the images and give their file names")
    return image_path(images_dir, item.strip(), where) if item.strip() else None


def read_content(content, images_dir: ImageFolder, where: str) -> tuple[str, list]:
    """A turn's content -> its text with a marker for each image, and what each marker shows: an
    image that stands in its part; None: the next one of the record."""
    if not isinstance(content, list):
        return content, [None] * (content.count(IMAGE) if isinstance(content, str) else 0)
    texts, images = [], []
    for part in content:
        given = part if isinstance(part, dict) else {}
        given = {key: value for key, value in given.items() if value is not None}
        kind, key = given.get("type"), next((key for key in PART_KEYS if given.get(key)), None)
        if kind in ("image", "image_url", "input_image") or (kind is None and key == "image"):
            texts.append((IMAGE, True))
            images.append(None if key is None else read_image(given[key], images_dir, where, key))
        elif kind in (None, "text", "input_text", "output_text") and isinstance(
                given.get("text"), str):
            texts.append((given["text"], False))
            images += [None] * given["text"].count(IMAGE)
        else:
            raise ValueError(f"a part of a turn is {shown(part)}; expected an image or a text, "
                             "such as {'type': 'image', 'image': 'a.jpg'}")
    return join_parts(texts), images


def join_parts(parts: list) -> str:
    """(text, whether it is an image's marker) -> the turn. An image stands in a line of its own,
    as eval.py asks and as an exported template writes it."""
    joined, after_image = "", False
    for text, is_image in parts:
        border = joined and text and (is_image or after_image)
        if border and not (joined.endswith("\n") or text.startswith("\n")):
            joined += "\n"
        joined += text
        after_image = is_image if text else after_image
    return joined


def is_file(images_dir: ImageFolder, name: str) -> bool:
    try:
        return os.path.isfile(images_dir / name.strip())
    except ValueError:  # a zero byte or half a character: no file can have such a name
        return False


def image_path(images_dir: ImageFolder, name: str, where: str) -> Path:
    """The file that a name in the data means. Only what lies in the image folder is ever opened:
    neither "..", an absolute path nor a symbolic link may lead out of it."""
    if "\\" in name and not is_file(images_dir, name):  # written on Windows
        name = name.replace("\\", "/")
    path = images_dir / name
    try:
        held = images_dir.holds(path)
    except ValueError:  # a zero byte or half a character: no file can have such a name
        held = True  # and so none is found below
    if not held:
        raise BadSample(where, f"the image {name!r} leads out of the image folder "
                               f"{images_dir.path}, to {os.path.realpath(path)}: not opened; "
                               "give a folder that holds all the images, or --follow_links where "
                               "the links in it are your own")
    if not os.path.isfile(path):
        if os.path.exists(path):  # opening a pipe would wait for ever
            raise MissingImage(where, f"no image: {path} is a directory, pipe or device")
        raise MissingImage(where, f"no image {path}; is the image directory right?")
    return path
