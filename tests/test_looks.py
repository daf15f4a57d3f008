"""Claims: --attention draws where each word of the answer was looked for, in the right patch, with
text that can be read, and says plainly when there is nothing to draw."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import eval as script
import train_pretrain
from extras import attention, text_drawing
from tests.tiny import make_world
from training.inference import Conversation


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    flags = make_world(directory)
    for name, more in (("plain", []), ("pooled", ["--vision_feature_select", "pooled"])):
        train_pretrain.main([*flags, "--steps", "1", *more, "--out", str(directory / name)])
    return directory


def conversation(world, name="plain"):
    flags = script.read_flags(["--device", "cpu"])
    talk = Conversation(*script.load_model(flags, str(world / name)), {"max_new_tokens": 7})
    torch.manual_seed(0)
    for parameter in talk.model.parameters():  # so that it talks and does not stop
        parameter.data.normal_(std=0.3)
    return talk


def ask(talk, text, *pictures):
    for picture in pictures:
        talk.show(picture)
    return "".join(talk.reply(text))


def test_one_command_answers_and_draws(world, tmp_path, capsys):
    file = tmp_path / "new" / "attention.png"
    flags = ["--model", str(world / "plain"), "--image", str(world / "red.png"), "--prompt",
             "Which colour?", "--max_new_tokens", "6", "--device", "cpu"]
    script.main(flags)
    answer = capsys.readouterr().out
    script.main([*flags, "--attention", str(file)])
    assert capsys.readouterr().out == answer, "the answer and nothing else"
    assert Image.open(file).width > 800
    with pytest.raises(SystemExit):
        script.read_flags(["--attention", "x.png", "--prompt", "hi"])


def test_two_pictures_and_a_second_turn(world):
    talk = conversation(world)
    ask(talk, "Which?", world / "red.png", world / "blue.png")
    first = attention.draw_attention(talk)
    ask(talk, "And now?")
    assert len(talk.prompt_ids) > 20 and attention.draw_attention(talk)
    assert drawn_texts(first)[0].startswith("asked: Which? answered: ")
    assert len([axes for axes in first.axes if axes.images and "%" not in axes.get_title()]) == 4


def drawn_texts(figure) -> list[str]:
    """What stands above the words and above the logit lens."""
    return [" ".join(part.get_suptitle().split()) for part in figure.subfigs]


def test_the_brightest_patch_is_the_one_that_was_looked_at(world, monkeypatch):
    """All of the attention put on one patch of the second picture: light falls there alone."""
    talk = conversation(world)
    ask(talk, "Which?", Image.new("RGB", (16, 16), "white"), Image.new("RGB", (16, 16), "white"))
    images = [i for i, token in enumerate(talk.prompt_ids)
              if token == talk.model.config.image_token_id]

    def maps(model, ids, pixels, answer):
        weights = torch.zeros(answer, len(ids))
        weights[:, images[4 + 1]] = 0.5  # second picture, upper right of 2 x 2
        return weights, [torch.zeros(len(images), dtype=torch.long)] * 2

    monkeypatch.setattr(attention, "attention_maps", maps)
    strip = attention.draw_attention(talk).axes[0].images[0].get_array()  # of the first word
    cell, half = 255 * np.asarray(strip)[..., 0], 8
    bright = [cell[top:top + half, left:left + half].mean() for top in (0, half)
              for left in (0, half, 2 * half, 3 * half)]
    assert [value > 200 for value in bright] == [False, False, False, True, *[False] * 4], bright
    assert max(value for value in bright if value < 200) < 90


def test_the_picture_is_what_the_tower_saw(world):
    """Cropped and resized as the processor does, and back to colours."""
    talk = conversation(world)
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    seen = attention.input_image(talk.processor(image), talk.processor, side=8)
    assert np.abs(255 * seen - np.asarray(image)).max() <= 1
    cropped = attention.input_image(torch.zeros(3, 20, 30), talk.processor, side=8)
    assert cropped.shape == (16, 24, 3), "the remainder belongs to no patch"


def test_nothing_to_draw_is_said(world):
    talk = conversation(world)
    ask(talk, "Hello")
    with pytest.raises(ValueError, match="no image in the conversation"):
        attention.draw_attention(talk)
    talk = conversation(world, "pooled")
    ask(talk, "Which?", world / "red.png")
    with pytest.raises(ValueError,
                       match="--vision_feature_select pooled, one token for a whole image"):
        attention.draw_attention(talk)
    talk = conversation(world)
    ask(talk, "Which?", world / "red.png")
    talk.answer_ids = []
    with pytest.raises(ValueError, match="no word in the answer"):
        attention.draw_attention(talk)


@pytest.fixture
def no_other_fonts(monkeypatch):
    """For Chinese there is only the font in the repository."""
    from matplotlib import font_manager as fm

    monkeypatch.setattr(fm.fontManager, "ttflist", [font for font in fm.fontManager.ttflist
                                                    if font.name.startswith("DejaVu")])
    text_drawing.fonts.cache_clear()
    yield
    text_drawing.fonts.cache_clear()


def test_text_can_be_read_in_every_script(no_other_fonts):
    """The emoji world's Chinese; what no font here has, as its number, and never as a box."""
    assert text_drawing.legible("An owl: 一只猫头鹰。") == "An owl: 一只猫头鹰。"
    assert text_drawing.legible("猫 齉") == "猫 U+9F49 "
    assert text_drawing.legible("\U000f0000") == "U+F0000 "
    assert text_drawing.legible(" \n") == " \\n", "a token that is only a line break is seen too"


