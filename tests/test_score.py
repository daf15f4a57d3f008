"""Claims: questions carry the true history, right means the same text, controls change only the
picture; the report's table, JSON and pictures say what was measured."""

import json

import pytest
import torch
from PIL import Image
from tiny import make_pair

import evaluation.report as report
import evaluation.score as score
from dataset.chat import ChatTemplate, Message
from dataset.images import ImageProcessor
from dataset.readers.formats import BadSample, Sample
from dataset.tokenizer import Tokenizer
from model.config import ProjectorConfig, VLMConfig
from model.generate import generate
from model.pretrained.load import load_language, load_vision
from model.vlm import build_model


def picture(colour="red"):
    return Image.new("RGB", (40, 30), colour)


def sample(question, answer, colour="red", where="file:1", **tags):
    return Sample((Message("user", "<image>\n" + question), Message("assistant", answer)),
                  (picture(colour),), where, tags)


def answered(answer, truth, **tags):
    question = score.Question((Message("user", "<image>\nWhat?"),), (picture(),), truth,
                              f"file:{truth}", tags)
    return score.Answered(question, answer)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    language, vision = make_pair(tmp_path_factory.mktemp("towers"))
    language_model = load_language(language)
    tower = load_vision(vision)
    template = ChatTemplate(Tokenizer.from_directory(language), image_tokens=4)
    torch.manual_seed(0)
    config = VLMConfig(language_model.config, tower.config, ProjectorConfig("mlp", 24, 32),
                       template.image_token_id)
    model = build_model(config, language_model, tower)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)  # so that the answers differ
    return model.eval(), template, ImageProcessor.from_directory(vision)


def test_every_assistant_turn_is_a_question_with_the_true_history():
    messages = (Message("system", "s"), Message("user", "<image>\n1?"), Message("assistant", "a"),
                Message("user", "<image><image>2?"), Message("assistant", "b"))
    images = ("x", "y", "z")
    first, second = score.questions_of(Sample(messages, images, "f:1", {"kind": "k"}))
    assert (first.messages, first.images, first.truth) == (messages[:2], ("x",), "a")
    assert (second.messages, second.images, second.truth) == (messages[:4], images, "b")
    assert first.tags == second.tags == {"kind": "k"}


def test_unreadable_samples_are_told_and_left_out():
    class Data(list):
        def __getitem__(self, i):
            if i == 1:
                raise BadSample("file:2", "broken")
            return super().__getitem__(i)

    data = Data([sample("a?", "a"), None, sample("c?", "c")])
    questions, bad = score.read_questions(data)
    assert [q.truth for q in questions] == ["a", "c"] and [b.where for b in bad] == ["file:2"]
    assert len(score.read_questions(data, limit=1)[0]) == 1


def test_right_is_the_same_text_but_for_space_at_the_ends():
    assert answered(" Two.\n", "Two.").right and answered("两只。", "两只。").right
    assert not answered("two.", "Two.").right and not answered("Two . ", "Two.").right
    assert not answered("", "Two.").right


def test_without_picture_only_the_picture_is_gone():
    blind, = score.without_picture(score.questions_of(sample("What?", "A cat.")))
    assert blind.messages == (Message("user", "What?"),) and blind.images == ()
    assert blind.truth == "A cat."
    text = Sample((Message("user", "hi"), Message("assistant", "ho")), (), "f:1")
    assert score.without_picture(score.questions_of(text)) == []


def test_wrong_picture_belongs_to_the_same_sort_of_question_with_another_truth():
    samples = [sample("a?", "Yes.", "red", "1", kind="exists"),
               sample("b?", "Yes.", "green", "2", kind="exists"),
               sample("c?", "One.", "blue", "3", kind="count"),
               sample("d?", "No.", "white", "4", kind="exists")]
    questions = [q for s in samples for q in score.questions_of(s)]
    wrong = {q.where: q.images[0].getpixel((0, 0)) for q in score.with_wrong_picture(questions)}
    white, red = (255, 255, 255), (255, 0, 0)
    assert wrong == {"1": white, "2": white, "4": red}  # nobody else counts: 3 is left out


