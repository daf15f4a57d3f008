"""What can be said about a scene, in English and Chinese: Scene -> [(question, answer), ...].

Every answer follows from the scene alone and there is one way to say it, so that an answer is
right or wrong without a judge. Questions come in several wordings.
"""

from dataclasses import dataclass
from pathlib import Path

KINDS = ("caption", "what", "count", "exists", "where", "relation", "followup")

# place -> (English, Chinese, left-right neighbour, above-below neighbour)
PLACES = {
    "top left": ("at the top left", "左上角", "top right", "bottom left"),
    "top right": ("at the top right", "右上角", "top left", "bottom right"),
    "bottom left": ("at the bottom left", "左下角", "bottom right", "top left"),
    "bottom right": ("at the bottom right", "右下角", "bottom left", "top right"),
    "middle": ("in the middle", "正中间", None, None),
}
NUMBERS_EN = ("Zero", "One", "Two", "Three", "Four")
NUMBERS_ZH = ("零", "一", "两", "三", "四")

CAPTION = {
    "en": ("Describe the picture.", "What is in the picture?", "What do you see?"),
    "zh": ("描述这张图片。", "图里有什么？", "你看到了什么？"),
}
THIS = {"en": ("What is this?", "What is it?"), "zh": ("这是什么？", "图上是什么？")}


@dataclass(frozen=True)
class Thing:
    english: str
    plural: str
    chinese: str
    measure: str  # the Chinese measure word: 一 *只* 猫

    def one(self, language: str) -> str:
        if language == "zh":
            return f"一{self.measure}{self.chinese}"
        return ("an " if self.english[0] in "aeiou" else "a ") + self.english

    def sentence(self, language: str) -> str:
        return finish([self.one(language)], language)


def read_things() -> tuple[Thing, ...]:
    table = (Path(__file__).parent / "things.tsv").read_text(encoding="utf-8")
    return tuple(Thing(*row.split("\t")[1:]) for row in table.splitlines()[1:])


THINGS = read_things()


def finish(parts: list[str], language: str) -> str:
    """["a cat", "a dog", "an owl"] -> "A cat, a dog and an owl." and the like in Chinese."""
    comma, last, stop = (", ", " and ", ".") if language == "en" else ("、", "和", "。")
    text = comma.join(parts[:-1]) + last + parts[-1] if len(parts) > 1 else parts[0]
    return text[0].upper() + text[1:] + stop


def caption(scene, rng, language):
    question = rng.choice(CAPTION[language])
    return [(question, finish([THINGS[p.thing].one(language) for p in scene.things], language))]


def what(scene, rng, language):
    if len(scene.things) == 1 and rng.random() < 0.5:
        return [(rng.choice(THIS[language]), THINGS[scene.things[0].thing].sentence(language))]
    placed = rng.choice(scene.things)
    english, chinese = PLACES[placed.place][:2]
    question = f"What is {english}?" if language == "en" else f"{chinese}是什么？"
    return [(question, THINGS[placed.thing].sentence(language))]


def count(scene, rng, language):
    if rng.random() < 0.5:
        n = len(scene.things)
        if language == "en":
            return [("How many things are there?", NUMBERS_EN[n] + ".")]
        return [("图里有几样东西？", NUMBERS_ZH[n] + "样。")]
    thing = rng.choice(scene.things).thing
    n = sum(p.thing == thing for p in scene.things)
    name = THINGS[thing]
    if language == "en":
        return [(f"How many {name.plural} are there?", NUMBERS_EN[n] + ".")]
    return [(f"图里有几{name.measure}{name.chinese}？", f"{NUMBERS_ZH[n]}{name.measure}。")]


def exists(scene, rng, language):
    here = {p.thing for p in scene.things}
    yes = rng.random() < 0.5
    thing = rng.choice(sorted(here)) if yes else rng.randrange(len(THINGS))
    yes = thing in here
    if language == "en":
        return [(f"Is there {THINGS[thing].one('en')}?", "Yes." if yes else "No.")]
    return [(f"图里有{THINGS[thing].chinese}吗？", "有。" if yes else "没有。")]


