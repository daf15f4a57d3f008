"""Claim: the decoder computes what the public Qwen2, Qwen3 and Llama models compute, causally."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from families import LANGUAGE, assert_close, public_language, tiny_vlm

from extras.fast.layers import SharedHeadsAttention, SwiGLUFunction, kernel_shares_heads
from model.language import rope_cos_sin
from model.pretrained.load import load_language
from model.pretrained.public_config import read_language_config, write_config
from tests.tiny import ROOT

FAMILIES = {
    "qwen2": ("Qwen2", {}),
    "qwen2 tied, theta 1e6": ("Qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2 without GQA": ("Qwen2", {"num_key_value_heads": 6}),
    "qwen3, own head_dim": ("Qwen3", {"head_dim": 10}),
    "qwen3 tied, wide heads": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama, one kv head": ("Llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
    "llama, like TinyLlama": ("Llama", {"head_dim": 8, "rms_norm_eps": 1e-5,
                                        "max_position_embeddings": 2048}),
    "llama tied, like SmolLM2": ("Llama", {"num_attention_heads": 3, "num_key_value_heads": 1,
                                           "rope_theta": 1e5, "tie_word_embeddings": True}),
}


def random_ids(*shape):
    return torch.randint(3, 59, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    return tiny_vlm().language


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_the_public_implementation(family, tmp_path):
    name, facts = FAMILIES[family]
    theirs = public_language(name, **facts)
    theirs.save_pretrained(tmp_path)
    ours = load_language(tmp_path)
    ids = random_ids(3, 17)
    assert_close(ours(ids), theirs(ids).logits, 2e-4, family)


@pytest.mark.parametrize("name, facts", [
    ("Qwen2", {"rope_theta": 1e6}), ("Llama", {}), ("Qwen3", {"head_dim": 10})])
@torch.no_grad()
def test_logits_equal_at_position_4000(name, facts, tmp_path):
    theirs = public_language(name, **facts, num_hidden_layers=2)
    theirs.save_pretrained(tmp_path)
    ours = load_language(tmp_path)
    ids = random_ids(1, 4100)
    assert_close(ours(ids)[:, 3900:], theirs(ids).logits[:, 3900:], 2e-4, f"{name} past 3,900")


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("facts, scaling", [
    # As Llama-3.2-1B: tied, wide rows of heads, theta 500,000; as Llama 3.1; with a short training.
    ({"tie_word_embeddings": True, "head_dim": 64}, {}), ({"head_dim": 128}, {"factor": 8.0}),
    ({"head_dim": 32}, {"original_max_position_embeddings": 64, "low_freq_factor": 2})])
@torch.no_grad()
def test_llama3_scales_rope_as_transformers_does(tmp_path, facts, scaling):
    scaling = {**LLAMA3_ROPE, **scaling}
    theirs = public_language("Llama", **facts, num_hidden_layers=2, rope_parameters={
        **scaling, "rope_theta": 500000.0}, max_position_embeddings=131072)
    theirs.save_pretrained(tmp_path)
    ours = load_language(tmp_path)
    assert ours.config.rope_scaling == scaling and ours.config.rope_theta == 500000.0
    positions = torch.tensor([[0, 1, 4000, 100_000]])
    cos, sin = theirs.model.rotary_emb(torch.zeros(1), positions)
    mine = rope_cos_sin(positions, facts["head_dim"], 500000.0, scaling)
    for one, other in zip(mine, (cos, sin)):
        assert_close(one[:, :, 0], other, 1e-2 if positions.max() > 1e5 else 1e-3, "angles")
    ids = random_ids(1, 4100)
    assert_close(ours(ids)[:, 3900:], theirs(ids).logits[:, 3900:], 2e-4, "past 3,900")
    plain = rope_cos_sin(positions, facts["head_dim"], 500000.0)
    assert (plain[0] - mine[0]).abs().max() > 0.1, "it is another model without it"
    # The older spelling, and back again.
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 500000.0, "rope_scaling": scaling}
    assert read_language_config(config) == ours.config
    written = json.loads(json.dumps(write_config(ours.config)))
    assert read_language_config(written) == ours.config
    public = transformers.LlamaConfig.from_dict(written).rope_parameters
    assert public == {**scaling, "rope_theta": 500000.0}


@pytest.mark.parametrize("change, words", [
    ({"factor": None}, "factor = None; expected a number above 0"),
    ({"factor": "8"}, "factor = '8'"), ({"low_freq_factor": 0}, "low_freq_factor = 0"),
    ({"high_freq_factor": 1.0}, "high_freq_factor = 1.0; expected more than low_freq_factor"),
    ({"original_max_position_embeddings": float("nan")}, "original_max_position_embeddings = nan"),
    ({"rope_type": "longrope"}, "rope_type = 'longrope'; only 'default' and 'llama3'"),
    ({"rope_type": None, "type": "linear"}, "rope_type = 'linear'")])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_scaling_that_we_would_get_wrong_is_refused(key, change, words):
    with pytest.raises(ValueError, match=words):
        read_language_config({"model_type": "llama", **LANGUAGE, key: {**LLAMA3_ROPE, **change}})


@torch.no_grad()
def test_both_spellings_of_rope_settings(tmp_path):
    theirs = public_language("Qwen2", rope_theta=500.0)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    new = json.loads(path.read_text())
    assert new["rope_parameters"]["rope_theta"] == 500.0, "transformers 5 spells it so"
    after = load_language(tmp_path)
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    path.write_text(json.dumps({**old, "rope_theta": 500.0, "rope_scaling": None}))
    before = load_language(tmp_path)
    assert before.config == after.config and before.config.rope_theta == 500.0
    ids = random_ids(1, 40)
    assert_close(before(ids), theirs(ids).logits, 2e-4, "old spelling")
    assert_close(after(ids), theirs(ids).logits, 2e-4, "new spelling")
    path.write_text(json.dumps(old))  # neither: the public default, another model altogether
    other = load_language(tmp_path)
    assert other.config.rope_theta == 10000.0
    assert (other(ids) - theirs(ids).logits).abs().max() > 1e-2


def test_rope_angles_stay_float32_and_tell_position_4000_from_4001():
    cos, sin = rope_cos_sin(torch.tensor([[4000, 4001]]), 64, 1e6)
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos[0, 0] - cos[0, 1]).abs().max() > 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, _ = rope_cos_sin(torch.tensor([[4000, 4001]]), 64, 1e6)
    assert torch.equal(cos, again), "autocast must not make the angles bfloat16"


@pytest.mark.parametrize("change, word", [
    ({"model_type": "mistral"}, "mistral"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"num_key_value_heads": 4}, "num_key_value_heads"),
    ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
])
def test_a_config_that_we_would_get_wrong_is_refused(change, word):
    with pytest.raises(ValueError, match=word):
        read_language_config({"model_type": "qwen2", **LANGUAGE, **change})


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_config_survives_being_written_and_read(family):
    config = read_language_config({"model_type": family, **LANGUAGE, "rope_theta": 77.0})
    assert read_language_config(json.loads(json.dumps(write_config(config)))) == config


def test_qwen3_head_width_that_config_json_leaves_out():
    public = {"model_type": "qwen3", **LANGUAGE}
    assert read_language_config(public).head_dim == 128  # the public class's default
    assert read_language_config({**public, "model_type": "llama"}).head_dim == 6


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit(model):
    ids = random_ids(2, 12)
    changed = ids.clone()
    changed[:, 8] = (ids[:, 8] + 7) % 50
    before, after = model(ids), model(changed)
    assert_close(after[:, :8], before[:, :8], 0, "before the change")
    assert (after[:, 8:] - before[:, 8:]).abs().amax(-1).min() > 1e-4, "later ones do change"


@torch.no_grad()
def test_padding_on_the_right_changes_nothing(model):
    ids = random_ids(2, 9)
    padded = torch.cat([ids, torch.zeros(2, 6, dtype=torch.long)], dim=1)
    assert_close(model(padded)[:, :9], model(ids), 1e-5, "right padding")


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(model):
    """Needs a mask, causal as well as closed to the padding, and positions that skip it."""
    ids, pad = random_ids(2, 9), 5
    padded = torch.cat([torch.zeros(2, pad, dtype=torch.long), ids], dim=1)
    T = padded.shape[1]
    positions = (torch.arange(T) - pad).clamp(min=0).expand(2, T)
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    mask[:, :pad] = False
    mask |= torch.eye(T, dtype=torch.bool)  # padding sees itself, so that no row is empty
    hidden = model.decode(model.embed(padded), positions, mask.expand(2, 1, T, T))
    assert_close(model.logits(hidden)[:, pad:], model(ids), 1e-5, "left padding")


@torch.no_grad()
def test_a_row_is_the_same_alone_and_beside_longer_rows(model):
    rows = [random_ids(1, 20), random_ids(1, 5) + 1, random_ids(1, 11)]
    batch = torch.cat([torch.nn.functional.pad(row, (0, 20 - row.shape[1])) for row in rows])
    together = model(batch)
    for number, row in enumerate(rows):
        assert_close(together[number, :row.shape[1]], model(row)[0], 1e-5, f"row {number}")


def keep(kept):
    return lambda tensor: kept.append(tensor) or tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_is_silu_times_up_to_the_last_bit_and_keeps_two_tensors(dtype):
    told = []
    for way in (SwiGLUFunction.apply, lambda gate, up: F.silu(gate) * up):
        gate, up = (torch.randn(7, 11, generator=torch.Generator().manual_seed(n)).to(dtype)
                    .requires_grad_() for n in (1, 2))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(keep(kept), lambda t: t):
            out = way(gate, up)
        out.backward(torch.linspace(-1, 1, 77).view(7, 11).to(dtype))
        told.append((out, gate.grad, up.grad, len(kept)))
    for ours, plain in zip(told[0][:3], told[1][:3]):
        assert torch.equal(ours, plain)
    assert told[0][3] == 2 < told[1][3]


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_heads_equal_shared_ones(model, masked):
    """The core repeats them, which every device can; gradients too."""
    ids = random_ids(2, 8)
    mask = torch.ones(8, 8, dtype=torch.bool).tril().expand(2, 1, 8, 8) if masked else None
    sharing = copy.deepcopy(model)
    for layer in sharing.layers:
        layer.self_attn.__class__ = SharedHeadsAttention
    results = []
    for each in (model, sharing):
        embeds = each.embed(ids).detach().requires_grad_()
        hidden = each.decode(embeds, mask=mask)
        hidden.square().sum().backward()
        results.append((hidden, embeds.grad))
    assert model.config.num_attention_heads > model.config.num_key_value_heads > 1
    assert_close(*(hidden for hidden, _ in results), 1e-6, "hidden states")
    assert_close(*(grad for _, grad in results), 1e-4, "gradients")


def test_the_question_to_pytorch_is_one_that_it_knows():
    """On a machine without CUDA the answer is no; that it can be asked is what is tested."""
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    use = torch.backends.cuda.SDPAParams(q, k, k, None, 0.0, True, True)
    assert torch.backends.cuda.can_use_flash_attention(use) in (True, False)
    assert kernel_shares_heads(q, k, k, None)


@torch.no_grad()
def test_a_causal_mask_given_by_hand_is_the_default(model):
    embeds = model.embed(random_ids(2, 8))
    mask = torch.ones(8, 8, dtype=torch.bool).tril().expand(2, 1, 8, 8)
    assert_close(model.decode(embeds, mask=mask), model.decode(embeds), 1e-5, "mask")


@torch.no_grad()
def test_only_distances_between_positions_count(model):
    embeds = model.embed(random_ids(1, 8))
    shifted = model.decode(embeds, positions=torch.arange(100, 108)[None])
    assert_close(shifted, model.decode(embeds), 1e-4, "positions 100 to 107")


def test_bfloat16_weights_give_about_the_same(tmp_path):
    public_language("Qwen3", head_dim=10).save_pretrained(tmp_path)
    ids = random_ids(1, 16)
    with torch.no_grad():
        half = load_language(tmp_path, dtype=torch.bfloat16)(ids)
        full = load_language(tmp_path)(ids)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), full, 0.1 * full.abs().max().item(), "bfloat16")


def test_nothing_is_tied_to_the_cpu():
    """On the meta device any tensor that is made elsewhere on the way raises."""
    model = tiny_vlm().language.to("meta")
    ids = torch.zeros(2, 9, dtype=torch.long, device="meta")
    assert model(ids).device.type == "meta"


def test_making_a_model_without_weights_loads_no_compiler():
    """eval.py makes its towers on the meta device. Some ways to random numbers load torch._dynamo
    or sympy there: seconds before the first word of an answer."""
    config = dict(model_type="qwen2", vocab_size=97, hidden_size=32, intermediate_size=48,
                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  tie_word_embeddings=True, max_position_embeddings=256)
    code = ("import sys, torch\n"
            "from model.pretrained.public_config import read_language_config, read_vision_config\n"
            "from model.language import LanguageModel\n"
            "from model.pretrained.meta_device import meta_device\n"
            "from model.vision import VisionTransformer\n"
            "with meta_device():\n"
            f"    LanguageModel(read_language_config({config}))\n"
            "    VisionTransformer(read_vision_config({'model_type': 'clip_vision_model',\n"
            "        'hidden_size': 24, 'intermediate_size': 48, 'num_hidden_layers': 2,\n"
            "        'num_attention_heads': 2, 'image_size': 32, 'patch_size': 16}))\n"
            "print([name for name in ('torch._dynamo', 'sympy') if name in sys.modules])\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
