"""Train the embedded language tower dataset/emoji/language: a small Qwen2 that reads only text.

    python -m extras.emoji.train_language

An hour and a half on two cores; the result is in the repo, and its story in
dataset/emoji/README.md.

What it reads: emoji scenes that are *told in words* and then asked about. Three kinds of text:

    sheet         a map, and below it questions with their answers, line by line
    talk          the same as a conversation, rendered just as one about a picture will be;
                  sometimes told in prose instead: "At the top left there is a cat. ..."
    small talk    greetings and names of things, without any scene

A map is sixteen words between <|vision_start|> and <|vision_end|>, one for each of the 4 x 4
places where a picture's patches will later stand, " cat" or " ." (nothing there). In the first
lessons each has its place summed in; in the last one only every second map says places, and there
is noise upon it, up to 2.5 times as strong as the words themselves (embed_told).

The noise is what stage one needs. A model that has only met clean words can be talked into any
answer by vectors that resemble no word, and a projector that is trained through it finds those.
One that reads through noise is moved less by them, and more by what resembles a word.

So the model learns to answer from what stands before the question, and the projector of stage one
only has to turn patches into what can be read already. Large language models bring that skill
from their training text; a model of three million parameters has to be shown it, easy things first.
"""

import argparse
import copy
import json
import math
import random
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from dataset.chat import ChatTemplate, Message
from dataset.emoji import texts
from dataset.emoji.world import CHAT_START, TEST_START, EmojiData, scene
from dataset.tokenizer import Tokenizer
from model.config import LanguageConfig
from model.language import LanguageModel
from model.pretrained.load import load_language
from model.pretrained.save import save_language

HERE = Path(__file__).resolve().parents[2] / "dataset" / "emoji" / "language"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>",
           "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
# Qwen2's rule for cutting text into pieces before byte pairs are merged inside each piece.
PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SIDE = 4  # the map has SIDE x SIDE words
EMPTY = " ."  # nothing there
LINES = 10  # questions on a sheet; fewer where the scene does not allow so many


@dataclass(frozen=True)
class Haze:
    """What lies between the words of a map and the model that reads them."""

    place_words: float = 1.0  # share of the maps whose cells also say where they are
    loudness: float = 0.0  # spread of its logarithm: 0.5 makes most maps 0.6 to 1.6 times as loud
    blur: float = 0.0  # noise, as a multiple of the words' size; each map draws from 0 to this


CLEAR, HAZE = Haze(), Haze(place_words=0.5, loudness=0.5, blur=2.5)


@dataclass(frozen=True)
class Lesson:
    """What is read until it is understood: until the mean loss of 50 steps is below `enough`."""

    counts: tuple  # of things in a scene; 0: a single large one
    kinds: tuple  # of questions
    enough: float
    most: int  # steps, if it is never understood


ALL = (0, 1, 2, 2, 3, 3, 4, 4)
FIND = ("what", "where", "where", "exists")
LESSONS = (  # of sheets
    Lesson((1, 2, 3, 4), ("label",), 0.1, 600),
    Lesson((0, 1, 2, 3), ("label", "where", "what", "exists"), 0.06, 1500),
    Lesson(ALL, texts.KINDS, 0.06, 1500),
)
# Lesson 5 lasts a fixed number of steps, and asks twice as often what is still hard after lesson 4.
LAST = Lesson(ALL, texts.KINDS + ("count", "where", "relation"), enough=0.0, most=0)
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


def told_in_prose(what, language: str) -> str:
    """"At the top left there is a cat. ..." """
    parts = []
    for placed in what.things:
        english, chinese = texts.PLACES[placed.place][:2]
        one = texts.THINGS[placed.thing].one(language)
        parts.append(f"{english.capitalize()} there is {one}." if language == "en"
                     else f"{chinese}有{one}。")
    return (" " if language == "en" else "").join(parts)


def told_as_map(what, rng) -> list[str]:
    """Sixteen words in reading order. A thing is named in two to four cells of its quarter:
    which patches of a picture will show it best is not known beforehand."""
    words = [EMPTY] * (SIDE * SIDE)
    corners = {"top left": (0, 0), "top right": (0, 2), "bottom left": (2, 0),
               "bottom right": (2, 2)}
    for placed in what.things:
        for place, (row, column) in corners.items():
            if placed.place in (place, "middle"):  # the large thing covers all four quarters
                cells = [(row + r) * SIDE + column + c for r in (0, 1) for c in (0, 1)]
                for cell in rng.sample(cells, rng.randint(2, 4)):
                    words[cell] = " " + texts.THINGS[placed.thing].english
    return words


