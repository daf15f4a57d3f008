"""Claim: seed and epoch decide the order, whatever the ranks, workers and interruptions; labels
are shifted once; nothing broken is trained on, and nothing broken goes uncounted."""

import io
import json
import pickle
from itertools import chain

import numpy as np
import pytest
import torch
from conftest import needed, shared_dir, weights_dir
from PIL import Image

from dataset.batching import Batches, TokenizedSample, collate
from dataset.chat import ChatTemplate, Message
from dataset.images import ImageProcessor
from dataset.readers.formats import BadSample, Sample, open_data
from dataset.readers.lengths import count_tokens
from dataset.readers.mixture import open_mixture
from dataset.tokenizer import Tokenizer

PROCESSOR = ImageProcessor("SiglipImageProcessor", (8, 8), None, 3, 1 / 255, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def template(tiny_tokenizer_dir):
    return ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), image_tokens=4)


class Data:
    """Samples in memory; what stands as an exception is raised; remembers what was read."""

    def __init__(self, samples):
        self.samples, self.read = samples, []

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        self.read.append(i)
        if isinstance(self.samples[i], Exception):
            raise self.samples[i]
        return self.samples[i]


def picture(red):
    """A plain colour, so that its pixels tell which one it is."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def sample(number, words, images=()):
    question = "<image>" * len(images) + "Who?"
    return Sample((Message("user", question), Message("assistant", " cat" * words)), tuple(images),
                  f"data:{number}")


def many(count, seed=0):
    """Rows of all lengths, every third with a picture."""
    words = np.random.default_rng(seed).integers(1, 40, count)
    return [sample(i, int(w), [picture(i % 256)] if i % 3 == 0 else [])
            for i, w in enumerate(words)]


def batches(samples, template, batch_size=4, max_length=512, seed=1, **options):
    data = Data(samples) if isinstance(samples, list) else samples
    return Batches(data, template, PROCESSOR, batch_size, max_length, seed, **options)


def places(epoch):
    return [batch.where for batch, _ in epoch]


def padding(batch):
    return batch.ids.numel() - sum(batch.lengths)


def same(one, other):
    """Two epochs are equal to the last bit."""
    one, other = list(one), list(other)
    assert len(one) == len(other)
    for (a, bad_a), (b, bad_b) in zip(one, other):
        assert a.where == b.where and torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)
        assert (a.pixels is None) == (b.pixels is None)
        assert a.pixels is None or torch.equal(a.pixels, b.pixels)
        assert [str(x) for x in bad_a] == [str(x) for x in bad_b]


def test_labels_are_the_next_token_where_it_is_supervised(template):
    samples = many(30)
    for batch, _ in batches(samples, template).epoch(0):
        for b in range(len(batch.where)):
            length = batch.lengths[b]
            for t in range(batch.ids.shape[1]):
                if batch.labels[b, t] != -100:
                    assert t + 1 < length and batch.labels[b, t] == batch.ids[b, t + 1]
            answer = samples[int(batch.where[b].split(":")[1])].messages[1].content
            supervised = batch.labels[b][batch.labels[b] != -100]
            assert template.tokenizer.decode(supervised) == answer + "<|im_end|>"
            assert (batch.ids[b, length:] == 0).all() and (batch.labels[b, length:] == -100).all()
        assert batch.ids.shape == batch.labels.shape == (len(batch.where), max(batch.lengths))
        assert (batch.labels[:, -1] == -100).all()


def test_labels_by_hand(template):
    rows = [TokenizedSample([5, 6, 7, 8], [False, False, True, True], sample(0, 1)),
            TokenizedSample([9, 3], [True, True], sample(1, 1))]
    batch = collate(rows)
    assert batch.ids.tolist() == [[5, 6, 7, 8], [9, 3, 0, 0]]
    assert batch.labels.tolist() == [[-100, 7, 8, -100], [3, -100, -100, -100]]
    assert (batch.supervised, padding(batch), batch.pixels) == (3, 2, None)


def test_every_sample_comes_once_an_epoch_and_epochs_differ(template):
    loader = batches(many(50), template, window=3)
    epochs = [places(loader.epoch(e)) for e in (0, 1, 0)]
    assert loader.batches_per_epoch == len(epochs[0]) == 13
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == sorted(f"data:{i}" for i in range(50))
        assert max(map(len, epoch)) <= 4
    assert epochs[0] == epochs[2] != epochs[1]
    assert places(batches(many(50), template, seed=2, window=3).epoch(0)) != epochs[0]


def test_rows_of_like_length_stand_together_and_batches_are_mixed(template):
    longest = [max(batch.lengths) for batch, _ in batches(many(200), template).epoch(0)]
    spread = [max(b.lengths) - min(b.lengths) for b, _ in batches(many(200), template).epoch(0)]
    assert np.mean(spread) < 2, f"rows of one batch differ by {np.mean(spread)} tokens"
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("count", [1, 5, 16, 17, 61])
def test_ranks_together_read_what_one_process_reads(template, count):
    alone = list(batches(many(count), template, batch_size=4, window=3).epoch(2))
    ranks = [list(batches(many(count), template, batch_size=2, window=3, rank=r, world_size=2)
                  .epoch(2)) for r in (0, 1)]
    assert len(alone) == len(ranks[0]) == len(ranks[1]) == -(-count // 4)
    for (whole, _), (even, _), (odd, _) in zip(alone, *ranks):
        assert even.where == whole.where[0::2] and odd.where == whole.where[1::2]
        for place, (b, part) in {**{w: (i, even) for i, w in enumerate(even.where)},
                                 **{w: (i, odd) for i, w in enumerate(odd.where)}}.items():
            length, a = part.lengths[b], whole.where.index(place)
            assert torch.equal(part.ids[b, :length], whole.ids[a, :length])
        assert even.supervised + odd.supervised == whole.supervised


def broken():
    """60 samples of which 8 are broken in every way that can happen."""
    samples = many(60)
    samples[7] = BadSample("data:7", "not JSON")
    samples[20] = Sample((Message("user", "no answer"),), (), "data:20")
    samples[33] = sample(33, 600)  # cut at max_length: stays
    samples[40] = Sample((Message("user", "word " * 300), Message("assistant", "x")), (), "data:40")
    samples[41] = sample(41, 1, [picture(1)] * 150)  # more image tokens than fit
    samples[9] = sample(9, 3, [picture(9)[:-40]])  # truncated
    samples[10] = sample(10, 3, [picture(9), b"no image"])
    samples[12] = sample(12, 3, ["nowhere.png"])
    return samples


def test_what_is_broken_is_skipped_counted_and_named(template):
    loader = batches(broken(), template, max_length=300, window=5)
    epoch = list(loader.epoch(0))
    bad = {b.where: b.reason for _, found in epoch for b in found}
    reasons = {7: "not JSON", 20: "no assistant turn", 40: "no supervised token within",
               41: "image", 9: "cannot read", 10: "cannot read", 12: "nowhere.png"}
    assert sorted(bad) == sorted(f"data:{i}" for i in reasons)
    for number, reason in reasons.items():
        assert reason in bad[f"data:{number}"]
    assert sum(len(found) for _, found in epoch) == len(reasons)
    trained = sum((batch.where for batch, _ in epoch), [])
    assert sorted(trained) == sorted({f"data:{i}" for i in range(60)} - set(bad))
    assert len(epoch) == loader.batches_per_epoch == 15  # however many rows are broken
    assert max(batch.ids.shape[1] for batch, _ in epoch) == 300
    for batch, _ in epoch:  # features and placeholders still agree
        images = 0 if batch.order is None else len(batch.order)
        assert (batch.ids == template.image_token_id).sum() == 4 * images
        assert ((batch.labels != -100).sum(1) > 0).all()


def test_each_bad_sample_is_reported_by_one_rank(template):
    alone = [str(b) for _, bad in batches(broken(), template, max_length=300).epoch(0) for b in bad]
    ranks = [str(b) for r in range(3) for _, bad in
             batches(broken(), template, max_length=300, batch_size=2, rank=r, world_size=3)
             .epoch(0) for b in bad]
    assert len(alone) == 7 and sorted(ranks) == sorted(alone)


def test_ranks_stay_in_step_when_rows_run_out(template):
    samples = [BadSample(f"data:{i}", "broken") for i in range(11)] + [sample(11, 3, [picture(7)])]
    ranks = [list(batches(samples, template, batch_size=2, rank=r, world_size=2).epoch(0))
             for r in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 3
    assert sorted(sum((b.where for rank in ranks for b, _ in rank), [])) == ["data:11"]
    empty = [batch for rank in ranks for batch, _ in rank if not batch.where]
    assert len(empty) == 5
    for batch in empty:
        assert batch.ids.shape == batch.labels.shape == (0, 0) and batch.pixels is None
        assert batch.supervised == padding(batch) == 0


def test_pictures_stand_in_the_order_of_their_placeholders(template):
    samples = [sample(0, 3, [picture(10), picture(20)]), sample(1, 3),
               sample(2, 3, [picture(30)]), sample(3, 3, [picture(40), picture(50), picture(60)])]
    for size in (1, 4):
        for batch, _ in batches(samples, template, batch_size=size).epoch(0):
            reds = []
            if batch.pixels is not None:
                reds = (batch.pixels[:, 0, 0, 0] * 127.5 + 127.5).round().int().tolist()
            expected = {"data:0": [10, 20], "data:1": [], "data:2": [30], "data:3": [40, 50, 60]}
            assert reds == sum((expected[place] for place in batch.where), [])


def dealt(template, world_size, batch_size, bucket=None, window=5, count=100):
    """An epoch on every rank -> [[places], ...] of each rank, which samples each read, all bad."""
    epochs, read, bad = [], [], []
    for rank in range(world_size):
        data = Data(many(count))
        data.samples[7] = BadSample("data:7", "broken")
        loader = batches(data, template, batch_size, rank=rank, world_size=world_size,
                         window=window, bucket=bucket)
        assert data.read == list(range(count)), "each row once, front to back, to count its tokens"
        data.read.clear()
        told = list(loader.epoch(1))
        epochs.append([batch.where for batch, _ in told])
        read.append(data.read)
        bad += [sample.where for _, some in told for sample in some]
    return epochs, read, bad


def test_ranks_share_the_reading(template):
    """Four ranks: each reads a quarter, together every sample once, and the broken one is told by
    the one that met it. Resumed by any other number of ranks: the same samples in each step."""
    every = sorted(f"data:{i}" for i in range(100) if i != 7)
    steps = None
    for world_size, batch_size in ((4, 2), (1, 8), (2, 4), (8, 1), (3, 3)):
        epochs, read, bad = dealt(template, world_size, batch_size, bucket=8)
        assert bad == ["data:7"]
        assert sorted(sum(read, [])) == list(range(100)), "each sample is read by one rank"
        for numbers in read:
            assert len(numbers) == pytest.approx(100 / world_size, abs=4)
        if world_size * batch_size == 8:
            found = [sorted(sum(step, [])) for step in zip(*epochs)]
            steps = steps or found
            assert found == steps and len(steps) == 13
        else:  # nine at a time cuts the same line elsewhere
            assert sorted(sum(map(sum, epochs, [[]] * world_size), [])) == every


def served(data, template, batch_size, ranks, workers, **options):
    """Each worker of each rank by itself, as a DataLoader would ask it: every workers-th batch.
    -> [(the batches, what was read for each of them)], of one worker after the other."""
    told, lengths = [], count_tokens(data, template)
    for rank, worker in np.ndindex(ranks, workers):
        loader = batches(data, template, batch_size, rank=rank, world_size=ranks, lengths=lengths,
                         **options)
        size, made = loader.layout.positions, []
        (step,) = loader.layout.steps(2, 0, size, size)
        for micro_batch in step[worker::workers]:
            data.read.clear()
            made.append((loader[micro_batch], list(data.read)))
        told.append(made)
    return told


def test_workers_together_read_every_sample_once(template):
    """A worker reads the rows of its own batches and no others, whatever their size; what is
    broken is told once, by one of them, spread over the batches."""
    samples = many(600)
    broken = range(0, 600, 12)
    for i in broken:
        samples[i] = BadSample(f"data:{i}", "broken")
    every = sorted(f"data:{i}" for i in range(600) if i % 12)
    for ranks, workers, batch_size in ((1, 1, 4), (2, 2, 3), (4, 2, 4), (4, 4, 2), (1, 8, 5)):
        made = served(Data(samples), template, batch_size, ranks, workers, window=40)
        assert len({len(worker) for worker in made}) <= 2, "no rank has more batches than others"
        told = [item for worker in made for item in worker]
        assert sorted(i for _, read in told for i in read) == list(range(600))
        for (batch, skipped), read in told:
            assert sorted(batch.where + [bad.where for bad in skipped]) == sorted(
                f"data:{i}" for i in read)
        assert sorted(where for (batch, _), _ in told for where in batch.where) == every
        bad = [[sample.where for sample in skipped] for (_, skipped), _ in told]
        assert sorted(sum(bad, [])) == sorted(f"data:{i}" for i in broken)
        assert max(map(len, bad)) <= 3 + batch_size * ranks // 12


def test_ranks_and_workers_change_no_split_of_the_line(template):
    """Begun on four ranks; gone on with by any number of ranks and workers, in other batches."""
    samples = many(100)

    def steps(ranks, batch_size, workers):
        loaders = [batches(Data(samples), template, batch_size, rank=rank, world_size=ranks,
                           workers=workers, bucket=8) for rank in range(ranks)]
        return [sorted(where for batch, _ in ranks for where in batch.where)
                for ranks in zip(*(loader.epoch(1) for loader in loaders), strict=True)]

    expected = steps(4, 2, 0)
    assert sorted(sum(expected, [])) == sorted(f"data:{i}" for i in range(100))
    for ranks, batch_size, workers in ((4, 2, 2), (1, 8, 0), (2, 4, 0), (8, 1, 0)):
        assert steps(ranks, batch_size, workers) == expected
    line = sum(steps(1, 1, 0), [])
    for ranks, batch_size in ((1, 3), (5, 1), (3, 3)):
        told = steps(ranks, batch_size, 0)
        ends = np.cumsum([len(step) for step in told])
        assert told == [sorted(line[end - len(step):end]) for step, end in zip(told, ends)]


def coco_like(folder):
    """A JSON Lines file with picture files, one line and one picture broken."""
    lines = []
    for i in range(40):
        (folder / f"{i}.png").write_bytes(picture(i) if i != 17 else picture(i)[:-40])
        turns = [("user", "<image>Who?"), ("assistant", " cat" * (1 + i * 7 % 23))]
        lines.append(json.dumps({"image": f"{i}.png", "conversations": [
            {"role": r, "content": c} for r, c in turns]}))
    lines[5] = lines[5][:30]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return open_data(folder / "data.jsonl")


@pytest.mark.parametrize("window", [3, 10])
def test_the_number_of_workers_changes_nothing(template, tmp_path, window):
    data = coco_like(tmp_path)
    loaders = [batches(data, template, window=window, workers=workers) for workers in (0, 2)]
    same(loaders[0].epoch(1), loaders[1].epoch(1))
    bad = [b.where.rsplit(":")[-1] for _, found in loaders[1].epoch(1) for b in found]
    assert sorted(bad) == ["18", "6"]


def test_a_copy_sent_to_another_process_gives_the_same(template, tmp_path):
    # Where workers are not forked (macOS, Windows), this is how they get their data.
    loader = batches(coco_like(tmp_path), template, window=3)
    copy = pickle.loads(pickle.dumps(loader))
    same([loader[1, 16, 20]], [copy[1, 16, 20]])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_goes_on_as_if_nothing_had_happened(template, workers):
    whole = list(batches(broken(), template, max_length=300, window=4).epoch(3))
    for skip in (0, 1, 4, 6, 14, 15):
        resumed = batches(broken(), template, max_length=300, window=4, workers=workers)
        same(resumed.epoch(3, skip=skip), whole[skip:])


def test_rows_before_the_resumed_place_are_not_read(template):
    loader = batches(many(64), template, window=4)  # 16 batches
    loader.data.read.clear()
    told = places(loader.epoch(0, skip=13))
    assert [f"data:{i}" for i in loader.data.read] == sum(told, []) and len(told) == 3


def test_reading_leaves_torchs_random_numbers_alone(template):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    for workers in (0, 1):
        list(batches(many(5), template, workers=workers).epoch(0))
    assert torch.equal(torch.rand(4), expected)


def waste(*ranks):
    wasted = total = 0
    for batch, _ in chain(*(loader.epoch(0) for loader in ranks)):
        wasted, total = wasted + padding(batch), total + batch.ids.numel()
    return wasted / total


def test_less_than_one_percent_of_positions_is_padding(tiny_tokenizer_dir):
    # An image of 64 tokens and an answer of log-normal length, median 60, longest about 500.
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), image_tokens=64)
    words = np.random.default_rng(0).lognormal(np.log(60), 0.6, 3000).astype(int)
    samples = [Sample((Message("user", "<image>Who?"), Message("assistant", " cat" * int(w))), (),
                      f"data:{i}") for i, w in enumerate(words)]
    share = waste(batches(samples, template, batch_size=16, max_length=2048))
    unsorted = waste(batches(samples, template, batch_size=16, max_length=2048, window=1))
    dealt = waste(*(batches(samples, template, 8, 2048, rank=rank, world_size=2)
                    for rank in (0, 1)))
    print(f"wasted: {share:.2%}, in batches drawn at random {unsorted:.1%}, of two ranks "
          f"{dealt:.2%}")
    assert unsorted > 0.1
    assert share < 0.01, f"{share:.2%} of the positions are padding"
    assert dealt < 0.01, f"{dealt:.2%} of the positions are padding"


def test_little_is_padding_where_each_epoch_learns_another_answer(tiny_tokenizer_dir):
    """Qwen3: a row ends behind its first answer in one epoch, behind its last in another."""
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), 64, family="qwen3")
    words = np.random.default_rng(0).lognormal(np.log(60), 0.6, (2000, 4)).astype(int)
    samples = [Sample(tuple(Message(role, text) for w in row[:1 + i % 4] for role, text in
                            (("user", "Who?"), ("assistant", " cat" * int(w)))), (), f"data:{i}")
               for i, row in enumerate(words)]
    loader = batches(samples, template, batch_size=4, max_length=2048)
    for epoch in (0, 1, 5):
        told = [batch for batch, _ in loader.epoch(epoch)]
        share = sum(map(padding, told)) / sum(batch.ids.numel() for batch in told)
        assert share < 0.015, f"epoch {epoch}: {share:.2%} of the positions are padding"


def test_real_photos_end_to_end():
    coco = needed(shared_dir(), "data/coco128")
    template = ChatTemplate(Tokenizer.from_directory(needed(weights_dir(), "smollm2")), 64)
    processor = ImageProcessor.from_directory(needed(weights_dir(), "dinov2s"))
    for name in ("minimind_v.jsonl", "minimind_v.parquet", "llava.json"):
        loader = Batches(open_data(coco / name, coco / "images"), template, processor, 16, 512, 0)
        batch, bad = next(loader.epoch(0))
        assert loader.batches_per_epoch == 8 and not bad
        assert batch.pixels.shape == (len(batch.where), 3, 224, 224)
        assert (batch.ids == template.image_token_id).sum() == 64 * len(batch.where)
        assert batch.supervised > 0 and batch.where[0].startswith(str(coco / name))


def test_no_samples_at_all_is_an_error(template):
    with pytest.raises(ValueError, match="no samples"):
        batches([], template)


def test_moving_a_batch_moves_everything(template):
    batch, _ = next(batches(many(4), template).epoch(0))
    moved = batch.to("meta")
    assert {moved.ids.device.type, moved.labels.device.type, moved.pixels.device.type} == {"meta"}
    assert moved.where == batch.where and moved.lengths == batch.lengths


def test_qwen3_learns_another_answer_of_a_conversation_in_each_epoch(tiny_tokenizer_dir):
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), 4, family="qwen3")
    turns = [Message("user", "<image>a"), Message("assistant", "one"), Message("user", "<image>b"),
             Message("assistant", "two")]
    data = [Sample(tuple(turns), (picture(1), picture(2)), "here:1")]
    batches = Batches(data, template, PROCESSOR, 1, 512, seed=0)
    told = []
    for epoch in range(3):
        (batch, bad), = batches.epoch(epoch)
        words = template.tokenizer.decode(batch.labels[batch.labels >= 0].tolist())
        told.append((words, len(batch.pixels), not bad))
    assert told == [("one<|im_end|>", 1, True), ("two<|im_end|>", 2, True),
                    ("one<|im_end|>", 1, True)]


@pytest.mark.parametrize("weight, epochs", [(1, 2), (2, 1), (0.5, 4), (4, 1)])
def test_every_answer_comes_up_whatever_the_weight(tiny_tokenizer_dir, tmp_path, weight, epochs):
    """Qwen3, rows of two answers: as often as all rows together come, half of it is each answer."""
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), 4, family="qwen3")
    (tmp_path / "data").write_text("\n".join(json.dumps({"messages": [
        {"role": role, "content": text} for turn in "ab" for role, text in
        (("user", "u"), ("assistant", f"{turn}{i}"))]}) for i in range(20)))
    batches = Batches(open_mixture([f"{tmp_path / 'data'}:{weight}"]), template, PROCESSOR, 4, 512,
                      seed=0)
    told = [template.tokenizer.decode(row[row >= 0].tolist()) for epoch in range(epochs)
            for batch, _ in batches.epoch(epoch) for row in batch.labels]
    answers = {f"{turn}{i}<|im_end|>" for turn in "ab" for i in range(20)}
    times = weight * epochs // 2
    assert {answer: told.count(answer) for answer in answers} == dict.fromkeys(answers, times)
    assert len(told) == 40 * times
