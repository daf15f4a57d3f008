"""The chat template that was published beside a tokenizer: whose turns it writes, and what it says.

    chat_template.jinja or tokenizer_config.json -> published_template -> its text, or None
    its text, model_type -> chat_facts -> a name in CHAT_FAMILIES, the default system turn
    a ChatTemplate of ours -> warn_of_differences -> a warning with both texts, where they differ

model_type does not decide: a qwen2 may be Qwen2.5-Instruct with a system turn of its own, a qwen3
one that never thinks. The template is a program in Jinja. extras/render_template.py runs it in a
sandbox; without it, facts are read from its text.
"""

import json
import re
import warnings
from dataclasses import replace

from dataset.families import CHAT_FAMILIES, DEFAULT_SYSTEM
from dataset.readers.template_text import as_one_text

FILES = ("chat_template.jinja", "tokenizer_config.json")  # the first wins, as in transformers
ASKED = ({"role": "user", "content": "Who?"},)
TALKS = (ASKED, ({"role": "system", "content": "Be brief."}, *ASKED),
         (*ASKED, {"role": "assistant", "content": "A cat."}, *ASKED))


def published_template(companions: dict[str, bytes]) -> str | None:
    """companions: the small files beside tokenizer.json."""
    if FILES[0] in companions:
        return companions[FILES[0]].decode("utf-8", "replace")
    try:
        config = json.loads(companions.get(FILES[1], b"{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{FILES[1]} beside the tokenizer is not JSON: {error}; fetch it again"
                         ) from error
    found = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(found, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) and found.strip() else None


def chat_facts(tokenizer, model_type: str) -> tuple[str, str | None]:
    """-> the family whose template a model is to be trained in, and the default system turn."""
    text = published_template(tokenizer.companions)
    if text is None:  # a base model: what its tokens are made for
        family = model_type
        if tokenizer.has("<|start_header_id|>") and not tokenizer.has("<|im_start|>"):
            family = "llama3"
        known = CHAT_FAMILIES.get(family)
        if missing := [m for m in known.marks if not tokenizer.has(m)] if known else [family]:
            raise ValueError(f"a {model_type} without a chat template beside its tokenizer "
                             f"and without {missing[0]!r}; choose the turns to train it in: "
                             f"--template {', '.join(fitting(tokenizer)) or '...'}; or take a chat "
                             "model")
        return family, DEFAULT_SYSTEM[family]
    family = family_of_text(text, model_type)
    if family is None:
        raise ValueError(
            "the chat template beside the tokenizer is of no family that is known here:\n"
            f"{rendered(tokenizer, text, ASKED) or text[:500]!r}\nIt was looked for the turns of "
            f"{', '.join(CHAT_FAMILIES)}. To train in other turns than those it was published "
            f"with, choose: --template {', '.join(fitting(tokenizer))}")
    return family, default_system(tokenizer, text, family)


def fitting(tokenizer) -> list[str]:
    """Families whose tokens the tokenizer has."""
    return [name for name, family in CHAT_FAMILIES.items()
            if all(map(tokenizer.has, (*family.marks, family.end)))]


def family_of_text(text: str, model_type: str) -> str | None:
    """A name in CHAT_FAMILIES; None: it writes other turns."""
    if "<|start_header_id|>" in text and "<|eot_id|>" in text:
        return "llama3.1" if "Cutting Knowledge Date" in text else "llama3"
    if "<|im_start|>" in text and "<|im_end|>" in text:
        opens = "<think>" in text.rpartition("add_generation_prompt")[2]
        if opens:  # with a thought of its own, unless told not to
            return ("minimind" if "open_thinking" in text
                    else "qwen3" if "enable_thinking" in text else None)
        plain = CHAT_FAMILIES.get(model_type)
        fits = plain and not plain.answer_opening and plain.end == "<|im_end|>"
        return model_type if fits else "qwen3-2507"
    if "<|user|>" in text and "<|end|>" not in text and ("eos_token" in text or "</s>" in text):
        return "zephyr"
    if "USER:" in text and "ASSISTANT:" in text:
        return "vicuna"
    return "minimind2-early" if re.search(r"<s>(system|user|')", text) else None


def default_system(tokenizer, text: str, family: str) -> str | None:
    """The system turn that the template writes where a conversation has none."""
    facts = CHAT_FAMILIES[family]
    header = facts.header.format(role=facts.names[0])
    whole = rendered(tokenizer, text, ASKED)
    if whole is not None:
        question = facts.header.format(role=facts.names[1])
        before = whole.partition(question)[0].removeprefix(facts.begin).rstrip()
        before = before.removeprefix(header.rstrip()).removesuffix(facts.end)
        before = before.strip().removeprefix(facts.system_prefix.strip()).strip()
        return before or None
    plain = text.replace("\\n", "\n").replace("\\'", "'").replace('\\"', '"')
    found = re.search(re.escape(header) + r"(?!['\"]\s*[+}~])([^{}]+?)" + re.escape(facts.end),
                      plain) if header else None
    if found:
        return found[1]
    return facts.default_system if facts.default_system and facts.default_system in plain else None


def rendered(tokenizer, text: str, messages) -> str | None:
    """What the published template makes of them, and then asks for; None: it cannot be run."""
    try:
        from extras.render_template import render  # here: an extra, and jinja2 may be missing
    except ImportError:
        return None
    return render(text, messages, tokenizer.companions.get(FILES[1], b"{}"))


def warn_of_differences(template, message_class) -> None:
    """template: a ChatTemplate. Where its model was published with another one: say both."""
    tokenizer = template.tokenizer
    text = published_template(tokenizer.companions)
    for messages in TALKS if text else ():
        theirs = rendered(tokenizer, text, messages)
        ours = tokenizer.decode(template.encode_prompt(
            [message_class(**message) for message in messages]))
        if theirs is not None:
            differ = tokenizer.decode(as_one_text(tokenizer, theirs)) != ours
        else:
            family = family_of_text(text, template.family)
            differ = messages == ASKED and (family is None or CHAT_FAMILIES[family] != replace(
                template.facts, default_system=CHAT_FAMILIES[family].default_system)
                or default_system(tokenizer, text, family) != template.default_system)
            theirs = text
        if differ:
            warnings.warn(f"--template {template.family} is not what the model was published with."
                          f"\nOurs:\n{ours!r}\nThe chat_template beside its tokenizer:\n"
                          f"{theirs[:2000]!r}\nA model knows the turns that it was trained in; "
                          "leave out --template and --system to take the published ones where "
                          "they are known", stacklevel=3)
            return
