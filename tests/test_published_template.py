"""Claim: a model is trained and asked in the template that was published beside its tokenizer; what
it is trained on, what the chat asks and what an export writes are the same ids.

The templates stand here in the form of the published ones, shortened; transformers renders them.
"""

import json
import warnings
from types import SimpleNamespace

import pytest
import tokenizers
import transformers
from families import LANGUAGE, public_language

import dataset.readers.published_template as published
from dataset.chat import ChatTemplate, Message
from dataset.families import CHAT_FAMILIES, DEFAULT_SYSTEM
from dataset.readers.formats import open_data
from dataset.readers.published_template import chat_facts, published_template
from dataset.tokenizer import Tokenizer
from extras.check_data import make_template
from extras.convert.tiktoken import PIECES, SPECIAL_TOKENS
from extras.export.chat_template import EXPORTABLE, PublicTemplate
from training.bundle import make_inputs
from training.inference import load_model

SMOL = ("{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + "
        "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\\n' }}{% endif %}")
QWEN25 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == "system" and loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501
QWEN3 = """\
{%- set ns = namespace(last_query_index=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set ns.last_query_index = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role != "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""  # noqa: E501
# As minimind-3's: each answer is opened, whichever it is.
MINIMIND3 = QWEN3.replace("enable_thinking is defined and enable_thinking is false",
                          "open_thinking is not defined or open_thinking is not true").replace(
    "loop.index0 > ns.last_query_index and (loop.last or reasoning_content)", "true")
QWEN3_2507 = ("{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + "
              "message.content + '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}"
              "{{- '<|im_start|>assistant\\n' }}{%- endif %}")
THINKING_2507 = QWEN3_2507.replace("assistant\\n'", "assistant\\n<think>\\n'")
LLAMA3 = ("{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
          "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | "
          "trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
          "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
LLAMA32 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined and false %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""  # noqa: E501
TINYLLAMA = ("{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
             "message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ "
             "'<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == "
             "'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif "
             "%}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}"
             "\n{% endfor %}")
VICUNA = ("{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}"
          "{% set messages = messages[1:] %}{% else %}A chat between a curious user and an "
          "artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
          "answers to the user's questions.{% endif %}{{ ' ' }}{% for message in messages %}"
          "{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}{% else %}"
          "{{ 'ASSISTANT: ' + message.content + eos_token }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")
OWN = ("{% set mine = 'I\\'m ' + name | default('Ada') %}{% for m in messages %}{% if loop.first "
       "and m.role != 'system' %}{{ '<|im_start|>system\\n' + mine + '<|im_end|>\\n' }}{% endif %}"
       "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
       "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
# text, model_type -> family, default system turn
CASES = {
    "smollm2": (SMOL, "llama", "llama",
                "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "qwen2.5": (QWEN25, "qwen2", "qwen2", DEFAULT_SYSTEM["qwen2.5-instruct"]),
    "qwen3": (QWEN3, "qwen3", "qwen3", None),
    "minimind-3": (MINIMIND3, "qwen3", "minimind", None),
    "qwen3-2507": (QWEN3_2507, "qwen3", "qwen3-2507", None),
    "qwen2 without a system turn": (QWEN3_2507, "qwen2", "qwen2", None),
    "llama3": (LLAMA3, "llama", "llama3", None),
    "llama3.2": (LLAMA32, "llama", "llama3.1", None),
    "tinyllama": (TINYLLAMA, "llama", "zephyr", None),
    "vicuna": (VICUNA, "llama", "vicuna", DEFAULT_SYSTEM["vicuna"]),
    "its own": (OWN, "qwen2", "qwen2", "I'm Ada"),
}
ASK = ["What is it?", "A red cat.", "你好？", "It's 3.14"]
ROLES = ["user", "assistant"] * 2
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                 "<|eot_id|>"]


def byte_level(special: list[str], thoughts=("<think>", "</think>")) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(
        ["user\n\nassistant\n\nsystem\n\n What is it? A red cat. USER: ASSISTANT: 你好"] * 4,
        tokenizers.trainers.BpeTrainer(
            vocab_size=400, show_progress=False, special_tokens=special,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    backend.add_tokens([tokenizers.AddedToken(t, special=False, normalized=False)
                        for t in thoughts])
    return backend


def sentencepiece(legacy=True) -> tokenizers.Tokenizer:
    """As Llama 2's and TinyLlama's tokenizer.json: a space in front of the text and behind each
    token, bytes for the unknown. Not legacy: a space in front of the whole alone."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    # No token of theirs reaches across the border of two words.
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    backend.train_from_iterator(
        ["What is it?", "A red cat. USER: ASSISTANT:", "user assistant system", "It's 3.14 < | >"],
        tokenizers.trainers.BpeTrainer(vocab_size=110, show_progress=False,
                                       special_tokens=["<unk>", "<s>", "</s>"]))
    file = json.loads(backend.to_str())
    size, file["pre_tokenizer"] = len(file["model"]["vocab"]), None
    file["model"]["vocab"] |= {f"<0x{byte:02X}>": size + byte for byte in range(256)}
    file["model"] |= {"byte_fallback": True, "unk_token": "<unk>"}
    backend = tokenizers.Tokenizer.from_str(json.dumps(file))
    if not legacy:
        backend.normalizer = None
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", "first", split=False)
    backend.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)])
    return backend


