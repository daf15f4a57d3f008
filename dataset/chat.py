"""The one chat template: messages -> token ids and loss mask, built together.

    Sample.messages -> ChatTemplate.render -> ids, mask          training (dataset/batching.py)
    Sample.messages -> ChatTemplate.prompt -> ids                chat and scoring (eval.py)

It is ChatML, one block a turn, an image in a turn as K placeholders:

    <|im_start|>user\\n<|vision_start|><|image_pad|> x K<|vision_end|>\\nWho is it?<|im_end|>\\n
    <|im_start|>assistant\\nA cat.<|im_end|>\\n
                            ^^^^^^^^^^^^^^^^  supervised: the answer, and that it ends there

Role line, content and end are encoded one by one, so that no token reaches across a border: an
answer that starts with a newline cannot melt into the role line's newline, and what the model
was trained on is always what it is later prompted with.

What the families say differently stands in FAMILIES. One of these facts takes thought: the
opening "<think>\\n\\n</think>\\n\\n", which says that there was no thinking. It belongs to the
prompt, chat puts it there, so it is never supervised. MiniMind-3 keeps it in front of every answer
for good. Qwen3 takes it away again as soon as the next question comes:

    prompt for answer 1    user: a    assistant: [opening]
    prompt for answer 2    user: a    assistant: answer 1    user: b    assistant: [opening]
                                                ^ gone

One row of ids cannot be both. In the second one answer 1 follows a prefix that no chat will ever
give, so learning it there would be wasted: for Qwen3 only the last answer of a row is supervised.
`lesson` cuts a conversation behind another of its answers each time it comes up; so all are
learned, each after the very prompt that asks for it.
"""

from dataclasses import dataclass

from dataset.tokenizer import Tokenizer

IMAGE = "<image>"  # in the content of a user or system turn: one picture belongs here
ROLES = ("system", "user", "assistant")
NO_THINKING = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Family:
    """What one family's published template says; the defaults are what most of them say."""

    default_system: str | None = None  # comes first when a conversation has no system turn
    answer_opening: str = ""  # before the words of an answer, as part of the prompt
    opens_every_answer: bool = True  # False: the newest alone, earlier ones stand without it
    image_token: str = "<|image_pad|>"  # K of them hold an image's place
    # Left out where the tokenizer has no such tokens.
    around_image: tuple[str, ...] = ("<|vision_start|>", "<|vision_end|>")
    start: str = "<|im_start|>"  # of every turn
    end: str = "<|im_end|>"  # of every turn; a model that says it has finished its answer
    # What ends an answer too: a base model ends a document with it, and would start another.
    stops: tuple[str, ...] = ("<|endoftext|>",)


