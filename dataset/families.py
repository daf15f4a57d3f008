"""The facts of each chat family: what its published template says. chat.py is the mechanism."""

from dataclasses import dataclass

NO_THINKING = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class ChatFamily:
    """What one family's published template says; the defaults are what most of them say."""

    default_system: str | None = None  # comes first when a conversation has no system turn
    answer_opening: str = ""  # before the text of an answer, as part of the prompt
    opens_every_answer: bool = True  # False: the newest alone, earlier ones stand without it
    image_token: str = "<|image_pad|>"  # the placeholder: K of them for an image
    # Left out where the tokenizer has no such tokens.
    around_image: tuple[str, ...] = ("<|vision_start|>", "<|vision_end|>")
    start: str = "<|im_start|>"  # of every turn
    end: str = "<|im_end|>"  # of every turn; a model that says it has finished its answer
    # What ends an answer too: a base model ends a document with it, and would start another.
    stops: tuple[str, ...] = ("<|endoftext|>",)


HELPFUL = "You are a helpful assistant."
CHAT_FAMILIES = {
    # The first Qwen, Qwen-7B-Chat: none of its tokens means an image, so a spare one serves. The
    # stops are those of its own generation code.
    "qwen": ChatFamily(HELPFUL, image_token="<|extra_0|>", around_image=(),
                       stops=("<|im_start|>", "<|endoftext|>")),
    "qwen2": ChatFamily(HELPFUL),  # Qwen2, and Qwen2.5 as published without "Instruct"
    "qwen2.5-instruct": ChatFamily(f"You are Qwen, created by Alibaba Cloud. {HELPFUL}"),
    "qwen3": ChatFamily(answer_opening=NO_THINKING, opens_every_answer=False),
    "llama": ChatFamily(),  # SmolLM2: ChatML too
    "minimind": ChatFamily(answer_opening=NO_THINKING, around_image=()),  # minimind-3
    # MiniMind2, whose line has no full stop; and as it was published before April 2025.
    "minimind2": ChatFamily("You are a helpful assistant", image_token="@", around_image=()),
    "minimind2-early": ChatFamily("你是 MiniMind，是一个有用的人工智能助手。", image_token="@",
                                  around_image=(), start="<s>", end="</s>", stops=()),
}
# Apart, because the caller decides: a preset, a flag or a checkpoint may have another.
DEFAULT_SYSTEM = {name: family.default_system for name, family in CHAT_FAMILIES.items()}
