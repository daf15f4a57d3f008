"""The two embedded towers are ordinary public directories, and can do what README says of them."""

import random
from pathlib import Path

import pytest
import torch

from dataset.chat import ChatTemplate, Message
from dataset.emoji import texts, world
from dataset.emoji.world import TEST_START, EmojiData, scene
from dataset.images import ImageProcessor
from dataset.tokenizer import Tokenizer
from model.generate import generate_batch
from model.language import LanguageModel
from model.vision import VisionTransformer
from tools.train_language import LESSONS, embed_told, told_as_map

EMOJI = Path(world.__file__).parent
LANGUAGE, VISION = EMOJI / "language", EMOJI / "vision"


def difference(a, b):
    return (a - b).abs().max().item()


def test_language_tower_is_what_transformers_loads():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    public, info = AutoModelForCausalLM.from_pretrained(
        LANGUAGE, dtype=torch.float32, output_loading_info=True)
    assert type(public).__name__ == "Qwen2ForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    tokenizer, theirs = Tokenizer.from_directory(LANGUAGE), AutoTokenizer.from_pretrained(LANGUAGE)
    text = "How many cats are there? 图里有几只猫？\nTwo.  🐈"
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False)
    assert theirs.convert_tokens_to_ids("<|im_end|>") == tokenizer.token_id("<|im_end|>")
    with torch.no_grad():
        ours = LanguageModel.from_pretrained(LANGUAGE)(torch.tensor([ids]))
        worst = difference(ours, public(torch.tensor([ids])).logits)
    assert worst < 2e-4, worst


def test_vision_tower_is_what_transformers_loads():
    from transformers import SiglipVisionModel

    public, info = SiglipVisionModel.from_pretrained(
        VISION, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    processor = ImageProcessor.from_directory(VISION)
    pixels = torch.stack([processor(world.picture(scene(number))) for number in range(4)])
    with torch.no_grad():
        worst = difference(VisionTransformer.from_pretrained(VISION)(pixels),
                           public(pixels).last_hidden_state)
    assert worst < 2e-4, worst


@pytest.mark.parametrize("language", ["en", "zh"])
def test_language_tower_answers_from_what_it_reads(language):
    """Test scenes told in words, one cell for each patch: the skill that the projector relies on.

    An answer is exact when every token of the truth is the likeliest one after those before it.
    """
    tokenizer = Tokenizer.from_directory(LANGUAGE)
    template = ChatTemplate(tokenizer, image_tokens=16)
    model = LanguageModel.from_pretrained(LANGUAGE)
    data, rng, right = EmojiData("test", 140), random.Random(0), []
    for index in range(language == "zh", len(data), 2):
        sample = data[index]
        number = int(sample.where.rpartition(" ")[2][:-1])
        assert number >= TEST_START
        ids, start = template.render(sample.messages)[0], len(template.prompt(sample.messages[:-1]))
        places = [t for t, i in enumerate(ids) if i == template.image_token_id]
        for t, word in zip(places, told_as_map(scene(number), LESSONS[5][0], rng)):
            ids[t], = tokenizer.encode(word)
        ids = torch.tensor([ids[:-1]])  # up to <|im_end|>, without the newline
        with torch.no_grad():
            embeds = embed_told(model, ids, torch.tensor([places]), tokenizer)
            logits = model.logits(model.decode(embeds)[0])  # (T,V)
        right.append(bool((logits[start - 1:-1].argmax(-1) == ids[0, start:]).all()))
    share = sum(right) / len(right)
    assert share >= 0.7, share  # dataset/emoji/README.md tells 81 % over both languages


def test_language_tower_chats_without_a_scene():
    tokenizer = Tokenizer.from_directory(LANGUAGE)
    template = ChatTemplate(tokenizer, image_tokens=16)
    model = LanguageModel.from_pretrained(LANGUAGE)
    for question, expected in (("Hello!", "Hello! How can I help you?"), ("谢谢。", "不客气。"),
                               ("What is 猫 in English?", "A cat.")):
        prompt = template.prompt([Message("user", question)])
        answer, = generate_batch(model, [prompt], [None], 20, template.stop_ids)
        assert tokenizer.decode(answer) == expected


def test_names_are_single_tokens():
    tokenizer = Tokenizer.from_directory(LANGUAGE)
    for thing in texts.THINGS:
        assert len(tokenizer.encode(" " + thing.english)) == 1
        assert len(tokenizer.encode(" " + thing.chinese)) == 1
