"""What stands in a record unread: refused where it seems to hold what the model would have to see.

    record, the keys that are read -> refuse_unread -> nothing, or BadSample

A record may hold keys that its layout does not read. Most of them are harmless (ids, sources,
licenses). Where one seems to hold an image, a video, a sound or the options of a question, the
sample would be blind without it, learned or scored all the same, and no number would show it. So
the record is refused, by the name of the key and by what the value looks like. So is a system text
or a weight under a key where none is read: it would change what is learned.
"""

import re
from functools import lru_cache

from dataset.chat import IMAGE
from dataset.readers.bad_sample import BadSample, shown
from dataset.readers.record_images import ENDINGS, IMAGE_KEYS, PART_KEYS, is_nothing

# What a key that is not read seems to hold, by its name as kinds_of spells it: see refuse_unread.
_ENDING = (r"(?:_?\d+)?(?:_?(?:file|path|name|url|uri|id|key|index|byte|data|base64|b64|content"
           r"|list|array|tensor|feature|embed|embedding|source|src|ref)s?)*(?:_?\d+)?")
_COUNTED = r"(?!num_|n_|number_|min_|max_|total_)(?:\w+_)?"  # "num_images" is a number
UNREAD = {kind: re.compile(pattern) for kind, pattern in {
    "image": rf"{_COUNTED}(?:image|img|picture|pic|photo|screenshot)s?{_ENDING}|jpe?g|png|webp"
               r"|gif|frames|frame_(?:path|file|name|url)s?|pixels|pixel_values|thumbnails?",
    "video": rf"{_COUNTED}(?:video|audio)s?{_ENDING}|mp4|wav|mp3|flac",  # and sound
    "file": r"(?:file|media|path|url|uri|src|(?:file|media)_?(?:path|name|url))s?",
    "options": r"(?:(?:answer|mc|multiple|question|possible)_)?(?:options|choices|distractors)"
               r"(?:_?(?:list|text|dict)s?)*|(?:option|choice)_(?:list|text)s?|possible_answers"
               r"|(?:option|choice|distractor)s?_?(?:[a-j]|\d+)|op[a-j]",
    "id": r"(?:\w+_)?(?:u|uu|gu)?ids?",
    "system": r"(?:system|sys)(?:_?(?:prompt|message|msg|text|instruction|content|role))?s?",
    "weight": r"(?:(?:sample|loss|example|train|training|turn)_)?weights?",
    # Passed over whatever stands there; other names are, unless media stand there.
    "ignored": r"(?:\w+_)?(?:source|origin|dataset|license|model|split|category|score)s?"}.items()}
_VIDEO = "mp4|m4v|avi|mov|mkv|webm|mpe?g|wmv|flv|wav|mp3|flac|ogg|opus|m4a|aac"
MEDIA_FILE = re.compile(rf"[^\n]{{1,2000}}\.(?:{ENDINGS}|svg|({_VIDEO}))(?:[?#]\S*)?\s*",
                        re.IGNORECASE)
OTHER_FILE = re.compile(r"(?!\w+://)[^\n]*\.[a-z]\w{0,4}\s*", re.IGNORECASE)
# How the bytes of media begin; and how they do in base64 or as a data: URI.
MEDIA_BYTES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*", b"ID3",
               b"OggS", b"fLaC")
