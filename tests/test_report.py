"""Claims: every run ends in a page that stands alone and tells what happened, however it ended;
asking the model along the way changes no bit of the training; nothing that fails while drawing or
asking loses a run; several runs stand in one page; a reference curve stands behind a run's own."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import train_pretrain
import train_sft
from extras import compare, past, report
from extras.charts import (
    Curve,
    chart,
    even_ticks,
    last_mean,
    log_ticks,
    short,
    smooth,
    thin,
)
from extras.past import keep_reference, read_past, reference_of
from extras.sample_generations import Answers
from tests.test_record import fail
from tests.test_resume import Killed, die_in_step, same_weights
from tests.tiny import ROOT, curve, make_data, make_world, metrics
from training.steps import Steps


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    return ["--eval_data", make_data(tmp_path_factory.mktemp("unseen"), count=10), "--eval_every",
            "2"]


@pytest.fixture(scope="module")
def run(world, unseen, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    train_pretrain.main([*world, *unseen, "--eval_answers", "3", "--out", str(out)])
    return out


def answers(out) -> list[dict]:
    text = (Path(out) / "answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


class Page(HTMLParser):
    """What a page shows, what it would fetch, and whether every element is closed."""

    def __init__(self, file):
        super().__init__()
        self.words, self.fetched, self.open, self.charts = [], [], [], 0
        self.feed(Path(file).read_text(encoding="utf-8"))
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.charts += tag == "svg"
        assert tag not in ("script", "iframe", "link", "object"), tag
        self.fetched += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        assert tag in ("path", "circle")

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


# ---------------------------------------------------------------- answers through time


def test_asking_changes_no_bit_of_the_training(world, unseen, tmp_path):
    """With dropout, which draws random numbers in every step."""
    flags = [*world, *unseen, "--model", "none", "--lora", "--lora_dropout", "0.3"]
    for number in ("0", "4"):
        train_sft.main([*flags, "--eval_answers", number, "--out", str(tmp_path / number)])
    assert curve(tmp_path / "0") == curve(tmp_path / "4")
    assert same_weights(tmp_path / "0", tmp_path / "4")
    assert (tmp_path / "0" / "evaluations.jsonl").read_bytes() == (
        tmp_path / "4" / "evaluations.jsonl").read_bytes()
    assert not (tmp_path / "0" / "answers.jsonl").exists()
    assert [line["step"] for line in answers(tmp_path / "4")] == [2, 4, 6]
    assert {len(line["answers"]) for line in answers(tmp_path / "4")} == {4}


def test_the_answers_are_those_that_the_checkpoint_gives(run, unseen):
    """Those of the last step, against eval.py's own conversation with the last checkpoint."""
    import eval as script
    from training.inference import Conversation

    flags = script.read_flags(["--device", "cpu"])
    model, template, processor = script.load_model(flags, str(run))
    pictures = [line["image"] for line in map(json.loads, Path(unseen[1]).read_text().splitlines())
                if "image" in line]
    for asked, picture in zip(answers(run)[-1]["answers"], pictures):
        talk = Conversation(model, template, processor, {"max_new_tokens": 64})
        talk.show(Path(unseen[1]).parent / picture)
        assert asked["answer"] == "".join(talk.reply(asked["question"]))
        assert asked["question"] == "Which colour?" and "It is" in asked["truth"]
        assert (run / asked["picture"]).is_file()


def test_a_killed_run_has_each_answer_once(world, unseen, tmp_path, monkeypatch, run):
    flags = [*world, *unseen, "--eval_answers", "3", "--out", str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, 5)  # asked at 2 and 4, saved at 3
        train_pretrain.main(flags)
    train_pretrain.main(["--resume", "--out", str(tmp_path)])
    assert answers(tmp_path) == answers(run)


