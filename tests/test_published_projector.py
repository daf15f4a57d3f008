"""Claims: --pretrained_projector begins with somebody's published projector, which computes what
it did where it was trained; a file that does not fit is told with its tensors and shapes.
(MiniMind-V's two are compared in test_layouts.py.)"""

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

import train_pretrain
import train_sft
from extras.convert.published_projector import load_projector
from model.config import ProjectorConfig
from model.pretrained.checkpoint import newest_checkpoint, tensor_names
from model.pretrained.load import load_checkpoint
from model.projector import Projector
from tests.families import assert_close
from tests.tiny import curve, make_world
from train_pretrain import load_or_build
from training.presets import read_flags, resolve

DV, D = 24, 32  # of make_world's towers


def llava():
    """The projector of transformers' LLaVA."""
    torch.manual_seed(3)
    public = LlavaMultiModalProjector(transformers.LlavaConfig(
        text_config={"model_type": "llama", "hidden_size": D, "num_attention_heads": 2},
        vision_config={"model_type": "clip_vision_model", "hidden_size": DV,
                       "num_attention_heads": 2}))
    for parameter in public.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return public


def published(public, form: str) -> dict[str, torch.Tensor]:
    """{name: tensor} as the authors, or transformers, write it."""
    forms = {"authors": "model.mm_projector.{}", "older transformers": "multi_modal_projector.{}",
             "transformers": "model.multi_modal_projector.{}"}
    renamed = {"linear_1": "0", "linear_2": "2"} if form == "authors" else {}
    tensors = {"lm_head.weight": torch.ones(3, 3), "model.layers.0.mlp.weight": torch.ones(2)}
    for name, tensor in public.state_dict().items():
        layer, last = name.split(".")
        tensors[forms[form].format(f"{renamed.get(layer, layer)}.{last}")] = tensor.clone()
    return tensors


@torch.no_grad()
@pytest.mark.parametrize("form", ["authors", "transformers", "older transformers"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_llavas_projector_computes_what_it_did(form, suffix, tmp_path):
    public, file = llava(), tmp_path / f"mm_projector{suffix}"
    write = save_file if suffix == ".safetensors" else torch.save
    write(published(public, form), file)
    ours = Projector(ProjectorConfig("mlp", DV, D))
    load_projector(ours, file)
    features = torch.randn(2, 9, DV)
    assert_close(ours(features), public(features), 1e-6, "LLaVA's projector")


def test_half_precision_and_a_single_layer(tmp_path):
    layer = torch.nn.Linear(DV, D).half()
    torch.save({f"mm_projector.{name}": each for name, each in layer.state_dict().items()},
               tmp_path / "p.bin")
    ours = Projector(ProjectorConfig("linear", DV, D))
    load_projector(ours, tmp_path / "p.bin")
    assert torch.equal(ours.fc1.weight, layer.weight.float()) and ours.fc1.bias.requires_grad


def test_what_does_not_fit_is_told(tmp_path):
    tensors, file = published(llava(), "authors"), tmp_path / "p.safetensors"
    save_file(tensors, file)
    for kind, vision, language, words in (
            ("mlp", DV + 1, D, rf"p.safetensors: model.mm_projector.0.weight is \[{D}, {DV}\], "
                               rf"and these two towers ask for \[{D}, {DV + 1}\]"),
            ("mlp", DV, D + 1, r"model.mm_projector.0.weight is .* ask for \[33, 24\]"),
            ("linear", DV, D, "p.safetensors holds .* kind 'mlp' .*give --projector mlp"),
            ("norm_mlp", DV, D, "give --projector mlp")):
        before = Projector(ProjectorConfig(kind, vision, language))
        kept = {name: each.clone() for name, each in before.state_dict().items()}
        with pytest.raises(ValueError, match=words):
            load_projector(before, file)
        assert all(torch.equal(kept[name], each) for name, each in before.state_dict().items())
    save_file({**tensors, "model.mm_projector.4.weight": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"no projector that is known.*mm_projector\.4"):
        load_projector(Projector(ProjectorConfig("mlp", DV, D)), file)
    with pytest.raises(FileNotFoundError, match="no projector file .*gone.pth; expected"):
        load_projector(Projector(ProjectorConfig("mlp", DV, D)), tmp_path / "gone.pth")


def test_both_stages_begin_with_it_and_a_resumed_run_does_not_begin_again(tmp_path):
    world = make_world(tmp_path, count=8)
    public, file = llava(), tmp_path / "mm_projector.bin"
    torch.save(published(public, "authors"), file)
    flags = [*world, "--pretrained_projector", str(file)]
    for stage in ("pretrain", "sft"):
        settings = resolve(read_flags("", stage, [*flags, "--model", "none"]), stage, {})
        projector = load_or_build(settings, None).model.projector
        assert torch.equal(projector.fc2.weight, public.linear_2.weight)
    frozen = ["--no-train_projector", "--train_language", "last:1"]
    train_sft.main([*flags, "--model", "none", *frozen, "--out", str(tmp_path / "frozen")])
    kept = newest_checkpoint(tmp_path / "frozen")
    assert "projector.fc1.weight" in tensor_names(kept)
    assert torch.equal(load_checkpoint(kept).projector.fc1.weight, public.linear_1.weight)

    train_pretrain.main([*flags, "--steps", "3", "--out", str(tmp_path / "out")])
    file.unlink()  # nobody asks for it again
    train_pretrain.main(["--resume", "--steps", "6", "--out", str(tmp_path / "out")])
    assert len(curve(tmp_path / "out")) == 6
    with pytest.raises(SystemExit, match="--pretrained_projector .* brings its own projector"):
        train_sft.main(["--model", str(tmp_path / "out"), "--pretrained_projector", str(file),
                        "--out", str(tmp_path / "sft")])
    with pytest.raises(SystemExit, match="cannot build the model: no projector file"):
        train_pretrain.main([*flags, "--out", str(tmp_path / "none")])
