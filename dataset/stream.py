"""Token ids one at a time -> pieces of text as they come, never half a character.

    generate -> ids -> TextStream.add -> text for the screen        (eval.py)

A byte-level tokenizer cuts one Chinese character or emoji into up to four tokens. Decoded too
early, the first of them shows as a replacement sign; so the end of the text waits while it could
still become a character.
"""

HALF = "\ufffd"  # what decoding puts in the place of bytes that are no character


class TextStream:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids = []
        self.told = 0  # characters given out already

    def add(self, token: int) -> str:
        """Take in one token, give out what is certain by now: perhaps nothing."""
        self.ids.append(token)
        return self._new(self.tokenizer.decode(self.ids).rstrip(HALF))

    def end(self) -> str:
        """What was held back and can no longer be completed."""
        return self._new(self.tokenizer.decode(self.ids))

    def _new(self, text: str) -> str:
        # All ids are decoded anew each time: some tokenizers write a token in the middle of a
        # text differently from the same token at its start.
        piece = text[self.told:]
        self.told = max(self.told, len(text))
        return piece
