"""Train the embedded language tower dataset/emoji/language: a small Qwen2 that reads only text.

    python -m extras.emoji.train_language

An hour and a half on two cores; the result is in the repo, its story in dataset/emoji/README.md.
It reads scenes told in words (told_scenes.py), and learns to answer from what stands before the
question, easy things first: large language models bring that skill from their training text. The
projector of stage one then only has to turn patches into what can be read already.

In the first lessons each cell of a map has its place summed in; in the last one only every second
map says places, and there is noise upon it, up to 2.5 times as strong as the words themselves
(embed_told). The noise is what stage one needs. A model that has only met clean words can be talked
into any answer by vectors that resemble no word, and a projector that is trained through it finds
those. One that reads through noise is moved less by them, and more by what resembles a word.
"""

import argparse
import itertools
import json
import math
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from torch.nn.utils.rnn import pad_sequence

from dataset.batching import UNSUPERVISED
from dataset.chat import ChatTemplate
from dataset.emoji import texts
from dataset.emoji.world import EmojiData, scene
from dataset.tokenizer import Tokenizer
from extras.emoji import told_scenes as told
from model.config import LanguageConfig
from model.language import LanguageModel
from model.pretrained.files import write_json
from model.pretrained.load import load_language
from model.pretrained.save import save_language

HERE = Path(__file__).resolve().parents[2] / "dataset" / "emoji" / "language"
SPECIAL = [f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad")]
# Qwen2's rule for cutting text into pieces before byte pairs are merged inside each piece.
PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")


@dataclass(frozen=True)
class Haze:
    """What lies between the words of a map and the model that reads them."""

    place_words: float = 1.0  # share of the maps whose cells also say where they are
    loudness: float = 0.0  # spread of its logarithm: 0.5 makes most maps 0.6 to 1.6 times as loud
    blur: float = 0.0  # noise, as a multiple of the words' size; each map draws from 0 to this


CLEAR, HAZE = Haze(), Haze(place_words=0.5, loudness=0.5, blur=2.5)


def falling_haze(share: float) -> Haze:
    down = min(1.0, 6 * share)  # over the first sixth of lesson 5
    return Haze(1 - (1 - HAZE.place_words) * down, HAZE.loudness * down, HAZE.blur * down)


def place_ids(tokenizer: Tokenizer) -> torch.Tensor:
    """(16,2): the two words that say where each cell of the map is."""
    words = [(" top" if cell < 8 else " bottom", " left" if cell % 4 < 2 else " right")
             for cell in range(told.SIDE * told.SIDE)]
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


def make_tokenizer(out: Path) -> None:
    """Byte-level BPE on the texts of the world; each name becomes one token wherever it stands.

    Chinese is written without spaces: a name that stayed in pieces in a question would have to be
    put together before it could be looked for.
    """
    rng, corpus = random.Random(0), []
    for _ in range(2_000):
        for language in ("en", "zh"):
            what = told.training_scene(rng)
            corpus += [told.in_prose(what, language)]
            corpus += itertools.chain(*texts.conversation(what, language, rng))
        corpus += itertools.chain(*told.small_talk(rng))
    for thing in texts.THINGS:  # enough weight that no name stays in pieces
        corpus += [f" {thing.english}", f" {thing.plural}", thing.chinese, told.EMPTY] * 3000
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
        for name, text in ((f" {thing.english}", f"Where is the {thing.english}?"),
                           (f" {thing.plural}", f"How many {thing.plural} are there?"),
                           (thing.chinese, f"图里有几{thing.measure}{thing.chinese}？"),
                           (thing.chinese, f"{thing.chinese}的左边是什么？")):
            if name not in [tokenizer.decode([i]) for i in tokenizer.encode(text).ids]:
                raise SystemExit(f"{name!r} is not one token in {text!r}: give names more weight")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "add_prefix_space": False, "model_max_length": 512})
    stop = list(map(tokenizer.token_to_id, ("<|im_end|>", "<|endoftext|>")))
    write_json(out / "generation_config.json", {"eos_token_id": stop})
    print(f"tokenizer: {tokenizer.get_vocab_size()} tokens")


def batches(read, batch_size: int, rng):
    """Endless (ids (B,T), labels (B,T-1), places (B,16) of the map or -1), rows of like length
    together, padded on the right. read: a function that makes a row."""
    while True:
        rows = sorted((read() for _ in range(16 * batch_size)), key=lambda row: len(row[0]))
        cuts = list(range(0, len(rows), batch_size))
        rng.shuffle(cuts)
        for cut in cuts:
            ids, masks, places = zip(*rows[cut:cut + batch_size])
            ids = [torch.tensor(row) for row in ids]
            labels = [row.where(torch.tensor(mask), UNSUPERVISED)[1:]
                      for row, mask in zip(ids, masks)]
            yield (pad_sequence(ids, True), pad_sequence(labels, True, UNSUPERVISED),
                   torch.tensor([row or [-1] * told.SIDE ** 2 for row in places]))


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
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(parameter, std=0.012 if adds else 0.06)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(model.norm.weight, 0.2)
    heads, width, D = config.num_key_value_heads, config.head_dim, config.hidden_size
    with torch.no_grad():
        for attention in (layer.self_attn for layer in model.layers):
            k, v = (proj.weight.view(heads, width, D)
                    for proj in (attention.k_proj, attention.v_proj))
            attention.q_proj.weight.view(heads, -1, width, D)[:, 0] = k
            attention.o_proj.weight.view(D, heads, -1, width)[:, :, 0] = v.permute(2, 0, 1) * 0.2
    return model


