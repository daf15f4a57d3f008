"""Claim: LoRA changes only what it adds, every adapter learns, and a merge is W + B A."""

import pytest
import torch
from families import assert_close, tiny_vlm

from model.lora import (
    LoRALinear,
    add_lora,
    lora_parameters,
    merge_lora,
)
from model.pretrained.load import load_language
from model.pretrained.save import save_language
from training.optim import set_requires_grad

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def example(seed=5):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 59, (2, 15), generator=generator)
    ids[:, 1:10] = 60
    labels = ids.roll(-1, 1).masked_fill(torch.arange(15) < 10, -100)
    return ids, labels, torch.randn(2, 3, 48, 48, generator=generator)


def adapted(seed=0, dropout=0.0, rank=4, **facts):
    vlm = tiny_vlm(seed=seed, **facts)
    names = add_lora(vlm.language, TARGETS, rank=rank, alpha=8, dropout=dropout)
    set_requires_grad(vlm, language="lora")
    return vlm, names


def train(vlm, steps=3, learning_rate=1e-2):
    optimizer = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad], learning_rate)
    losses = []
    for _ in range(steps):
        loss, count = vlm(*example())
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(vlm):
    ids, _, pixels = example()
    return vlm.language.logits(vlm.language.decode(vlm.embed(ids, pixels)))


def test_names_of_what_was_wrapped_and_how_many_numbers_learn():
    vlm, names = adapted()
    assert len(names) == 3 * len(TARGETS) and "layers.1.self_attn.q_proj" in names
    q_proj = vlm.language.get_submodule("layers.1.self_attn.q_proj")
    assert isinstance(q_proj, LoRALinear)
    assert sum(p.numel() for p in (q_proj.lora_a, q_proj.lora_b)) == 4 * (36 + 36)
    assert {id(p) for p in lora_parameters(vlm.language)} == {
        id(p) for p in vlm.language.parameters() if p.requires_grad}


def test_an_adapted_model_starts_as_the_model_that_it_adapts():
    assert torch.equal(logits(adapted()[0]), logits(tiny_vlm()))


def test_every_b_moves_in_one_step_although_the_inputs_are_frozen():
    vlm, names = adapted()
    set_requires_grad(vlm, projector=False, language="lora")  # nothing before the adapters learns
    train(vlm, steps=1)
    for name in names:
        assert vlm.language.get_submodule(name).lora_b.norm() > 0, name


def test_every_a_moves_in_the_second_step_and_the_loss_falls():
    vlm, names = adapted()
    before = {name: vlm.language.get_submodule(name).lora_a.clone() for name in names}
    losses = train(vlm, steps=8)
    for name in names:
        assert (vlm.language.get_submodule(name).lora_a - before[name]).norm() > 0, name
    assert losses[-1] < losses[0]


def test_the_base_stays_as_it_was():
    vlm, _ = adapted()
    before = {name: p.clone() for name, p in vlm.named_parameters() if not p.requires_grad}
    train(vlm)
    after = dict(vlm.named_parameters())
    assert len(before) > 50 and all(torch.equal(after[name], p) for name, p in before.items())


def test_merged_equals_unmerged_and_is_w_plus_ba():
    vlm, names = adapted()
    base = tiny_vlm().language.state_dict()
    train(vlm)
    unmerged = logits(vlm)
    assert (unmerged - logits(tiny_vlm())).abs().max() > 1e-2, "it learned something"
    adapters = {name: vlm.language.get_submodule(name) for name in names}
    merge_lora(vlm.language)
    assert_close(logits(vlm), unmerged, 1e-4, "merged")
    for name in names:
        plain = vlm.language.get_submodule(name)
        assert type(plain) is torch.nn.Linear, "as it was before"
        by_hand = base[f"{name}.weight"] + 8 / 4 * adapters[name].lora_b @ adapters[name].lora_a
        assert_close(plain.weight, by_hand, 1e-6, name)


