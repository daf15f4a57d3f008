"""Claims: two processes equal one, also when one of them has no image; bare torchrun works."""

import pytest
import torch
from safetensors.torch import load_file

import train_pretrain
from model.pretrained.checkpoint import newest_checkpoint
from tests.ranks_worker import TRAINED, gradients
from tests.tiny import ROOT, make_world, metrics, torchrun
from training.distributed import Distributed, gpu_of_rank, start_distributed


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return [*make_world(tmp_path_factory.mktemp("world")), "--gradient_accumulation_steps", "3"]


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """What two processes have left, each with half of the rows."""
    directory = tmp_path_factory.mktemp("two")
    flags, processes = [*world, "--batch_size", "1"], ["--standalone", "--nproc_per_node", "2"]
    for command in ([ROOT / "tests" / "ranks_worker.py", directory, *flags],
                    [ROOT / "train_pretrain.py", *flags, "--out", directory / "run"]):
        done = torchrun(processes, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.mark.parametrize("number", range(len(TRAINED)))
def test_gradients_of_two_processes_equal_one(world, two, number):
    """Three micro-batches; some of a rank's batches have no image at all."""
    told = torch.load(two / f"gradients_{number}.pt", weights_only=True)
    with start_distributed() as ranks:
        alone, images = gradients(ranks, [*world, *TRAINED[number]])
    assert sum(told["images"]) == sum(images) and 0 in told["images"], told["images"]
    difference = (told["gradients"] - alone).abs().max().item()
    print(f"largest gradient difference {difference:.1e} of {alone.abs().max():.1e}")
    assert difference < 1e-6, f"largest gradient difference {difference}"


def test_ranks_hold_equal_weights_after_three_steps(two):
    first, second = (torch.load(two / f"weights_{rank}.pt", weights_only=True)
                     for rank in (0, 1))
    unequal = [name for name in first if not torch.equal(first[name], second[name])]
    assert not unequal, unequal


def test_torchrun_equals_one_process(world, two, tmp_path):
    """A whole run of two processes against bare torchrun, which starts one."""
    done = torchrun([], ROOT / "train_pretrain.py", *world, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("step 6/6") == 1
    ours, theirs = metrics(tmp_path), metrics(two / "run")
    assert len(ours) == len(theirs) == 6, "one process writes the figures of all"
    for a, b in zip(ours, theirs):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4), (a, b)
        assert a["supervised_tokens"] == b["supervised_tokens"]
    weights = [load_file(newest_checkpoint(run) / "model.safetensors")
               for run in (tmp_path, two / "run")]
    difference = max((weights[0][n] - weights[1][n]).abs().max().item() for n in weights[0])
    assert difference < 1e-4, f"largest weight difference {difference}"


def test_more_processes_than_gpus(monkeypatch):
    """Else each of them would tell of an invalid device ordinal."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert [gpu_of_rank(rank, 2).index for rank in (0, 1)] == [0, 1]
    with pytest.raises(SystemExit, match="started 4 processes .* sees 2 GPUs .*_per_node 2; or"):
        gpu_of_rank(2, 2)
    with pytest.raises(SystemExit, match="sees 1 GPU for them"):
        gpu_of_rank(1, 1)


def test_ranks_that_do_not_start_alike_stop(world, tmp_path, monkeypatch):
    """A checkpoint that is torn on one machine, an --out that is not shared: they would drift."""
    def gather(self, items):
        return [*items, "step 7"] if "step 0" in str(items) else items

    monkeypatch.setattr(Distributed, "gather", gather)
    with pytest.raises(SystemExit, match="same point, but from .'step 0, .*, 'step 7'"):
        train_pretrain.main([*world, "--out", str(tmp_path)])


def test_the_same_start_is_compared_after_a_resume(world, tmp_path, monkeypatch):
    compared, plain = [], Distributed.check_same_start
    monkeypatch.setattr(Distributed, "check_same_start",
                        lambda self, step: compared.append(step) or plain(self, step))
    train_pretrain.main([*world, "--steps", "2", "--save_steps", "2", "--out", str(tmp_path)])
    train_pretrain.main([*world, "--steps", "3", "--out", str(tmp_path), "--resume"])
    assert compared == [0, 2]
