"""Train the embedded language tower dataset/emoji/language: a small Qwen2 that reads only text.

    python -m tools.train_language --call 1 --steps 3000      the first of five calls: LESSONS

An hour and a half on one core in all; the result is in the repo, and its README tells the calls.

What it reads: conversations about emoji scenes, where the scene is *told in words* before it is
asked about, and some small talk without any scene. Two ways of telling:

    a map    sixteen words between <|vision_start|> and <|vision_end|>, one for each of the 4 x 4
             places where a picture's patches will later stand, " cat" or " ." (nothing there);
             in the later lessons a cell also says where it is (embed_told)
    prose    "At the top left there is a cat. ..."

So the model learns to answer from what stands before the question, and the projector of stage one
only has to turn patches into what can be read already. Large language models bring that skill
from their training text; a model of three million parameters has to be shown it.
"""

import argparse
import copy
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from dataset.chat import ChatTemplate, Message
from dataset.emoji import texts
from dataset.emoji.world import CHAT_START, TEST_START, scene
from dataset.tokenizer import Tokenizer
from model.config import LanguageConfig
from model.language import LanguageModel
from model.weights import save_language

HERE = Path(__file__).resolve().parent.parent / "dataset" / "emoji" / "language"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>",
           "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
# Qwen2's rule for cutting text into pieces before byte pairs are merged inside each piece.
PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SIDE = 4  # the map has SIDE x SIDE words
EMPTY = (" .", " -", " *")


@dataclass(frozen=True)
class Lesson:
    """What the texts of one part of the training are like."""

    until: float  # the share of the run at which it ends
    counts: tuple  # of things in a scene; 0: a single large one
    told: tuple = ("en", "zh")  # languages of the map
    fewest: int = 1  # cells of its quarter in which a thing is named, at least
    empty: tuple = EMPTY  # words for nothing there
    kinds: tuple = texts.KINDS  # of questions
    asked: tuple = ("en", "zh")  # languages of the questions
    placed: bool = False  # whether each cell also says where it is
    drill: bool = False  # one question after a map and nothing else


ALL = (0, 1, 2, 2, 3, 3, 4, 4)
MAP = {"told": ("en",), "fewest": 2, "empty": EMPTY[:1]}  # one way of writing maps
HARD = ("where", "exists", "relation", "followup", "count")
LESSONS = {
    1: (Lesson(0.12, (0, 1)), Lesson(0.25, (0, 1, 2, 2)), Lesson(1.0, ALL)),
    # With two languages and any filling, too much was asked at once.
    2: (Lesson(1.0, ALL, **MAP),),
    # "Where is the cat?" was still a guess by then: from now on a cell also says where it is.
    3: (Lesson(1.0, (2, 2, 3, 4), **MAP, placed=True, kinds=HARD),),
    # Still a guess. To find the one thing that a question names began to come within 120 steps
    # once every text asked for nothing else; among other questions it had not in 3,000.
    4: (Lesson(0.31, (2,), **MAP, placed=True, kinds=HARD[:2], asked=("en",), drill=True),
        Lesson(1.0, (2,), **MAP, placed=True, kinds=HARD[:2], drill=True)),
    5: (Lesson(1.0, ALL, **MAP, placed=True, kinds=texts.KINDS + HARD),),  # the hard ones twice
}
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


def told_as_map(what, lesson: Lesson, rng) -> list[str]:
    """Sixteen words in reading order. A thing is named in some of the cells of its quarter:
    which patches of a picture will show it best is not known beforehand."""
    words = [rng.choice(lesson.empty) for _ in range(SIDE * SIDE)]
    language = rng.choice(lesson.told)
    corners = {"top left": (0, 0), "top right": (0, 2), "bottom left": (2, 0),
               "bottom right": (2, 2)}
    for placed in what.things:
        thing = texts.THINGS[placed.thing]
        name = " " + (thing.english if language == "en" else thing.chinese)
        for place, (row, column) in corners.items():
            if placed.place in (place, "middle"):  # the large thing covers all four quarters
                cells = [(row + r) * SIDE + column + c for r in (0, 1) for c in (0, 1)]
                for cell in rng.sample(cells, rng.randint(lesson.fewest, 4)):
                    words[cell] = name
    return words


def training_scene(rng, counts=ALL):
    number = rng.randrange(CHAT_START, TEST_START)  # the test scenes begin after these
    return scene(number, rng.choice(counts))


def place_ids(tokenizer: Tokenizer) -> torch.Tensor:
    """(16,2): the two words that say where each cell of the map is."""
    words = [(" top" if cell < 8 else " bottom", " left" if cell % 4 < 2 else " right")
             for cell in range(SIDE * SIDE)]
    return torch.tensor([[tokenizer.encode(word)[0] for word in pair] for pair in words])


def embed_told(model, ids, places, tokenizer):
    """ids (B,T) with a map at places (B,16) or at -1 -> embeddings (B,T,D).

    A cell says three words at once, " cat" + " top" + " left": their embeddings are summed. A
    patch of a picture will do likewise, for a vision tower knows where each patch is; and only so
    can a token that was found by what it shows tell where it is.
    """
    embeds = model.embed(ids)  # (B,T,D)
    where = model.embed(place_ids(tokenizer)).sum(1)  # (16,D)
    rows = (places[:, 0] >= 0).nonzero()[:, 0]
    if len(rows) == 0:
        return embeds
    return embeds.index_put((rows[:, None], places[rows]), where.expand(len(rows), -1, -1),
                            accumulate=True)


