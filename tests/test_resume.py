"""Claims: killed at any step and resumed, a run is bit for bit the run that was never killed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_pretrain
import train_sft
from model.pretrained.checkpoint import checkpoints, newest_checkpoint
from tests.tiny import curve, environment, make_world, metrics
from training.log import cut_metrics

# A run that the system kills without warning, right after step `die_at` was written down.
KILLED = """
import os, signal, sys, train_sft
from training.log import Log
plain, die_at = Log.step, int(sys.argv.pop(1))
def step(self, number, figures):
    plain(self, number, figures)
    if number == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
Log.step = step
train_sft.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """8.5 micro-batches an epoch in steps of 5: checkpoints lie inside of epochs."""
    world = make_world(tmp_path_factory.mktemp("world"), count=34)
    world[world.index("--steps"):world.index("--steps") + 2] = ["--epochs", "2.5"]
    return [*world, "--batch_size", "4", "--gradient_accumulation_steps", "3", "--model", "none"]


class Killed(BaseException):
    """Not an Exception: nothing in the run may catch it and tidy up."""


def die_in_step(monkeypatch, number):
    from training.log import Log
    plain = Log.step

    def step(self, at, figures):
        plain(self, at, figures)
        if at == number:
            raise Killed

    monkeypatch.setattr(Log, "step", step)


def same_weights(one, two):
    first, second = (load_file(newest_checkpoint(run) / "model.safetensors")
                     for run in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_sigkill_then_resume(world, tmp_path):
    """9 micro-batches an epoch, 23 in all: 7 steps of 3 and a last one of 2."""
    flags = [*world, "--lora", "--lora_dropout", "0.2"]
    train_sft.main([*flags, "--out", str(tmp_path / "whole")])
    assert len(curve(tmp_path / "whole")) == 8
    out = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, "5", *flags, "--out", str(out)],
                          env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == -9, done.stderr
    assert len(metrics(out)) == 5 and newest_checkpoint(out).name == "step_000003"
    train_sft.main(["--resume", "--out", str(out)])  # all other settings are the run's own
    assert curve(out) == curve(tmp_path / "whole")
    assert same_weights(out, tmp_path / "whole")


@pytest.mark.parametrize("trained", [[], ["--lora", "--lora_dropout", "0.2"],
                                     ["--train_language", "all", "--train_vision"]])
@pytest.mark.parametrize("die_at", [2, 3, 7])
def test_stopped_at_any_step(world, tmp_path, monkeypatch, trained, die_at):
    flags = [*world, *trained]
    train_pretrain.main([*flags, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, die_at)
        train_pretrain.main([*flags, "--out", str(tmp_path / "stopped")])
    train_pretrain.main([*flags, "--resume", "--out", str(tmp_path / "stopped")])
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")
    assert same_weights(tmp_path / "stopped", tmp_path / "whole")


def test_a_run_that_was_killed_while_it_saved(world, tmp_path, monkeypatch):
    """The half-written directory has another name, and is neither resumed from nor kept."""
    out = tmp_path / "out"
    train_pretrain.main([*world, "--out", str(tmp_path / "whole")])
    import model.pretrained.checkpoint
    rename, saved = model.pretrained.checkpoint.os.rename, []

    def killed(source, target):
        if saved:
            raise Killed
        saved.append(rename(source, target))

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(model.pretrained.checkpoint.os, "rename", killed)
        train_pretrain.main([*world, "--out", str(out)])
    assert (out / ".partial_step_000006").exists()
    assert [path.name for path in checkpoints(out)] == ["step_000003"]
    train_pretrain.main(["--resume", "--out", str(out)])
    assert not (out / ".partial_step_000006").exists()
    assert curve(out) == curve(tmp_path / "whole") and same_weights(out, tmp_path / "whole")


def test_resume_counts_bad_samples_on(world, tmp_path, monkeypatch, capsys):
    data = world[world.index("--data") + 1]
    lines = open(data, encoding="utf-8").read().splitlines()
    lines[11] = "{"
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    flags = [*world, "--data", str(tmp_path / "data.jsonl"), "--image_folder",
             str(data).rsplit("/", 1)[0], "--max_skip_ratio", "0.5", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, 4)
        train_pretrain.main(flags)
    train_pretrain.main([*flags, "--resume"])
    assert "3 of " in capsys.readouterr().out.split("skipped")[-2], "one in each epoch begun"


def test_resume_refuses_what_would_be_another_run(world, tmp_path):
    flags = [*world, "--out", str(tmp_path / "out"), "--steps", "3"]
    train_pretrain.main(flags)
    for other in (["--seed", "5"], ["--lora"], ["--learning_rate", "1"]):
        with pytest.raises(SystemExit, match=f"{other[0]}.*was started with"):
            train_pretrain.main([*flags, "--resume", *other])
    data = world[world.index("--data") + 1]
    content = open(data, encoding="utf-8").read()
    with open(data, "a", encoding="utf-8") as file:
        file.write("\n")
    with pytest.raises(SystemExit, match="data order"):
        train_pretrain.main([*flags, "--resume"])
    with open(data, "w", encoding="utf-8") as file:
        file.write(content)
    # More steps, or another place of the towers, is no other run.
    train_pretrain.main([*flags, "--resume", "--steps", "5", "--num_workers", "0"])
    assert [m["step"] for m in metrics(tmp_path / "out")] == [1, 2, 3, 4, 5]


def test_a_run_goes_on_where_its_data_has_moved_to(world, tmp_path, monkeypatch):
    """The sha256 says that it is the same; a file of other content is another run."""
    source = Path(world[world.index("--data") + 1])
    shutil.copytree(source.parent, tmp_path / "data")
    place = ["--data", str(tmp_path / "data" / source.name)]
    flags = [*world, *place, "--image_folder", str(tmp_path / "data"), "--out"]
    train_pretrain.main([*flags, str(tmp_path / "whole"), "--steps", "6"])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, 4)
        train_pretrain.main([*flags, str(tmp_path / "out"), "--steps", "6", "--save_steps", "3"])
    (tmp_path / "data").rename(tmp_path / "moved")
    resume = ["--resume", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="no data file .*if it has moved"):
        train_pretrain.main(resume)
    place = ["--data", str(tmp_path / "moved" / source.name), "--image_folder",
             str(tmp_path / "moved")]
    train_pretrain.main([*resume, *place])
    assert curve(tmp_path / "out") == curve(tmp_path / "whole")
    assert same_weights(tmp_path / "out", tmp_path / "whole")
    train_pretrain.main([*resume, "--steps", "7"])  # and it is remembered


