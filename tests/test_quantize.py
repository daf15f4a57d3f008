"""Claims: fewer bits round as little as they say, every way of multiplying gives the same, and a
checkpoint in few bits answers as the model that was rounded on the spot, or says what is wrong."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_world

import eval as script
import extras.export.__main__ as export
import train_sft
import training.precision
from extras.fast.quantize import (
    BITS,
    GROUP,
    QuantizedLinear,
    can_use_gemv,
    dequantize_int4,
    dequantized_matmul,
    gemv,
    quantize,
    quantize_linear,
    set_compute_dtype,
    to_int4,
    to_int8,
    unpack_int4,
)
from model.config import LanguageConfig
from model.generate import generate
from model.language import LanguageModel
from model.lora import add_lora, linear_names, merge_lora
from model.pretrained.checkpoint import CorruptCheckpointError, find_model, read_config
from model.pretrained.load import load_checkpoint


def matrix(rows=48, columns=64, seed=0):
    """Rows of very different size, one of zeros, one far from zero."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight = weight * torch.logspace(-4, 1, rows)[:, None]
    weight[3], weight[4] = 0, 100 + weight[4]
    return weight


def tiny_language(**facts) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(LanguageConfig(**{**dict(
        model_type="qwen2", vocab_size=97, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=True, qkv_bias=True,
        qk_norm=False, max_position_embeddings=600), **facts}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


# ---------------------------------------------------------------- rounding


def test_int8_is_off_by_half_a_step_at_most():
    weight = matrix()
    q, scale = to_int8(weight)
    assert q.dtype == torch.int8 and scale.dtype == torch.bfloat16 and scale.shape == (48,)
    step = scale.float()[:, None]
    gap = ((q.float() * step - weight).abs() / step).max()
    assert gap <= 0.5 + 1e-4, f"largest difference {gap:.4f} steps"
    assert (step[:, 0] * 127 <= weight.abs().amax(1) * 1.01 + 1e-20).all(), "no step is wasted"
    assert (q.abs().amax(1)[weight.abs().amax(1) > 0] >= 126).all() and (q[3] == 0).all()


def test_int4_is_off_by_little_more_than_half_a_step():
    weight = matrix()
    packed, scale, offset = to_int4(weight)
    assert packed.dtype == torch.uint8 and packed.shape == (48, 32)
    assert scale.shape == offset.shape == (48, 64 // GROUP)
    groups = weight.view(48, -1, GROUP)
    assert (scale.float() <= (groups.amax(-1) - groups.amin(-1)) / 15 * 1.01 + 1e-20).all()
    found = dequantize_int4(packed, scale.float(), offset.float())
    # Where the offset has to be rounded to bf16, the ends of a group may lie outside the steps.
    allowed = 0.55 * scale.float() + offset.float().abs() / 256
    gap = ((found - weight).abs().view(48, -1, GROUP) / allowed[..., None]).max()
    assert gap <= 1, f"{gap:.3f} of what is allowed"


def test_int4_by_hand():
    weight = torch.arange(GROUP).float()[None] % 16 - 8  # -8 to 7, twice
    packed, scale, offset = to_int4(weight)
    assert scale.tolist() == [[1.0]] and offset.tolist() == [[0.0]]
    assert unpack_int4(packed).tolist() == [[i % 16 for i in range(GROUP)]]
    assert packed[0, :3].tolist() == [0 | 1 << 4, 2 | 3 << 4, 4 | 5 << 4]
    assert torch.equal(dequantize_int4(packed, scale.float(), offset.float()), weight)


# ---------------------------------------------------------------- products


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(48, 64), (48, 40), (41, 64)])
def test_a_layer_multiplies_by_its_rounded_matrix(bits, shape):
    """Also in shapes that no kernel takes; 40 columns make no whole groups, so int8 takes them."""
    weight, bias = matrix(*shape), torch.randn(shape[0])
    layer = quantize_linear(weight, bias, bits)
    rounded = layer.weight.float()
    if layer.offset is not None:
        rounded = dequantize_int4(layer.weight, layer.scale.float(), layer.offset.float())
    elif layer.scale is not None:
        rounded = rounded * layer.scale.float()[:, None]
    for rows in (1, 3, 40):
        # Numbers that bf16 holds exactly, so that only the order of the sums may differ.
        x = torch.randn(rows, 2, shape[1]).bfloat16().float()[:, :1]
        expected = F.linear(x, rounded, bias)
        size = F.linear(x.abs(), rounded.abs(), bias.abs())  # what is added up in each sum
        gap = ((layer(x) - expected).abs() / size).max()
        assert gap < (2**-8 if rows < 17 else 1e-6), f"{rows} rows: largest difference {gap:.1e}"


@pytest.mark.parametrize("bits", BITS)
def test_few_rows_equal_many(bits):
    layer, x = quantize_linear(matrix(), None, bits), torch.randn(1, 64).bfloat16().float()
    assert can_use_gemv(layer, x), "this shape must go through the kernel, or nothing is compared"
    few, many = gemv(layer, x), dequantized_matmul(layer, x)
    size = F.linear(x.abs(), dequantized_matmul(layer, torch.eye(64)).t().abs()).clamp(min=1e-30)
    gap = ((few - many).abs() / size).max()
    assert gap < 2**-8, f"largest difference {gap:.1e}"
    assert not can_use_gemv(layer, x.expand(40, 64))
    assert not can_use_gemv(quantize_linear(matrix(), None, bits).to("meta"), x)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_a_model_computes_with_its_rounded_matrices(bits, tied):
    """The same model twice: in few bits, and in float32 with the values that these stand for."""
    model, plain = (tiny_language(tie_word_embeddings=tied) for _ in range(2))
    quantize(model, bits)
    small = dict(model.named_modules())
    assert not linear_names(model) and isinstance(model.embed_tokens, QuantizedLinear)
    for name, part in plain.named_modules():
        if isinstance(part, (torch.nn.Linear, torch.nn.Embedding)):
            columns = part.weight.shape[1]
            rounded = dequantized_matmul(small[name], torch.eye(columns)).t()
            assert not torch.equal(rounded, part.weight), name
            part.weight.copy_(rounded)
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    gap = (model(ids) - plain(ids)).abs().max()
    assert gap < 1e-4, f"largest difference {gap:.1e}"


def test_in_bytes_it_is_what_it_says():
    def bytes_of(bits):
        model = tiny_language(hidden_size=256, intermediate_size=256, vocab_size=64)
        if bits:
            quantize(model, bits)
        return sum(p.nbytes for layer in model.layers for p in layer.parameters() if p.ndim > 1)

    whole = bytes_of(None)
    assert bytes_of("bf16") == whole / 2 and bytes_of("int8") == whole / 4
    # 4 bits, and 32 for each group's scale and offset: 5 in all; told here of matrices alone.
    assert bytes_of("int4") == whole * 5 / 32


def test_norms_and_stream_are_computed_in_the_asked_dtype():
    model = tiny_language()
    quantize(model, "int8")
    for dtype in (torch.bfloat16, torch.float32):
        set_compute_dtype(model, dtype)
        assert model.norm.weight.dtype == dtype and model.embed(torch.tensor([[1]])).dtype == dtype
        assert model.layers[0].mlp.up_proj.weight.dtype == torch.int8
        assert model(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ValueError, match="'int3'; expected one of bf16, int8, int4"):
        quantize(tiny_language(), "int3")
    model = tiny_language()
    add_lora(model, ["q_proj"], rank=2, alpha=4)
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj has an adapter: merge_lora"):
        quantize(model, "int8")
    model = tiny_language()
    quantize(model, "int8")
    with pytest.raises(ValueError, match="quantized already"):
        quantize(model, "int4")


# ---------------------------------------------------------------- the two scripts


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Stage two on tiny towers -> the directory with the run and its exports."""
    directory = tmp_path_factory.mktemp("world")
    flags = make_world(directory)
    train_sft.main([*flags, "--steps", "2", "--lora", "--model", "none", "--preset",
                    "qwen2.5-siglip", "--out", str(directory / "sft")])
    for bits in ("int8", "int4"):
        export.main(["--model", str(directory / "sft"), "--to", "merged", "--quantize", bits,
                     "--dtype", "fp32", "--out", str(directory / bits)])
    return directory


def opened(name, *flags):
    flags = script.read_flags(["--device", "cpu", "--dtype", "fp32", *flags])
    return script.load_model(flags, str(name))[0]


@torch.no_grad()
def logits(model):
    ids, K = torch.tensor([[5, 6, 7] + [model.config.image_token_id] * 4 + [8, 9]]), 4
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert model.encode_images(pixels).shape[1] == K
    return model.language.logits(model.language.decode(model.embed(ids, pixels)))


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_checkpoint_in_few_bits_is_opened_without_a_flag(world, bits):
    saved, on_the_spot = opened(world / bits), opened(world / "sft", "--quantize", bits)
    assert torch.equal(logits(saved), logits(on_the_spot))
    assert not torch.equal(logits(saved), logits(opened(world / "sft")))
    kinds = {p.dtype for p in saved.language.parameters()}
    assert {"int8": torch.int8, "int4": torch.uint8}[bits] in kinds
    assert all(p.dtype == torch.float32 for p in saved.vision.parameters()), "eyes stay whole"
    checkpoint = find_model(str(world / bits))
    assert "model.safetensors" in json.loads((checkpoint / "manifest.json").read_text())
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        apart = load_checkpoint(checkpoint, torch.float32)  # as it was before a chat fused layers
        assert set(file.keys()) == {name for name, _ in apart.named_parameters()}


def test_it_answers(world, capsys):
    flags = ["--device", "cpu", "--dtype", "fp32", "--prompt", "Which colour?",
             "--image", str(world / "red.png"), "--max_new_tokens", "8"]
    script.main(["--model", str(world / "int8"), *flags])
    saved = capsys.readouterr().out
    script.main(["--model", str(world / "sft"), "--quantize", "int8", *flags])
    assert capsys.readouterr().out == saved and len(saved) > 1


@pytest.mark.parametrize("native", [True, False])
def test_bf16_on_a_cpu_keeps_bf16_weights_and_its_own_stream(world, native, monkeypatch):
    monkeypatch.setattr(training.precision, "bf16_speedup", lambda: 2.0 if native else 0.5)
    model = opened(world / "sft", "--dtype", "bf16")
    layer = model.language.layers[0].mlp.gate_up_proj
    # Without bf16 instructions the weights are read as bf16 and multiplied in float32.
    assert isinstance(layer, QuantizedLinear) is not native and layer.weight.dtype == torch.bfloat16
    stream = model.language.norm.weight.dtype
    assert stream == (torch.bfloat16 if native else torch.float32)
    assert {p.dtype for p in model.vision.parameters()} == {stream}
    rounded = load_checkpoint(find_model(str(world / "sft")), torch.bfloat16)
    merge_lora(rounded.language)
    assert torch.equal(rounded.language.layers[1].mlp.down_proj.weight,
                       model.language.layers[1].mlp.down_proj.weight)
    assert logits(model).isfinite().all()


def test_int4_and_int8_answer_from_the_cache_as_without(world):
    for bits in ("int8", "int4"):
        model, ids = opened(world / bits), [5, 6, 7]
        with torch.inference_mode():
            for token in generate(model, ids[:3], max_new_tokens=6):
                found = model.language(torch.tensor([ids]))[0, -1]
                # A step goes through the kernel in bf16, the whole row does not.
                assert found[token] > found.max() - 0.05
                ids.append(token)


def damaged(world, tmp_path, change):
    """A copy of the int8 checkpoint with other tensors, and no manifest that would tell."""
    checkpoint, copy = find_model(str(world / "int8")), tmp_path / "step_000002"
    copy.mkdir()
    for file in checkpoint.iterdir():
        if file.name not in ("model.safetensors", "manifest.json"):
            (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    return copy


NAME = "language.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("change, told", [
    (lambda t: t.pop(f"{NAME}.scale"), f"lacks {NAME}.scale .*not complete"),
    (lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].float()}),
     f"{NAME}.weight holds torch.float32, expected torch.int8"),
    (lambda t: t.update({f"{NAME}.scale": t[f"{NAME}.scale"] * float("nan")}),
     f"{NAME}.scale holds not finite"),
    (lambda t: t.update({f"{NAME}.scale": t[f"{NAME}.scale"][:-1].clone()}),
     f"{NAME}.scale has shape"),
    (lambda t: t.update({f"{NAME}.zero": torch.zeros(1)}), f"{NAME}.zero .*no such parameter")])
def test_every_tensor_is_accounted_for(world, tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        load_checkpoint(damaged(world, tmp_path, change))


def test_a_torn_file_is_noticed(world, tmp_path):
    copy = damaged(world, tmp_path, lambda tensors: None)
    checkpoint = find_model(str(world / "int8"))
    (copy / "manifest.json").write_bytes((checkpoint / "manifest.json").read_bytes())
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(CorruptCheckpointError, match="model.safetensors"):
        find_model(str(copy))


def test_config_with_an_unknown_number_of_bits_is_refused(world, tmp_path):
    copy = damaged(world, tmp_path, lambda tensors: None)
    config = {**read_config(copy), "quantize": "int2"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json: .*'int2'; expected one of bf16, int8, int4"):
        load_checkpoint(copy)


def test_what_is_rounded_is_neither_trained_nor_exported_nor_rounded_again(world, tmp_path):
    run = str(world / "int8")
    with pytest.raises(SystemExit, match="weights in int8, which answer and no more: train on"):
        train_sft.main(["--lora", "--model", run, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="export the checkpoint that it was made of"):
        export.main(["--model", run, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="quantized already"):
        script.main(["--model", run, "--quantize", "int4", "--prompt", "hi", "--device", "cpu"])
    with pytest.raises(SystemExit):
        export.read_flags(["--to", "peft", "--quantize", "int8"])
    assert not (tmp_path / "out").exists()
