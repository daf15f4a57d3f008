"""Claims: what a conversation keeps of the last prompt changes no answer, whatever came between,
and saves the work on all that two prompts begin with, pictures included."""

import os

import pytest
import torch
from tiny import COLOURS, make_data, make_pair

from dataset.chat import ChatTemplate
from dataset.families import DEFAULT_SYSTEM
from dataset.images import ImageProcessor
from dataset.tokenizer import Tokenizer
from extras.fast.prefix_cache import PrefixCache
from model.config import ProjectorConfig, VLMConfig
from model.generate import KVCache
from model.pretrained.load import load_language, load_vision
from model.vlm import build_model
from training.inference import Conversation

FAMILIES = ("qwen2", "qwen3", "minimind")  # qwen3 takes the opening of an earlier answer away


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("past")
    make_data(directory)
    return directory, *make_pair(directory)


@pytest.fixture(params=FAMILIES)
def talk(request, world):
    """A conversation with a model of large random weights, which talks and reacts to all it is
    told; it counts the places it decodes in each prompt, and the pictures it looks at."""
    _, language, vision = world
    family, tokenizer = request.param, Tokenizer.from_directory(language)
    template = ChatTemplate(tokenizer, 4, DEFAULT_SYSTEM[family], family=family)
    words, eyes = load_language(language), load_vision(vision)
    model = build_model(VLMConfig(words.config, eyes.config, ProjectorConfig("mlp", 24, 32),
                                  template.image_token_id), words, eyes).eval()
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    talk = Conversation(model, template, ImageProcessor.from_directory(vision),
                        {"max_new_tokens": 10})
    talk.decoded, talk.looked, talk.prompts = [], [], []
    decode, look, prompt = words.decode, eyes.forward, template.encode_prompt
    template.encode_prompt = lambda messages: (
        talk.prompts.append(prompt(messages)) or talk.prompts[-1])

    def counted(embeds, *rest, **named):
        talk.decoded.append(embeds.shape[1])
        return decode(embeds, *rest, **named)

    words.decode = counted
    eyes.forward = lambda pixels: talk.looked.append(len(pixels)) or look(pixels)
    return talk


def say(talk, text) -> tuple[str, int, int]:
    """-> the answer, which must be that of a conversation without a past; the prompt's places
    that were decoded for it, and pictures looked at."""
    anew = Conversation(talk.model, talk.template, talk.processor, {"max_new_tokens": 10})
    anew.messages, anew.pixels, anew.waiting = (
        list(talk.messages), list(talk.pixels), list(talk.waiting))
    talk.decoded.clear(), talk.looked.clear()
    answer = "".join(talk.reply(text))
    told = answer, talk.decoded[0], sum(talk.looked)
    assert answer == "".join(anew.reply(text))
    talk.prompts.pop()
    return told


def test_turn_after_turn(world, talk):
    directory = world[0]
    talk.show(directory / "red.png")
    first, whole, looked = say(talk, "Which colour?")
    assert looked == 1 and first
    _, new, looked = say(talk, "Sure?")
    assert looked == 0, "the picture was seen already"
    shared = len(os.path.commonprefix(talk.prompts))  # of any two lists
    assert whole == len(talk.prompts[0]) and new <= len(talk.prompts[1]) - shared
    assert shared > 0.6 * whole, "qwen3 takes away the opening of the answer before, but no more"
    talk.show(directory / "blue.png")
    talk.show(directory / "green.png")
    _, _, looked = say(talk, "And <image> beside <image>?")
    assert looked == 2
    assert say(talk, "So?")[2] == 0


def test_after_a_reset_and_another_system_turn(world, talk):
    directory = world[0]
    talk.show(directory / "red.png")
    first, whole, _ = say(talk, "Which colour?")
    talk.reset()
    talk.show(directory / "red.png")
    again, new, looked = say(talk, "Which colour?")
    assert again == first and (new, looked) == (1, 0), "the same prompt: its last token alone"
    talk.reset()
    talk.show(directory / "blue.png")
    other, new, looked = say(talk, "Which colour?")
    assert other != first, "the picture must matter, or this test proves nothing"
    assert looked == 1 and new <= whole
    talk.reset("Be kind.")
    talk.show(directory / "blue.png")
    kind, _, looked = say(talk, "Which colour?")
    assert kind != other and looked == 1, "all that follows another system turn is new"
    talk.reset()
    assert say(talk, "Which colour?")[2] == 0


def test_the_picture_is_compared_and_not_only_its_place(world, talk):
    answers = set()
    for colour in COLOURS:
        talk.reset()
        talk.show(world[0] / f"{colour}.png")
        answer, _, looked = say(talk, "Which colour?")
        assert looked == 1
        answers.add(answer)
    assert len(answers) > 1


def test_after_an_answer_that_was_stopped_or_broke_off(world, talk):
    talk.show(world[0] / "red.png")
    stream = talk.reply("Which colour?")
    next(stream), next(stream)
    stream.close()
    assert say(talk, "Go on.")[2] == 0
    layer = talk.model.language.layers[1]
    steps, forward = [], layer.forward

    def interrupted(*given):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt  # in the middle of a step: its first layer has written
        return forward(*given)

    layer.forward = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(talk.reply("More?"))
    layer.forward = forward
    assert say(talk, "Go on.")[2] == 0
    with pytest.raises(ValueError, match="the prompt has"):
        list(talk.reply("word " * 300))
    assert say(talk, "And then?")[2] == 0


def test_what_two_prompts_share_by_hand():
    """9 is a picture's placeholder, each picture takes two."""
    one, two = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    both = torch.cat([one, two])
    past = PrefixCache()
    assert past.shared_prefix([1, 2, 3], None, 9) == (0, 0)
    past.cache = KVCache(1, 16)
    past.ids, past.pixels = [1, 9, 9, 2, 9, 9, 3, 4], both
    past.cache.length = 7  # the 4 was said, and not yet read
    assert past.shared_prefix([1, 9, 9, 2, 9, 9, 3, 4, 5], both, 9) == (7, 2)
    assert past.shared_prefix([1, 9, 9, 2, 9, 9, 3], both, 9) == (6, 2)  # never the last one
    assert past.shared_prefix([1, 9, 9, 2, 9, 9, 5, 3], both, 9) == (6, 2)
    assert past.shared_prefix([1, 9, 9, 5, 3], one, 9) == (3, 1)
    assert past.shared_prefix([1, 9, 9, 2, 9, 9, 3, 4], torch.cat([one, one]), 9) == (4, 1)
    assert past.shared_prefix([1, 9, 9, 2, 9, 9, 3, 4], torch.cat([two, two]), 9) == (1, 0)
    assert past.shared_prefix([1, 9, 9, 2, 9, 9], both, 9) == (4, 1)  # no part of a picture
    assert past.shared_prefix([1, 9, 9, 2], None, 9) == (1, 0)  # not the old picture: refused later
    assert past.shared_prefix([7, 9, 9, 2], one, 9) == (0, 0)
    assert past.shared_prefix([1, 2], None, None) == (1, 0)
