"""Claims: --attention draws where each word of the answer was looked for, in the right patch, with
text that can be read, and says plainly when there is nothing to draw."""

import numpy as np
import pytest
import torch
from PIL import Image

import eval as script
import train_pretrain
from extras import attention as looks
from extras import text_drawing as lettering
from tests.tiny import make_world
from training.inference import Conversation


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    flags = make_world(directory)
    for name, more in (("plain", []), ("pooled", ["--features", "pooled"])):
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
    file = tmp_path / "new" / "looks.png"
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
    first = looks.draw_looks(talk)
    ask(talk, "And now?")
    assert looks.draw_looks(talk).size != (0, 0) and first.height > 300
    assert len(talk.prompt_ids) > 20


def test_the_brightest_patch_is_the_one_that_was_looked_at(world, monkeypatch):
    """All of the attention put on one patch of the second picture: light falls there alone."""
    talk = conversation(world)
    ask(talk, "Which?", Image.new("RGB", (16, 16), "white"), Image.new("RGB", (16, 16), "white"))
    images = [i for i, token in enumerate(talk.prompt_ids)
              if token == talk.model.config.image_token_id]
    given = []

    def look(model, ids, pixels, answer):
        weights = torch.zeros(answer, len(ids))
        weights[:, images[4 + 1]] = 0.5  # second picture, upper right of 2 x 2
        return weights, [torch.zeros(len(images), dtype=torch.long)] * 2

    plain = looks.word_cells
    monkeypatch.setattr(looks, "look", look)
    monkeypatch.setattr(looks, "word_cells", lambda *a: given.append(plain(*a)) or given[-1])
    looks.draw_looks(talk)
    cell = np.asarray(given[0])[:looks.SIDE, :2 * looks.SIDE, 0].astype(int)
    half = looks.SIDE // 2
    bright = [cell[top:top + half - 4, left:left + half - 4].mean() for top in (2, half + 2)
              for left in (2, half + 2, looks.SIDE + 2, looks.SIDE + half + 2)]
    assert [value > 200 for value in bright] == [False, False, False, True, *[False] * 4], bright
    assert max(value for value in bright if value < 200) < 90


def test_the_picture_is_what_the_tower_saw(world):
    """Cropped and resized as the processor does, and back to colours."""
    talk = conversation(world)
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    seen = looks.seen_picture(talk.processor(image), talk.processor, talk.model, (2, 2))
    assert np.abs(np.asarray(seen).astype(int) - np.asarray(image)).max() <= 1


def test_nothing_to_draw_is_said(world):
    talk = conversation(world)
    ask(talk, "Hello")
    with pytest.raises(ValueError, match="no picture in the conversation"):
        looks.draw_looks(talk)
    talk = conversation(world, "pooled")
    ask(talk, "Which?", world / "red.png")
    with pytest.raises(ValueError, match="--features pooled, one token for a whole picture"):
        looks.draw_looks(talk)
    talk = conversation(world)
    ask(talk, "Which?", world / "red.png")
    talk.answer_ids = []
    with pytest.raises(ValueError, match="no word in the answer"):
        looks.draw_looks(talk)


def test_text_can_be_read_in_every_script(monkeypatch):
    """The emoji world's Chinese with the font in the repository; what no font here has, as its
    number, and never as a box."""
    monkeypatch.setattr("evaluation.report.font_manager.findSystemFonts", lambda: [])
    fonts = lettering.fonts_for(["An owl: 一只猫头鹰。"])
    assert lettering.legible("An owl: 一只猫头鹰。", fonts) == "An owl: 一只猫头鹰。"
    fonts = lettering.fonts_for(["猫 齉"])
    assert lettering.legible("猫 齉", fonts) == "猫 U+9F49 "
    assert lettering.legible("\U000f0000", fonts) == "U+F0000 "
    assert lettering.width_of(lettering.cut("a very long word " * 9, fonts, 50), fonts) <= 50
    assert all(lettering.width_of(line.rstrip(), fonts) <= 1080
               for line in lettering.fold("words and 猫猫猫 " * 40, fonts, 1080))


def test_many_words_are_cut_and_counted(world):
    found = [(f"w{i}", [0]) for i in range(looks.MOST_WORDS + 3)]
    fonts = lettering.fonts_for(["x"])
    picture = Image.new("RGB", (16, 16))
    sheet = looks.word_cells(found, np.ones((1, 1, 2, 2)), [picture], fonts)
    rows = looks.MOST_WORDS // looks.COLUMNS
    assert sheet.height == rows * (looks.SIDE + 2 * lettering.LINE) + lettering.LINE