def test_answers_keep_their_order_and_equal_generate(parts):
    model, template, processor = parts
    questions = [q for s in (sample("Is it a long question about colours?", "It is.", "green"),
                             sample("?", "No, not at all, never."),
                             sample("Which one?", "Red.", "blue")) for q in score.questions_of(s)]
    found, bad = score.answer_all(*parts, questions, batch_size=2)
    assert not bad and [a.question for a in found] == questions
    for a in found:
        alone = list(generate(model, template.prompt(a.question.messages),
                              score.read_pixels(a.question.images, processor), max_new_tokens=64,
                              stop_ids=template.stop_ids))
        # The batch stops a little after its longest truth; until there all is the same.
        assert a.answer in [template.tokenizer.decode(alone[:n]) for n in range(10, 64)]


def test_questions_about_one_picture_stand_together_and_read_it_once(parts, tmp_path, monkeypatch):
    model, template, processor = parts
    files = [tmp_path / f"{colour}.png" for colour in ("red", "green", "blue")]
    for file in files:
        picture(file.stem).save(file)
    questions = [score.Question((Message("user", f"<image>\n{'long ' * (n % 4)}{n}?"),),
                                (files[n % 3],), "t", f"f:{n}") for n in range(12)]
    questions.append(score.Question((Message("user", "no picture? " * 9),), (), "t", "f:12"))
    read, load = [], score.load_image
    monkeypatch.setattr(score, "load_image", lambda file, *draft: read.append(file)
                        or load(file, *draft))
    found, bad = score.answer_all(*parts, questions, batch_size=4)
    assert not bad and [a.question for a in found] == questions
    assert sorted(read) == sorted(files)
    for a in found:
        ids, pixels = template.prompt(a.question.messages), None
        if a.question.images:
            pixels = processor(load(a.question.images[0]))[None]
        alone = list(generate(model, ids, pixels, 12, template.stop_ids))
        assert template.tokenizer.decode(alone).startswith(a.answer) and a.answer