MEDIA_TEXT = ("data:image/", "data:video/", "data:audio/", "/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
# What other programs write into a text where an image, a video or a sound belongs.
MARK = re.compile(r"<\|?(image|img|picture|video|audio)((?:_pad|_placeholder|[_ ]?\d+)?\|?)>",
                  re.IGNORECASE)
MEDIA_KINDS = {"image", "video", "file"}
TURN_KEYS = ("role", "content", "from", "value", "user", "assistant", "weight", "train")


def refuse_unread_media(record: dict, read, turns, messages, images, where: str) -> None:
    """BadSample where a record, its turns or their parts hold what refuse_unread does not let
    pass. read: the keys of the record that are read; turns: as RECORD_LAYOUTS reads them."""
    text = "\n".join(message.content for message in messages if message.role != "assistant")
    refuse_unread(record, read, where, images, text)
    for turn in turns:
        refuse_unread(turn, TURN_KEYS, where, images, text, " in a turn")
        parts = [value for value in turn.values() if isinstance(value, list)]
        for part in (part for value in parts for part in value if isinstance(part, dict)):
            refuse_unread(part, ("type", "text", *PART_KEYS), where, images, text,
                          " in a part of a turn")
    refuse_mark(text, where, images)


def refuse_unread(record: dict, read, where: str, images=(), text: str = "",
                  inside: str = "") -> None:
    """BadSample where a key that is not read seems to hold what the model would have to see, to
    hear or to choose from.

    read: the keys that the layout reads. images: those that were read; beside them a name, an
    address or a number says where they come from, unless it names another file. text: the text
    that is read; options that stand in it are read too. inside: where in the sample it stands.
    """
    names = {getattr(image, "name", None) for image in images} - {None} if images else None
    letters = {key for key in record if re.fullmatch("[A-J]|[a-j]", key)
               and isinstance(record[key], str) and not is_nothing(record[key])}
    letters = letters if {"a", "b"} <= {key.lower() for key in letters} else ()
    media, options, system, weights = {}, {}, {}, {}
    for key, value in record.items():
        if key in read or is_nothing(value):
            continue
        kinds = kinds_of(key[:100])
        if "options" in kinds or key in letters:
            if not mentions_all(text, set(texts_in(value))):
                options[key] = value
        elif "video" in kinds:
            if not (images and "id" in kinds):
                media[key] = value
        elif "system" in kinds:
            system[key] = value
        elif "weight" in kinds:
            weights |= {} if value == 1 else {key: value}
        elif kinds & {"ignored", "id"} and "image" not in kinds:
            continue
        # A file may be any; not where the record says that it has no image, see IMAGE_KEYS.
        elif holds_media(value, names) or not images and ("image" in kinds or (
                "file" in kinds and record.keys().isdisjoint(IMAGE_KEYS)
                and not (isinstance(value, str) and OTHER_FILE.fullmatch(value)))):
            media[key] = value
    for found, what in (
            (media, "an image, a video or a sound: images are read from one of the record's "
             "keys 'image', 'images', 'image_bytes'; rename it, or take it out if it means none"),
            (options, "options to choose from: write them into the question, or for scoring into "
             "'choices' (a list) or 'A', 'B', ... beside 'question' and 'answer'"),
            (system, "a system text: it is read from 'system' beside the turns, or from a first "
             "turn with that role"),
            (weights, "a weight: every sample counts alike here; --data FILE:WEIGHT weighs a file, "
             "and a turn may have the weight 0")):
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


def holds_media(value, names: set | None, depth: int = 4) -> bool:
    """Whether a value is an image, a video or a sound, or names a file of one that is not in
    names: of the images that were read, none for bytes; None where there are no images."""
    if isinstance(value, list) and depth:
        return any(holds_media(each, names, depth - 1) for each in value)
    if isinstance(value, dict):  # as the datasets library stores an image; or {"url": ...}
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


def mentions_all(text: str, options: set) -> bool:
    """Whether a text holds all of the options, each as words of its own; of more than 100, never.
    Letters of Chinese have no words."""
    return len(options) <= 100 and all(
        re.search(rf"(?<![A-Za-z0-9]){re.escape(option)}(?![A-Za-z0-9])", text)
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
            continue  # as many as images: counted elsewhere
        inside, partner, _ = text[end:end + 2000].partition(f"</{mark[1]}>")
        if partner:
            blind = bool(inside) and not set("<>\n") & set(inside)
        else:
            before = text[max(mark.start() - 200, 0):mark.start()].rpartition("\n")[2]
            after = text[end:end + 200].partition("\n")[0]
            blind = bool(rest) or not before.strip() or not after.strip()
        if blind:
            raise BadSample(where, f"the text has {mark[0]} for something to see or to hear, and "
                                   f"none is read; expected {IMAGE} and an image under 'image'")