def backend_of(family: str) -> tokenizers.Tokenizer:
    if family.startswith("llama3"):
        return byte_level(LLAMA3_TOKENS, ())
    return sentencepiece() if family in ("zephyr", "vicuna") else byte_level(SPECIAL_TOKENS)


def marks_of(family: str) -> dict:
    facts = CHAT_FAMILIES[family]
    return {"bos_token": facts.begin or None, "eos_token": facts.end}


def save(directory, family, text, form="jinja"):
    """A directory as published: the template in one of its three forms."""
    directory.mkdir(exist_ok=True)
    backend_of(family).save(str(directory / "tokenizer.json"))
    config = marks_of(family)
    if form == "jinja":
        (directory / "chat_template.jinja").write_text(text)
    elif form == "config":
        config["chat_template"] = text
    elif form == "named":
        config["chat_template"] = [{"name": "tool_use", "template": "other"},
                                   {"name": "default", "template": text}]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def turns(*contents, system=None):
    start = [("system", system)] if system is not None else []
    return [{"role": role, "content": content}
            for role, content in [*start, *zip(ROLES, contents)]]


def messages_of(turns):
    return [Message(**turn) for turn in turns]


TALKS = [turns(ASK[0]), turns(*ASK[:3]), turns(ASK[0], system="Be brief.")]


@pytest.mark.parametrize("form", ["jinja", "config", "named"])
@pytest.mark.parametrize("name", CASES)
def test_the_published_template_decides_and_not_model_type(tmp_path, name, form):
    text, model_type, family, system = CASES[name]
    directory = save(tmp_path / "m", family, text, form)
    tokenizer = Tokenizer.from_directory(directory)
    assert chat_facts(tokenizer, model_type) == (family, system)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing differs
        template = ChatTemplate(tokenizer, 2, system, family=family)
    public = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend_of(family), chat_template=text, **marks_of(family))
    for talk in TALKS:
        told = public.apply_chat_template(talk, add_generation_prompt=True, enable_thinking=False,
                                          return_dict=False)
        assert template.encode_prompt(messages_of(talk)) == told
        if talk[-1]["content"] == ASK[2]:
            told = public.apply_chat_template([*talk, turns(*ASK)[-1]], return_dict=False)
            ids, mask = template.encode_conversation(messages_of(turns(*ASK)))
            assert ids == told and mask[-1] == (ids[-1] == template.end)


