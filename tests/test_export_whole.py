"""Claim: what a form has no place for is refused by the tensor's name, and never left out."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import extras.export.__main__ as export
from extras.export.peft import peft_adapter
from extras.export.transformers import llava, llava_language
from model.lora import add_lora
from model.pretrained.checkpoint import find_model, read_config, read_run, save_checkpoint
from model.pretrained.load import load_checkpoint
from model.projector import PROJECTORS, Projector
from tests.families import tiny_vlm
from tests.test_export import trained


class ScaledMLP(nn.Module):
    """A layer that no export knows: a residual MLP with a learned scale."""

    def __init__(self, width: int, D: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, D), nn.Linear(D, D)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        x = self.fc1(x)
        return x + self.scale * self.fc2(nn.functional.gelu(x))


def residual_layers(width, D):
    return {"residual": ScaledMLP(width, D)}


def residual(vlm):
    c = vlm.config
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROJECTORS, "residual", residual_layers)
        vlm.projector = Projector(replace(c.projector, kind="residual"))


def named(place: str, name: str, buffer: bool = False):
    def change(vlm):
        module = vlm.get_submodule(place)
        if buffer:
            module.register_buffer(name, torch.ones(2))
        else:
            module.register_parameter(name, nn.Parameter(torch.ones(2)))
    return change


UNKNOWN = {  # what is done to a sound model, and the tensor that the message names
    "a residual mlp with a learned scale": (residual, "projector.residual.scale"),
    "a norm that the kind has not": (
        lambda vlm: setattr(vlm.projector, "norm", nn.LayerNorm(36)), "projector.norm.weight"),
    "a third layer": (lambda vlm: setattr(vlm.projector, "fc3", nn.Linear(36, 36)),
                      "projector.fc3.weight"),
    "a buffer": (named("projector", "mean", buffer=True), "projector.mean"),
    "another projector altogether": (
        lambda vlm: setattr(vlm, "projector", nn.Conv1d(36, 36, 1)), "projector.weight"),
    "one bias less": (lambda vlm: setattr(vlm.projector.fc2, "bias", None), "projector.fc2.bias"),
    "a line break between rows of patches": (named("", "newline"), "newline"),
    "registers in the tower": (named("vision", "registers"), "vision.registers"),
    "a gate in a layer": (named("language.layers.0", "gate"), "language.layers.0.gate"),
    "dora's magnitude": (named("language.layers.0.self_attn.q_proj", "magnitude"),
                         "language.layers.0.self_attn.q_proj.magnitude"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_tokenizer_dir):
    directory = tmp_path_factory.mktemp("run")
    return trained(directory, tiny_tokenizer_dir, "Qwen2", "Siglip", 48, ["--lora"])


@pytest.mark.parametrize("form", export.FORMS)
@pytest.mark.parametrize("name", UNKNOWN)
def test_no_form_leaves_an_unknown_tensor_out(run, tmp_path, monkeypatch, name, form):
    if form == "gguf":
        pytest.importorskip("gguf")
    change, tensor = UNKNOWN[name]
    load = export.load_checkpoint

    def loaded(*arguments):
        vlm = load(*arguments)
        change(vlm)
        return vlm

    monkeypatch.setattr(export, "load_checkpoint", loaded)
    with pytest.raises(SystemExit, match=rf"cannot be exported: it (holds|lacks).* {tensor}[. (]"
                                         r".*fc1\.weight, fc1\.bias, fc2\.weight, fc2\.bias"):
        export.main(["--model", run, "--to", form, "--out", str(tmp_path / "out")])
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.fixture
def known(run, tmp_path, monkeypatch):
    """A run of the same model, as if the program had the kind "residual" -> the run."""
    checkpoint = find_model(run)
    vlm, template, processor = export.load(export.read_flags([]), checkpoint)
    residual(vlm)
    monkeypatch.setitem(PROJECTORS, "residual", residual_layers)
    save_checkpoint(tmp_path / "run", 2, dict(vlm.named_parameters()),
                    {**read_config(checkpoint), "projector": "residual"}, read_run(checkpoint),
                    (template.tokenizer, processor))
    return str(tmp_path / "run")


def exported(run, tmp_path, form, reason=None):
    flags = ["--model", run, "--to", form, "--out", str(tmp_path / form)]
    if reason is None:
        export.main(flags)
        return tmp_path / form
    with pytest.raises(SystemExit, match=reason):
        export.main(flags)
    assert not (tmp_path / form).exists()


@torch.no_grad()
def test_a_kind_that_is_new_to_llava_is_refused_and_a_checkpoint_takes_it_whole(known, tmp_path,
                                                                                monkeypatch):
    exported(known, tmp_path, "transformers",
             "--projector residual: LLaVA's projector is linear or mlp")
    whole = load_checkpoint(find_model(known))
    merged = load_checkpoint(find_model(str(exported(known, tmp_path, "merged"))))
    assert merged.projector.residual.scale == 0.5
    pixels = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    difference = merged.encode_images(pixels) - whole.encode_images(pixels)
    assert difference.abs().max() < 0.05, "rounded to bf16, and all of it"

    def with_buffer(*arguments):
        vlm = load_checkpoint(*arguments)
        vlm.projector.register_buffer("mean", torch.ones(2))
        return vlm

    class Buffered(Projector):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("mean", torch.ones(2))

    monkeypatch.setattr(export, "Projector", Buffered)  # a class that makes it: nothing unknown
    monkeypatch.setattr(export, "load_checkpoint", with_buffer)
    (tmp_path / "merged").rename(tmp_path / "before")
    exported(known, tmp_path, "merged", "checkpoint of ours: it holds .*projector.mean")


def test_a_kind_that_is_new_to_llama_cpp_goes_without_its_eyes(known, tmp_path, capsys):
    pytest.importorskip("gguf")
    out = exported(known, tmp_path, "gguf")
    assert "for this model: --projector residual: it has" in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["language.gguf"]


def test_an_adapter_tells_what_is_not_in_it(run, tmp_path, capsys):
    exported(run, tmp_path, "peft")
    assert "not in an adapter of peft: what was trained of projector" in capsys.readouterr().out


def test_a_kind_that_no_class_knows_is_refused_in_every_form(run, tmp_path, monkeypatch):
    load = export.load_checkpoint

    def loaded(*arguments):
        vlm = load(*arguments)
        residual(vlm)
        vlm.config = replace(vlm.config, projector=replace(vlm.config.projector, kind="residual"))
        return vlm

    monkeypatch.setattr(export, "load_checkpoint", loaded)
    for form in set(export.FORMS) - {"gguf"}:
        exported(run, tmp_path, form, "no projector 'residual'; there are linear, mlp, norm_mlp")


# ---------------------------------------------------------------- the writers by themselves


@pytest.mark.parametrize("name", [
    name for name in UNKNOWN if name not in ("a gate in a layer", "dora's magnitude")])
def test_the_writers_refuse_it_too(tmp_path, name):
    vlm, (change, tensor) = tiny_vlm(), UNKNOWN[name]
    change(vlm)
    with pytest.raises(ValueError, match=f"cannot be expressed as a LLaVA: .*{tensor}"):
        llava(vlm, (48, 48), 60)
    gguf = pytest.importorskip("extras.export.gguf", exc_type=ImportError)
    processor = type("Processor", (), {"size": (48, 48), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    with pytest.raises(ValueError, match=f"llama.cpp has no form for this model: .*{tensor}"):
        gguf.write_mmproj(vlm, processor, tmp_path / "mmproj.gguf")
    assert not (tmp_path / "mmproj.gguf").exists()


@pytest.mark.parametrize("part, refusal", [("vision", "a plain_vit tower: it takes siglip_vis"),
                                           ("language", "a plain_vit has no form there")])
def test_a_family_that_is_new_to_an_export_is_refused(tmp_path, part, refusal):
    vlm = tiny_vlm()
    tower = getattr(vlm, part)
    tower.config = replace(tower.config, model_type="plain_vit")
    with pytest.raises(ValueError, match=refusal):
        llava(vlm, (48, 48), 60)
    gguf = pytest.importorskip("extras.export.gguf", exc_type=ImportError)
    processor = type("Processor", (), {"size": (48, 48), "mean": (0.5,) * 3, "std": (0.5,) * 3})
    with pytest.raises(ValueError, match="plain_vit"):
        if part == "vision":
            gguf.write_mmproj(vlm, processor, tmp_path / "mmproj.gguf")
        else:
            gguf.write_language(vlm, {}, 61, "f16", tmp_path / "language.gguf")
    assert not list(tmp_path.iterdir())


def test_a_language_model_that_its_config_does_not_describe_is_refused(tmp_path):
    vlm = tiny_vlm()
    named("language.layers.0", "gate")(vlm)
    with pytest.raises(ValueError, match=r"expressed as a qwen2: it holds .*layers\.0\.gate"):
        llava_language(vlm.language, 61)


def test_an_adapter_of_more_than_two_matrices_is_refused():
    language = tiny_vlm().language
    lora = {"targets": ["q_proj"], "rank": 2, "alpha": 2.0, "dropout": 0.0}
    add_lora(language, **lora)
    peft_adapter(language, lora, "")
    language.layers[1].self_attn.q_proj.magnitude = nn.Parameter(torch.ones(36))
    with pytest.raises(ValueError, match=r"no adapter on its base: .*1\.self_attn\.q_proj\.magn"):
        peft_adapter(language, lora, "")


def test_a_name_that_llama_cpp_lacks_is_told():
    gguf = pytest.importorskip("extras.export.gguf", exc_type=ImportError)
    with pytest.raises(ValueError, match="no name for the tensor layers.3.gate.weight; it has one"):
        gguf.gguf_name("layers.3.gate.weight", gguf.LANGUAGE)
