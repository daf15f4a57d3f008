"""Where a model looked while it answered, drawn: eval.py --attention OUT.png.

    embeddings (1,T,D) -> layer by layer -> the weights with which token t looks at token s
                                         -> logit lens: what each token would say by then
    Conversation (its last answer) -> for each word of it the images, bright where it looked
                                   -> the images, on each token the word that it stands for

The fused kernel of language.py never forms the attention weights, so they are formed again here.
They tell what a layer read, not why the answer is what it is (Jain & Wallace 2019). The logit lens
(nostalgebraist 2020) puts the hidden state behind a layer through the final norm and the head, as
if no layer came after.
"""

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from dataset.chat import IMAGE
from extras.text_drawing import LETTER, fold, style, words
from model.language import Attention, LanguageModel, rope_cos_sin

SIDE, CELL, LINE = 1.8, 0.62, 0.15  # inches: of an image, of a token, of a line of text
COLUMNS, MOST_WORDS = 6, 48
DARK = 0.28  # the share of light that a patch keeps which nobody looked at
LOOKED = ("Where each word was looked for. Bright: attention of the position that chose the word; "
          "mean over its tokens, {layers} layers and {heads} heads, on a scale of its own. "
          "Percent: the share of that attention which images got; the rest went to text.")
LENS = ("Logit lens: each image token, as it is behind the named layer, through the final norm and "
        "the head: the likeliest token; behind the last layer, the prediction of what follows.")


def attention_weights(attention: Attention, x, rope):
    """One layer's: its normed input x (B,T,D) -> (B,H,T,T) float32, rows that sum to 1."""
    q, k, _ = attention.queries_keys_values(x, rope)  # (B,H,T,hd), (B,Hkv,T,hd)
    k = k.repeat_interleave(attention.num_heads // attention.num_key_value_heads, dim=1)
    scores = q.float() @ k.float().transpose(2, 3) / math.sqrt(attention.head_dim)  # (B,H,T,T)
    later = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).triu(1)  # (T,T)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


@torch.inference_mode()
def each_layer(decoder: LanguageModel, x):
    """Embeddings x (B,T,D) -> every layer's weights (B,H,T,T) and the hidden state behind it
    (B,T,D): one at a time, for all 28 layers of 16 heads over 1,000 tokens would be 1.8 GB."""
    positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    config = decoder.config
    rope = rope_cos_sin(positions, config.head_dim, config.rope_theta, config.rope_scaling)
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
    images = row[0] == model.config.image_token_id  # (T,)
    total, lens = 0, []
    for weights, x in each_layer(decoder, model.embed(row, pixels.to(device))):
        total = total + weights[0, :, -answer - 1:-1].mean(0)  # (answer,T)
        lens.append(decoder.logits(decoder.norm(x[0, images])).argmax(-1))  # (N*K,)
    return total / len(decoder.layers), lens


def input_image(pixels, processor, side: int) -> np.ndarray:
    """What the tower was given, (3,H,W) -> (H,W,3) from 0 to 1, as far as its patches go."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.mean, processor.std))
    image = ((pixels.cpu().float() * std + mean) / (processor.rescale * 255)).clamp(0, 1)
    H, W = (edge // side * side for edge in image.shape[1:])
    return image[:, :H, :W].permute(1, 2, 0).numpy()


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
             f"answered: {tokenizer.decode(answer)}",
             LOOKED.format(layers=len(lens), heads=model.language.config.num_attention_heads)]
    if len(found) > MOST_WORDS:
        about.append(f"and {len(found) - MOST_WORDS} more words, not drawn")
        found = found[:MOST_WORDS]

    in_a_row, cell = max(1, COLUMNS // len(images)), max(CELL, 4.2 / max(rows, columns))
    width = max(SIDE * COLUMNS, SIDE * len(images), cell * columns * len(layers))
    above, below = ([line for text in texts for line in fold(text, 0.98 * width)]
                    for texts in (about, [LENS]))
    heights = [LINE * len(above) + 1.2 * SIDE * math.ceil(len(found) / in_a_row),
               LINE * len(below) + (cell * rows + 2 * LINE) * len(images)]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    for axes, (word, indices) in zip(panels(upper, above, len(found), in_a_row), found):
        mean = heat[indices].mean(0)  # (N,rows,columns)
        # One scale for all images: which of them was looked at shows too.
        light = DARK + (1 - DARK) * mean / max(float(mean.max()), 1e-12)
        light = np.kron(np.concatenate(list(light), axis=1), np.ones((side, side)))
        axes.imshow(np.concatenate(images, axis=1) * light[..., None])
        label = fold(word, SIDE * len(images) - 5 * LETTER)[0]
        axes.set_title(f"{label}  {mean.sum():.0%}", **style())
    cells = panels(lower, below, len(images) * len(layers), len(layers))
    for axes, (image, layer) in zip(cells, itertools.product(range(len(images)), layers)):
        axes.imshow(images[image], alpha=0.38, extent=(0, columns, rows, 0))
        axes.set_title(f"behind layer {layer}", **style())
        tokens = lens[layer - 1].view(len(images), rows, columns)[image]
        for y, x in itertools.product(range(rows), range(columns)):
            text = fold(tokenizer.decode([int(tokens[y, x])]), cell * 0.9)[0]
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", in_layout=False, **style())
    return figure


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
