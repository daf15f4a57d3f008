"""Where a model looked while it answered, drawn: eval.py --attention OUT.png.

    Conversation (its last answer) -> extras/attention_map.py -> weights, logit lens
    weights -> for each word of the answer the picture, bright where it was looked at
    lens    -> the picture, on each of its tokens the word that it stands for   -> one PIL image

Attention tells what a layer read, not why the answer is what it is (Jain & Wallace 2019). What is
drawn is the mean over all layers and heads, and the picture says so.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from dataset.chat import IMAGE
from extras.attention_map import look
from extras.text_drawing import LINE, cut, fonts_for, lines, write
from extras.words import words

SIDE = 168  # pixels of a picture beside others
COLUMNS, MOST_WORDS = 6, 48
MARGIN = 12
WIDTH = COLUMNS * (SIDE + MARGIN) - MARGIN
LENS_SIDE, LENS_CELL = 420, 58  # least pixels of a lens's picture, and of one of its tokens
DARK = 0.28  # of the light that a patch keeps which nobody looked at
INK, GREY = (30, 30, 30), (110, 110, 110)


def draw_looks(conversation) -> Image.Image:
    """The last answer of a Conversation. ValueError: there is no picture or no word to draw."""
    prompt, answer = conversation.asked, conversation.answered
    model, pixels = conversation.model, conversation.pixels
    if not pixels or not answer:
        raise ValueError("--attention: there is no " + ("word in the answer" if pixels else
                         "picture in the conversation") + ", so nothing was looked at")
    grid = token_grid(model, conversation.processor)
    weights, lens = look(model, [*prompt, *answer], torch.stack(pixels), len(answer))
    image_places = [i for i, token in enumerate(prompt) if token == model.config.image_token_id]
    heat = weights[:, image_places].view(len(answer), len(pixels), *grid).cpu().numpy()
    shown = [seen_picture(p, conversation.processor, model, grid) for p in pixels]
    tokenizer = conversation.template.tokenizer
    found = words(tokenizer, answer)
    lens = {layer: [tokenizer.decode([i]) for i in lens[layer - 1].tolist()]
            for layer in lens_layers(len(lens))}
    question = conversation.messages[-2].content.replace(IMAGE, "")
    said = tokenizer.decode(answer)
    fonts = fonts_for([question, said, *(word for layer in lens.values() for word in layer)])
    layers, heads = (model.language.config.num_hidden_layers,
                     model.language.config.num_attention_heads)
    return stack([
        lines([f"asked: {question}", f"answered: {said}"], fonts, INK, WIDTH),
        lines(["Where each word was looked for. Bright: attention of the place that chose the "
               f"word; the mean over its tokens, all {layers} layers and all {heads} heads, each "
               "picture scaled to its own brightest patch. Percent: the share of that attention "
               "which pictures got; the rest went to words."], fonts, GREY, WIDTH),
        word_cells(found, heat, shown, fonts),
        lines(["Logit lens: each image token, as it is behind the named layer, through the final "
               f"norm and the head: the likeliest word. Behind layer {layers}, the last, that is "
               "the model's own prediction of what follows the token."], fonts, GREY, WIDTH),
        lens_cells(lens, shown, grid, fonts)])


def token_grid(model, processor) -> tuple[int, int]:
    """(rows, columns) of a picture's tokens, as the vision tower and the pixel shuffle lay them."""
    if model.config.vision.features != "patches":
        raise ValueError(f"--attention: this model was trained with --features "
                         f"{model.config.vision.features}, one token for a whole picture; there "
                         "are no places in it to look at")
    side = model.config.vision.patch_size * model.config.projector.pixel_shuffle
    return processor.size[0] // side, processor.size[1] // side


