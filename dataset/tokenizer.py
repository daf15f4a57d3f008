"""Text <-> token ids: tokenizer.json -> one small class.

    text -> Tokenizer.encode -> ids -> (chat.py puts the special tokens around them)

Only chat.py names special tokens, with `token_id`. Text never turns into one: a user who types
"<|im_end|>" has typed ten characters, not ended the turn.
"""

from pathlib import Path

import tokenizers

from dataset.readers.tokenizer_file import read_backend

# Small files that stand beside tokenizer.json in a public directory and say how other engines
# should use it. Not read here, but a saved model without them would be hard to serve.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "chat_template.jinja")


class Tokenizer:
    def __init__(self, backend: tokenizers.Tokenizer, companions: dict[str, bytes] | None = None):
        self.backend, self.companions = backend, companions or {}
        self.backend.no_truncation()  # some published files ask for 512 tokens and padding:
        self.backend.no_padding()  # here only chat.py truncates, and only batching.py pads
        self.backend.encode_special_tokens = True
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_directory(cls, path) -> "Tokenizer":
        path = Path(path)
        files = [path / name for name in COMPANIONS if (path / name).is_file()]
        return cls(read_backend(path), {file.name: file.read_bytes() for file in files})

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: nothing is added around it, no special token comes out."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids) -> str:
        """Text of ids, special tokens written out. Ids past the vocabulary give no text."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def has(self, token: str) -> bool:
        return self.backend.token_to_id(token) is not None

    def is_special(self, token: str) -> bool:
        """Whether it is a token that `encode` never gives, whatever is typed. "@" is not one, nor
        is "<think>": the tokenizers that hold it let text hold it too."""
        added = self.backend.get_added_tokens_decoder().get(self.backend.token_to_id(token))
        return added is not None and added.special

    def token_id(self, token: str) -> int:
        if not self.has(token):
            raise KeyError(f"the tokenizer has no token {token!r} among its {self.vocab_size}; "
                           "use the tokenizer of a chat model")
        return self.backend.token_to_id(token)

    def save(self, directory) -> None:
        """Write tokenizer.json and the small files that came with it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        for name, content in self.companions.items():
            (directory / name).write_bytes(content)

    def __reduce__(self):
        # A loader's worker process gets a pickled copy, and pickling the backend forgets
        # encode_special_tokens: without this, a worker would read "<|im_end|>" as the token.
        return Tokenizer, (self.backend, self.companions)
