"""Claim: the demo's three commands fit together on the embedded default and write what they say."""

import json

from PIL import Image

import eval as script
import train_pretrain
import train_sft

FEW = ["--steps", "2", "--batch_size", "4", "--num_workers", "0"]


def test_demo_in_a_handful_of_steps(tmp_path, capsys):
    pretrain, sft = str(tmp_path / "pretrain"), str(tmp_path / "sft")
    train_pretrain.main([*FEW, "--out", pretrain])
    train_sft.main([*FEW, "--lora", "--model", pretrain, "--out", sft])
    capsys.readouterr()
    script.main(["--model", sft, "--data", "emoji", "--limit", "28", "--report", str(tmp_path)])
    out = capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert list(scores) == ["before", "pretrain", "sft", "no_image", "shuffled_images", "by_kind",
                            "by_language", "details"]
    assert set(scores["by_language"]) == {"en", "zh"} and len(scores["by_kind"]) >= 5
    for name in scores["by_kind"]:
        assert name in out
    assert out.rstrip().endswith(f"python eval.py --model {sft}")
    for name in ("contact_sheet.png", "loss.png"):
        assert Image.open(tmp_path / name).width > 500
