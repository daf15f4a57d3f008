"""One record, in whichever layout its authors chose -> Sample.

    a dict, from JSON or Parquet -> to_sample -> Sample(messages, images, where, tags)

RECORD_LAYOUTS lists the layouts. The key that holds the text tells which one a record has:

    conversations, messages   [{"role": "user", "content": ...}, ...]    minimind-v, plain chats
                              [{"from": "human", "value": ...}, ...]     LLaVA, cc3m
    prompt and completion     two lists of turns, or two texts           TRL's llava-instruct-mix
    texts                     [{"user": ..., "assistant": ...}, ...]     the Cauldron, FineVision
    caption                   one text, or several of one image          COCO, AI Challenger

The images stand in `image`, `images` or `image_bytes`, one or a list, each a file name, bytes or
{"bytes": ..., "path": ...}; AI Challenger has the name in `image_id`. Without any of them it is a
conversation in plain text. Where a key that is not read seems to hold an image, a video, a sound or
the options of a question, the record is refused (readers/unread.py).

Data comes from strangers: a value may be of any type and size. What is no sample raises BadSample.
"""

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from dataset.chat import IMAGE, Message
from dataset.readers.bad_sample import BadSample, shown
from dataset.readers.record_images import find_images, image_key
from dataset.readers.unread import MEDIA_KINDS, kinds_of, refuse_blind

TURNS = ("conversations", "messages")
TAGS = ("kind", "language")  # optional, for scores by kind and by language
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names; all others are taken as they are
LONGEST_TEXT = 500_000  # characters; a model reads a tenth of it, a tokenizer needs seconds for it

# A caption has no question, so one is put in front of it, in the caption's language.
PROMPTS = {
    "zh": ("请用一句话描述这张图片。", "这张图片里有什么？", "图中是怎样的场景？请简单说明。",
           "请为这张图片写一句说明。"),
    "en": ("Describe this picture in one sentence.", "What is in this picture?",
           "What does the picture show? Answer briefly.", "Write a caption for this picture."),
}
CHINESE = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Sample:
    messages: tuple  # of Message
    images: tuple  # each a path, bytes, a PIL.Image or a function that draws one; as the markers
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


def read_captions(record: dict, index: int, caption_index: int) -> list:
    """One prompt and one of the captions. The first of each is random but fixed by `index`; from
    there `caption_index` goes round, so that n of them show each of n captions once."""
    captions = record["caption"]
    texts = [captions] if isinstance(captions, str) else captions
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"'caption' is {shown(captions)}; expected a text or several")
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise ValueError("'caption' holds no text; remove the entry or write one")
    rng = random.Random(index)
    caption = texts[(rng.randrange(len(texts)) + caption_index) % len(texts)]
    prompts = PROMPTS["zh" if CHINESE.search(caption) else "en"]
    prompt = prompts[(rng.randrange(len(prompts)) + caption_index) % len(prompts)]
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": caption}]


def checked(turns, key: str, expected: str = "role and content (or from and value)") -> list:
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        raise ValueError(f"{key!r} must be a list of turns, each an object with {expected}; "
                         f"found {shown(turns)}")
    return turns


# (the keys that hold the text, a function that makes turns of them: objects with role and content).
# A record has the first layout of which it has a key; without any, the first of all reports it.
RECORD_LAYOUTS = ((("conversations",), read_turns), (("messages",), read_turns),
                  (("prompt", "completion"), read_prompt), (("texts",), read_pairs),
                  (("caption",), read_captions))
TEXT_KEYS = tuple(key for keys, _ in RECORD_LAYOUTS for key in keys)


def to_sample(record: dict, images_dir: Path, where: str, index: int = 0,
              caption_index: int = 0) -> Sample:
    """-> a sample with as many <image> markers as images, or BadSample. index: number of the
    record. It chooses one of several captions, caption_index the next one with each step."""
    images = find_images(record, images_dir, where)
    keys, read = next((layout for layout in RECORD_LAYOUTS if any(
        record.get(key) is not None for key in layout[0])), RECORD_LAYOUTS[0])
    try:
        turns = read(record, index, caption_index)
        messages = [to_message(turn) for turn in turns]
    except (ValueError, RecursionError) as error:
        raise BadSample(where, str(error)) from error
    length = sum(len(message.role) + len(message.content) for message in messages)
    if length > LONGEST_TEXT:
        raise BadSample(where, f"a conversation of {length:,} characters; expected at most "
                               f"{LONGEST_TEXT:,}, is it a whole book?")
    refuse_blind(record, (*keys, image_key(record), *TAGS), turns, messages, images, where)
    if read is read_captions and not images:
        raise BadSample(where, "a caption without an image; expected the name or the bytes of its "
                               "file under 'image'")
    if any(message.role == "assistant" and not message.content.strip() for message in messages):
        raise BadSample(where, "an answer is empty: it would teach to say nothing")
    markers = sum(message.images for message in messages)
    if images and not markers:  # some data sets leave the marker out: the image comes first
        first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise BadSample(where, "an image, but no user turn that could show it")
        messages[first] = Message("user", f"{IMAGE}\n" * len(images) + messages[first].content)
        markers = len(images)
    if markers != len(images):
        raise BadSample(where, f"{markers} {IMAGE} markers for {len(images)} images; "
                               "each image needs its own")
    # Other data may use these names for something else: a list cannot name a group of scores.
    tags = {name: record[name] for name in TAGS
            if isinstance(record.get(name), str) and record[name].isprintable()}
    return Sample(tuple(messages), tuple(images), where, tags)


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
    media = isinstance(kind, str) and not MEDIA_KINDS.isdisjoint(kinds_of(kind))
    if isinstance(part, dict) and isinstance(part.get("text"), str) and not media:
        return part["text"]
    raise ValueError(f"a part of a turn is {shown(part)}; expected an image or a text, such as "
                     "{'type': 'image'}, whose file stands under 'image' of the record")