def make_tokenizer(out: Path) -> None:
    """Byte-level BPE on the texts of the world; each name becomes one token."""
    rng = random.Random(0)
    corpus = []
    for _ in range(20_000):
        for language in ("en", "zh"):
            what = training_scene(rng)
            corpus += [told_in_prose(what, language)]
            corpus += [t for turn in texts.conversation(what, language, rng) for t in turn]
        corpus += [t for turn in small_talk(rng) for t in turn]
    for thing in texts.THINGS:  # enough weight that no name stays in pieces
        corpus += [f" {thing.english}", f" {thing.plural}", f" {thing.chinese}", *EMPTY] * 3000
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=2048, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    names = [f" {name}" for thing in texts.THINGS for name in (thing.english, thing.chinese)]
    for word in (*names, *EMPTY):
        if len(tokenizer.encode(word).ids) != 1:
            raise SystemExit(f"{word!r} is not one token: raise its weight or vocab_size")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "add_prefix_space": False, "model_max_length": 512}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    stop = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}) + "\n")
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens")


def read_aloud(template: ChatTemplate, tokenizer: Tokenizer, lesson: Lesson, rng):
    """One text as (ids, mask, map places): a conversation, rendered just as one about a picture
    will be, with the words of the map in place of the picture."""
    talk, language = rng.random(), rng.choice(lesson.asked)
    what = training_scene(rng, lesson.counts)
    if lesson.drill:
        turns = texts.ask(what, rng.choice(lesson.kinds), language, rng)
        if turns is None:  # this scene does not allow the question
            return read_aloud(template, tokenizer, lesson, rng)
        turns[0] = ("<image>\n" + turns[0][0], turns[0][1])
    elif talk < 0.1:
        turns = small_talk(rng)
    else:
        turns = texts.conversation(what, language, rng, lesson.kinds)
        head = "<image>\n" if talk < 0.85 else told_in_prose(what, rng.choice(("en", "zh"))) + "\n"
        turns[0] = (head + turns[0][0], turns[0][1])
    messages = []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    ids, mask = template.render(messages)
    places = [t for t, i in enumerate(ids) if i == template.image_token_id]
    if places:
        for t, word in zip(places, told_as_map(what, lesson, rng)):
            ids[t], = tokenizer.encode(word)
    return ids, mask, places


def batches(template, tokenizer, batch_size: int, lesson_of, rng):
    """Endless (ids, labels, places (B,16) of the map or -1, lesson), rows of like length together,
    padded on the right."""
    step = 0
    while True:
        lesson = lesson_of(step)
        rows = [read_aloud(template, tokenizer, lesson, rng)
                for _ in range(16 * batch_size)]
        rows.sort(key=lambda row: len(row[0]))
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
            step += 1
            yield ids, labels, places, lesson


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--call", type=int, choices=LESSONS, default=1, help="which lessons")
    parser.add_argument("--start", type=Path, help="weights to go on from, for later calls")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(args.call)
    if not args.start:
        make_tokenizer(args.out)
    tokenizer = Tokenizer.from_directory(args.out)
    template = ChatTemplate(tokenizer, image_tokens=SIDE * SIDE, default_system=None)
    config = LanguageConfig(
        model_type="qwen2", vocab_size=tokenizer.vocab_size, hidden_size=192,
        intermediate_size=512, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=48, rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=True,
        qkv_bias=True, qk_norm=False, max_position_embeddings=512)
    if args.start:
        model = LanguageModel.from_pretrained(args.start)
    else:
        model = LanguageModel(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(parameter)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    lessons = LESSONS[args.call]

    def lesson_of(step):
        return next(lesson for lesson in lessons if step <= lesson.until * args.steps)

    source, start = batches(template, tokenizer, args.batch_size, lesson_of, rng), time.time()
    log = (args.out / "training_log.jsonl").open("a" if args.start else "w")
    for step in range(args.steps):
        rate = args.learning_rate * min(1, (step + 1) / 100)
        rate *= 0.02 + 0.98 * (1 + math.cos(math.pi * step / args.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels, places, lesson = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            embeds = (embed_told(model, ids, places, tokenizer) if lesson.placed
                      else model.embed(ids))  # (B,T,D)
            # Blurred words, more and more: the projector's will never be quite the table's either.
            on_map = torch.zeros(*ids.shape, 1)
            rows = (places[:, 0] >= 0).nonzero()[:, 0]
            on_map[rows[:, None], places[rows]] = 1
            scale = embeds.detach().pow(2).mean().sqrt() * rng.random() * step / args.steps / 2
            embeds = embeds + torch.randn_like(embeds) * on_map * scale
            logits = model.logits(model.decode(embeds)[labels != -100])  # (supervised, V)
        loss = F.cross_entropy(logits.float(), labels[labels != -100])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == args.steps - 1:
            line = {"call": args.call, "step": step, "loss": round(loss.item(), 4),
                    "seconds": int(time.time() - start)}
            print(line, flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
        if step % 250 == 249 or step == args.steps - 1:
            # bf16 halves the file, and rounds the weights to what training computed with.
            save_language(copy.deepcopy(model).to(torch.bfloat16), args.out)


if __name__ == "__main__":
    main()
