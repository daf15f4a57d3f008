"""Claims: a loss that is not finite is no dead end. What changes the curve may change when the run
goes on, and only then; each command that the message tells works; what was changed is written down
and holds; in fp16 a forward pass that overflows is skipped like a gradient that does."""

import json
import math
import re
import shlex
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

import train_pretrain
import train_sft
from evaluation.report import loss_curve
from extras import runs
from extras.report import write_report
from model.pretrained.checkpoint import checkpoints, newest_checkpoint, read_run
from tests.test_precision import start_at
from tests.test_resume import Killed, die_in_step
from tests.tiny import make_world, metrics, torchrun
from training.run_metadata import read_lines

SFT = ["--model", "none", "--train_language", "all"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """12 steps of two rows, each of them saved."""
    world = make_world(tmp_path_factory.mktemp("world"))
    return [*world, "--steps", "12", "--save_steps", "1", "--save_total_limit", "9"]


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """-> its directory, what was said: the first update makes weights that fp16 cannot hold. It
    comes late, for steps are skipped until the scale of the loss is found."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as reason:
        start_at(patch, 2.0**20)
        train_sft.main([*world, *SFT, "--dtype", "fp16", "--learning_rate", "3e18",
                        "--warmup_ratio", "0.9", "--out", str(out)])
    return out, str(reason.value)


@pytest.fixture
def out(stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path / "out")
    return tmp_path / "out"


def resume(out, *flags, script=train_sft):
    script.main(["--resume", "--out", str(out), *flags])


def run_json(out):
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def commands(told: str) -> list[str]:
    found = re.findall(r"python train_\w+\.py .*?(?= or in float32: | \(--max_grad_norm| or in "
                       r"the|$)", told)
    assert found, told
    return found


def carry_out(command: str, old=None, new=None) -> None:
    """A command that was told; old: a directory in it that stands for `new` here."""
    words = [word.replace(str(old), str(new)) if old else word for word in shlex.split(command)]
    assert words[0] == "python" and words[1] in ("train_sft.py", "train_pretrain.py")
    (train_sft if words[1] == "train_sft.py" else train_pretrain).main(words[2:])


# ---------------------------------------------------------------- the way out


def test_the_stop_is_written_down_and_its_checkpoint_is_good(stopped):
    out, told = stopped
    launch, = run_json(out)["launches"]
    assert launch["not_finite_step"] == launch["last_step"] == len(checkpoints(out)) + 1
    assert "fp16 ends at 65,504" in told and "fp16 ends at 65,504" in launch["outcome"]
    assert f"The last checkpoint is good: {newest_checkpoint(out)}." in told
    saved = load_file(newest_checkpoint(out) / "model.safetensors")
    assert all(float(tensor.abs().max()) < 65504 for tensor in saved.values())


def test_the_command_with_a_lower_rate_ends_the_run_well(stopped, out):
    told = commands(stopped[1])
    assert len(told) == 2 and "--learning_rate 0.001" in told[0] and "--dtype fp32" in told[1]
    carry_out(told[0], stopped[0], out)
    assert len(metrics(out)) == 12 and newest_checkpoint(out).name == "step_000012"


def test_the_other_commands_lead_to_an_end_too(stopped, out):
    """float32 alone does not heal a rate of 3e18, but it goes on further, and saves weights with
    which no loss is finite. A lower rate stops there again; without that checkpoint it does not."""
    with pytest.raises(SystemExit) as second:
        carry_out(commands(stopped[1])[1], stopped[0], out)
    with pytest.raises(SystemExit) as third:
        carry_out(commands(str(second.value))[0])
    stops = [launch["not_finite_step"] for launch in run_json(out)["launches"]]
    assert stops == [5, 6, 6]
    subprocess.run(str(third.value).split("goes on from step_000004: ")[1], shell=True, check=True)
    carry_out(commands(str(third.value))[0])
    assert len(metrics(out)) == 12 and newest_checkpoint(out).name == "step_000012"
    assert all(math.isfinite(m["loss"]) for m in metrics(out))


@pytest.mark.parametrize("flags", [
    ["--learning_rate", "0.001"], ["--learning_rate", "0.001", "--dtype", "fp32"],
    ["--learning_rate", "0.001", "--dtype", "bf16", "--max_grad_norm", "0.5", "--warmup_ratio",
     "0.2"],
    ["--learning_rate", "0.001", "--projector_learning_rate", "0.002", "--vision_learning_rate",
     "0.003"]])
def test_what_changes_the_curve_may_change_and_is_written_down(out, flags, capsys):
    first = len(checkpoints(out)) + 1
    was = run_json(out)["settings"]
    resume(out, *flags)
    given = dict(zip((flag[2:] for flag in flags[::2]), flags[1::2]))
    told = capsys.readouterr().out
    for run in (run_json(out), read_run(newest_checkpoint(out))):
        changes = {change["setting"]: change for change in run["changes"]}
        assert changes.keys() == given.keys()
        for name, value in given.items():
            now = value if name == "dtype" else float(value)
            assert changes[name] == {"from_step": first, "setting": name, "before": was[name],
                                     "now": now}
            assert run["settings"][name] == now
            assert f"from step {first}: {name} is {now}, before it was {was[name]}" in told
    page = (out / "report.html").read_text()
    assert f"<td>changes: 1: from_step</td><td>{first}</td>" in page
    assert "<td>changes: 1: now</td><td>0.001</td>" in page
    rates = [m["learning_rate"] for m in metrics(out)[first - 1:]]
    peak = float(given.get("projector_learning_rate", 0.001))
    assert 0 < max(rates) <= max(peak, 0.001) and len(metrics(out)) == 12
    assert [launch["not_finite_step"] is None for launch in run_json(out)["launches"]] == [
        False, True]


def test_the_rates_of_all_parts_are_the_changed_ones(out):
    """Not those that the optimizer's saved state brings along."""
    resume(out, "--learning_rate", "0.001", "--projector_learning_rate", "0.002", "--steps", "6")
    state = torch.load(newest_checkpoint(out) / "training_state.pt", weights_only=True)
    peaks = {group["peak"] for group in state["optimizer"]["param_groups"]}
    assert peaks == {0.001, 0.002}


def test_a_later_resume_goes_on_with_what_was_changed(out):
    resume(out, "--learning_rate", "0.001", "--dtype", "fp32", "--steps", "6")
    changes = run_json(out)["changes"]
    resume(out, "--steps", "8")
    settings = run_json(out)["settings"]
    assert (settings["learning_rate"], settings["dtype"]) == (0.001, "fp32")
    assert run_json(out)["changes"] == changes and len(changes) == 2
    assert all(m["learning_rate"] <= 0.001 for m in metrics(out)[len(checkpoints(out)) - 4:])
    assert len(metrics(out)) == 8


def test_a_resume_killed_before_it_saved_has_changed_it_all_the_same(out, tmp_path, monkeypatch):
    shutil.copytree(out, tmp_path / "whole")
    change = ["--learning_rate", "0.001", "--dtype", "fp32", "--save_steps", "50"]
    resume(tmp_path / "whole", *change)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, 8)
        resume(out, *change)
    assert run_json(out)["launches"][0]["last_step"] > len(checkpoints(out)) == 4
    resume(out)
    assert [m["loss"] for m in metrics(out)] == [m["loss"] for m in metrics(tmp_path / "whole")]
    assert run_json(out)["changes"] == run_json(tmp_path / "whole")["changes"]
    assert run_json(out)["launches"][1]["ended"] is None