@pytest.mark.parametrize("name", [name for name in CASES if name != "its own"])
def test_facts_are_read_from_its_text_where_it_cannot_be_run(tmp_path, monkeypatch, name):
    text, model_type, family, system = CASES[name]
    monkeypatch.setattr(published, "rendered", lambda *_: None)
    tokenizer = Tokenizer.from_directory(save(tmp_path / "m", family, text))
    assert chat_facts(tokenizer, model_type) == (family, system)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ChatTemplate(tokenizer, 2, system, family=family)
    if name != "llama3.2":  # whose system turn no one may leave out
        with pytest.warns(UserWarning, match="not what the model was published with"):
            ChatTemplate(tokenizer, 2, "Another line.", family=family)


@pytest.mark.parametrize("ours, theirs", [
    ("llama", "smollm2"), ("qwen2", "qwen2.5"), ("qwen3", "qwen3-2507"), ("qwen3-2507", "qwen3"),
    ("qwen2", "qwen2 without a system turn"), ("llama", "its own"), ("llama3", "llama3.2"),
    ("vicuna", "tinyllama")])
def test_another_template_is_warned_of_with_both_texts(tmp_path, ours, theirs):
    text, model_type, family, system = CASES[theirs]
    tokenizer = Tokenizer.from_directory(save(tmp_path / "m", family, text))
    with pytest.warns(UserWarning, match=f"--template {ours} is not what") as told:
        template = ChatTemplate(tokenizer, 2, DEFAULT_SYSTEM[ours], family=ours)
    message = str(told[0].message)
    prompt = tokenizer.decode(template.encode_prompt([Message("user", "Who?")]))
    assert repr(prompt) in message and "The chat_template beside its tokenizer" in message


def test_a_template_of_no_known_family_is_refused_with_its_text(tmp_path):
    mistral = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    for text, shown in ((mistral, "[INST] Who? [/INST]"), (THINKING_2507, "<think>")):
        tokenizer = Tokenizer.from_directory(save(tmp_path / "m", "qwen3", text))
        with pytest.raises(ValueError, match="no family that is known") as told:
            chat_facts(tokenizer, "qwen3")
        assert shown in str(told.value) and "--template qwen, qwen2" in str(told.value)


def test_base_models_have_no_template(tmp_path):
    plain = byte_level(["<|endoftext|>"], ())
    for backend, expected in ((byte_level(SPECIAL_TOKENS), "llama"),
                              (byte_level(LLAMA3_TOKENS), "llama3")):
        assert chat_facts(Tokenizer(backend), "llama") == (expected, None)
    with pytest.raises(ValueError, match="a llama without a chat template .*--template"):
        chat_facts(Tokenizer(plain), "llama")
    with pytest.raises(ValueError, match="--template zephyr, vicuna"):
        chat_facts(Tokenizer(sentencepiece()), "llama")


@pytest.mark.parametrize("companions, expected", [
    ({}, None), ({"tokenizer_config.json": b"{}"}, None), ({"tokenizer_config.json": b"[]"}, None),
    ({"tokenizer_config.json": b'{"chat_template": " "}'}, None),
    ({"tokenizer_config.json": b'{"chat_template": [{"name": "rag", "template": "x"}]}'}, None),
    ({"tokenizer_config.json": b'{"chat_template": "a"}', "chat_template.jinja": b"b"}, "b")])
def test_where_the_template_stands(companions, expected):
    assert published_template(companions) == expected
    with pytest.raises(ValueError, match="tokenizer_config.json beside the tokenizer is not JSON"):
        published_template({"tokenizer_config.json": b"{"})


def test_a_hostile_template_reaches_nothing(tmp_path):
    for text in ("{{ ''.__class__.__mro__[1].__subclasses__() }}<|im_start|><|im_end|>",
                 "{% for m in messages %}{{ m.clear() }}{% endfor %}<|im_start|><|im_end|>",
                 "{{ 1 / 0 }}<|im_start|><|im_end|>", "{% broken <|im_start|><|im_end|>"):
        tokenizer = Tokenizer.from_directory(save(tmp_path / "m", "qwen2", text))
        assert published.rendered(tokenizer, text, published.ASKED) is None
        assert chat_facts(tokenizer, "qwen2") == ("qwen2", None)


