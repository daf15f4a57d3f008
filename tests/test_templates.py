"""Claim: each family's template gives the ids of the template that it was published with.

The expected texts stand here by hand, as the published templates write them; tokenizers made on
the spot cut them up. Where the real tokenizers and Jinja files are there, transformers renders.
"""

import json

import pytest
import tokenizers
from conftest import needed, shared_dir, weights_dir

from dataset.chat import ChatTemplate, Message
from dataset.families import CHAT_FAMILIES, DEFAULT_SYSTEM
from dataset.tokenizer import Tokenizer
from extras.convert.tiktoken import PIECES, SPECIAL_TOKENS, TEXT_TOKENS

K = 3
HELPFUL = "You are a helpful assistant."

# Qwen, Qwen2 and Qwen2.5 without tools: a block a turn, and a system turn in any case.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nSYSTEM<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# From MiniMind2's scripts/train_tokenizer.py (github.com/jingyaogong/minimind, Apache-2.0).
# It opens the answer in the user's turn, whether asked for or not.
MINIMIND2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}"
    "{{ '<|im_start|>system\\n' + system_message + '<|im_end|>\\n' }}{% else %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}"
    "{{ '<|im_start|>user\\n' + content + '<|im_end|>\\n<|im_start|>assistant\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ content + '<|im_end|>' + '\\n' }}"
    "{% endif %}{% endfor %}")
# The same with other tokens and another line.
EARLY_LINE = "你是 MiniMind，是一个有用的人工智能助手。"
MINIMIND2_EARLY = (MINIMIND2.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
                   .replace("You are a helpful assistant", EARLY_LINE))


def talk(*contents, system=None):
    turns = [Message("system", system)] if system else []
    return turns + [Message(role, content)
                    for role, content in zip(["user", "assistant"] * len(contents), contents)]


TALKS = [
    talk("What is it?", "A red cat."),
    talk("<image>\nWhat is it?", "有一只猫。"),
    talk("两张？\n<image>\n<image>", "Two 🍊 dogs", "And now?", "It's 3.14", "<image>\nHere", "是"),
    talk("图片里有什么？\n<image>", "def f(x):\n    return x", "Why?", " so ", system="Be brief."),
]