def training_scene(rng, counts=ALL):
    number = rng.randrange(CHAT_START, TEST_START)  # the test scenes begin after these
    return scene(number, rng.choice(counts))


def place_ids(tokenizer: Tokenizer) -> torch.Tensor:
    """(16,2): the two words that say where each cell of the map is."""
    words = [(" top" if cell < 8 else " bottom", " left" if cell % 4 < 2 else " right")
             for cell in range(SIDE * SIDE)]
    return torch.tensor([[tokenizer.encode(word)[0] for word in pair] for pair in words])


def embed_told(model, ids, places, tokenizer, haze=CLEAR):
    """ids (B,T) with a map at places (B,16) or at -1 -> embeddings (B,T,D).

    While it is learned to find things, a cell says three words at once, " cat" + " top" + " left":
    their embeddings are summed. In the end half of the maps say what is there and no more, so the
    model must also tell from a cell's position where that is; and all are hard to make out. (With
    no place words at all it confused bottom left and bottom right; and a projector can say them.)
    """
    embeds = model.embed(ids)  # (B,T,D)
    rows = (places[:, 0] >= 0).nonzero()[:, 0]  # those with a map, R of them
    if len(rows) == 0:
        return embeds
    cells, each = (rows[:, None], places[rows]), (len(rows), 1, 1)
    words = embeds[cells]  # (R,16,D)
    with_place = (torch.rand(each) < haze.place_words).float()
    words = words + model.embed(place_ids(tokenizer)).sum(1) * with_place
    words = words * torch.exp(torch.randn(each) * haze.loudness)
    size = words.detach().square().mean((1, 2), keepdim=True).sqrt()  # (R,1,1)
    words = words + torch.randn_like(words) * size * torch.rand(each) * haze.blur
    return embeds.index_put(cells, words)


def check_single(tokenizer: FastTokenizer, name: str, text: str) -> None:
    ids = tokenizer.encode(text).ids
    if name not in [tokenizer.decode([i]) for i in ids]:
        raise SystemExit(f"{name!r} is not one token in {text!r}: raise the weight of the names")


def make_tokenizer(out: Path) -> None:
    """Byte-level BPE on the texts of the world; each name becomes one token wherever it stands.

    Chinese is written without spaces: a name that stayed in pieces in a question would have to be
    put together before it could be looked for.
    """
    rng = random.Random(0)
    corpus = []
    for _ in range(2_000):
        for language in ("en", "zh"):
            what = training_scene(rng)
            corpus += [told_in_prose(what, language)]
            corpus += [t for turn in texts.conversation(what, language, rng) for t in turn]
        corpus += [t for turn in small_talk(rng) for t in turn]
    for thing in texts.THINGS:  # enough weight that no name stays in pieces
        corpus += [f" {thing.english}", f" {thing.plural}", thing.chinese, EMPTY] * 3000
    # Bytes are merged by frequency: first to characters, then to names, then to what is around.
    corpus += 10_000 * sorted({c for text in corpus for c in text if ord(c) > 127})
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.normalizer = normalizers.NFC()  # as the published Qwen2 tokenizers
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=2048, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=200, show_progress=False))  # rarer: a name with the words beside it
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    for thing in texts.THINGS:
        check_single(tokenizer, " " + thing.english, f"Where is the {thing.english}?")
        check_single(tokenizer, " " + thing.plural, f"How many {thing.plural} are there?")
        check_single(tokenizer, thing.chinese, f"图里有几{thing.measure}{thing.chinese}？")
        check_single(tokenizer, thing.chinese, f"{thing.chinese}的左边是什么？")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "add_prefix_space": False, "model_max_length": 512}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    stop = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}) + "\n")
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens")


def label(what, rng, language):
    """(" cat", " top left"): a name and at once where it is, the least that one can ask."""
    placed = rng.choice(what.things)
    if placed not in texts.unique(what) or placed.place == "middle":
        return None
    name, (_, chinese, *_) = texts.THINGS[placed.thing], texts.PLACES[placed.place]
    return [(" " + name.english, " " + placed.place) if language == "en"
            else (name.chinese, chinese)]


