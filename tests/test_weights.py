"""Claim: public weights load whole or not at all, and what we write, the public classes load."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers
from families import VISION, assert_close, public_language, public_vision
from safetensors.torch import load_file, save_file

import model.pretrained.files
import train_sft
from model.pretrained.checkpoint import newest_checkpoint
from model.pretrained.families import LANGUAGE_FAMILIES, VISION_FAMILIES, family_of
from model.pretrained.files import file_hashes
from model.pretrained.hub import resolve
from model.pretrained.load import load_checkpoint, load_language, load_vision
from model.pretrained.save import public_tensors, save_language, save_vision
from tests.tiny import make_world

LANGUAGES = [("Qwen2", {}), ("Qwen2", {"tie_word_embeddings": True}), ("Qwen3", {"head_dim": 10}),
             ("Llama", {})]
IDS = torch.arange(3, 23).view(2, 10)
PIXELS = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def qwen2(tmp_path):
    """A directory with a public model, and the model."""
    theirs = public_language("Qwen2")
    theirs.save_pretrained(tmp_path)
    return tmp_path, theirs


def edit(directory, change):
    """Rewrite the weight file after change(tensors)."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# ---------------------------------------------------------------- every tensor accounted for


def test_a_renamed_tensor_is_named_on_both_sides(qwen2):
    directory, _ = qwen2
    name = "model.layers.1.mlp.up_proj.weight"
    edit(directory, lambda t: t.__setitem__("model.layers.1.mlp.up.weight", t.pop(name)))
    with pytest.raises(ValueError) as error:
        load_language(directory)
    assert f"missing: {name}" in str(error.value)
    assert "unknown: model.layers.1.mlp.up.weight" in str(error.value)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.q_proj.bias",
                                  "lm_head.weight", "model.embed_tokens.weight"])
def test_a_missing_tensor_raises(qwen2, name):
    edit(qwen2[0], lambda t: t.pop(name))
    with pytest.raises(ValueError, match=f"missing: {name}"):
        load_language(qwen2[0])


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "rope.inv_freq",
                                  "model.layers.0.self_attn.q_proj.lora_a",
                                  "model.layers.0.mlp.up_proj.bias", "visual.patch.weight"])
def test_an_unknown_tensor_raises(qwen2, name):
    edit(qwen2[0], lambda t: t.__setitem__(name, torch.zeros(2)))
    with pytest.raises(ValueError, match=f"unknown: {name}"):
        load_language(qwen2[0])


@pytest.mark.parametrize("shape", [(36, 50), (50, 37), (1, 50, 36), (1800,)])
def test_a_misshapen_tensor_raises_with_both_shapes(qwen2, shape):
    """(36,50) holds as many numbers as (50,36): it must not be reshaped into fitting."""
    name = "model.layers.2.mlp.up_proj.weight"
    edit(qwen2[0], lambda t: t.__setitem__(name, torch.zeros(shape)))
    with pytest.raises(ValueError) as error:
        load_language(qwen2[0])
    assert f"{name} is {list(shape)} in the file" in str(error.value)
    assert "[50, 36]" in str(error.value)


def test_another_models_config_raises(qwen2):
    path = qwen2[0] / "config.json"
    public = json.loads(path.read_text())
    path.write_text(json.dumps({**public, "model_type": "llama"}))
    with pytest.raises(ValueError, match=r"unknown: model\.layers\.0\.self_attn\.k_proj\.bias"):
        load_language(qwen2[0])
    path.write_text(json.dumps({**public, "num_hidden_layers": 40}))
    with pytest.raises(ValueError, match="and .* more"):  # a readable message, not 444 lines
        load_language(qwen2[0])


def test_a_directory_without_config_or_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_language(tmp_path)
    public_language("Qwen2").config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_language(tmp_path)


