"""Claims: a checkpoint is whole, stands on verified public weights, and chats as it was trained."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train_pretrain
import train_sft
from dataset.chat import Message
from dataset.tokenizer import Tokenizer
from model.lora import merge_lora
from model.pretrained.checkpoint import (
    checkpoints,
    find_model,
    newest_checkpoint,
    read_config,
    save_checkpoint,
)
from model.pretrained.load import load_checkpoint
from tests.tiny import make_world
from train_pretrain import load_or_build
from training.presets import read_flags, resolve


@pytest.fixture
def world(tmp_path):
    directory = tmp_path / "world"
    directory.mkdir()
    return [*make_world(directory), "--model", "none"]


def logits(model):
    torch.manual_seed(3)
    ids = torch.randint(0, 250, (2, 9))
    ids[:, 2:6] = model.config.image_token_id
    with torch.no_grad():
        return model.language.logits(model.language.decode(
            model.embed(ids, torch.rand(2, 3, 16, 16))))


def trained(flags, script=train_pretrain):
    """Run and keep the model of the last save -> the model, the checkpoint."""
    kept = []
    plain = train_pretrain.save

    def keeping(bundle, *rest):
        kept.append(bundle.model)
        return plain(bundle, *rest)

    train_pretrain.save = keeping
    try:
        script.main(flags)
    finally:
        train_pretrain.save = plain
    return kept[0].eval(), newest_checkpoint(flags[flags.index("--out") + 1])


@pytest.mark.parametrize("flags", [
    [], ["--lora"], ["--train_language", "last:1"], ["--train_language", "all", "--train_vision"]])
def test_what_is_loaded_answers_as_what_was_trained(world, tmp_path, flags):
    model, checkpoint = trained([*world, *flags, "--out", str(tmp_path / "out")])
    difference = (logits(model) - logits(load_checkpoint(checkpoint))).abs().max().item()
    assert difference == 0, f"largest difference {difference}"
    loaded = load_checkpoint(checkpoint)
    merge_lora(loaded.language)
    difference = (logits(model) - logits(loaded)).abs().max().item()
    assert difference < 1e-4, f"largest difference after the merge {difference}"


def test_stage_two_holds_what_stage_one_changed(world, tmp_path):
    """Stage one opened the last layer; stage two trains adapters alone. Its file has both."""
    trained([*world, "--train_language", "last:1", "--out", str(tmp_path / "pre")])
    flags = [*world[:-2], "--model", str(tmp_path / "pre"), "--lora", "--out",
             str(tmp_path / "sft")]
    model, checkpoint = trained(flags, train_sft)
    names = load_file(checkpoint / "model.safetensors").keys()
    assert "language.layers.1.mlp.up_proj.weight" in names
    assert "language.layers.0.self_attn.q_proj.lora_b" in names
    assert "language.layers.0.self_attn.q_proj.weight" not in names, "frozen: referred to"
    assert not any(name.startswith("vision.") for name in names)
    assert torch.equal(logits(model), logits(load_checkpoint(checkpoint)))
    # A third run goes on with the adapters, and refuses to change their form.
    again = [*world[:-2], "--model", str(checkpoint), "--out", str(tmp_path / "more"), "--lora"]
    model, checkpoint = trained(again, train_sft)
    assert torch.equal(logits(model), logits(load_checkpoint(checkpoint)))
    with pytest.raises(SystemExit, match="LoRA adapters with .*rank"):
        train_sft.main([*again, "--lora_rank", "2"])


def test_everything_a_chat_needs_is_there(world, tmp_path):
    _, checkpoint = trained([*world, "--system", "Be brief.", "--out", str(tmp_path / "out")])
    assert {path.name for path in checkpoint.iterdir()} == {
        "model.safetensors", "config.json", "run.json", "training_state.pt", "tokenizer.json",
        "preprocessor_config.json", "manifest.json"}
    config = read_config(checkpoint)
    assert (config["system"], config["image_tokens"], config["lora"]) == ("Be brief.", 4, None)
    run = json.loads((checkpoint / "run.json").read_text())
    assert run["stage"] == "pretrain" and run["step"] == 6 and run["data"]["samples"] == 24
    assert run["settings"]["learning_rate"] == 0.01 and "torch" in run["versions"]
    assert len(run["data"]["sha256"]) == 64 and "commit" in run
    # Another run from this checkpoint renders the same prompt as training did.
    settings = resolve(read_flags("", "sft", world), "sft", {"system": config["system"]})
    prompt = load_or_build(settings, checkpoint).template.encode_prompt([Message("user", "Hi")])
    told = Tokenizer.from_directory(checkpoint).decode(prompt)
    assert told == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
                    "<|im_start|>assistant\n")


def test_other_base_weights_are_refused(world, tmp_path):
    _, checkpoint = trained([*world, "--out", str(tmp_path / "out")])
    vision = tmp_path / "world" / "vision"
    file = vision / "model.safetensors"
    original = file.read_bytes()
    file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"vision/model\.safetensors differs.*sha256"):
        load_checkpoint(checkpoint)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        load_checkpoint(checkpoint)
    shutil.rmtree(vision)
    with pytest.raises(FileNotFoundError,
                       match="stands on the vision weights .*--vision_tower DIR"):
        load_checkpoint(checkpoint)


def test_base_weights_may_move(world, tmp_path):
    model, checkpoint = trained([*world, "--out", str(tmp_path / "out")])
    (tmp_path / "world" / "vision").rename(tmp_path / "elsewhere")
    loaded = load_checkpoint(checkpoint, vision=str(tmp_path / "elsewhere"))
    assert torch.equal(logits(model), logits(loaded))
    train_sft.main([*world[:-2], "--vision_tower", str(tmp_path / "elsewhere"), "--model",
                    str(checkpoint), "--lora", "--out", str(tmp_path / "sft")])
    load_checkpoint(newest_checkpoint(tmp_path / "sft"))  # refers to where it lies now


def test_full_checkpoint_needs_no_base(world, tmp_path):
    model, checkpoint = trained([*world, "--full_checkpoint", "--out", str(tmp_path / "out")])
    shutil.rmtree(tmp_path / "world" / "vision")
    shutil.rmtree(tmp_path / "world" / "language")
    moved = checkpoint.rename(tmp_path / "moved")
    assert torch.equal(logits(model), logits(load_checkpoint(moved)))


def test_a_tower_that_was_wholly_trained_needs_no_base(world, tmp_path):
    model, checkpoint = trained([*world, "--train_language", "all", "--out",
                                 str(tmp_path / "out")])
    shutil.rmtree(tmp_path / "world" / "language")
    assert torch.equal(logits(model), logits(load_checkpoint(checkpoint)))


def test_bf16_for_chat(world, tmp_path):
    _, checkpoint = trained([*world, "--lora", "--out", str(tmp_path / "out")])
    model = load_checkpoint(checkpoint, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training


def test_every_tensor_of_the_file_has_its_place(world, tmp_path):
    from safetensors.torch import save_file
    _, checkpoint = trained([*world, "--out", str(tmp_path / "out")])
    tensors = load_file(checkpoint / "model.safetensors")
    for change, message in (
        ({"projector.fc1.wieght": torch.zeros(2)}, "fc1.wieght.*no such"),
        ({"projector.fc1.bias": torch.zeros(3)}, r"fc1\.bias has shape \(3,\).*\(32,\)"),
    ):
        save_file({**tensors, **change}, checkpoint / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_checkpoint(checkpoint)
    del tensors["projector.fc2.bias"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks projector\.fc2\.bias"):
        load_checkpoint(checkpoint)


def test_the_newest_are_kept_and_found(world, tmp_path, monkeypatch):
    out = tmp_path / "out" / "pretrain"
    train_pretrain.main([*world, "--save_steps", "1", "--save_total_limit", "2", "--out", str(out)])
    assert [path.name for path in checkpoints(out)] == ["step_000005", "step_000006"]
    assert newest_checkpoint(tmp_path) is None
    assert find_model(str(out)).name == "step_000006"
    assert find_model(str(out / "step_000005")).name == "step_000005"
    monkeypatch.chdir(tmp_path)
    assert find_model(None).parts == ("out", "pretrain", "step_000006")
    with pytest.raises(FileNotFoundError, match="train_pretrain.py"):
        find_model(None, runs=("out/sft",))
    with pytest.raises(FileNotFoundError, match="not a checkpoint"):
        find_model(str(tmp_path / "world" / "language"))
    # train_sft starts from the newest of stage one by itself, but never writes beside it.
    train_sft.main([*world[:-2], "--lora", "--steps", "1"])
    assert newest_checkpoint("out/sft").name == "step_000001"
    with pytest.raises(SystemExit, match="another --out"):
        train_sft.main([*world[:-2], "--model", "out/sft", "--out", "out/sft"])


def test_a_worker_that_dies_while_a_checkpoint_is_saved_is_not_taken_for_a_full_disk(
        tmp_path, monkeypatch):
    """PyTorch raises that error wherever the training happens to be."""
    def die(*args):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr("model.pretrained.checkpoint.write_files", die)
    with pytest.raises(RuntimeError, match="^DataLoader worker"):
        save_checkpoint(tmp_path, 1, {}, {}, {})
    assert not list(tmp_path.iterdir())
