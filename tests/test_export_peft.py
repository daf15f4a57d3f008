"""Claims: an adapter trained here runs in peft on the public base, one trained by peft starts a
run here; and a merged checkpoint needs nothing beside itself."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import extras.export.__main__ as export
import train_sft
from extras.export.peft import add_peft
from model.pretrained.checkpoint import find_model, newest_checkpoint, read_config, read_run
from model.pretrained.load import load_checkpoint, load_language
from tests.families import assert_close, public_language, save_qwen
from tests.test_export import trained
from tests.tiny import make_data, metrics


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tokenizer_dir):
    """A run with adapters -> its directory, the run."""
    directory = tmp_path_factory.mktemp("world")
    run = trained(directory, tiny_tokenizer_dir, "Qwen3", "Siglip", 48,
                  ["--lora", "--lora_rank", "3", "--lora_alpha", "5"])
    return directory, run


IDS = torch.randint(0, 250, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.language(IDS)


@torch.no_grad()
def test_peft_loads_the_adapter_on_the_public_base(world, tmp_path):
    directory, run = world
    export.main(["--model", run, "--to", "peft", "--out", str(tmp_path / "adapter")])
    base = transformers.AutoModelForCausalLM.from_pretrained(directory / "language")
    plain = base(IDS).logits
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    ours = logits(load_checkpoint(find_model(run)))
    assert_close(ours, adapted.eval()(IDS).logits, 1e-5, "logits with the adapter")
    assert (ours - plain).abs().max() > 1e-3, "it is not the base"
    assert adapted.peft_config["default"].r == 3
    assert "q_proj" in adapted.peft_config["default"].target_modules


@torch.no_grad()
def test_a_merged_checkpoint_is_alone_and_the_same(world, tmp_path):
    directory, run = world
    export.main(["--model", run, "--to", "merged", "--out", str(tmp_path / "out"),
                 "--dtype", "fp32"])
    pixels = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    whole = load_checkpoint(find_model(run))
    for part in ("language", "vision"):
        (directory / part).rename(directory / f"gone_{part}")
    try:
        merged = load_checkpoint(find_model(str(tmp_path / "out")))
    finally:
        for part in ("language", "vision"):
            (directory / f"gone_{part}").rename(directory / part)
    assert not any("lora" in name for name in merged.state_dict())
    assert_close(logits(merged), logits(whole), 1e-5, "logits")
    assert_close(merged.encode_images(pixels), whole.encode_images(pixels), 0, "pictures")


def train_from(directory, tmp_path, *flags):
    train_sft.main([
        "--language_model", str(directory / "language"), "--vision_tower",
        str(directory / "vision"),
        "--model", "none", "--preset", "qwen2.5-siglip", "--data", make_data(tmp_path, count=4),
        "--image_folder", str(tmp_path), "--steps", "1", "--batch_size", "2", "--dtype", "fp32",
        "--num_workers", "0", "--learning_rate", "1e-30", "--projector_learning_rate", "1e-30",
        *flags, "--out", str(tmp_path / "out")])
    return newest_checkpoint(tmp_path / "out")


@torch.no_grad()
@pytest.mark.parametrize("rslora", [False, True])
def test_training_starts_from_an_adapter_of_peft(world, tmp_path, rslora):
    directory, _ = world
    base = transformers.AutoModelForCausalLM.from_pretrained(directory / "language")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base, peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], layers_to_transform=[0, 2],
        init_lora_weights=False, use_rslora=rslora))
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.enable_grad():
        checkpoint = train_from(directory, tmp_path, "--lora_from", str(tmp_path / "adapter"))
    assert_close(logits(load_checkpoint(checkpoint)), theirs.eval()(IDS).logits, 1e-5, "logits")
    settings = read_run(checkpoint)["settings"]
    assert settings["lora_rank"] == 2 == read_config(checkpoint)["lora"]["rank"]
    if not rslora:
        with torch.enable_grad():
            train_sft.main(["--resume", "--steps", "2", "--out", str(tmp_path / "out")])
        assert len(metrics(tmp_path / "out")) == 2
        with pytest.raises(SystemExit, match="has adapters of its own"):
            train_sft.main(["--model", str(tmp_path / "out"), "--data",
                            str(tmp_path / "data.jsonl"), "--lora_from", str(tmp_path / "adapter"),
                            "--out", str(tmp_path / "third")])


@pytest.mark.parametrize("change, message", [
    ({"use_dora": True}, "use_dora = True; only False"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changes"),
    ({"r": 4}, "lora_A of model.layers.0.* is \\(3, ..\\); rank 4 .*\\(4, ..\\)"),
    ("model.layers.7.mlp.up_proj", "layers.7.mlp.up_proj.lora_A.weight is no LoRA matrix"),
    ("model.layers.0.mlp.other", "mlp.other.* is no LoRA .*there are: .*q_proj")])
def test_adapters_that_compute_otherwise_are_refused(world, tmp_path, change, message):
    directory, run = world
    export.main(["--model", run, "--to", "peft", "--out", str(tmp_path / "adapter")])
    if isinstance(change, str):
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors[f"base_model.model.{change}.lora_A.weight"] = torch.zeros(3, 36)
        save_file(tensors, file)
    else:
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    language = load_language(str(directory / "language"))
    with pytest.raises(ValueError, match=message):
        add_peft(language, tmp_path / "adapter")
    with pytest.raises(SystemExit, match="--lora: "):
        train_from(directory, tmp_path, "--lora_from", str(tmp_path / "adapter"))


@pytest.fixture
def untied(tmp_path):
    """A directory with a decoder that has a head of its own, and the decoder in transformers."""
    public_language("Qwen2", vocab_size=250).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter_on(base, out, targets, save=None, **options):
    """Write the adapter of a peft model -> the model. save: options of save_pretrained."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False,
                        task_type="CAUSAL_LM", **options))
    theirs.save_pretrained(out, **(save or {}))
    return theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("targets, save, changes", [
    (["q_proj", "lm_head"], {}, {}), (["lm_head"], {}, {}),
    (["q_proj"], {"save_embedding_layers": True}, {}),
    ("all-linear", {"save_embedding_layers": True}, {}),
    (["q_proj", "lm_head"], {"save_embedding_layers": False}, {"exclude_modules": ["k_proj"]})])