def test_check_data_takes_it(tmp_path):
    directory = save(tmp_path / "m", "qwen2", SMOL)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **LANGUAGE}))
    template = make_template(str(directory), None, 4)
    assert (template.family, template.default_system) == ("llama", CASES["smollm2"][3])


def test_training_and_the_chat_take_it(tmp_path):
    words = save(tmp_path / "m", "qwen2", SMOL)
    size = Tokenizer.from_directory(words).vocab_size
    public_language("Llama", vocab_size=size, head_dim=6).save_pretrained(words)
    (words / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    settings = SimpleNamespace(template=None, system=None, image_token=None, pixel_shuffle=1,
                               approximate_resize=None, vision_feature_select="patches")
    towers = (SimpleNamespace(model_type="llama", vocab_size=size + 1, context_limit=None,
                              max_position_embeddings=8192), SimpleNamespace(patch_size=16))
    template, _ = make_inputs(settings, *towers, words, words)
    assert (template.family, template.default_system) == CASES["smollm2"][2:]
    settings.system = ""  # what the user says wins, with a warning
    with pytest.warns(UserWarning, match="leave out --template and --system"):
        template, _ = make_inputs(settings, *towers, words, words)
    assert template.default_system is None
    flags = SimpleNamespace(device="cpu", dtype="fp32", quantize=None, template=None, system=None,
                            language_model=str(words))
    _, template, _ = load_model(flags, "none")
    assert (template.family, template.default_system) == CASES["smollm2"][2:]


# ------------------------------------------------------------------------------- thoughts
THOUGHT, EMPTY = "<think>\nIt looks red.\n</think>\n\nRed.", "<think>\n\n</think>\n\nRed."
ANSWERS = ["Red.", THOUGHT, EMPTY, "<think>It looks red.</think>Red.",
           "\n<think>\n\n\nlong\n\nthought\n\n</think>\nRed.", "no start</think>Red."]


@pytest.mark.parametrize("family, text", [("qwen3", QWEN3), ("minimind", MINIMIND3)])
@pytest.mark.parametrize("answer", ANSWERS)
def test_thoughts_are_those_of_the_published_template(family, text, answer):
    template = ChatTemplate(Tokenizer(backend_of(family)), 2, family=family)
    public = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend_of(family), chat_template=text, **marks_of(family))
    talk = turns("Which?", answer, "Sure?", answer)
    for part in (talk, talk[:2], turns("Which?", answer, "Sure?", "Yes.")):
        ids, mask = template.encode_conversation(messages_of(part))
        assert ids == public.apply_chat_template(part, return_dict=False)
        learned = template.tokenizer.decode([i for i, on in zip(ids, mask) if on])
        assert learned.count("<think>") <= (1 if family == "qwen3" else 2)
        assert template.encode_prompt(messages_of(part[:-1])) == public.apply_chat_template(
            part[:-1], add_generation_prompt=True, enable_thinking=False, return_dict=False)
        # What is learned begins where the chat's prompt ends, or, with a thought, where it opens.
        prompt = template.encode_prompt(messages_of(part[:-1]))
        start = len(prompt) - len(template.opening)
        assert ids[:start] == prompt[:start] and (mask[start] or mask[len(prompt)])


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3-2507"])
def test_elsewhere_a_thought_is_text(family):
    template = ChatTemplate(Tokenizer(backend_of(family)), 2, family=family)
    ids, mask = template.encode_conversation(messages_of(turns("Which?", THOUGHT)))
    learned = [i for i, on in zip(ids, mask) if on]
    assert template.tokenizer.decode(learned) == f"{THOUGHT}<|im_end|>"


