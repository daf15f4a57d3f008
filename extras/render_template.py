"""A published chat template, run in jinja2's sandbox as transformers runs it.

    text, messages, tokenizer_config.json -> render -> the prompt as one text, or None

The template is a stranger's program: the sandbox lets it change nothing and reach no attribute that
Python keeps to itself. jinja2 comes with torch; without it, importing this fails, and
dataset/readers/published_template.py reads what it can from the text.
"""

import json

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render(text: str, messages, tokenizer_config: bytes) -> str | None:
    """With thinking off, as we ask. None: the template refuses these messages, or does not run."""
    def refuse(message):
        raise TemplateError(message)

    try:
        config = json.loads(tokenizer_config)
        marks = {name: config.get(name) or "" for name in ("bos_token", "eos_token", "pad_token")}
        marks = {name: mark.get("content", "") if isinstance(mark, dict) else mark
                 for name, mark in marks.items()}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"])
        environment.globals["raise_exception"] = refuse
        return environment.from_string(text).render(
            messages=[dict(message) for message in messages], add_generation_prompt=True,
            enable_thinking=False, **marks)
    except Exception:  # a stranger's program may fail in any way
        return None
