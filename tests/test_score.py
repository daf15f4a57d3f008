"""Claims: questions carry the true history, right means the same text, controls change only the
picture; the report's table, JSON and pictures say what was measured."""

import json

import pytest
import torch
from PIL import Image
from tiny import make_pair

from dataset.chat import ChatTemplate, Message
from dataset.images import ImageProcessor
from dataset.readers.formats import BadSample, Sample
from dataset.tokenizer import Tokenizer
from evaluation import report, score, summary
from evaluation.eval_samples import Question, questions_of, read_questions
from extras import text_drawing
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
    question = Question((Message("user", "<image>\nWhat?"),), (picture(),), truth,
                              f"file:{truth}", tags)
    return score.Prediction(question, answer)


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
    first, second = questions_of(Sample(messages, images, "f:1", {"kind": "k"}))
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
    questions, bad = read_questions(data)
    assert [q.truth for q in questions] == ["a", "c"] and [b.where for b in bad] == ["file:2"]
    assert len(read_questions(data, limit=1)[0]) == 1


def test_right_is_the_same_text_but_for_space_at_the_ends():
    assert answered(" Two.\n", "Two.").correct and answered("两只。", "两只。").correct
    assert not answered("two.", "Two.").correct and not answered("Two . ", "Two.").correct
    assert not answered("", "Two.").correct


def test_without_picture_only_the_picture_is_gone():
    blind, = score.without_images(questions_of(sample("What?", "A cat.")))
    assert blind.messages == (Message("user", "What?"),) and blind.images == ()
    assert blind.truth == "A cat."
    text = Sample((Message("user", "hi"), Message("assistant", "ho")), (), "f:1")
    assert score.without_images(questions_of(text)) == []


def test_wrong_picture_belongs_to_the_same_sort_of_question_with_another_truth():
    samples = [sample("a?", "Yes.", "red", "1", kind="exists"),
               sample("b?", "Yes.", "green", "2", kind="exists"),
               sample("c?", "One.", "blue", "3", kind="count"),
               sample("d?", "No.", "white", "4", kind="exists")]
    questions = [q for s in samples for q in questions_of(s)]
    wrong = {q.where: q.images[0].getpixel((0, 0)) for q in score.with_shuffled_images(questions)}
    white, red = (255, 255, 255), (255, 0, 0)
    assert wrong == {"1": white, "2": white, "4": red}  # nobody else counts: 3 is left out


@pytest.mark.parametrize("share", [0.5, 0.05, 1.0])
def test_shuffling_many_images_takes_no_long_walks(share, monkeypatch):
    """Sorted by their truths, each question would pass by half of the others to find its images."""
    count, compared = 2000, []
    questions = [Question((Message("user", "<image>"),), (f"{i}.png",),
                          "yes" if i < share * count else "no", f"f:{i}") for i in range(count)]
    plain = score.ShuffledImages

    def counted(data, may_lend):
        return plain(data, lambda *pair: compared.append(1) or may_lend(*pair))

    monkeypatch.setattr(score, "ShuffledImages", counted)
    shuffled = score.with_shuffled_images(questions)
    assert len(compared) < 30 * count
    assert [q.where for q in shuffled] == ([] if share == 1 else [q.where for q in questions])
    truths = {q.images: q.truth for q in questions}
    assert all(truths[q.images] != q.truth for q in shuffled)


def test_answers_keep_their_order_and_equal_generate(parts):
    model, template, processor = parts
    questions = [q for s in (sample("Is it a long question about colours?", "It is.", "green"),
                             sample("?", "No, not at all, never."),
                             sample("Which one?", "Red.", "blue")) for q in questions_of(s)]
    found, bad = score.Predictor(*parts, batch_size=2).predict(questions)
    assert not bad and [a.question for a in found] == questions
    for a in found:
        alone = list(generate(model, template.encode_prompt(a.question.messages),
                              processor.read(a.question.images[0])[None], max_new_tokens=64,
                              stop_ids=template.stop_ids))
        # The batch stops a little after its longest truth; until there all is the same.
        assert a.answer in [template.tokenizer.decode(alone[:n]) for n in range(10, 64)]


def test_questions_about_one_picture_stand_together_and_read_it_once(parts, tmp_path, monkeypatch):
    model, template, processor = parts
    files = [tmp_path / f"{colour}.png" for colour in ("red", "green", "blue")]
    for file in files:
        picture(file.stem).save(file)
    questions = [Question((Message("user", f"<image>\n{'long ' * (n % 4)}{n}?"),),
                                (files[n % 3],), "t", f"f:{n}") for n in range(12)]
    questions.append(Question((Message("user", "no image? " * 9),), (), "t", "f:12"))
    files_read, read = [], ImageProcessor.read
    monkeypatch.setattr(ImageProcessor, "read", lambda self, file: files_read.append(file)
                        or read(self, file))
    found, bad = score.Predictor(*parts, batch_size=4).predict(questions)
    assert not bad and [a.question for a in found] == questions
    assert sorted(files_read) == sorted(files)
    for a in found:
        ids, pixels = template.encode_prompt(a.question.messages), None
        if a.question.images:
            pixels = read(processor, a.question.images[0])[None]
        alone = list(generate(model, ids, pixels, max_new_tokens=12,
                                   stop_ids=template.stop_ids))
        assert template.tokenizer.decode(alone).startswith(a.answer) and a.answer