@pytest.mark.filterwarnings("error")  # matplotlib warns of each glyph that is missing
@pytest.mark.parametrize("text", ["a very long word " * 9, "WWWWMMMM" * 9, "words and 猫猫猫 " * 40,
                                  "一只猫头鹰。" * 9, "$x_1$ 100 $", "齉" * 20, "🦉🦉 ok"])
def test_lines_are_no_wider_than_asked_for(no_other_fonts, text):
    figure = Figure(dpi=100)
    for width in (0.6, 2.0, 10.8):
        for line in text_drawing.fold(text, width):
            drawn = figure.text(0, 0, line, **text_drawing.style())
            assert drawn.get_window_extent().width <= 100 * width, (line, width)
    figure.savefig(io.BytesIO())


def test_what_cannot_be_written_is_said_in_the_drawing(world):
    talk = conversation(world)
    ask(talk, "齉 \U000f0000 or $x_1$?", world / "red.png")
    talk.template.tokenizer.decode = lambda ids: "\U000f0001" * len(ids)
    head, _ = drawn_texts(attention.draw_attention(talk))
    assert "U+F0000 or $x_1$?" in head and "answered: U+F0001" in head


def test_a_long_answer_leaves_the_images_their_size(world):
    talk = conversation(world)
    ask(talk, "Which?", world / "red.png")
    talk.messages[-2] = replace(talk.messages[-2], content="Which? " * 400)
    figure = attention.draw_attention(talk)
    assert figure.subfigs[0].get_suptitle().count("\n") > 15
    figure.savefig(io.BytesIO(), dpi=100)
    sizes = [axes.get_window_extent().height for part in figure.subfigs for axes in part.axes]
    assert min(sizes) > 100 * 0.8 * attention.SIDE, sizes


def test_many_words_are_cut_and_counted(world, monkeypatch):
    talk = conversation(world)
    ask(talk, "Which?", world / "red.png")
    monkeypatch.setattr(attention, "words", lambda tokenizer, ids: [
        (f"w{i}", [0]) for i in range(attention.MOST_WORDS + 3)])
    figure = attention.draw_attention(talk)
    assert "and 3 more words, not drawn" in drawn_texts(figure)[0]
    titles = [axes.get_title() for axes in figure.subfigs[0].axes]
    assert [title.split()[0] for title in titles] == [
        f"w{i}" for i in range(attention.MOST_WORDS)] and all("%" in title for title in titles)
