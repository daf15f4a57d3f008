"""The one chat template: messages -> token ids and loss mask, built together.

    Sample.messages -> ChatTemplate.encode_conversation -> ids, mask   training (batching.py)
    Sample.messages -> ChatTemplate.encode_prompt -> ids               chat and scoring (eval.py)

Most families write ChatML, one block a turn, an image in a turn as K placeholders:

    <|im_start|>user\\n<|vision_start|><|image_pad|> x K<|vision_end|>\\nWho is it?<|im_end|>\\n
    <|im_start|>assistant\\nA cat.<|im_end|>\\n
                            ^^^^^^^^^^^^^^^^  supervised: the answer, and that it ends there

Role line, content and end are encoded one by one, so that no token reaches across a border: an
answer that starts with a newline cannot melt into the role line's newline, and what the model
was trained on is always what it is later prompted with.

What the families say differently stands in families.py. One of these facts takes thought: the
opening "<think>\\n\\n</think>\\n\\n", which says that there was no thinking. It belongs to the
prompt, chat puts it there, so it is never supervised. MiniMind-3 keeps it in front of every answer
for good. Qwen3 takes it away again as soon as the next question comes:

    prompt for answer 1    user: a    assistant: [opening]
    prompt for answer 2    user: a    assistant: answer 1    user: b    assistant: [opening]
                                                ^ gone

One row of ids cannot be both. In the second one answer 1 follows a prefix that no chat will ever
give, so learning it there would be wasted: for Qwen3 only the last answer of a row is supervised.
`training_prefix` cuts a conversation behind another of its answers each time it comes up; so all
are learned, each after the very prompt that asks for it. An answer whose data has a thought,
"<think>...</think>", has that in place of the opening, and learns it.
"""

from dataclasses import dataclass, replace

from dataset.families import CHAT_FAMILIES, answer_text
from dataset.readers.published_template import warn_of_differences
from dataset.readers.template_text import TextBehind, borders_of
from dataset.tokenizer import Tokenizer

IMAGE = "<image>"  # in the content of a user or system turn: one image belongs here
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    role: str  # "system", "user" or "assistant"
    content: str
    supervised: bool = True  # False: an answer that is read but not learned

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"unknown role {self.role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(self.content, str):
            raise ValueError(f"the content of a {self.role} turn is {self.content!r}, not text")
        self.content.encode("utf-8")  # half a character, "\ud83d" in JSON: raises a ValueError

    @property
    def images(self) -> int:
        """How many images this turn shows. In an answer "<image>" is ordinary text."""
        return 0 if self.role == "assistant" else self.content.count(IMAGE)