def unique(scene):
    """The things of which there is only one: "the cat" means one cat."""
    kinds = [p.thing for p in scene.things]
    return [p for p in scene.things if kinds.count(p.thing) == 1]


def where_is(placed, language):
    english, chinese = PLACES[placed.place][:2]
    return english.capitalize() + "." if language == "en" else f"在{chinese}。"


def where(scene, rng, language):
    candidates = unique(scene)
    if not candidates:
        return None
    placed = rng.choice(candidates)
    name = THINGS[placed.thing]
    question = f"Where is the {name.english}?" if language == "en" else f"{name.chinese}在哪里？"
    return [(question, where_is(placed, language))]


def neighbours(scene, placed):
    """[(English, Chinese, neighbour)]: what stands beside and above or below a placed thing."""
    at = {p.place: p for p in scene.things}
    _, _, beside, over = PLACES[placed.place]
    side = ("to the right of", "右边") if "left" in placed.place else ("to the left of", "左边")
    level = ("below", "下面") if "top" in placed.place else ("above", "上面")
    return [(*words, at[place]) for words, place in ((side, beside), (level, over)) if place in at]


def relation(scene, rng, language):
    candidates = [(p, n) for p in unique(scene) for n in neighbours(scene, p)]
    if not candidates:
        return None
    placed, (english, chinese, neighbour) = rng.choice(candidates)
    name = THINGS[placed.thing]
    question = (f"What is {english} the {name.english}?" if language == "en"
                else f"{name.chinese}的{chinese}是什么？")
    return [(question, THINGS[neighbour.thing].sentence(language))]


def followup(scene, rng, language):
    """Two turns, the second about "it"."""
    if rng.random() < 0.5:
        candidates = unique(scene)
        if not candidates:
            return None
        placed = rng.choice(candidates)
        name = THINGS[placed.thing]
        if language == "en":
            return [(f"Is there {name.one('en')}?", "Yes."),
                    ("Where is it?", where_is(placed, "en"))]
        return [(f"图里有{name.chinese}吗？", "有。"), ("它在哪里？", where_is(placed, "zh"))]
    candidates = [(p, n) for p in scene.things for n in neighbours(scene, p)]
    if not candidates:
        return None
    placed, (english, chinese, neighbour) = rng.choice(candidates)
    first, last = (THINGS[p.thing].sentence(language) for p in (placed, neighbour))
    if language == "en":
        return [(f"What is {PLACES[placed.place][0]}?", first), (f"What is {english} it?", last)]
    return [(f"{PLACES[placed.place][1]}是什么？", first), (f"它的{chinese}是什么？", last)]


ASK = {"caption": caption, "what": what, "count": count, "exists": exists, "where": where,
       "relation": relation, "followup": followup}


def ask(scene, kind: str, language: str, rng):
    """[(question, answer), ...] of one kind, or None when the scene does not allow it."""
    return ASK[kind](scene, rng, language)


def conversation(scene, language: str, rng, kinds=KINDS) -> list[tuple[str, str]]:
    """A talk about a scene: one to three kinds of question, in any order."""
    turns = []
    for kind in rng.sample(kinds, rng.randint(1, 3)):
        turns += ask(scene, kind, language, rng) or []
    return turns or caption(scene, rng, language)


# A caption is right as soon as each patch can be *said*. To be *found* by its name, as "Where is
# the cat?" wants it, a patch must be told apart from all other names: so these are asked as well.
DRILL = ("where", "what", "exists", "where") * 2


def caption_and_drill(scene, language: str, rng) -> list[tuple[str, str]]:
    """A caption, and up to eight short questions; none twice, its answer would stand above."""
    turns = caption(scene, rng, language)
    for kind in DRILL:
        new = ask(scene, kind, language, rng)
        if new and new[0] not in turns:
            turns += new
    return turns
