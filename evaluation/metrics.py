"""How good an answer is: the rules of the benchmarks, as pure functions.

    answers, questions -> measure -> rows (Q,S): what each question adds to the figures
    mean of the rows   -> figures -> {"accuracy": 0.8, "f1": 0.75, ...}
    rows               -> intervals, fall -> how far chance alone could move a figure

The first column of the rows is the question's own score, and its mean is the figure that heads a
report. All other figures are functions of the mean row too: so a resample of the questions gives
every one of them, F1 and BLEU included. METRICS, at the end, lists what there is.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from evaluation.captions import bleu4, measure_captions
from evaluation.short_answers import anls, is_exact, is_exact_gqa, is_relaxed

RESAMPLES, LEVEL = 1000, 0.95  # of the bootstrap; LEVEL: share of the resamples in an interval


@dataclass(frozen=True)
class Metric:
    title: str  # "exact answers to" so many questions
    measure: Callable  # answers, questions -> rows (Q,S)
    figures: Callable  # mean row (S,) -> {name: value}, the headline first
    # Said behind a question, so that the answer has the form that is read here: the words of LLaVA
    # 1.5 (Liu et al. 2023), which the data of many models repeat.
    suffix: str = ""
    unit: str = "%"
    stop_after_truth: bool = False  # an answer longer than the longest truth is wrong in any case


def measure(metric: str, answers: list[str], questions: list) -> np.ndarray:
    """-> (Q,S) float64, see above. Raises ValueError when a question has no truth of this kind."""
    rows = METRICS[metric].measure(answers, questions)
    return np.array(rows, float).reshape(len(answers), -1)


def figures(metric: str, mean) -> dict[str, float]:
    """mean (S,), of the rows of some questions -> the metric's figures, the headline first."""
    return METRICS[metric].figures([float(value) for value in mean])


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


# ---------------------------------------------------------------- chance


