"""Claims: the benchmark turns the package's files into rows without losing or leaking a question,
shapes drawn anew keep their truth, and its score is what the model says freely, right or wrong."""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw

import eval as eval_script
import train_pretrain
import train_sft
from benchmarks import easy_vqa, easy_vqa_tower
from model.pretrained.load import load_vision
from tests.tiny import ROOT, environment

SHAPES = [("circle", "red"), ("rectangle", "blue"), ("triangle", "teal"), ("circle", "black")]
SCRIPTS = {"train_pretrain.py": train_pretrain, "train_sft.py": train_sft, "eval.py": eval_script}


def carry_out(command: list[str]) -> None:
    """In this process, what benchmarks/easy_vqa.py does in another."""
    if command[:2] == ["-m", "benchmarks.easy_vqa_tower"]:
        easy_vqa_tower.main(command[2:])
    else:
        SCRIPTS[command[0]].main(command[1:])


def draw(shape: str, colour: str, at=(20, 24)) -> Image.Image:
    image = Image.new("RGB", (64, 64), (232, 245, 246))
    (x, y), pen = at, ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((x, y, x + 13, y + 13), fill=colour)
    elif shape == "rectangle":
        pen.rectangle((x, y, x + 17, y + 8), fill=colour)
    else:
        pen.polygon(((x, y + 12), (x + 14, y + 12), (x + 7, y)), fill=colour)
    return image


def pairs_about(shape: str, colour: str, extra: int) -> list[tuple[str, str]]:
    pairs = [("what shape is in the image?", shape), ("what color is the shape?", colour),
             (f"is there a {shape}?", "yes"), (f"is there not a {colour} shape?", "no"),
             ("is no green shape present?", "yes"), ("is there a gray shape?", "no")]
    return pairs[:3 + extra]


@pytest.fixture
def package(tmp_path):
    """The package's own layout: six pictures to learn from, two to be asked about."""
    for split, count in (("train", 6), ("test", 2)):
        images = tmp_path / "data" / split / "images"
        images.mkdir(parents=True)
        listed = []
        for number in range(count):
            shape, colour = SHAPES[(number + (split == "test")) % len(SHAPES)]
            draw(shape, colour).save(images / f"{number}.png")
            listed += [[*pair, number] for pair in pairs_about(shape, colour, number % 4)]
        (images.parent / "questions.json").write_text(json.dumps(listed))
    return tmp_path / "data"


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def pair_of(row: dict) -> tuple[str, str]:
    """The one question of a row and its answer; nothing was said before it."""
    asked, answered = row["conversations"]
    assert (asked["role"], answered["role"]) == ("user", "assistant")
    assert asked["content"].startswith("<image>\n")
    return asked["content"].removeprefix("<image>\n"), answered["content"]


def test_every_question_is_learned_or_asked_once_with_its_own_picture(package, tmp_path):
    facts = easy_vqa.prepare(package, tmp_path / "out", 0, seed=0)
    assert facts == {"split": "test", "pictures": 2, "questions": 3 + 4, "training_pictures": 6,
                     "training_questions": 3 + 4 + 5 + 6 + 3 + 4}
    learned, naming, looks = (rows_of(tmp_path / "out" / f"{name}.jsonl")
                              for name in ("train", "naming", "looks"))
    pictures = [row["image"] for row in learned + naming + looks]
    assert len(set(pictures)) == len(pictures) and len(learned) == facts["training_questions"]
    for rows, times, kinds in ((learned, 1, ("shape", "colour", "yes or no")),
                               (naming, 1, ("shape", "colour")),
                               (looks, easy_vqa.LOOKS, ("shape", "colour"))):
        found = {}
        for row in rows:
            split, number, _ = row["image"].removesuffix(".png").split("_")
            assert split == "train" and row["kind"] in kinds
            found.setdefault(int(number), []).append(pair_of(row))
        for number, pairs in easy_vqa.read_split(package, "train").items():
            asked = [pair for pair in pairs if easy_vqa.kind_of(pair[0]) in kinds]
            assert Counter(found.pop(number)) == Counter(asked * times), number
        assert not found

    scored = rows_of(tmp_path / "out" / "scored.jsonl")
    assert [(pair_of(row), row["image"]) for row in scored] == [
        (pair, f"test_{number}.png")
        for number, pairs in easy_vqa.read_split(package, "test").items() for pair in pairs]
    assert [row["kind"] for row in scored[:3]] == ["shape", "colour", "yes or no"]
    for split, name, copies in (("test", "test_{}.png", 2), ("train", "train_{}_0.png", 6)):
        for number in range(copies):  # what is scored is the published picture, and learned too
            with Image.open(tmp_path / "out" / "pictures" / name.format(number)) as image:
                assert np.array_equal(image, easy_vqa.read_picture(
                    package / split / "images", number))


