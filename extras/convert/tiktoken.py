"""qwen.tiktoken -> a tokenizer equal to the tokenizer.json published with Qwen2 and later, or to
the one that the first Qwen (Qwen-7B) brings as Python code.

The file has one token a line: its bytes in base64, then its rank, which is also its id. Byte-pair
encoding wants merges instead: which two tokens join to make each one. They are not in the file
but follow from it: a token was made by the last merge of its own bytes, so encoding those bytes
with the earlier ranks alone leaves exactly the two halves.

Not in the file either are the special tokens, whose ids follow the last rank. Both generations
read the same file and differ in these: 151646 is <|extra_0|> in Qwen-7B and <|object_ref_start|>
since Qwen2. The model's own config.json beside the file says which it is.
"""

import base64
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from model.pretrained.files import read_json

# Qwen2 and later, in this order behind the 151,643 ranks: <|im_start|> is 151644, <|image_pad|>
# 151655.
SPECIAL_TOKENS = """
    <|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
    <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
    <|image_pad|> <|video_pad|>""".split()
# Single tokens too, but text may hold them: Qwen publishes these as "not special".
TEXT_TOKENS = """
    <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|>
    <|file_sep|> <tool_response> </tool_response> <think> </think>""".split()
# The first Qwen: 205 spare ones, to give a meaning to. <|extra_0|> is 151646.
FIRST_QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>",
                     *(f"<|extra_{number}|>" for number in range(205))]
# Merges never cross the borders that this pattern draws: words with the one character before
# them, single digits, punctuation, line breaks, spaces.
PIECES = "|".join((
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"))


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge made this one. ValueError: no merges of earlier ones make it."""
    last = ranks[token]
    parts = [token[i:i + 1] for i in range(len(token))]
    pairs = [ranks.get(a + b, last) for a, b in zip(parts, parts[1:])]
    while len(parts) > 2:
        first = min(pairs)
        if first >= last:
            raise ValueError(f"no earlier tokens join to {token!r}, rank {last}")
        i = pairs.index(first)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        del pairs[i]  # and of the others only its two neighbours are new pairs now
        for near in range(max(i - 1, 0), min(i + 1, len(pairs))):
            pairs[near] = ranks.get(parts[near] + parts[near + 1], last)
    return parts


def is_first_qwen(directory: Path) -> bool:
    """Whether qwen.tiktoken in this directory is that of Qwen-7B, by the files beside it."""
    for name, key, value in (("config.json", "model_type", "qwen"),
                             ("tokenizer_config.json", "tokenizer_class", "QWenTokenizer")):
        file = directory / name
        if file.is_file() and read_json(file).get(key) == value:
            return True
    return False


def byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """As both generations split text, without added tokens."""
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False,
                                 trim_offsets=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_tiktoken(path: Path) -> Tokenizer:
    ranks = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: expected 'base64 rank', got {line[:60]!r}; "
                                 "the file is damaged, fetch it again") from error
    lost = set(range(len(ranks))) - set(ranks.values())
    if lost:
        raise ValueError(f"{path}: rank {min(lost)} is missing; fetch the file again")
    alphabet = dict(enumerate(byte_alphabet()))
    # latin-1 has a character for each byte, its own number: a way to replace bytes quickly.
    written = {token: token.decode("latin-1").translate(alphabet) for token in ranks}
    try:
        merges = [tuple(written[half] for half in halves(token, ranks))
                  for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    except ValueError as error:
        raise ValueError(f"{path}: {error}; fetch the file again") from error
    except KeyError as error:
        raise ValueError(f"{path}: no token for the byte {error}; fetch the file again") from error
    tokenizer = byte_level_bpe({written[token]: rank for token, rank in ranks.items()}, merges)
    special, text = ((FIRST_QWEN_TOKENS, []) if is_first_qwen(path.parent)
                     else (SPECIAL_TOKENS, TEXT_TOKENS))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in text])
    return tokenizer
