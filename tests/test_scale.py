"""Claims: an index is numbers, not objects; workers share it, and so do ranks; many shards hold
one slice; each source comes as often as its weight says, on any number of ranks and workers; a
worker that dies ends the run with the sample it was at."""

import gc
import json
import os
import pickle
import re
import signal
from collections import Counter
from multiprocessing import active_children, resource_sharer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import dataset.images
import train_pretrain
from dataset.batching import Batches
from dataset.readers import index_cache, parquet
from dataset.readers.formats import open_data
from dataset.readers.json_files import RecordIndex
from dataset.readers.mixture import open_mixture
from dataset.readers.parquet import ParquetData
from model.pretrained.checkpoint import newest_checkpoint
from tests.test_training import prepare
from tests.tiny import make_data, make_world, metrics, torchrun
from training.data import matching


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_an_index_costs_24_bytes_a_line(tmp_path):
    """A dictionary or a list of numbers would cost some hundred."""
    line = b'{"messages": [{"role": "user", "content": "u"}]}\n'
    (tmp_path / "data.jsonl").write_bytes(line * 200_000)
    data = open_data(tmp_path / "data.jsonl")
    assert len(data) == 200_000 and data[199_999].where.endswith(":200000")
    assert data.records.numbers.nbytes == 200_000 * 24
    # What a spawned worker is handed. Forked ones share the pages: the next test.
    assert len(pickle.dumps(data)) < 200_000 * 24 * 1.01


