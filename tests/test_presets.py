"""Claims: each preset is its row of the table, its full-size models have the published numbers of
parameters, and --list_presets tells true memory; "first:1+last:1" trains these two layers alone."""

import argparse
import subprocess
import sys

import pytest
import torch
from families import tiny_vlm

import train_pretrain
import train_sft
from dataset.families import CHAT_FAMILIES
from extras.preset_list import (
    LANGUAGE,
    VISION,
    costs,
    download_size,
    empty_model,
    empty_tower,
    image_tokens,
    list_presets,
)
from model.lora import add_lora, linear_names
from model.pretrained.load import load_language, load_vision
from model.pretrained.public_config import read_vision_config
from model.vision import VisionTransformer
from model.vlm import VLM
from tests.tiny import ROOT, environment
from training.optim import choose_trainable, make_optimizer, set_requires_grad
from training.presets import PRESETS, settings_of_preset

# preset: language, vision, projector, image tokens, template, image token, stage two
TABLE = {
    "qwen2.5-siglip": ("Qwen/Qwen2.5-0.5B", "google/siglip-base-patch16-224", "mlp", 196, None,
                       None, {"lora": True, "learning_rate": 3e-4, "batch_size": 40,
                                         "epochs": 8, "warmup_ratio": 0.02,
                                         "save_total_limit": 20}),
    "qwen7b-clip": ("Qwen/Qwen-7B-Chat", "openai/clip-vit-large-patch14", "mlp", 256, "qwen",
                    "<|extra_0|>", {"lora": True, "lora_rank": 128, "lora_alpha": 32,
                                    "lora_dropout": 0.1,
                                    "lora_targets": ["q_proj", "k_proj", "v_proj", "up_proj",
                                                     "gate_proj"],
                                    "learning_rate": 3e-5, "projector_learning_rate": 1e-4,
                                    "batch_size": 4, "epochs": 2, "save_steps": 1000,
                                    "save_total_limit": 5,
                                    "system": "你是一位图像理解助手。"}),
    "qwen3-clip": ("Qwen/Qwen3-0.6B", "openai/clip-vit-base-patch32", "mlp", 49, "qwen3",
                   None, {"lora": True, "lora_rank": 8, "lora_alpha": 16,
                                     "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
                                     "warmup_ratio": 0.05}),
    "qwen2.5-1.5b-clip": ("Qwen/Qwen2.5-1.5B-Instruct", "openai/clip-vit-large-patch14", "mlp",
                          256, "qwen2.5-instruct", None, {"train_language": "all", "dtype": "auto",
                                                     "gradient_accumulation_steps": 8,
                                                          "gradient_checkpointing": True}),
    "minimind-v": ("jingyaogong/MiniMind2-Small", "openai/clip-vit-base-patch16", "linear", 196,
                   "minimind2", "@", {"train_language": "all", "lora": False}),
    "minimind-3v": ("jingyaogong/minimind-3", "jingyaogong/siglip2-base-p32-256-ve", "norm_mlp",
                    64, "minimind", None,
                    {"train_language": "first:1+last:1", "learning_rate": 5e-6}),
}


@pytest.mark.parametrize("name", TABLE)
def test_each_preset_is_its_row_of_the_table(name):
    language, vision, projector, tokens, template, image_token, stage_two = TABLE[name]
    settings = settings_of_preset(name, "sft")
    assert (settings["language_model"], settings["vision_tower"]) == (language, vision)
    assert (settings["projector"], image_tokens(PRESETS[name])) == (projector, tokens)
    assert (settings["template"], settings["image_token"]) == (template, image_token)
    assert {key: settings[key] for key in stage_two} == stage_two
    assert settings["train_vision"] is False and settings["train_projector"] is True
    assert settings["vision_feature_select"] == "patches" and "downloads" not in settings
    assert template is None or template in CHAT_FAMILIES
    first = settings_of_preset(name, "pretrain")
    assert first["lora"] is False
    assert first["train_language"] == ("last:1" if name == "minimind-v" else "none")


def test_one_token_where_one_vector_stands_for_the_picture():
    preset = PRESETS["qwen2.5-1.5b-clip"]
    for features in ("class", "pooled"):
        assert image_tokens(preset.__class__(**{**vars(preset),
                                                "vision_feature_select": features})) == 1


def test_siglip_so400m_has_729_patches_and_not_728():
    config = read_vision_config({
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
        "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14})
    with torch.device("meta"):
        tower = VisionTransformer(config)
        assert tower(torch.empty(1, 3, 384, 384)).shape == (1, 729, 1152)


@pytest.mark.parametrize("name, published", [
    ("Qwen/Qwen2.5-0.5B", 494_032_768), ("Qwen/Qwen3-0.6B", 596_049_920),
    ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304), ("Qwen/Qwen-7B-Chat", 7_721_324_544),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008)])
def test_full_size_models_have_the_published_number_of_parameters(name, published):
    model = empty_tower(name)
    assert all(p.is_meta for p in model.parameters()), "no memory is taken"
    assert sum(p.numel() for p in model.parameters()) == published


