"""Claims: run.json and summary.json tell what was done, figure by figure, also of a killed run."""

import json
from pathlib import Path

import pytest
import torch

import train_pretrain
from model.pretrained.checkpoint import newest_checkpoint, read_run
from tests.test_resume import Killed, die_in_step
from tests.tiny import make_world, metrics
from training.log import kind_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_run_json_tells_what_ran_where_and_when(world, tmp_path):
    train_pretrain.main([*world, "--out", str(tmp_path)])
    run, kept = read(tmp_path / "run.json"), read_run(newest_checkpoint(tmp_path))
    for name in ("stage", "settings", "processes", "data", "commit", "versions", "machine"):
        assert run[name] == kept[name], f"{name}: the run and its checkpoint tell the same"
    assert run["settings"]["learning_rate"] == 0.01 and run["versions"]["torch"]
    assert len(run["data"]["sha256"]) == 64
    machine = run["machine"]
    assert machine["cpu"] and machine["os"] and machine["cores"] >= 1
    assert (machine["gpu"] is None) != torch.cuda.is_available()
    launch, = run["launches"]
    assert launch["started"] <= launch["ended"]
    assert (launch["first_step"], launch["last_step"], launch["outcome"]) == (1, 6, "finished")


def test_a_killed_launch_stays_without_an_end_and_a_failed_one_says_why(world, tmp_path,
                                                                       monkeypatch):
    out = str(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, 5)
        train_pretrain.main([*world, "--out", out])
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("train_pretrain.train", fail)
        train_pretrain.main(["--resume", "--out", out])
    train_pretrain.main(["--resume", "--out", out])
    told = [(x["first_step"], x["last_step"], x["outcome"])
            for x in read(tmp_path / "out" / "run.json")["launches"]]
    assert told == [(1, None, None), (4, 3, "OSError: no space left"), (4, 6, "finished")]
    assert len(metrics(out)) == 6


def fail(*_):
    raise OSError("no space left")


def test_the_summary_adds_up(world, tmp_path, monkeypatch, capsys):
    """24 rows of which 4 cannot be used, for two different reasons, over two epochs; killed and
    resumed in between, which changes no count."""
    lines = Path(world[5]).read_text().splitlines()
    for number in (3, 8, 13):
        lines[number] = "{broken"
    lines[16] = lines[16].replace(".png", "_is_lost.png")
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    flags = [*world, "--data", str(tmp_path / "data.jsonl"), "--image_folder",
             str(Path(world[5]).parent), "--max_skip_ratio", "0.5", "--steps", "24", "--save_steps",
             "5"]
    train_pretrain.main([*flags, "--out", str(tmp_path / "whole")])
    told = capsys.readouterr().out
    summary = read(tmp_path / "whole" / "summary.json")
    steps = metrics(tmp_path / "whole")
    assert summary["steps"] == 24 and summary["samples_trained"] == 40
    assert summary["samples_skipped"] == 8
    assert sorted(summary["skipped_why"].values()) == [2, 6]
    assert "6 x not JSON" in told and "8 of 48 samples skipped" in told
    assert any("no image FILE" in reason for reason in summary["skipped_why"])
    assert summary["tokens_supervised"] == sum(m["supervised_tokens"] for m in steps)
    assert 0 < summary["tokens_supervised"] < summary["tokens"] - summary["tokens_padding"]
    assert summary["tokens_useful_share"] == pytest.approx(
        1 - summary["tokens_padding"] / summary["tokens"], abs=1e-4)
    assert f"{summary['tokens_useful_share']:.1%} useful" in told
    seconds = sum(m["seconds"] for m in steps)
    useful = summary["tokens"] - summary["tokens_padding"]
    assert summary["tokens_per_second"] == pytest.approx(useful / seconds, rel=1e-3)
    assert seconds < summary["wall_seconds"] and summary["last_loss"] == steps[-1]["loss"]
    assert summary["best_loss"] == min(m["loss"] for m in steps if m["loss"] is not None)
    assert summary["peak_memory"] > 5e7, "bytes: a Python with torch needs more"
    assert (summary["peak_gpu_memory"] is None) != torch.cuda.is_available()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, 18)
        train_pretrain.main([*flags, "--out", str(tmp_path / "resumed")])
    assert not (tmp_path / "resumed" / "summary.json").exists()
    train_pretrain.main(["--resume", "--out", str(tmp_path / "resumed")])
    again = read(tmp_path / "resumed" / "summary.json")
    timed = ("tokens_per_second", "training_seconds", "wall_seconds", "peak_memory",
             "peak_gpu_memory")
    assert {**summary, **dict.fromkeys(timed)} == {**again, **dict.fromkeys(timed)}


def test_an_earlier_runs_record_is_moved_aside(world, tmp_path):
    for steps in ("4", "2"):
        train_pretrain.main([*world, "--steps", steps, "--out", str(tmp_path)])
    assert read(tmp_path / "summary.json")["steps"] == 2
    assert read(tmp_path / "earlier_1" / "summary.json")["steps"] == 4
    assert read(tmp_path / "earlier_1" / "run.json")["launches"][0]["last_step"] == 4


@pytest.mark.parametrize("one, other", [
    ("no image /a/b c/1.png; is the image directory right?",
     "no image /a/b d/22.png; is the image directory right?"),
    ("cannot read a.jpg: image file is truncated (12 bytes not processed)",
     "cannot read x/b.jpeg: image file is truncated (7 bytes not processed)"),
    ("expected an object, found '[1'", "expected an object, found 'null'"),
    ("1 <image> markers for 2 images; each", "30 <image> markers for 1,000 images; each"),
])
def test_reasons_are_counted_without_names_and_numbers(one, other):
    assert kind_of(one) == kind_of(other)
    assert kind_of(one) != kind_of("not JSON: Extra data at character 3 of the record")
    assert any(word in kind_of(one) for word in ("image", "truncated", "object"))
