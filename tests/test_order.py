"""Claims: a shuffled epoch passes through a large Parquet file a pool of groups at a time, every
sample comes once, and a window holds no more pictures than memory is meant for."""

import numpy as np
import pytest
from test_batching import PROCESSOR
from test_formats import MINIMIND, picture, write_lines, write_parquet

from dataset import batching
from dataset.batching import Batches, Order
from dataset.chat import ChatTemplate
from dataset.readers import order, parquet
from dataset.readers.mixture import open_mixture
from dataset.readers.order import blocks_in_window, epoch_order, row_groups
from dataset.tokenizer import Tokenizer

ROWS, GROUP = 240, 10


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Parquet in groups of ten rows, each row with its picture; and JSON Lines."""
    folder = tmp_path_factory.mktemp("files")
    write_parquet(folder / "p", [MINIMIND] * ROWS, GROUP, image_bytes=[picture()] * ROWS)
    text = [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant",
             "content": str(i)}]} for i in range(ROWS)]
    write_lines(folder / "j", *text)
    return folder


@pytest.fixture
def small_pools(files, monkeypatch):
    """Pools of about three groups."""
    size = row_groups(open_mixture([str(files / "p")]))[0][1]
    monkeypatch.setattr(order, "POOL", int(2.5 * size))
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
    groups = row_groups(data)
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


def test_an_epoch_opens_few_groups(files, small_pools, tiny_tokenizer_dir, monkeypatch):
    """24 groups, 30 windows: in any order at all each window would open nearly all of its rows'
    groups, about 7 for 8 rows."""
    opened = []
    made = parquet.GroupReader.__init__
    monkeypatch.setattr(parquet.GroupReader, "__init__", lambda self, *given:
                        opened.append(given[1]) or made(self, *given))

    def epoch():
        opened.clear()
        template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), 4)
        data = open_mixture([str(files / "p")])
        batches = Batches(data, template, PROCESSOR, 4, 128, seed=0, window=2)
        seen = [place for batch, bad in batches.epoch(0) for place in batch.where]
        assert len(set(seen)) == len(seen) == ROWS and len(batches.windows) == 31
        return len(opened)

    pooled = epoch()
    monkeypatch.setattr(order, "POOL", 1 << 40)
    anyhow = epoch()
    assert pooled <= 24 + 3 * 30 < 150 < anyhow


def test_a_window_holds_what_memory_is_meant_for(files, tiny_tokenizer_dir, monkeypatch):
    data, words = open_mixture([str(files / "p")]), open_mixture([str(files / "j")])
    size = row_groups(data)[0][1] / GROUP
    assert blocks_in_window(data, 2, 60) == blocks_in_window(words, 2, 60) == 60
    monkeypatch.setattr(order, "HELD", int(50 * size))
    assert blocks_in_window(words, 2, 60) == 60
    assert blocks_in_window(data, 2, 60) == 25
    assert blocks_in_window(data, 1000, 60) == order.FEWEST
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), 4)
    batches = Batches(data, template, PROCESSOR, 2, 128, seed=0)
    assert max(np.diff(batches.windows)) <= 50 and batches.windows[-1] == ROWS


@pytest.mark.parametrize("ranks, workers, batch_size", [(1, 1, 4), (2, 2, 2), (4, 2, 1)])
def test_pictures_in_parquet_are_read_once_by_all_workers(
        files, small_pools, tiny_tokenizer_dir, monkeypatch, ranks, workers, batch_size):
    """Each worker of each rank reads the rows that it serves, from few groups; and all the workers
    of a rank hold no more than memory is meant for."""
    monkeypatch.setattr(order, "HELD", 80 * small_pools // GROUP)
    monkeypatch.setattr(batching, "DEALT", 0)
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), 4)
    data, read, opened, told = open_mixture([str(files / "p")]), [], [], []
    sample, made = parquet.ParquetData.sample, parquet.GroupReader.__init__
    monkeypatch.setattr(parquet.ParquetData, "sample", lambda self, i, draw=0:
                        read.append(i) or sample(self, i, draw))
    monkeypatch.setattr(parquet.GroupReader, "__init__", lambda self, *given:
                        opened.append(given[1]) or made(self, *given))
    for rank in range(ranks):
        lines = [Order(Batches(data, template, PROCESSOR, batch_size, 128, 0, rank, ranks))
                 for _ in range(workers)]
        b = lines[0].batches
        assert b.lanes == (2 if batch_size > 1 else 4)
        (step,) = b.steps(0, 0, b.places, b.places)
        for number, micro_batch in enumerate(step):
            batch, _ = lines[number % workers][micro_batch]
            told += batch.where
            assert sum(len(line.plan) for line in lines) <= 80
    assert sorted(read) == list(range(ROWS)) and len(set(told)) == len(told) == ROWS
    # A hand of 15 to 40 rows, two to four groups, lies in up to three pools of three groups.
    assert len(opened) <= 9 * ROWS / 15


def test_two_windows_are_never_held_at_once(files, tiny_tokenizer_dir):
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), 4)
    batches = Batches(open_mixture([str(files / "p")]), template, PROCESSOR, 4, 128, seed=0,
                      window=2)
    line, held = Order(batches), []
    read = line._plan
    line._plan = lambda *lane: held.append(len(line.plan)) or read(*lane)
    for micro_batch in next(batches.steps(0, 0, batches.places, batches.places)):
        line[micro_batch]
    assert held == [0] * 30 and len(line.plan) == 8
