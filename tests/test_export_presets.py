"""Claim: the tiny twin of every preset goes out in every form that has words for it, and comes back
with the same logits. `pytest -rP tests/test_export_presets.py` prints the table."""

import json

import peft
import pytest
import torch
import transformers

import extras.export.__main__ as export
import train_sft
from dataset.chat import IMAGE, Message
from dataset.images import load_image
from extras.convert.minimind import half_split
from model.lora import merge_lora
from model.pretrained.checkpoint import find_model
from model.pretrained.hub import resolve
from model.pretrained.load import load_checkpoint
from tests import test_systems
from tests.families import public_vision
from tests.test_systems import save_language_model, save_vision_tower
from tests.tiny import make_data

# preset: language, vision, and why a form is refused where it is
NO_ADAPTERS = "it trained language|has no LoRA"
PRESETS = {
    "smollm2-dinov2": ("Llama", "Dinov2", {"transformers": "--pixel_shuffle 2", "peft": NO_ADAPTERS,
                                           "eyes": "dinov2"}),
    "qwen2.5-siglip": ("Qwen2", "Siglip", {}),
    "qwen7b-clip": ("Qwen-7B", "CLIP", {}),
    "qwen3-clip": ("Qwen3", "CLIP", {}),
    "qwen2.5-1.5b-clip": ("Qwen2", "CLIP", {"peft": NO_ADAPTERS}),
    "minimind-v": ("MiniMind 2", "CLIP", {"peft": NO_ADAPTERS, "eyes": "--projector linear"}),
    "minimind-3v": ("MiniMind 3", "siglip alone", {
        "transformers": "--projector norm_mlp", "peft": NO_ADAPTERS, "eyes": "norm_mlp"}),
}
TABLE = []


@pytest.fixture(params=PRESETS)
def twin(request, tmp_path, monkeypatch):
    """Two steps of the preset's second stage -> preset, our model, its logits, the run."""
    # Twice as wide as the tower, as published ones are: LLaVA's form of a last norm needs it.
    monkeypatch.setitem(test_systems.TOWER, "intermediate_size", 48)
    language, vision, _ = PRESETS[request.param]
    language, _ = save_language_model(language, tmp_path / "language")
    if vision == "Dinov2":
        public_vision("Dinov2", image_size=32).save_pretrained(tmp_path / "vision")
        (tmp_path / "vision" / "preprocessor_config.json").write_text(json.dumps(
            {**test_systems.SIGLIP_PIXELS, "size": {"height": 32, "width": 32}}))
    else:
        save_vision_tower(vision, tmp_path / "vision")
    train_sft.main([
        "--preset", request.param, "--model", "none", "--language_model", language,
        "--vision_tower",
        str(tmp_path / "vision"), "--data", make_data(tmp_path, count=4), "--image_folder",
        str(tmp_path), "--steps", "2", "--batch_size", "2", "--gradient_accumulation_steps", "1",
        "--dtype", "fp32",
        "--num_workers", "0", "--learning_rate", "0.05", "--out", str(tmp_path / "sft")])
    model, template, processor = export.load(export.read_flags([]), find_model(tmp_path / "sft"))
    merge_lora(model.language)
    question = Message("user", f"{IMAGE}\nWhich colour?")
    pixels = processor(load_image(tmp_path / "red.png"))[None]
    return request.param, model, template.encode_prompt([question]), pixels, tmp_path, language


@torch.no_grad()
def logits(model, ids, pixels):
    return model.language.logits(model.language.decode(model.embed(torch.tensor([ids]), pixels)))


def exported(twin, form: str, *flags):
    """-> the directory, or None where the form is refused for the reason that is expected."""
    preset, directory = twin[0], twin[4]
    out, reason = directory / form, PRESETS[preset][2].get(form)
    command = ["--model", str(directory / "sft"), "--to", form, "--out", str(out), *flags]
    if reason:
        with pytest.raises(SystemExit, match=reason):
            export.main(command)
        return None
    export.main(command)
    return out


@torch.no_grad()
def from_transformers(twin, out):
    _, _, ids, pixels, _, _ = twin
    public, told = transformers.LlavaForConditionalGeneration.from_pretrained(
        out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    return public.eval()(input_ids=torch.tensor([ids]), pixel_values=pixels).logits


def from_merged(twin, out):
    return logits(load_checkpoint(find_model(str(out))), *twin[2:4])


@torch.no_grad()
def from_peft(twin, out):
    """The words alone: an adapter has no eyes."""
    _, model, _, _, directory, language = twin
    ids = torch.arange(3, 40)[None]
    expected = model.language(ids)
    base = transformers.AutoModelForCausalLM.from_pretrained(resolve(language))
    return peft.PeftModel.from_pretrained(base, out).eval()(ids).logits, expected


def from_gguf(twin, out):
    pytest.importorskip("gguf")  # an extra; a fault in our own module is no reason to skip
    from extras.export import gguf

    _, model, ids, pixels, _, _ = twin
    from tests.test_export_gguf import tensors_of

    found, names = tensors_of(out / "language.gguf"), gguf.LANGUAGE
    for name, tensor in model.language.named_parameters():
        back = torch.from_numpy(found[gguf.gguf_name(name, names)].copy())[:len(tensor)]
        if model.language.config.model_type == "llama" and name.endswith(
                ("q_proj.weight", "k_proj.weight")):
            back = half_split(back, model.language.config.head_dim)
        tensor.data = back
    assert (out / "mmproj.gguf").exists() == ("eyes" not in PRESETS[twin[0]][2])
    return logits(model, ids, pixels)


def test_every_form_comes_back_with_the_same_logits(twin):
    preset, model, ids, pixels, _, _ = twin
    expected, row = logits(model, ids, pixels), {}
    for form, read, flags in (
            ("transformers", from_transformers, ["--dtype", "fp32"]),
            ("merged", from_merged, ["--dtype", "fp32"]), ("peft", from_peft, []),
            ("gguf", from_gguf, ["--dtype", "fp32"])):
        out = exported(twin, form, *flags)
        if out is None:
            row[form] = "refused"
            continue
        got = read(twin, out)
        got, wanted = got if isinstance(got, tuple) else (got, expected)
        row[form] = (got[..., :wanted.shape[-1]] - wanted).abs().max().item()
        assert row[form] <= 1e-4, f"{preset}, {form}: largest difference {row[form]:.2e}"
    TABLE.append(f"| `{preset}` | " + " | ".join(
        told if isinstance(told, str) else f"{told:.0e}" for told in row.values()) + " |")


def test_the_table_of_forms_and_presets():
    print("| preset | transformers | merged | peft | gguf (fp32) |", "| --- " * 5 + "|", sep="\n")
    print("\n".join(TABLE))
    assert len(TABLE) in (0, len(PRESETS)), "0: this test was run alone"
