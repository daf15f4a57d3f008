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

No other key is read. Where one seems to hold a picture, a video, a sound or the options of a
question, the record is refused (refuse_unread): learned or scored without it, it would be blind.

Data comes from strangers: every value may be of any type and any size, and a file name may lead
anywhere. Whatever cannot be a sample raises BadSample, and a name never leaves the image folder.
Of a key that stands twice in a JSON object the last one counts, as in every JSON reader.
"""

import json
import os
import random
import re
from dataclasses import dataclass, field
from functools import lru_cache
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
# What a key that is not read seems to hold, by its name as kinds_of spells it: see refuse_unread.
_ENDING = (r"(?:_?\d+)?(?:_?(?:file|path|name|url|uri|id|key|index|byte|data|base64|b64|content"
           r"|list|array|tensor|feature|embed|embedding|source|src|ref)s?)*(?:_?\d+)?")
_COUNTED = r"(?!num_|n_|number_|min_|max_|total_)(?:\w+_)?"  # "num_images" is a number
UNREAD = {kind: re.compile(pattern) for kind, pattern in {
    "picture": rf"{_COUNTED}(?:image|img|picture|pic|photo|screenshot)s?{_ENDING}|jpe?g|png|webp"
               r"|gif|frames|frame_(?:path|file|name|url)s?|pixels|pixel_values|thumbnails?",
    "film": rf"{_COUNTED}(?:video|audio)s?{_ENDING}|mp4|wav|mp3|flac",  # and sound
    "file": r"(?:file|media|path|url|uri|src|(?:file|media)_?(?:path|name|url))s?",
    "options": r"(?:(?:answer|mc|multiple|question|possible)_)?(?:options|choices|distractors)"
               r"(?:_?(?:list|text|dict)s?)*|(?:option|choice)_(?:list|text)s?|possible_answers"
               r"|(?:option|choice|distractor)s?_?(?:[a-j]|\d+)|op[a-j]",
    "id": r"(?:\w+_)?(?:u|uu|gu)?ids?",
    # Passed over whatever stands there; other names are, unless media stand there.
    "ignored": r"(?:\w+_)?(?:source|origin|dataset|license|model|split|category|score)s?"}.items()}
_FILM = "mp4|m4v|avi|mov|mkv|webm|mpe?g|wmv|flv|wav|mp3|flac|ogg|opus|m4a|aac"
_STILL = "jpe?g|jpe|jfif|png|webp|gif|bmp|tiff?|heic|avif|ppm|pgm|jp2|svg"
MEDIA_FILE = re.compile(rf"[^\n]{{1,2000}}\.(?:{_STILL}|({_FILM}))(?:[?#]\S*)?\s*", re.IGNORECASE)
OTHER_FILE = re.compile(r"(?!\w+://)[^\n]*\.[a-z]\w{0,4}\s*", re.IGNORECASE)
# How the bytes of media begin; and how they do in base64 or as a data: URI.
MEDIA_BYTES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"ID3",
               b"OggS", b"fLaC")
MEDIA_TEXT = ("data:image/", "data:video/", "data:audio/", "/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
# What other programs write into a text where a picture, a video or a sound belongs.
MARK = re.compile(r"<\|?(image|img|picture|video|audio)((?:_pad|_placeholder|[_ ]?\d+)?\|?)>",
                  re.IGNORECASE)
TURN_KEYS = ("role", "content", "from", "value", "user", "assistant")
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
        turns = find_turns(record, where, index, draw)
        messages = [to_message(turn) for turn in turns]
    except (ValueError, RecursionError) as error:
        raise BadSample(where, str(error)) from error
    length = sum(len(message.role) + len(message.content) for message in messages)
    if length > LONGEST_TEXT:
        raise BadSample(where, f"a conversation of {length:,} characters; expected at most "
                               f"{LONGEST_TEXT:,}, is it a whole book?")
    layout = text_key(record)
    text_keys = ("prompt", "completion") if layout in ("prompt", "completion") else (layout,)
    refuse_blind(record, (*text_keys, picture_key(record), *TAGS), turns, messages, images, where)
    if layout == "caption" and not images:
        raise BadSample(where, "a caption without a picture; expected the name or the bytes of its "
                               "file under 'image'")
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
    key = text_key(record)
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
        return [{**pair, "role": role, "content": pair.get(role)}
                for pair in turns for role in ("user", "assistant")]
    return turns


def text_key(record: dict) -> str:
    """The key that holds the text, and so tells the layout."""
    return next((key for key in TEXT_KEYS if record.get(key) is not None), "conversations")


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
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return IMAGE
    media = isinstance(kind, str) and not {"picture", "film", "file"}.isdisjoint(kinds_of(kind))
    if isinstance(part, dict) and isinstance(part.get("text"), str) and not media:
        return part["text"]
    raise ValueError(f"a part of a turn is {shown(part)}; expected an image or a text, such as "
                     "{'type': 'image'}, whose file stands under 'image' of the record")


def find_pictures(record: dict, images_dir: Path, where: str) -> list:
    """-> paths and bytes. A name is looked up now: a missing file should be reported with its
    line, not by whoever opens it later."""
    key = picture_key(record)
    if key is None:
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


def picture_key(record: dict) -> str | None:
    """The key that holds the pictures; None: there are none."""
    key = next((key for key in PICTURE_KEYS if record.get(key) is not None), None)
    return None if key == "image_id" and "caption" not in record else key


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


# ---------------------------------------------------------------- what stands there unread


def refuse_blind(record: dict, read, turns, messages, images, where: str) -> None:
    """BadSample where a record, its turns or their parts hold what refuse_unread does not let
    pass. read: the keys of the record that are read; turns: as find_turns gives them."""
    asked = "\n".join(message.content for message in messages if message.role != "assistant")
    refuse_unread(record, read, where, images, asked)
    for turn in turns:
        refuse_unread(turn, TURN_KEYS, where, images, asked, " in a turn")
        parts = turn.get("content", turn.get("value"))
        for part in parts if isinstance(parts, list) else ():
            refuse_unread(part, ("type", "text"), where, images, asked, " in a part of a turn")
    refuse_mark(asked, where, images)


def refuse_unread(record: dict, read, where: str, images=(), asked: str = "",
                  inside: str = "") -> None:
    """BadSample where a key that is not read seems to hold what the model would have to see, to
    hear or to choose from: without it the sample is blind, and no figure would tell.

    read: the keys that the layout reads. images: those that were read; beside them a name, an
    address or a number tells where they come from, unless it names another file. asked: the text
    that is read; options that are told in it are read too. inside: where in the sample it stands.
    """
    names = {getattr(image, "name", None) for image in images} - {None} if images else None
    letters = {key for key in record if re.fullmatch("[A-J]|[a-j]", key)
               and isinstance(record[key], str) and not is_nothing(record[key])}
    letters = letters if {"a", "b"} <= {key.lower() for key in letters} else ()
    media, options = {}, {}
    for key, value in record.items():
        if key in read or is_nothing(value):
            continue
        kinds = kinds_of(key[:100])
        if "options" in kinds or key in letters:
            if not told_in(asked, set(texts_in(value))):
                options[key] = value
        elif "film" in kinds:
            if not (images and "id" in kinds):
                media[key] = value
        elif kinds & {"ignored", "id"} and "picture" not in kinds:
            continue
        # A file may be any; not where the record says that it has no picture, see PICTURE_KEYS.
        elif holds_media(value, names) or not images and ("picture" in kinds or (
                "file" in kinds and record.keys().isdisjoint(PICTURE_KEYS)
                and not (isinstance(value, str) and OTHER_FILE.fullmatch(value)))):
            media[key] = value
    for found, what in (
            (media, "a picture, a video or a sound: pictures are read from one of the record's "
             "keys 'image', 'images', 'image_bytes'; rename it, or take it out if it means none"),
            (options, "options to choose from: write them into the question, or for scoring into "
             "'choices' (a list) or 'A', 'B', ... beside 'question' and 'answer'")):
        if found:
            first = shown(next(iter(found.values())))
            raise BadSample(where, f"{', '.join(map(repr, found))}{inside} ({first}) is not read, "
                                   f"and seems to hold {what}")


@lru_cache(maxsize=1000)
def kinds_of(key: str) -> set[str]:
    """What UNREAD says of a key, spelled "image_url" for "imageURL" and "Image-URL"."""
    key = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    key = re.sub("[^a-z0-9]+", "_", key).strip("_")
    return {kind for kind, name in UNREAD.items() if name.fullmatch(key)}


def is_nothing(value, depth: int = 4) -> bool:
    """null, "", [], {"bytes": null}, NaN: a table has a place for it and this row nothing there."""
    if isinstance(value, (list, dict)) and depth:
        return all(is_nothing(each, depth - 1)
                   for each in (value.values() if isinstance(value, dict) else value))
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan", "none", "null")
    return value is None or value is False or value == b"" or value != value


def holds_media(value, names: set | None, depth: int = 4) -> bool:
    """Whether a value is a picture, a video or a sound, or names a file of one that is not in
    names: of the pictures that were read, none for bytes; None where there are no pictures."""
    if isinstance(value, list) and depth:
        return any(holds_media(each, names, depth - 1) for each in value)
    if isinstance(value, dict):  # as the datasets library stores a picture; or {"url": ...}
        place = value.get("path") or value.get("url")
        return not is_nothing(value.get("bytes")) or (
            value.keys() <= {"bytes", "path", "url", "detail"} and holds_media(place, names, 0))
    if isinstance(value, bytes):
        return value.startswith(MEDIA_BYTES) or value[4:8] == b"ftyp"
    if not isinstance(value, str):
        return False
    if value.startswith(MEDIA_TEXT) and len(value) > 40:
        return True
    file = MEDIA_FILE.fullmatch(value)
    if not file or names is None:
        return bool(file)
    if "://" in value:
        return False
    own = {re.split(r"[/\\]", name.strip())[-1] for name in (value, *value.split(","))} & names
    return bool(file[1]) or bool(names and not own)


def told_in(asked: str, options: set) -> bool:
    """Whether a text holds all of the options, each as words of its own; of more than 100, never.
    Letters of Chinese have no words."""
    return len(options) <= 100 and all(
        re.search(rf"(?<![A-Za-z0-9]){re.escape(option)}(?![A-Za-z0-9])", asked)
        for option in options)


def texts_in(value, depth: int = 4):
    """The texts in a value, a list or an object of them; a number is one in a list alone."""
    if isinstance(value, (list, dict)) and depth:
        for each in value.values() if isinstance(value, dict) else value:
            numbers = isinstance(value, list) and isinstance(each, (int, float))
            yield from [str(each)] if numbers else texts_in(each, depth - 1)
    elif isinstance(value, str) and not is_nothing(value):
        yield value.strip()


def refuse_mark(text: str, where: str, images=()) -> None:
    """BadSample for a mark of other programs in a text, where nothing is read that belongs there.

    "<img>", "<video>" and "<audio>" are words of HTML too. There they have a partner, "</video>",
    and other tags in between; or they stand within a line.
    """
    for mark in MARK.finditer(text):
        name, rest, end = mark[1].lower(), mark[2], mark.end()
        if name not in ("video", "audio") and (images or mark[0] == IMAGE):
            continue  # as many as pictures: counted elsewhere
        inside, partner, _ = text[end:end + 2000].partition(f"</{mark[1]}>")
        if partner:
            blind = bool(inside) and not set("<>\n") & set(inside)
        else:
            before = text[max(mark.start() - 200, 0):mark.start()].rpartition("\n")[2]
            after = text[end:end + 200].partition("\n")[0]
            blind = bool(rest) or not before.strip() or not after.strip()
        if blind:
            raise BadSample(where, f"the text has {mark[0]} for something to see or to hear, and "
                                   f"none is read; expected {IMAGE} and a picture under 'image'")
