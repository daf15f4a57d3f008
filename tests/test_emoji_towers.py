"""The two embedded towers are ordinary public directories, and can do what README says of them."""

from pathlib import Path

import torch

from dataset.chat import ChatTemplate, Message
from dataset.emoji import texts, world
from dataset.emoji.world import scene
from dataset.images import ImageProcessor
from dataset.tokenizer import Tokenizer
from evaluation.batched_generation import generate_batch
from extras.emoji.train_language import CLEAR, HAZE, Haze, exam, first_weights
from model.pretrained.load import load_language, load_vision

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
        ours = load_language(LANGUAGE)(torch.tensor([ids]))
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
        worst = difference(load_vision(VISION)(pixels),
                           public(pixels).last_hidden_state)
    assert worst < 2e-4, worst


def test_language_tower_answers_from_what_it_reads():
    """Test scenes told in words, one cell for each patch: what the projector relies on."""
    tokenizer = Tokenizer.from_directory(LANGUAGE)
    template = ChatTemplate(tokenizer, image_tokens=16)
    model = load_language(LANGUAGE)
    right = exam(model, template, CLEAR)
    assert right["en"] >= 0.95 and right["zh"] >= 0.95, right
    without_places = exam(model, template, Haze(place_words=0.0))
    assert min(without_places["en"], without_places["zh"]) >= 0.95, without_places
    untrained = exam(first_weights(model.config), template, CLEAR, samples=70)
    assert untrained["all"] < 0.05, "it can fail"


def test_language_tower_reads_through_haze():
    """What stage one needs: places told in every second map, and noise up to 2.5 times as strong
    as the words."""
    tokenizer = Tokenizer.from_directory(LANGUAGE)
    torch.manual_seed(0)
    right = exam(load_language(LANGUAGE), ChatTemplate(tokenizer, image_tokens=16), HAZE)
    assert right["all"] >= 0.92, right


def test_language_tower_chats_without_a_scene():
    tokenizer = Tokenizer.from_directory(LANGUAGE)
    template = ChatTemplate(tokenizer, image_tokens=16)
    model = load_language(LANGUAGE)
    for question, expected in (("Hello!", "Hello! How can I help you?"), ("谢谢。", "不客气。"),
                               ("What is 猫 in English?", "A cat.")):
        prompt = template.encode_prompt([Message("user", question)])
        answer, = generate_batch(model, [prompt], [None], 20, template.stop_ids)
        assert tokenizer.decode(answer) == expected


def test_names_are_single_tokens():
    tokenizer = Tokenizer.from_directory(LANGUAGE)
    for thing in texts.THINGS:
        for name, text in ((f" {thing.english}", f"Where is the {thing.english}?"),
                           (f" {thing.plural}", f"How many {thing.plural} are there?"),
                           (thing.chinese, f"{thing.chinese}在哪里？"),
                           (thing.chinese, f"图里有几{thing.measure}{thing.chinese}？"),
                           (thing.chinese, f"一只猫和一{thing.measure}{thing.chinese}。")):
            assert name in [tokenizer.decode([i]) for i in tokenizer.encode(text)], text
