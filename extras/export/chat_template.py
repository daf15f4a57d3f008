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

# Families whose borders are special tokens, so that one text can hold a whole conversation. A user
# could type the role lines of the others, and those of Vicuna melt into the text beside them.
EXPORTABLE = ("qwen", "qwen2", "qwen2.5-instruct", "qwen3", "qwen3-2507", "llama", "llama3",
              "llama3.1", "minimind", "minimind2", "minimind2-early")

JINJA = """\
{{- BEGIN -}}
{%- if (PREFIX or SYSTEM is not none) and (not messages or messages[0].role != 'system') -%}
    {{- HEAD + 'system' + LINE + PREFIX + (SYSTEM or '') + END -}}
{%- endif -%}
{%- for message in messages -%}
    {{- HEAD + message.role + LINE -}}
    {%- set opened = message.role == 'assistant' and
        (EVERY or (loop.last and not add_generation_prompt)) -%}
    {%- if message.content is string -%}
        {%- set text = message.content -%}
    {%- else -%}
        {%- set parts = namespace(text='', image=false) -%}
        {%- for part in message.content -%}
            {%- set image = part.type in ['image', 'image_url', 'input_image'] -%}
            {%- if (image and message.role == 'assistant') or
                   not (image or part.type in ['text', 'input_text', 'output_text',
                                               'media_marker']) -%}
                {{- raise_exception('a part of type ' + part.type + ' in the turn of a '
                                    + message.role + ': it can hold text and, unless it is an '
                                    + 'answer, images') -}}
            {%- endif -%}
            {%- set piece = '<image>' if image else part.text -%}
            {%- if parts.text and (image or parts.image) and
                   parts.text[-1:] != '\\n' and piece[:1] not in ['', '\\n'] -%}
                {%- set parts.text = parts.text + '\\n' -%}
            {%- endif -%}
            {%- set parts.text = parts.text + piece -%}
            {%- set parts.image = image if piece else parts.image -%}
        {%- endfor -%}
        {%- set text = parts.text -%}
    {%- endif -%}
    {%- if STRIPS -%}
        {%- set text = text | trim -%}
    {%- endif -%}
    {%- if loop.first and message.role == 'system' and not text.startswith(PREFIX) -%}
        {%- set text = PREFIX + text -%}
    {%- endif -%}
    {%- if message.role != 'assistant' -%}
        {%- set text = text | replace('<image>', IMAGE_TOKENS) -%}
    {%- elif OPENING and '</think>' in text -%}
        {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
        {%- if opened and thought -%}
            {%- set text = '<think>\\n' + thought + '\\n</think>\\n\\n' + text -%}
        {%- elif opened -%}
            {%- set text = OPENING + text -%}
        {%- endif -%}
    {%- elif opened -%}
        {%- set text = OPENING + text -%}
    {%- endif -%}
    {{- text + END -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- HEAD + 'assistant' + LINE + OPENING -}}
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
        if template.family not in EXPORTABLE:
            raise ValueError(f"--template {template.family}: its turns are marked by ordinary text,"
                             " which other engines, that cut a conversation up as one text, read "
                             f"differently; the families that can be exported so are "
                             f"{', '.join(EXPORTABLE)}. Use --to merged, and eval.py")
        self.template, written = template, template.tokenizer.backend.to_str()
        self.end = template.facts.end
        self.image_token = template.image_token
        if not template.tokenizer.is_special(template.image_token):
            self.image_token = next(t for t in PLACEHOLDERS if not template.tokenizer.has(t))
            public = json.loads(written)  # into the vocabulary, which may have gaps: the id stays
            vocabulary = public["model"]["vocab"]
            for token in public["added_tokens"]:  # those that are not in it would be renumbered
                vocabulary.setdefault(token["content"], token["id"])
            vocabulary[self.image_token] = template.image_token_id
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
            for token in (*template.facts.marks, self.before, self.after, self.image_token)
            if token and not template.tokenizer.is_special(token)])

    def jinja(self, llama_cpp: bool = False) -> str:
        template = self.template
        head, line = template.facts.header.split("{role}")
        facts = {"BEGIN": template.facts.begin, "HEAD": head, "LINE": line,
                 "END": self.end + template.facts.after_end, "STRIPS": template.facts.strips,
                 "PREFIX": template.facts.system_prefix, "SYSTEM": template.default_system,
                 "OPENING": template.facts.answer_opening, "EVERY": template.opens_every_answer,
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
        line = self.template.facts.header.rpartition("}")[2].rpartition(">")[2]
        role = "" if "}<" in self.template.facts.header else f"(?:{'|'.join(ROLES)})"
        cuts = [rf"\A{role}{line}"]
        if self.template.facts.answer_opening and self.template.opens_every_answer:
            # Where "</think>" is a token of its own, a stretch of text begins behind it.
            opening = self.template.facts.answer_opening
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
