"""Where a model looked while it answered, drawn: eval.py --attention OUT.png.

    embeddings (1,T,D) -> layer by layer -> the weights with which token t looks at token s
                                         -> logit lens: what each token would say by then
    Conversation (its last answer) -> for each word of it the images, bright where it looked
                                   -> the images, on each token the word that it stands for

The fused kernel of language.py never forms the attention weights. Here they are formed again from
each layer's own norm, projections and RoPE: softmax(q k^T / sqrt(hd)) under the causal mask, in
float32 as in the kernel. Attention tells what a layer read, not why the answer is what it is (Jain
& Wallace 2019). The logit lens (nostalgebraist 2020) puts the hidden state behind a layer through
the final norm and the head, as if no layer came after.
"""

import itertools
import math
import textwrap
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure

from dataset.chat import IMAGE
from model.generate import REPLACEMENT_CHARACTER
from model.language import Attention, LanguageModel, rope_cos_sin

SIDE, CELL, LINE = 1.8, 0.62, 0.15  # inches: of an image, of a token, of a line of text
COLUMNS, MOST_WORDS = 6, 48
DARK = 0.28  # the share of light that a patch keeps which nobody looked at
SIZE = 8  # points of the letters
LETTER = 0.65 * SIZE / 72  # inches of a Latin letter, in the one typeface that is used
LOOKED = (
    "Where each word was looked for. Bright: attention of the position that chose the word; the "
    "mean over its tokens, all {layers} layers and all {heads} heads, each on a scale of its own. "
    "Percent: the share of that attention which images got; the rest went to text.")
LENS = (
    "Logit lens: each image token, as it is behind the named layer, through the final norm and the "
    "head: the likeliest token. Behind layer {layers}, the last, that is the model's own "
    "prediction of what follows.")
EMBEDDED_FONT = Path(__file__).resolve().parent.parent / "dataset" / "emoji" / "chinese.ttf"
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "PingFang SC", "Microsoft YaHei",
    "SimHei", "Hiragino Sans GB", "WenQuanYi Zen Hei", "Noto Sans CJK JP", "Droid Sans Fallback")


# ---------------------------------------------------------------- the weights


def attention_weights(attention: Attention, x, rope):
    """One layer's: its normed input x (B,T,D) -> (B,H,T,T) float32, rows that sum to 1."""
    q, k, _ = attention.queries_keys_values(x, rope)  # (B,H,T,hd), (B,Hkv,T,hd)
    k = k.repeat_interleave(attention.num_heads // attention.num_key_value_heads, dim=1)
    scores = q.float() @ k.float().transpose(2, 3) / math.sqrt(attention.head_dim)  # (B,H,T,T)
    later = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).triu(1)  # (T,T)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


@torch.inference_mode()
def each_layer(decoder: LanguageModel, embeds):
    """Yield every layer's weights (B,H,T,T) and the hidden state behind it (B,T,D): one at a time,
    for all 28 layers of 16 heads over 1,000 tokens would be 1.8 GB."""
    positions = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
    rope = rope_cos_sin(positions, decoder.config.head_dim, decoder.config.rope_theta)
    x = embeds
    for number, layer in enumerate(decoder.layers):
        weights = attention_weights(layer.self_attn, layer.input_layernorm(x), rope)
        x = layer(x, rope, None, None, number)
        yield weights, x


@torch.inference_mode()
def attention_maps(model, ids: list[int], pixels, answer: int):
    """ids: a prompt and then the `answer` tokens of its answer; pixels (N,3,H,W).

    Returns weights (answer,T), the mean over all layers and heads: row i is that of the position
    which chose token i of the answer, the one before it. And lens [(N*K,)] ids, for each layer: the
    likeliest token behind it at each image token.
    """
    decoder, device = model.language, model.language.embed_tokens.weight.device
    row = torch.tensor([ids], device=device)
    embeds = model.embed(row, pixels.to(device))  # (1,T,D)
    images = row[0] == model.config.image_token_id  # (T,)
    total, lens = 0, []
    for weights, x in each_layer(decoder, embeds):
        total = total + weights[0, :, -answer - 1:-1].mean(0)  # (answer,T)
        lens.append(decoder.logits(decoder.norm(x[0, images])).argmax(-1))  # (N*K,)
    return total / len(decoder.layers), lens


# ---------------------------------------------------------------- words