def intervals(metric: str, rows: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> dict:
    """{figure: (low, high)}: 95 % of the resamples of the questions lie between (Efron's
    percentile bootstrap). What other questions of the same kind would have given, roughly."""
    samples = [figures(metric, mean) for mean in resampled_means(rows, resamples, seed)]
    return {name: bounds([sample[name] for sample in samples]) for name in samples[0]}


def fall(rows: np.ndarray, control: np.ndarray, resamples: int = RESAMPLES, seed: int = 0):
    """The headline's fall from rows to control, of the same questions in the same order, with
    its interval: (fall, low, high). An interval that reaches 0 says: nothing was lost."""
    difference = rows[:, :1] - control[:, :1]  # paired, so that hard questions cancel
    means = [float(mean[0]) for mean in resampled_means(difference, resamples, seed)]
    return float(difference.mean()), *bounds(means)


def resampled_means(rows: np.ndarray, resamples: int, seed: int):
    """Draw as many questions as there are, with replacement -> the mean row of each draw."""
    rng, count = np.random.default_rng(seed), len(rows)
    for _ in range(resamples):
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        yield times @ rows / count


def bounds(values: list[float]) -> tuple[float, float]:
    outside = (1 - LEVEL) / 2
    low, high = np.quantile(values, [outside, 1 - outside])
    return float(low), float(high)


# ---------------------------------------------------------------- vqa


# The contractions that the published evaluation mends when an apostrophe is missing ("dont"). It
# has no entry for forms that would be other words without it (let's, she's), nor do we.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"""
MENDED = {form[:i] + form[i + 1:]: form for form in CONTRACTIONS.split()
          for i, letter in enumerate(form) if letter == "'"}
MENDED["somebody'd"] = "somebodyd"  # the other way round, as published
NUMBER_WORDS = {"none": "0", **{word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")  # but not that of 3.5


def vqa_row(answer: str, question) -> float:
    """Ten people were asked; fewer answers than ten are no poll, and each of them is accepted."""
    if len(question.truths) < 2:
        raise ValueError(f"{question.where}: one true answer; VQA accuracy needs several people's "
                         "(VQAv2 has ten). Score this with --metric exact.")
    if len(question.truths) < 10:
        return float(vqa_normal(answer) in map(vqa_normal, question.truths))
    return vqa_accuracy(answer, question.truths)


def vqa_accuracy(answer: str, truths) -> float:
    """Antol et al. 2015, as VQA's evaluation code counts it: of each set of all people but one
    the accuracy is min(those who said it / 3, 1); the mean over the sets."""
    answer = vqa_normal(answer)
    if len(set(truths)) > 1:  # the published answers are in normal form but for punctuation
        truths = [vqa_punctuation(truth) for truth in truths]
    said = sum(truth == answer for truth in truths)
    without_one_who_said_it, without_another = min((said - 1) / 3, 1), min(said / 3, 1)
    sets = said * without_one_who_said_it + (len(truths) - said) * without_another
    return sets / len(truths)


def vqa_normal(text: str) -> str:
    return vqa_words(vqa_punctuation(text.replace("\t", " ").replace("\n", " ").strip()))


def vqa_punctuation(text: str) -> str:
    """A mark beside a space goes, one between two letters becomes a space; where a number has a
    comma (10,000) all marks just go."""
    number = COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or number else " ")
    return PERIOD.sub("", out)


def vqa_words(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes mended."""
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(MENDED.get(word, word) for word in words if word not in ARTICLES)


# ---------------------------------------------------------------- choice


def choice_row(answer: str, question) -> tuple[bool, bool]:
    """-> right, a letter was found"""
    truth = chosen_letter(question.truth, question.options)
    if truth is None:
        raise ValueError(f"{question.where}: the true answer {question.truth[:60]!r} names none "
                         "of the options; this is no multiple choice, try --metric exact")
    letter = chosen_letter(answer, question.options)
    return letter == truth, letter is not None


def chosen_letter(answer: str, options: dict[str, str]) -> str | None:
    """The option that an answer means, or None. options: {"A": "a cat", ...}; {}: A to J, texts
    unknown. The first of these rules that finds one decides:

    1. the answer is a letter, or begins with one and a mark: "B", "b.", "(B) red", "**B**: red"
    2. the last "answer is B", "Answer: (B)", "option B"; in Chinese behind 答案 or 选
    3. one capital letter of an option stands alone, and no other: "I take B here"; an A before a
       word in small letters is an article
    4. the answer is the text of one option, or holds it and no other option's

    That is what MMStar's own scorer finds and more, but "A cat" is no A, as it is there.
    """
    letters, text = "".join(options) or "ABCDEFGHIJ", answer.strip()
    ends = r"""[.:,;)\]*"'、。：，）]|\s*$"""
    first = re.match(rf"""[(\[*"'\s（]*([{letters}])(?:{ends})""", text, re.I)
    if first:
        return first[1].upper()
    named = re.findall(
        rf"""(?:(?i:answer|option|choice)(?i:\s+is)?|答案|选项?|选择)[是为]?[\s:：(（*"']*"""
        rf"""([{letters}](?![\w'])|[{letters.lower()}](?={ends}))""", text)
    if named:
        return named[-1].upper()
    capitals = re.sub(r"\bA(?=\s+(?!or\b|and\b)[a-z])", "", text)
    alone = set(re.findall(rf"(?<![\w'])[{letters}](?![\w'])", capitals))
    if len(alone) == 1:
        return alone.pop()
    text, *texts = (each.casefold().strip().rstrip(".。 ") for each in (text, *options.values()))
    named = [(letter, option) for letter, option in zip(letters, texts) if option]
    matches = ([letter for letter, option in named if option == text]
               or [letter for letter, option in named if option in text])
    return matches[0] if len(matches) == 1 else None


# ---------------------------------------------------------------- yesno

NO, YES = {"No", "no", "not"}, {"Yes", "yes"}  # the words of POPE's scorer, in its spelling
NO_CHINESE, YES_CHINESE = re.compile("[不没否无]"), re.compile("[是有对]")


def yesno_row(answer: str, question) -> tuple:
    """-> right, true positive, false positive, false negative, neither yes nor no"""
    said, truth = yes_or_no(answer), yes_or_no(question.truth)
    if truth is None:
        raise ValueError(f"{question.where}: the true answer {question.truth[:60]!r} is neither "
                         "yes nor no; try --metric exact")
    yes, is_yes = said != "no", truth == "yes"  # who does not say no has said yes, as in POPE
    return yes == is_yes, yes and is_yes, yes and not is_yes, is_yes and not yes, said is None


def yes_or_no(answer: str) -> str | None:
    """Li et al. 2023: of the first sentence, commas taken out, "No", "no" or "not" makes it a no.
    Chinese by its own words. None: neither."""
    words = set(answer.split(".")[0].replace(",", "").split())
    first = answer.split("。")[0]
    if words & NO or NO_CHINESE.search(first):
        return "no"
    return "yes" if words & YES or YES_CHINESE.search(first) else None


def yesno_figures(mean: list[float]) -> dict[str, float]:
    right, tp, fp, fn, unclear = mean
    return {"accuracy": right, "precision": ratio(tp, tp + fp), "recall": ratio(tp, tp + fn),
            "f1": ratio(2 * tp, 2 * tp + fp + fn), "yes_ratio": tp + fp, "unclear": unclear}


# ---------------------------------------------------------------- all of them


def one_by_one(row: Callable) -> Callable:
    return lambda answers, questions: [row(*pair) for pair in zip(answers, questions)]


SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
METRICS = {
    # the same text as one accepted answer, but for white space at its two ends
    "exact": Metric("exact answers to", one_by_one(is_exact), lambda mean: {"exact": mean[0]},
                    stop_after_truth=True),
    # ten people were asked, and an answer that three of them gave is right
    "vqa": Metric("VQA accuracy on", one_by_one(vqa_row), lambda mean: {"vqa_accuracy": mean[0]},
                  SHORT, stop_after_truth=True),
    # the letter of a multiple choice (MMStar, MMBench, ScienceQA)
    "choice": Metric("right letters to", one_by_one(choice_row),
                     lambda mean: {"accuracy": mean[0], "letter_found": mean[1]}, LETTER),
    # POPE: also precision, recall, F1, and how often the answer is yes
    "yesno": Metric("right with yes or no on", one_by_one(yesno_row), yesno_figures, SHORT),
    # the same text as one accepted answer, in small letters and without a period at the end
    "gqa": Metric("exact answers (in any letter case) to", one_by_one(is_exact_gqa),
                  lambda mean: {"exact": mean[0]}, SHORT, stop_after_truth=True),
    # how alike the letters are (DocVQA, InfoVQA)
    "anls": Metric("ANLS on", one_by_one(anls), lambda mean: {"anls": mean[0]}, SHORT),
    # a number may be 5 % wrong (ChartQA)
    "relaxed": Metric("relaxed accuracy on", one_by_one(is_relaxed),
                      lambda mean: {"relaxed_accuracy": mean[0]}, SHORT),
    # COCO captions, in captions.py. CIDEr is no share: published figures are times 100, without %
    "caption": Metric("CIDEr of the captions to", measure_captions,
                      lambda mean: {"cider": mean[0], "bleu4": bleu4(mean[1:])}, unit=""),
}
