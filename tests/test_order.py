"""Claims: a shuffled epoch passes through a large Parquet file a pool of groups at a time, every
sample comes once, and a worker decodes each group once and keeps two pools at most."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_batching import PROCESSOR
from test_formats import MINIMIND, picture, write_lines, write_parquet

from dataset.batching import Batches
from dataset.chat import ChatTemplate
from dataset.readers import parquet, sampler
from dataset.readers.mixture import open_mixture
from dataset.readers.parquet import ParquetData
from dataset.readers.sampler import MIN_BUCKETS, buckets_in_window, epoch_order, row_groups
from dataset.tokenizer import Tokenizer

ROWS, GROUP = 240, 10


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Parquet in groups of ten rows, each row with its picture; and JSON Lines."""
    folder = tmp_path_factory.mktemp("files")
    write_parquet(folder / "p", [MINIMIND] * ROWS, GROUP, image_bytes=[
        picture() + i.to_bytes(2, "big") for i in range(ROWS)])
    text = [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant",
             "content": str(i)}]} for i in range(ROWS)]
    write_lines(folder / "j", *text)
    return folder


@pytest.fixture
def small_pools(files, monkeypatch):
    """Pools of about three groups."""
    size = row_groups(open_mixture([str(files / "p")]))[0][0][1]
    for module in (sampler, parquet):
        monkeypatch.setattr(module, "POOL", int(2.5 * size))
    return size


def drawn(data, seed=0):
    return epoch_order(data, np.random.default_rng(seed))


def test_small_files_and_other_formats_are_shuffled_as_a_whole(files):
    data = open_mixture([str(files / "p"), str(files / "j")])
    assert np.array_equal(drawn(data), np.random.default_rng(0).permutation(2 * ROWS))


@pytest.mark.parametrize("names,most", [
    (["p"], 2 * 3), (["p", "j"], 2 * 3), (["j:2", "p:1.5"], 2 * 5)])  # of half groups five a pool
def test_every_sample_once_and_groups_in_pools(files, small_pools, names, most):
    data = open_mixture([str(files / name) for name in names])
    found = drawn(data)
    assert sorted(found) == list(range(len(data)))
    assert np.array_equal(found, drawn(data)) and not np.array_equal(found, drawn(data, 1))
    groups = [share for slices in row_groups(data) for share in slices]
    in_parquet = np.concatenate([numbers for numbers, _ in groups])
    group_of = {i: g for g, (numbers, _) in enumerate(groups) for i in numbers}
    met = [group_of[i] for i in found if i in group_of]
    assert len(met) == len(in_parquet)
    for place in range(0, len(met), 2 * GROUP):  # neighbours come from a pool or two
        assert 1 < len(set(met[place:place + 2 * GROUP])) <= most
    assert len(met) - met[::-1].index(met[0]) > GROUP, "a group's rows are mixed with its pool's"
    if len(names) > 1:  # rows of the other file stand anywhere
        half = sum(i in group_of for i in found[:len(found) // 2])
        assert 0.3 < half / len(in_parquet) < 0.7


def test_a_group_larger_than_a_pool_is_read_front_to_back(tmp_path, monkeypatch):
    """240 rows in one group: shuffled among their neighbours, and passed through once."""
    write_parquet(tmp_path / "one", [MINIMIND] * ROWS, ROWS, image_bytes=[
        picture() + i.to_bytes(2, "big") for i in range(ROWS)])
    monkeypatch.setattr(parquet, "SLICE", open_mixture([str(tmp_path / "one")])
                        .sources[0].data.largest_group // 24 + 1)
    data = open_mixture([str(tmp_path / "one")])
    (slices,) = row_groups(data)
    assert [len(numbers) for numbers, _ in slices] == [10] * 24
    for module in (sampler, parquet):
        monkeypatch.setattr(module, "POOL", int(2.5 * slices[0][1]))
    found = drawn(data)
    assert sorted(found) == list(range(ROWS)) and not np.array_equal(found, drawn(data, 1))
    for place in range(0, ROWS, 30):
        assert sorted(found[place:place + 30]) == list(range(place, place + 30))
    decoded = decoding(monkeypatch)
    assert [data[int(i)].where.endswith(f":{i + 1}") for i in found] == [True] * ROWS
    assert decoded == [[0]]


def decoding(monkeypatch):
    """-> a list that grows with each row group that is decoded from now on."""
    decoded, read = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, **options: decoded.append(
        options["row_groups"]) or read(self, **options))
    ParquetData.buffer.clear()
    for name, value in (("buffered", 0), ("reader", None)):
        monkeypatch.setattr(ParquetData, name, value)
    return decoded


def test_an_epoch_decodes_few_groups(files, small_pools, tiny_tokenizer_dir, monkeypatch):
    """24 groups. Pool by pool each is decoded once; in any order at all, nearly one for each row
    that is read."""
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), 4)

    def epoch():
        batches = Batches(open_mixture([str(files / "p")]), template, PROCESSOR, 4, 128, seed=0)
        decoded = decoding(monkeypatch)
        seen = [place for batch, bad in batches.epoch(0) for place in batch.where]
        assert len(set(seen)) == len(seen) == ROWS
        return len(decoded)

    pooled = epoch()
    monkeypatch.setattr(sampler, "POOL", 1 << 40)  # what is kept stays small
    anyhow = epoch()
    assert pooled <= 30 < 150 < anyhow


@pytest.mark.parametrize("ranks, workers, batch_size", [(1, 1, 4), (2, 2, 2), (4, 2, 1)])
def test_each_worker_decodes_each_group_once_at_most(
        files, small_pools, tiny_tokenizer_dir, monkeypatch, ranks, workers, batch_size):
    """And keeps no more than two pools of them; the images are read once by all together."""
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), 4)
    data, told = open_mixture([str(files / "p")]), []
    for rank, worker in np.ndindex(ranks, workers):
        loader = Batches(data, template, PROCESSOR, batch_size, 128, 0, rank, ranks)
        decoded = decoding(monkeypatch)
        (step,) = loader.layout.steps(0, 0, loader.layout.positions, loader.layout.positions)
        for micro_batch in step[worker::workers]:
            told += loader[micro_batch][0].where
            assert ParquetData.buffered <= 5 * small_pools
        assert len(decoded) <= 30
    assert len(set(told)) == len(told) == ROWS


def test_a_window_holds_no_more_than_a_pool(files, tiny_tokenizer_dir, monkeypatch):
    data, words = open_mixture([str(files / "p")]), open_mixture([str(files / "j")])
    size = row_groups(data)[0][0][1] / GROUP
    assert buckets_in_window(data, 2, 60) == buckets_in_window(words, 2, 60) == 60
    monkeypatch.setattr(sampler, "POOL", int(50.5 * size))
    assert buckets_in_window(words, 2, 60) == 60
    assert buckets_in_window(data, 2, 60) == 25
    assert buckets_in_window(data, 1000, 60) == MIN_BUCKETS
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), 4)
    batches = Batches(data, template, PROCESSOR, 2, 128, seed=0)
    assert max(np.diff(batches.layout.windows)) <= 50 and batches.layout.windows[-1] == ROWS