def test_an_adapter_on_the_head_and_copies_of_the_base_come_in(untied, tmp_path, targets, save,
                                                              changes):
    theirs = adapter_on(untied, tmp_path / "adapter", targets, save, **changes)
    ours = load_language(untied)
    add_peft(ours, tmp_path / "adapter")
    assert_close(ours(IDS), theirs(IDS).logits, 1e-5, "logits")


@torch.no_grad()
def test_an_adapter_of_older_peft_is_a_bin_file(untied, tmp_path):
    theirs = adapter_on(untied, tmp_path / "adapter", ["up_proj"], {"safe_serialization": False})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    if file.exists():  # peft writes no other any more
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    ours = load_language(untied)
    add_peft(ours, tmp_path / "adapter")
    assert_close(ours(IDS), theirs(IDS).logits, 1e-5, "logits")
    file.with_suffix(".bin").unlink()
    with pytest.raises(ValueError, match="lacks adapter_model.safetensors"):
        add_peft(load_language(untied), tmp_path / "adapter")


@torch.no_grad()
def test_a_copy_of_a_tied_head_is_the_table(tmp_path):
    public_language("Llama", vocab_size=250, tie_word_embeddings=True).save_pretrained(
        tmp_path / "base")
    theirs = adapter_on(tmp_path / "base", tmp_path / "adapter", ["q_proj"],
                        {"save_embedding_layers": True})
    ours = load_language(tmp_path / "base", torch.bfloat16)  # rounded as the copy is
    add_peft(ours, tmp_path / "adapter")
    ours = load_language(tmp_path / "base")
    add_peft(ours, tmp_path / "adapter")
    assert_close(ours(IDS), theirs(IDS).logits, 1e-5, "logits")


@pytest.mark.parametrize("tensor, words", [
    ("lm_head.weight", r"\(lm_head\), which are not those"),
    ("model.embed_tokens.weight", r"\(embed_tokens\), which"),
    ("model.embed_tokens.weight lm_head.base_layer.weight", r"\((embed_tokens|lm_head), "),
    ("a row more: model.embed_tokens.weight", r"\(embed_tokens\), which"),
    ("model.layers.0.input_layernorm.weight", r"\(input_layernorm\)")])
