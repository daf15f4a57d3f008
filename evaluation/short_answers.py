"""Is a short answer right, by the rules of benchmarks that accept one answer or any of several.

    answer, question -> right or wrong, or how right it is: 0 to 1
"""

import math


def is_exact(answer: str, question) -> bool:
    return answer.strip() in map(str.strip, question.truths)


def is_exact_gqa(answer: str, question) -> bool:
    """GQA's truths are in small letters; LLaVA's script writes answers so before GQA's scores them.
    """
    return answer.strip().rstrip(".").lower() in [t.strip().lower() for t in question.truths]


def anls(answer: str, question) -> float:
    """Biten et al. 2019, as the evaluation of DocVQA and InfoVQA counts it: 1 - edit distance /
    length of the longer text, in small letters; 0 below 0.5; the best of the accepted answers."""
    said, *truths = (" ".join(text.lower().split()) for text in (answer, *question.truths))
    best = max(similarity(said, truth) for truth in truths)
    return best if best >= 0.5 else 0.0


def similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    if longest > 2 * min(len(one), len(other)):
        return 0.0  # below 0.5 in any case: do not count each edit of a long answer
    return 1 - edit_distance(one, other) / longest if longest else 1.0


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's, row by row of its table."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        above, row = row, [i]
        for j, its in enumerate(other):
            row.append(min(above[j] + (letter != its), above[j + 1] + 1, row[j] + 1))
    return row[-1]


def is_relaxed(answer: str, question) -> bool:
    """Masry et al. 2022 (ChartQA): a number within 5 % of the truth, else the same text."""
    return any(is_near(answer.strip().lower(), t.strip().lower()) for t in question.truths)


def is_near(answer: str, truth: str) -> bool:
    said, number = as_number(answer), as_number(truth)
    if said is None or not number:  # nothing but 0 itself is within 5 % of 0
        return answer == truth
    return abs(said - number) / abs(number) <= 0.05


def as_number(text: str) -> float | None:
    """"12.5", "40%" (0.4); with anything else beside it, it is a text, as published."""
    try:
        number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
