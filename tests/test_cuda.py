"""Claims, where there is a GPU: the model there is the model on the CPU, in every way of computing
it; runs learn, stop and go on; memory is what extras.memory predicts. Skipped where there is none.
"""

import copy
import os
import threading

import pytest
import torch
from families import assert_close, public_language, tiny_vlm

import train_pretrain
import train_sft
from benchmarks.memory import longest_batch, random_model
from dataset.batching import TokenizedSample, collate
from dataset.sample import Sample
from evaluation.batched_generation import generate_batch
from extras.attention import attention_maps
from extras.fast import prepare_for_inference, prepare_for_training
from extras.fast.cuda_graph import CUDAGraphDecodeStep
from extras.fast.layers import SharedHeadsAttention
from extras.fast.prefix_cache import PrefixCache
from extras.fast.quantize import BITS, quantize
from extras.memory import planned, predict
from model.generate import generate
from model.language import Attention
from model.pretrained.checkpoint import newest_checkpoint
from model.pretrained.load import load_language
from model.pretrained.public_config import read_language_config
from model.vlm import VLM
from tests.test_checkpointing import batch, trained
from tests.test_generate import greedy_without_cache, random_prompt
from tests.test_generate import language as language  # noqa: PLC0414, fixtures
from tests.test_generate import vlm as vlm  # noqa: PLC0414
from tests.tiny import ROOT, curve, make_world, metrics, torchrun
from train_pretrain import backward
from training.distributed import start_distributed
from training.optim import make_optimizer
from training.precision import NUMBERS, autocast, cast_weights, choose_dtype

HERE = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not HERE, reason="needs a GPU that torch can use")
GPU = torch.device("cuda", 0) if HERE else torch.device("cpu")


def there(model):
    """A copy on the GPU."""
    return copy.deepcopy(model).to(GPU)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("facts", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 6}])
def test_the_decoder_equals_transformers_on_the_gpu(facts, tmp_path):
    public = public_language("Qwen2", **facts)
    public.save_pretrained(tmp_path)
    ours, public = load_language(str(tmp_path)).to(GPU).eval(), public.to(GPU)
    ids = torch.randint(0, 61, (2, 70), generator=torch.Generator().manual_seed(3)).to(GPU)
    with torch.inference_mode():
        assert_close(ours(ids), public(ids).logits, 2e-4, "ours/public")


def test_a_picture_is_seen_as_on_the_cpu():
    """Its patches are cut by a convolution: the one product that may be rounded to 10 bits."""
    plain = tiny_vlm()
    pixels = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert_close(there(plain).vision_features(pixels.to(GPU)).cpu(),
                     plain.vision_features(pixels), 2e-5, "features")


def attention(heads: int, dtype, kind=SharedHeadsAttention):
    facts = dict(model_type="qwen2", vocab_size=9, hidden_size=256, intermediate_size=8,
                 num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=heads,
                 tie_word_embeddings=True, max_position_embeddings=9000)
    torch.manual_seed(0)
    return kind(read_language_config(facts)).to(dtype)


def turned(T: int, device):
    angle = torch.arange(T, device=device)[None, None, :, None] / 7 * torch.ones(64, device=device)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Attention, SharedHeadsAttention])
def test_every_attention_kernel_gives_the_same(kind, dtype, heads, masked):
    """Whichever kernel PyTorch picks, against float64 on the CPU; gradients too."""
    exact = attention(heads, torch.float64, kind)
    here = there(exact).to(dtype)
    mask = torch.ones(45, 45, dtype=torch.bool).tril()
    x = torch.randn(2, 45, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = exact(x, turned(45, "cpu"), mask, None, 0)
    out.square().sum().backward()
    got = here(x.to(GPU, dtype), turned(45, GPU), mask.to(GPU) if masked else None, None, 0)
    got.square().sum().backward()
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert_close(got.cpu() / out.abs().max(), out / out.abs().max(), limit, "out")
    for name, p in exact.named_parameters():
        if name != "k_proj.bias":  # its gradient is zero but for rounding
            size = p.grad.abs().max()
            assert_close(here.get_parameter(name).grad.cpu() / size, p.grad / size, limit, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 4])
