"""The facts of each chat family: what its published template says. chat.py is the mechanism."""

from dataclasses import dataclass

NO_THINKING = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class ChatFamily:
    """What one family's published template says; the defaults are what most of them say."""

    default_system: str | None = None  # comes first when a conversation has no system turn
    # Before the text of an answer, as part of the prompt. Where there is one, thoughts that stand
    # in an answer take its place.
    answer_opening: str = ""
    opens_every_answer: bool = True  # False: the newest alone, earlier ones stand without it
    image_token: str = "<|image_pad|>"  # the placeholder: K of them for an image
    # Left out where the tokenizer has no such tokens.
    around_image: tuple[str, ...] = ("<|vision_start|>", "<|vision_end|>")
    begin: str = ""  # in front of the first turn
    header: str = "<|im_start|>{role}\n"  # in front of the content of every turn
    names: tuple[str, ...] = ("system", "user", "assistant")  # of the roles, as the header has them
    end: str = "<|im_end|>"  # of every turn; a model that says it has finished its answer
    after_end: str = "\n"
    question_end: str | None = None  # of turns that are no answer; None: the same end
    space: str = ""  # in front of the content of a user's or an assistant's turn
    marks: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")  # tokens that the tokenizer must have
    # What ends an answer too: a base model ends a document with it, and would start another.
    stops: tuple[str, ...] = ("<|endoftext|>",)
    strips: bool = False  # white space around a content is taken away
    system_prefix: str = ""  # begins a system turn, which every conversation has then


HELPFUL = "You are a helpful assistant."
LLAMA3 = {"begin": "<|begin_of_text|>", "end": "<|eot_id|>", "after_end": "", "strips": True,
          "header": "<|start_header_id|>{role}<|end_header_id|>\n\n", "around_image": (),
          "marks": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
          "stops": ("<|end_of_text|>",)}
CHAT_FAMILIES = {
    # The first Qwen, Qwen-7B-Chat: none of its tokens means an image, so a spare one serves. The
    # stops are those of its own generation code.
    "qwen": ChatFamily(HELPFUL, image_token="<|extra_0|>", around_image=(),
                       stops=("<|im_start|>", "<|endoftext|>")),
    "qwen2": ChatFamily(HELPFUL),  # Qwen2, and Qwen2.5 as published without "Instruct"
    "qwen2.5-instruct": ChatFamily(f"You are Qwen, created by Alibaba Cloud. {HELPFUL}"),
    "qwen3": ChatFamily(answer_opening=NO_THINKING, opens_every_answer=False),
    "qwen3-2507": ChatFamily(),  # Qwen3-...-Instruct-2507, which never thinks
    "llama": ChatFamily(),  # SmolLM2: ChatML too
    "llama3": ChatFamily(**LLAMA3),
    # Llama 3.1 and later. Their template would write today's date; this is the one it falls back
    # to, since a model must be asked as it was trained.
    "llama3.1": ChatFamily(**LLAMA3, system_prefix="Cutting Knowledge Date: December 2023\n"
                                                   "Today Date: 26 Jul 2024\n\n"),
    # TinyLlama too. Its role lines are ordinary text.
    "zephyr": ChatFamily(header="<|{role}|>\n", end="</s>", around_image=(), marks=("</s>",),
                         stops=()),
    "vicuna": ChatFamily(
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions.",
        begin="<s>", header="{role}", names=("", "USER:", "ASSISTANT:"), end="</s>", after_end="",
        question_end=" ", space=" ", around_image=(), marks=("<s>", "</s>"), stops=()),
    "minimind": ChatFamily(answer_opening=NO_THINKING, around_image=()),  # minimind-3
    # MiniMind2, whose line has no full stop; and as it was published before April 2025.
    "minimind2": ChatFamily("You are a helpful assistant", image_token="@", around_image=()),
    "minimind2-early": ChatFamily("你是 MiniMind，是一个有用的人工智能助手。", image_token="@",
                                  around_image=(), header="<s>{role}\n", end="</s>",
                                  marks=("<s>", "</s>"), stops=()),
}
# Apart, because the caller decides: a preset, a flag or a checkpoint may have another.
DEFAULT_SYSTEM = {name: family.default_system for name, family in CHAT_FAMILIES.items()}


def answer_text(family: ChatFamily, content: str, opened: bool) -> tuple[bool, str]:
    """-> whether the opening stands before this answer, and its text. A thought in it is taken
    apart as Qwen3 does: it takes the place of the opening, or is left out in earlier answers."""
    thought = ""
    if family.answer_opening and "</think>" in content:
        thought, *_, content = content.split("</think>")
        thought, content = thought.split("<think>")[-1].strip("\n"), content.lstrip("\n")
    if opened and thought:
        content = family.answer_opening.replace("\n\n", f"\n{thought}\n", 1) + content
    return opened and not thought, family.space + content.removeprefix(family.space)