def test_nothing_to_resume_starts_anew(world, tmp_path, capsys):
    train_pretrain.main([*world, "--steps", "1", "--resume", "--out", str(tmp_path)])
    assert [m["step"] for m in metrics(tmp_path)] == [1]


def test_an_earlier_run_is_moved_aside(world, tmp_path, capsys):
    flags = [*world, "--out", str(tmp_path)]
    train_pretrain.main([*flags, "--steps", "4"])
    train_pretrain.main([*flags, "--steps", "2"])
    assert newest_checkpoint(tmp_path).name == "step_000002"
    assert newest_checkpoint(tmp_path / "earlier_1").name == "step_000004"
    assert len(metrics(tmp_path)) == 2 and len(metrics(tmp_path / "earlier_1")) == 4
    assert "earlier_1" in capsys.readouterr().out


def test_lines_after_the_checkpoint_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, 6)) + '{"step": 6')
    cut_metrics(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_first_start_with_resume_changes_nothing(world, tmp_path):
    """Stage two is not stage one resumed, whatever --resume finds: nothing of it was changed."""
    flags = [flag for flag in world if flag not in ("--model", "none")]
    train_pretrain.main([*flags, "--learning_rate", "0.004", "--out", str(tmp_path / "one")])
    train_sft.main([*flags, "--lora", "--resume", "--model", str(tmp_path / "one"),
                    "--learning_rate", "0.001", "--out", str(tmp_path / "two")])
    for file in (tmp_path / "two" / "run.json", newest_checkpoint(tmp_path / "two") / "run.json"):
        run = json.loads(file.read_text())
        assert run["changes"] == [] and run["settings"]["resume"] is False
    train_sft.main(["--resume", "--epochs", "3", "--out", str(tmp_path / "two")])
    run = json.loads((tmp_path / "two" / "run.json").read_text())
    assert run["changes"] == [] and run["settings"]["resume"] is True


@pytest.mark.parametrize("spoil", [lambda state: state.pop("trainer"),
                                   lambda state: state["trainer"].update(other=1),
                                   lambda state: state["optimizer"]["param_groups"].pop()])
def test_a_training_state_of_another_kind_is_named(world, tmp_path, spoil):
    train_pretrain.main([*world, "--out", str(tmp_path)])
    file = newest_checkpoint(tmp_path) / "training_state.pt"
    state = torch.load(file, weights_only=True)
    spoil(state)
    torch.save(state, file)
    (file.parent / "manifest.json").unlink()
    with pytest.raises(SystemExit, match="cannot go on: .*training_state.pt does not fit this run"):
        train_pretrain.main(["--resume", "--out", str(tmp_path)])
