"""Our chat template in the form that other engines read: Jinja, and a tokenizer.json.

    ChatTemplate -> PublicTemplate -> chat_template.jinja, tokenizer.json, tokenizer_config.json

We encode a turn piece by piece: role line, opening, content. Other engines write the whole
conversation as one text and encode that. The ids are the same only if the tokenizer cuts where we
do, so its tokenizer.json gets these cuts as a rule of its own: in a stretch of text between two
special tokens the role line at the start stands by itself.

What cannot be carried over: a user who types "<|im_end|>" writes plain text here, and ends the turn
in every engine that renders text first.
"""

import json
import re
from pathlib import Path

import tokenizers

from dataset.chat import IMAGE, ROLES, ChatTemplate
from extras.convert.tiktoken import PIECES
from model.pretrained.files import write_json

# Texts for a new token, where the template's own is no special token of the tokenizer.
PLACEHOLDERS = ("<|image_pad|>", "<|image_place|>")

JINJA = """\
{%- if SYSTEM is not none and (not messages or messages[0].role != 'system') -%}
    {{- START + 'system\\n' + SYSTEM + END + '\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- START + message.role + '\\n' -}}
    {%- if message.role == 'assistant' and (EVERY or (loop.last and not add_generation_prompt)) -%}
        {{- OPENING -}}
    {%- endif -%}
    {%- if message.content is string -%}
        {%- set text = message.content -%}
    {%- else -%}
        {%- set parts = namespace(text='') -%}
        {%- for part in message.content -%}
            {%- if part.type == 'text' -%}
                {%- set parts.text = parts.text + part.text -%}
            {%- else -%}
                {%- set parts.text = parts.text + '<image>\\n' -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set text = parts.text -%}
    {%- endif -%}
    {%- if message.role != 'assistant' -%}
        {%- set text = text | replace('<image>', IMAGE_TOKENS) -%}
    {%- endif -%}
    {{- text + END + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- START + 'assistant\\n' + OPENING -}}
{%- endif -%}
"""


def pieces_name(pre_tokenizer: dict | None) -> str:
    """llama.cpp's name for the way in which text is cut before the merges."""
    parts = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {"type": None}]
    kinds = [part["type"] for part in parts]
    if kinds == ["Split", "ByteLevel"] and parts[0]["pattern"].get("Regex") == PIECES:
        return "qwen2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
        return "smollm"
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    raise ValueError(f"the tokenizer cuts text by {kinds}, for which llama.cpp has no name here: "
                     "known are those of Qwen, SmolLM2 and GPT-2")


# llama.cpp puts its own mark, such as <__media_C8KZ__>, where an image belongs, then renders.
MARKS = """\
        {%- if '<__media_' in text -%}
            {%- set text = text | replace('<__media_', BEFORE + '<__media_') -%}
            {%- set text = text | replace('__>', '__>' + AFTER + '\\n') -%}
        {%- endif -%}
"""


