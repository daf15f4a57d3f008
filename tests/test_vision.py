"""Claim: one vision transformer gives the features of the public SigLIP, CLIP and DINOv2."""

import json

import pytest
import torch
import transformers
from families import VISION, assert_close, public_vision

from model.pretrained.load import load_vision
from model.pretrained.public_config import read_vision_config, write_config
from model.vision import VisionTransformer

TOWERS = {  # name: (family, facts that differ from tiny.VISION, pixels fed in: height, width)
    "siglip": ("Siglip", {}, (48, 48)),
    "siglip, patches of 24": ("Siglip", {"image_size": 96, "patch_size": 24}, (96, 96)),
    # As SigLIP so400m: 384 is no multiple of 14, the remainder is not looked at.
    "siglip, a remainder": ("Siglip", {"image_size": 47, "patch_size": 14}, (47, 47)),
    "clip, 14, quick_gelu": ("CLIP", {"image_size": 42, "patch_size": 14}, (42, 42)),
    "clip, 16, gelu": ("CLIP", {"hidden_act": "gelu"}, (48, 48)),
    "clip, 32, quick_gelu": ("CLIP", {"image_size": 96, "patch_size": 32}, (96, 96)),
    "vit": ("ViT", {}, (48, 48)),
    "vit, patches of 14": ("ViT", {"image_size": 42, "patch_size": 14}, (42, 42)),
    "dinov2": ("Dinov2", {"image_size": 42, "patch_size": 14}, (42, 42)),
    "dinov2, larger": ("Dinov2", {"image_size": 42, "patch_size": 14}, (70, 70)),
    "dinov2, smaller": ("Dinov2", {"image_size": 70, "patch_size": 14}, (28, 28)),
    "dinov2, wide": ("Dinov2", {"image_size": 42, "patch_size": 14}, (28, 84)),
    # As many patches as trained for, but laid out otherwise.
    "dinov2, 2 x 8 for 4 x 4": ("Dinov2", {"image_size": 56, "patch_size": 14}, (28, 112)),
}


def random_pixels(N, height, width):
    return torch.randn(N, 3, height, width, generator=torch.Generator().manual_seed(2))


def extra_tokens(family):
    return 0 if family == "Siglip" else 1  # the class token of CLIP and DINOv2


@pytest.mark.parametrize("layer", [-1, -2, -3])
@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_features_equal_the_public_implementation(tower, layer, tmp_path):
    family, facts, size = TOWERS[tower]
    theirs = public_vision(family, **facts)
    theirs.save_pretrained(tmp_path)
    ours = load_vision(tmp_path, feature_layer=layer)
    pixels = random_pixels(2, *size)
    out = theirs(pixels, output_hidden_states=True)
    expected = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
    assert_close(ours(pixels), expected[:, extra_tokens(family):], 2e-4, f"{tower}, layer {layer}")


@pytest.mark.parametrize("family", ["Siglip", "CLIP", "ViT"])
@torch.no_grad()
def test_positions_stretch_to_another_size_as_in_public(family, tmp_path):
    theirs = public_vision(family)
    theirs.save_pretrained(tmp_path)
    ours = load_vision(tmp_path)
    pixels = random_pixels(1, 80, 64)
    expected = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert_close(ours(pixels), expected[:, extra_tokens(family):], 2e-4, f"{family} stretched")


