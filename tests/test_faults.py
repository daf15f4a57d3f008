"""Claims: whatever happens to a run, it loses no more than the steps since its last checkpoint.

    fault                                    what happens
    ---------------------------------------  -----------------------------------------------------
    SIGKILL in a step                        --resume: the same metrics.jsonl, to the last bit
    SIGKILL at any file of a save            the half-written one has another name; as above
    SIGKILL while an old one is deleted      it has another name by then; as above
    SIGKILL while a resume cuts metrics      the file is replaced in one move; as above
    SIGTERM, SIGINT, to one or to all its    the step is finished and saved, the command that goes
      processes, workers included            on is printed, exit status 0; as above
    the same to one rank under torchrun      all ranks stop after the same step, exit status 0
    a second signal                          the process ends at once; the last checkpoint is good
    newest checkpoint truncated, changed,    named on stderr, the one before is used, by --resume
      a file gone, its manifest torn           (which moves it aside) and by eval.py and --model RUN
    every checkpoint torn                    one error, with the file's name
    a checkpoint without a manifest          is loaded as it is
    disk full, file size limit reached       one message, exit status 1, nothing half-written left,
                                             older checkpoints whole; with room again: as above
    a torn one newer than what is saved      --save_total_limit counts up to the saved one: never
                                             the last good

Processes are forked, not started: that costs a fraction of a second instead of many.
"""

import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback

import pytest

import train_pretrain
import train_sft
from model.pretrained.checkpoint import (
    CorruptCheckpointError,
    check_whole,
    checkpoints,
    find_model,
    newest_checkpoint,
    newest_whole,
)
from tests.test_resume import same_weights
from tests.tiny import curve, make_world, metrics, torchrun
from training.log import Log

LORA = ["--lora", "--lora_dropout", "0.2"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """9 micro-batches an epoch, in steps of 3: 8 steps, the last of 2; bf16, and a worker."""
    world = make_world(tmp_path_factory.mktemp("world"), count=34)
    world[world.index("--steps"):world.index("--steps") + 2] = ["--epochs", "2.5"]
    return [*world, "--batch_size", "4", "--gradient_accumulation_steps", "3", "--model", "none",
            "--dtype", "bf16",
            "--num_workers", "1", "--save_steps", "2", "--save_total_limit", "2"]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """{script: its uninterrupted run}"""
    out = tmp_path_factory.mktemp("whole")
    train_pretrain.main([*world, "--out", str(out / "pretrain")])
    train_sft.main([*world, *LORA, "--out", str(out / "sft")])
    assert len(curve(out / "sft")) == 8
    return {train_pretrain: out / "pretrain", train_sft: out / "sft"}


def start(script, flags, told, prepare=lambda: None) -> int:
    """Run a script in a process of its own, and process group; its words go to the file `told`."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        os.setpgrp()
        words = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(words, 1), os.dup2(words, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        prepare()
        script.main(flags)
        status = 0
    except SystemExit as ended:
        print(ended)
        status = 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def end(process: int) -> int:
    """-> exit status; minus the signal's number, if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die_at(event: str, path: str, times: int = 1):
    """SIGKILL right before the process does this to a file, for the `times`-th time."""
    def prepare():
        count = 0

        def hook(name, arguments):
            nonlocal count
            if name == event and re.search(path, str(arguments[0])):
                count += 1
                if count == times:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
    return prepare


def in_step(number: int, act):
    """Call act() when step `number` has been written down."""
    def prepare():
        plain = Log.step

        def step(self, at, figures):
            plain(self, at, figures)
            if at == number:
                act()
        Log.step = step
    return prepare


@pytest.mark.parametrize("event, path", [
    ("os.mkdir", r"\.partial_step_000004$"),  # before the first file
    ("open", r"\.partial_step_000004/config\.json"),  # weights are there, and nothing else
    ("open", r"\.partial_step_000004/manifest\.json"),  # all files but the list of them
    ("os.rename", r"\.partial_step_000004$"),  # complete, but for its name
    ("os.rename", r"/step_000002$"),  # the third one is there; the oldest is about to go
    ("os.rmdir", r"\.deleted_step_000002"),  # its files are gone, the directory is not
])
def test_killed_while_it_saves(world, whole, tmp_path, event, path):
    flags = [*world, *LORA, "--out", str(tmp_path / "out")]
    assert end(start(train_sft, flags, tmp_path / "told", die_at(event, path))) == -signal.SIGKILL
    for checkpoint in checkpoints(tmp_path / "out"):
        check_whole(checkpoint)
    train_sft.main(["--resume", "--out", str(tmp_path / "out")])
    assert curve(tmp_path / "out") == curve(whole[train_sft])
    assert same_weights(tmp_path / "out", whole[train_sft])
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]


