"""Claims: transformers opens what extras/export writes as a LLaVA of its own, without a missing or
an unknown tensor, reads the same ids and pixels from the same conversation, and answers the
same."""

import json

import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open

import extras.export.__main__ as export
import train_pretrain
import train_sft
from dataset.chat import Message
from dataset.images import load_image
from model.generate import generate
from model.lora import merge_lora
from model.pretrained.checkpoint import find_model
from tests.families import assert_close, public_language, public_vision
from tests.tiny import COLOURS, make_data

# language, vision, pixels a side of a picture, flags
MODELS = {
    "qwen2-siglip": ("Qwen2", "Siglip", 48, ["--lora"]),
    "qwen2-siglip-early": ("Qwen2", "Siglip", 64, ["--lora", "--vision_feature_layer", "-3"]),
    "qwen3-clip-linear": ("Qwen3", "CLIP", 48, ["--lora", "--projector", "linear"]),
    "llama-dinov2": ("Llama", "Dinov2", 32,
                     ["--train_language", "all", "--vision_feature_layer", "-2",
                                             "--train_vision"]),
    "qwen2-dinov2-minimind": ("Qwen2", "Dinov2", 48, ["--lora", "--template", "minimind"]),
}


def save_towers(language: str, vision: str, size: int, tokenizer_dir, directory) -> list[str]:
    """Towers as published, pictures of size x size -> the flags that name them."""
    words, eyes = directory / "language", directory / "vision"
    words.mkdir(parents=True)
    tokenizer = json.loads((tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    if language == "Llama":  # has never heard of pictures, and a table without a free row
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"]
                                     if "vision" not in token["content"]
                                     and "pad" not in token["content"]]
        for name in ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                     "<|video_pad|>"):
            tokenizer["model"]["vocab"].pop(name, None)
    (words / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    number = max(tokenizer["model"]["vocab"].values()) + 1
    public_language(language, vocab_size=number, head_dim=6,
                    tie_word_embeddings=language == "Qwen2").save_pretrained(words)
    public_vision(vision).save_pretrained(eyes)
    processor = {"Siglip": "Siglip", "CLIP": "CLIP", "Dinov2": "Bit"}[vision] + "ImageProcessor"
    (eyes / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": processor, "resample": 3, "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size}, "do_center_crop": False,
        "image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return ["--language_model", str(words), "--vision_tower", str(eyes)]


def trained(directory, tokenizer_dir, language, vision, size, flags) -> str:
    """Two steps of stage two -> the run."""
    train_sft.main([
        *save_towers(language, vision, size, tokenizer_dir, directory), "--model", "none",
        "--preset", "qwen2.5-siglip", "--data", make_data(directory, count=6), "--image_folder",
        str(directory), "--steps", "2", "--batch_size", "2", "--dtype", "fp32", "--num_workers",
        "0",
        "--learning_rate", "0.05", "--max_length", "256", *flags, "--out", str(directory / "sft")])
    return str(directory / "sft")


def opened(run):
    """Our own side: model, template, image processor, as eval.py has them."""
    model, template, processor = export.load(export.read_flags([]), find_model(run))
    merge_lora(model.language)
    return model, template, processor


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory, tiny_tokenizer_dir):
    """The same model twice: as we open it, and as transformers opens the export."""
    directory = tmp_path_factory.mktemp(request.param)
    run = trained(directory, tiny_tokenizer_dir, *MODELS[request.param])
    out = directory / "exported"
    export.main(["--model", run, "--out", str(out), "--dtype", "fp32"])
    public, told = transformers.LlavaForConditionalGeneration.from_pretrained(
        out, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return (*opened(run), public.eval(), transformers.AutoProcessor.from_pretrained(out),
            directory)


# Contents that a tokenizer would melt into what stands before or behind them.
CONVERSATIONS = {
    "none": [("user", "Hello, what is this?")],
    "one": [("user", "<image>\nWhich colour?")],
    "several": [("user", "<image>\n<image>\nWhich two?"), ("assistant", "Red and blue."),
                ("user", "And  <image>  this?\n")],
    "system": [("system", "Be brief."), ("user", "图片里有什么？<image>"),
               ("assistant", " Ça va 🙂 "), ("user", "why")],
    "newlines": [("user", "\n\nfirst"), ("assistant", "\nsecond"), ("user", "\n third\n\n"),
                 ("assistant", "<image> is a word"), ("user", " ")],
}


def ours_and_theirs(pair, name):
    """-> ids and pixels, from our code and from transformers' processor."""
    _, template, processor, _, public, directory = pair
    messages = [Message(*turn) for turn in CONVERSATIONS[name]]
    pictures = [load_image(directory / f"{colour}.png") for colour in COLOURS]
    pictures = pictures[:sum(message.images for message in messages)]
    pixels = torch.stack([processor(each) for each in pictures]) if pictures else None
    text = public.apply_chat_template([{"role": m.role, "content": m.content} for m in messages],
                                      add_generation_prompt=True)
    return (template.encode_prompt(messages), pixels,
            public(text=text, images=pictures or None, return_tensors="pt"))


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_processor_reads_the_same_ids_and_pixels(pair, name):
    ids, pixels, theirs = ours_and_theirs(pair, name)
    assert theirs["input_ids"][0].tolist() == ids
    if pixels is None:
        assert "pixel_values" not in theirs
    else:
        assert_close(pixels, theirs["pixel_values"], 1e-6, "pixels")


def test_a_whole_conversation_reads_as_in_training(pair):
    _, template, _, _, public, _ = pair
    for turns in CONVERSATIONS.values():
        turns = [*turns, ("assistant", "\nYes.")]
        text = public.apply_chat_template([{"role": r, "content": c} for r, c in turns])
        ids, _ = template.encode_conversation([Message(*turn) for turn in turns])
        holder = [public.tokenizer.convert_tokens_to_ids(public.image_token)]
        once = [i for place, i in enumerate(ids)  # the processor multiplies the placeholder
                if [i] != holder or ids[place - 1] != i]
        assert public.tokenizer(text)["input_ids"] == once


def test_parts_of_a_turn_read_as_the_chat_would_write_them(pair):
    _, template, _, _, public, _ = pair
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    text = public.apply_chat_template([turn], add_generation_prompt=True)
    assert text == public.apply_chat_template([{"role": "user", "content": "<image>\nWhat?"}],
                                              add_generation_prompt=True)


@torch.no_grad()
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_logits_are_the_same(pair, name):
    model, public = pair[0], pair[3]
    ids, pixels, theirs = ours_and_theirs(pair, name)
    ours = model.language.logits(model.language.decode(model.embed(torch.tensor([ids]), pixels)))
    logits = public(**theirs).logits
    assert_close(ours, logits[..., :ours.shape[-1]], 1e-4, f"{name}: logits")
    assert (logits[..., ours.shape[-1]:] < logits.max(-1, keepdim=True).values).all(), (
        "the placeholder's row never wins")


@torch.no_grad()
def test_64_greedy_tokens_are_the_same(pair):
    model, public = pair[0], pair[3]
    all_of_them = model.config.vision.model_type == "siglip_vision_model"
    for name in ("none", "one", "several") if all_of_them else ("several",):
        ids, pixels, theirs = ours_and_theirs(pair, name)
        answer = public.generate(**theirs, max_new_tokens=64, min_new_tokens=64, eos_token_id=[])
        ours = list(generate(model, ids, pixels, max_new_tokens=64))
        assert answer[0, len(ids):].tolist() == ours and len(ours) == 64, name


def test_the_directory_says_what_vllm_reads(pair):
    """vLLM cannot be installed everywhere. These are the fields that its LLaVA reads of config.json
    (vllm/model_executor/models/llava.py), and the modules that its loader finds weights by."""
    model, _, processor, _, public, directory = pair
    config = json.loads((directory / "exported" / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert text["architectures"][0] in ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")
    assert vision["model_type"] in ("siglip_vision_model", "clip_vision_model", "dinov2"), (
        "docs/serving.md says that vLLM has no DINOv2")
    assert config["projector_hidden_act"] in ("gelu", "linear"), "likewise of linear"
    assert config["multimodal_projector_bias"] is True
    # It builds the tower up to this layer, without the last norm; "default" drops a first token.
    assert config["vision_feature_layer"] == -1
    assert config["vision_feature_select_strategy"] == (
        "default" if model.config.vision.class_token else "full")
    assert (vision["image_size"], vision["image_size"]) == processor.size  # it checks the pixels
    assert config["image_token_index"] == public.tokenizer.convert_tokens_to_ids(
        public.image_token) < text["vocab_size"]
    with safe_open(directory / "exported" / "model.safetensors", framework="pt") as file:
        modules = {".".join(name.split(".")[:2]) for name in file.keys()}
    eyes = {"vision_tower.embeddings", "vision_tower.encoder", "vision_tower.layernorm"} if (
        vision["model_type"] == "dinov2") else {"vision_tower.vision_model"}
    head = set() if text["tie_word_embeddings"] else {"language_model.lm_head"}
    assert modules == {"language_model.model", *head, *eyes, "multi_modal_projector.linear_1",
                       "multi_modal_projector.linear_2"}


def test_the_answer_ends_where_ours_ends(pair):
    assert pair[3].generation_config.eos_token_id == pair[1].stop_ids


def test_the_demos_own_towers_go_over(tmp_path):
    train_pretrain.main(["--steps", "1", "--batch_size", "2", "--dtype", "fp32", "--num_workers",
                         "0",
                         "--out", str(tmp_path / "run")])
    export.main(["--model", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}
    public = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.float32)
    model, template, processor = opened(tmp_path / "run")
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    turn = {"role": "user", "content": "<image>\n右下角是什么？"}
    text = theirs.apply_chat_template([turn], add_generation_prompt=True)
    picture = Image.new("RGB", (96, 96), "red")
    asked = theirs(text=text, images=picture, return_tensors="pt")
    ids = template.encode_prompt([Message("user", turn["content"])])
    assert asked["input_ids"][0].tolist() == ids
    model.projector.to(torch.bfloat16).float()  # all else was published in bf16
    with torch.no_grad():
        ours = model.language.logits(model.language.decode(
            model.embed(torch.tensor([ids]), processor(picture)[None])))
        assert_close(ours, public(**asked).logits, 1e-3, "logits")


@pytest.mark.parametrize("flags, reason", [
    (["--pixel_shuffle", "3"], "--pixel_shuffle 3: LLaVA's projector takes one patch"),
    (["--projector", "norm_mlp"], "--projector norm_mlp: LLaVA's projector .*no norm"),
    (["--vision_feature_select", "class"],
     "--vision_feature_select class: LLaVA takes all patches"),
    (["--vision_feature_select", "pooled"],
     "--vision_feature_select pooled: LLaVA takes all patches")])
def test_what_llava_cannot_say_is_refused_with_the_reason(tmp_path, tiny_tokenizer_dir, flags,
                                                          reason):
    run = trained(tmp_path, tiny_tokenizer_dir, "Qwen2", "CLIP", 48, ["--lora", *flags])
    with pytest.raises(SystemExit, match=reason):
        export.main(["--model", run, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