@pytest.mark.parametrize("family", ["Siglip", "CLIP", "Dinov2", "ViT"])
@torch.no_grad()
def test_no_patch_is_lost(family, tmp_path):
    public_vision(family).save_pretrained(tmp_path)
    tower = load_vision(tmp_path)
    pixels = random_pixels(1, 48, 48)
    features = tower(pixels)
    assert features.shape == (1, (48 // 16) ** 2, 36)
    assert tower.config.patches == 9
    for patch in range(9):  # patch 0 above all: it is the one that was dropped elsewhere
        row, column = divmod(patch, 3)
        changed = pixels.clone()
        changed[..., 16 * row:16 * row + 16, 16 * column:16 * column + 16] += 1
        difference = (tower(changed) - features).abs().amax(-1)[0]  # (P,)
        assert difference.argmax() == patch, "the feature that changes most is its own"
        assert difference.min() > 0, "every patch looks at every other"


@pytest.mark.parametrize("family", ["CLIP", "Dinov2"])
@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_the_class_token_is_what_transformers_pools(family, layer, tmp_path):
    """After the last block with the final norm, CLIP's too; after an earlier one as it is."""
    theirs = public_vision(family)
    theirs.save_pretrained(tmp_path)
    ours = load_vision(tmp_path, feature_layer=layer, features="class")
    pixels = random_pixels(2, 48, 48)
    out = theirs(pixels, output_hidden_states=True)
    expected = out.pooler_output if layer == -1 else out.hidden_states[layer][:, 0]
    assert_close(ours(pixels), expected[:, None], 2e-4, f"{family}'s class token, layer {layer}")
    if layer == -1 and family == "CLIP":
        assert (out.last_hidden_state[:, 0] - expected).abs().max() > 1e-2, "the norm matters"


@pytest.mark.parametrize("family", ["Siglip", "CLIP", "Dinov2", "ViT"])
@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_pooled_is_the_mean_of_the_patches_alone(family, layer, tmp_path):
    theirs = public_vision(family)
    theirs.save_pretrained(tmp_path)
    ours = load_vision(tmp_path, feature_layer=layer, features="pooled")
    pixels = random_pixels(2, 48, 48)
    out = theirs(pixels, output_hidden_states=True)
    hidden = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
    expected = hidden[:, extra_tokens(family):].mean(dim=1)[:, None]  # (N,1,Dv)
    assert_close(ours(pixels), expected, 2e-4, f"{family} pooled, layer {layer}")


def test_siglip_has_no_class_token_to_take():
    public = {"model_type": "siglip_vision_model", **VISION}
    with pytest.raises(ValueError, match="has no class token"):
        read_vision_config(public, features="class")
    with pytest.raises(ValueError, match="'patches', 'class' and 'pooled'"):
        read_vision_config(public, features="mean")


def test_a_naflex_siglip2_is_refused_and_the_fixed_one_named():
    with pytest.raises(ValueError, match="'siglip' .also SigLIP2 of a fixed resolution"):
        read_vision_config({"model_type": "siglip2", "vision_config": {}})


def test_a_feature_layer_out_of_range_is_refused():
    public = {"model_type": "siglip_vision_model", **VISION}
    for layer in (0, 1, -4):
        with pytest.raises(ValueError, match="feature_layer"):
            read_vision_config(public, feature_layer=layer)


def test_blocks_after_the_feature_layer_are_not_made():
    public = {"model_type": "siglip_vision_model", **VISION}
    tower = VisionTransformer(read_vision_config(public, feature_layer=-2))
    assert len(tower.layers) == 2 and not hasattr(tower, "post_layernorm")


@pytest.mark.parametrize("shape", [(3, 48, 48), (1, 1, 48, 48), (1, 3, 8, 48), (1, 48, 48, 3)])
def test_pixels_of_another_shape_are_refused(shape):
    tower = VisionTransformer(
        read_vision_config({"model_type": "siglip_vision_model", **VISION}))
    with pytest.raises(ValueError, match=r"\(N,3,H,W\)"):
        tower(torch.zeros(shape))


@pytest.mark.parametrize("change, word", [
    ({"model_type": "beit"}, "beit"),
    ({"model_type": "vit", "qkv_bias": False}, "qkv_bias"),
    ({"model_type": "dinov2", "use_swiglu_ffn": True}, "use_swiglu_ffn"),
    ({"num_channels": 1}, "num_channels"),
    ({"hidden_act": "relu"}, "relu"),
    ({"num_attention_heads": 5}, "num_attention_heads"),
])
def test_a_config_that_we_would_get_wrong_is_refused(change, word):
    with pytest.raises(ValueError, match=word):
        read_vision_config({"model_type": "siglip_vision_model", **VISION, **change})


@pytest.mark.parametrize("family", ["siglip_vision_model", "clip_vision_model", "dinov2", "vit"])
def test_config_survives_being_written_and_read(family):
    config = read_vision_config({"model_type": family, **VISION, "mlp_ratio": 2})
    assert read_vision_config(json.loads(json.dumps(write_config(config)))) == config


def test_published_configs_leave_out_what_is_default():
    """openai/clip-vit-base-patch32 and google/siglip-base-patch16-224 name hardly a number."""
    clip = read_vision_config({"model_type": "clip", "vision_config": {}})
    siglip = read_vision_config({"model_type": "siglip", "vision_config": {}})
    assert (clip.patch_size, clip.hidden_act, clip.layer_norm_eps) == (32, "quick_gelu", 1e-5)
    assert (siglip.patch_size, siglip.hidden_act, siglip.layer_norm_eps) == (
        16, "gelu_pytorch_tanh", 1e-6)


def test_bfloat16_weights_take_float32_pixels(tmp_path):
    public_vision("Dinov2").save_pretrained(tmp_path)
    tower = load_vision(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        assert tower(random_pixels(1, 64, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["siglip_vision_model", "clip_vision_model", "dinov2", "vit"])
def test_nothing_is_tied_to_the_cpu(family):
    """On the meta device any tensor that is made elsewhere on the way raises."""
    tower = VisionTransformer(read_vision_config({"model_type": family, **VISION}))
    assert tower.to("meta")(torch.zeros(1, 3, 64, 80, device="meta")).shape == (1, 20, 36)


@torch.no_grad()
def test_a_classifier_is_passed_over(tmp_path):
    """google/vit-base-patch16-224 is published with one, and "vit." before the tower's names."""
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)).eval()
    theirs.save_pretrained(tmp_path)
    pixels = random_pixels(2, 48, 48)
    expected = theirs.vit(pixels).last_hidden_state[:, 1:]
    assert_close(load_vision(tmp_path)(pixels), expected, 2e-4, "behind a classifier")