def test_killed_again_and_again(world, whole, tmp_path):
    """Each resume is killed too: at some file, at some moment, and while it cuts metrics.jsonl."""
    out, draw = tmp_path / "out", random.Random(4)
    flags = [*world, "--resume", "--out", str(out)]
    killed = 0
    for times in draw.sample(range(10, 60), 3):
        killed += end(start(train_pretrain, flags, tmp_path / "told",
                            die_at("open", str(out), times))) == -signal.SIGKILL
    for _ in range(3):
        process = start(train_pretrain, flags, tmp_path / "told")
        time.sleep(draw.uniform(0.2, 1.5))
        os.killpg(process, signal.SIGKILL)
        killed += end(process) == -signal.SIGKILL
    if out.exists() and len(metrics(out)) == 8:  # the last ones came too late
        shutil.rmtree(newest_checkpoint(out))
    process = start(train_pretrain, flags, tmp_path / "told", die_at("os.rename", "/.metrics"))
    killed += end(process) == -signal.SIGKILL
    assert killed > 3, "most of them were in time"
    train_pretrain.main(flags)
    assert curve(out) == curve(whole[train_pretrain])
    assert same_weights(out, whole[train_pretrain])


@pytest.mark.parametrize("number, to_all", [
    (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_asked_to_stop(world, whole, tmp_path, number, to_all):
    """To all: as a terminal, Slurm or systemd does it; the worker must go on serving the step."""
    flags, told = [*world, *LORA, "--out", str(tmp_path / "out")], tmp_path / "told"
    kill = (lambda: os.killpg(0, number)) if to_all else (lambda: os.kill(os.getpid(), number))
    assert end(start(train_sft, flags, told, in_step(2, kill))) == 0, told.read_text()
    assert len(metrics(tmp_path / "out")) == 3, "the step after it was begun, and is finished"
    assert newest_checkpoint(tmp_path / "out").name == "step_000003"
    program, script, *rest = shlex.split(told.read_text().splitlines()[-1])
    assert (program, script) == ("python", "train_sft.py")
    train_sft.main(rest)
    # Without the figures of the clock, and with one more checkpoint, it is the same run.
    assert curve(tmp_path / "out") == curve(whole[train_sft])
    assert same_weights(tmp_path / "out", whole[train_sft])


def test_a_second_signal_ends_at_once(world, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    flags = [*world, "--out", str(tmp_path / "out")]
    process = start(train_pretrain, flags, tmp_path / "told", in_step(3, twice))
    assert end(process) == -signal.SIGTERM
    assert newest_whole(tmp_path / "out").name == "step_000002"


STOPPED_RANK = """
import os, signal, train_pretrain
plain, calls = train_pretrain.backward, []
def backward(*arguments):
    calls.append(1)
    if len(calls) == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return plain(*arguments)
train_pretrain.backward = backward
train_pretrain.main()
"""


def test_one_of_two_ranks_is_asked_and_one_process_goes_on(world, tmp_path):
    """Rank 1 gets the signal in step 2. The rest is done by one process, with the same samples."""
    script = tmp_path / "script.py"
    script.write_text(STOPPED_RANK)
    flags = [*world, "--dtype", "fp32", "--num_workers", "0", "--log_samples"]
    done = torchrun(["--standalone", "--nproc_per_node", "2"], script, *flags, "--batch_size", "2",
                    "--out", tmp_path / "two")
    assert done.returncode == 0, done.stdout + done.stderr
    command = "torchrun --nproc_per_node 2 train_pretrain.py --resume --out"
    assert command in done.stdout and len(metrics(tmp_path / "two")) == 2
    train_pretrain.main([*flags, "--out", str(tmp_path / "two"), "--resume"])
    train_pretrain.main([*flags, "--out", str(tmp_path / "one")])
    told = [[json.loads(line) for line in (tmp_path / run / "samples.jsonl").open()]
            for run in ("one", "two")]
    assert [(line["step"], line["epoch"], sorted(line["samples"])) for line in told[0]] == [
        (line["step"], line["epoch"], sorted(line["samples"])) for line in told[1]]
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert one["learning_rate"] == two["learning_rate"]


# ---------------------------------------------------------------- torn files


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    """As many bytes, one of them another: what a disk may do."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


TORN = [("model.safetensors", truncate), ("model.safetensors", flip), ("config.json", flip),
        ("training_state.pt", truncate), ("tokenizer.json", os.remove),
        ("manifest.json", truncate), ("run.json", lambda path: path.write_bytes(b""))]


@pytest.mark.parametrize("file, tear", TORN)
def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(whole, tmp_path, capsys, file, tear):
    out = tmp_path / "out"
    shutil.copytree(whole[train_sft], out)
    tear(out / "step_000008" / file)
    assert find_model(str(out)).name == newest_whole(out).name == "step_000006"
    told = capsys.readouterr().err
    assert f"step_000008/{file}" in told and "step_000006 instead" in told
    with pytest.raises(CorruptCheckpointError, match=f"step_000008/{file}"):
        find_model(str(out / "step_000008"))  # asked for by name: no other will do
    tear(out / "step_000006" / file)
    with pytest.raises(CorruptCheckpointError, match=f"no checkpoint in .*step_000008/{file}"):
        find_model(str(out))
    with pytest.raises(SystemExit, match="no checkpoint in .* starts anew"):
        train_sft.main(["--resume", "--out", str(out)])


def test_resume_from_the_one_before(whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole[train_sft], out)
    truncate(out / "step_000008" / "training_state.pt")
    train_sft.main(["--resume", "--save_total_limit", "1", "--out", str(out)])
    assert curve(out) == curve(whole[train_sft]) and same_weights(out, whole[train_sft])
    assert [path.name for path in checkpoints(out)] == ["step_000008"]
    assert (out / "torn_step_000008_1").is_dir()


def test_a_checkpoint_without_a_manifest_is_loaded(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[train_sft], out)
    shutil.rmtree(out / "step_000008")
    (out / "step_000006" / "manifest.json").unlink()
    train_sft.main(["--resume", "--out", str(out)])
    assert curve(out) == curve(whole[train_sft]) and same_weights(out, whole[train_sft])


def test_keep_never_removes_the_last_good_one(whole, tmp_path, capsys):
    """A torn one of a later step lies there, and the run that resumes saves more often."""
    out = tmp_path / "out"
    shutil.copytree(whole[train_sft], out)
    truncate(out / "step_000008" / "model.safetensors")
    from model.pretrained.checkpoint import save_checkpoint
    save_checkpoint(out, 7, {}, {}, {}, keep=1)
    assert [path.name for path in checkpoints(out)] == ["step_000007", "step_000008"]
    assert newest_whole(out).name == "step_000007"


# ---------------------------------------------------------------- full disks


def test_files_that_cannot_grow(world, whole, tmp_path):
    """RLIMIT_FSIZE: writing past it fails as on a full disk, here inside of model.safetensors."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    stopped_by_a_full_disk(world, whole, tmp_path / "out", tmp_path / "told", limit)


def test_a_full_disk(world, whole, tmp_path):
    """A real one, of one megabyte, where this process may mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs; test_files_that_cannot_grow shows the same")
    try:
        def fill():
            with open(disk / "other", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    os.truncate(file.fileno(), file.tell() - 8192)  # room for small files alone
        stopped_by_a_full_disk(world, whole, disk / "out", tmp_path / "told", fill,
                               lambda: (disk / "other").unlink())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def stopped_by_a_full_disk(world, whole, out, told, fill, make_room=lambda: None):
    flags = [*world, *LORA, "--out", str(out)]
    assert end(start(train_sft, flags, told, in_step(3, fill))) == 1, told.read_text()
    assert re.search("stopped: cannot save .*step_000004: .*make room, then go on with --resume",
                     told.read_text()), told.read_text()
    assert [path.name for path in checkpoints(out)] == ["step_000002"]
    assert not list(out.glob(".*"))
    check_whole(out / "step_000002")
    make_room()
    train_sft.main([*flags, "--resume"])
    assert curve(out) == curve(whole[train_sft]) and same_weights(out, whole[train_sft])