def sheet(template: ChatTemplate, tokenizer: Tokenizer, lesson: Lesson, rng):
    """-> ids, mask (whether a token is part of an answer), the 16 places of the map.

    Up to ten questions take about as many tokens as a short talk: practice for little computing.
    """
    what, language = training_scene(rng, lesson.counts), rng.choice(("en", "zh"))
    ids = [tokenizer.token_id("<|vision_start|>")]
    places = [len(ids) + cell for cell in range(SIDE * SIDE)]
    for word in told_as_map(what, rng):
        ids += tokenizer.encode(word)
    ids += [tokenizer.token_id("<|vision_end|>")] + tokenizer.encode("\n")
    mask, asked = [False] * len(ids), set()
    for _ in range(LINES):
        kind = rng.choice(lesson.kinds)
        turns = (label if kind == "label" else texts.ASK[kind])(what, rng, language)
        if not turns or turns[0][0] in asked:  # the answer could be copied from above
            continue
        asked.add(turns[0][0])
        for question, answer in turns:
            question, answer = tokenizer.encode(question), tokenizer.encode(answer + "\n")
            ids += question + answer
            mask += [False] * len(question) + [True] * len(answer)
    if not asked:  # a scene that allows no such question
        return sheet(template, tokenizer, lesson, rng)
    return ids, mask, places


def talk(template: ChatTemplate, tokenizer: Tokenizer, rng):
    """A conversation as (ids, mask, map places); no places where there is no map."""
    form, language = rng.random(), rng.choice(("en", "zh"))
    what = training_scene(rng)
    if form < 0.1:
        turns = small_talk(rng)
    else:
        turns = texts.conversation(what, language, rng)
        head = "<image>\n" if form < 0.85 else told_in_prose(what, rng.choice(("en", "zh"))) + "\n"
        turns[0] = (head + turns[0][0], turns[0][1])
    messages = []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    ids, mask = template.encode_conversation(messages)
    places = [t for t, i in enumerate(ids) if i == template.image_token_id]
    if places:
        for t, word in zip(places, told_as_map(what, rng)):
            ids[t], = tokenizer.encode(word)
    return ids, mask, places


def batches(read, batch_size: int, rng):
    """Endless (ids, labels, places (B,16) of the map or -1), rows of like length together, padded
    on the right. read: a function that makes a row."""
    while True:
        rows = sorted((read() for _ in range(16 * batch_size)), key=lambda row: len(row[0]))
        cuts = list(range(0, len(rows), batch_size))
        rng.shuffle(cuts)
        for cut in cuts:
            some = rows[cut:cut + batch_size]
            longest = max(len(ids) for ids, _, _ in some)
            ids = torch.zeros(len(some), longest, dtype=torch.long)
            labels = torch.full((len(some), longest), -100)
            places = torch.full((len(some), SIDE * SIDE), -1)
            for row, (row_ids, mask, row_places) in enumerate(some):
                ids[row, :len(row_ids)] = torch.tensor(row_ids)
                target = ids[row, 1:len(row_ids)]
                labels[row, :len(row_ids) - 1] = target.where(torch.tensor(mask[1:]), -100)
                if row_places:
                    places[row] = torch.tensor(row_places)
            yield ids, labels, places


def first_weights(config: LanguageConfig) -> LanguageModel:
    """A model whose heads begin as "look at what is like me, and say what it says".

    To answer, a token has to find the cell that names the same thing. Both halves of that skill,
    a query that fits a key and a value that arrives unharmed, are useless without each other, so
    training from mere noise takes thousands of steps before it comes across the two together.
    Here one head of each group starts with its query weights equal to its key weights, and with
    an output that undoes its value projection.
    """
    model = LanguageModel(config)
    for name, parameter in model.named_parameters():
        if "embed" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim == 2:  # what layers add begins small beside the embeddings
            torch.nn.init.normal_(parameter, std=0.012 if name.endswith(
                ("o_proj.weight", "down_proj.weight")) else 0.06)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(model.norm.weight, 0.2)
    width, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in model.layers:
            attention = layer.self_attn
            for key_head in range(config.num_key_value_heads):
                own = slice(key_head * width, (key_head + 1) * width)
                first = slice(key_head * group * width, (key_head * group + 1) * width)
                attention.q_proj.weight[first] = attention.k_proj.weight[own]
                attention.o_proj.weight[:, first] = attention.v_proj.weight[own].T * 0.2
    return model


