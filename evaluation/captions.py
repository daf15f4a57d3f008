"""Captions against what people wrote: CIDEr and BLEU-4, in English words and Chinese characters.

    captions, references -> words -> cider (one score an image), BLEU's counts -> rows (Q,S)

BLEU comes from sacrebleu. CIDEr is written here: its only package, pycocoevalcap, weighs 104 MB
and had its last release in 2020; the tests compare with it. The published COCO figures cut words
with a Java program (Stanford's PTB tokenizer). `words` gives the same words without Java, but for
brackets, which that one turns into words (-lrb-), abbreviations ("mr." keeps its period there) and
slang ("gon na").
"""

import math
import re
from collections import Counter

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # of the penalty for another length, in words
# A Chinese character; a word, with hyphens, apostrophes and numbers (3.5) inside; else a mark.
WORD = re.compile("[\u3400-\u9fff\uf900-\ufaff]|&|[^\\W\u3400-\u9fff\uf900-\ufaff]+"
                  "(?:[-'.,/&][^\\W\u3400-\u9fff\uf900-\ufaff]+)*")
# Cut off: "don't" is do n't, "man's" is man 's, "cannot" is can not.
CLITIC = re.compile(r"(n't|'(?:s|re|ve|ll|d|m)|(?<=^can)not)$")


def words(text: str) -> list[str]:
    """Lower case, marks dropped, a Chinese character a word of its own."""
    parts = []
    for word in WORD.findall(text.lower().replace("\u2019", "'")):
        stem = CLITIC.sub("", word)
        parts += [part for part in (stem, word[len(stem):]) if part]
    return parts


def measure_captions(captions: list[str], questions: list) -> list[list[float]]:
    """-> (Q,11): CIDEr; BLEU's right n-grams and all n-grams, each of 1 to 4 words; the lengths of
    the caption and of the reference that is closest in length."""
    captions = [words(caption) for caption in captions]
    references = [[words(text) for text in question.truths] for question in questions]
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ValueError("captions are scored with the package sacrebleu, which is not here; pip "
                         "install -r requirements-extra.txt, or pip install sacrebleu") from error
    # Words are cut already. effective_order keeps it from warning about single sentences, and
    # has no part in the counts, which are all that is taken.
    bleu, rows = BLEU(tokenize="none", smooth_method="none", effective_order=True), []
    for score, caption, several in zip(cider(captions, references), captions, references):
        counted = bleu.sentence_score(" ".join(caption), [" ".join(text) for text in several])
        rows.append([score, *counted.counts, *counted.totals, counted.sys_len, counted.ref_len])
    return rows


def bleu4(mean) -> float:
    """BLEU-4 (Papineni et al. 2002), 0 to 1, of the means of measure_captions' last ten columns:
    it is a function of the sums over all captions, and a common factor does not change it."""
    *counts, length, reference = mean
    right, whole = counts[:ORDERS], counts[ORDERS:]
    if min(right) <= 0:
        return 0.0
    precision = math.prod(r / w for r, w in zip(right, whole)) ** (1 / ORDERS)
    return precision * min(1.0, math.exp(1 - reference / length))


def cider(captions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    """CIDEr-D of each image (Vedantam, Zitnick, Parikh 2015), 0 to 10; published figures are
    the mean times 100.

    N-grams are vectors weighted by how rare they are: log(images / images whose references
    have it). The cosine to each reference, a count no higher than the reference's own, times a
    penalty for another length; the mean over orders and references, times 10. With one image
    alone nothing is rare, and all is 0.
    """
    rarity, images = Counter(), math.log(len(captions)) if captions else 0.0
    for several in references:
        rarity.update({gram for text in several for gram in grams(text)})

    def vectors(text: list[str]) -> list[dict]:
        by_order = [{} for _ in range(ORDERS)]
        for gram, count in grams(text).items():
            by_order[len(gram) - 1][gram] = count * (images - math.log(max(1, rarity[gram])))
        return by_order

    return [10 * sum(similarity(vectors(caption), vectors(text), caption, text)
                     for text in several) / len(several)
            for caption, several in zip(captions, references)]


def similarity(ours: list[dict], theirs: list[dict], caption: list, reference: list) -> float:
    """Of a caption and one reference, 0 to 1: the mean over the orders of n-grams."""
    # The published code counts pairs of words where the paper speaks of length.
    longer = max(len(caption) - 1, 0) - max(len(reference) - 1, 0)
    cosines = 0.0
    for a, b in zip(ours, theirs):
        norms = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
        if norms:
            shared = sum(min(weight, b[gram]) * b[gram] for gram, weight in a.items() if gram in b)
            cosines += shared / norms
    return cosines / ORDERS * math.exp(-longer ** 2 / (2 * SIGMA ** 2))


def grams(text: list[str]) -> Counter:
    return Counter(tuple(text[i:i + n]) for n in range(1, ORDERS + 1)
                   for i in range(len(text) - n + 1))