# ------------------------------------------------------------------------------- one law
PART, NAMED = {"type": "image"}, {"type": "image", "image": "a.png"}
URL = {"type": "image_url", "image_url": {"url": "a.png"}}


def words(text):
    return {"type": "text", "text": text}


# records, and what the chat would be given for the same question
LAYOUTS = {
    "llava": ({"image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "Red."}]},
        "<image>\nWhich?"),
    "no marker": ({"image": "a.png", "conversations": [
        {"from": "human", "value": "Which?"}, {"from": "gpt", "value": "Red."}]},
        "<image>\nWhich?"),
    "marker behind": ({"image": "a.png", "conversations": [
        {"from": "human", "value": "Which?\n<image>"}, {"from": "gpt", "value": "Red."}]},
        "Which?\n<image>"),
    "parts": ([PART, words("Which?")], "<image>\nWhich?"),
    "a named part": ([NAMED, words("Which?")], "<image>\nWhich?"),
    "a part of OpenAI's": ([URL, words("Which?")], "<image>\nWhich?"),
    "text first": ([words("Which?"), NAMED], "Which?\n<image>"),
    "own line breaks": ([NAMED, words("\nWhich?\n"), NAMED], "<image>\nWhich?\n<image>"),
    "two": ([NAMED, NAMED, words("Which?")], "<image>\n<image>\nWhich?"),
    "between": ([words("This "), NAMED, words(" or"), words(" that?")],
                "This \n<image>\n or that?"),
    "an empty text": ([words(""), NAMED, words(""), words("Which?")], "<image>\nWhich?"),
    "prompt": ({"images": ["a.png"], "prompt": [{"role": "user", "content": "Which?"}],
                "completion": [{"role": "assistant", "content": "Red."}]}, "<image>\nWhich?"),
    "prompt of parts": ({"images": ["a.png"], "completion": "Red.", "prompt": [
        {"role": "user", "content": [PART, words("Which?")]}]}, "<image>\nWhich?"),
    "texts": ({"images": ["a.png"], "texts": [{"user": "Which?", "assistant": "Red."}]},
              "<image>\nWhich?"),
    "caption": ({"image": "a.png", "caption": "Red."}, None),
    "a system text": ({"image": "a.png", "system": "Be brief.", "conversations": [
        {"from": "human", "value": "Which?"}, {"from": "gpt", "value": "Red."}]},
        "<image>\nWhich?"),
}


@pytest.mark.parametrize("family", EXPORTABLE)
@pytest.mark.parametrize("name", LAYOUTS)
def test_training_the_chat_and_an_export_write_the_same(tmp_path, name, family):
    record, asked = LAYOUTS[name]
    (tmp_path / "a.png").write_bytes(b"x")
    content = None
    if isinstance(record, list):
        content = record
        images = ["a.png"] if record[0] is PART else []
        record = {"images": images, "messages": [
            {"role": "user", "content": content}, {"role": "assistant", "content": "Red."}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    backend = (byte_level(["<unk>", "<s>", "</s>"]) if family == "minimind2-early"
               else byte_level([*SPECIAL_TOKENS, "<|extra_0|>"]) if family == "qwen"
               else backend_of(family))
    template = ChatTemplate(Tokenizer(backend), 1, DEFAULT_SYSTEM[family], family=family)
    messages = list(open_data(tmp_path / "data.jsonl")[0].messages)
    ids, mask = template.encode_conversation(messages)
    trained = ids[:mask.index(True)]
    if asked is not None:
        chat = [*(m for m in messages if m.role == "system"), Message("user", asked)]
        assert template.encode_prompt(chat) == trained
    public = PublicTemplate(template)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(public.tokenizer_json()),
        chat_template=public.jinja())
    spelled = [{"role": m.role, "content": m.content} for m in messages[:-1]]
    exported = [spelled]
    if content is not None:
        exported.append([{"role": "user", "content": content}])
    for conversation in exported:
        assert tokenizer.apply_chat_template(conversation, add_generation_prompt=True,
                                             return_dict=False) == trained
    whole = tokenizer.apply_chat_template(
        [*spelled, {"role": "assistant", "content": messages[-1].content}], return_dict=False)
    assert whole == ids


@pytest.mark.parametrize("family", EXPORTABLE)
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_export_treats_thoughts_alike(family, answer):
    backend = (byte_level(["<unk>", "<s>", "</s>"]) if family == "minimind2-early"
               else byte_level([*SPECIAL_TOKENS, "<|extra_0|>"]) if family == "qwen"
               else backend_of(family))
    template = ChatTemplate(Tokenizer(backend), 1, DEFAULT_SYSTEM[family], family=family)
    public = PublicTemplate(template)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(public.tokenizer_json()),
        chat_template=public.jinja())
    talk = turns("Which?", answer, "Sure?", answer)
    for part in (talk[:2], talk, turns("Which?", answer, "Sure?", "Yes.")):
        assert tokenizer.decode(tokenizer.apply_chat_template(part, return_dict=False)) == (
            template.tokenizer.decode(template.encode_conversation(messages_of(part))[0]))
    assert tokenizer.apply_chat_template(talk[:3], add_generation_prompt=True,
                                         return_dict=False) == template.encode_prompt(
        messages_of(talk[:3]))


@pytest.mark.parametrize("part", [{"type": "video", "video": "a.mp4"}, {"type": "audio"}])
def test_an_exported_template_refuses_other_media(part):
    jinja = PublicTemplate(ChatTemplate(Tokenizer(byte_level(SPECIAL_TOKENS)), 1)).jinja()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(SPECIAL_TOKENS), chat_template=jinja)
    for role, content in (("user", [part, words("x")]), ("assistant", [PART])):
        with pytest.raises(Exception, match="a part of type"):
            tokenizer.apply_chat_template([{"role": role, "content": content}])