HELPFUL = "You are a helpful assistant."
FAMILIES = {
    # The first Qwen, Qwen-7B-Chat: no token of it means an image, so a spare one has to. The stops
    # are those of its own generation code.
    "qwen": Family(HELPFUL, image_token="<|extra_0|>", around_image=(),
                   stops=("<|im_start|>", "<|endoftext|>")),
    "qwen2": Family(HELPFUL),  # Qwen2, and Qwen2.5 as published without "Instruct"
    "qwen2.5-instruct": Family(f"You are Qwen, created by Alibaba Cloud. {HELPFUL}"),
    "qwen3": Family(answer_opening=NO_THINKING, opens_every_answer=False),
    "llama": Family(),  # SmolLM2: ChatML too
    "minimind": Family(answer_opening=NO_THINKING, around_image=()),  # minimind-3
    # MiniMind2, whose line has no full stop; and as it was published before April 2025.
    "minimind2": Family("You are a helpful assistant", image_token="@", around_image=()),
    "minimind2-early": Family("你是 MiniMind，是一个有用的人工智能助手。", image_token="@",
                              around_image=(), start="<s>", end="</s>", stops=()),
}
# By itself, because the caller decides: a preset, a flag or a checkpoint may say another.
DEFAULT_SYSTEM = {name: family.default_system for name, family in FAMILIES.items()}


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
    """family: a name in FAMILIES. image_tokens: K, how many tokens an image takes.
    default_system: the system turn of conversations without one; None: they have none.
    image_token: what holds an image's place in the published ids; None: what the family says.
    """

    def __init__(self, tokenizer: Tokenizer, image_tokens: int, default_system: str | None = None,
                 image_token: str | None = None, family: str = "qwen2"):
        if family not in FAMILIES:
            raise ValueError(f"no chat template for the family {family!r}; expected one of "
                             f"{', '.join(FAMILIES)}")
        facts = FAMILIES[family]
        self.tokenizer, self.family = tokenizer, family
        self.image_tokens = image_tokens  # K
        self.default_system = default_system
        self.start = tokenizer.token_id(facts.start)
        self.end = tokenizer.token_id(facts.end)
        self.stop_ids = [self.end] + [tokenizer.token_id(token) for token in facts.stops
                                      if tokenizer.has(token)]
        self.answer_opening = facts.answer_opening
        # What every turn has in common is encoded once, not again with every turn of every row.
        self.headers = {role: [self.start, *tokenizer.encode(role + "\n")] for role in ROLES}
        self.opening, self.line_end = map(tokenizer.encode, (self.answer_opening, "\n"))
        self.opens_every_answer = facts.opens_every_answer
        self.image_token = image_token or facts.image_token
        # A placeholder must be an id that no typed text becomes. A special token is one; "@"
        # (MiniMind2) is not, and SmolLM2 never knew pictures. For both the number after the last
        # token serves: the model puts image features there and looks no embedding up.
        self.image_token_id = (tokenizer.token_id(self.image_token)
                               if tokenizer.is_special(self.image_token)
                               else tokenizer.vocab_size)
        self.image_ids = [self.image_token_id] * image_tokens
        if facts.around_image and all(map(tokenizer.has, facts.around_image)):
            before, after = map(tokenizer.token_id, facts.around_image)
            self.image_ids = [before, *self.image_ids, after]

    def render(self, messages) -> tuple[list[int], list[bool]]:
        """A whole conversation -> ids, and mask: mask[i] is True where ids[i] is supervised."""
        messages = self._with_system(messages)
        return self._turns(messages, newest=len(messages) - 1)

    def prompt(self, messages) -> list[int]:
        """The same ids, then the assistant's turn left open: the model goes on from here."""
        messages = self._with_system(messages)
        ids, _ = self._turns(messages, newest=len(messages))  # the answer that is to come
        return ids + self.headers["assistant"] + self.opening

    def lesson(self, messages, number: int) -> list[Message]:
        """What of a conversation makes the row to train on, when its turn comes the number-th
        time: all of it, or where a row teaches one answer (Qwen3), all up to one of the answers,
        each in its turn."""
        messages = list(messages)
        answers = [place for place, m in enumerate(messages) if m.role == "assistant"]
        if self.opens_every_answer or not answers:
            return messages
        return messages[:answers[number % len(answers)] + 1]

    def fit(self, ids: list[int], mask: list[bool], max_length: int):
        """Cut a rendered conversation at max_length tokens, or raise ValueError with the reason.

        Never cut through an image: the model would get features without a place to put them.
        Never return a row without supervised tokens: it costs time and teaches nothing.
        """
        if not any(mask):
            raise ValueError("no supervised token: the conversation has no assistant turn"
                             + " at its end" * (not self.opens_every_answer))
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

    def _turns(self, messages, newest: int) -> tuple[list[int], list[bool]]:
        """newest: the place of the newest answer, the one that stands, or will, opened."""
        ids, mask = [], []

        def append(text: list[int], supervised: bool = False) -> None:
            ids.extend(text)
            mask.extend([supervised] * len(text))

        for place, message in enumerate(messages):
            # Only what follows the very prompt that chat gives is to be learned.
            asked = message.role == "assistant" and (self.opens_every_answer or place == newest)
            append(self.headers[message.role])
            if asked:
                append(self.opening)
            append(self._content(message), supervised=asked)
            append([self.end], supervised=asked)  # the model must learn to stop by itself
            append(self.line_end)
        return ids, mask

    def _content(self, message: Message) -> list[int]:
        if not message.images:
            return self.tokenizer.encode(message.content)
        first, *rest = message.content.split(IMAGE)
        ids = self.tokenizer.encode(first)
        for text in rest:
            ids += self.image_ids + self.tokenizer.encode(text)
        return ids
