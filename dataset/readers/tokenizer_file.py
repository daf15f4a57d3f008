"""The tokenizer of a public directory -> the backend of the tokenizers library."""

from pathlib import Path

import tokenizers


def read_backend(directory: Path) -> tokenizers.Tokenizer:
    """Read tokenizer.json. Raises FileNotFoundError, or ValueError for a damaged file."""
    file = directory / "tokenizer.json"
    if not file.is_file() and (directory / "qwen.tiktoken").is_file():
        from extras.convert.tiktoken import read_tiktoken  # here: the first Qwen alone has it

        return read_tiktoken(directory / "qwen.tiktoken")
    if not file.is_file():
        raise FileNotFoundError(f"{directory} holds neither tokenizer.json nor qwen.tiktoken; give "
                                "the directory of a language model, or put one of the two there")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
        if not backend.get_vocab_size():
            raise ValueError("it holds no token")
        return backend
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"{file} cannot be read as a tokenizer.json: {error}; fetch it again"
                         ) from error
