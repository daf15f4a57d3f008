"""vocab.json and merges.txt -> the tokenizer that Qwen2Tokenizer of transformers makes of them.

    vocab.json, merges.txt                     the byte-level BPE
    tokenizer_config.json, added_tokens.json   the class, and the added tokens with their ids

The two files do not say where text is split before it is merged: that is code, another for each
class. Only Qwen2's is known here; others (SmolLM2's splits numbers into digits) are refused.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models

from extras.convert.tiktoken import byte_level_bpe
from model.pretrained.files import read_json

CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
           "mask_token", "additional_special_tokens", "extra_special_tokens")


def read_vocab_merges(directory: Path) -> Tokenizer:
    """ValueError: another class, or files that are damaged or do not fit."""
    config, model = (read_json(path) if (path := directory / name).is_file() else {}
                     for name in ("tokenizer_config.json", "config.json"))
    kind = config.get("tokenizer_class") or (
        CLASSES[0] if model.get("model_type") in ("qwen2", "qwen3") else None)
    if kind not in CLASSES:
        raise ValueError(f"{directory} holds vocab.json and merges.txt and no tokenizer.json. They "
                         f"are read for a {CLASSES[0]} alone, and this is a {kind or 'class'} "
                         "whose way to split text is not known here: fetch tokenizer.json of the "
                         "same release")
    try:
        tokenizer = byte_level_bpe(*models.BPE.read_file(
            str(directory / "vocab.json"), str(directory / "merges.txt")))
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"{directory}: vocab.json and merges.txt cannot be read as a byte-level "
                         f"BPE: {error}; fetch them again") from error
    for number, token in sorted(added_tokens(directory, config).items()):
        tokenizer.add_tokens([token])
        if (actual := tokenizer.token_to_id(token.content)) != number:
            raise ValueError(f"{directory}: the added token {token.content!r} has the id {number}, "
                             f"but comes to be {actual} behind vocab.json; fetch both again")
    tokenizer.add_special_tokens(["<|endoftext|>"])  # the class has it in any case
    return tokenizer


def added_tokens(directory: Path, config: dict) -> dict[int, AddedToken]:
    if "added_tokens_decoder" in config:
        return {int(number): AddedToken(**facts)
                for number, facts in config["added_tokens_decoder"].items()}
    path, special = directory / "added_tokens.json", set()
    named = directory / "special_tokens_map.json"
    for facts in (config, read_json(named) if named.is_file() else {}):
        for value in [facts.get(name) or [] for name in SPECIAL]:
            special |= {each["content"] if isinstance(each, dict) else each
                        for each in (value if isinstance(value, list) else [value])}
    return {number: AddedToken(token, special=token in special, normalized=token not in special)
            for token, number in (read_json(path) if path.is_file() else {}).items()}