def test_a_vision_position_table_of_another_size_raises(tmp_path):
    public_vision("Siglip").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_size": 64}))
    with pytest.raises(ValueError, match=r"position_embedding\.weight is \[9, 36\].*\[16, 36\]"):
        load_vision(tmp_path)


# ---------------------------------------------------------------- heads, shards, dtypes, memory


def test_a_tied_head_that_is_stored_all_the_same(tmp_path):
    theirs = public_language("Qwen2", tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.__setitem__(
        "lm_head.weight", t["model.embed_tokens.weight"].clone()))
    ours = load_language(tmp_path)
    assert not hasattr(ours, "lm_head")
    with torch.no_grad():
        assert_close(ours(IDS), theirs(IDS).logits, 2e-4, "tied head stored")


def public_logits(directory) -> torch.Tensor:
    """Of what transformers makes of the directory."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(
        IDS).logits


@torch.no_grad()
@pytest.mark.parametrize("family, shard, prefix, dtype", [
    ("Qwen2", "9GB", "model.", torch.float32), ("Qwen3", "12KB", "model.", torch.float32),
    ("Llama", "9GB", "", torch.float32), ("Llama", "9GB", "model.", torch.bfloat16)])
def test_another_head_beside_a_tied_config_is_used(family, shard, prefix, dtype, tmp_path, capsys):
    """As training or merge_and_unload leaves it; dtype: of the head alone."""
    tied = {"tie_word_embeddings": True}
    theirs = public_language(family, **tied)
    state = theirs.state_dict()
    head = (state.pop("lm_head.weight") * 1.5).roll(1, 0).to(dtype)
    public = {name.replace("model.", prefix): tensor for name, tensor in state.items()}
    theirs.config.save_pretrained(tmp_path)
    if shard == "12KB":  # the head in a file of its own
        save_file(public, tmp_path / "model-1.safetensors", metadata={"format": "pt"})
        save_file({"lm_head.weight": head}, tmp_path / "model-2.safetensors",
                  metadata={"format": "pt"})
        places = {**dict.fromkeys(public, "model-1.safetensors"),
                  "lm_head.weight": "model-2.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places}))
    else:
        save_file({**public, "lm_head.weight": head}, tmp_path / "model.safetensors",
                  metadata={"format": "pt"})
    ours = load_language(tmp_path)
    assert "another one, lm_head.weight: it is used" in capsys.readouterr().err
    assert torch.equal(ours.lm_head.weight, head.float())
    assert not ours.config.tie_word_embeddings
    if prefix:
        assert_close(ours(IDS), public_logits(tmp_path), 2e-4, "another head")
    save_language(ours, tmp_path / "saved")  # with a config.json that tells
    assert_close(load_language(tmp_path / "saved")(IDS), ours(IDS), 0, "saved")
    assert_close(public_logits(tmp_path / "saved"), ours(IDS), 2e-4, "saved, by transformers")
    assert not capsys.readouterr().err.count("lm_head.weight: it is used")


@torch.no_grad()
def test_a_tied_table_under_the_name_of_the_head_is_read(tmp_path):
    """safetensors' save_model keeps one name of a tensor with two."""
    theirs = public_language("Llama", tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.__setitem__("lm_head.weight", t.pop("model.embed_tokens.weight")))
    ours = load_language(tmp_path)
    assert ours.config.tie_word_embeddings
    assert_close(ours(IDS), theirs(IDS).logits, 2e-4, "the head's name")
    assert_close(ours(IDS), public_logits(tmp_path), 2e-4, "transformers")
    edit(tmp_path, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(ValueError, match="missing: model.embed_tokens.weight"):
        load_language(tmp_path)


def test_a_run_on_another_head_beside_a_tied_config_can_be_loaded_again(tmp_path):
    flags = make_world(tmp_path, count=4)
    directory = tmp_path / "language"
    edit(directory, lambda t: t.__setitem__(
        "lm_head.weight", t["model.embed_tokens.weight"].roll(1, 0)))
    train_sft.main([*flags, "--model", "none", "--lora", "--steps", "1", "--save_steps", "1",
                    "--learning_rate", "1e-30", "--out", str(tmp_path / "run")])
    whole = load_checkpoint(newest_checkpoint(tmp_path / "run"))
    with torch.no_grad():
        assert_close(whole.language(IDS), load_language(directory)(IDS), 0, "logits")
        assert_close(whole.language(IDS), public_logits(directory), 2e-4, "of transformers")


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_single_file_beside_an_index_is_read_as_in_transformers(suffix, qwen2, tmp_path):
    """Shards of yesterday, and what was merged today."""
    directory, theirs = tmp_path / "both", qwen2[1]
    theirs.save_pretrained(directory, max_shard_size="12KB")
    for parameter in theirs.parameters():
        parameter.mul_(1.5)
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    if suffix == "safetensors":
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        for file in directory.glob("*.safetensors*"):
            file.unlink()
        torch.save(tensors, directory / "pytorch_model.bin")
        (directory / "pytorch_model.bin.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(tensors, "pytorch_model-1.bin")}))
    ours = load_language(directory)(IDS)
    assert_close(ours, theirs(IDS).logits, 2e-4, "the single file")
    assert_close(ours, public_logits(directory), 2e-4, "transformers")


def test_shards_equal_one_file(qwen2, tmp_path):
    _, theirs = qwen2
    directory = tmp_path / "shards"
    theirs.save_pretrained(directory, max_shard_size="12KB")
    shards = sorted(directory.glob("*.safetensors"))
    assert len(shards) > 4
    ours = load_language(directory)
    with torch.no_grad():
        assert_close(ours(IDS), theirs(IDS).logits, 2e-4, f"{len(shards)} shards")
    assert file_hashes(directory).keys() == {path.name for path in shards}
    shards[2].unlink()
    with pytest.raises(FileNotFoundError, match=shards[2].name):
        load_language(directory)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_come_in_the_dtype_that_was_asked_for(stored, dtype, tmp_path):
    theirs = public_language("Llama").to(stored)
    theirs.save_pretrained(tmp_path)
    ours = load_language(tmp_path, dtype)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    assert all(p.requires_grad and p.device.type == "cpu" for p in ours.parameters())
    expected = theirs.model.layers[2].mlp.up_proj.weight.to(dtype)
    assert torch.equal(ours.layers[2].mlp.up_proj.weight, expected)


@pytest.mark.parametrize("layer, blocks", [(-1, 3), (-2, 2)])
def test_only_what_is_needed_is_read(layer, blocks, tmp_path, monkeypatch):
    """A whole CLIP holds a text tower as large again: its numbers never leave the disk."""
    text = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 50}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION)
    theirs = transformers.CLIPModel(config)
    theirs.save_pretrained(tmp_path)
    read = []

    class Recorder:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            self.inside = self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def get_tensor(self, name):
            read.append(name)
            return self.inside.get_tensor(name)

        def __getattr__(self, name):
            return getattr(self.inside, name)

    real = model.pretrained.files.safe_open
    monkeypatch.setattr(model.pretrained.files, "safe_open", Recorder)
    ours = load_vision(tmp_path, feature_layer=layer)
    assert len(read) == len(ours.state_dict()) == 5 + 16 * blocks
    with torch.no_grad():
        out = theirs.vision_model(PIXELS, output_hidden_states=True)
        expected = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        assert_close(ours(PIXELS), expected[:, 1:], 2e-4, f"out of a whole CLIP, layer {layer}")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_weights_in_their_stored_dtype_are_the_mapped_file_and_no_copy(qwen2):
    directory, _ = qwen2
    ours, mapped = load_language(directory), []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(directory / "model.safetensors") in line:
            mapped.append([int(end, 16) for end in line.split()[0].split("-")])
    for name, p in ours.named_parameters():
        assert any(start <= p.data_ptr() < end for start, end in mapped), name