def test_what_fails_while_asking_or_drawing_is_told_and_loses_nothing(
        world, unseen, tmp_path, monkeypatch, capsys, run):
    monkeypatch.setattr("extras.sample_generations.generate_batch", fail)
    monkeypatch.setattr(report, "write_report", fail)
    train_pretrain.main([*world, *unseen, "--eval_answers", "3", "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert "no answers to held-out questions: OSError: no space left" in told
    assert "no report.html: OSError: no space left; python -m extras.report" in told
    assert curve(tmp_path) == curve(run) and same_weights(tmp_path, run)
    monkeypatch.undo()
    report.main([str(tmp_path)])
    assert "no answers at step 2: OSError: no space left" in Page(tmp_path / "report.html").text


def test_only_questions_with_a_usable_picture_are_asked(run, unseen, world, tmp_path):
    """The first line has no picture; a broken one and one whose picture is lost are passed over."""
    lines = Path(unseen[1]).read_text().splitlines()
    lines = [lines[0], "{broken", lines[1].replace("green.png", "lost.png"), *lines[2:]]
    file = Path(unseen[1]).with_name("holes.jsonl")
    file.write_text("\n".join(lines))
    train_pretrain.main([*world, "--eval_data", str(file), "--eval_every", "6", "--eval_answers",
                         "2", "--max_bad", "1", "--out", str(tmp_path)])
    asked = answers(tmp_path)[-1]["answers"]
    assert [a["where"].rpartition(":")[2] for a in asked] == ["4", "6"]
    assert Answers.__doc__ and json.loads((tmp_path / "evaluations.jsonl").read_text())["skipped"]


# ---------------------------------------------------------------- the page


def test_the_page_tells_what_happened_and_needs_nothing_else(run):
    shown = Page(run / "report.html")
    summary = json.loads((run / "summary.json").read_text())
    last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert shown.charts == 4 and len(shown.fetched) == 3
    assert all(place.startswith("data:image/jpeg;base64,") for place in shown.fetched)
    content = (run / "report.html").read_text()
    assert not re.search(r"https?:|url\(|@import", content)
    for words in ("finished", f"{last['eval_loss']:.4g}",
                  f"{last['eval_loss_wrong_picture']:.4g}", f"{summary['tokens']:,}",
                  "learning_rate: 0.0", "Which colour?", answers(run)[-1]["answers"][0]["truth"]):
        assert words in shown.text, words
    assert len(content) < 200_000


def test_text_from_data_is_no_markup(run, tmp_path):
    for name in ("run.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    evil = "<script>alert(1)</script><img src=//evil>"
    line = {"step": 2, "answers": [{"where": "x", "picture": "held_out/1.jpg", "question": evil,
                                    "truth": evil, "answer": evil}]}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(
        {"step": 4, "problem": evil, "answers": []}) + '\n{"step": 6, "ans')
    (tmp_path / "scores.json").write_text(json.dumps({evil: 0.5, "by_kind": {evil: 1.0}}))
    shown = Page(report.write_report(tmp_path))  # raises at the first <script>
    assert shown.text.count(evil) >= 6 and shown.fetched == []
    assert "the picture is not there any more" in shown.text
    assert "unknown: summary.json is written when a run ends" in shown.text


@pytest.mark.parametrize("ended, words", [("failed", "OSError: no space left"),
                                          ("stopped", "stopped before step 6")])
def test_a_run_that_stops_early_has_its_page_too(world, tmp_path, monkeypatch, ended, words):
    if ended == "failed":
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr("train_pretrain.train", fail)
            train_pretrain.main([*world, "--out", str(tmp_path)])
    else:
        plain = Steps.next_batches
        monkeypatch.setattr(Steps, "next_batches", lambda self, stream, number: (
            signal_once(self.state), plain(self, stream, number))[1])
        train_pretrain.main([*world, "--out", str(tmp_path)])
        assert len(metrics(tmp_path)) == 2
        assert "samples trained on 4" in Page(tmp_path / "report.html").text
    assert words in Page(tmp_path / "report.html").text


def signal_once(progress) -> None:
    import os
    import signal

    if progress.step == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def test_an_earlier_runs_page_is_moved_aside(world, unseen, tmp_path):
    for steps in ("2", "4"):
        train_pretrain.main([*world, *unseen, "--steps", steps, "--out", str(tmp_path)])
    for name in ("report.html", "answers.jsonl", "held_out"):
        assert (tmp_path / name).exists() and (tmp_path / "earlier_1" / name).exists()


def test_scores_are_kept_with_the_run(run, tmp_path):
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({
        "sft": 0.9375, "pretrain": 0.5, "by_kind": {"count": 0.5},
        "details": {"figures": {"sft": {"exact": {"value": 0.9375, "low": 0.91, "high": 0.96}}}}}))
    report.main([str(run), "--scores", str(file)])
    report.main([str(run)])
    shown = Page(run / "report.html").text
    assert "0.9375" in shown and "by_kind" in shown
    assert "0.9100 to 0.9600" in shown and "details" not in shown
    with pytest.raises(SystemExit, match="holds neither metrics.jsonl nor run.json"):
        report.main([str(tmp_path / "nothing")])


# ---------------------------------------------------------------- references and comparisons


def test_the_reference_of_the_recipe_is_drawn_behind(run, tmp_path, monkeypatch):
    monkeypatch.setattr(past, "REFERENCES", tmp_path)
    assert reference_of(read_past(run)) is None
    file = keep_reference(read_past(run))
    assert file.name == "emoji_pretrain.jsonl"
    about, points = reference_of(read_past(run))
    assert about["steps"] == 6 and points[0]["step"] == 3.5
    assert "/" not in about["settings"]["data"], "the name of the file; where it lay is nobody's"
    assert points[0]["loss"] == pytest.approx(sum(m["loss"] for m in metrics(run)) / 6, abs=1e-4)
    shown = Page(report.write_report(run)).text
    assert "reference run" in shown and f"had {points[0]['loss']:.3f} there" in shown
    assert "This run differs" not in shown
    several = past.PastRun(run, run={"settings": {"data": ["a/b", "c/d"]}})
    assert past.compared(several) == {"data": "b d"}
    about["settings"]["batch_size"] = 77
    file.write_text("\n".join(map(json.dumps, [about, *points])))
    assert "batch_size 2 instead of 77" in Page(report.write_report(run)).text
    for name, rate in (("another", 0.3), ("like_it", about["settings"]["learning_rate"])):
        about["settings"].update(batch_size=2, learning_rate=rate)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, [about, *points[:1]])))
    assert reference_of(read_past(run)) == (about, points[:1]), "the most alike of three"