def lens_layers(count: int) -> list[int]:
    """One in the middle and the last; counted from 1."""
    return sorted({max(1, count // 2), count})


def seen_picture(pixels, processor, model, grid) -> Image.Image:
    """What the tower was given, (3,H,W) -> the picture that its patches cover: cropped, and without
    the remainder at the right and lower edge."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.mean, processor.std))
    values = ((pixels.cpu().float() * std + mean) / processor.rescale).round().clamp(0, 255)
    side = model.config.vision.patch_size * model.config.projector.pixel_shuffle
    values = values[:, :grid[0] * side, :grid[1] * side].permute(1, 2, 0)  # (H,W,3)
    return Image.fromarray(values.to(torch.uint8).numpy())


def spotlight(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """heat (rows,columns), 0 to 1: the picture, dark where it is small. Patches keep their edges:
    between them nothing was measured."""
    picture = fit(picture, SIDE)
    bright = (255 * (DARK + (1 - DARK) * heat)).round().astype(np.uint8)
    mask = Image.fromarray(bright).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(picture, Image.new("RGB", picture.size), mask)


def fit(picture: Image.Image, side: int) -> Image.Image:
    scale = side / max(picture.size)
    return picture.resize([max(1, round(edge * scale)) for edge in picture.size],
                          Image.Resampling.BICUBIC)


def word_cells(found: list, heat: np.ndarray, shown: list, fonts) -> Image.Image:
    """A strip of all pictures for each word, with the word and the pictures' share below."""
    columns = max(1, COLUMNS // len(shown))
    kept = found[:MOST_WORDS]
    width, height = len(shown) * SIDE, SIDE + 2 * LINE
    rows = -(-len(kept) // columns)
    sheet = Image.new("RGB", (columns * (width + MARGIN) - MARGIN,
                              rows * height + (LINE if len(found) > len(kept) else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (text, places) in enumerate(kept):
        left, top = number % columns * (width + MARGIN), number // columns * height
        mean = heat[places].mean(0)  # (N,rows,columns)
        for place, (picture, one) in enumerate(zip(shown, mean)):
            # Beside each other they share one scale: which picture was looked at shows too.
            lit = spotlight(picture, one / max(float(mean.max()), 1e-12))
            sheet.paste(lit, (left + place * SIDE, top))
        write(draw, fonts, text.strip() or repr(text)[1:-1], left, top + SIDE + 15, INK)
        share = f"{mean.sum():.0%}"
        draw.text((left + width, top + SIDE + 15), share, font=fonts[0], fill=GREY, anchor="rs")
    if len(found) > len(kept):
        write(draw, fonts, f"and {len(found) - len(kept)} more words, not drawn", 0,
              sheet.height - 5, GREY)
    return sheet


def lens_cells(lens: dict, shown: list, grid: tuple, fonts) -> Image.Image:
    """Each picture once for every layer of `lens`, faint, with a word on each of its tokens."""
    rows, columns = grid
    cell = max(LENS_CELL, LENS_SIDE // max(grid))
    width, height = columns * cell, rows * cell + LINE
    sheet = Image.new("RGB", (len(lens) * (width + MARGIN) - MARGIN, len(shown) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for right, (layer, texts) in enumerate(lens.items()):
        for down, picture in enumerate(shown):
            left, top = right * (width + MARGIN), down * height
            write(draw, fonts, f"behind layer {layer}", left, top + 14, INK)
            faint = Image.blend(picture.resize((width, rows * cell)),
                                Image.new("RGB", (width, rows * cell), "white"), 0.62)
            sheet.paste(faint, (left, top + LINE))
            for place in range(rows * columns):
                x, y = left + place % columns * cell, top + LINE + place // columns * cell
                draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=(205, 205, 205))
                text = texts[down * rows * columns + place]
                write(draw, fonts, cut(text.strip() or repr(text)[1:-1], fonts, cell - 6), x + 4,
                      y + cell // 2 + 5, INK)
    return sheet


def stack(sheets: list[Image.Image]) -> Image.Image:
    """Below each other, with a margin around."""
    width = max(sheet.width for sheet in sheets) + 2 * MARGIN
    whole = Image.new("RGB", (width, sum(s.height + MARGIN for s in sheets) + MARGIN), "white")
    top = MARGIN
    for sheet in sheets:
        whole.paste(sheet, (MARGIN, top))
        top += sheet.height + MARGIN
    return whole


def save_looks(conversation, file) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    draw_looks(conversation).save(file)
