"""Claims: every system that people built by hand runs by its preset, on weights and data laid
out as their authors published them: both stages train, a picture is answered. Several data files
are mixed by weight in a run, and a run on them can be resumed."""

import base64
import json

import pytest
import torch
import transformers
from safetensors import safe_open

import eval as script
import train_pretrain
import train_sft
from dataset.batching import Batches
from dataset.chat import ChatTemplate
from dataset.images import ImageProcessor
from dataset.readers.mixture import open_mixture
from dataset.tokenizer import Tokenizer
from model.pretrained.checkpoint import newest_checkpoint, read_config, read_run
from tests.families import (
    assert_close,
    public_language,
    randomise,
    save_minimind,
    save_qwen,
)
from tests.published_data import (
    captions_and_vqa,
    cc3m_and_instruct_mix,
    coco_and_challenger,
    jpeg,
    minimind_jsonl,
    minimind_parquet,
)
from tests.tiny import curve, make_data, make_tokenizer, make_world
from train_pretrain import load_or_build
from training.data import matching
from training.presets import read_flags, resolve

# ---------------------------------------------------------------- several data files


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny towers, and a second data file beside the first -> flags, the files."""
    directory = tmp_path_factory.mktemp("world")
    flags = make_world(directory, count=8)
    more = directory / "more.jsonl"
    more.write_text("".join(json.dumps({"conversations": [
        {"role": "user", "content": f"Number {i}?"}, {"role": "assistant", "content": f"{i}"}]})
        + "\n" for i in range(6)))
    at = flags.index("--data")
    return flags[:at] + flags[at + 2:], [flags[at + 1], str(more)]


def test_batches_take_the_other_half_in_the_next_epoch(world):
    flags, files = world
    language, vision = flags[1], flags[3]
    data = open_mixture([files[0], f"{files[1]}:0.5"])
    batches = Batches(data, ChatTemplate(Tokenizer.from_directory(language), 4),
                      ImageProcessor.from_directory(vision), 2, 128, seed=0)
    seen = [sorted(place for batch, bad in batches.epoch(epoch) for place in batch.where)
            for epoch in range(3)]
    assert [len(places) for places in seen] == [8 + 3] * 3
    halves = [{place for place in places if "more" in place} for places in seen]
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 6
    again = [place for batch, bad in batches.epoch(1) for place in batch.where]
    assert sorted(again) == seen[1], "an epoch is the same whenever it is asked for"


def test_a_run_on_mixed_files_is_told_and_resumed(world, tmp_path):
    flags, files = world
    data = ["--data", files[0], f"{files[1]}:0.5"]
    train_pretrain.main([*flags, *data, "--out", str(tmp_path / "whole")])
    told = read_run(newest_checkpoint(tmp_path / "whole"))["data"]
    assert told["samples"] == 11 and [about["weight"] for about in told["files"]] == [1.0, 0.5]
    assert [about["samples"] for about in told["files"]] == [8, 6]
    short = [*flags, "--steps", "3"]  # resumed in the middle: the rates are those of 6 steps
    train_pretrain.main([*short, *data, "--out", str(tmp_path / "two")])
    train_pretrain.main(["--resume", "--steps", "6", "--out", str(tmp_path / "two")])
    tokens = [[entry[-1] for entry in curve(tmp_path / run)] for run in ("whole", "two")]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 6
    with pytest.raises(SystemExit, match="was made on .*the data order would not go on"):
        train_pretrain.main(["--resume", "--data", files[0], "--out", str(tmp_path / "two")])


def test_one_file_is_told_as_before_there_were_weights(world, tmp_path):
    flags, files = world
    train_pretrain.main([*flags, "--data", files[0], "--out", str(tmp_path / "out")])
    checkpoint = newest_checkpoint(tmp_path / "out")
    assert read_run(checkpoint)["data"].keys() == {"file", "bytes", "sha256", "samples"}
    # A run from before there were templates: it is resumed, and rendered as it was.
    for name, part in (("run.json", "settings"), ("config.json", None)):
        path = checkpoint / name
        content = json.loads(path.read_text())
        for fact in ("template", "image_token", "vision_feature_select"):
            (content[part] if part else content).pop(fact, None)
        path.write_text(json.dumps(content))
    train_pretrain.main(["--resume", "--steps", "8", "--out", str(tmp_path / "out")])
    config = json.loads((newest_checkpoint(tmp_path / "out") / "config.json").read_text())
    assert (config["template"], config["image_token"]) == ("qwen2", "<|image_pad|>")


def test_a_star_stands_for_all_the_parts_of_a_data_set(tmp_path):
    for name in ("train-1.parquet", "train-0.parquet", "test-0.parquet"):
        (tmp_path / name).touch()
    parts = [str(tmp_path / f"train-{number}.parquet") for number in (0, 1)]
    assert matching(str(tmp_path / "train-*.parquet")) == parts
    assert matching(str(tmp_path / "train-*.parquet:2")) == [f"{part}:2" for part in parts]
    assert matching("none-*.json:2") == ["none-*.json:2"]


# ---------------------------------------------------------------- the systems, as published

CLIP_PIXELS = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16,
               "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3,
               "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
SIGLIP_PIXELS = {"image_processor_type": "SiglipImageProcessor", "resample": 3,
                 "size": {"height": 16, "width": 16}, "rescale_factor": 1 / 255,
                 "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TOWER = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2}
TEXT_TOWER = {**TOWER, "vocab_size": 99, "max_position_embeddings": 16}


def save_vision_tower(family: str, directory):
    """CLIP and SigLIP are published as a whole, with the text tower; MiniMind's copy is not."""
    eyes = {**TOWER, "image_size": 16, "patch_size": 8}
    if family == "siglip alone":
        public = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**eyes))
    else:
        config = getattr(transformers, family + "Config")(
            text_config=TEXT_TOWER, vision_config=eyes)
        public = getattr(transformers, family + "Model")(config)
    randomise(public).save_pretrained(directory)
    pixels = CLIP_PIXELS if family == "CLIP" else SIGLIP_PIXELS
    (directory / "preprocessor_config.json").write_text(json.dumps(pixels))
    return public if family == "siglip alone" else public.vision_model