def test_whole_weights_that_are_not_the_bases_are_refused(untied, tmp_path, tensor, words):
    adapter_on(untied, tmp_path / "adapter", ["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    rows = 251 if tensor.startswith("a row more") else 250
    other = {f"base_model.model.{name}": torch.ones(rows, 36) for name in tensor.split()
             if name.endswith("weight")}
    save_file({**load_file(file), **other}, file)
    with pytest.raises(ValueError, match=f"holds whole weights as well {words}") as caught:
        add_peft(load_language(untied), tmp_path / "adapter")
    assert "Merge it with peft" in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("tied, targets, options, words", [
    (True, ["q_proj", "lm_head"], {}, "lm_head.lora_A.weight: the head of this model is its emb"),
    (False, ["q_proj", "embed_tokens"], {}, "embed_tokens.lora_embedding_A is no LoRA.*Merge it"),
    (False, ["q_proj"], {"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]; only"),
    (False, ["q_proj"], {"alora_invocation_tokens": [1, 2]},
     r"alora_invocation_tokens = \[1, 2\]; only None"),
    (False, ["q_proj"], {"trainable_token_indices": [1, 2]}, "trainable_token_indices = "),
    (False, ["q_proj"], {"use_qalora": "new"}, "use_qalora = 'new'; only None is supported"),
    (False, ["q_proj"], {"of_next_year": {"a": 1}}, "of_next_year = {'a': 1}; only None"),
    (False, ["q_proj"], {"of_next_year": False, "nor_this": {}, "nor_that": None}, None)])
def test_what_an_adapter_asks_for_besides_lora_is_refused_by_name(tmp_path, tied, targets, options,
                                                                 words):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    public_language("Qwen2", vocab_size=250, tie_word_embeddings=tied).save_pretrained(base)
    known = {name: value for name, value in options.items()
             if name in peft.LoraConfig().to_dict() and value != "new"}
    adapter_on(base, adapter, targets, **known)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    if words is None:
        assert add_peft(load_language(base), adapter)["targets"] == ["q_proj"]
        return
    with pytest.raises(ValueError, match=f"(?s){words}"):
        add_peft(load_language(base), adapter)


def test_flags_that_the_adapter_decides_are_refused(world, tmp_path):
    with pytest.raises(SystemExit, match="--lora_rank: the adapters of --lora_from"):
        train_from(world[0], tmp_path, "--lora_from", "A", "--lora_rank", "4")
    with pytest.raises(SystemExit, match="A lacks adapter_config.json"):
        train_from(world[0], tmp_path, "--lora_from", "A")


def test_a_trained_base_is_no_adapter(tmp_path, tiny_tokenizer_dir):
    run = trained(tmp_path, tiny_tokenizer_dir, "Qwen2", "CLIP", 48, ["--train_language", "last:1"])
    with pytest.raises(SystemExit, match="it trained language.layers.2"):
        export.main(["--model", run, "--to", "peft", "--out", str(tmp_path / "out")])


@torch.no_grad()
def test_an_adapter_on_the_fused_matrix_of_qwen_7b_comes_in(tmp_path):
    """c_attn is q, k and v here: each gets its rows of B, and all of A."""
    save_qwen(tmp_path / "qwen")
    plain = load_language(str(tmp_path / "qwen"))
    A, B = torch.randn(3, 36), torch.randn(3 * 36, 3)
    up = {"A": torch.randn(3, 36), "B": torch.randn(50, 3)}
    layer = "base_model.model.transformer.h.0."
    save_file({f"{layer}attn.c_attn.lora_A.weight": A, f"{layer}attn.c_attn.lora_B.weight": B,
               **{f"{layer}mlp.w1.lora_{half}.weight": up[half] for half in up}},
              tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "w1"]}))
    ours = load_language(str(tmp_path / "qwen"))
    targets = [f"layers.0.{name}" for name in (
        "mlp.up_proj", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj")]
    assert add_peft(ours, tmp_path) == {
        "targets": targets, "rank": 3, "alpha": 6.0, "dropout": 0.0}
    attention = plain.layers[0].self_attn
    for part, rows in zip((attention.q_proj, attention.k_proj, attention.v_proj), B.split(36)):
        part.weight += 2 * rows @ A
    plain.layers[0].mlp.up_proj.weight += 2 * up["B"] @ up["A"]
    assert_close(ours(IDS % 61), plain(IDS % 61), 1e-4, "logits")
