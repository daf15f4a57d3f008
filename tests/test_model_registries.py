"""Claim: a new kind of projector, or family of towers, is one entry in its registry."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from families import assert_close, public_vision, tiny_vlm
from safetensors.torch import load_file, save_file
from torch import nn

import train_pretrain
from model.config import ProjectorConfig
from model.pretrained.checkpoint import newest_checkpoint
from model.pretrained.families import VISION_FAMILIES, family_of
from model.pretrained.load import load_checkpoint, load_vision
from model.pretrained.save import save_vision
from model.projector import PROJECTORS
from model.vlm import build_model
from tests.tiny import ROOT, environment, make_world


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.scale * x


def test_a_new_kind_of_projector_trains_and_loads(tmp_path, monkeypatch):
    monkeypatch.setitem(PROJECTORS, "scaled", lambda width, D: {
        **PROJECTORS["mlp"](width, D), "scale": Scale()})
    train_pretrain.main([*make_world(tmp_path), "--steps", "2", "--projector", "scaled",
                         "--out", str(tmp_path / "out")])
    model = load_checkpoint(newest_checkpoint(tmp_path / "out"))
    assert model.config.projector.kind == "scaled"
    assert model.projector.scale.scale not in (0, 1), "it was trained, and it was loaded"


@pytest.mark.parametrize("kind", PROJECTORS)
def test_a_model_of_each_kind_is_built_from_its_config(kind):
    config = replace(tiny_vlm().config, projector=ProjectorConfig(kind, 36, 36, 3))
    with torch.device("meta"):
        empty = build_model(config)
    model = build_model(config)
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in empty.named_parameters()}
    assert model.encode_images(torch.zeros(2, 3, 48, 48)).shape == (2, 1, 36)


@torch.no_grad()
def test_a_new_family_of_towers_loads_and_saves(tmp_path, monkeypatch):
    """A tower like SigLIP's, published under other names and without tanh in its GELU."""
    theirs = public_vision("Siglip", hidden_act="gelu")
    theirs.save_pretrained(tmp_path / "theirs")
    siglip = family_of("siglip_vision_model")
    family = replace(siglip, architecture="ViTModel", prefix="vit.", names={
        public.replace("vision_model.", "vit."): ours for public, ours in siglip.names.items()},
        defaults={**siglip.defaults, "hidden_act": "gelu"}, supported={"qkv_bias": True})
    monkeypatch.setitem(VISION_FAMILIES, "vit", family)
    directory = tmp_path / "vit"
    directory.mkdir()
    save_file({name.replace("vision_model.", "vit."): tensor for name, tensor in load_file(
        tmp_path / "theirs" / "model.safetensors").items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(
        '{"model_type": "vit", "hidden_size": 36, "intermediate_size": 72, "image_size": 48,'
        ' "num_hidden_layers": 3, "num_attention_heads": 3}')
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    ours = load_vision(directory)
    assert_close(ours(pixels), theirs(pixels).last_hidden_state, 2e-4, "vit")
    save_vision(ours, tmp_path / "saved")
    assert torch.equal(load_vision(tmp_path / "saved")(pixels), ours(pixels))
    (directory / "config.json").write_text('{"model_type": "vit", "qkv_bias": false}')
    with pytest.raises(ValueError, match="'vit' has qkv_bias = False; only True is supported"):
        load_vision(directory)


def test_the_models_do_not_know_who_loads_them():
    code = ("import sys, model.vlm; print([name for name in sys.modules "
            "if name.startswith('model.pretrained')])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(),
                          capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
