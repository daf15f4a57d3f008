"""What a chat template writes itself -> token ids, once for all rows.

    ChatFamily, Tokenizer -> borders_of -> {(role, next role): ids between their contents}
    text that follows text -> TextBehind -> ids
"""

import re

from dataset.families import ChatFamily


class TextBehind:
    """SentencePiece begins a text with a space, as if it were the first of all. Behind other text,
    and in some tokenizers behind a token, it must not: there it is encoded behind a line break,
    whose ids are cut off again. mark: a token."""

    def __init__(self, tokenizer, mark: str):
        self.tokenizer, self.newline = tokenizer, tokenizer.encode("\n")
        self.adds_space = tokenizer.encode("\na")[len(self.newline):] != tokenizer.encode("a")
        self.behind_tokens = as_one_text(tokenizer, mark + "a")[1:] != tokenizer.encode("a")

    def __call__(self, text: str, behind_token: bool = False) -> list[int]:
        if self.adds_space and (self.behind_tokens or not behind_token):
            return self.tokenizer.encode("\n" + text)[len(self.newline):]
        return self.tokenizer.encode(text)


def as_one_text(tokenizer, text: str) -> list[int]:
    """Ids of a text in which special tokens are meant, as other engines encode a conversation."""
    tokenizer.backend.encode_special_tokens = False
    try:
        return tokenizer.encode(text)
    finally:
        tokenizer.backend.encode_special_tokens = True


def borders_of(family: ChatFamily, tokenizer, roles: tuple) -> dict[tuple, list[int]]:
    """(None, role): in front of a first turn; (role, None): behind a last one. The end token of an
    answer is not in them: it is learned."""
    question_end = family.question_end or family.end + family.after_end
    ends = {**dict.fromkeys(roles, question_end), None: family.begin,
            "assistant": family.after_end}
    headers = dict(zip(roles, map(family.header.format_map, (
        {"role": name} for name in family.names)))) | {None: ""}
    behind = TextBehind(tokenizer, family.end)

    def ids_of(text: str, last: str | None) -> list[int]:
        ids, behind_token = [], last == "assistant" or family.question_end is None
        for part in filter(None, re.split(r"(<[^<>]+>)", text)):
            if part in family.marks or tokenizer.is_special(part):
                ids.append(tokenizer.token_id(part))
                behind_token = True
            else:
                first = last is None and not ids
                ids += tokenizer.encode(part) if first else behind(part, behind_token)
                behind_token = False
        return ids

    return {(last, role): ids_of(end + header, last)
            for last, end in ends.items() for role, header in headers.items()}