OTHER = {"learning_rate": "0.5", "projector_learning_rate": "0.5", "vision_learning_rate": "0.5",
        "warmup_ratio": "0.5", "max_grad_norm": "0.5", "dtype": "bf16"}


@pytest.mark.parametrize("name", OTHER)
def test_otherwise_nothing_of_it_may_change(world, out, name, monkeypatch):
    """After a kill, after an end, and after the step that had stopped it is passed; and nothing
    else may change even there."""
    with pytest.raises(SystemExit, match="--seed 5: the run to resume.*was started with 0"):
        resume(out, "--seed", "5")
    resume(out, "--learning_rate", "0.001", "--steps", "6")
    with pytest.raises(SystemExit, match=f"--{name} {OTHER[name]}: .*was started with"):
        resume(out, f"--{name}", OTHER[name])
    other = out.with_name("other")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, 3)
        train_sft.main([*world, *SFT, "--out", str(other)])
    with pytest.raises(SystemExit, match=f"--{name} {OTHER[name]}: .*was started with"):
        resume(other, f"--{name}", OTHER[name])


def test_the_scale_of_fp16_is_looked_for_anew_after_a_change(out):
    """It may have fallen to 1; and in float32 there is none."""
    state = newest_checkpoint(out) / "training_state.pt"
    content = torch.load(state, weights_only=True)
    content["trainer"].update(loss_scale=1.0, growth_tracker=7)
    torch.save(content, state)
    (newest_checkpoint(out) / "manifest.json").unlink()
    other = out.with_name("other")
    shutil.copytree(out, other)
    resume(out, "--learning_rate", "0.001", "--steps", "6")
    assert metrics(out)[4]["loss_scale"] == 2.0**16
    resume(other, "--learning_rate", "0.001", "--dtype", "fp32", "--steps", "6")
    assert "loss_scale" not in metrics(other)[4]
    state = torch.load(newest_checkpoint(other) / "training_state.pt",
                       weights_only=True)["trainer"]
    assert (state["loss_scale"], state["growth_tracker"], state["overflows"]) == (2.0**16, 0, 4)


