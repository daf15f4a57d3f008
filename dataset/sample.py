"""One record, in whichever layout its authors chose -> Sample.

    a dict, from JSON or Parquet -> to_sample -> Sample(messages, images, where, tags)

The key that holds the text tells the layout:

    conversations, messages   [{"role": "user", "content": ...}, ...]    minimind-v, plain chats
                              [{"from": "human", "value": ...}, ...]     LLaVA, cc3m
    prompt and completion     two lists of turns, or two texts           TRL's llava-instruct-mix
    texts                     [{"user": ..., "assistant": ...}, ...]     the Cauldron, FineVision
    caption                   one text, or several of one picture        COCO, AI Challenger

The pictures stand in `image`, `images` or `image_bytes`, one or a list, each a file name, bytes or
{"bytes": ..., "path": ...}; AI Challenger has the name in `image_id`. Without any of them it is a
conversation in plain text.

Data comes from strangers: every value may be of any type and any size, and a file name may lead
anywhere. Whatever cannot be a sample raises BadSample, and a name never leaves the image folder.
Of a key that stands twice in a JSON object the last one counts, as in every JSON reader.
"""

import json
import os
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from dataset.chat import IMAGE, Message

TURNS = ("conversations", "messages")
TEXT_KEYS = (*TURNS, "prompt", "completion", "texts", "caption")
PICTURE_KEYS = ("image", "images", "image_bytes", "image_id")
TAGS = ("kind", "language")  # optional, for scores by kind and by language
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's words; all others are taken as they are

# A caption has no question, so one is put in front of it, in the caption's language.
PROMPTS = {
    "zh": ("请用一句话描述这张图片。", "这张图片里有什么？", "图中是怎样的场景？请简单说明。",
           "请为这张图片写一句说明。"),
    "en": ("Describe this picture in one sentence.", "What is in this picture?",
           "What does the picture show? Answer briefly.", "Write a caption for this picture."),
}
CHINESE = re.compile("[\u4e00-\u9fff]")
LONGEST_TEXT = 500_000  # characters; a model reads a tenth of it, a tokenizer needs seconds for it
LONGEST_REASON = 500  # characters of a message; a name can be as long as the file


@dataclass(frozen=True)
class Sample:
    messages: tuple  # of Message
    images: tuple  # each a path, bytes, a PIL.Image or a function that draws one; as the markers
    where: str  # "file:line", for whoever has to repair it
    tags: dict = field(default_factory=dict)  # e.g. {"kind": "count", "language": "en"}


class BadSample(Exception):
    """A row or a picture that cannot be used: where it stands, and what is wrong with it."""

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)  # both, so that it can be pickled by a loader's worker
        self.where, self.reason = where, printable(reason)

    def __str__(self):
        return f"{self.where}: {self.reason}"


class MissingPicture(BadSample):
    """The row is sound, but the file that it names is not there."""


def printable(text: str) -> str:
    """Data that is quoted in a message must not steer the terminal, break the line, hold half a
    character (no file could take it) or fill the screen."""
    if len(text) > LONGEST_REASON:
        text = text[:LONGEST_REASON - 100] + " ... " + text[-95:]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value) -> str:
    """A value that is not what it should be, for a message: its beginning, in quotes."""
    try:
        return repr(str(value)[:60])
    except RecursionError:
        return "lists nested too deeply"


def to_sample(record: dict, images_dir: Path, where: str, index: int = 0, draw: int = 0) -> Sample:
    """One record -> Sample with as many <image> markers as pictures, or BadSample.

    index, draw: of several captions, record number `index` shows the same one each time, and
    the next one with each higher `draw`.
    """
    images = find_pictures(record, images_dir, where)
    try:
        messages = [to_message(turn) for turn in find_turns(record, where, index, draw)]
    except (ValueError, RecursionError) as error:
        raise BadSample(where, str(error)) from error
    length = sum(len(message.role) + len(message.content) for message in messages)
    if length > LONGEST_TEXT:
        raise BadSample(where, f"a conversation of {length:,} characters; expected at most "
                               f"{LONGEST_TEXT:,}, is it a whole book?")
    if any(message.role == "assistant" and not message.content.strip() for message in messages):
        raise BadSample(where, "an answer is empty: it would teach to say nothing")
    markers = sum(message.images for message in messages)
    if images and not markers:  # some data sets leave the marker out: the picture comes first
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise BadSample(where, "a picture, but no user turn that could show it")
        text = f"{IMAGE}\n" * len(images) + messages[first].content
        messages[first] = Message("user", text)
        markers = len(images)
    if markers != len(images):
        raise BadSample(where, f"{markers} {IMAGE} markers for {len(images)} pictures; "
                               "each picture needs its own")
    # Other data may use these words for something else: a list cannot name a group of scores.
    tags = {name: record[name] for name in TAGS
            if isinstance(record.get(name), str) and record[name].isprintable()}
    return Sample(tuple(messages), tuple(images), where, tags)