def test_minimind_has_the_number_that_its_shape_makes():
    """Counted by hand: embeddings, then per layer q, k, v, o, three of the MLP, the norms."""
    by_hand = {
        "jingyaogong/MiniMind2-Small":
            6400 * 512 + 8 * (2 * 512 * 512 + 2 * 512 * 128 + 3 * 512 * 1408 + 2 * 512) + 512,
        "jingyaogong/minimind-3":
            6400 * 768 + 8 * (2 * 768 * 768 + 2 * 768 * 384 + 3 * 768 * 2432 + 2 * 768 + 2 * 96)
            + 768}
    assert list(by_hand.values()) == [25_829_888, 63_912_192]
    for name, expected in by_hand.items():
        assert sum(p.numel() for p in empty_tower(name).parameters()) == expected


def test_every_lora_target_fits_the_model_it_is_for():
    for name, preset in PRESETS.items():
        model = empty_tower(preset.language_model)
        before = len(linear_names(model))
        wrapped = add_lora(model, list(preset.lora_targets), 2, 4.0)
        layers = model.config.num_hidden_layers
        expected = {"qwen7b-clip": 5, "qwen3-clip": 4}.get(name, 7)
        assert len(wrapped) == expected * layers <= before, name


def test_qwen7b_has_an_adapter_for_each_of_q_k_and_v():
    rank, width, middle, layers = 128, 4096, 11008, 32
    by_hand = layers * rank * (3 * (width + width) + 2 * (width + middle))
    preset = PRESETS["qwen7b-clip"]
    model = empty_model(preset)
    choose_trainable(model, argparse.Namespace(**{**vars(preset), **vars(preset.sft)}), None)
    assert sum(p.numel() for p in model.language.parameters() if p.requires_grad) == by_hand


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_the_memory_that_is_told_is_the_memory_that_is_held(stage):
    """The embedded models in earnest: weights, gradients and what AdamW keeps, summed."""
    preset = PRESETS["emoji"]
    empty = empty_model(preset)
    model = VLM(empty.config, load_language(ROOT / preset.language_model),
                load_vision(ROOT / preset.vision_tower), empty.projector.to_empty(device="cpu"))
    settings = argparse.Namespace(**settings_of_preset("emoji", stage))
    choose_trainable(model, settings, None)
    optimizer = make_optimizer(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in trained),
            *(t for state in optimizer.state.values() for t in state.values() if t.ndim)]
    assert sum(t.numel() * t.element_size() for t in held) == costs("emoji")[stage]


def test_every_public_tower_has_a_size():
    assert all(download_size(name) for name in (*LANGUAGE, *VISION))


def test_the_list_tells_every_preset_in_lines_that_fit():
    lines = list_presets().splitlines()
    assert max(map(len, lines)) <= 100
    for name, preset in PRESETS.items():
        number = next(i for i, line in enumerate(lines) if line.startswith(f"{name} "))
        assert f"{costs(name)['language']:,}" in lines[number]
        assert f"{costs(name)['vision']:,}" in lines[number]
        assert f"{preset.projector}, {image_tokens(preset)} " in lines[number]
        assert lines[number + 1] == f"  {preset.language_model} + {preset.vision_tower}"
    seven = next(line for line in lines if line.startswith("qwen7b-clip"))
    assert "7,721,324,544" in seven and seven.endswith("17.1 + 19.4 ?")


@pytest.mark.parametrize("script", [train_pretrain, train_sft])
def test_both_scripts_print_it_and_end(script, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(["--list_presets"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == list_presets() + "\n"


def test_a_plain_run_does_not_wait_for_the_list():
    """The list builds models: what only trains must not import it."""
    told = subprocess.run(
        [sys.executable, "-c", "import sys; from training.presets import read_flags;"
         "read_flags('', 'sft', []); print('torch' in sys.modules)"],
        cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert told.stdout.strip() == "False", told.stderr


def changed_layers(wanted: str) -> set[str]:
    """Names of the parameters that a step of training changes in a model of three layers."""
    torch.manual_seed(0)
    vlm = tiny_vlm(60)
    set_requires_grad(vlm, language=wanted)
    before = {name: p.detach().clone() for name, p in vlm.named_parameters()}
    trained = [p for p in vlm.parameters() if p.requires_grad]
    ids = torch.tensor([[5] + [60] * 9 + [6, 7]])
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = torch.tensor([7, 8])
    vlm(ids, labels, torch.randn(1, 3, 48, 48))[0].backward()
    torch.optim.AdamW(trained, lr=0.1).step()
    return {name for name, p in vlm.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("wanted, numbers", [
    ("first:1+last:1", "02"), ("first:1", "0"), ("first:2", "01"), ("last:1", "2"),
    ("last:1+first:2", "012"), ("first:3", "012")])
def test_first_and_last_layers_learn_and_nothing_between(wanted, numbers):
    names = changed_layers(wanted)
    layers = {name.split(".")[2] for name in names if name.startswith("language.layers.")}
    assert layers == set(numbers)
    others = {name.split(".")[0] for name in names if not name.startswith("language.layers.")}
    assert others == {"projector"}, "embeddings, head and final norm stay as they are"


@pytest.mark.parametrize("wanted", ["first", "first:0", "first:4", "first:1+", "first:1+last:4",
                                    "middle:1", "+", "first:1,last:1"])
def test_a_wrong_word_says_what_is_expected(wanted):
    with pytest.raises(ValueError, match=r"first:N.*last:M.*1 to 3, got"):
        set_requires_grad(tiny_vlm(60), language=wanted)