def broken_from(monkeypatch, number: int, until: int = 10**9):
    """The loss of the steps from `number` on is NaN, and every gradient."""
    plain, steps = train_pretrain.backward, iter(range(1, 10**9))

    def backward(model, *arguments):
        loss = plain(model, *arguments)
        if not number <= next(steps) < until:
            return loss
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(math.nan)
        return loss * math.nan

    monkeypatch.setattr(train_pretrain, "backward", backward)


@pytest.mark.parametrize("script", [train_pretrain, train_sft])
def test_without_a_checkpoint_it_says_so_and_the_command_starts_again(world, tmp_path, script,
                                                                      monkeypatch):
    flags = [*world, "--dtype", "bf16", "--out", str(tmp_path / "an out"), "--steps", "2"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as reason:
        broken_from(patch, 1)
        script.main([*flags, *(SFT if script is train_sft else [])])
    told = str(reason.value)
    assert "There is no checkpoint yet" in told and "is good" not in told
    for command, name, value in zip(commands(told), ("learning_rate", "dtype"), (0.001, "fp32"),
                                    strict=True):
        carry_out(command)
        assert run_json(tmp_path / "an out")["settings"][name] == value
        assert len(metrics(tmp_path / "an out")) == 2


def test_a_second_stop_at_the_same_step_goes_on_from_an_older_checkpoint(world, tmp_path,
                                                                         monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        broken_from(patch, 4)
        train_pretrain.main([*world, "--out", str(out)])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as reason:
        broken_from(patch, 1)
        resume(out, "--learning_rate", "0.005", script=train_pretrain)
    told = str(reason.value)
    assert "step 4: the loss is nan" in told
    subprocess.run(told[told.index("mv "):], shell=True, check=True)
    command, = commands(told)  # in float32 already
    assert f"--learning_rate {0.0005:g}" in command and "fp32" not in command
    carry_out(command)
    assert run_json(out)["changes"] == [
        {"from_step": 3, "setting": "learning_rate", "before": 0.01, "now": 0.0005}]
    assert len(metrics(out)) == 12 and newest_checkpoint(out).name == "step_000012"


def test_a_rate_of_its_own_is_lowered_too(world, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as reason:
        broken_from(patch, 3)
        train_sft.main([*world, *SFT, "--projector_learning_rate", "0.0002", "--out",
                        str(tmp_path)])
    command, = commands(str(reason.value))
    assert command.endswith("--learning_rate 0.001 --projector_learning_rate 2e-05"), command
    carry_out(command)
    assert len(metrics(tmp_path)) == 12


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_that_are_not_finite_are_never_saved(world, tmp_path, dtype):
    """Adam's update has the size of the rate, here the largest number of float32."""
    with pytest.raises(SystemExit, match="after its update .* holds .*inf.*It was not saved"):
        train_sft.main([*world, *SFT, "--dtype", dtype, "--learning_rate", "3.4e38",
                        "--warmup_ratio", "0.3", "--out", str(tmp_path)])
    for checkpoint in checkpoints(tmp_path):
        saved = load_file(checkpoint / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in saved.values())


# ---------------------------------------------------------------- fp16


def test_a_forward_pass_that_overflows_is_skipped_as_torchs_scaler_would(world, tmp_path,
                                                                         monkeypatch, capsys):
    broken_from(monkeypatch, 3, until=5)
    train_sft.main([*world, *SFT, "--dtype", "fp16", "--out", str(tmp_path), "--max_grad_norm",
                    "10"])
    theirs, weight = torch.amp.GradScaler("cpu", init_scale=2.0**16), torch.nn.Parameter(
        torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    told = metrics(tmp_path)
    skipped = [m["step"] for m in told if m["grad_norm"] is None]
    assert {3, 4} <= set(skipped)
    for line in told:
        assert line["loss_scale"] == theirs.get_scale(), line
        theirs.scale(weight.sum() * (math.nan if line["step"] in skipped else 1)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
    assert [m["step"] for m in told if m["loss"] is None] == [3, 4]
    assert told[-1]["overflows"] == len(skipped) and len(told) == 12
    saved = [load_file(path / "model.safetensors") for path in checkpoints(tmp_path)]  # 4 to 12
    assert not all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert all(tensor.isfinite().all() for tensor in saved[-1].values())
    said = capsys.readouterr().out
    assert f"12 steps ({len(skipped)} skipped: fp16 overflowed)" in said and "no report" not in said
    # What is written is JSON, to the letter.
    for file in ("metrics.jsonl", "summary.json"):
        assert "NaN" not in (tmp_path / file).read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best_loss"] == min(m["loss"] for m in told if m["loss"] is not None)


def test_figures_leave_a_skipped_loss_out(world, tmp_path, monkeypatch):
    broken_from(monkeypatch, 12)
    train_pretrain.main([*world, "--dtype", "fp16", "--out", str(tmp_path / "run")])
    run = runs.read_run(tmp_path / "run")
    assert run.metrics[-1]["loss"] is None
    monkeypatch.setattr(runs, "REFERENCES", tmp_path)
    known = run.metrics[10]["loss"]
    kept = read_lines(runs.keep_reference(run, "kept"))
    assert kept[-1] == {"step": 11.0, "loss": round(known, 4)}
    last_known = sum(m["loss"] for m in run.metrics[:11]) / 11
    assert f"loss over the last 20 steps {last_known:.4g}" in write_report([tmp_path / "run"]
                                                                           ).read_text()
    write_report([tmp_path / "run", tmp_path / "run"], tmp_path / "compare.html")
    loss_curve({"one": tmp_path / "run" / "metrics.jsonl"}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size


def test_what_overflows_for_ever_stops_and_float32_goes_on(world, tmp_path, monkeypatch):
    """2**16 is halved 16 times."""
    flags = [*world, "--dtype", "fp16", "--steps", "30", "--out", str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as reason:
        broken_from(patch, 4)
        train_pretrain.main(flags)
    assert "step 20: the loss is nan" in str(reason.value)
    assert [m["loss_scale"] for m in metrics(tmp_path)][2:] == [2.0**n for n in range(16, -1, -1)][
        :1] + [2.0**n for n in range(16, 0, -1)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="step 20: the loss is"):
        broken_from(patch, 1)
        resume(tmp_path, script=train_pretrain)  # nothing changed: it stops there again, at once
    carry_out(commands(str(reason.value))[1])
    assert len(metrics(tmp_path)) == 30 and "loss_scale" not in metrics(tmp_path)[-1]
    assert json.loads((tmp_path / "summary.json").read_text())["overflow_steps"] == 16


def test_a_weight_that_fp16_cannot_hold_stops_at_once(world, tmp_path, monkeypatch):
    """No scale helps against it, so no step is skipped."""
    plain = train_pretrain.backward

    def backward(model, *arguments):
        model.projector.fc1.weight.data[0, 0] = 1e5
        return plain(model, *arguments)

    monkeypatch.setattr(train_pretrain, "backward", backward)
    with pytest.raises(SystemExit, match=r"step 1: the loss is .*; projector\.fc1\.weight holds "
                                         r"1e\+05, and fp16 ends at 65,504"):
        train_pretrain.main([*world, "--dtype", "fp16", "--out", str(tmp_path), "--batch_size",
                             "6"])
    assert metrics(tmp_path) == []


ONE_RANK = """
import math, os, sys
import train_pretrain, train_sft
plain, calls = train_pretrain.backward, []
first, last = map(int, sys.argv[1:3])
def backward(model, *arguments):
    loss = plain(model, *arguments)
    calls.append(loss)
    if first <= len(calls) <= last and os.environ["RANK"] == "1":
        next(p for p in model.parameters() if p.requires_grad).grad.mul_(math.nan)
        return loss * math.nan
    return loss
train_pretrain.backward = backward
train_sft.main(sys.argv[3:])
"""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_skip_the_same_and_stop_at_the_same_step(world, tmp_path, parallel):
    script = tmp_path / "script.py"
    script.write_text(ONE_RANK)
    two, out = ["--standalone", "--nproc_per_node", "2"], tmp_path / "out"
    flags = [*world, *SFT, "--dtype", "fp16", "--max_grad_norm", "10", "--out", out, "--parallel",
             parallel]
    done = torchrun(two, script, 2, 3, *flags, "--steps", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [m["loss"] is None for m in metrics(out)] == [False, True, True, False, False]
    done = torchrun(two, script, 2, 99, *flags, "--steps", "30")
    assert done.returncode == 1 and "the loss is nan" in done.stderr, done.stdout + done.stderr
    launch, = run_json(out)["launches"]
    assert launch["not_finite_step"] == launch["last_step"] + 1 == len(metrics(out)) + 1
    assert "torchrun --nproc_per_node 2 train_sft.py --resume --out" in launch["outcome"]
    done = torchrun(two, script, 99, 99, "--resume", "--out", out, "--dtype", "fp32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_json(out)["changes"][0]["now"] == "fp32" and len(metrics(out)) == 30
