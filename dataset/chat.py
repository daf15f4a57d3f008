"""The one chat template: messages -> token ids and loss mask, built together.

    Sample.messages -> ChatTemplate.render -> ids, mask          training (dataset/batching.py)
    Sample.messages -> ChatTemplate.prompt -> ids                chat and scoring (eval.py)

It is Qwen's ChatML, one block a turn, an image in a turn as K placeholders:

    <|im_start|>user\\n<|vision_start|><|image_pad|> x K<|vision_end|>\\nWho is it?<|im_end|>\\n
    <|im_start|>assistant\\nA cat.<|im_end|>\\n
                            ^^^^^^^^^^^^^^^^  supervised: the answer, and that it ends there

Role line, content and end are encoded one by one, so that no token reaches across a border: an
answer that starts with a newline cannot melt into the role line's newline, and what the model
was trained on is always what it is later prompted with.
"""

from dataclasses import dataclass

from dataset.tokenizer import Tokenizer

IMAGE = "<image>"  # in the content of a user or system turn: one picture belongs here
ROLES = ("system", "user", "assistant")

# What each family's published template says first when a conversation has no system turn.
# (Qwen2.5-Instruct names itself in that place; give its line as `default_system` if you want it.)
DEFAULT_SYSTEM = {
    "qwen": "You are a helpful assistant.",
    "qwen2": "You are a helpful assistant.",
    "qwen3": None,
    "llama": None,
}


@dataclass(frozen=True)
class Message:
    role: str  # "system", "user" or "assistant"
    content: str

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise ValueError(f"the content of a {self.role} turn is {self.content!r}, not text")
        self.content.encode("utf-8")  # half a character, "\ud83d" in JSON: raises a ValueError

    @property
    def images(self) -> int:
        """How many pictures this turn shows. In an answer "<image>" is a word like any other."""
        return 0 if self.role == "assistant" else self.content.count(IMAGE)


class ChatTemplate:
    def __init__(self, tokenizer: Tokenizer, image_tokens: int, default_system: str | None = None,
                 image_token: str = "<|image_pad|>"):
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens  # K
        self.default_system = default_system
        self.start = tokenizer.token_id("<|im_start|>")
        self.end = tokenizer.token_id("<|im_end|>")
        # A language model that never knew pictures (SmolLM2) has no placeholder. The number after
        # its last token serves: the model puts image features there and looks no embedding up.
        self.image_token_id = (tokenizer.token_id(image_token) if tokenizer.has(image_token)
                               else tokenizer.vocab_size)
        self.image_ids = [self.image_token_id] * image_tokens
        if tokenizer.has("<|vision_start|>") and tokenizer.has("<|vision_end|>"):
            self.image_ids = [tokenizer.token_id("<|vision_start|>"), *self.image_ids,
                              tokenizer.token_id("<|vision_end|>")]
        # <|endoftext|> too: a base model ends a document with it, and would then start another.
        self.stop_ids = [self.end] + [tokenizer.token_id(token) for token in ("<|endoftext|>",)
                                      if tokenizer.has(token)]

    def render(self, messages) -> tuple[list[int], list[bool]]:
        """A whole conversation -> ids, and mask: mask[i] is True where ids[i] is supervised."""
        ids, mask = [], []

        def append(piece: list[int], supervised: bool = False) -> None:
            ids.extend(piece)
            mask.extend([supervised] * len(piece))

        for message in self._with_system(messages):
            append(self._header(message.role))
            answer = message.role == "assistant"
            append(self._content(message), supervised=answer)
            append([self.end], supervised=answer)  # the model must learn to stop by itself
            append(self.tokenizer.encode("\n"))
        return ids, mask

    def prompt(self, messages) -> list[int]:
        """The same ids, then the assistant's turn left open: the model goes on from here."""
        return self.render(messages)[0] + self._header("assistant")

    def fit(self, ids: list[int], mask: list[bool], max_length: int):
        """Cut a rendered conversation at max_length tokens, or raise ValueError with the reason.

        Never cut through an image: the model would get features without a place to put them.
        Never return a row without supervised tokens: it costs time and teaches nothing.
        """
        if not any(mask):
            raise ValueError("no supervised token: the conversation has no assistant turn")
        if not set(ids[max_length:]).isdisjoint(self.image_ids):
            raise ValueError(f"a cut at max_length {max_length} would lose part of an image "
                             f"({self.image_tokens} tokens each, {len(ids)} tokens in all); "
                             "raise max_length")
        if not any(mask[:max_length]):
            raise ValueError(f"no supervised token within max_length {max_length}: the first "
                             f"answer starts at token {mask.index(True)}; raise max_length")
        return ids[:max_length], mask[:max_length]

    def show(self, ids: list[int], mask: list[bool], colour: bool = True) -> str:
        """One sample as a terminal shows it: supervised text in green, images collapsed."""
        text, start = "", 0
        for i in range(1, len(ids) + 1):  # a run of like tokens ends where the kind changes
            if i < len(ids) and self._kind(ids, mask, i) == self._kind(ids, mask, start):
                continue
            is_image, supervised = self._kind(ids, mask, start)
            run = f"<image x{i - start}>" if is_image else self.tokenizer.decode(ids[start:i])
            run = run.replace("\x1b", "\u241b")  # data must not steer the terminal
            text += f"\x1b[32m{run}\x1b[0m" if supervised and colour else run
            start = i
        return text

    def _kind(self, ids, mask, i) -> tuple[bool, bool]:
        return ids[i] == self.image_token_id, bool(mask[i])

    def _with_system(self, messages) -> list[Message]:
        # Decided for the conversation as a whole, never per turn: else every turn would get one.
        messages = list(messages)
        if self.default_system is None or (messages and messages[0].role == "system"):
            return messages
        return [Message("system", self.default_system), *messages]

    def _header(self, role: str) -> list[int]:
        return [self.start, *self.tokenizer.encode(role + "\n")]

    def _content(self, message: Message) -> list[int]:
        if not message.images:
            return self.tokenizer.encode(message.content)
        first, *rest = message.content.split(IMAGE)
        ids = self.tokenizer.encode(first)
        for text in rest:
            ids += self.image_ids + self.tokenizer.encode(text)
        return ids
