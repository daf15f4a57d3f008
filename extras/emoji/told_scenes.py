"""What the language tower reads: emoji scenes that are told in words and then asked about.

    sheet         a map, and below it questions with their answers, line by line
    talk          the same as a conversation, rendered just as one about a picture will be;
                  sometimes told in prose instead: "At the top left there is a cat. ..."
    small talk    greetings and names of things, without any scene

A map is sixteen words between <|vision_start|> and <|vision_end|>, one for each of the 4 x 4
places where a picture's patches will later stand, " cat" or " ." (nothing there).

    sheet, talk -> ids, mask, the places of the map
"""

from dataset.chat import ChatTemplate, Message
from dataset.emoji import texts
from dataset.emoji.world import CHAT_START, TEST_START, scene

SIDE = 4  # the map has SIDE x SIDE words
EMPTY = " ."  # nothing there
LINES = 10  # questions on a sheet; fewer where the scene does not allow so many
QUARTERS = {"top left": (0, 0), "top right": (0, 2), "bottom left": (2, 0), "bottom right": (2, 2)}


ALL = (0, 1, 2, 2, 3, 3, 4, 4)  # how many things a scene has; 0: a single large one
# The sheets of a lesson: how many things, which kinds of questions.
SHEETS = ({"counts": (1, 2, 3, 4), "kinds": ("label",)},
          {"counts": (0, 1, 2, 3), "kinds": ("label", "where", "what", "exists")},
          {"counts": ALL, "kinds": texts.KINDS},
          {"counts": ALL, "kinds": texts.KINDS},
          # twice as often what is still hard after lesson 4
          {"counts": ALL, "kinds": texts.KINDS + ("count", "where", "relation")})
SMALL_TALK = {
    "en": (("Hello!", "Hello! How can I help you?"), ("Hi.", "Hello! How can I help you?"),
           ("Who are you?", "I am a small model that looks at pictures."),
           ("What can you do?", "Show me a picture and ask me about it."),
           ("Thank you.", "You are welcome."), ("Thanks!", "You are welcome."),
           ("Good bye.", "Good bye!"), ("How are you?", "I am fine, thank you.")),
    "zh": (("你好！", "你好！有什么可以帮你？"), ("你好。", "你好！有什么可以帮你？"),
           ("你是谁？", "我是一个会看图的小模型。"), ("你会做什么？", "给我一张图片，然后问我。"),
           ("谢谢。", "不客气。"), ("谢谢你！", "不客气。"), ("再见。", "再见！"),
           ("你好吗？", "我很好，谢谢。")),
}


def training_scene(rng, counts=ALL):
    number = rng.randrange(CHAT_START, TEST_START)  # the test scenes begin after these
    return scene(number, rng.choice(counts))


def small_talk(rng) -> list[tuple[str, str]]:
    """Turns without any scene: greetings, and the names of things in the other language."""
    turns = []
    for _ in range(rng.randint(1, 3)):
        thing = rng.choice(texts.THINGS)
        turns.append(rng.choice((
            rng.choice(SMALL_TALK["en"]), rng.choice(SMALL_TALK["zh"]),
            (f"What is {thing.chinese} in English?", thing.sentence("en")),
            (f"What is {thing.english} in Chinese?", thing.sentence("zh")),
            (f"{thing.english}用中文怎么说？", thing.sentence("zh")),
            (f"{thing.chinese}用英文怎么说？", thing.sentence("en")))))
    return turns


def in_prose(what, language: str) -> str:
    """"At the top left there is a cat. ..." """
    parts = []
    for placed in what.things:
        english, chinese = texts.PLACES[placed.place][:2]
        one = texts.THINGS[placed.thing].one(language)
        parts.append(f"{english.capitalize()} there is {one}." if language == "en"
                     else f"{chinese}有{one}。")
    return (" " if language == "en" else "").join(parts)


def as_map(what, tokenizer, rng) -> list[int]:
    """The ids of sixteen words in reading order. A thing is named in two to four cells of its
    quarter: which patches of a picture will show it best is not known beforehand."""
    words = [EMPTY] * (SIDE * SIDE)
    for placed in what.things:
        for quarter, (row, column) in QUARTERS.items():
            if placed.place in (quarter, "middle"):  # the large thing covers all four quarters
                cells = [(row + r) * SIDE + column + c for r in (0, 1) for c in (0, 1)]
                for cell in rng.sample(cells, rng.randint(2, 4)):
                    words[cell] = " " + texts.THINGS[placed.thing].english
    return [i for word in words for i in tokenizer.encode(word)]


def encode_told(template: ChatTemplate, messages, what, rng) -> tuple[list, list, list]:
    """A conversation -> ids with a map in the place of the image, mask, places of the map."""
    ids, mask = template.encode_conversation(messages)
    places = [t for t, i in enumerate(ids) if i == template.image_token_id]
    if places:
        for t, word in zip(places, as_map(what, template.tokenizer, rng)):
            ids[t] = word
    return ids, mask, places


def label(what, rng, language):
    """(" cat", " top left"): a name and at once where it is, the least that one can ask."""
    placed = rng.choice(what.things)
    if placed not in texts.unique(what) or placed.place == "middle":
        return None
    name, (_, chinese, *_) = texts.THINGS[placed.thing], texts.PLACES[placed.place]
    return [(" " + name.english, " " + placed.place) if language == "en"
            else (name.chinese, chinese)]


def sheet(template: ChatTemplate, rng, counts, kinds) -> tuple[list, list, list]:
    """-> ids, mask (whether a token is part of an answer), the 16 places of the map.

    Up to ten questions take about as many tokens as a short talk: practice for little computing.
    """
    tokenizer, what = template.tokenizer, training_scene(rng, counts)
    language = rng.choice(("en", "zh"))
    ids = [tokenizer.token_id("<|vision_start|>"), *as_map(what, tokenizer, rng),
           tokenizer.token_id("<|vision_end|>"), *tokenizer.encode("\n")]
    mask, asked = [False] * len(ids), set()
    for _ in range(LINES):
        kind = rng.choice(kinds)
        turns = (label if kind == "label" else texts.ASK[kind])(what, rng, language)
        if not turns or turns[0][0] in asked:  # the answer could be copied from above
            continue
        asked.add(turns[0][0])
        for question, answer in turns:
            question, answer = tokenizer.encode(question), tokenizer.encode(answer + "\n")
            ids += question + answer
            mask += [False] * len(question) + [True] * len(answer)
    if not asked:  # a scene that allows no such question
        return sheet(template, rng, counts, kinds)
    return ids, mask, list(range(1, 1 + SIDE * SIDE))


def talk(template: ChatTemplate, rng) -> tuple[list, list, list]:
    """A conversation as ids, mask, map places; no places where there is no map."""
    form, language = rng.random(), rng.choice(("en", "zh"))
    what = training_scene(rng)
    if form < 0.1:
        turns = small_talk(rng)
    else:
        turns = texts.conversation(what, language, rng)
        head = "<image>\n" if form < 0.85 else in_prose(what, rng.choice(("en", "zh"))) + "\n"
        turns[0] = (head + turns[0][0], turns[0][1])
    return encode_told(template, [Message(role, text) for turn in turns
                                  for role, text in zip(("user", "assistant"), turn)], what, rng)
