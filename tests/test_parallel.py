"""Claims: sharing a model out changes nothing but who holds what; nobody waits for ever; a rank
that dies ends the others, or all start anew and go on."""

import argparse
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import train_pretrain
from model.pretrained.checkpoint import newest_checkpoint
from tests.parallel_worker import BATCH, CASES, LONGEST, RUNS, two_steps
from tests.test_resume import Killed, die_in_step
from tests.tiny import ROOT, environment, make_world, metrics, torchrun
from training.distributed import start_distributed, store_of_this_try
from training.messages import stopped

pytestmark = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"),
                                reason="torch 2.6 shares models out on GPUs only")
SHARED_OUT = [(number, case) for number, way, case in RUNS if way == "fsdp"]
HALF = ("half", "scaled")  # 8 and 11 bits
TWO = ["--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """24 samples, 4 to a micro-batch, all 6 of these to a step. Every third has no image, and the
    pictures of four are missing: on 4 ranks some batches have no image and some no row."""
    directory = tmp_path_factory.mktemp("world")
    flags = make_world(directory)
    lines = (directory / "data.jsonl").read_text().splitlines()
    for number in (1, 2, 10, 19):
        record = json.loads(lines[number])
        record["image"] = "missing.png"
        lines[number] = json.dumps(record)
    (directory / "data.jsonl").write_text("\n".join(lines))
    return [*flags, "--gradient_accumulation_steps", "6", "--max_skip_ratio", "1"]


@pytest.fixture(scope="module")
def shared(world, tmp_path_factory):
    """(number, way, case) -> what the worker left"""
    directory = tmp_path_factory.mktemp("shared")
    done = subprocess.run([sys.executable, ROOT / "tests" / "parallel_worker.py", directory,
                           *world], env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return lambda number, way, case: torch.load(directory / f"{number}_{way}_{case}.pt",
                                                weights_only=True)


@pytest.fixture(scope="module")
def alone(world):
    with start_distributed() as ranks:
        return {case: two_steps(ranks, [*world, "--batch_size", str(BATCH), *trained])
                for case, trained in CASES.items()}


def difference(ours: dict, theirs: dict) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize("number, way, case", RUNS)
def test_gradients_and_weights_are_those_of_one_process(shared, alone, way, number, case):
    told = shared(number, way, case)
    one = alone[case]
    assert sum(told["pictures"]) == sum(one["pictures"]) and 0 in told["pictures"]
    assert sum(told["rows"]) == sum(one["rows"])
    if number == 4 and way == "fsdp":
        assert 0 in told["rows"], "a rank without a row must keep in step"
    assert not told["frozen"], "no gradient for what is frozen"
    gradients = difference(told["gradients"], one["gradients"])
    weights = difference(told["weights"], one["weights"])
    print(f"{way} on {number}, {case}: gradients {gradients:.1e}, weights {weights:.1e}")
    if case in HALF:  # fsdp rounds the language model's norms, too
        ours, theirs = (torch.cat([g.flatten() for g in told["gradients"].values()])
                        for told in (told, one))
        relative = ((ours - theirs).norm() / theirs.norm()).item()
        print(f"gradients differ by {relative:.2%} of their length")
        assert relative < 0.02
    else:
        assert gradients < 1e-6
        assert weights < 1e-4  # Adam divides by the gradient's size: rounding is magnified


@pytest.mark.parametrize("number, case", SHARED_OUT)
def test_the_gradient_is_clipped_by_the_length_of_the_whole(shared, alone, number, case):
    told = shared(number, "fsdp", case)
    assert told["norm"] == pytest.approx(alone[case]["norm"], rel=0.02 if case in HALF else 1e-5)
    assert told["norm"] > LONGEST, "or nothing would be clipped"
    length = torch.cat([g.flatten() for g in told["clipped"].values()]).norm().item()
    assert length == pytest.approx(LONGEST, rel=1e-3)


@pytest.mark.parametrize("number, case", SHARED_OUT)
def test_each_rank_holds_its_share_and_no_more(shared, number, case):
    """Of all weights, frozen ones too; a tensor whose rows do not divide evenly costs a little."""
    copies = shared(number, "ddp", case)["numbers"]
    shares = shared(number, "fsdp", case)["numbers"]
    assert sum(shares) == copies[0], "together they hold the model once"
    assert max(shares) < 1.1 * copies[0] / number, (shares, copies)


@pytest.mark.parametrize("case", CASES)
def test_the_optimizers_state_is_the_same_whoever_held_it(shared, case):
    ddp, fsdp = (shared(2, way, case)["optimizer"] for way in ("ddp", "fsdp"))
    assert ddp["param_groups"] == fsdp["param_groups"]
    assert ddp["state"].keys() == fsdp["state"].keys()
    for number, state in ddp["state"].items():
        assert {n: t.shape for n, t in state.items()} == {
            n: t.shape for n, t in fsdp["state"][number].items()}
        assert state["step"] == 2, "fp16 skipped no step"
        if case not in HALF:
            assert difference(state, fsdp["state"][number]) < 1e-6


# A rank that the system kills without warning, in the first of torchrun's tries.
KILLED_ONCE = """
import os, signal, sys, train_pretrain
from training.log import Log
plain = Log.step
def step(self, number, figures):
    plain(self, number, figures)
    if number == 5 and os.environ["RANK"] + os.environ["TORCHELASTIC_RESTART_COUNT"] == "10":
        os.kill(os.getpid(), signal.SIGKILL)
Log.step = step
train_pretrain.main(sys.argv[1:])
"""


def test_one_process_then_two_with_shares_one_of_them_killed_then_one_again(
        world, tmp_path, monkeypatch):
    """A checkpoint does not know who wrote it; and torchrun starts anew from the newest one."""
    flags = [*world, "--gradient_accumulation_steps", "1", "--steps", "8", "--save_steps", "2",
             "--batch_size", "4",
             "--train_language", "all", "--eval_data", world[world.index("--data") + 1],
             "--eval_samples", "1", "--eval_steps", "8"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    train_pretrain.main([*flags, "--out", str(whole)])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, 3)
        train_pretrain.main([*flags, "--out", str(out)])

    assert newest_checkpoint(out).name == "step_000002"
    (tmp_path / "killed_once.py").write_text(KILLED_ONCE)
    done = torchrun([*TWO, "--max_restarts", "3"], tmp_path / "killed_once.py", "--resume",
                    "--parallel", "fsdp", "--batch_size", "2", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exitcode: -9" in done.stderr, done.stderr
    assert done.stdout.count("step 3/8") == 1, done.stdout
    assert done.stdout.count("8 steps of 4 samples") == 2, done.stdout
    assert "answers   none while it trains: under --parallel fsdp" in done.stdout

    shutil.rmtree(out / "step_000008")
    train_pretrain.main(["--resume", "--parallel", "ddp", "--batch_size", "4", "--out", str(out)])
    told, expected = metrics(out), metrics(whole)
    assert [m["step"] for m in told] == list(range(1, 9))
    for a, b in zip(told, expected):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4), (a, b)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), (a, b)
        assert a["supervised_tokens"] == b["supervised_tokens"]
    # One held-out sample: rank 1 had no row, and kept in step.
    ours, theirs = (json.loads((run / "evaluations.jsonl").read_text()) for run in (out, whole))
    assert ours == pytest.approx(theirs, abs=1e-4) and ours["samples"] == 1, ours
    names = [sorted(path.name for path in (run / "step_000008").iterdir()) for run in (out, whole)]
    assert names[0] == names[1]
    weights = [load_file(run / "step_000008" / "model.safetensors") for run in (out, whole)]
    assert len({str({n: (t.dtype, t.shape) for n, t in held.items()}) for held in weights}) == 1
    print(f"largest weight difference {difference(*weights):.1e}")
    assert difference(*weights) < 1e-4


FAILS = """
from training.distributed import start_distributed, store_of_this_try
with start_distributed() as ranks:
    ranks.barrier()
    if ranks.rank == 1:
        raise ValueError("rank 1 has lost its disk")
    while True:
        ranks.sum(1)
"""


def test_a_rank_that_fails_ends_all_and_speaks_first(tmp_path):
    """Else the screen fills with the complaints of those who lost it."""
    (tmp_path / "fails.py").write_text(FAILS)
    done = torchrun(TWO, tmp_path / "fails.py")
    assert done.returncode != 0
    assert done.stderr.startswith("rank 1 failed: Traceback"), done.stderr
    first = done.stderr.split("rank 0 failed")[0]
    assert "ValueError: rank 1 has lost its disk" in first, done.stderr
    summary = done.stderr[done.stderr.index("Root Cause"):]
    assert "rank      : 1" in summary and "rank 1 has lost its disk" in summary, done.stderr


def test_the_command_that_goes_on_on_two_machines(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "GROUP_WORLD_SIZE": "2",
                        "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    told = stopped(7, "sft", argparse.Namespace(out="out"))
    assert "step 7 is finished" in told and "on each machine and with the --rdzv flags" in told
    assert told.endswith("torchrun --nproc_per_node 8 --nnodes 2 train_sft.py --resume --out out")


def test_restarts_on_several_machines_need_a_new_store(monkeypatch):
    for name, value in {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3",
                        "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        store_of_this_try()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")  # what that variable brings about
    assert store_of_this_try() is None
