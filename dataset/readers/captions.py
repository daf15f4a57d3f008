"""A caption has no question, so one is put in front of it, in the caption's language.

    {"caption": one text, or several of one image} -> read_captions -> two turns
"""

import random
import re

from dataset.readers.bad_sample import shown

PROMPTS = {
    "en": ("Describe this picture in one sentence.", "What is in this picture?",
           "What does the picture show? Answer briefly.", "Write a caption for this picture."),
    "zh": ("请用一句话描述这张图片。", "这张图片里有什么？", "图中是怎样的场景？请简单说明。",
           "请为这张图片写一句说明。"),
    "ja": ("この画像を一文で説明してください。", "この画像には何が写っていますか。"),
    "ko": ("이 사진을 한 문장으로 설명해 주세요.", "이 사진에는 무엇이 있나요?"),
}
# Japanese has Chinese letters as well, so its own are looked for first.
LETTERS = {"ja": re.compile("[\u3041-\u30ff]"), "ko": re.compile("[\uac00-\ud7a3]"),
           "zh": re.compile("[\u4e00-\u9fff]")}


def read_captions(record: dict, index: int, caption_index: int) -> list:
    """One prompt and one of the captions. The first of each is random but fixed by `index`; from
    there `caption_index` goes round: n captions are each shown once by n values of it in a row."""
    captions = record["caption"]
    texts = [captions] if isinstance(captions, str) else captions
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"'caption' is {shown(captions)}; expected a text or several")
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise ValueError("'caption' holds no text; remove the entry or write one")
    rng = random.Random(index)
    caption = texts[(rng.randrange(len(texts)) + caption_index) % len(texts)]
    prompts = PROMPTS[language_of(caption)]
    # One further with each round, or four captions would keep one of four prompts each.
    further = caption_index + caption_index // len(texts)
    prompt = prompts[(rng.randrange(len(prompts)) + further) % len(prompts)]
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": caption}]


def language_of(text: str) -> str:
    return next((name for name, letters in LETTERS.items() if letters.search(text)), "en")
