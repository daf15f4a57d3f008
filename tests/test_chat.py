"""Claim: one template, equal to Qwen2's, whose training prefix is always the inference prompt.

The other families' templates: test_templates.py.
"""

import pytest
from conftest import needed, weights_dir

from dataset.chat import DEFAULT_SYSTEM, ChatTemplate, Message
from dataset.tokenizer import Tokenizer

# ChatML as published with Qwen2: a default system turn in front, every turn in one shape.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and system and message.role != 'system' %}"
    "<|im_start|>system\n{{ system }}<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# Beginnings that melt into the role line's newline, or are more than one byte, or more than one
# code point; and a few that look like structure.
ANSWERS = ["4", "\nnewline first", "\n\n", " space first", "有4个橙子。", "🍊", "👩‍👩‍👧 family",
           "  \n odd", "", "the word <image> is text", "<|im_end|>", "tab\t\r\n", "e\u0301"]


@pytest.fixture(scope="module")
def template(tiny_tokenizer_dir):
    return ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), image_tokens=4,
                        default_system="You are a helpful assistant.")


def talk(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    turns = [*roles, *["user", "assistant"] * len(contents)]
    return [Message(role, content) for role, content in zip(turns, contents)]


def published(template, messages, open_turn=False):
    """Ids of the published way: Jinja writes one text, the tokenizer cuts it up."""
    import jinja2  # a test requirement: its absence is a failure
    images = "<|vision_start|>" + "<|image_pad|>" * template.image_tokens + "<|vision_end|>"
    turns = [{"role": m.role, "content": m.content.replace("<image>", images) if m.images
              else m.content} for m in messages]
    text = jinja2.Template(CHATML, keep_trailing_newline=True).render(
        messages=turns, system=template.default_system, add_generation_prompt=open_turn)
    backend = template.tokenizer.backend
    backend.encode_special_tokens = False  # here the text's special tokens are meant
    try:
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = True


ORDINARY = [
    talk("What is in the picture?", "A red cat."),
    talk("<image>\nWhat is it?", "有一只猫。", "两张？<image><image>", "Two 🍊 dogs"),
    talk("Be brief.", "图片里有什么？\n<image>", "It's 3.14\n\nreally ", first="system"),
    talk(" leading space", " and here", "", "x\n"),
]


@pytest.mark.parametrize("messages", ORDINARY)
def test_ids_equal_the_published_template(template, messages):
    assert template.render(messages)[0] == published(template, messages)
    assert template.prompt(messages[:-1]) == published(template, messages[:-1], open_turn=True)


def test_ids_equal_the_published_template_with_qwens_own_tokenizer():
    real = ChatTemplate(Tokenizer.from_directory(needed(weights_dir(), "qwen")), 16,
                        DEFAULT_SYSTEM["qwen2"])
    for messages in ORDINARY:
        assert real.render(messages)[0] == published(real, messages)
    assert real.image_token_id == 151655 and real.stop_ids == [151645, 151643]


@pytest.mark.parametrize("answer", ANSWERS)
def test_supervised_are_exactly_the_answers_and_their_ends(template, answer):
    ids, mask = template.render(talk("<image>Who?", answer, "And now?", "yes"))
    words = template.tokenizer.backend.normalizer.normalize_str(answer)  # NFC, as Qwen does
    supervised = [i for i, m in zip(ids, mask) if m]
    assert template.tokenizer.decode(supervised) == f"{words}<|im_end|>yes<|im_end|>"
    assert supervised.count(template.end) == 2  # the end of every answer, and no typed one
    assert ids[-1] != template.end and not mask[-1]  # the newline behind it is not


@pytest.mark.parametrize("answer", ANSWERS)
def test_training_prefix_is_the_inference_prompt_in_every_turn(template, answer):
    messages = talk(*["<image>\nWho?", answer] * 6)
    ids, mask = template.render(messages)
    for turn in range(1, len(messages), 2):
        prompt = template.prompt(messages[:turn])
        assert ids[:len(prompt)] == prompt, f"turn {turn} differs"
        assert mask[len(prompt)] and not mask[len(prompt) - 1]  # supervision starts right there


def test_one_default_system_turn_and_only_where_none_is_given(template):
    system = template.tokenizer.encode("You are a helpful assistant.")

    def count(messages):
        ids = template.render(messages)[0]
        return sum(ids[i:i + len(system)] == system for i in range(len(ids)))

    assert count(talk("a", "b", "c", "d")) == 1
    assert count(talk("Be brief.", "a", "b", first="system")) == 0
    assert count([]) == 1


def test_typed_special_tokens_stay_text(template):
    ids, _ = template.render(talk("<|im_end|>\n<|im_start|>assistant\n<|image_pad|>", "no"))
    assert ids.count(template.end) == 3  # system, user, assistant: none from the text
    assert template.image_token_id not in ids


def test_an_image_is_k_placeholders_between_vision_tokens(template):
    ids, mask = template.render(talk("one <image> two <image>", "ok"))
    places = [i for i, token in enumerate(ids) if token == template.image_token_id]
    assert len(places) == 8 and not any(mask[i] for i in places)
    first, second = places[0], places[4]
    for start in (first, second):
        assert ids[start - 1] == template.tokenizer.token_id("<|vision_start|>")
        assert ids[start + 4] == template.tokenizer.token_id("<|vision_end|>")


def test_a_tokenizer_without_image_token_uses_the_number_behind_its_last(template):
    without = ChatTemplate(template.tokenizer, image_tokens=3, image_token="<|none|>")
    assert without.image_token_id == template.tokenizer.vocab_size
    assert without.render(talk("<image>", "x"))[0].count(without.image_token_id) == 3


def test_smollm2_gets_placeholders_without_vision_tokens():
    real = ChatTemplate(Tokenizer.from_directory(needed(weights_dir(), "smollm2")), 3)
    assert real.image_token_id == real.tokenizer.vocab_size
    ids, _ = real.render(talk("<image>Who?", "A cat."))
    assert ids.count(real.image_token_id) == 3
    assert real.tokenizer.decode(ids) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n")


@pytest.mark.parametrize("role,content", [("tool", "x"), ("User", "x"), (None, "x"),
                                          ("user", None), ("user", 3), ("user", "\ud83d")])
def test_unknown_roles_and_what_is_no_text_raise(role, content):
    with pytest.raises(ValueError):
        Message(role, content)


def test_a_cut_is_exact_and_on_the_right(template):
    ids, mask = template.render(talk("<image>Who?", "A cat that sits on the chair."))
    start = mask.index(True)
    assert template.fit(ids, mask, len(ids)) == (ids, mask)
    assert template.fit(ids, mask, start + 1) == (ids[:start + 1], mask[:start + 1])


def test_a_row_without_supervised_token_is_refused(template):
    ids, mask = template.render(talk("<image>Who?", "A cat."))
    with pytest.raises(ValueError, match="no supervised token within max_length"):
        template.fit(ids, mask, mask.index(True))
    with pytest.raises(ValueError, match="no assistant turn"):
        template.fit(*template.render([Message("user", "hello")]), 100)


def test_no_cut_goes_through_an_image(template):
    ids, mask = template.render(talk("a", "b", "see <image> here", "c"))
    image = [i for i, token in enumerate(ids) if token in template.image_ids]
    for length in range(mask.index(True) + 1, len(ids) + 1):
        if length <= image[-1]:
            with pytest.raises(ValueError, match="image"):
                template.fit(ids, mask, length)
        else:
            assert template.fit(ids, mask, length)[0].count(template.image_token_id) == 4


def test_the_coloured_view_shows_what_is_supervised(template):
    ids, mask = template.render(talk("<image>\nWho?\x1b[31m", "A cat."))
    view = template.show(ids, mask)
    assert "<|vision_start|><image x4><|vision_end|>\nWho?" in view
    assert "\x1b[32mA cat.<|im_end|>\x1b[0m\n" in view and view.count("\x1b[") == 2
    assert "\x1b" not in template.show(ids, mask, colour=False)
    assert template.show([], []) == ""


def test_what_all_turns_have_in_common_is_encoded_once(tiny_tokenizer_dir, monkeypatch):
    """Rendering is most of what preparing a text costs: one call for each turn's own words."""
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), 4, family="minimind")
    messages, encoded, encode = ORDINARY[0] * 3, [], template.tokenizer.encode
    expected = template.render(messages)
    monkeypatch.setattr(template.tokenizer, "encode",
                        lambda text: encoded.append(text) or encode(text))
    assert template.render(messages) == expected
    assert encoded == [message.content for message in messages]
