"""Claims: each supervised token weighs the same, only what is named is trained, trouble stops."""

import json
import math
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_pretrain
import train_sft
import training.precision
from dataset.batching import Batches, collate
from model.pretrained.checkpoint import newest_checkpoint
from model.pretrained.load import load_checkpoint, load_language
from model.pretrained.public_config import read_language_config, write_config
from model.pretrained.save import save_language
from tests.tiny import curve, make_world, metrics
from train_pretrain import backward, load_or_build
from training.data import open_training_data
from training.distributed import start_distributed
from training.optim import choose_trainable, make_optimizer, parameter_groups
from training.precision import choose_dtype
from training.presets import read_flags, resolve
from training.schedules import SCHEDULES


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def prepare(flags, stage="pretrain"):
    """-> settings, parts, batches, as the scripts make them."""
    settings = resolve(read_flags("", stage, flags), stage, {})
    parts = load_or_build(settings, None)
    parts.lora = choose_trainable(parts.model, settings, None)
    data, _ = open_training_data(settings, "pretrain")
    batches = Batches(data, parts.template, parts.processor, settings.batch_size,
                      settings.max_length, settings.seed, workers=settings.num_workers)
    return settings, parts, batches


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_one_batch_of_four_equals_four_batches_of_one(world):
    """Also with answers of 4 and 100 tokens, where a mean per micro-batch would go wrong."""
    settings, parts, _ = prepare(world)
    tokenizer, template = parts.template.tokenizer, parts.template
    rows = []
    for batch, _ in prepare(["--batch_size", "4", *world[:6], *world[8:]])[2].epoch(0):
        rows = [(batch.ids[b, :n], batch.labels[b, :n], n) for b, n in enumerate(batch.lengths)]
        if batch.order is not None and len(batch.order) == len(rows):
            pixels = batch.pixels[batch.order]  # of each row
            break
    long = torch.tensor(tokenizer.encode("x" * 96))  # the answers are now of unlike lengths
    ids, labels, n = rows[0]
    rows[0] = (torch.cat([ids, long]), torch.cat([labels, long]), n + 96)
    batch.lengths = [n for _, _, n in rows]
    batch.ids = torch.nn.utils.rnn.pad_sequence([i for i, _, _ in rows], True, 0)
    batch.labels = torch.nn.utils.rnn.pad_sequence([x for _, x, _ in rows], True, -100)
    total = batch.supervised
    with start_distributed() as ranks:
        together = float(backward(parts.model, batch, total, settings, ranks))
        expected = gradients(parts.model)
        parts.model.zero_grad()
        alone = 0.0
        for b, (i, x, n) in enumerate(rows):
            one = collate([])
            one.ids, one.labels, one.lengths = i[None], x[None], [n]
            one.pixels, one.where = pixels[b:b + 1], batch.where[b:b + 1]
            alone += float(backward(parts.model, one, total, settings, ranks))
    difference = (gradients(parts.model) - expected).abs().max().item()
    assert difference < 1e-6, f"largest gradient difference {difference}"
    assert abs(together - alone) < 1e-5, (together, alone)
    assert template.image_tokens == 4