def test_questions_that_cannot_be_asked_are_told(parts, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    questions = [score.Question((Message("user", "<image>?"),), (broken,), "a", "f:1"),
                 score.Question((Message("user", "long " * 200),), (), "a", "f:2"),
                 score.Question((Message("user", "fine"),), (), "a", "f:3")]
    found, bad = score.answer_all(*parts, questions)
    assert [a.question.where for a in found] == ["f:3"]
    assert sorted((b.where, b.reason.split()[0]) for b in bad) == [
        ("f:1", "cannot"), ("f:2", "the")]


TAGGED = [answered("a", "a", kind="what", language="en"), answered("x", "b", kind="what",
                                                                   language="zh"),
          answered("c", "c", kind="count", language="en"), answered("d", "d", kind="count",
                                                                    language="en")]


def test_shares_by_hand():
    assert score.share(TAGGED) == 0.75 and score.share([]) == 0
    assert score.by_tag(TAGGED, "kind") == {"what": 0.5, "count": 1.0}
    assert score.by_tag(TAGGED, "language") == {"en": 1.0, "zh": 0.0}
    assert score.by_tag(TAGGED, "colour") == {}


def test_table_by_hand():
    rows = [line.split() for line in score.table(TAGGED).splitlines()]
    assert rows == [["question", "en", "zh", "all", "questions"],
                    ["what", "100.0%", "0.0%", "50.0%", "2"],
                    ["count", "100.0%", "-", "100.0%", "2"],
                    ["all", "100.0%", "0.0%", "75.0%", "4"]]
    plain = score.table([answered("a", "a"), answered("x", "b")])
    assert [line.split() for line in plain.splitlines()] == [["question", "all", "questions"],
                                                             ["all", "50.0%", "2"]]


def test_scores_json(tmp_path):
    report.write_scores({"sft": 0.75, "no_picture": 0.1}, TAGGED, tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text()) == {
        "sft": 0.75, "no_picture": 0.1, "by_kind": {"what": 0.5, "count": 1.0},
        "by_language": {"en": 1.0, "zh": 0.0}}


def test_contact_sheet_has_a_card_for_each_kind_and_language(tmp_path):
    cards = [answered("a cat\n", "a dog", kind=kind, language="en") for kind in "abcdefg" * 2]
    assert report.contact_sheet(cards, tmp_path / "sheet.png") is True
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width == 5 * (report.PICTURE + report.MARGIN) + report.MARGIN
    heights = sheet.height - report.MARGIN
    assert heights == 2 * (report.PICTURE + report.LINES * report.LINE_HEIGHT + report.MARGIN)
    assert sheet.getpixel((report.MARGIN + 100, report.MARGIN + 100)) == (255, 0, 0)


def test_cards_of_few_kinds_show_many_pictures():
    def asked(number, kind, seen):
        question = score.Question((Message("user", "<image>\nWhat?"),), (seen,), "a",
                                  f"file:{number}", {"kind": kind} if kind else {})
        return score.Answered(question, "a")

    # two questions about each of 30 pictures, one of either kind
    both = [asked(2 * n + i, kind, f"{n}.png") for n in range(30) for i, kind in enumerate("ab")]
    cards = report.choose_cards(both)
    pictures = [card.question.images[0] for card in cards]
    assert [card.question.tags["kind"] for card in cards] == ["a"] * 10 + ["b"] * 10
    assert pictures == [f"{n}.png" for n in range(20)]
    # no kinds at all; too few pictures for all kinds; more kinds than there is room for
    assert len(report.choose_cards([asked(n, None, f"{n}.png") for n in range(50)])) == 20
    few = report.choose_cards(both[:4])
    assert [card.question.where for card in few] == ["file:0", "file:2", "file:1", "file:3"]
    assert len(report.choose_cards([asked(n, str(n), f"{n}.png") for n in range(50)])) == 40


def test_what_no_font_here_can_write_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(report.font_manager, "findSystemFonts", lambda: [])
    odd = "\u9f98"  # a rare character, not in the embedded font
    cards = [answered(odd, odd, language="zh"), answered("A cat.", "A cat.", language="en")]
    assert report.find_fonts(odd, 16)[1] is None
    assert report.contact_sheet(cards, tmp_path / "sheet.png") is False
    width = Image.open(tmp_path / "sheet.png").width
    assert width == report.PICTURE + 2 * report.MARGIN  # one card


def test_the_embedded_font_can_write_the_emoji_world(monkeypatch):
    make_font = pytest.importorskip("extras.emoji.make_font")
    monkeypatch.setattr(report.font_manager, "findSystemFonts", lambda: [])
    assert len(make_font.characters()) > 200
    _, chinese = report.find_fonts(make_font.characters(), 16)
    assert chinese is not None, "the texts have new characters: run extras/emoji/make_font.py again"


def test_lines_are_no_wider_than_a_picture():
    fonts = report.find_fonts("\u56fe\u7247\u91cc", 16)
    for text in ("many words " * 20, "\u56fe\u7247\u91cc" * 30, "", "one"):
        lines = report.wrap(text, fonts)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        for line in lines:
            width = sum(font.getlength(part) for part, font in report.parts(line.rstrip(), fonts))
            assert width <= report.PICTURE


def test_loss_curve_of_two_stages(tmp_path):
    for name, steps in (("one", 30), ("two", 10)):
        lines = [json.dumps({"step": s + 1, "loss": 2.0 / (s + 1)}) for s in range(steps)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    report.loss_curve({"stage one": tmp_path / "one", "stage two": tmp_path / "two"},
                      tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (1200, 675)
    assert report.smooth([1.0, 3.0, 5.0], window=2) == [1.0, 2.0, 4.0]
