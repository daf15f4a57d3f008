"""Claims: a file is answered, scored and reported as its authors score it, beside what is scored
without looking; a scoring that was killed goes on and ends as if nothing had happened; a changed
model, data or setting is named, and nothing of the old answers is used."""

import io
import json
import sys

import pytest
from PIL import Image
from test_benchmarks import coco, mmstar, pope, vqa
from tiny import make_runs

import eval as script
import evaluation.score as score
from evaluation.results_cache import ResultsCache
from model.pretrained.checkpoint import find_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # results go to out/scores/... from here


def run(monkeypatch, capsys, *arguments, model="sft"):
    """eval.py -> (stdout, stderr)"""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    capsys.readouterr()
    script.main(["--max_new_tokens", "8", "--device", "cpu", *map(str, arguments)])
    return capsys.readouterr()


def answers(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "answers.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- conversations


def test_a_file_is_scored(world, monkeypatch, capsys, tmp_path):
    out, _ = run(monkeypatch, capsys, "--model", world / "sft", "--data", world / "data.jsonl",
                 "--limit", "5")
    assert "exact answers to 5 questions" in out
    assert out.partition("\n\n")[2].splitlines()[1].split()[-1] == "5"
    written, = (tmp_path / "out" / "scores").glob("sft-step_000006-data.jsonl-*")
    assert sorted(path.name for path in written.iterdir()) == [
        "answers.jsonl", "cache", "scores.json"]  # and no image
    first = answers(written)[1]
    assert list(first) == ["where", "image", "question", "truth", "answer", "score", "right",
                           "no_image", "shuffled_images"]
    assert (first["where"], first["question"], first["truth"], first["image"]) == (
        f"{world / 'data.jsonl'}:2", "Which colour?", "It is green!", [str(world / "green.png")])
    with pytest.raises(SystemExit, match="no data file"):
        script.main(["--model", str(world / "sft"), "--data", "no_such.jsonl"])


def test_several_files_are_scored_as_one(world, monkeypatch, capsys):
    lines = (world / "data.jsonl").read_text().splitlines(keepends=True)
    (world / "part-1.json").write_text("".join(lines[:7]))
    (world / "part-2.json").write_text("".join(lines[7:]))

    def table(*files):
        out, _ = run(monkeypatch, capsys, "--model", world / "sft", "--data", *files)
        name, _, rest = out.partition("questions of ")[2].partition("\n")
        return name, rest.partition("\n\n")[0]

    _, whole = table(world / "data.jsonl")
    assert whole.split()[-1] == str(len(lines))
    for files in ([world / "part-2.json", world / "part-1.json"], [world / "part-*.json"]):
        name, parts = table(*files)
        assert parts == whole and name == " ".join(map(str, files))
    with pytest.raises(SystemExit, match="part-1.json:2: a weight .* Leave the weight out"):
        script.main(["--model", str(world / "sft"), "--data", f"{world / 'part-*.json'}:2"])


def test_report_writes_everything(world, monkeypatch, capsys, tmp_path):
    data = world / "tagged.jsonl"
    lines = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line.update(kind=("what", "hello")["image" not in line], language=("en", "zh")[i % 2])
    data.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    out, _ = run(monkeypatch, capsys, "--model", world / "sft", "--data", data,
                 "--report", tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores) == ["before", "pretrain", "sft", "no_image", "shuffled_images", "by_kind",
                            "by_language", "details"]
    assert list(scores["by_kind"]) == ["hello", "what"]
    assert list(scores["by_language"]) == ["en", "zh"]
    assert all(0 <= value <= 1 for value in [*list(scores.values())[:5],
                                             *scores["by_kind"].values()])
    assert scores["details"]["questions"] == {"pretrain": 24, "before": 24, "sft": 24,
                                              "no_image": 16, "shuffled_images": 16}
    told = answers(tmp_path)
    assert len(told) == len(lines) == 24
    assert sum(a["right"] for a in told) == round(scores["sft"] * 24)
    for name in ("contact_sheet.png", "loss.png"):
        assert Image.open(tmp_path / name).width > 100
    assert "this model, image withheld" in out and "python eval.py --model" in out
    assert find_model(str(world / "sft")).name == "step_000006"  # nothing in the run was touched


# ---------------------------------------------------------------- benchmarks


@pytest.mark.parametrize(("make", "metric", "words", "expected"), [
    # What is said of a red, green, blue and white picture; without one it is "yes. Answer: A".
    # Expected: with its picture, without one, with another's (None: no other is of its kind).
    (mmstar, "choice", ("A", "B.", "(C)", "D"), (1, 1 / 3, 0)),
    (pope, "yesno", ("Yes", "No", "Yes", "No"), (1, 1 / 2, 0)),
    (vqa, "vqa", ("Pink.", "yes", "?", "?"), (1, 0, None)),
    (coco, "caption", ("a plain picture 1", "a plain picture 0", "?", "?"), None)])
def test_benchmarks_are_scored_by_their_own_metric(world, monkeypatch, capsys, tmp_path, make,
                                                   metric, words, expected):
    """The model's answers are put in its mouth: the colour of the picture decides."""
    rooms = []

    def answer(predictor, prompts, images, room):
        rooms.append(room)
        found = {}
        for i in prompts:
            found[i] = "yes. Answer: A"
            if images[i]:
                pixels = predictor.processor.read(images[i][0])
                red, green, blue = pixels[:, 4, 4] > 0
                found[i] = words[3 if red and green else 0 if red else 1 if green else 2]
        return found, {}

    monkeypatch.setattr(score.Predictor, "answer_batch", answer)
    files = make(tmp_path)
    folder = next(tmp_path.glob("val*"), tmp_path)
    out, _ = run(monkeypatch, capsys, "--model", world / "sft", "--image_folder", folder, "--data",
                 *(files if isinstance(files, list) else [files]), "--report", tmp_path / "r",
                 "--max_new_tokens", "99")
    scores = json.loads((tmp_path / "r" / "scores.json").read_text())
    found = [scores.get(name) for name in ("sft", "no_image", "shuffled_images")]
    details = scores["details"]
    assert details["metric"] == metric
    # Only where a longer answer is wrong whatever follows, it is cut: "pink" and 8 bytes more.
    assert set(rooms) == ({12} if metric == "vqa" else {99})
    if metric == "caption":
        assert found[0] > 1 and found[1:] == [0, 0]  # "a plain picture" is said of every one
        assert list(details["figures"]["sft"]) == ["cider", "bleu4"]
        assert f"{100 * found[0]:.1f} (" in out
    else:
        assert found == (list(expected) if expected[2] is None else pytest.approx(expected))
        assert f"{100 * expected[0]:.1f}% (" in out
    for condition, fall in details["falls"].items():
        assert fall["low"] <= fall["value"] <= fall["high"], condition
    assert "this model, image withheld" in out and "in brackets" in out


def test_a_metric_that_does_not_fit_is_refused_before_anything_is_asked(world, monkeypatch, capsys):
    monkeypatch.setattr(score.Predictor, "answer_batch", lambda *_: pytest.fail("asked"))
    for metric, reason in (("yesno", "neither yes nor no"), ("choice", "none of the options"),
                           ("vqa", "one true answer")):
        with pytest.raises(SystemExit, match=reason):
            run(monkeypatch, capsys, "--model", world / "sft", "--data", world / "data.jsonl",
                "--metric", metric)


def test_a_score_that_does_not_fall_is_called_so(world, monkeypatch, capsys):
    monkeypatch.setattr(score.Predictor, "answer_batch", lambda self, prompts, *_: (
        dict.fromkeys(prompts, "It is green"), {}))
    out, _ = run(monkeypatch, capsys, "--model", world / "sft", "--data", world / "data.jsonl")
    for words in ("is withheld", "is another one"):
        assert f"The score does not fall when the image {words} (by 0.0" in out


def test_the_words_behind_a_question_can_be_chosen(world, monkeypatch, capsys, tmp_path):
    file = pope(tmp_path)
    for given, expected in ((["--suffix", "In a word."], "image?\nIn a word."),
                            (["--suffix", ""], "image?")):
        run(monkeypatch, capsys, "--model", world / "sft", "--data", file, *given,
            "--image_folder", tmp_path / "val2014", "--report", tmp_path / "r")
        assert answers(tmp_path / "r")[0]["question"].endswith(expected)


# ---------------------------------------------------------------- killed, and going on


class Killed(BaseException):
    """As sudden as a kill: nobody catches it."""


def test_a_killed_scoring_goes_on_and_ends_the_same(world, monkeypatch, capsys, tmp_path):
    flags = ["--model", world / "sft", "--data", world / "data.jsonl", "--batch_size", "5"]
    out, _ = run(monkeypatch, capsys, *flags, "--report", tmp_path / "whole")
    answer, asked, stop = score.Predictor.answer_batch, [], []

    def counting(self, prompts, *rest):
        if [len(asked)] == stop:
            raise Killed
        asked.append(len(prompts))
        return answer(self, prompts, *rest)

    monkeypatch.setattr(score.Predictor, "answer_batch", counting)
    flags += ["--report", tmp_path / "torn"]
    for batches in (3, 7, 12):  # in stage one's answers, the untrained one's, this model's
        stop[:] = [batches]
        with pytest.raises(Killed):
            run(monkeypatch, capsys, *flags)
    caches = sorted((tmp_path / "torn" / "cache").glob("*.jsonl"))
    with open(caches[-1], "ab") as file:
        file.write(b'{"index": 3, "ans')  # torn in the middle of a line
    stop.clear()
    resumed, err = run(monkeypatch, capsys, *flags)
    assert resumed.replace("torn", "whole") == out and "broken lines" in err
    for name in ("answers.jsonl", "scores.json"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sum(asked) == 24 * 3 + 16 * 2, "every question was asked once"
    asked.clear()
    again, _ = run(monkeypatch, capsys, *flags)
    assert again == resumed and asked == []


def test_what_changed_is_named_and_all_is_asked_anew(world, monkeypatch, capsys, tmp_path):
    data = tmp_path / "data.jsonl"
    lines = (world / "data.jsonl").read_text()
    data.write_text(lines)
    flags = ["--data", data, "--image_folder", world, "--report", tmp_path / "r", "--dtype", "fp32"]
    run(monkeypatch, capsys, "--model", world / "sft", *flags)
    cache = tmp_path / "r" / "cache" / "sft.jsonl"
    for change, named in (
        (["--model", world / "pretrain"], "model was {"), (["--batch_size", "5"], "batch_size was"),
        (["--system", "Be kind."], "system was null"), (["--limit", "9"], "questions was"),
        (["--dtype", "bf16"], "dtype was torch.float32, now it is torch.bfloat16"),
        (["--quantize", "int8"], "quantize was null, now it is int8")):
        before = cache.read_text()
        _, err = run(monkeypatch, capsys, "--model", world / "sft", *flags, *change)
        assert f"{cache} holds answers to something else: " in err and named in err
        assert cache.with_name("sft.jsonl.old").read_text() == before
    run(monkeypatch, capsys, "--model", world / "sft", *flags)
    data.write_text(lines.replace("Which", "What"))
    _, err = run(monkeypatch, capsys, "--model", world / "sft", *flags)
    assert "data was [" in err and "questions was" in err
    _, err = run(monkeypatch, capsys, "--model", world / "sft", *flags)
    assert "something else" not in err and "24 answers are in" in err


def test_a_results_cache_counts_its_broken_lines(tmp_path, capsys):
    file = tmp_path / "sft.jsonl"
    cache = ResultsCache(file, {"model": "a"})
    cache.add({0: "yes\n", 5: "\u4e2d"}, {2: "no image"})
    with open(file, "a") as opened:
        opened.write('{"index": "x"}\n[1]\nnonsense\n{"index": 7, "answer": "good"}\n')
    again = ResultsCache(file, {"model": "a"})
    assert "3 broken lines" in capsys.readouterr().err
    assert again.answers == {0: "yes\n", 5: "\u4e2d", 7: "good"}
    assert again.errors == {2: "no image"}
    assert [again.has(i) for i in (0, 1, 2, 7)] == [True, False, True, True]
    for wrong in ("", "garbage\n{}\n", '{"key": 3}\n{"index": 0, "answer": "a"}\n'):
        file.write_text(wrong)
        assert ResultsCache(file, {"model": "a"}).answers == {}
        assert json.loads(file.read_text())["key"] == {"model": "a"}


def test_broken_lines_and_pictures_are_counted(world, monkeypatch, capsys, tmp_path):
    file = pope(tmp_path)
    (tmp_path / "val2014" / "COCO_val2014_000000green.jpg").write_bytes(b"no image")
    file.write_text("{broken\n" + file.read_text())
    for _ in range(2):  # from the cache the second time
        _, err = run(monkeypatch, capsys, "--model", world / "sft", "--data", file,
                     "--image_folder",
                     tmp_path / "val2014", "--report", tmp_path / "r")
        assert f"skipped {file}:1: not JSON" in err and f"skipped {file}:3: cannot read" in err
        details = json.loads((tmp_path / "r" / "scores.json").read_text())["details"]
        assert details["skipped"] == {"data": 1, "pretrain": 1, "before": 1, "sft": 1,
                                      "no_image": 0, "shuffled_images": 1}
        assert details["questions"]["sft"] == 3 and len(answers(tmp_path / "r")) == 3
