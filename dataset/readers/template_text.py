"""What a chat template writes itself -> token ids, once for all rows.

    ChatFamily, Tokenizer -> borders_of -> {(role, next role): ids between their contents}
    text that follows text -> TextBehind -> ids
"""

import re

from dataset.families import ChatFamily


class TextBehind:
    """SentencePiece begins a text with a space, as if it were the first of all. Behind other text
    it must not: there it is encoded behind a line break, whose ids are cut off again."""

    def __init__(self, tokenizer):
        self.tokenizer, self.newline = tokenizer, tokenizer.encode("\n")
        self.adds_space = tokenizer.encode("\na")[len(self.newline):] != tokenizer.encode("a")

    def __call__(self, text: str) -> list[int]:
        if self.adds_space:
            return self.tokenizer.encode("\n" + text)[len(self.newline):]
        return self.tokenizer.encode(text)


def borders_of(family: ChatFamily, tokenizer, roles: tuple) -> dict[tuple, list[int]]:
    """(None, role): in front of a first turn; (role, None): behind a last one. The end token of an
    answer is not in them: it is learned."""
    question_end = family.question_end or family.end + family.after_end
    ends = {**dict.fromkeys(roles, question_end), None: family.begin,
            "assistant": family.after_end}
    headers = dict(zip(roles, map(family.header.format_map, (
        {"role": name} for name in family.names)))) | {None: ""}
    behind = TextBehind(tokenizer)

    def ids_of(text: str, follows_text: bool) -> list[int]:
        ids = []
        for part in filter(None, re.split(r"(<[^<>]+>)", text)):
            if part in family.marks or tokenizer.is_special(part):
                ids.append(tokenizer.token_id(part))
                follows_text = False
            else:
                ids += behind(part) if follows_text else tokenizer.encode(part)
                follows_text = True
        return ids

    return {(last, role): ids_of(end + header, last in roles and end == family.question_end)
            for last, end in ends.items() for role, header in headers.items()}