def test_the_seed_decides_and_nothing_else(package, tmp_path):
    def written(name, seed):
        easy_vqa.prepare(package, tmp_path / name, 0, seed)
        return [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))]

    assert written("a", 0) == written("b", 0) != written("c", 1)


def test_what_is_held_out_is_not_trained_on_and_the_test_split_not_opened(package, tmp_path):
    for file in sorted((package / "test").rglob("*.*")):
        file.unlink()
    facts = easy_vqa.prepare(package, tmp_path / "out", 2, seed=0)
    assert (facts["split"], facts["pictures"], facts["training_pictures"]) == ("train", 2, 4)
    for name, expected in (("train", {0, 1, 2, 3}), ("naming", {0, 1, 2, 3}),
                           ("looks", {0, 1, 2, 3}), ("scored", {4, 5})):
        assert {int(row["image"].removesuffix(".png").split("_")[1])
                for row in rows_of(tmp_path / "out" / f"{name}.jsonl")} == expected
    with pytest.raises(SystemExit, match="questions.json; --data takes a directory with"):
        easy_vqa.prepare(package, tmp_path / "out", 0, seed=0)
    with pytest.raises(SystemExit, match="--hold_out 6: expected 1 to 5"):
        easy_vqa.prepare(package, tmp_path / "out", 6, seed=0)


@pytest.mark.parametrize("shape,colour", SHAPES[:3])
def test_a_shape_drawn_anew_is_the_same_shape_in_the_same_colour(shape, colour):
    pixels, dice, seen = np.array(draw(shape, colour)), random.Random(0), set()
    cover, solid, box, ground = easy_vqa.find_shape(pixels)
    assert tuple(ground) == (232, 245, 246) and tuple(solid) == ImageColor.getrgb(colour)
    assert np.array_equal(cover == 1, (pixels != ground).any(axis=-1))
    new_ground = np.array((250, 240, 230), np.float32)
    for _ in range(60):
        drawn = easy_vqa.draw_anew(cover, solid, box, new_ground, dice)
        found, new_solid, (top, bottom, left, right), its_ground = easy_vqa.find_shape(drawn)
        assert drawn.shape == pixels.shape and drawn.dtype == np.uint8
        assert tuple(its_ground) == tuple(new_ground) and tuple(new_solid) == tuple(solid)
        as_it_was = cover[box[0]:box[1], box[2]:box[3]]
        assert any(np.array_equal(found[top:bottom, left:right], same)
                   for same in (as_it_was, as_it_was[:, ::-1])), "another shape"
        seen.add((top, left))
    assert len(seen) > 50, "it hardly ever moves"
    assert {min(place) for place in zip(*seen)} <= {*range(6)}, "it never comes near the edge"


def test_the_rim_of_a_shape_is_mixed_with_the_new_ground():
    pixels = np.array(draw("rectangle", "red", at=(-2, 20)))  # at the edge: not moved
    pixels[30, 0:10] = (0.25 * np.array((255, 0, 0)) + 0.75 * pixels[0, 0]).round()
    *shape, _ = easy_vqa.find_shape(pixels)
    new_ground = np.array((200, 250, 255), np.float32)
    drawn = {easy_vqa.draw_anew(*shape, new_ground, random.Random(seed)).tobytes(): seed
             for seed in range(20)}
    assert len(drawn) == 2, "mirrored or not, and nothing else"
    for flat in drawn:
        picture = np.frombuffer(flat, np.uint8).reshape(pixels.shape)
        if tuple(picture[22, 0]) != (255, 0, 0):
            picture = picture[:, ::-1]
        assert (picture[20:29, 0:16] == (255, 0, 0)).all()
        assert tuple(picture[0, 0]) == (200, 250, 255)
        assert np.abs(picture[30, 0:10] - (213.75, 187.5, 191.25)).max() <= 1