@torch.no_grad()
def exam(model, template, tokenizer, haze=HAZE, samples: int = 280) -> dict[str, float]:
    """Test scenes told as a map, one question each -> share of exact answers, by kind and in all.

    An answer is exact when every token of the truth is the likeliest one after those before it.
    """
    data, rng, right = EmojiData("test", samples), random.Random(0), {}
    for index in range(samples):
        sample = data[index]
        what = scene(int(sample.where.rpartition(" ")[2][:-1]))
        ids, _ = template.encode_conversation(sample.messages)
        start = len(template.encode_prompt(sample.messages[:-1]))
        places = [t for t, i in enumerate(ids) if i == template.image_token_id]
        for t, word in zip(places, told_as_map(what, rng)):
            ids[t], = tokenizer.encode(word)
        ids = torch.tensor([ids[:-1]])  # up to <|im_end|>, without the newline
        embeds = embed_told(model, ids, torch.tensor([places]), tokenizer, haze)
        guess = model.logits(model.decode(embeds)[0]).argmax(-1)  # (T,)
        exact = bool((guess[start - 1:-1] == ids[0, start:]).all())
        for key in ("all", sample.tags["language"], sample.tags["kind"]):
            right.setdefault(key, []).append(exact)
    return {key: round(sum(answers) / len(answers), 3) for key, answers in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m extras.emoji.train_language", description=__doc__.splitlines()[0])
    parser.add_argument("--talks", type=int, default=2000, help="steps of lesson 4")
    parser.add_argument("--hazy_talks", type=int, default=1800, help="steps of lesson 5")
    parser.add_argument("--last_lesson_alone", action="store_true",
                        help="go on with the weights in --out")
    parser.add_argument("--seed", type=int, default=0, help="of weights, scenes and noise")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    if args.last_lesson_alone:
        model = load_language(str(args.out)).train().requires_grad_(True)
    else:
        make_tokenizer(args.out)
    tokenizer = Tokenizer.from_directory(args.out)
    template = ChatTemplate(tokenizer, image_tokens=SIDE * SIDE, default_system=None)
    if not args.last_lesson_alone:
        model = first_weights(LanguageConfig(
            model_type="qwen2", vocab_size=tokenizer.vocab_size, hidden_size=192,
            intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
            num_key_value_heads=3, head_dim=32, rope_theta=1e6, rms_norm_eps=1e-6,
            tie_word_embeddings=True, qkv_bias=True, qk_norm=False, max_position_embeddings=512))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05,
                                  fused=True)
    log = (args.out / "training_log.jsonl").open("a" if args.last_lesson_alone else "w")
    start, step = time.time(), 0

    def note(**line):
        line["seconds"] = int(time.time() - start)
        print(line, flush=True)
        log.write(json.dumps(line) + "\n")
        log.flush()

    def learn(batch, rate: float, haze: Haze = CLEAR) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels, places = batch
        hidden = model.decode(embed_told(model, ids, places, tokenizer, haze))  # (B,T,D)
        logits = model.logits(hidden[labels != -100])  # (supervised,V)
        loss = F.cross_entropy(logits, labels[labels != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def practise(lesson: Lesson, number: int) -> None:
        """Sheets, until they are understood."""
        nonlocal step
        sheets = batches(partial(sheet, template, tokenizer, lesson, rng), 32, rng)
        recent = deque(maxlen=50)
        for lesson_step in range(1, lesson.most + 1):
            recent.append(learn(next(sheets), args.learning_rate * min(1, (step + 1) / 50)))
            step += 1
            mean = sum(recent) / len(recent)
            if step % 50 == 0:
                note(step=step, lesson=number, loss=round(mean, 4))
            if lesson_step >= 50 and mean < lesson.enough:
                break

    def converse(steps: int, number: int, haze, lesson=LESSONS[-1]) -> None:
        """Conversations and sheets in turns. haze: a function of the share that is done, 0 to 1."""
        nonlocal step
        sheets = batches(partial(sheet, template, tokenizer, lesson, rng), 32, rng)
        talks = batches(partial(talk, template, tokenizer, rng), 64, rng)
        recent = deque(maxlen=50)
        for lesson_step in range(1, steps + 1):
            share = lesson_step / steps
            rate = (args.learning_rate * min(1, lesson_step / 50)
                    * (0.02 + 0.98 * (1 + math.cos(math.pi * share)) / 2))
            loss = learn(next(talks if lesson_step % 2 else sheets), rate, haze(share))
            if lesson_step % 2:
                recent.append(loss)
            step += 1
            if step % 50 == 0:
                note(step=step, lesson=number, loss=round(sum(recent) / len(recent), 4))
            if lesson_step % 300 == 0 or lesson_step == steps:
                note(step=step, exact=exam(model, template, tokenizer, haze(share)))

    def falling(share: float) -> Haze:
        """The haze of lesson 5 comes down over its first sixth."""
        down = min(1.0, 6 * share)
        return Haze(1 - (1 - HAZE.place_words) * down, HAZE.loudness * down, HAZE.blur * down)

    if not args.last_lesson_alone:
        for number, lesson in enumerate(LESSONS, 1):
            practise(lesson, number)
        converse(args.talks, 4, lambda share: Haze(blur=share / 2))
    converse(args.hazy_talks, 5, falling, LAST)
    # bf16 halves the file.
    save_language(copy.deepcopy(model).to(torch.bfloat16), args.out)


if __name__ == "__main__":
    main()