# ----------------------------------------------------------------------------- tiny tokenizers
def tiny_tokenizer(pieces, special: list[str], text_tokens: list[str]) -> Tokenizer:
    """Byte-level BPE with a few merges; special tokens first, as in MiniMind's file."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pieces
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(
        ["user\n assistant\n system\n You are a helpful assistant. What is it? 有一只猫。"] * 4,
        tokenizers.trainers.BpeTrainer(
            vocab_size=400, show_progress=False, special_tokens=special,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    backend.add_tokens([tokenizers.AddedToken(t, special=False, normalized=False)
                        for t in text_tokens])
    return Tokenizer(backend)


def byte_level(use_regex=True):
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


@pytest.fixture(scope="module")
def tiny():
    """{family: a tokenizer of its kind}"""
    qwens = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"), byte_level(False)])
    later = tiny_tokenizer(qwens, SPECIAL_TOKENS, TEXT_TOKENS)
    mini3 = tiny_tokenizer(byte_level(), SPECIAL_TOKENS, ["<think>", "</think>"])
    mini2 = tiny_tokenizer(byte_level(), SPECIAL_TOKENS[:3], [])
    first = tiny_tokenizer(qwens, [*SPECIAL_TOKENS[:3], "<|extra_0|>", "<|extra_1|>"], [])
    headers = tiny_tokenizer(qwens, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>",
                                     "<|start_header_id|>", "<|end_header_id|>"], [])
    sentences = tiny_tokenizer(byte_level(), ["<unk>", "<s>", "</s>"], [])
    return {"qwen3-2507": later, "llama3": headers, "llama3.1": headers, "zephyr": sentences,
            "vicuna": sentences, "qwen": first, "qwen2": later, "qwen2.5-instruct": later,
            "qwen3": later, "llama": mini2, "minimind": mini3, "minimind2": mini2,
            "minimind2-early": sentences}


def template_of(family, tokenizer, **settings) -> ChatTemplate:
    return ChatTemplate(tokenizer, K, DEFAULT_SYSTEM[family], family=family, **settings)


def cut_up(template, text: str) -> list[int]:
    """The published way: one text with everything in it, cut up as a whole."""
    backend = template.tokenizer.backend
    backend.encode_special_tokens = False  # here the text's special tokens are meant
    try:
        return backend.encode(text, add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = True


def as_published(template, ids: list[int]) -> list[int]:
    """Our ids with the placeholder that is no token, if it is none, as the published one."""
    if template.image_token_id < template.tokenizer.vocab_size:
        return ids
    token, = template.tokenizer.encode(template.image_token)
    return [token if i == template.image_token_id else i for i in ids]


def turns_of(template, messages) -> list[dict]:
    image = template.image_token * K
    if template.family in ("qwen2", "qwen2.5-instruct", "qwen3"):
        image = f"<|vision_start|>{image}<|vision_end|>"
    return [{"role": m.role, "content": m.content.replace("<image>", image)} for m in messages]


# ------------------------------------------------------------------- without the real files
IMAGE_QWEN2 = "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
BY_HAND = {  # of talk("<image>\nWho?", "A cat.", "Sure?", "Yes."), and what opens answer 3
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n<|extra_0|><|extra_0|><|extra_0|>\nWho?<|im_end|>\n"
            "<|im_start|>assistant\nA cat.<|im_end|>\n"
            "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
    "qwen2": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
             f"<|im_start|>user\n{IMAGE_QWEN2}\nWho?<|im_end|>\n"
             "<|im_start|>assistant\nA cat.<|im_end|>\n"
             "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
    "qwen2.5-instruct":
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        f"<|im_end|>\n<|im_start|>user\n{IMAGE_QWEN2}\nWho?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
    "qwen3": f"<|im_start|>user\n{IMAGE_QWEN2}\nWho?<|im_end|>\n"
             "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
             "<|im_start|>assistant\n<think>\n\n</think>\n\nYes.<|im_end|>\n",
    "minimind": "<|im_start|>user\n<|image_pad|><|image_pad|><|image_pad|>\nWho?<|im_end|>\n"
                "<|im_start|>assistant\n<think>\n\n</think>\n\nA cat.<|im_end|>\n"
                "<|im_start|>user\nSure?<|im_end|>\n"
                "<|im_start|>assistant\n<think>\n\n</think>\n\nYes.<|im_end|>\n",
    "minimind2": "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
                 "<|im_start|>user\n@@@\nWho?<|im_end|>\n"
                 "<|im_start|>assistant\nA cat.<|im_end|>\n"
                 "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
    "minimind2-early": f"<s>system\n{EARLY_LINE}</s>\n"
                       "<s>user\n@@@\nWho?</s>\n<s>assistant\nA cat.</s>\n"
                       "<s>user\nSure?</s>\n<s>assistant\nYes.</s>\n",
}


@pytest.mark.parametrize("family", BY_HAND)
def test_ids_are_those_of_the_text_written_by_hand(tiny, family):
    template = template_of(family, tiny[family])
    messages = talk("<image>\nWho?", "A cat.", "Sure?", "Yes.")
    ids, mask = template.encode_conversation(messages)
    assert as_published(template, ids) == cut_up(template, BY_HAND[family])
    prompt = BY_HAND[family][:BY_HAND[family].rindex("Yes.")]
    assert as_published(template, template.encode_prompt(messages[:-1])) == cut_up(template, prompt)
    # A system turn that is given takes the place of the family's own.
    start, end = ("<s>", "</s>") if family == "minimind2-early" else ("<|im_start|>", "<|im_end|>")
    turns = BY_HAND[family][BY_HAND[family].index(f"{start}user"):]
    ids, _ = template.encode_conversation([Message("system", "Be brief."), *messages])
    assert as_published(template, ids) == cut_up(
        template, f"{start}system\nBe brief.{end}\n{turns}")


@pytest.mark.parametrize("family,source", [
    ("qwen", CHATML.replace("SYSTEM", HELPFUL)), ("qwen2", CHATML.replace("SYSTEM", HELPFUL)),
    ("minimind2", MINIMIND2), ("minimind2-early", MINIMIND2_EARLY)])
@pytest.mark.parametrize("messages", TALKS)
def test_ids_equal_the_published_template(tiny, family, source, messages):
    import jinja2  # a test requirement: its absence is a failure
    template = template_of(family, tiny[family])
    text = jinja2.Template(source, keep_trailing_newline=True).render(
        messages=turns_of(template, messages))
    ids, _ = template.encode_conversation(messages)
    assert as_published(template, ids) == cut_up(template, text)


@pytest.mark.parametrize("family", CHAT_FAMILIES)
@pytest.mark.parametrize("messages", TALKS)
def test_every_supervised_answer_follows_the_prompt_that_asks_for_it(tiny, family, messages):
    template, facts = template_of(family, tiny[family]), CHAT_FAMILIES[family]

    def encoded(content):  # as the family writes an answer
        text = content.strip() if facts.strips else content
        return template.tokenizer.encode(facts.space + text.removeprefix(facts.space))

    learned = set()
    for number in range(len(messages)):
        lesson = template.training_prefix(messages, number)
        ids, mask = template.encode_conversation(lesson)
        starts = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
        places = [i for i, m in enumerate(lesson) if m.role == "assistant"]
        for start, place in zip(reversed(starts), reversed(places)):
            prompt = template.encode_prompt(lesson[:place])
            assert ids[:start] == prompt, f"answer at {place} follows something else"
            answer = encoded(lesson[place].content)
            assert ids[start:start + len(answer) + 1] == [*answer, template.end]
            learned.add(place)
        assert sum(mask) == sum(len(encoded(lesson[p].content)) + 1 for p in places[-len(starts):])
    assert learned == {i for i, m in enumerate(messages) if m.role == "assistant"}


def test_qwen3_learns_one_answer_of_a_row_the_others_all_of_them(tiny):
    messages = talk("a", "b", "c", "d", "e", "f")
    qwen3 = template_of("qwen3", tiny["qwen3"])
    assert [len(qwen3.training_prefix(messages, n)) for n in range(4)] == [2, 4, 6, 2]
    assert template_of("minimind", tiny["minimind"]).training_prefix(messages, 1) == messages
    ids, mask = template_of("qwen3", tiny["qwen3"]).encode_conversation(messages)
    assert tiny["qwen3"].decode([i for i, m in zip(ids, mask) if m]) == "f<|im_end|>"
    ids, mask = template_of("minimind", tiny["minimind"]).encode_conversation(messages)
    assert tiny["minimind"].decode([i for i, m in zip(ids, mask) if m]) == (
        "b<|im_end|>d<|im_end|>f<|im_end|>")
    with pytest.raises(ValueError, match="no assistant turn at its end"):
        template = template_of("qwen3", tiny["qwen3"])
        template.truncate(*template.encode_conversation(messages[:-1]), 100)


@pytest.mark.parametrize("family", ["minimind2", "minimind2-early", "minimind", "qwen"])
def test_typed_placeholders_never_become_an_image(tiny, family):
    template = template_of(family, tiny[family])
    typed = f"mail me@home, {template.image_token * K} {template.image_token * 196}"
    ids, mask = template.encode_conversation(talk(typed, typed, "<image>", typed, system=typed))
    assert ids.count(template.image_token_id) == K
    first = ids.index(template.image_token_id)
    assert ids[first:first + K] == [template.image_token_id] * K and not mask[first]
    assert tiny[family].decode(ids).count(typed) == 4  # and they are still there, as text
    # A row may be cut through typed signs, they are no image.
    ids, mask = template.encode_conversation(talk("<image>", typed))
    assert template.truncate(ids, mask, len(ids) - 5)[0] == ids[:-5]


def test_which_id_holds_an_image(tiny):
    for family, token in (("qwen", "<|extra_0|>"), ("qwen2", "<|image_pad|>"),
                          ("minimind", "<|image_pad|>")):
        assert template_of(family, tiny[family]).image_token_id == tiny[family].token_id(token)
    for settings in ({"image_token": "@"}, {"image_token": "<think>"}, {"image_token": "@" * 196}):
        template = template_of("minimind", tiny["minimind"], **settings)
        assert template.image_token_id == tiny["minimind"].vocab_size  # text may hold these
        assert template.image_ids == [template.image_token_id] * K
    template = template_of("qwen", tiny["qwen"], image_token="<|extra_1|>")
    assert template.image_ids == [tiny["qwen"].token_id("<|extra_1|>")] * K


def test_stop_ids_are_the_familys(tiny):
    def stops(family):
        template = template_of(family, tiny[family])
        return [template.tokenizer.decode([i]) for i in template.stop_ids]

    assert stops("qwen") == ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]
    assert stops("qwen3") == stops("minimind") == stops("llama") == ["<|im_end|>", "<|endoftext|>"]
    assert stops("minimind2-early") == ["</s>"]


def test_an_unknown_family_is_refused(tiny):
    with pytest.raises(ValueError, match="'qwen9'; expected one of qwen, qwen2"):
        ChatTemplate(tiny["qwen2"], K, family="qwen9")


# ---------------------------------------------------------------------- with the real files
@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """family -> (our tokenizer, transformers' own of the same files), each read once."""
    transformers = pytest.importorskip("transformers")
    read = {}

    def get(family):
        if family.startswith("minimind"):
            directory = needed(shared_dir(), "tokenizers/minimind")
        else:
            directory = needed(weights_dir(), "qwen")
        if directory not in read:
            config = tmp_path_factory.mktemp("public")
            (config / "tokenizer_config.json").write_text(
                json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
            (config / "tokenizer.json").symlink_to(directory / "tokenizer.json")
            read[directory] = (Tokenizer.from_directory(directory),
                               transformers.AutoTokenizer.from_pretrained(config))
        return read[directory]

    return get


@pytest.mark.parametrize("family,source", [
    ("qwen2", CHATML.replace("SYSTEM", HELPFUL)),
    ("qwen2.5-instruct",
     CHATML.replace("SYSTEM", "You are Qwen, created by Alibaba Cloud. " + HELPFUL)),
    ("qwen3", "templates/qwen3.jinja"), ("minimind", "templates/minimind3.jinja"),
    ("minimind2", MINIMIND2)])
def test_ids_equal_what_transformers_renders(real, family, source):
    ours, public = real(family)
    if source.endswith(".jinja"):
        source = needed(shared_dir(), source).read_text(encoding="utf-8")
    template = template_of(family, ours)
    for messages in TALKS:
        def published(messages, **settings):
            return public.apply_chat_template(
                turns_of(template, messages), chat_template=source, enable_thinking=False,
                return_dict=False, **settings)

        ids, _ = template.encode_conversation(messages)
        assert as_published(template, ids) == published(messages)
        for place in range(len(messages)):
            if messages[place].role == "assistant":
                prompt = template.encode_prompt(messages[:place])
                assert as_published(template, prompt) == published(
                    messages[:place], add_generation_prompt=True), (family, place)


def test_real_ids_of_minimind(real):
    template = template_of("minimind", real("minimind")[0])
    assert (template.start, template.end, template.image_token_id) == (1, 2, 12)
    assert template.stop_ids == [2, 0]
    template = template_of("minimind2", real("minimind")[0])
    assert template.image_token_id == 6400 == template.tokenizer.vocab_size
