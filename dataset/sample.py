"""One record, in whichever layout its authors chose -> Sample.

    a dict, from JSON or Parquet -> to_sample -> Sample(messages, images, where, tags)

RECORD_LAYOUTS lists the layouts. The key that holds the text tells which one a record has:

    conversations, messages   [{"role": "user", "content": ...}, ...]    minimind-v, plain chats
                              [{"from": "human", "value": ...}, ...]     LLaVA, cc3m
    prompt and completion     two lists of turns, or two texts           TRL's llava-instruct-mix
    texts                     [{"user": ..., "assistant": ...}, ...]     the Cauldron, FineVision
    caption                   one text, or several of one image          COCO, AI Challenger
    question, answer          and other pairs of keys, readers/answered.py     VQA, Alpaca, LLaVaM

The images stand in `image`, `images`, `image_bytes` or another of IMAGE_KEYS, one or a list, each
a file name, bytes, base64 or {"bytes": ..., "path": ...}; or in the parts of a turn. Without any it
is a conversation in plain text. Where a key that is not read seems to hold an image, a video, a
sound or the options of a question, the record is refused (readers/unread.py).

Data comes from strangers: a value may be of any type and size. What is no sample raises BadSample.
"""

import json
from dataclasses import dataclass, field

from dataset.chat import IMAGE, Message
from dataset.readers.answered import read_answered
from dataset.readers.bad_sample import BadSample, shown
from dataset.readers.captions import read_captions
from dataset.readers.record_images import ImageFolder, find_images, image_key, read_content
from dataset.readers.roles import SYSTEM, read_system, role_and_content
from dataset.readers.unread import refuse_unread_media

TURNS = ("conversations", "messages")
TAGS = ("kind", "language")  # optional, for scores by kind and by language
LONGEST_TEXT = 500_000  # characters; a model reads a tenth of it, a tokenizer needs seconds for it


@dataclass(frozen=True)
class Sample:
    messages: tuple  # of Message
    images: tuple  # in the order of the markers: a path, bytes, a PIL.Image or what draws one
    where: str  # "file:line", to find it when it has to be repaired
    tags: dict = field(default_factory=dict)  # e.g. {"kind": "count", "language": "en"}


def read_turns(record: dict, index: int, caption_index: int) -> list:
    key = next((key for key in TURNS if record.get(key) is not None), TURNS[0])
    turns = record.get(key)
    if isinstance(turns, str):  # Parquet of minimind-v: a column of JSON text
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"cannot read {key!r}: not JSON: {error}") from error
    return checked(turns, key)


def read_prompt(record: dict, index: int, caption_index: int) -> list:
    turns = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = record.get(key)
        value = [{"role": role, "content": value}] if isinstance(value, str) else value
        turns += value if isinstance(value, list) else [] if value is None else [value]
    return checked(turns, "prompt and completion")


def read_pairs(record: dict, index: int, caption_index: int) -> list:
    return [{**pair, "role": role, "content": pair.get(role)}
            for pair in checked(record["texts"], "texts", "user and assistant")
            for role in ("user", "assistant")]


def checked(turns, key: str, expected: str = "role and content (or from and value)") -> list:
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        raise ValueError(f"{key!r} must be a list of turns, each an object with {expected}; "
                         f"found {shown(turns)}")
    return turns


# (the keys that hold the text, a function that makes turns of them: objects with role and content).
RECORD_LAYOUTS = ((("conversations",), read_turns), (("messages",), read_turns),
                  (("prompt", "completion"), read_prompt), (("texts",), read_pairs),
                  (("caption",), read_captions), (("question", "answer"), read_answered),
                  (("query", "response"), read_answered),
                  (("instruction", "output"), read_answered), (("input", "output"), read_answered))
TEXT_KEYS = tuple(key for keys, _ in RECORD_LAYOUTS for key in keys)


def to_sample(record: dict, images_dir: ImageFolder, where: str, index: int = 0,
              caption_index: int = 0) -> Sample:
    """-> a sample with as many <image> markers as images, or BadSample. index: number of the
    record. It chooses one of several captions, caption_index the next one with each step."""
    images = find_images(record, images_dir, where)
    keys, read = find_layout(record)
    messages, own = [], []  # own: what each marker shows; None: the next of `images`
    try:
        turns = read(record, index, caption_index)
        for turn in (*read_system(record, turns), *turns):
            message, parts = to_message(turn, images_dir, where)
            messages.append(message)
            own += parts
    except (ValueError, RecursionError) as error:
        raise BadSample(where, str(error)) from error
    length = sum(len(message.role) + len(message.content) for message in messages)
    if length > LONGEST_TEXT:
        raise BadSample(where, f"a conversation of {length:,} characters; expected at most "
                               f"{LONGEST_TEXT:,}, is it a whole book?")
    seen = [*images, *(image for image in own if image is not None)]
    read_keys = (*keys, image_key(record), *TAGS, *SYSTEM)
    refuse_unread_media(record, read_keys, turns, messages, seen, where)
    if read is read_captions and not images:
        raise BadSample(where, "a caption without an image; expected the name or the bytes of its "
                               "file under 'image'")
    if any(message.role == "assistant" and not message.content.strip() for message in messages):
        raise BadSample(where, "an answer is empty: it would teach to say nothing")
    if images and not own:  # some data sets leave the marker out: the image comes first
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise BadSample(where, "an image, but no user turn that could show it")
        messages[first] = Message("user", f"{IMAGE}\n" * len(images) + messages[first].content)
        own = [None] * len(images)
    markers = sum(image is None for image in own)
    if markers != len(images):
        raise BadSample(where, f"{markers} {IMAGE} markers for {len(images)} images; "
                               "each image needs its own")
    rest = iter(images)
    images = tuple(next(rest) if image is None else image for image in own)
    # Other data may use these names for something else: a list cannot name a group of scores.
    tags = {name: record[name] for name in TAGS
            if isinstance(record.get(name), str) and record[name].isprintable()}
    return Sample(tuple(messages), images, where, tags)


def find_layout(record: dict) -> tuple:
    """The first layout of which the record has a key; else the first of all, which reports it."""
    for layout in RECORD_LAYOUTS:
        if any(record.get(key) is not None for key in layout[0]):
            return layout
    return RECORD_LAYOUTS[0]


def to_message(turn: dict, images_dir: ImageFolder, where: str) -> tuple[Message, list]:
    """-> the message, and what each of its markers shows, see read_content."""
    role, content = role_and_content(turn)
    if not isinstance(role, str):
        raise ValueError(f"the role of a turn is {shown(role)}; expected a text such as 'user'")
    content, images = read_content(content, images_dir, where)
    weight = next((turn[key] for key in ("weight", "train") if turn.get(key) is not None), 1)
    if weight not in (0, 1):
        raise ValueError(f"the weight of a turn is {shown(weight)}; expected 1, or 0 for an answer "
                         "that is not to be learned")
    if role != "assistant":
        return Message(role, content), images
    if any(image is not None for image in images):
        raise ValueError("an answer holds an image; the model learns to write text alone")
    return Message(role, content, bool(weight)), []