def test_a_run_with_a_tail_equals_the_run_by_hand(world, tmp_path):
    """12 micro-batches an epoch, 1.5 epochs, 5 to a step: steps of 5, 5, 5 and 3; the third one
    reaches over the end of the epoch."""
    flags = [*world, "--epochs", "1.5", "--gradient_accumulation_steps", "5", "--weight_decay",
             "0.1"]
    flags.remove("--steps"), flags.remove("6")
    train_pretrain.main([*flags, "--out", str(tmp_path / "run"), "--warmup_ratio", "0.5"])

    settings, parts, batches = prepare(flags)
    model = parts.model
    micro = [batch for epoch in (0, 1) for batch, _ in batches.epoch(epoch)][:18]
    optimizer = torch.optim.AdamW([
        {"params": [p for p in model.projector.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.projector.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ], betas=(0.9, 0.95))
    rates = [0.005, 0.01, 0.01 * (0.1 + 0.9 * 0.5), 0.001]  # warmup of 2 steps, then the cosine
    losses = []
    for step, rate in enumerate(rates):
        chosen = micro[5 * step:5 * step + 5]
        loss = sum(model(b.ids, b.labels, b.pixels, b.order)[0] for b in chosen)
        loss = loss / sum(b.supervised for b in chosen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.projector.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(loss.item())

    told = metrics(tmp_path / "run")
    assert [m["step"] for m in told] == [1, 2, 3, 4]
    assert [m["supervised_tokens"] for m in told] == [
        sum(b.supervised for b in micro[5 * s:5 * s + 5]) for s in range(4)]
    assert [m["learning_rate"] for m in told] == pytest.approx(rates, abs=1e-12)
    assert [m["loss"] for m in told] == pytest.approx(losses, abs=1e-5)
    saved = load_file(tmp_path / "run" / "step_000004" / "model.safetensors")
    difference = max((saved[f"projector.{name}"] - p).abs().max().item()
                     for name, p in model.projector.named_parameters())
    assert difference < 1e-5, f"largest weight difference {difference}"


def test_metrics_hold_the_promised_figures(world, tmp_path):
    train_pretrain.main([*world, "--out", str(tmp_path)])
    told = metrics(tmp_path)
    assert list(told[0]) == ["step", "loss", "grad_norm", "learning_rate", "supervised_tokens",
                             "tokens_per_second", "seconds"]
    assert [m["step"] for m in told] == [1, 2, 3, 4, 5, 6]
    assert told[-1]["loss"] < told[0]["loss"]


@pytest.mark.parametrize("flags, opened", [
    ([], ["projector."]),
    (["--train_language", "last:1"], ["projector.", "language.layers.1."]),
    (["--train_language", "all"], ["projector.", "language."]),
    (["--no-train_projector", "--train_vision"], ["vision."]),
    (["--lora"], ["projector.", ".lora_"]),
    (["--lora", "--no-train_projector"], [".lora_"]),
])
def test_only_what_is_named_changes_and_is_saved(world, tmp_path, flags, opened):
    arguments = [*world, *flags, "--out", str(tmp_path)]
    before = dict(prepare(arguments)[1].model.named_parameters())
    train_pretrain.main(arguments)
    after = dict(load_checkpoint(newest_checkpoint(tmp_path)).named_parameters())
    saved = load_file(newest_checkpoint(tmp_path) / "model.safetensors")
    for name in after:
        expected = any(name.startswith(o) or (o == ".lora_" and o in name) for o in opened)
        changed = name not in before or not torch.equal(before[name], after[name])
        # The first SigLIP block's key bias has no influence: softmax forgets what all keys share.
        assert changed == expected or (expected and "bias" in name), name
        ours = name.startswith("projector.") or ".lora_" in name  # no public file has these
        assert (name in saved) == (expected or ours), name


def test_every_adapter_learns(world, tmp_path):
    train_sft.main([*world, "--model", "none", "--lora", "--steps", "1", "--out", str(tmp_path)])
    saved = load_file(newest_checkpoint(tmp_path) / "model.safetensors")
    still = [name for name, tensor in saved.items()
             if name.endswith("lora_b") and tensor.norm() == 0]
    assert not still and any(name.endswith("lora_b") for name in saved), still


def test_rates_and_decay_by_part(world):
    settings, parts, _ = prepare([*world, "--train_vision", "--train_language", "all",
                                  "--projector_learning_rate", "0.5", "--vision_learning_rate",
                                  "0.25", "--weight_decay", "0.125"])
    groups = parameter_groups(parts.model, settings)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [
        (0.01, 0.125), (0.01, 0.0), (0.5, 0.125), (0.5, 0.0), (0.25, 0.125), (0.25, 0.0)]
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(parts.model.parameters()))
    assert make_optimizer(parts.model, settings).param_groups[2]["lr"] == 0.5


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.5])
def test_a_schedule_gives_shares_of_the_peak(name, warmup_ratio):
    """In a line up over the warmup, then never above 1 and never 0: each step learns something."""
    shares = [SCHEDULES[name](step, 100, warmup_ratio) for step in range(1, 101)]
    warmup = int(100 * warmup_ratio)
    assert shares[:warmup] == pytest.approx([step / warmup for step in range(1, warmup + 1)])
    assert all(0 < share <= 1 for share in shares) and max(shares) > 0.99


def test_the_cosine_rises_to_one_and_falls_to_a_tenth():
    schedule = SCHEDULES["cosine"]
    shares = [schedule(step, 100, 0.1) for step in range(1, 101)]
    assert shares[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert shares[54] == pytest.approx(0.55) and shares[99] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(shares[9:], shares[10:]))
    assert schedule(1, 1, 0.0) == pytest.approx(0.1)


