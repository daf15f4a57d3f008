"""Text <-> token ids: tokenizer.json or qwen.tiktoken -> one small class.

    text -> Tokenizer.encode -> ids -> (chat.py puts the special tokens around them)

A special token is asked for by name with `token_id`, and only chat.py does that. Text never
turns into one: a user who types "<|im_end|>" has typed ten characters, not ended the turn.
"""

from pathlib import Path

import tokenizers

from extras.convert.tiktoken import read_tiktoken

# Small files that stand beside tokenizer.json in a public directory and say how other engines
# should use it. We do not read them, but a saved model without them would be hard to serve.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "chat_template.jinja")


class Tokenizer:
    def __init__(self, backend: tokenizers.Tokenizer, companions: dict[str, bytes] | None = None):
        self.backend = backend
        self.companions = companions or {}
        self.backend.no_truncation()  # some published files ask for 512 tokens and padding:
        self.backend.no_padding()  # here only ChatTemplate.fit cuts, and only batching pads
        self.backend.encode_special_tokens = True
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def from_directory(cls, path) -> "Tokenizer":
        path = Path(path)
        if (path / "tokenizer.json").is_file():
            backend = read_json(path / "tokenizer.json")
        elif (path / "qwen.tiktoken").is_file():
            backend = read_tiktoken(path / "qwen.tiktoken")
        else:
            raise FileNotFoundError(
                f"{path} holds neither tokenizer.json nor qwen.tiktoken; "
                "give the directory of a language model, or put one of the two there"
            )
        files = [path / name for name in COMPANIONS if (path / name).is_file()]
        return cls(backend, {file.name: file.read_bytes() for file in files})

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: nothing is put in front or behind, no special token comes out."""
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
        number = self.backend.token_to_id(token)
        if number is None:
            raise KeyError(
                f"the tokenizer has no token {token!r} among its {self.vocab_size}; "
                "use the tokenizer of a chat model"
            )
        return number

    def save(self, directory) -> None:
        """Write tokenizer.json, whatever was read, and the small files that came with it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        for name, content in self.companions.items():
            (directory / name).write_bytes(content)

    def __getstate__(self):
        return {"backend": self.backend, "companions": self.companions}

    def __setstate__(self, state):
        # A loader's worker process gets a pickled copy, and pickling the backend forgets
        # encode_special_tokens: without this, a worker would read "<|im_end|>" as the token.
        self.__init__(state["backend"], state["companions"])


def read_json(file: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
        if not backend.get_vocab_size():
            raise ValueError("it holds no token")
        return backend
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"{file} cannot be read as a tokenizer.json: {error}; fetch it again"
                         ) from error