def words(tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """ids -> [(word, [0, 1]), ...] with the indices of its tokens. A byte-level tokenizer cuts one
    Chinese character into up to three tokens and one English word into several."""
    found, start, length = [], 0, 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        # The next token may complete the character.
        if text.endswith(REPLACEMENT_CHARACTER) and end < len(ids):
            continue
        piece, indices = text[length:], list(range(start, end))
        start, length = end, len(text)
        if found and continues(piece, found[-1][0]):
            found[-1] = found[-1][0] + piece, found[-1][1] + indices
        else:
            found.append((piece, indices))
    return found


def continues(piece: str, before: str) -> bool:
    """Whether a piece of text goes on with the word before it: so does a full stop."""
    def alone(character: str) -> bool:  # Chinese characters and emoji are words by themselves
        kind = unicodedata.category(character)
        return kind in ("Lo", "So") and not "\u0600" <= character < "\u0e00"  # Arabic, Hindi: no

    if not piece or not before.strip():
        return True
    return not piece[0].isspace() and (unicodedata.category(piece[0])[0] == "P"
                                       or not (alone(piece[0]) or alone(before[-1])))


# ---------------------------------------------------------------- the drawing


@cache
def fonts() -> tuple[list[str], set[int]]:
    """-> families that matplotlib tries one after the other, and all characters that they have."""
    font_manager.fontManager.addfont(EMBEDDED_FONT)
    here = {font.name for font in font_manager.fontManager.ttflist}
    families = ["DejaVu Sans Mono", *(name for name in CHINESE_FONTS if name in here),
                font_manager.get_font(EMBEDDED_FONT).family_name]
    return families, {code for name in families for code in
                      font_manager.get_font(font_manager.findfont(name)).get_charmap()}


def legible(text: str) -> str:
    """What no font here can write stands as its number, U+732B: a box would say nothing."""
    text = " ".join(text.split()) or repr(text)[1:-1]
    return "".join(c if ord(c) in fonts()[1] else f"U+{ord(c):04X} " for c in text)


def fold(text: str, width: float) -> list[str]:
    """Lines of at most so many inches; a Chinese character is less than twice a Latin letter."""
    text = legible(text)
    wide = any(unicodedata.east_asian_width(c) in "WF" for c in text)
    return textwrap.wrap(text, max(1, int(width / LETTER) // (1 + wide))) or [""]


def input_image(pixels, processor, side: int) -> np.ndarray:
    """What the tower was given, (3,H,W) -> (H,W,3) from 0 to 1, as far as its patches go."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.mean, processor.std))
    image = ((pixels.cpu().float() * std + mean) / (processor.rescale * 255)).clamp(0, 1)
    H, W = (edge // side * side for edge in image.shape[1:])
    return image[:, :H, :W].permute(1, 2, 0).numpy()


def spotlight(images: list, heat: np.ndarray, side: int) -> np.ndarray:
    """images N x (H,W,3), heat (N,rows,columns) -> (H,N*W,3), dark where the heat is small. All
    share one scale: which image was looked at shows too."""
    light = DARK + (1 - DARK) * heat / max(float(heat.max()), 1e-12)
    return np.concatenate([image * np.kron(one, np.ones((side, side)))[..., None]
                           for image, one in zip(images, light)], axis=1)


def draw_attention(conversation) -> Figure:
    """The last answer of a Conversation. ValueError: there is no image or no word to draw."""
    prompt, answer, pixels = conversation.prompt_ids, conversation.answer_ids, conversation.pixels
    model, tokenizer = conversation.model, conversation.template.tokenizer
    if not pixels or not answer:
        raise ValueError("--attention: there is no " + ("word in the answer" if pixels else
                         "image in the conversation") + ", so nothing was looked at")
    if model.config.vision.features != "patches":
        raise ValueError(f"--attention: this model was trained with --vision_feature_select "
                         f"{model.config.vision.features}, one token for a whole image; there are "
                         "no places in it to look at")
    side = model.config.vision.patch_size * model.config.projector.pixel_shuffle
    images = [input_image(one, conversation.processor, side) for one in pixels]
    rows, columns = images[0].shape[0] // side, images[0].shape[1] // side
    weights, lens = attention_maps(model, [*prompt, *answer], torch.stack(pixels), len(answer))
    positions = [i for i, token in enumerate(prompt) if token == model.config.image_token_id]
    heat = weights[:, positions].view(len(answer), len(images), rows, columns).cpu().numpy()
    found, layers = words(tokenizer, answer), sorted({max(1, len(lens) // 2), len(lens)})
    about = [f"asked: {conversation.messages[-2].content.replace(IMAGE, '')}",
             f"answered: {tokenizer.decode(answer)}", LOOKED.format(
                 layers=len(lens), heads=model.language.config.num_attention_heads)]
    drawn = min(len(found), MOST_WORDS)
    if drawn < len(found):
        about.append(f"and {len(found) - drawn} more words, not drawn")

    in_a_row, cell = max(1, COLUMNS // len(images)), max(CELL, 4.2 / max(rows, columns))
    width = max(SIDE * COLUMNS, SIDE * len(images), cell * columns * len(layers))
    above = [line for text in about for line in fold(text, 0.98 * width)]
    below = fold(LENS.format(layers=len(lens)), 0.98 * width)
    heights = [LINE * len(above) + 1.2 * SIDE * math.ceil(drawn / in_a_row),
               LINE * len(below) + (cell * rows + 2 * LINE) * len(images)]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    for axes, (word, indices) in zip(panels(upper, above, drawn, in_a_row), found[:drawn]):
        mean = heat[indices].mean(0)  # (N,rows,columns)
        axes.imshow(spotlight(images, mean, side))
        label = fold(word, SIDE * len(images) - 5 * LETTER)[0]
        axes.set_title(f"{label}  {mean.sum():.0%}", **style())
    shown = list(itertools.product(range(len(images)), layers))
    for axes, (image, layer) in zip(panels(lower, below, len(shown), len(layers)), shown):
        axes.imshow(images[image], alpha=0.38, extent=(0, columns, rows, 0))
        axes.set_title(f"behind layer {layer}", **style())
        tokens = lens[layer - 1].view(len(images), rows, columns)[image]
        for y, x in itertools.product(range(rows), range(columns)):
            text = fold(tokenizer.decode([int(tokens[y, x])]), cell * 0.9)[0]
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", in_layout=False, **style())
    return figure


def style() -> dict:
    return {"family": fonts()[0], "fontsize": SIZE, "parse_math": False}


def panels(part, lines: list[str], count: int, columns: int) -> list:
    """Text above `count` empty charts, so many beside each other."""
    part.suptitle("\n".join(lines), x=0.01, ha="left", **style())
    cells = list(part.subplots(math.ceil(count / columns), columns, squeeze=False).flat)
    for axes in cells:
        axes.set_axis_off()
    return cells


def save_attention(conversation, file) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    draw_attention(conversation).savefig(file, dpi=100)