def test_a_loaded_model_can_be_trained_and_the_file_stays_as_it_was(qwen2):
    """The weights are the mapped file itself, in pages of our own as soon as they change."""
    directory, _ = qwen2
    before = file_hashes(directory)
    ours = load_language(directory)
    ours(IDS).sum().backward()
    with torch.no_grad():
        for p in ours.parameters():
            p.sub_(0.1 * p.grad)
    assert file_hashes(directory) == before
    again = load_language(directory)
    assert not torch.equal(again.norm.weight, ours.norm.weight)


# ---------------------------------------------------------------- pytorch_model.bin


@pytest.fixture
def qwen2_bin(qwen2):
    """The same model as older releases publish it."""
    directory, theirs = qwen2
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory, theirs


@torch.no_grad()
def test_a_bin_file_equals_the_public_model(qwen2_bin):
    directory, theirs = qwen2_bin
    assert_close(load_language(directory)(IDS), theirs(IDS).logits, 2e-4, "pytorch_model.bin")
    assert file_hashes(resolve(directory)).keys() == {"model.safetensors"}


@torch.no_grad()
def test_shards_of_bin_files_equal_one(qwen2_bin):
    directory, theirs = qwen2_bin
    tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
    place = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(place.values()):
        torch.save({name: t for name, t in tensors.items() if place[name] == file},
                   directory / file)
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": place}))
    (directory / "pytorch_model.bin").unlink()
    assert_close(load_language(directory)(IDS), theirs(IDS).logits, 2e-4, "two .bin shards")
    assert len(file_hashes(resolve(directory))) == 2
    (directory / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match="pytorch_model-00002-of-00002.bin"):
        load_language(directory)