@torch.no_grad()
def exam(model, template, haze=HAZE, samples: int = 280) -> dict[str, float]:
    """Test scenes told as a map, one question each -> share of exact answers, by kind and in all:
    every token of the truth is the likeliest one after those before it."""
    data, rng, right = EmojiData("test", samples), random.Random(0), {}
    for index in range(samples):
        sample = data[index]
        what = scene(int(sample.where.rpartition(" ")[2][:-1]))
        ids, _, places = told.encode_told(template, sample.messages, what, rng)
        start = len(template.encode_prompt(sample.messages[:-1]))
        ids = torch.tensor([ids[:-1]])  # up to <|im_end|>, without the newline
        embeds = embed_told(model, ids, torch.tensor([places]), template.tokenizer, haze)
        guess = model.logits(model.decode(embeds)[0]).argmax(-1)  # (T,)
        exact = bool((guess[start - 1:-1] == ids[0, start:]).all())
        for key in ("all", sample.tags["language"], sample.tags["kind"]):
            right.setdefault(key, []).append(exact)
    return {key: round(sum(answers) / len(answers), 3) for key, answers in right.items()}


@dataclass(frozen=True)
class Lesson:
    """Batches of several streams, read in turns; its loss is that of the first."""

    streams: tuple
    steps: int
    enough: float = 0.0  # it is understood when the mean loss of 50 steps is below
    haze: Callable | None = None  # share that is done, 0 to 1 -> Haze; lr then falls as a cosine


def train(model, template: ChatTemplate, lessons: dict, learning_rate: float, log) -> None:
    """lessons: {number: Lesson}. log: a file for one JSON line each 50 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05,
                                  fused=True)
    step, start = 0, time.time()

    def note(**line) -> None:
        line["seconds"] = int(time.time() - start)
        print(line, flush=True)
        print(json.dumps(line), file=log, flush=True)

    for number, lesson in lessons.items():
        recent = deque(maxlen=50)
        for done in range(1, lesson.steps + 1):
            step += 1
            rate, haze = min(1, step / 50), CLEAR
            if lesson.haze:
                haze = lesson.haze(done / lesson.steps)
                cosine = (1 + math.cos(math.pi * done / lesson.steps)) / 2
                rate = min(1, done / 50) * (0.02 + 0.98 * cosine)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * rate
            turn = (done - 1) % len(lesson.streams)
            ids, labels, places = next(lesson.streams[turn])
            hidden = model.decode(embed_told(model, ids, places, template.tokenizer, haze))
            supervised = labels != UNSUPERVISED  # (B,T-1)
            logits = model.logits(hidden[:, :-1][supervised])  # (supervised,V)
            loss = F.cross_entropy(logits, labels[supervised])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            recent += [loss.item()] if turn == 0 else []
            mean = sum(recent) / len(recent)
            if step % 50 == 0:
                note(step=step, lesson=number, loss=round(mean, 4))
            if lesson.haze and (done % 300 == 0 or done == lesson.steps):
                note(step=step, exact=exam(model, template, haze))
            if done >= 50 and mean < lesson.enough:
                break


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m extras.emoji.train_language", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--talks", type=int, default=2000, help="steps of lesson 4")
    add("--hazy_talks", type=int, default=1800, help="steps of lesson 5")
    add("--last_lesson_alone", action="store_true", help="go on with the weights in --out")
    add("--seed", type=int, default=0, help="of weights, scenes and noise")
    add("--learning_rate", type=float, default=1e-3)
    add("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.last_lesson_alone:
        model = load_language(str(args.out)).train().requires_grad_(True)
    else:
        make_tokenizer(args.out)
    tokenizer = Tokenizer.from_directory(args.out)
    if not args.last_lesson_alone:
        model = first_weights(LanguageConfig(
            model_type="qwen2", vocab_size=tokenizer.vocab_size, hidden_size=192,
            intermediate_size=512, num_hidden_layers=6, num_attention_heads=6,
            num_key_value_heads=3, head_dim=32, rope_theta=1e6, rms_norm_eps=1e-6,
            tie_word_embeddings=True, qkv_bias=True, qk_norm=False, max_position_embeddings=512))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    template, rng = ChatTemplate(tokenizer, told.SIDE ** 2, None), random.Random(args.seed)
    sheets = [batches(partial(told.sheet, template, rng, **kind), 32, rng) for kind in told.SHEETS]
    talks = batches(partial(told.talk, template, rng), 64, rng)
    lessons = {1: Lesson((sheets[0],), 600, 0.1), 2: Lesson((sheets[1],), 1500, 0.06),
               3: Lesson((sheets[2],), 1500, 0.06),
               4: Lesson((talks, sheets[3]), args.talks, haze=lambda share: Haze(blur=share / 2)),
               5: Lesson((talks, sheets[4]), args.hazy_talks, haze=falling_haze)}
    lessons = {5: lessons[5]} if args.last_lesson_alone else lessons
    with (args.out / "training_log.jsonl").open("a" if args.last_lesson_alone else "w") as log:
        train(model, template, lessons, args.learning_rate, log)
    save_language(model.to(torch.bfloat16), args.out)  # bf16 halves the file


if __name__ == "__main__":
    main()