def find_turns(record: dict, where: str, index: int, draw: int) -> list:
    """-> turns, each an object with role and content (or from and value)."""
    key = next((key for key in TEXT_KEYS if record.get(key) is not None), "conversations")
    turns = record.get(key)
    if key == "caption":
        return caption_turns(turns, where, index, draw)
    if key in TURNS and isinstance(turns, str):  # Parquet of minimind-v: a column of JSON text
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise BadSample(where, f"cannot read {key!r}: not JSON: {error}") from error
    if key in ("prompt", "completion"):
        key = "prompt and completion"
        turns = (as_turns(record.get("prompt"), "user")
                 + as_turns(record.get("completion"), "assistant"))
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        expected = "user and assistant" if key == "texts" else (
            "role and content (or from and value)")
        raise BadSample(where, f"{key!r} must be a list of turns, each an object with {expected}; "
                               f"found {shown(turns)}")
    if key == "texts":
        return [{"role": role, "content": pair.get(role)}
                for pair in turns for role in ("user", "assistant")]
    return turns


def as_turns(found, role: str) -> list:
    if isinstance(found, str):
        return [{"role": role, "content": found}]
    return found if isinstance(found, list) else [] if found is None else [found]


def caption_turns(captions, where: str, index: int, draw: int) -> list:
    """One prompt and one of the captions. The start of each is random but fixed by `index`; from
    there `draw` goes round, so that n draws of n captions show each of them once."""
    texts = [captions] if isinstance(captions, str) else captions
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadSample(where, f"'caption' is {shown(captions)}; expected a text or several")
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise BadSample(where, "'caption' holds no text; remove the entry or write one")
    dice = random.Random(index)
    caption = texts[(dice.randrange(len(texts)) + draw) % len(texts)]
    prompts = PROMPTS["zh" if CHINESE.search(caption) else "en"]
    prompt = prompts[(dice.randrange(len(prompts)) + draw) % len(prompts)]
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": caption}]


def to_message(turn: dict) -> Message:
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if not isinstance(role, str):
        raise ValueError(f"the role of a turn is {shown(role)}; expected a text such as 'user'")
    if isinstance(content, list):
        content = "".join(map(part_text, content))
    return Message(ROLES.get(role, role), content)


def part_text(part) -> str:
    """{"type": "image"} -> the marker, {"type": "text", "text": "..."} -> its text."""
    if isinstance(part, dict) and part.get("type") == "image":
        return IMAGE
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError(f"a part of a turn is {shown(part)}; expected an image or a text")


def find_pictures(record: dict, images_dir: Path, where: str) -> list:
    """-> paths and bytes. A name is looked up now: a missing file should be reported with its
    line, not by whoever opens it later."""
    key = next((key for key in PICTURE_KEYS if record.get(key) is not None), None)
    if key is None or (key == "image_id" and "caption" not in record):
        return []
    found = record[key]
    if isinstance(found, str):  # "a.jpg", or "a.jpg, b.jpg" as minimind-v writes several
        found = found.split(",")
    pictures = []
    for item in found if isinstance(found, list) else [found]:
        if isinstance(item, dict):  # as the datasets library stores a picture
            item = item.get("bytes") or item.get("path")
        if isinstance(item, bytes) and item:
            pictures.append(item)
        elif isinstance(item, str):
            if item.strip():
                pictures.append(existing(images_dir, item.strip(), where))
        else:
            raise BadSample(where, f"{key!r} is {shown(item)}, not a picture; expected a "
                                   "file name, the bytes of an image file, or a list of them")
    return pictures


def existing(images_dir: Path, name: str, where: str) -> Path:
    """The file that a name in the data means. Only what lies in the image folder is ever opened:
    neither "..", an absolute path nor a symbolic link may lead out of it."""
    path = images_dir / name
    try:
        folder, real = os.path.realpath(images_dir), os.path.realpath(path)
    except ValueError:  # a zero byte or half a character: no file can have such a name
        folder = real = None
    if folder and not Path(real).is_relative_to(folder):
        raise BadSample(where, f"the picture {name!r} leads out of the image folder {folder}, to "
                               f"{real}: not opened; give a folder that holds all the pictures")
    if not os.path.isfile(path):
        if os.path.exists(path):  # opening a pipe would wait for ever
            raise MissingPicture(where, f"no picture: {path} is a directory, pipe or device")
        raise MissingPicture(where, f"no picture {path}; is the image directory right?")
    return path