@pytest.mark.parametrize("family", [name for name in CHAT_FAMILIES if name not in EXPORTABLE])
def test_a_template_whose_turns_are_text_is_not_exported(family):
    template = ChatTemplate(Tokenizer(sentencepiece()), 1, DEFAULT_SYSTEM[family], family=family)
    with pytest.raises(ValueError, match=f"--template {family}: its turns are marked by ordinary"):
        PublicTemplate(template)


# ------------------------------------------------------------------------ SentencePiece
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("family, text", [("zephyr", TINYLLAMA), ("vicuna", VICUNA)])
def test_ids_of_sentencepiece_are_those_of_the_whole_text(family, text, legacy):
    template = ChatTemplate(Tokenizer(sentencepiece(legacy)), 1, DEFAULT_SYSTEM[family],
                            family=family)
    public = transformers.PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece(legacy), chat_template=text, **marks_of(family))
    for talk in (*TALKS, turns("a\nb", "cat", " What"), turns("红 What", "A cat.", "is  it")):
        assert template.encode_prompt(messages_of(talk)) == public.apply_chat_template(
            talk, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("family", ["zephyr", "vicuna"])
@pytest.mark.parametrize("answer", ["A cat.", " A cat.", "\nred", "", "红", "<image>", "</s>"])
def test_the_training_prefix_is_the_prompt_with_sentencepiece(family, answer):
    template = ChatTemplate(Tokenizer(sentencepiece()), 3, DEFAULT_SYSTEM[family], family=family)
    messages = messages_of(turns("<image>\nWhat is it?", answer, "this <image> cat?", answer))
    ids, mask = template.encode_conversation(messages)
    for turn in (1, 3):
        prompt = template.encode_prompt(messages[:turn])
        assert ids[:len(prompt)] == prompt and mask[len(prompt)] and not mask[len(prompt) - 1]
    assert ids.count(template.end) == (2 if family == "vicuna" else 4)
    assert ids.count(template.image_token_id) == 6