def private_bytes() -> int:
    """Memory of this process that it shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(re.search(r"(\d+) kB", line)[1]) for line in lines
               if line.startswith("Private_")) * 1024


class Reading:
    """A data set for a DataLoader: reads samples -> what the worker has for itself by that."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        before = private_bytes()  # of the suite's own heap, some pages are a worker's at once
        for place in range(0, len(self.data), len(self.data) // 50):
            self.data[place]
        for place in range(0, len(self.data), 10):  # every page of the index
            self.data.records.where(place)
        return private_bytes() - before


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells it")
def test_forked_workers_share_the_index(tmp_path):
    """Four million lines, 96 MB of numbers; the file itself is one line that all of them name."""
    line = b'{"messages": [{"role": "user", "content": "u"}]}'
    (tmp_path / "data.jsonl").write_bytes(line)
    data = open_data(tmp_path / "data.jsonl")
    count = 4_000_000
    data.records = RecordIndex(data.records.file, np.tile([0, len(line), 1], count))
    gc.collect()
    loader = DataLoader(Reading(data), batch_size=None, sampler=[0, 1], num_workers=2,
                        multiprocessing_context="fork")
    for own in loader:
        assert own < 20e6, f"a worker has {own / 1e6:.0f} MB for itself"


SHARING = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace
from dataset.readers import json_files
from tests.test_scale import private_bytes
from training.data import open_data
from training.distributed import start_distributed

for name in ("index_lines", "index_array", "index_coco"):
    def told(file, name=name, compute=getattr(json_files, name)):
        print(name, "by", os.environ["RANK"], file=sys.stderr, flush=True)
        return compute(file)
    setattr(json_files, name, told)

settings = SimpleNamespace(data=sys.argv[1:], image_folder=None, seed=0, eval_data=None,
                           eval_samples=None, eval_steps=0, overfit=None, follow_links=False)
with start_distributed() as ranks:
    ranks.sum(1)  # what the first message of all needs is not the index's
    before = private_bytes()
    data, facts, held_out = open_data(settings, "pretrain", ranks)
    grown = private_bytes() - before
    told = [data[i].where for i in range(0, len(data), len(data) // 99)]
    # a file for each: lines that two ranks print at once may run into each other
    Path(f"{sys.argv[1]}.rank{ranks.rank}").write_text(json.dumps(
        [len(data), facts, grown, told]))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux tells it")
def test_the_ranks_of_a_machine_share_one_index(tmp_path):
    """Three kinds of file, 36 MB of index in all: one rank makes it, each gets the same samples,
    nobody has the index for itself, and the next run finds it."""
    row = '{"messages": [{"role": "user", "content": "u"}]}'
    images = [{"id": number, "file_name": "a.png"} for number in range(1000)]
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "lines").write_text(f"{row}\n" * 600_000)
    (tmp_path / "array").write_text(f"[{','.join([row] * 400_000)}]")
    (tmp_path / "coco").write_text(json.dumps({"images": images, "annotations": [
        {"image_id": n % 1000, "caption": "A cat."} for n in range(500_000)]}))
    (tmp_path / "sharing.py").write_text(SHARING)
    files = [str(tmp_path / name) for name in ("lines", "array", "coco")]
    (tmp_path / "temporary").mkdir()
    alone = open_mixture(files)
    told = [alone[i].where for i in range(0, len(alone), len(alone) // 99)]
    for made in (["index_lines by 0", "index_array by 0", "index_coco by 0"], []):
        done = torchrun(["--standalone", "--nproc_per_node", "2"], tmp_path / "sharing.py", *files,
                        TMPDIR=str(tmp_path / "temporary"))
        assert done.returncode == 0, done.stderr
        assert re.findall("index_.* by .", done.stderr) == made
        for rank in range(2):
            count, facts, grown, found = json.loads((tmp_path / f"lines.rank{rank}").read_text())
            assert (count, found) == (len(alone), told)
            assert [len(file["sha256"]) for file in facts["files"]] == [64] * 3
            if rank or not made:  # whoever makes the index needs memory for it meanwhile
                assert grown < 10e6, f"{grown / 1e6:.0f} MB of its own"
    (tmp_path / "lines").write_text(f"{row}\n" * 50_000)
    assert len(open_mixture(files[:1])) == 50_000, "a file that has changed is read anew"


def test_an_index_without_room_or_of_somebody_else_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(index_cache.tempfile, "gettempdir", lambda: str(tmp_path / "nowhere"))
    big, (file, small) = np.arange(1 << 18), (tmp_path / "big.jsonl", tmp_path / "small.jsonl")
    file.write_bytes(bytes(1 << 24))
    small.write_bytes(b"{}")
    assert index_cache.cached("a", file, lambda: big) is big
    monkeypatch.setattr(index_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    assert index_cache.cached("a", small, lambda: big) is big, "of a small file nothing is kept"
    assert isinstance(index_cache.cached("a", file, lambda: big), np.memmap)
    assert index_cache.cached("a", file, None).tolist() == big.tolist()
    assert index_cache.cached("b", file, lambda: big[:5]).tolist() == [0, 1, 2, 3, 4]
    (kept,) = tmp_path.glob("vlm-index*/*")  # small arrays are not kept; nothing is left behind
    kept.write_bytes(b"torn")
    assert index_cache.cached("a", file, lambda: big).tolist() == big.tolist()
    monkeypatch.setattr(index_cache, "user", lambda: -1)
    assert index_cache.cached("a", file, lambda: big) is big


def test_many_shards_share_one_buffer(tmp_path, monkeypatch):
    """data/*.parquet: every shard is found, in order; what is kept of all is two pools at most."""
    for number in range(12):
        turns = [[{"role": "user", "content": f"{number}-{row}"}] for row in range(5)]
        pq.write_table(pa.table({"messages": turns}), tmp_path / f"part-{number:02}.parquet")
    files = matching(f"{tmp_path}/*.parquet")
    mixed = open_mixture(files)
    assert [s.messages[0].content for s in mixed] == [
        f"{number}-{row}" for number in range(12) for row in range(5)]
    for i in (0, 31, 5, 59, 30):
        mixed[i]
    monkeypatch.setattr(parquet, "POOL", 0)  # then it is one slice of one file
    ParquetData.buffer.clear()
    for i in (7, 31, 32):
        assert mixed[i].where.endswith(f":{i % 5 + 1}")
    assert list(ParquetData.buffer) == mixed.sources[6].data.slices


def test_each_source_comes_as_often_as_its_weight_says(world, tmp_path):
    """Two ranks, two workers, three epochs: together every rank sees each sample just so often,
    in another order each time, and the same when it is asked again."""
    for name in "abc":
        (tmp_path / name).mkdir()
    files = [make_data(tmp_path / name, count) for name, count in (("a", 24), ("b", 12), ("c", 8))]
    _, parts, _ = prepare(world)
    weights = {files[0]: 0.5, files[1]: 1, files[2]: 3}

    def order(epoch, world_size=2, workers=2):
        data = open_mixture([f"{file}:{weight}" for file, weight in weights.items()], seed=7)
        return [[where for batch, bad in Batches(
            data, parts.template, parts.processor, 4, 128, 7, rank, world_size, workers)
            .epoch(epoch) for where in batch.where] for rank in range(world_size)]

    total, orders = Counter(), []
    for epoch in range(2):
        ranks = order(epoch)
        orders.append(ranks)
        seen = [where for rank in ranks for where in rank]
        per_source = Counter(where.rsplit(":", 1)[0] for where in seen)
        assert per_source == {files[0]: 12, files[1]: 12, files[2]: 24}, "in each epoch"
        total.update(seen)
    assert dict(total) == {
        f"{file}:{line}": 2 * weights[file] for file, count in zip(files, (24, 12, 8))
        for line in range(1, count + 1)}, "the halves of two epochs make a whole"
    assert orders[0] != orders[1]
    assert order(1, workers=0) == orders[1], "seed and epoch decide, not the workers"


def die(how):
    def load_image(source, draft=None):
        if torch.utils.data.get_worker_info() and "blue" in str(source):
            if how == "raise":
                raise KeyError("a mistake")
            os.kill(os.getpid(), how)
        return plain(source)

    plain = dataset.images.load_image
    return load_image


@pytest.mark.parametrize("how, told", [
    # PyTorch tells the signal, or, where it finds the worker gone before the signal comes, less.
    (signal.SIGKILL, "is killed by signal: Killed|exited unexpectedly"),
    (signal.SIGSEGV, "is killed by signal: Segmentation fault|exited unexpectedly"),
    ("raise", "KeyError")])
def test_a_worker_that_dies_is_reported_with_its_sample(world, tmp_path, monkeypatch, how, told):
    """One line shows the blue picture; whoever opens that dies. Saved before: step 1."""
    lines = [line for line in Path(world[5]).read_text().splitlines() if "blue" not in line]
    blue = next(line for line in Path(world[5]).read_text().splitlines() if "blue" in line)
    (tmp_path / "data.jsonl").write_text("\n".join([*lines[:8], blue, *lines[8:]]))
    flags = [*world, "--data", str(tmp_path / "data.jsonl"), "--image_folder",
             str(Path(world[5]).parent), "--num_workers", "1", "--steps", "50", "--save_steps", "1",
             "--out", str(tmp_path / "out")]
    monkeypatch.setattr("dataset.images.load_image", die(how))
    with pytest.raises(RuntimeError if how == "raise" else SystemExit) as stopped:
        train_pretrain.main(flags)
    text = str(stopped.value)
    assert re.search(told, text) and f"at {tmp_path}/data.jsonl:9" in text
    launch, = json.loads((tmp_path / "out" / "run.json").read_text())["launches"]
    assert "data.jsonl:9" in launch["outcome"], "run.json tells it too"
    if newest_checkpoint(tmp_path / "out"):  # the line may come in the very first step
        monkeypatch.undo()
        train_pretrain.main(["--resume", "--steps", "12", "--out", str(tmp_path / "out")])
        assert len(metrics(tmp_path / "out")) == 12


@pytest.mark.parametrize("lost", [1, 2])
def test_a_worker_that_dies_while_its_batch_is_on_the_way(world, tmp_path, monkeypatch, lost):
    """Then it is the connection that breaks first, for each batch that it had sent."""
    plain, calls = resource_sharer._resource_sharer.get_connection, []

    def get_connection(place):
        calls.append(place)
        if len(calls) == 5:  # no longer the first batch's
            newest = max(active_children(), key=lambda worker: worker.pid)
            newest.kill()  # earlier tests may have left others behind
        if 5 <= len(calls) < 5 + lost:
            raise ConnectionResetError(104, "Connection reset by peer")
        return plain(place)

    monkeypatch.setattr(resource_sharer._resource_sharer, "get_connection", get_connection)
    with pytest.raises(SystemExit) as stopped:
        train_pretrain.main([*world, "--num_workers", "1", "--out", str(tmp_path)])
    assert re.search(r"which prepares data, .* it was at \S+:\d+\.", str(stopped.value))


DYING = """
import os, signal, sys
import dataset.images, train_pretrain
from torch.utils.data import get_worker_info
plain = dataset.images.load_image
def load_image(source, draft=None):
    if get_worker_info() and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(source)
dataset.images.load_image = load_image
train_pretrain.main(sys.argv[1:])
"""


def test_a_worker_of_one_rank_ends_all_ranks(world, tmp_path):
    """torchrun itself would wait 300 s in this test; a hang would be an error of subprocess."""
    (tmp_path / "dying.py").write_text(DYING)
    done = torchrun(["--standalone", "--nproc_per_node", "2"], tmp_path / "dying.py", *world,
                    "--num_workers", "1", "--out", tmp_path / "out")
    assert done.returncode != 0
    assert re.search(r"stopped: process \d+, which prepares data, .* it was at \S+data\.jsonl:\d+",
                     done.stderr), done.stderr