def test_the_whole_command_and_that_its_score_can_fail(package, tmp_path, monkeypatch, capsys):
    """One step cannot teach it; and where its own words are the truth, all of them are right."""
    monkeypatch.setattr(easy_vqa, "run", carry_out)
    out = tmp_path / "out"
    easy_vqa.main(["--data", str(package), "--out", str(out), "--seed", "3",
                   "--steps", "1", "--batch_size", "2", "--num_workers", "0"])
    result, answers = json.loads((out / "result.json").read_text()), rows_of(out / "answers.jsonl")
    told = capsys.readouterr().out
    assert [a["truth"] for a in answers] == [
        pair_of(row)[1] for row in rows_of(out / "scored.jsonl")]
    right = sum(a["answer"].strip() == a["truth"] for a in answers)
    assert (result["right"], result["questions"], result["seed"]) == (right, 7, 3)
    assert result["score"] == right / 7 < 1 and f"{right} of 7 questions of the test split" in told
    assert "image withheld" in told and "image of another sample" in told

    short = ["--model", str(out / "run"), "--data", str(out / "scored.jsonl"), "--image_folder",
             str(out / "pictures"), "--report", str(out), "--max_new_tokens", "5"]
    eval_script.main(short)
    echoed = rows_of(out / "scored.jsonl")
    for row, answer in zip(echoed, rows_of(out / "answers.jsonl")):
        row["conversations"][1]["content"] = answer["answer"]
    easy_vqa.write_lines(out / "scored.jsonl", echoed)
    eval_script.main(short)
    assert all(a["right"] for a in rows_of(out / "answers.jsonl"))


def test_the_tower_learns_and_what_it_saves_is_what_it_learned(package, tmp_path, monkeypatch):
    """On six pictures, again and again; the file is a public tower that loads as any other."""
    easy_vqa.prepare(package, tmp_path, 0, seed=0)
    rows = easy_vqa_tower.read_rows(tmp_path / "naming.jsonl")
    assert {row[1:] for row in rows} == {(kind, answer) for shape, colour in SHAPES for kind, answer
                                         in (("shape", shape), ("colour", colour))}
    monkeypatch.setattr(easy_vqa_tower, "PIXELS", 96)
    monkeypatch.setattr(easy_vqa_tower, "LEARNING_RATE", 1e-3)
    share = easy_vqa_tower.train(rows * 60, tmp_path / "pictures", tmp_path / "vision", seed=0)
    assert share == 1.0
    told = json.loads((tmp_path / "vision" / "preprocessor_config.json").read_text())
    assert told["size"] == {"height": 96, "width": 96}
    before, after = (load_vision(str(place))
                     for place in (easy_vqa_tower.TOWER, tmp_path / "vision"))
    assert before.config == after.config
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


def test_half_a_training_or_a_question_that_was_not_asked_is_no_score(package, tmp_path,
                                                                      monkeypatch):
    def stopped(command):
        assert command[0] in ("-m", "train_pretrain.py"), "it went on all the same"

    def all_but_one(command):
        for stage in ("naming", "run"):
            (tmp_path / stage).mkdir(exist_ok=True)
            (tmp_path / stage / "summary.json").write_text("{}")
        lines = rows_of(tmp_path / "scored.jsonl")[1:]
        easy_vqa.write_lines(tmp_path / "answers.jsonl", [{"right": True} for _ in lines])

    for outcome, told in ((stopped, "same command with --resume goes on"),
                          (all_but_one, "7 questions were to be asked and 6 were answered")):
        monkeypatch.setattr(easy_vqa, "run", outcome)
        with pytest.raises(SystemExit, match=told):
            easy_vqa.main(["--data", str(package), "--out", str(tmp_path)])
        assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("command", [["benchmarks/easy_vqa.py"], ["-m", "benchmarks.easy_vqa"]])
def test_both_ways_to_call_it_find_the_installed_package(package, tmp_path, command):
    """As a script its own name hides the package's; a mistake of ours names what was found."""
    installed = tmp_path / "site"
    shutil.copytree(package, installed / "easy_vqa" / "data")
    (installed / "easy_vqa-1.0.dist-info").mkdir()
    (installed / "easy_vqa-1.0.dist-info" / "METADATA").write_text("Name: easy-vqa\nVersion: 1.0\n")
    done = subprocess.run([sys.executable, *command, "--hold_out", "9", "--out", str(tmp_path)],
                          cwd=ROOT, capture_output=True, text=True,
                          env={**environment(), "PYTHONPATH": str(installed)})
    assert done.returncode and "expected 1 to 5, for there are 6" in done.stderr, done.stderr


def test_what_is_missing_is_said(monkeypatch):
    def absent(name):
        raise easy_vqa.PackageNotFoundError(name)

    monkeypatch.setattr(easy_vqa, "distribution", absent)
    with pytest.raises(SystemExit, match="pip install easy-vqa"):
        easy_vqa.package_data()
    with pytest.raises(SystemExit, match="-c did not come to its end"):
        easy_vqa.run(["-c", "raise SystemExit(3)"])
