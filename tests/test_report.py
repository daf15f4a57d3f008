"""Claims: every run ends in a page that stands alone and tells what happened, however it ended;
asking the model along the way changes no bit of the training; nothing that fails while drawing or
asking loses a run; several runs stand in one page; a reference curve stands behind a run's own."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import train_pretrain
import train_sft
from extras import report, runs
from extras.runs import RunRecord, keep_reference, read_run, reference_of
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
    return ["--eval_data", make_data(tmp_path_factory.mktemp("unseen"), count=10), "--eval_steps",
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
    """What a page shows, its images, and whether every element is closed."""

    def __init__(self, file):
        super().__init__()
        self.words, self.images, self.open = [], [], []
        self.feed(Path(file).read_text(encoding="utf-8"))
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "iframe", "link", "object", "svg"), tag
        self.images += [value for name, value in attributes if name in ("src", "href", "action")]
        assert all(address.startswith("data:image/") for address in self.images)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

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
        assert (run / asked["image"]).is_file()


def test_a_killed_run_has_each_answer_once(world, unseen, tmp_path, monkeypatch, run):
    flags = [*world, *unseen, "--eval_answers", "3", "--out", str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, 5)  # asked at 2 and 4, saved at 3
        train_pretrain.main(flags)
    train_pretrain.main(["--resume", "--out", str(tmp_path)])
    assert answers(tmp_path) == answers(run)


def test_what_fails_while_asking_or_drawing_is_told_and_loses_nothing(
        world, unseen, tmp_path, monkeypatch, capsys, run):
    monkeypatch.setattr("extras.sample_generations.Predictor.predict", fail)
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
    """The first line has no image; a broken one and one whose picture is lost are passed over."""
    lines = Path(unseen[1]).read_text().splitlines()
    lines = [lines[0], "{broken", lines[1].replace("green.png", "lost.png"), *lines[2:]]
    file = Path(unseen[1]).with_name("holes.jsonl")
    file.write_text("\n".join(lines))
    train_pretrain.main([*world, "--eval_data", str(file), "--eval_steps", "6", "--eval_answers",
                         "2", "--max_skip_ratio", "1", "--out", str(tmp_path)])
    asked = answers(tmp_path)[-1]["answers"]
    assert [a["where"].rpartition(":")[2] for a in asked] == ["4", "6"]
    assert Answers.__doc__ and json.loads((tmp_path / "evaluations.jsonl").read_text())["skipped"]


# ---------------------------------------------------------------- the page


def test_the_page_tells_what_happened_and_needs_nothing_else(run):
    shown = Page(run / "report.html")
    summary = json.loads((run / "summary.json").read_text())
    last = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])
    assert [address.partition(";")[0] for address in shown.images] == [
        "data:image/png", *["data:image/jpeg"] * 3], "the curves, and an image for each question"
    content = (run / "report.html").read_text()
    assert not re.search(r"https?:|url\(|@import", content)
    assert "default-src 'none'" in content, "the browser would fetch nothing either"
    for words in ("finished", f"{last['eval_loss']:.4g}",
                  f"{last['eval_loss_shuffled_images']:.4g}", f"{summary['tokens']:,}",
                  "learning_rate 0.01 (the preset: 0.002)", "Which colour?", "launches: 1: outcome",
                  answers(run)[-1]["answers"][0]["truth"]):
        assert words in shown.text, words
    assert len(content) < 400_000


def test_text_from_data_is_no_markup(run, tmp_path):
    for name in ("run.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    evil = "<script>alert(1)</script><img src=//evil>"
    line = {"step": 2, "answers": [{"where": "x", "image": "../../secret.jpg", "question": evil,
                                    "truth": evil, "answer": evil}]}
    (tmp_path / "answers.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(
        {"step": 4, "problem": evil, "answers": []}) + '\n{"step": 6, "ans')
    (tmp_path / "scores.json").write_text(json.dumps({evil: 0.5, "by_kind": {evil: 1.0}}))
    shown = Page(report.write_report([tmp_path]))  # raises at the first <script>
    assert shown.text.count(evil) >= 6 and len(shown.images) == 1, "the curves alone"


def test_no_image_outside_of_the_run_comes_into_the_page(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("step_*"))
    shutil.copyfile(run / "held_out" / "1.jpg", tmp_path / "secret.jpg")
    file = tmp_path / "run" / "answers.jsonl"
    file.write_text(file.read_text().replace("held_out/1.jpg", str(tmp_path / "secret.jpg")))
    assert len(Page(report.write_report([tmp_path / "run"])).images) == 1 + 2


@pytest.mark.parametrize("ended, words", [("failed", "OSError: no space left"),
                                          ("stopped", "stopped before step 6")])
def test_a_run_that_stops_early_has_its_page_too(world, tmp_path, monkeypatch, ended, words):
    if ended == "failed":
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr("train_pretrain.train", fail)
            train_pretrain.main([*world, "--out", str(tmp_path)])
    else:
        plain = Steps.next_batches
        monkeypatch.setattr(Steps, "next_batches", lambda self, number: (
            signal_once(self.state), plain(self, number))[1])
        train_pretrain.main([*world, "--out", str(tmp_path)])
        assert len(metrics(tmp_path)) == 2
        assert "samples_trained 4" in Page(tmp_path / "report.html").text
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
    assert "details: sft: exact: low 0.91 details: sft: exact: high 0.96" in shown
    with pytest.raises(SystemExit, match="holds neither metrics.jsonl nor run.json"):
        report.main([str(tmp_path / "nothing")])


# ---------------------------------------------------------------- references and comparisons


def test_the_reference_of_the_recipe_is_drawn_behind(run, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "REFERENCES", tmp_path)
    assert reference_of(read_run(run)) == ({}, [])
    file = keep_reference(read_run(run), "emoji_pretrain")
    assert file.name == "emoji_pretrain.jsonl"
    about, points = reference_of(read_run(run))
    assert about["steps"] == 6 and points[0]["step"] == 3.5
    assert "/" not in about["settings"]["data"], "the name of the file; where it lay is nobody's"
    assert points[0]["loss"] == pytest.approx(sum(m["loss"] for m in metrics(run)) / 6, abs=1e-4)
    shown = Page(report.write_report([run])).text
    assert "reference run" in shown and f"had {points[0]['loss']:.3f} there" in shown
    assert "This run differs" not in shown
    several = record(run, run={"settings": {"data": ["a/b", "c/d"]}})
    assert runs.curve_settings(several) == {"data": "b d"}
    about["settings"]["batch_size"] = 77
    file.write_text("\n".join(map(json.dumps, [about, *points])))
    assert "batch_size 2 instead of 77" in Page(report.write_report([run])).text
    for name, rate in (("another", 0.3), ("like_it", about["settings"]["learning_rate"])):
        about["settings"].update(batch_size=2, learning_rate=rate)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, [about, *points[:1]])))
    assert reference_of(read_run(run)) == (about, points[:1]), "the most alike of three"


def record(out, **files) -> RunRecord:
    return RunRecord(Path(out), **{"run": {}, "summary": {}, "scores": {}, "metrics": [],
                                   "evaluations": [], "answers": [], **files})


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


def test_several_runs_in_one_page(run, world, unseen, tmp_path):
    other, alone = tmp_path / "second", tmp_path / "third"
    train_pretrain.main([*world, *unseen, "--eval_answers", "2", "--learning_rate", "0.02",
                         "--out", str(other)])
    train_pretrain.main([*world, "--out", str(alone)])
    report.main([str(run), str(other), "--page", str(tmp_path / "both.html")])
    shown = Page(tmp_path / "both.html")
    assert len(shown.images) == 1 + 2, "the curves, and the questions that both were asked"
    for words in ("first", "second", "learning_rate 0.01 (the preset: 0.002) 0.02 (the preset: "
                  "0.002)", "eval_answers 3 2", *last_answers_of(run)[:2], *last_answers_of(other)):
        assert words in shown.text, words
    assert "batch_size" not in shown.text, "the same in both"
    report.main([str(run), str(alone), "--page", str(tmp_path / "both.html")])
    assert len(Page(tmp_path / "both.html").images) == 1, "the third was asked nothing"
    with pytest.raises(SystemExit, match="holds neither"):
        report.main([str(run), str(tmp_path / "none")])


def last_answers_of(out) -> list[str]:
    return [" ".join(a["answer"].split()) for a in answers(out)[-1]["answers"]]


def test_scores_of_two_checkpoints_stand_side_by_side(tmp_path):
    """Directories that eval.py has written: the same questions, first those answered otherwise."""
    for name, word in (("one", "red"), ("two", "blue")):
        (tmp_path / name).mkdir()
        lines = [{"where": f"data.jsonl:{i}", "image": ["/elsewhere/large.png"],
                  "question": f"Question {i}?", "truth": "red", "right": word == "red",
                  "answer": word if i == 30 else "green"} for i in range(report.CARDS + 5)]
        (tmp_path / name / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (tmp_path / name / "scores.json").write_text(json.dumps({"sft": 0.5}))
    file = report.write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "page.html")
    text = Page(file).text
    assert f"{report.CARDS} of {report.CARDS + 5}" in text and "sft 0.5 0.5" in text
    assert text.index("Question 30?") < text.index("Question 0?")
    assert f"{tmp_path}/one red {tmp_path}/two blue" in text
    assert 'class="right">red' in file.read_text()


# ---------------------------------------------------------------- curves


def drawn(lines, name="loss", window=1):
    axes = Figure().add_subplot()
    report.draw(axes, lines, name, "-", window)
    return [(list(line.get_xdata()), line.get_ydata()) for line in axes.lines]


def lines_of(*values) -> list[dict]:
    return [{"step": step, "loss": value} for step, value in enumerate(values, start=1)]


def test_missing_numbers_leave_gaps_and_none_at_all_is_said():
    (steps, values), = drawn(lines_of(1.0, None, float("nan"), 2.0))
    assert steps == [1, 2, 3, 4]
    np.testing.assert_array_equal(values, [1, np.nan, np.nan, 2])
    assert drawn(lines_of(None)) == drawn([]) == drawn(lines_of(1.0), "other") == []


def test_means_and_long_runs():
    (_, values), = drawn(lines_of(0, 3, 6, 9), window=3)
    np.testing.assert_allclose(values, [1.5, 3, 6, 7.5])
    (_, values), = drawn(lines_of(1.0, None, 2.0, float("inf"), 3.0), window=3)
    np.testing.assert_allclose(values, [1, 1.5, 2, 2.5, 3])
    (_, values), = drawn(lines_of(1.0, None, None, None, 3.0), window=3)
    np.testing.assert_allclose(values, [1, 1, np.nan, 3, 3])
    (steps, values), = drawn(lines_of(*[1.0] * 1_000_000), window=21)
    assert len(steps) <= report.POINTS and (values == 1).all() and steps[0] == 1


def test_one_more_figure_in_each_step_has_its_chart(run, tmp_path, monkeypatch):
    titles = []
    plain = Figure.add_subplot
    monkeypatch.setattr(Figure, "add_subplot", lambda *given, title, **more: (
        titles.append(title), plain(*given, title=title, **more))[1])
    lines = [{**m, "another_figure": 1.0} for m in metrics(run)]
    assert report.curves([record(tmp_path, metrics=lines)]).startswith("<h2>Curves")
    assert titles == ["held-out loss (--eval_steps)", "loss", "grad norm", "learning rate",
                      "supervised tokens", "tokens per second", "another figure"]


def test_a_loss_of_zero_or_none_is_drawn_too(tmp_path):
    for values in ((1.0, 0.0), (0.0, 0.0), (float("nan"), 1.0), (None, None)):
        lines = [{"step": i, "seconds": 1.0, "loss": value} for i, value in enumerate(values)]
        assert "base64" in report.curves([record(tmp_path, metrics=lines)])
