"""Claim: layouts that transformers does not know, Qwen-7B's and MiniMind's, load to the numbers of
their own code; and the full sizes of all supported models have the published counts."""

import json
import os

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import (
    LANGUAGE,
    QWEN,
    assert_close,
    minimind_shapes,
    random_tensors,
    randomise,
    save_minimind,
    save_qwen,
)
from safetensors.torch import load_file, save_file

import extras.convert.__main__ as command
from extras.convert.minimind import half_split, minimind_config
from extras.convert.published_projector import load_projector
from extras.convert.qwen import qwen2_config
from model.config import ProjectorConfig
from model.generate import KVCache
from model.language import LanguageModel
from model.lora import add_lora, lora_parameters, merge_lora
from model.pretrained.families import family_of, public_names, public_shape
from model.pretrained.files import file_hashes
from model.pretrained.hub import resolve
from model.pretrained.load import load_language
from model.pretrained.pickle_loader import load_plain
from model.pretrained.public_config import read_language_config, read_vision_config
from model.pretrained.save import save_language
from model.projector import Projector
from model.vision import VisionTransformer

IDS = torch.randint(3, 59, (2, 23), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- what the published code computes


def norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def halves_turned(x, theta):
    """x (B,T,H,hd): the first half of each head turns with the second half."""
    B, T, H, hd = x.shape
    angle = torch.arange(T)[:, None] / theta ** (torch.arange(0, hd, 2) / hd)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :hd // 2], x[..., hd // 2:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def neighbours_turned(x, theta):
    """x (B,T,H,hd): each pair of neighbours is a complex number, multiplied by exp(i angle)."""
    B, T, H, hd = x.shape
    angle = torch.arange(T)[:, None] / theta ** (torch.arange(0, hd, 2) / hd)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    pairs = torch.view_as_complex(x.reshape(B, T, H, hd // 2, 2).contiguous())
    return torch.view_as_real(pairs * turn).flatten(3)


def attend(q, k, v):
    """q (B,T,H,hd), k and v (B,T,Hkv,hd) -> (B,T,H*hd), causal, softmax written out."""
    B, T, H, hd = q.shape
    k, v = (t.repeat_interleave(H // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / hd ** 0.5
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).reshape(B, T, H * hd)


def qwen_logits(t, public, ids):
    """Qwen-7B: one matrix for q, k and v, and c_proj(w1(x) * silu(w2(x)))."""
    width, heads, eps = public["hidden_size"], public["num_attention_heads"], 1e-6
    x = t["transformer.wte.weight"][ids]
    for number in range(public["num_hidden_layers"]):
        w = {name.removeprefix(f"transformer.h.{number}."): tensor for name, tensor in t.items()}
        mixed = F.linear(norm(x, w["ln_1.weight"], eps), w["attn.c_attn.weight"],
                         w["attn.c_attn.bias"])
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in mixed.split(width, dim=2))
        q, k = (halves_turned(part, public["rotary_emb_base"]) for part in (q, k))
        x = x + F.linear(attend(q, k, v), w["attn.c_proj.weight"])
        y = norm(x, w["ln_2.weight"], eps)
        open_ = F.linear(y, w["mlp.w1.weight"]) * F.silu(F.linear(y, w["mlp.w2.weight"]))
        x = x + F.linear(open_, w["mlp.c_proj.weight"])
    return F.linear(norm(x, t["transformer.ln_f.weight"], eps), t["lm_head.weight"])


def older_minimind_logits(t, heads, theta, ids, eps=1e-5):
    """MiniMind before April 2025: complex RoPE over neighbours, w2(silu(w1(x)) * w3(x))."""
    x = t["tok_embeddings.weight"][ids]
    head_dim = x.shape[-1] // heads
    for number in range(2):
        w = {name.removeprefix(f"layers.{number}."): tensor for name, tensor in t.items()}
        y = norm(x, w["attention_norm.weight"], eps)
        q, k, v = (F.linear(y, w[f"attention.w{each}.weight"]).unflatten(-1, (-1, head_dim))
                   for each in "qkv")
        q, k = neighbours_turned(q, theta), neighbours_turned(k, theta)
        x = x + F.linear(attend(q, k, v), w["attention.wo.weight"])
        y = norm(x, w["ffn_norm.weight"], eps)
        w1, w2, w3 = (w[f"feed_forward.w{each}.weight"] for each in "123")
        x = x + F.linear(F.silu(F.linear(y, w1)) * F.linear(y, w3), w2)
    return F.linear(norm(x, t["norm.weight"], eps), t["output.weight"])


# ---------------------------------------------------------------- Qwen-7B


@torch.no_grad()
def test_qwen_7b_computes_what_its_own_code_does(tmp_path):
    tensors, public = save_qwen(tmp_path)
    ours = load_language(tmp_path)
    assert ours.config.model_type == "qwen2"
    assert ours.config.intermediate_size == 50, "the file says 100: w1 and w2 together"
    expected = qwen_logits(tensors, public, IDS)
    assert_close(ours(IDS), expected, 2e-4, "qwen-7b")
    swapped = {**tensors, **{f"transformer.h.0.mlp.{a}.weight": tensors[
        f"transformer.h.0.mlp.{b}.weight"] for a, b in (("w1", "w2"), ("w2", "w1"))}}
    other = qwen_logits(swapped, public, IDS)
    assert (other - expected).abs().max() > 1e-2, "the reference tells w1 from w2"


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@torch.no_grad()
def test_qwen_7b_becomes_a_qwen2_bit_by_bit_shard_by_shard(suffix, tmp_path):
    """In the dtype of its files, as transformers and we read it; the first files are untouched."""
    tensors, _ = save_qwen(tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    (tmp_path / "model.safetensors").unlink()
    single = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    shards = shard(tensors, tmp_path, single)
    before = {file: (tmp_path / file).read_bytes() for file in shards}
    directory = resolve(tmp_path)
    assert directory == tmp_path / "converted_model" and len(file_hashes(directory)) == 2
    ours = load_language(tmp_path, None).state_dict()
    held = {"embed_tokens.weight": tensors["transformer.wte.weight"],
            "norm.weight": tensors["transformer.ln_f.weight"], "lm_head.weight": tensors[
                "lm_head.weight"]}
    for number in range(2):
        old, new = f"transformer.h.{number}.", f"layers.{number}."
        for last in ("weight", "bias"):
            for part, tensor in zip("qkv", tensors[f"{old}attn.c_attn.{last}"].split(36)):
                held[f"{new}self_attn.{part}_proj.{last}"] = tensor
        held.update({f"{new}{mine}.weight": tensors[f"{old}{theirs}.weight"]
                     for theirs, mine in (
                         ("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm"),
                         ("attn.c_proj", "self_attn.o_proj"), ("mlp.w1", "mlp.up_proj"),
                         ("mlp.w2", "mlp.gate_proj"), ("mlp.c_proj", "mlp.down_proj"))})
    assert ours.keys() == held.keys()
    assert all(torch.equal(ours[name], held[name]) for name in held)
    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert_close(load_language(tmp_path)(IDS), theirs.eval()(IDS).logits, 2e-4, "read by both")
    assert before == {file: (tmp_path / file).read_bytes() for file in shards}
    (tmp_path / sorted(shards)[0]).unlink()
    with pytest.raises(FileNotFoundError, match="lacks .*-00001-of-00002"):
        load_language(tmp_path)


def shard(tensors, directory, single: str) -> dict:
    """Write two files and their index -> {file: names}."""
    names = sorted(tensors)
    stem, suffix = single.split(".")
    shards = {f"{stem}-00001-of-00002.{suffix}": names[:7],
              f"{stem}-00002-of-00002.{suffix}": names[7:]}
    write = save_file if suffix == "safetensors" else torch.save
    for file, part in shards.items():
        write({name: tensors[name] for name in part}, directory / file)
    (directory / f"{single}.index.json").write_text(json.dumps(
        {"weight_map": {name: file for file, part in shards.items() for name in part}}))
    return shards


def test_a_converted_qwen_7b_trains_and_saves_and_the_files_stay(tmp_path):
    tensors, _ = save_qwen(tmp_path)
    before = file_hashes(resolve(tmp_path))
    ours = load_language(tmp_path)
    ours(IDS).square().mean().backward()
    with torch.no_grad():
        for p in ours.parameters():
            p.sub_(p.grad)
    save_file(dict(ours.named_parameters()), tmp_path / "trained.safetensors")
    assert file_hashes(resolve(tmp_path)) == before
    q_proj = load_file(tmp_path / "trained.safetensors")["layers.0.self_attn.q_proj.weight"]
    assert torch.equal(q_proj, ours.layers[0].self_attn.q_proj.weight)
    assert not torch.equal(q_proj, tensors["transformer.h.0.attn.c_attn.weight"][:36])


def test_its_own_tables_are_passed_over_and_what_nobody_knows_is_named(tmp_path):
    tensors, _ = save_qwen(tmp_path)
    tables = {f"transformer.{name}": torch.ones(3) for name in (
        "rotary_emb.inv_freq", "h.0.attn.rotary_emb.inv_freq", "h.1.attn.masked_bias",
        "h.1.attn.bias")}
    save_file({**tensors, **tables}, tmp_path / "model.safetensors")
    load_language(tmp_path)
    save_file({**tensors, "transformer.h.0.attn.other.weight": torch.ones(3)},
              tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unknown: transformer.h.0.attn.other.weight"):
        load_language(tmp_path)


@pytest.mark.parametrize("change, word", [
    ({"rotary_pct": 0.5}, "rotary_pct"), ({"no_bias": False}, "no_bias"),
    ({"kv_channels": 8}, "kv_channels"), ({"scale_attn_weights": False}, "scale_attn_weights"),
])
def test_a_qwen_config_that_we_would_get_wrong_is_refused(change, word):
    with pytest.raises(ValueError, match=word):
        qwen2_config({**QWEN, **change})


def test_the_first_release_of_qwen_7b_is_named():
    first = {"model_type": "qwen", "n_embd": 4096, "n_head": 32, "n_layer": 32}
    with pytest.raises(ValueError, match="first release"):
        qwen2_config(first)


def test_a_qwen_tensor_of_another_shape_or_name_raises(tmp_path):
    tensors, _ = save_qwen(tmp_path)
    name = "transformer.h.0.attn.c_attn.weight"
    save_file({**tensors, name: torch.zeros(36, 108)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"q_proj\.weight is \[12, 108\].*\[36, 36\]"):
        load_language(tmp_path)
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing: model.layers.0.self_attn.k_proj.weight"):
        load_language(tmp_path)


@torch.no_grad()
def test_qwen_7b_stops_where_its_long_context_tricks_begin(tmp_path):
    tensors, public = save_qwen(tmp_path, seq_length=16)
    ours = load_language(tmp_path)
    assert_close(ours(IDS[:, :16]), qwen_logits(tensors, public, IDS[:, :16]), 2e-4, "16 of 16")
    with pytest.raises(ValueError, match="row of 17 tokens: past 16 .*dynamic NTK"):
        ours(IDS[:, :17])
    cache = KVCache(num_layers=2, capacity=32)
    ours.decode(ours.embed(IDS[:, :15]), cache=cache)
    ours.decode(ours.embed(IDS[:, 15:16]), cache=cache)
    with pytest.raises(ValueError, match="row of 17 tokens"):
        ours.decode(ours.embed(IDS[:, 16:17]), cache=cache)
    plain = {"use_dynamic_ntk": False, "use_logn_attn": False}  # then nothing changes past it
    tensors, public = save_qwen(tmp_path, seq_length=16, **plain)
    assert_close(load_language(tmp_path)(IDS), qwen_logits(tensors, public, IDS), 2e-4, "plain")


# ---------------------------------------------------------------- LoRA


def test_merged_adapters_are_added_to_their_rows_of_the_fused_matrix(tmp_path):
    """The merged q, k, v, stacked again, are c_attn + (alpha / rank) B A of each."""
    tensors, public = save_qwen(tmp_path / "base")
    ours = load_language(tmp_path / "base")
    add_lora(ours, ["q_proj", "k_proj", "v_proj"], rank=4, alpha=8)
    attention = ours.layers[1].self_attn
    for p in lora_parameters(ours):
        torch.nn.init.normal_(p, std=0.1)
    learned = torch.cat([2 * each.lora_b @ each.lora_a for each in (
        attention.q_proj, attention.k_proj, attention.v_proj)])
    with torch.no_grad():
        adapted = ours(IDS)
        merge_lora(ours)
        save_language(ours, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "transformer.h.{}.attn.c_attn.weight"
    stacked = {name.format(number): torch.cat([
        merged[f"model.layers.{number}.self_attn.{part}_proj.weight"] for part in "qkv"])
        for number in range(2)}
    name = name.format(1)
    assert_close(stacked[name], tensors[name] + learned, 1e-6, "merged c_attn")
    assert_close(qwen_logits({**tensors, **stacked}, public, IDS), adapted, 2e-4,
                 "merged, by Qwen-7B's code")


# ---------------------------------------------------------------- MiniMind


@pytest.mark.parametrize("generation, heads, theta", [("v1", 16, 1e4), ("2 older", 8, 1e6)])
@torch.no_grad()
def test_older_minimind_computes_what_its_own_code_does(generation, heads, theta, tmp_path):
    tensors = save_minimind(tmp_path / "llm.pth", generation)
    ours = load_language(tmp_path / "llm.pth")
    assert ours.config.model_type == "llama" and ours.config.num_attention_heads == heads
    expected = older_minimind_logits(tensors, heads, theta, IDS)
    assert_close(ours(IDS), expected, 2e-4, generation)
    unturned = LanguageModel(ours.config)
    unturned.load_state_dict(ours.state_dict())
    for number, layer in enumerate(unturned.layers):  # as if the rows had not been moved
        layer.self_attn.q_proj.weight.copy_(tensors[f"layers.{number}.attention.wq.weight"])
        layer.self_attn.k_proj.weight.copy_(tensors[f"layers.{number}.attention.wk.weight"])
    assert (unturned(IDS) - expected).abs().max() > 1e-2, "the order of the rows matters"


def test_half_split_moves_neighbours_half_a_head_apart():
    rows = torch.arange(12)[:, None]  # two heads of 6: (0,1) (2,3) (4,5) and (6,7) (8,9) (10,11)
    assert half_split(rows, 6)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


@pytest.mark.parametrize("generation, family, facts", [
    ("2", "Llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    ("3", "Qwen3", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "head_dim": 8}),
])
@torch.no_grad()
def test_newer_minimind_equals_the_transformers_model_of_its_shape(
        generation, family, facts, tmp_path):
    config = getattr(transformers, family + "Config")(**{
        **LANGUAGE, "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2,
        "rope_theta": 1e6, "tie_word_embeddings": True, **facts})
    theirs = randomise(getattr(transformers, family + "ForCausalLM")(config))
    tensors = theirs.state_dict()
    assert {k: tuple(v.shape) for k, v in tensors.items()} == minimind_shapes(generation)
    torch.save(tensors, tmp_path / "llm.pth")
    ours = load_language(tmp_path / "llm.pth")
    assert ours.config.model_type == family.lower() and ours.config.tie_word_embeddings
    assert_close(ours(IDS), theirs(IDS).logits, 2e-4, f"MiniMind {generation}")
    save_language(ours, tmp_path / "written")
    again = type(theirs).from_pretrained(tmp_path / "written")
    assert_close(again(IDS).logits, ours(IDS), 2e-4, "written, read by transformers")


@pytest.mark.parametrize("generation, sizes, count", [
    ("2 older", {"width": 512, "middle": 1408, "layers": 8}, 25_829_888),  # MiniMind2-Small
    ("2", {"width": 512, "middle": 1408, "layers": 8}, 25_829_888),
    ("2", {"width": 768, "middle": 2048, "layers": 16}, 104_030_976),  # MiniMind2
    ("3", {"width": 768, "middle": 2432, "layers": 8}, 63_912_192),  # minimind-3
])
def test_full_minimind_shapes_tell_the_published_model(generation, sizes, count):
    config = minimind_config(minimind_shapes(generation, words=6400, **sizes), {})
    with torch.device("meta"):
        model = LanguageModel(config)
    assert sum(p.numel() for p in model.parameters()) == count
    assert config.head_dim == (64 if sizes["width"] == 512 else 96)
    assert (config.num_attention_heads, config.num_key_value_heads) == (
        8, 4 if generation == "3" else 2)
    assert (config.rope_theta, config.tie_word_embeddings, config.qk_norm) == (
        1e6, True, generation == "3")


@torch.no_grad()
def test_half_precision_and_a_visual_minimind(tmp_path):
    """sft_vlm_768.pth: everything in float16, the projector beside the language model."""
    tensors = save_minimind(tmp_path / "llm.pth", "3")
    alone = load_language(tmp_path / "llm.pth")
    visual = {"vision_proj.mlp.0.weight": torch.ones(36), "model.freqs_cos": torch.ones(9, 8),
              "vision_encoder.embeddings.patch_embedding.weight": torch.ones(4)}
    torch.save({name: tensor.half() for name, tensor in {**tensors, **visual}.items()},
               tmp_path / "vlm.pth")
    ours = load_language(tmp_path / "vlm.pth")
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert torch.equal(ours.norm.weight, tensors["model.norm.weight"].half().float())
    assert_close(ours(IDS), alone(IDS), 0.05, "float16 on the disk")


@torch.no_grad()
def test_a_config_json_of_miniminds_own_goes_before_the_table(tmp_path):
    """A directory in MiniMind's transformers layout: config.json and pytorch_model.bin."""
    tensors = save_minimind(tmp_path / "pytorch_model.bin", "2 older")
    public = {"model_type": "minimind", "n_heads": 16, "norm_eps": 1e-5, "rope_theta": 5e5}
    (tmp_path / "config.json").write_text(json.dumps(public))
    ours = load_language(tmp_path)
    assert (ours.config.num_attention_heads, ours.config.rope_theta) == (16, 5e5)
    assert_close(ours(IDS), older_minimind_logits(tensors, 16, 5e5, IDS), 2e-4, "by config.json")
    (tmp_path / "config.json").write_text(json.dumps(
        {**public, "rope_scaling": {"type": "yarn", "factor": 16}}))
    with pytest.raises(ValueError, match="yarn"):
        load_language(tmp_path)


@torch.no_grad()
def test_a_pth_file_is_a_name_a_lone_one_in_a_directory_too(tmp_path):
    path = tmp_path / "llm_768.pth"
    save_minimind(path, "3")
    (tmp_path / "tokenizer.json").write_text("{}")
    directory = resolve(str(path))
    assert directory == resolve(tmp_path) == tmp_path / "converted_llm_768"
    assert {file.name for file in directory.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "converted_from.json"}
    assert load_language(tmp_path).config == load_language(path).config
    before = load_language(path)(IDS)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert_close(theirs.eval()(IDS).logits, before, 2e-4, "the files are public ones")
    hashes = file_hashes(directory)
    torch.save({name: 2 * tensor for name, tensor in load_plain(path).items()}, path)
    os.utime(path, (1, 1))  # another file under the same name: converted anew
    assert file_hashes(resolve(path)) != hashes
    assert not torch.equal(load_language(path)(IDS), before)
    assert not list(tmp_path.glob(".*")), "nothing is left of the way there"
    save_minimind(tmp_path / "sft_vlm_768.pth", "3")
    with pytest.raises(ValueError, match="2 .pth files: give the path of the one"):
        load_language(tmp_path)
    for wrong in (tmp_path / "other.pth", "other.pth", "out/other.pth"):  # none asks the hub
        with pytest.raises(FileNotFoundError, match=r"other\.pth, and no \.pth file"):
            resolve(wrong)


@torch.no_grad()
def test_the_command_writes_the_same_files_as_the_loader_does(tmp_path, capsys):
    save_minimind(tmp_path / "llm.pth", "2 older")
    command.main([str(tmp_path / "llm.pth"), str(tmp_path / "out")])
    assert "config.json" in capsys.readouterr().out
    assert file_hashes(tmp_path / "out") == file_hashes(resolve(tmp_path / "llm.pth"))
    with pytest.raises(SystemExit, match="is there already"):
        command.main([str(tmp_path / "llm.pth"), str(tmp_path / "out")])
    torch.save({"x": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(SystemExit, match="no MiniMind"):
        command.main([str(tmp_path / "other.pth"), str(tmp_path / "another")])
    assert not (tmp_path / "another").exists()


@pytest.mark.parametrize("change, words", [
    (lambda t: t.update({"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(2, 2)}),
     "mixture of experts"),
    (lambda t: t.pop("model.embed_tokens.weight"), "no MiniMind.*model.embed_tokens.weight"),
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing: model.layers.1.mlp.up_proj"),
    (lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(16, 64),
                         "model.layers.0.self_attn.v_proj.weight": torch.ones(16, 64)}),
     "do not tell the number of heads"),
])
def test_another_pth_is_refused_with_the_reason(change, words, tmp_path):
    tensors = random_tensors(minimind_shapes("3"))
    change(tensors)
    torch.save(tensors, tmp_path / "llm.pth")
    with pytest.raises(ValueError, match=words):
        load_language(tmp_path / "llm.pth")


# ---------------------------------------------------------------- MiniMind-V's projector


@torch.no_grad()
def test_the_projector_of_minimind_3v(tmp_path):
    published = torch.nn.Sequential(torch.nn.LayerNorm(36), torch.nn.Linear(36, 64),
                                    torch.nn.GELU(), torch.nn.Linear(64, 64))
    tensors = save_minimind(tmp_path / "llm.pth", "3")
    torch.save({**tensors, **{f"vision_proj.mlp.{name}": tensor
                              for name, tensor in published.state_dict().items()}},
               tmp_path / "vlm.pth")
    projector = Projector(ProjectorConfig("norm_mlp", 36, 64))
    load_projector(projector, tmp_path / "vlm.pth")
    features = torch.randn(2, 9, 36) * 5
    assert_close(projector(features), published(features), 1e-6, "minimind-3v's projector")
    with pytest.raises(ValueError, match="a language model alone"):
        load_projector(projector, tmp_path / "llm.pth")


@torch.no_grad()
def test_the_projector_of_minimind2_v(tmp_path):
    published = torch.nn.Linear(36, 64)
    torch.save({f"vision_proj.vision_proj.0.{name}": tensor
                for name, tensor in published.state_dict().items()}, tmp_path / "vlm.pth")
    projector = Projector(ProjectorConfig("linear", 36, 64))
    load_projector(projector, tmp_path / "vlm.pth")
    features = torch.randn(2, 9, 36)
    assert_close(projector(features), published(features), 1e-6, "MiniMind2-V's projector")


def test_the_release_between_them_is_refused(tmp_path):
    torch.save({f"vision_proj.mlp.{number}.{last}": torch.ones(3)
                for number in (0, 2) for last in ("weight", "bias")}, tmp_path / "vlm.pth")
    with pytest.raises(ValueError, match=r"vision_proj\.mlp\.2"):
        load_projector(Projector(ProjectorConfig("mlp", 36, 64)), tmp_path / "vlm.pth")


# ---------------------------------------------------------------- full sizes, on the meta device

QWEN2 = {"model_type": "qwen2", "hidden_act": "silu", "max_position_embeddings": 32768,
         "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
         "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936}
LANGUAGES = {  # config.json as published, without what says nothing about the shape; parameters
    "Qwen/Qwen2.5-0.5B": ({
        **QWEN2, "hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 24,
        "num_attention_heads": 14, "num_hidden_layers": 24, "sliding_window": 32768,
        "use_mrope": False}, 494_032_768),
    "Qwen/Qwen2.5-1.5B-Instruct": ({
        **QWEN2, "hidden_size": 1536, "intermediate_size": 8960, "max_window_layers": 21,
        "num_attention_heads": 12, "num_hidden_layers": 28, "sliding_window": 32768},
        1_543_714_304),
    "Qwen/Qwen3-0.6B": ({
        "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936}, 596_049_920),
    "Qwen/Qwen-7B-Chat": (qwen2_config({
        **QWEN, "hidden_size": 4096, "intermediate_size": 22016, "kv_channels": 128,
        "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 151936}),
        7_721_324_544),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_full_size_language_model_has_the_published_count(name):
    public, count = LANGUAGES[name]
    with torch.device("meta"):
        model = LanguageModel(read_language_config(public))
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.config.context_limit == (8192 if name == "Qwen/Qwen-7B-Chat" else None)
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**public)
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in theirs.parameters()) == count
    assert shapes_of(model) == {n: list(p.shape) for n, p in theirs.named_parameters()}


def shapes_of(model) -> dict[str, list[int]]:
    """{published name: shape} of what we hold."""
    layout = family_of(model.config.model_type)
    return {public: public_shape(ours, model.get_parameter(ours), layout)
            for public, ours in public_names(model).items()}


TOWERS = {  # config.json as published; patches; parameters of the tower as far as we hold it
    "google/siglip-base-patch16-224": (
        {"model_type": "siglip", "vision_config": {
            "model_type": "siglip_vision_model", "patch_size": 16}}, 196, 85_797_120),
    "google/siglip-so400m-patch14-384": (
        {"model_type": "siglip", "vision_config": {
            "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
            "model_type": "siglip_vision_model", "num_attention_heads": 16,
            "num_hidden_layers": 27, "patch_size": 14}}, 729, 412_987_248),
    # SigLIP2 of a fixed resolution is published as a "siglip"; "siglip2" is NaFlex alone.
    "google/siglip2-base-patch32-256": (
        {"model_type": "siglip", "text_config": {"vocab_size": 256000}, "vision_config": {
            "image_size": 256, "model_type": "siglip_vision_model", "patch_size": 32}},
        64, 87_465_216),
    "openai/clip-vit-base-patch32": (
        {"model_type": "clip", "vision_config": {
            "dropout": 0.0, "model_type": "clip_vision_model"}}, 49, 87_454_464),
    "openai/clip-vit-base-patch16": (
        {"model_type": "clip", "vision_config": {
            "dropout": 0.0, "model_type": "clip_vision_model", "patch_size": 16}}, 196,
        85_797_888),
    "openai/clip-vit-large-patch14": (
        {"model_type": "clip", "projection_dim": 768, "vision_config": {
            "dropout": 0.0, "hidden_size": 1024, "intermediate_size": 4096,
            "model_type": "clip_vision_model", "num_attention_heads": 16,
            "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}}, 256,
        303_177_728),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_full_size_tower_is_the_one_of_transformers(name):
    public, patches, count = TOWERS[name]
    with torch.device("meta"):
        model = VisionTransformer(read_vision_config(public))
        family = {"siglip": "Siglip", "clip": "CLIP"}[public["model_type"]]
        config = getattr(transformers, family + "Config")(**public).vision_config
        theirs = getattr(transformers, family + "VisionModel")(config)
        side = model.config.image_size
        assert model(torch.zeros(1, 3, side, side)).shape == (1, patches, config.hidden_size)
    assert model.config.patches == patches
    left_alone = ("head.",) if family == "Siglip" else ("post_layernorm.",)
    expected = {n.removeprefix("vision_model."): list(p.shape)
                for n, p in theirs.named_parameters()}
    expected = {n: shape for n, shape in expected.items() if not n.startswith(left_alone)}
    assert {n.removeprefix("vision_model."): shape
            for n, shape in shapes_of(model).items()} == expected
    assert sum(p.numel() for p in model.parameters()) == count