@pytest.mark.parametrize("times, expected", [(3.9, "bf16"), (1.0, "fp32"), (0.25, "fp32")])
def test_auto_takes_bf16_only_where_the_processor_is_faster_in_it(times, expected, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(training.precision, "bf16_speedup", lambda: times)
    dtype, why = choose_dtype("auto", cpu)
    assert dtype == expected and f"{times:.1f} times as fast" in why
    for asked in ("bf16", "fp32"):
        assert choose_dtype(asked, cpu) == (asked, "as asked")


def test_bf16_stays_close_to_fp32(world, tmp_path):
    for dtype in ("bf16", "fp32"):
        train_pretrain.main([*world, "--dtype", dtype, "--out", str(tmp_path / dtype)])
    for low, high in zip(metrics(tmp_path / "bf16"), metrics(tmp_path / "fp32")):
        assert low["loss"] == pytest.approx(high["loss"], rel=0.02), (low, high)
    assert curve(tmp_path / "bf16") != curve(tmp_path / "fp32")
    saved = load_file(newest_checkpoint(tmp_path / "bf16") / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_a_loss_that_is_not_finite_stops_with_file_and_line(world, tmp_path, monkeypatch):
    """One letter of the language model is broken; one line of the data has that letter."""
    language = load_language(world[1])
    config = {**write_config(language.config), "tie_word_embeddings": False}
    untied = type(language)(read_language_config(config))
    untied.load_state_dict(language.state_dict(), strict=False)
    tokenizer = prepare(world)[1].template.tokenizer
    save_language(untied, tmp_path / "language")
    tokenizer.save(tmp_path / "language")

    def broken(*arguments):  # after loading, which refuses a file with such a number
        parts = load_or_build(*arguments)
        parts.model.language.embed_tokens.weight.data[tokenizer.encode("~")[0]] = math.nan
        return parts

    monkeypatch.setattr(train_pretrain, "load_or_build", broken)
    lines = Path(world[5]).read_text().splitlines()
    record = json.loads(lines[6])
    record["conversations"][0]["content"] = "~ " + record["conversations"][0]["content"]
    lines[6] = json.dumps(record)
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(SystemExit, match=r"data\.jsonl:7.*last checkpoint is good"):
        train_pretrain.main([*world, "--language_model", str(tmp_path / "language"), "--data",
                             str(tmp_path / "data.jsonl"), "--image_folder",
                             str(Path(world[5]).parent), "--steps", "24",
                             "--save_steps", "1", "--out", str(tmp_path / "out")])
    newest = newest_checkpoint(tmp_path / "out")
    if newest:  # the broken line may come in the very first step
        assert all(t.isfinite().all() for t in load_file(newest / "model.safetensors").values())
    assert all(math.isfinite(m["loss"]) for m in metrics(tmp_path / "out"))


def spoil(world, tmp_path, numbers):
    lines = Path(world[5]).read_text().splitlines()
    for number in numbers:
        lines[number] = "{broken"
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return [*world, "--data", str(tmp_path / "data.jsonl"), "--image_folder",
            str(Path(world[5]).parent), "--steps", "12", "--out", str(tmp_path / "out")]


def test_bad_samples_are_listed_and_counted(world, tmp_path, capsys):
    train_pretrain.main([*spoil(world, tmp_path, [3, 8]), "--max_skip_ratio", "0.5"])
    told = capsys.readouterr().out
    assert "data.jsonl:4" in told and "data.jsonl:9" in told
    assert "2 of 24 samples skipped" in told, told


def test_too_many_bad_samples_stop_the_run(world, tmp_path, capsys):
    with pytest.raises(SystemExit, match="8 of 24 samples were unusable.*--max_skip_ratio"):
        train_pretrain.main([*spoil(world, tmp_path, range(8)), "--max_skip_ratio", "0.2"])
    told = capsys.readouterr().out
    assert told.count("skipped") == 6 and "further skipped samples" in told, told
    assert newest_checkpoint(tmp_path / "out").name == "step_000009", "the good one stays"


def test_progress_is_told(world, tmp_path, capsys):
    train_pretrain.main([*world, "--out", str(tmp_path)])
    told = capsys.readouterr().out
    assert "1,856 trained" in told and "24 samples" in told
    assert "step 1/6  loss " in told and "step 6/6  loss " in told
    assert "next: python train_sft.py --lora --model" in told
    assert "left 0:00:0" in told


def test_an_error_in_the_loop_ends_the_workers(world, tmp_path, monkeypatch):
    """A rank that fails leaves without the usual exit, which would end them otherwise."""
    before, left = set(active_children()), []

    def fail(*_):
        raise RuntimeError("a fault of the program")

    def summary(*arguments, plain=train_pretrain.record_launch):
        @contextmanager
        def note():
            try:
                with plain(*arguments):
                    yield
            finally:
                left.extend(set(active_children()) - before)
        return note()

    monkeypatch.setattr(train_pretrain, "record_launch", summary)
    monkeypatch.setattr(train_pretrain, "backward", fail)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        train_pretrain.main([*world, "--num_workers", "2", "--out", str(tmp_path)])
    assert left == []