class PublicTemplate:
    """image_token: the text of the token that stands for an image in the exported tokenizer."""

    def __init__(self, template: ChatTemplate):
        self.template, written = template, template.tokenizer.backend.to_str()
        self.start, self.end = (template.tokenizer.decode([i])
                                for i in (template.start, template.end))
        self.image_token = template.image_token
        if not template.tokenizer.is_special(template.image_token):
            self.image_token = next(t for t in PLACEHOLDERS if not template.tokenizer.has(t))
            public = json.loads(written)  # into the vocabulary, which may have gaps: the id stays
            public["model"]["vocab"][self.image_token] = template.image_token_id
            written = json.dumps(public)
        self.backend = tokenizers.Tokenizer.from_str(written)
        self.before, self.after = "", ""
        if len(template.image_ids) > template.image_tokens:
            self.before, self.after = (template.tokenizer.decode([template.image_ids[index]])
                                       for index in (0, -1))
        # Special tokens are found in a text before anything else: all that the template writes
        # must be one. Adding one that is there already keeps its id.
        self.backend.add_special_tokens([
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token in (self.start, self.end, self.before, self.after, self.image_token)
            if token and not template.tokenizer.is_special(token)])

    def jinja(self, llama_cpp: bool = False) -> str:
        template = self.template
        facts = {"START": self.start, "END": self.end, "SYSTEM": template.default_system,
                 "OPENING": template.answer_opening, "EVERY": template.opens_every_answer,
                 "BEFORE": self.before, "AFTER": self.after,
                 "IMAGE_TOKENS": self.before + self.image_token + self.after}
        written = {name: "none" if value is None else json.dumps(value, ensure_ascii=False)
                   for name, value in facts.items()}
        lines = [f"{{%- set {name} = {value} -%}}\n" for name, value in written.items()]
        last = "IMAGE_TOKENS) -%}\n"
        text = JINJA.replace(last, last + MARKS) if llama_cpp else JINJA
        return "".join(lines) + text.replace("<image>", IMAGE)

    def tokenizer_json(self) -> str:
        public = json.loads(self.backend.to_str())
        public["post_processor"] = None  # some put a token in front of every text; we never do
        cuts = [rf"\A(?:{'|'.join(ROLES)})\n"]
        if self.template.answer_opening and self.template.opens_every_answer:
            # Where "</think>" is a token of its own, a stretch of text begins behind it.
            opening = self.template.answer_opening
            added = [token.content for token in self.backend.get_added_tokens_decoder().values()]
            tail = min((opening.rpartition(token)[2] for token in added if token in opening),
                       key=len, default=opening)
            cuts.append(r"\A" + re.escape(tail))
        rules = [{"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated",
                  "invert": False} for cut in cuts]
        own = public["pre_tokenizer"]
        rules += own["pretokenizers"] if own and own["type"] == "Sequence" else [own] * bool(own)
        public["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": rules}
        return json.dumps(public, ensure_ascii=False, indent=2) + "\n"

    def gguf_tokenizer(self) -> dict:
        """What a GGUF file says of a tokenizer: its tokens in order, their types, the merges.

        ValueError: text is cut into pieces in a way that llama.cpp knows under no name here.
        """
        public = json.loads(self.backend.to_str())
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        added = self.backend.get_added_tokens_decoder()
        tokens = [f"[PAD{number}]" for number in range(max(vocabulary.values()) + 1)]
        types = [5] * len(tokens)  # unused, until a token takes the index
        for token, number in vocabulary.items():
            tokens[number] = token
            # 1: normal, 3: control, 4: added, and text may hold it
            types[number] = 1 if number not in added else 3 if added[number].special else 4
        merges = [merge if isinstance(merge, str) else " ".join(merge)
                  for merge in public["model"]["merges"]]
        return {"tokens": tokens, "types": types, "merges": merges, "end": self.template.end,
                "pieces": pieces_name(public["pre_tokenizer"]), "template": self.jinja(True),
                "padding": self.template.stop_ids[-1]}

    def save(self, directory, max_length: int) -> None:
        """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and
        generation_config.json (what ends an answer). max_length: the model's longest row."""
        directory, stops = Path(directory), self.template.stop_ids
        padding = self.template.tokenizer.decode([stops[-1]])
        files = {
            "tokenizer_config.json": {
                # The class that takes tokenizer.json as it is; a family's own builds it anew.
                "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end,
                "pad_token": padding, "padding_side": "left", "model_max_length": max_length,
                "clean_up_tokenization_spaces": False},
            "generation_config.json": {
                "eos_token_id": stops, "pad_token_id": stops[-1], "do_sample": False}}
        for name, content in files.items():
            write_json(directory / name, content)
        (directory / "tokenizer.json").write_text(self.tokenizer_json(), encoding="utf-8")
        (directory / "chat_template.jinja").write_text(self.jinja(), encoding="utf-8")
