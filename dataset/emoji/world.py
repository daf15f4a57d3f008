"""The emoji world: scene number N -> a picture and conversations about it, always the same.

No file per scene. A scene holds one large thing in the middle or one to four small things, each in
its own quarter of the picture; its number alone seeds everything in it:

    number -> Scene (things, places, sizes, background) -> picture, 96 x 96     here
                                                        -> conversations        texts.py

Numbers from TEST_START on are the test scenes. One pair of things in twenty never stands together
in a training scene and stands in every second test scene: what is right there was not memorised.
"""

import random
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.chat import Message
from dataset.emoji import texts
from dataset.readers.formats import Sample

HERE = Path(__file__).resolve().parent
SPRITES = HERE / "sprites.png"
PICTURE_SIZE = 96  # pixels a side
SPRITE_SIZE = 96  # pixels a side of one cell of sprites.png
SPRITE_COLUMNS = 12
CHAT_START, TEST_START = 10**8, 10**9  # first scene numbers of the three kinds of data
SIZES = {"captions": 40_000, "chat": 80_000, "test": 700}


@dataclass(frozen=True)
class Placed:
    """One thing in a scene; pixels, measured from the top left corner."""

    thing: int  # row of things.tsv
    place: str  # a key of texts.PLACES
    left: int
    top: int
    size: int


@dataclass(frozen=True)
class Scene:
    number: int
    background: tuple[tuple[int, int, int], tuple[int, int, int], bool]  # from, to, downwards
    things: tuple[Placed, ...]  # in reading order


def kept_for_test(a: int, b: int) -> bool:
    """Whether things a and b stand together in test scenes only: one pair in twenty."""
    low, high = min(a, b), max(a, b)
    return low != high and (low * 7919 + high * 104_729) % 20 == 0


def draw_things(rng: random.Random, count: int, test: bool) -> list[int]:
    """Things of a scene, now and then with one kind twice or thrice (never four times)."""
    while True:
        things = [rng.randrange(len(texts.THINGS)) for _ in range(count)]
        if count > 1 and rng.random() < 0.3:
            things[1] = things[0]
            if count > 2 and rng.random() < 0.4:
                things[2] = things[0]
        rng.shuffle(things)
        pairs = [kept_for_test(a, b) for a in things for b in things]
        if test or not any(pairs):
            return things


@lru_cache(maxsize=4096)
def scene(number: int, count: int | None = None) -> Scene:
    """Scene `number`. count 0 asks for a large thing, 1 to 4 for as many small ones."""
    rng = random.Random(number)
    test = number >= TEST_START
    count = count if count is not None else rng.choice((0, 1, 2, 2, 3, 3, 4, 4))
    things = draw_things(rng, max(count, 1), test)
    if test and count > 1 and number % 4 >= 2:  # every second test scene holds a kept pair
        while not any(kept_for_test(things[0], b) for b in things):
            things[1] = rng.randrange(len(texts.THINGS))
    half = PICTURE_SIZE // 2
    if count == 0:
        size = rng.randint(70, PICTURE_SIZE - 2)
        spots = [("middle", 0, 0, PICTURE_SIZE, size)]
    else:
        places = sorted(rng.sample(range(4), count))  # 0 1 above 2 3: reading order
        names = ("top left", "top right", "bottom left", "bottom right")
        spots = [(names[p], p % 2 * half, p // 2 * half, half, rng.randint(32, half - 2))
                 for p in places]
    placed = tuple(
        Placed(thing, place, left + rng.randint(0, room - size), top + rng.randint(0, room - size),
               size)
        for thing, (place, left, top, room, size) in zip(things, spots))
    colours = [tuple(rng.randint(150, 255) for _ in range(3)) for _ in range(2)]
    return Scene(number, (colours[0], colours[1], rng.random() < 0.5), placed)


@lru_cache(maxsize=2)
def sprite_sheet(file: Path) -> Image.Image:
    return Image.open(file).convert("RGBA")


@lru_cache(maxsize=4096)
def sprite(thing: int, size: int, sheet: Path = SPRITES) -> Image.Image:
    left, top = thing % SPRITE_COLUMNS * SPRITE_SIZE, thing // SPRITE_COLUMNS * SPRITE_SIZE
    cell = sprite_sheet(sheet).crop((left, top, left + SPRITE_SIZE, top + SPRITE_SIZE))
    return cell.resize((size, size), Image.Resampling.LANCZOS)


def picture(what: Scene, sheet: Path = SPRITES) -> Image.Image:
    """The scene as an RGB picture: a background that fades from one colour to another, sprites.

    sheet: where the sprites are from. Another file draws the same scene in another style.
    """
    start, end, downwards = what.background
    fade = np.linspace(0, 1, PICTURE_SIZE)[:, None]  # (96,1)
    line = np.array(start) * (1 - fade) + np.array(end) * fade  # (96,3)
    pixels = np.broadcast_to(line[:, None] if downwards else line[None], (PICTURE_SIZE,) * 2 + (3,))
    canvas = Image.fromarray(pixels.astype(np.uint8), "RGB")
    for placed in what.things:
        image = sprite(placed.thing, placed.size, sheet)
        canvas.paste(image, (placed.left, placed.top), image)
    return canvas


class EmojiData:
    """The three kinds of data as samples 0 .. size-1, each computed when asked for.

    captions  what is in a picture, then short questions about each thing: stage one
    chat      a conversation of one to four questions: stage two
    test      unseen scenes, one question of one kind each (or one that refers back): evaluation
    """

    def __init__(self, kind: str, size: int | None = None):
        if kind not in SIZES:
            raise ValueError(f"emoji data is one of {sorted(SIZES)}, got {kind!r}")
        self.kind, self.size = kind, SIZES[kind] if size is None else size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(f"emoji {self.kind} has samples 0..{self.size - 1}, not {index}")
        rng = random.Random(index)
        language = "en" if index % 2 == 0 else "zh"
        tags = {"language": language}
        if self.kind == "captions":
            what = scene(index)
            turns = texts.caption_and_drill(what, language, rng)
        elif self.kind == "chat":
            what = scene(CHAT_START + index)
            turns = texts.conversation(what, language, rng)
        else:
            kind = texts.KINDS[index // 2 % len(texts.KINDS)]
            tags["kind"] = kind
            number, turns = TEST_START + index * 1001, None
            while not turns:  # the first scene from here on that this kind of question fits
                what = scene(number)
                turns = texts.ask(what, kind, language, rng)
                number += 1
        messages = []
        for question, answer in turns:
            messages += [Message("user", question), Message("assistant", answer)]
        messages[0] = Message("user", "<image>\n" + messages[0].content)
        where = f"emoji {self.kind}:{index} (scene {what.number})"
        return Sample(tuple(messages), (partial(picture, what),), where, tags)  # drawn when needed