def test_safetensors_are_read_where_both_lie(qwen2):
    (qwen2[0] / "pytorch_model.bin").write_bytes(b"never opened")
    load_language(qwen2[0])
    assert file_hashes(qwen2[0]).keys() == {"model.safetensors"}


@torch.no_grad()
def test_a_file_of_pytorch_before_1_6_is_read(qwen2_bin):
    directory, theirs = qwen2_bin
    tensors = torch.load(directory / "pytorch_model.bin", weights_only=True)
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_close(load_language(directory)(IDS), theirs(IDS).logits, 2e-4, "no zip archive")


@torch.no_grad()
def test_a_whole_clip_in_a_bin_file(tmp_path):
    text = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 50}
    theirs = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config=VISION)).eval()
    theirs.config.save_pretrained(tmp_path)
    tensors = {**theirs.state_dict(), "vision_model.embeddings.position_ids": torch.arange(9)}
    torch.save({name: t.half() for name, t in tensors.items()}, tmp_path / "pytorch_model.bin")
    expected = theirs.half().float().vision_model(PIXELS).last_hidden_state[:, 1:]
    assert_close(load_vision(tmp_path)(PIXELS), expected, 2e-4, "CLIP, .bin, float16")


class Trap:
    """Pickles to an order to make a file: what a wicked .bin would do, and worse."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_file_that_would_run_code_is_refused_and_none_of_it_runs(qwen2_bin):
    directory, _ = qwen2_bin
    torch.save({"model.norm.weight": Trap(directory / "ran")}, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors.*refused"):
        load_language(directory)
    assert not (directory / "ran").exists()


@pytest.mark.parametrize("content, words", [
    ({"model": {"a": torch.ones(1)}, "epoch": 3}, "'model', 'epoch'.*state of a training run"),
    ([torch.ones(1)], "holds a list"),
])
def test_a_bin_file_of_other_content_is_refused(content, words, qwen2_bin):
    torch.save(content, qwen2_bin[0] / "pytorch_model.bin")
    with pytest.raises(ValueError, match=words):
        load_language(qwen2_bin[0])


def test_a_bin_file_that_was_cut_short_is_named(qwen2_bin):
    path = qwen2_bin[0] / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read"):
        load_language(qwen2_bin[0])


def test_a_model_out_of_a_bin_file_can_be_trained_and_the_file_stays_as_it_was(qwen2_bin):
    directory, _ = qwen2_bin
    before, converted = (directory / "pytorch_model.bin").read_bytes(), resolve(directory)
    hashes = file_hashes(converted)
    ours = load_language(directory)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(1)
    assert file_hashes(converted) == hashes
    assert (directory / "pytorch_model.bin").read_bytes() == before


# ---------------------------------------------------------------- towers and their public names


def test_a_tower_out_of_a_whole_siglip(tmp_path):
    text = {"hidden_size": 36, "intermediate_size": 30, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 50}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    theirs = transformers.SiglipModel(config).eval()
    theirs.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("text_model.") for name in names)
    with torch.no_grad():
        expected = theirs.vision_model(PIXELS).last_hidden_state
        assert_close(load_vision(tmp_path)(PIXELS), expected, 2e-4, "out of a whole SigLIP")


@pytest.mark.parametrize("family", ["Siglip", "CLIP"])
def test_a_tower_saved_alone_loads_with_and_without_the_prefix(family, tmp_path):
    """transformers 5 leaves "vision_model." away, everything published before has it."""
    theirs = public_vision(family)
    theirs.save_pretrained(tmp_path)
    tensors = {k.removeprefix("vision_model."): v
               for k, v in load_file(tmp_path / "model.safetensors").items()}
    with torch.no_grad():
        expected = theirs(PIXELS).last_hidden_state[:, int(family == "CLIP"):]
        for prefix in ("", "vision_model."):
            named = {prefix + k: v for k, v in tensors.items()}
            named[prefix + "embeddings.position_ids"] = torch.arange(9)[None]  # older files do
            save_file(named, tmp_path / "model.safetensors")
            assert_close(load_vision(tmp_path)(PIXELS), expected, 2e-4, f"{family} {prefix!r}")


def test_an_unknown_tensor_in_a_tower_raises(tmp_path):
    public_vision("Dinov2").save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.__setitem__("embeddings.register_tokens", torch.zeros(1, 4, 36)))
    with pytest.raises(ValueError, match=r"unknown: embeddings\.register_tokens"):
        load_vision(tmp_path)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("family, facts", LANGUAGES)
@torch.no_grad()
def test_what_we_write_transformers_reads_whole(family, facts, tmp_path):
    public_language(family, **facts, rope_theta=777.0).save_pretrained(tmp_path / "theirs")
    ours = load_language(tmp_path / "theirs")
    save_language(ours, tmp_path / "ours")
    read = getattr(transformers, family + "ForCausalLM")
    theirs, report = read.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(theirs(IDS).logits, ours(IDS), 2e-4, f"{family} written")
    assert torch.equal(load_language(tmp_path / "ours")(IDS), ours(IDS))


@pytest.mark.parametrize("family", ["Siglip", "CLIP", "Dinov2"])
@torch.no_grad()
def test_what_we_write_of_a_tower_transformers_reads_whole(family, tmp_path):
    original = public_vision(family)
    original.save_pretrained(tmp_path / "theirs")
    ours = load_vision(tmp_path / "theirs")
    extra = {"CLIP": ("post_layernorm.",), "Siglip": ("head.",), "Dinov2": ("embeddings.mask",)}
    kept = {k: v for k, v in load_file(tmp_path / "theirs/model.safetensors").items()
            if k.startswith(extra[family])}
    assert kept
    save_vision(ours, tmp_path / "ours", kept)
    read = type(original)
    theirs, report = read.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    mine, public = theirs(PIXELS), original(PIXELS)
    assert torch.equal(mine.last_hidden_state, public.last_hidden_state)
    assert torch.equal(mine.pooler_output, public.pooler_output), "the extra tensors came along"
    assert torch.equal(load_vision(tmp_path / "ours")(PIXELS), ours(PIXELS))


@pytest.mark.parametrize("family", ["Siglip", "Dinov2"])
def test_a_tower_without_its_extras_is_whole_too(family, tmp_path):
    original = public_vision(family)
    original.save_pretrained(tmp_path / "theirs")
    save_vision(load_vision(tmp_path / "theirs"), tmp_path / "ours")
    _, report = type(original).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))


FAMILIES = ["Qwen2", "Qwen3", "Llama", "Siglip", "CLIP", "Dinov2"]


def of_family(family: str, directory):
    """A tiny model as it is published, in directory -> our load and save of such a model."""
    if family in ("Siglip", "CLIP", "Dinov2"):
        public_vision(family).save_pretrained(directory)
        return load_vision, save_vision
    else:
        public_language(family).save_pretrained(directory)
    return load_language, save_language


def registry(kind):
    return LANGUAGE_FAMILIES if kind in LANGUAGE_FAMILIES else VISION_FAMILIES


@pytest.mark.parametrize("prefix", ["its own", "none", "another."])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_loads_equal_under_every_prefix(family, prefix, tmp_path, monkeypatch):
    load, save = of_family(family, tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    kind = ours.config.model_type
    layout = family_of(kind)
    if prefix == "another.":  # as where a tower is saved as a part of a larger model
        monkeypatch.setitem(registry(kind), kind, replace(layout, prefix=prefix, names={
            prefix + name.removeprefix(layout.prefix): mine
            for name, mine in layout.names.items()}))
    save(ours, tmp_path / "ours")
    names = load_file(tmp_path / "ours" / "model.safetensors").keys()
    assert any(name.startswith(family_of(kind).prefix) for name in names)
    if prefix == "none":
        edit(tmp_path / "ours", lambda tensors: [
            tensors.__setitem__(name.removeprefix(layout.prefix), tensors.pop(name))
            for name in [*tensors]])
    again = load(tmp_path / "ours").state_dict()
    assert again.keys() == ours.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("prefix", ["its own", "none", "another."])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_public_classes_write_is_what_we_would_write(family, prefix, tmp_path,
                                                              monkeypatch):
    load, _ = of_family(family, tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    kind = load(tmp_path).config.model_type
    layout, plain = family_of(kind), family_of(kind).prefix
    if prefix != "its own":
        put = "" if prefix == "none" else prefix
        edit(tmp_path, lambda tensors: [
            tensors.__setitem__(put + name.removeprefix(plain), tensors.pop(name))
            for name in [*tensors]])
    if prefix == "another.":
        monkeypatch.setitem(registry(kind), kind, replace(layout, prefix=prefix, names={
            prefix + name.removeprefix(plain): mine for name, mine in layout.names.items()}))
    written = {name.removeprefix(family_of(kind).prefix): tensor
               for name, tensor in public_tensors(load(tmp_path)).items()}
    theirs = {name.removeprefix(plain): tensor for name, tensor in theirs.items()}
    left_alone = theirs.keys() - written.keys()
    assert all(name.startswith(("head.", "post_layernorm.", "embeddings.mask_token"))
               for name in left_alone), "SigLIP's, CLIP's and DINOv2's, see Family.unread"
    for name, tensor in written.items():
        assert tensor.shape == theirs[name].shape, name
        assert torch.equal(tensor, theirs[name]), name


def test_a_model_can_be_saved_over_the_file_that_it_is_mapped_from(qwen2):
    """Cutting a mapped file short would end the process; so the new one is moved into place."""
    directory, _ = qwen2
    ours = load_language(directory)
    with torch.no_grad():
        before = ours(IDS)
        save_language(ours, directory)
        assert torch.equal(ours(IDS), before)
        assert torch.equal(load_language(directory)(IDS), before)
    assert not list(directory.glob("*.part"))


def test_hashes_tell_files_apart(qwen2):
    directory, _ = qwen2
    before = file_hashes(directory)
    assert before.keys() == {"model.safetensors"} and len(before["model.safetensors"]) == 64
    assert file_hashes(directory) == before
    edit(directory, lambda t: t["model.norm.weight"][:1].add_(1e-3))
    assert file_hashes(directory) != before


# ---------------------------------------------------------------- names on the hub


def test_a_directory_is_taken_as_it_is_and_a_wrong_path_named(tmp_path):
    assert resolve(tmp_path) == tmp_path and resolve(str(tmp_path)) == tmp_path
    for wrong in ("./no/such/dir", "/no/such", "~/no/such", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no directory"):
            resolve(wrong)


def in_a_new_process(name, home, **environment):
    """The hub's library reads its settings once, when it is imported."""
    code = f"from model.pretrained.load import load_language; print(load_language({name!r}).config)"
    root = Path(__file__).resolve().parent.parent
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root,
                          timeout=600, env={**clean, "HF_HOME": str(home), **environment})