def save_language_model(family: str, directory):
    """-> what --language_model gets, and the transformers model where there is one."""
    directory.mkdir()
    if family == "Qwen-7B":
        lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
        (directory / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
        save_qwen(directory, vocab_size=256 + 208)
        return str(directory), None
    words = make_tokenizer(directory)
    if family.startswith("MiniMind"):
        file = directory / "llm_64.pth"
        save_minimind(file, family.removeprefix("MiniMind "), words=words, layers=3)
        return str(file), None
    public = public_language(family, vocab_size=words)
    public.save_pretrained(directory)
    return str(directory), public


# preset and its flags: language, vision, data, template, image token, K, what stage two trains
SYSTEMS = {
    "qwen2.5-siglip": (
        "Qwen2", "Siglip", minimind_parquet, "qwen2", "<|image_pad|>", 4, "lora"),
    "qwen2.5-siglip --projector linear": (
        "Qwen2", "Siglip", minimind_jsonl, "qwen2", "<|image_pad|>", 4, "lora"),
    "qwen7b-clip": ("Qwen-7B", "CLIP", coco_and_challenger, "qwen", "<|extra_0|>", 4, "lora"),
    "qwen3-clip": ("Qwen3", "CLIP", cc3m_and_instruct_mix, "qwen3", "<|image_pad|>", 4, "lora"),
    "qwen2.5-1.5b-clip": (
        "Qwen2", "CLIP", captions_and_vqa, "qwen2.5-instruct", "<|image_pad|>", 4, "012"),
    "qwen2.5-1.5b-clip --vision_feature_select class": (
        "Qwen2", "CLIP", captions_and_vqa, "qwen2.5-instruct", "<|image_pad|>", 1, "012"),
    "qwen2.5-1.5b-clip --vision_feature_select pooled": (
        "Qwen2", "CLIP", captions_and_vqa, "qwen2.5-instruct", "<|image_pad|>", 1, "012"),
    "minimind-v": ("MiniMind 2", "CLIP", minimind_jsonl, "minimind2", "@", 4, "012"),
    "minimind-v --train_language none": (
        "MiniMind 2 older", "CLIP", minimind_parquet, "minimind2", "@", 4, ""),
    "minimind-3v": (
        "MiniMind 3", "siglip alone", minimind_parquet, "minimind", "<|image_pad|>", 4, "02"),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_runs_by_its_preset(name, tmp_path, capsys):
    language, vision, publish, template, image_token, K, stage_two = SYSTEMS[name]
    language, public = save_language_model(language, tmp_path / "language")
    eyes = save_vision_tower(vision, tmp_path / "vision")
    data = publish(tmp_path / "dataset")
    preset, *more = name.split()
    towers = ["--preset", preset, *more, "--language_model", language, "--vision_tower",
              str(tmp_path / "vision")]
    # Each stage once through its data, of which not one sample may be unusable.
    once = ["--epochs", "1", "--max_skip_ratio", "0", "--max_length", "512", "--batch_size", "2",
            "--gradient_accumulation_steps", "1", "--dtype", "fp32", "--num_workers", "0"]
    compare(load_or_build(resolve(read_flags("", "sft", [*towers, *once]), "sft", {}), None).model,
            public, eyes)

    train_pretrain.main([*towers, *data.pretrain, *once, "--out", str(tmp_path / "pretrain")])
    trained = more if "--train_language" in more else []  # the others the checkpoint knows
    train_sft.main([*data.sft, *once, *trained, "--model", str(tmp_path / "pretrain"),
                    "--out", str(tmp_path / "sft")])
    for stage, samples in zip(("pretrain", "sft"), data.samples):
        steps, run = curve(tmp_path / stage), read_run(newest_checkpoint(tmp_path / stage))
        assert (run["data"]["samples"], len(steps)) == (samples, -(-samples // 2)), stage
        assert all(supervised > 0 for *_, supervised in steps), "every batch taught something"
        assert run["settings"]["preset"] == preset
    assert "skipped /" not in capsys.readouterr().out

    checkpoint = newest_checkpoint(tmp_path / "sft")
    config = read_config(checkpoint)
    assert (config["template"], config["image_token"], config["image_tokens"]) == (
        template, image_token, K)
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        names = [each for each in file.keys() if each.startswith("language.")]
    if stage_two == "lora":
        assert names and all(each.endswith((".lora_a", ".lora_b")) for each in names)
    else:
        layers = {each.split(".")[2] for each in names if each.startswith("language.layers.")}
        assert layers == set(stage_two)

    picture = tmp_path / "red.jpg"
    picture.write_bytes(jpeg("red"))
    script.main(["--model", str(checkpoint), "--image", str(picture), "--prompt",
                 "Which colour?", "--max_new_tokens", "3", "--device", "cpu"])
    assert capsys.readouterr().out.endswith("\n")


@torch.no_grad()
def compare(model, public, eyes) -> None:
    """Logits and features of what the preset loaded, against transformers'. The layouts that it
    does not read, Qwen-7B's and MiniMind's, have their own referees in test_layouts.py."""
    generator = torch.Generator().manual_seed(0)
    model.eval()
    if public is not None:
        ids = torch.randint(0, 250, (2, 9), generator=generator)
        ours = model.language.logits(model.language.decode(model.language.embed(ids)))
        assert_close(ours, public(ids).logits, 1e-4, "logits")
    pixels = torch.rand(2, 3, 16, 16, generator=generator)
    theirs = eyes(pixels)
    patches = theirs.last_hidden_state[:, int(model.vision.config.class_token):]
    expected = {"patches": patches, "pooled": patches.mean(1, keepdim=True),
                "class": theirs.pooler_output[:, None]}[model.vision.config.features]
    assert_close(model.vision(pixels), expected, 1e-4, "features")


def test_a_pth_is_copied_into_a_full_checkpoint_and_talks_alone(tmp_path, capsys):
    language, _ = save_language_model("MiniMind 2 older", tmp_path / "language")
    save_vision_tower("siglip alone", tmp_path / "vision")
    train_pretrain.main([
        "--preset", "minimind-v", "--language_model", language, "--vision_tower",
        str(tmp_path / "vision"),
        "--data", make_data(tmp_path, count=4), "--image_folder", str(tmp_path), "--steps", "1",
        "--batch_size", "4", "--dtype", "fp32", "--num_workers", "0", "--train_language", "none",
        "--full_checkpoint", "--out", str(tmp_path / "out")])
    capsys.readouterr()
    brief = ["--prompt", "Hello", "--max_new_tokens", "3", "--device", "cpu"]
    script.main(["--model", "none", "--language_model", language, "--template", "minimind2",
                 *brief])
    alone = capsys.readouterr().out
    (tmp_path / "language").rename(tmp_path / "gone")
    script.main(["--model", str(tmp_path / "out"), *brief])
    assert capsys.readouterr().out == alone, "its language model was not trained"
    with pytest.raises(SystemExit):
        script.read_flags(["--model", str(tmp_path / "out"), "--template", "qwen"])


def test_one_vector_of_a_picture_leaves_nothing_to_join(tmp_path):
    flags = [*make_world(tmp_path), "--vision_feature_select", "pooled", "--out",
             str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="--vision_feature_select pooled .*--pixel_shuffle 2"):
        train_pretrain.main([*flags, "--pixel_shuffle", "2"])
    train_pretrain.main([*flags, "--steps", "1"])
    with pytest.raises(SystemExit,
                       match="--vision_feature_select patches: .* was trained with pooled"):
        train_sft.main(["--model", str(tmp_path / "out"), "--vision_feature_select", "patches",
                        "--out", str(tmp_path / "sft")])