def test_merging_twice_adds_nothing_twice():
    vlm, _ = adapted()
    train(vlm)
    merge_lora(vlm.language)
    once = logits(vlm)
    merge_lora(vlm.language)
    assert torch.equal(logits(vlm), once)


def test_beside_bfloat16_weights_the_adapters_are_float32_and_keep_small_steps():
    vlm = tiny_vlm().to(torch.bfloat16)
    add_lora(vlm.language, ["q_proj"], rank=2, alpha=2)
    parameters = lora_parameters(vlm.language)
    assert {p.dtype for p in parameters} == {torch.float32}
    set_requires_grad(vlm, projector=False, language="lora")
    train(vlm, steps=3, learning_rate=1e-5)  # far below the 8 bits of bfloat16
    first = vlm.language.layers[0].self_attn.q_proj
    moved = first.lora_b.abs()
    assert 0 < moved.max() < 1e-4
    assert first.merged().weight.dtype == torch.bfloat16


def test_adapters_and_projector_alone_give_the_same_model_on_top_of_the_base():
    vlm, _ = adapted()
    train(vlm)
    kept = {name: p.detach() for name, p in vlm.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("projector.") for name in kept)
    assert sum(name.startswith("projector.") for name in kept) == 4
    fresh, _ = adapted()
    for p in fresh.projector.parameters():
        torch.nn.init.zeros_(p)
    missing, unexpected = fresh.load_state_dict(kept, strict=False)
    assert not unexpected and not any(name in kept for name in missing)
    assert torch.equal(logits(fresh), logits(vlm))


@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_model_saved_and_loaded_is_the_same(tied, tmp_path):
    vlm, _ = adapted(tied=tied)
    train(vlm)
    unmerged = logits(vlm)
    with pytest.raises(ValueError, match="merge_lora"):
        save_language(vlm.language, tmp_path)
    merge_lora(vlm.language)
    save_language(vlm.language, tmp_path)
    vlm.language = load_language(tmp_path)
    assert hasattr(vlm.language, "lm_head") != tied
    assert_close(logits(vlm), unmerged, 1e-4, f"tied {tied}")


def test_a_target_that_fits_nothing_is_refused_with_what_there_is():
    language = tiny_vlm().language
    with pytest.raises(ValueError) as error:
        add_lora(language, ["q_proj", "qproj"], rank=2, alpha=2)
    for word in ("'qproj'", "q_proj", "down_proj"):
        assert word in str(error.value)
    assert not lora_parameters(language), "nothing is wrapped when one name is wrong"
    for typo in ("proj", "attn.q_proj", "lm_head", "embed_tokens"):  # no halves of names
        with pytest.raises(ValueError, match=typo):
            add_lora(language, [typo], rank=2, alpha=2)
    with pytest.raises(ValueError, match="rank"):
        add_lora(language, ["q_proj"], rank=0, alpha=2)


def test_longer_names_choose_fewer_layers():
    names = add_lora(tiny_vlm().language, ["layers.1.mlp.up_proj", "up_proj"], rank=2, alpha=2)
    assert names == ["layers.1.mlp.up_proj", "layers.0.mlp.up_proj", "layers.2.mlp.up_proj"]
    names = add_lora(tiny_vlm(tied=False).language, ["lm_head"], rank=2, alpha=2)
    assert names == ["lm_head"]


def test_adding_lora_twice_is_refused():
    vlm, _ = adapted()
    with pytest.raises(ValueError, match="LoRA already"):
        add_lora(vlm.language, ["q_proj"], rank=2, alpha=2)


def test_dropout_acts_in_training_only():
    vlm, _ = adapted(dropout=0.5)
    train(vlm)
    vlm.train()
    assert not torch.equal(logits(vlm), logits(vlm))
    vlm.eval()
    assert torch.equal(logits(vlm), logits(vlm))