def test_offline_says_what_to_download_how_large_and_from_where(tmp_path):
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    run = in_a_new_process(name, tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://mirror.test")
    assert run.returncode != 0
    for word in (name, "config.json", "model*.safetensors", "269 MB", "HF_ENDPOINT",
                 "http://mirror.test/", "directory"):
        assert word in run.stderr, word


def test_a_pth_file_on_the_hub_is_named_when_it_cannot_be_fetched(tmp_path):
    run = in_a_new_process("owner/many/llm_768.pth", tmp_path, HF_HUB_OFFLINE="1")
    assert run.returncode != 0
    assert "Download llm_768.pth of https://huggingface.co/owner/many/tree/main" in run.stderr


def test_a_mirror_is_asked_for_the_needed_files_only_and_then_never_again(qwen2, tmp_path):
    directory, _ = qwen2
    (directory / "pytorch_model.bin").write_bytes(b"not to be fetched")
    first, again, asked = through_a_mirror(directory, tmp_path)
    assert first.returncode == 0, first.stderr
    assert "hidden_size=36" in first.stdout
    assert any("model.safetensors" in path for path in asked)
    assert not any("pytorch_model.bin" in path for path in asked)
    assert again.returncode == 0, again.stderr


def test_where_no_safetensors_are_published_the_bin_is_fetched(qwen2_bin, tmp_path):
    first, again, asked = through_a_mirror(qwen2_bin[0], tmp_path)
    assert first.returncode == 0, first.stderr
    assert "hidden_size=36" in first.stdout
    assert any("pytorch_model.bin" in path for path in asked)
    assert again.returncode == 0, again.stderr


def through_a_mirror(directory, tmp_path):
    """Load "some/tiny" from a server that has directory's files, then again without it.

    -> both processes, and the paths that the server was asked for.
    """
    commit, asked = "0123456789abcdef0123456789abcdef01234567", []

    class Mirror(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body=True):
            asked.append(self.path)
            file = directory / self.path.rsplit("/", 1)[-1]
            files = [p for p in directory.iterdir() if p.is_file()]
            kind = "application/json"
            if "/tree/" in self.path:  # newer releases of the hub's library ask this too
                content = json.dumps([{"type": "file", "path": p.name, "oid": p.name,
                                       "size": p.stat().st_size} for p in files]).encode()
            elif self.path.startswith("/api/models/"):
                names = [{"rfilename": p.name} for p in files]
                content = json.dumps({"id": "some/tiny", "sha": commit, "siblings": names,
                                      "private": False, "tags": [], "downloads": 0}).encode()
            elif file.is_file():
                content, kind = file.read_bytes(), "application/octet-stream"
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{file.name}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        first = in_a_new_process("some/tiny", tmp_path / "home", HF_ENDPOINT=endpoint,
                                 NO_PROXY="127.0.0.1", HF_HUB_DISABLE_XET="1")
    finally:
        server.shutdown()
    return first, in_a_new_process("some/tiny", tmp_path / "home", HF_HUB_OFFLINE="1"), asked