def test_the_documented_recipes_have_references():
    """Made from whole runs of the very settings that the presets have."""
    from training.presets import settings_of_preset

    for stage in ("pretrain", "sft"):
        lines = (ROOT / "docs" / "reference" / f"emoji_{stage}.jsonl").read_text().splitlines()
        about, *points = map(json.loads, lines)
        expected = settings_of_preset("emoji", stage)
        assert about["steps"] == expected["steps"] and len(points) == expected["steps"] / 10
        for name in ("batch_size", "learning_rate", "warmup_ratio", "projector"):
            assert about["settings"][name] == expected[name], name
        # Five points with five: stage two begins where stage one ended, and first gets worse.
        assert sum(p["loss"] for p in points[-5:]) < sum(p["loss"] for p in points[:5]) / 2


def test_several_runs_in_one_page(run, world, tmp_path):
    other = tmp_path / "second"
    train_pretrain.main([*world, "--learning_rate", "0.02", "--out", str(other)])
    compare.main([str(run), str(other), "--out", str(tmp_path / "both.html")])
    shown = Page(tmp_path / "both.html")
    assert shown.charts == 5 and shown.fetched == []
    compare.main([str(other), "--out", str(tmp_path / "one.html")])
    assert Page(tmp_path / "one.html").charts == 3, "nothing was held out"
    for words in ("first", "second", "learning_rate 0.01 0.02", "eval_every 2 0"):
        assert words in shown.text, words
    assert "batch_size" not in shown.text, "the same in both"
    with pytest.raises(SystemExit, match="holds neither"):
        compare.main([str(tmp_path / "none")])


def test_names_tell_runs_apart(run, tmp_path):
    def name(*paths):
        return compare.names_of([past.PastRun(tmp_path / path) for path in paths])

    assert name("a/sft", "b/sft") == ["a/sft", "b/sft"]
    assert name("sft", "pretrain") == ["sft", "pretrain"] and name("a/sft") == ["sft"]
    assert name("a", "a") == ["a (1)", "a (2)"] and name("a", "a/b") == ["a", "a/b"]


# ---------------------------------------------------------------- charts


def test_a_chart_puts_numbers_where_they_belong():
    drawn = chart("loss", [Curve("run", [0, 50, 100], [10, 1, 0.1], "red")], log=True)
    (x0, y0), (x1, y1), (x2, y2) = points_of(drawn)
    assert x1 - x0 == pytest.approx(x2 - x1) and y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert y0 < y1 < y2, "larger is higher on the page"


def points_of(drawn: str) -> list[tuple]:
    path = re.search(r'<path fill="none"[^>]* d="([^"]*)"', drawn)[1]
    return [tuple(map(float, point.split())) for point in re.split("[ML]", path)[1:]]


def test_missing_numbers_leave_gaps_and_none_at_all_is_said():
    drawn = chart("x", [Curve("", [1, 2, 3, 4], [1.0, None, float("nan"), 2.0], "red")])
    assert re.search(r'd="M[^"L]*M[^"L]*"', drawn) and "nan" not in drawn
    assert "not measured" in chart("x", [Curve("", [1], [None], "red")])
    assert "not measured" in chart("x", [])


def test_ticks_and_long_runs():
    assert even_ticks(0, 100) == [0, 20, 40, 60, 80, 100] and even_ticks(3, 3)
    assert log_ticks(0.3, 4) == pytest.approx([0.5, 1, 2])
    assert log_ticks(0.0002, 30) == pytest.approx([1e-3, 1e-2, 0.1, 1, 10])
    assert log_ticks(0.6, 0.7) == [0.6, 0.7] and log_ticks(3, 3) == [3, 3]
    assert smooth([0, 3, 6, 9], 1) == [1.5, 3, 6, 7.5] and smooth([]) == []
    assert last_mean([1, 2, 4], 2) == 3 and last_mean([]) is None
    assert [short(n) for n in (0, 600, 1500, 2e6, 0.25, 2.5e-4)] == [
        "0", "600", "1.5k", "2M", "0.25", "2.5e-4"]
    xs, ys = thin(list(range(1_000_000)), [1.0] * 1_000_000)
    assert len(xs) <= 400 and ys == [1.0] * len(xs) and xs[0] > 0
