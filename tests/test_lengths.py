"""Claims: the tokens of each row are counted once, by all ranks together, and kept for the next
run; a row that cannot be read spoils neither the count nor the order."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from dataset.chat import ChatTemplate
from dataset.readers import index_cache, lengths
from dataset.readers.lengths import RowLengths, TokenCounter, count_tokens
from dataset.readers.mixture import open_mixture
from dataset.tokenizer import Tokenizer

ROWS = 50


@pytest.fixture
def file(tmp_path):
    lines = [json.dumps({"messages": [{"role": "user", "content": "u"}, {
        "role": "assistant", "content": " cat" * (1 + i * 7 % 23)}]}) for i in range(ROWS)]
    lines[5] = lines[5][:30]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "data.jsonl")


@pytest.fixture(scope="module")
def template(tiny_tokenizer_dir):
    return ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), 4)


def ranks(world_size, shares, missing):
    """Stand-ins for the ranks of a run; the last of them sees what all have counted."""
    def gather(rank, items):
        shares[rank] = items[0]
        return [shares.get(other, items[0]) for other in range(world_size)]

    return [SimpleNamespace(rank=rank, world_size=world_size, main=rank == 0,
                            sum=lambda number: [float(missing)],
                            gather=lambda items, rank=rank: gather(rank, items))
            for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_count_their_shares(file, template, monkeypatch, world_size, workers):
    data, shares = open_mixture([file + ":1.5"]), {}
    alone = count_tokens(data, template)
    monkeypatch.setattr(lengths, "SPAN", 6)
    for rank in ranks(world_size, shares, 1):
        found = count_tokens(data, template, workers, rank)
    assert found.values.tolist() == alone.values.tolist() and len(found.values) == ROWS
    assert sum(len(counts) for counts, _ in shares.values()) == ROWS
    rows = data.everything()
    for i in range(ROWS):
        if i != 5:
            assert found.values[i] == len(template.encode_conversation(rows[i].messages)[0])


def test_what_was_counted_is_kept_until_the_file_changes(file, template, tmp_path, monkeypatch):
    monkeypatch.setattr(index_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(index_cache, "SMALL", 0)
    monkeypatch.setattr(lengths, "MANY", 10)
    counted, plain = [], TokenCounter.lengths
    monkeypatch.setattr(TokenCounter, "lengths",
                        lambda self, i: counted.append(i) or plain(self, i))
    first = count_tokens(open_mixture([file]), template)
    assert len(counted) == ROWS
    again = count_tokens(open_mixture([file]), template)
    assert len(counted) == ROWS and again.values.tolist() == first.values.tolist()
    # One of two machines lacks it: then all count, or the ranks would wait for each other.
    count_tokens(open_mixture([file]), template, distributed=ranks(1, {}, missing=1)[0])
    assert len(counted) == 2 * ROWS
    other = ChatTemplate(template.tokenizer, 9)
    count_tokens(open_mixture([file]), other)
    assert len(counted) == 3 * ROWS, "another template gives other lengths"
    with open(file, "a") as opened:
        opened.write("\n" + json.dumps({"messages": [{"role": "user", "content": "u"}]}))
    assert len(count_tokens(open_mixture([file]), template).values) == ROWS + 1
    assert len(counted) == 4 * ROWS + 1


def test_bad_rows_stand_among_the_others(template):
    counts, values = np.ones(1000, np.int32), np.random.default_rng(1).integers(5, 500, 1000)
    values[::3] = 0
    found = RowLengths(counts, values).values
    assert (found > 0).all() and (found[values > 0] == values[values > 0]).all()
    assert abs(np.median(found[::3]) - np.median(values[values > 0])) < 50
    assert RowLengths(counts[:3], np.zeros(3, int)).values.tolist() == [0, 0, 0]


def test_a_row_has_a_length_for_each_answer_that_it_teaches():
    found = RowLengths(np.array([2, 1, 3]), np.array([10, 20, 5, 7, 8, 9]))
    samples = np.arange(3, dtype=np.uint8)
    assert found.of(None, samples, 0).tolist() == [10, 5, 9]  # sample + epoch, modulo its answers
    assert found.of(None, samples, 1).tolist() == [20, 5, 7]
    assert found.of(None, samples[::-1], 2).tolist() == [8, 5, 10]