def test_a_long_row_takes_memory_in_proportion(dtype, heads):
    """A table of T x T weights would be 4 heads x 8192 x 8192 numbers: 500 MB and more."""
    here = attention(heads, dtype).to(GPU)
    x = torch.randn(1, 8192, 256, device=GPU, dtype=dtype)
    rope = turned(8192, GPU)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    here(x, rope, None, None, 0).sum().backward()
    most = torch.cuda.max_memory_allocated() - before
    print(f"{dtype}, {heads} heads of keys: {most / 1e6:.0f} MB")
    assert most < 250e6


# ---------------------------------------------------------------- a step of training


def step(model, dtype, device, checkpointing=False, fast=True):
    """-> loss, {name: gradient} of one batch with pictures and dropout's own seed."""
    model.set_checkpointing(checkpointing)
    if fast:
        prepare_for_training(model)
    cast_weights(model, dtype, set())
    ids, labels, pixels = (tensor.to(device) for tensor in batch())
    torch.manual_seed(4)
    with autocast(dtype, device):
        loss, count = model(ids, labels, pixels)
    assert count == 27
    (loss / 27).backward()
    return loss.item(), {name: p.grad.float().cpu() for name, p in model.named_parameters()
                         if p.requires_grad}


@pytest.mark.parametrize("dtype, limit", [("fp32", 2e-5), ("bf16", 6e-2), ("fp16", 1e-2)])
@pytest.mark.parametrize("how", ["projector", "all", "last:1"])
@pytest.mark.parametrize("fast", [False, True])
def test_gradients_are_those_of_the_cpu(fast, how, dtype, limit):
    loss, exact = step(trained(how), "fp32", torch.device("cpu"), fast=False)
    got, gradients = step(trained(how).to(GPU), dtype, GPU, fast=fast)
    assert got == pytest.approx(loss, rel=limit)
    assert gradients.keys() == exact.keys()
    for name, gradient in exact.items():
        if not name.endswith("k_proj.bias"):
            size = gradient.norm()
            assert (gradients[name] - gradient).norm() <= limit * size, name


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("how", ["lora", "all"])
def test_recomputed_blocks_draw_the_same_dropout(how, dtype):
    loss, plain = step(trained(how).to(GPU), dtype, GPU)
    again, recomputed = step(trained(how).to(GPU), dtype, GPU, checkpointing=True)
    assert loss == pytest.approx(again, rel=1e-6)
    for name, gradient in plain.items():
        assert (recomputed[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, name


# ---------------------------------------------------------------- answers


@pytest.fixture
def recorded(monkeypatch):
    """How often a step was recorded."""
    record, count = CUDAGraphDecodeStep.record, []
    monkeypatch.setattr(CUDAGraphDecodeStep, "record", lambda self: count.append(1) or record(self))
    return count


def ready(model):
    """A copy on the GPU, as a chat has it."""
    model = copy.deepcopy(model)
    prepare_for_inference(model, GPU)
    return model


def test_answers_are_those_of_the_cpu(language, vlm, recorded):
    ids, _ = random_prompt(0, 40)
    alone, model = ready(language), ready(vlm)
    assert list(generate(alone, ids, max_new_tokens=24)) == greedy_without_cache(
        language, ids, None, 24)
    cases = [random_prompt(10, 3), random_prompt(11, 17, 1), random_prompt(12, 8, 2)]
    cases.append((cases[1][0] + [5], cases[1][1]))  # two questions about one picture
    expected = [list(generate(vlm, *case, max_new_tokens=24)) for case in cases]
    assert [list(generate(model, *case, max_new_tokens=24)) for case in cases] == expected
    assert len(recorded) == 5
    assert generate_batch(model, *zip(*cases), 24, stop_ids=[]) == expected
    assert len(recorded) == 6


def test_rows_that_ended_are_left_behind(vlm, recorded):
    """The recording is made anew for the rows that go on."""
    cases = [random_prompt(seed, 3 + 5 * (seed % 4), seed % 3) for seed in range(20, 28)]
    alone = [list(generate(vlm, *case, max_new_tokens=24)) for case in cases]
    stops = [answer[2 + 3 * i] for i, answer in enumerate(alone[:6])]
    expected = generate_batch(vlm, *zip(*cases), 24, stop_ids=stops)
    assert len(set(map(len, expected))) > 3
    assert generate_batch(ready(vlm), *zip(*cases), 24, stop_ids=stops) == expected
    assert len(recorded) > 1


def test_a_conversation_goes_on_where_it_was(language, recorded):
    """The cache that recorded steps have filled, and one that was left in the middle of an
    answer, serve the next prompt."""
    model, past, ids = ready(language), PrefixCache(), random_prompt(0, 9)[0]
    for length in (6, 3, 11):
        stream = generate(model, ids, max_new_tokens=20, prefix_cache=past)
        answer = [token for _, token in zip(range(length), stream)]
        assert answer == list(generate(language, ids, max_new_tokens=length))
        ids = ids + answer + [5, 6]
    assert past.cache.length > 20


def test_in_the_middle_of_training_steps_are_not_recorded(vlm, recorded):
    cases = [random_prompt(10, 3), random_prompt(11, 17, 1)]
    with autocast("bf16", GPU):
        answers = generate_batch(ready(vlm), *zip(*cases), 9, stop_ids=[])
    assert [len(answer) for answer in answers] == [9, 9] and not recorded
    model = there(vlm)
    prepare_for_training(model)
    expected = [list(generate(vlm, *case, max_new_tokens=9)) for case in cases]
    assert generate_batch(model, *zip(*cases), 9, stop_ids=[]) == expected and not recorded


def test_another_thread_pins_memory_meanwhile(language):
    """As a DataLoader's does while the loop asks its held-out questions."""
    model, ids, going = ready(language), random_prompt(0, 9)[0], True

    def pin():
        while going:
            torch.empty(1000).pin_memory()

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        expected = list(generate(language, ids, max_new_tokens=12))
        for _ in range(5):
            assert list(generate(model, ids, max_new_tokens=12)) == expected
    finally:
        going = False
        thread.join()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_from_the_cache_as_without(vlm, dtype):
    """The largest logit of each step: near enough to that of the whole row computed anew."""
    model = copy.deepcopy(vlm)
    prepare_for_inference(model, GPU, dtype)
    ids, pixels = random_prompt(7, 12, 1)
    answer = list(generate(model, ids, pixels, max_new_tokens=16))
    with torch.inference_mode():
        row = torch.tensor([ids + answer], device=GPU)
        hidden = model.language.decode(model.embed(row, pixels.to(GPU)))[0, len(ids) - 1:-1]
        logits = model.language.logits(hidden).float()
    chosen = logits[torch.arange(16), torch.tensor(answer, device=GPU)]
    assert (logits.amax(-1) - chosen).max() <= 0.05 * logits.abs().max()


@pytest.mark.parametrize("bits", BITS)
def test_few_bits_multiply_as_on_the_cpu(vlm, bits):
    here = copy.deepcopy(vlm.language).float()
    quantize(here, bits)
    ids = torch.tensor([random_prompt(3, 30)[0]])
    with torch.inference_mode():
        expected = here.logits(here.decode(here.embed(ids)))
        got = there(here)
        got = got.logits(got.decode(got.embed(ids.to(GPU)))).cpu()
    assert_close(got, expected, 1e-3 * expected.abs().max().item(), bits)


def test_looking_back_is_the_same(vlm):
    ids, pixels = random_prompt(7, 12, 1)
    weights, lens = attention_maps(vlm, ids + [3, 4, 5], pixels, 3)
    there_weights, there_lens = attention_maps(there(vlm), ids + [3, 4, 5], pixels, 3)
    assert_close(there_weights.cpu(), weights, 1e-5, "weights")
    assert [each.tolist() for each in there_lens] == [each.tolist() for each in lens]


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return [*make_world(tmp_path_factory.mktemp("world")), "--model", "none"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "auto"])
def test_a_run_learns_and_tells_what_it_took(world, tmp_path, capsys, dtype):
    train_sft.main([*world, "--dtype", dtype, "--lora", "--steps", "12", "--out", str(tmp_path)])
    told, lines = capsys.readouterr().out, metrics(tmp_path)
    assert "cuda:0" in told
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    if dtype == "auto":
        assert choose_dtype("auto", GPU)[0] in told
    if dtype == "fp16":
        assert all(line["loss_scale"] > 1 for line in lines)


@pytest.mark.parametrize("more", [["--lora", "--lora_dropout", "0.2"],
                                  ["--train_language", "all", "--train_vision"]])
def test_stopped_and_gone_on(world, tmp_path, more):
    """Kernels of a GPU add in an order of their own each time, so the last digits may differ."""
    flags = [*world, *more]
    train_sft.main([*flags, "--out", str(tmp_path / "whole")])
    train_sft.main([*flags, "--out", str(tmp_path / "again")])
    newest = newest_checkpoint(tmp_path / "again")
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train_sft.main(["--resume", "--out", str(tmp_path / "again")])
    whole, again = curve(tmp_path / "whole"), curve(tmp_path / "again")
    print("bit for bit" if whole == again else f"{whole}\n{again}")
    for one, other in zip(whole, again, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_one_process_of_torchrun_speaks_nccl(world, tmp_path):
    """One GPU is enough for one rank of nccl; with more of them, as many as there are."""
    number = torch.cuda.device_count()
    done = torchrun(["--standalone", "--nproc_per_node", str(number)], ROOT / "train_pretrain.py",
                    *world[:-2], "--out", tmp_path / "ranks", NCCL_DEBUG="VERSION")
    assert done.returncode == 0, done.stdout + done.stderr
    train_pretrain.main([*world[:-2], "--out", str(tmp_path / "alone")])
    if number == 1:
        for one, other in zip(curve(tmp_path / "ranks"), curve(tmp_path / "alone"), strict=True):
            assert one == pytest.approx(other, rel=1e-4)


def test_cached_features_change_nothing(world, tmp_path):
    flags = [*world, "--steps", "9", "--lora"]
    train_sft.main([*flags, "--out", str(tmp_path / "plain")])
    train_sft.main([*flags, "--feature_cache", str(tmp_path / "seen"),
                    "--out", str(tmp_path / "cached")])
    for one, other in zip(curve(tmp_path / "plain"), curve(tmp_path / "cached"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_batches_wait_in_pinned_memory():
    row = TokenizedSample([1, 2, 3], [False, True, True], Sample((), (), "here"))
    made = collate([row]).pin_memory()
    assert made.ids.is_pinned() and made.to(GPU, non_blocking=True).ids.device == GPU


@pytest.mark.parametrize("stage, flags", [
    ("pretrain", ["--dtype", "bf16"]), ("sft", ["--dtype", "bf16", "--lora"]),
    ("sft", ["--dtype", "fp16", "--lora", "--gradient_checkpointing"]),
    ("sft", ["--dtype", "fp32", "--train_language", "all"])])
@pytest.mark.parametrize("preset", ["emoji", "smollm2-dinov2"])
def test_memory_is_what_was_told(preset, stage, flags):
    """torch.cuda.max_memory_allocated of two steps; below, and not by much."""
    size = [] if preset == "emoji" else ["--batch_size", "4", "--max_length", "512"]
    plan, _ = planned(preset, stage, [*flags, *size, "--gradient_accumulation_steps", "1"], GPU)
    config, settings, pixels, K = plan
    predicted = predict(*plan, GPU).peak
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with start_distributed() as ranks:
        model = random_model(config, settings).to(GPU)
        optimizer = make_optimizer(model, settings)
        for _ in range(2):
            made = longest_batch(config, settings, pixels, K)
            backward(model, made, made.supervised, settings, ranks)
            optimizer.step()
            optimizer.zero_grad()
    took = torch.cuda.max_memory_allocated() - before
    print(f"{preset} {stage} {' '.join(flags)}: told {predicted / 1e6:.0f} MB, "
          f"took {took / 1e6:.0f}: {predicted / took:.3f}")
    assert 0.95 <= predicted / took <= 1.3


def test_eval_answers_on_the_gpu(world, tmp_path, capsys):
    import eval as script

    train_sft.main([*world, "--steps", "3", "--out", str(tmp_path)])
    picture = os.path.join(os.path.dirname(world[world.index("--data") + 1]), "red.png")
    capsys.readouterr()
    told = []
    for flags in ([], ["--device", "cpu", "--dtype", "fp32"], ["--dtype", "fp32"],
                  ["--quantize", "int8"]):
        script.main(["--model", str(tmp_path), "--image", picture, "--prompt", "Which colour?",
                     "--max_new_tokens", "6", *flags])
        told.append(capsys.readouterr().out)
    assert told[1] == told[2] and all(told)


def test_numbers_that_this_gpu_multiplies():
    kind, _ = choose_dtype("auto", GPU)
    assert kind == ("bf16" if torch.cuda.get_device_capability(GPU)[0] >= 8 else "fp16")
    assert NUMBERS[kind].itemsize == 2 and isinstance(tiny_vlm(), VLM)