def test_questions_that_cannot_be_asked_are_told(parts, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    questions = [Question((Message("user", "<image>?"),), (broken,), "a", "f:1"),
                 Question((Message("user", "long " * 200),), (), "a", "f:2"),
                 Question((Message("user", "fine"),), (), "a", "f:3")]
    found, bad = score.Predictor(*parts).predict(questions)
    assert [a.question.where for a in found] == ["f:3"]
    assert sorted((b.where, b.reason.split()[0]) for b in bad) == [
        ("f:1", "cannot"), ("f:2", "the")]


TAGGED = [answered("a", "a", kind="what", language="en"), answered("x", "b", kind="what",
                                                                   language="zh"),
          answered("c", "c", kind="count", language="en"), answered("d", "d", kind="count",
                                                                    language="en")]


def test_shares_by_hand():
    assert summary.accuracy(TAGGED) == 0.75 and summary.accuracy([]) == 0
    assert summary.by_tag(TAGGED, "kind") == {"what": 0.5, "count": 1.0}
    assert summary.by_tag(TAGGED, "language") == {"en": 1.0, "zh": 0.0}
    assert summary.by_tag(TAGGED, "colour") == {}


def test_table_by_hand():
    rows = [line.split() for line in summary.table(TAGGED).splitlines()]
    assert rows == [["question", "en", "zh", "all", "questions"],
                    ["what", "100.0%", "0.0%", "50.0%", "2"],
                    ["count", "100.0%", "-", "100.0%", "2"],
                    ["all", "100.0%", "0.0%", "75.0%", "4"]]
    plain = summary.table([answered("a", "a"), answered("x", "b")])
    assert [line.split() for line in plain.splitlines()] == [["question", "all", "questions"],
                                                             ["all", "50.0%", "2"]]


def test_contact_sheet_has_a_card_for_each_kind_and_language(tmp_path):
    cards = [answered("a cat\n", "a dog", kind=kind, language="en") for kind in "abcdefg" * 2]
    report.contact_sheet(cards, tmp_path / "sheet.png")
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width == 5 * (report.SIDE + report.MARGIN) + report.MARGIN
    heights = sheet.height - report.MARGIN
    assert heights == 2 * (report.SIDE + report.LINES * report.LINE_HEIGHT + report.MARGIN)
    assert sheet.convert("RGB").getpixel((report.MARGIN + 100, report.MARGIN + 100)) == (255, 0, 0)


def test_cards_of_few_kinds_show_many_pictures():
    def asked(number, kind, seen):
        question = Question((Message("user", "<image>\nWhat?"),), (seen,), "a",
                                  f"file:{number}", {"kind": kind} if kind else {})
        return score.Prediction(question, "a")

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


@pytest.mark.parametrize(("count", "wrong", "kinds", "expected"), [
    (60, [59], "ab", 1), (60, range(30, 60), "ab", 10), (60, range(60), "ab", 20),
    (60, [], "ab", 0), (60, [1], "ab", 1), (90, [89], "abcdefghijklmnopqrstuvwxyz", 1),
    (3, [2], "a", 1)])
def test_wrong_answers_have_their_share_of_the_cards(count, wrong, kinds, expected):
    """However late they come: a sheet of the first answers alone could show none of them."""
    predictions = [score.Prediction(
        Question((Message("user", "<image>\nWhat?"),), (f"{n}.png",), "a", f"file:{n}",
                 {"kind": kinds[n % len(kinds)]}), "b" if n in wrong else "a")
        for n in range(count)]
    cards = report.choose_cards(predictions)
    assert len({card.question.where for card in cards}) == len(cards)
    assert sum(not card.correct for card in cards) == expected
    assert len(cards) == min(count, len(kinds) * max(1, 20 // len(kinds)))
    if kinds == "ab":  # a wrong answer stands among those of its own kind
        assert [card.question.tags["kind"] for card in cards] == ["a"] * 10 + ["b"] * 10


def test_a_wrong_answer_is_marked_and_the_truth_stands_below_it():
    right, wrong = (report.card_texts(answered(said, "a dog")) for said in ("a dog", "a cat"))
    assert right[1:] == [("\u2713 a dog", report.GREEN)]
    assert wrong[1:] == [("\u2717 a cat", report.RED), ("truth: a dog", report.INK)]


@pytest.fixture
def no_other_fonts(monkeypatch):
    """For Chinese there is only the font in the repository."""
    manager = text_drawing.font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [font for font in manager.ttflist
                                             if font.name.startswith("DejaVu")])
    text_drawing.fonts.cache_clear()
    yield
    text_drawing.fonts.cache_clear()


@pytest.mark.filterwarnings("error")  # matplotlib warns of each glyph that is missing
def test_what_no_font_here_can_write_stands_as_its_number(no_other_fonts, tmp_path, monkeypatch):
    written, odd = [], "\u9f98"  # a rare character, not in the embedded font
    text = report.Figure.text
    monkeypatch.setattr(report.Figure, "text", lambda *args, **more: written.append(args[3])
                        or text(*args, **more))
    cards = [answered(odd, odd, language="zh"), answered("A cat.", "A cat.", language="en")]
    report.contact_sheet(cards, tmp_path / "sheet.png")
    assert "\u2713 U+9F98" in written and "\u2713 A cat." in written
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 2 * (report.SIDE + report.MARGIN) + report.MARGIN


def test_the_embedded_font_can_write_the_emoji_world(no_other_fonts):
    make_font = pytest.importorskip("extras.emoji.make_font")
    assert len(make_font.characters()) > 200
    assert {*map(ord, make_font.characters())} <= text_drawing.fonts()[1], (
        "the texts have new characters: run extras/emoji/make_font.py again")


def test_loss_curve_of_two_stages(tmp_path):
    for name, steps in (("one", 30), ("two", 10)):
        lines = [json.dumps({"step": s + 1, "loss": 2.0 / (s + 1)}) for s in range(steps)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    report.loss_curve({"stage one": tmp_path / "one", "stage two": tmp_path / "two"},
                      tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (1200, 675)