class ChatTemplate:
    """image_tokens: K, how many tokens an image takes. family: a name in CHAT_FAMILIES.
    default_system: the system turn of conversations without one; None: they have none.
    image_token: the placeholder of an image in the published ids; None: the family's.
    """

    def __init__(self, tokenizer: Tokenizer, image_tokens: int, default_system: str | None = None,
                 image_token: str | None = None, family: str = "qwen2"):
        if family not in CHAT_FAMILIES:
            raise ValueError(f"no chat template for the family {family!r}; expected one of "
                             f"{', '.join(CHAT_FAMILIES)}")
        facts = self.facts = CHAT_FAMILIES[family]
        self.tokenizer, self.family = tokenizer, family
        self.image_tokens = image_tokens  # K
        self.default_system = default_system
        self.start, *_, self.end = map(tokenizer.token_id, (*facts.marks, facts.end))
        self.stop_ids = [self.end] + [tokenizer.token_id(token) for token in facts.stops
                                      if tokenizer.has(token)]
        self.opens_every_answer = facts.opens_every_answer
        # What every turn has in common is encoded once, not again with every turn of every row.
        self.borders = borders_of(facts, tokenizer, ROLES)
        self.text_behind = TextBehind(tokenizer, facts.end)
        self.opening = tokenizer.encode(facts.answer_opening)
        self.image_token = image_token or facts.image_token
        # A placeholder must be an id that no typed text becomes. A special token is one; "@"
        # (MiniMind2) is not, and SmolLM2 has none for images. Both get the id after the last token:
        # the model puts image features there and looks no embedding up.
        self.image_token_id = (tokenizer.token_id(self.image_token)
                               if tokenizer.is_special(self.image_token)
                               else tokenizer.vocab_size)
        self.image_ids = [self.image_token_id] * image_tokens
        if facts.around_image and all(map(tokenizer.has, facts.around_image)):
            before, after = map(tokenizer.token_id, facts.around_image)
            self.image_ids = [before, *self.image_ids, after]
        warn_of_differences(self, Message)

    def encode_conversation(self, messages) -> tuple[list[int], list[bool]]:
        """A whole conversation -> ids, and mask: mask[i] is True where ids[i] is supervised."""
        messages = self._with_system(messages)
        ids, mask = self._turns(messages, newest=len(messages) - 1)
        end = self.borders[messages[-1].role, None] if messages else []
        return ids + end, mask + [False] * len(end)

    def encode_prompt(self, messages) -> list[int]:
        """The same ids, then the assistant's turn left open: the model goes on from here."""
        messages = self._with_system(messages)
        ids, _ = self._turns(messages, newest=len(messages))  # the answer that is to come
        end = self.borders[messages[-1].role if messages else None, "assistant"]
        return ids + end + self.opening

    def training_prefixes(self, messages) -> list[list[Message]]:
        """The parts of a conversation to train on, one each time that it comes up, in turn: all of
        it, or where a row teaches one answer (Qwen3), all up to each of the answers."""
        messages = list(messages)
        answers = [i for i, message in enumerate(messages)
                   if message.role == "assistant" and message.supervised]
        if self.opens_every_answer or not answers:
            return [messages]
        return [messages[:answer + 1] for answer in answers]

    def training_prefix(self, messages, number: int) -> list[Message]:
        """The part to train on when a conversation comes up for the number-th time."""
        prefixes = self.training_prefixes(messages)
        return prefixes[number % len(prefixes)]

    def fingerprint(self) -> str:
        """Templates of one fingerprint give the same ids."""
        text = self.tokenizer.backend.to_str()
        return str([vars(self) | {"tokenizer": text, "text_behind": None}])

    def truncate(self, ids: list[int], mask: list[bool], max_length: int):
        """Cut a rendered conversation at max_length tokens, or raise ValueError with the reason.

        Never cut through an image: the model would get features without a position for them.
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

    def _with_system(self, messages) -> list[Message]:
        # Decided for the conversation as a whole, never per turn: else every turn would get one.
        messages, prefix = list(messages), self.facts.system_prefix
        if self.facts.strips:
            messages = [replace(message, content=message.content.strip()) for message in messages]
        given = bool(messages) and messages[0].role == "system"
        if not given and (prefix or self.default_system is not None):
            messages.insert(0, Message("system", self.default_system or ""))
        if prefix and not messages[0].content.startswith(prefix):
            messages[0] = Message("system", prefix + messages[0].content)
        return messages

    def _turns(self, messages, newest: int) -> tuple[list[int], list[bool]]:
        """Up to the end of the last content. newest: index of the newest answer; one past the end
        where it is still to come."""
        ids, mask = [], []

        def append(tokens: list[int], supervised: bool = False) -> None:
            ids.extend(tokens)
            mask.extend([supervised] * len(tokens))

        for i, message in enumerate(messages):
            append(self.borders[messages[i - 1].role if i else None, message.role])
            if message.role != "assistant":
                append(self._content(message))
                continue
            # Only what follows the very prompt that chat gives is to be learned.
            opened = self.opens_every_answer or i == newest
            supervised = opened and message.supervised
            empty, text = answer_text(self.facts, message.content, opened)
            append(self.opening * empty)
            append(self.text_behind(text), supervised)
            append([self.end], supervised)  # the model must learn to stop by itself
        return ids, mask

    def _content(self, message: Message) -> list[int]:
        name = self.facts.names[ROLES.index(message.role)]
        first, *rest = (self.facts.space * bool(name) + message.content).split(IMAGE)
        ids = self.text_behind(first, not name)
        return sum((self.image_ids + self.text_behind(text, True) for text in rest), ids)
