"""The tokenizer of a public directory -> the backend of the tokenizers library."""

from pathlib import Path

import tokenizers


def read_backend(directory: Path) -> tokenizers.Tokenizer:
    """Read tokenizer.json, or vocab.json and merges.txt. Raises FileNotFoundError, or ValueError
    for a damaged file."""
    file = directory / "tokenizer.json"
    pair = [directory / name for name in ("vocab.json", "merges.txt")]
    if not file.is_file() and all(path.is_file() for path in pair):
        try:
            from extras.convert.vocab_merges import read_vocab_merges  # here: older directories
        except ModuleNotFoundError as error:
            if not error.name.startswith("extras"):
                raise
        else:
            return read_vocab_merges(directory)
    if not file.is_file():
        raise FileNotFoundError(f"{directory} holds no tokenizer.json; give the directory of a "
                                "language model (python -m extras.convert DIR OUT makes one of a "
                                "qwen.tiktoken; extras/ reads vocab.json and merges.txt)")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
        if not backend.get_vocab_size():
            raise ValueError("it holds no token")
        return backend
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"{file} cannot be read as a tokenizer.json: {error}; fetch it again"
                         ) from error
