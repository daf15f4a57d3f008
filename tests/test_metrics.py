"""Claims: each metric gives what its benchmark's authors count, by hand and by their own scorers
where these can be installed; intervals cover what they should, and a fall is told from none."""

import math

import numpy as np
import pytest

from evaluation.captions import cider, measure_captions, words
from evaluation.eval_samples import Question
from evaluation.metrics import (
    MENDED,
    chosen_letter,
    fall,
    figures,
    intervals,
    measure,
    vqa_accuracy,
    vqa_punctuation,
    vqa_words,
    yes_or_no,
)
from evaluation.short_answers import edit_distance


def asked(truth, *references, **options):
    return Question((), (), truth, "file:1", {}, references, options)


def all_figures(metric, answers, questions):
    return figures(metric, measure(metric, answers, questions).mean(0))


# ---------------------------------------------------------------- exact, VQA


def test_exact_is_the_same_text():
    found = measure("exact", [" Two.\n", "two.", ""], [asked("Two.")] * 3)
    assert found.tolist() == [[1], [0], [0]]


@pytest.mark.parametrize(("said", "expected"), [
    # Of ten people n said it. Among the nine that are left, n or n - 1 did; three are enough.
    (0, 0.0), (1, 9 / 10 / 3), (2, (8 * 2 / 3 + 2 * 1 / 3) / 10), (3, (7 * 1 + 3 * 2 / 3) / 10),
    (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_is_the_mean_over_the_sets_of_nine(said, expected):
    answers = ["red"] * said + ["blue"] * (10 - said)
    assert vqa_accuracy("red", answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("answer", "normal"), [
    # Each row by the published rules: a mark beside a space goes, otherwise becomes a space, goes
    # everywhere when a number has a comma; a period stays before a digit only; apostrophes stay.
    ("Red.", "red"), ("The red one", "red 1"), ("an apple", "apple"), ("None", "0"), ("ten", "10"),
    ("eleven", "eleven"), ("t-shirt", "t shirt"), ("t- shirt", "t shirt"), ("yes,no", "yes no"),
    ("yes, no", "yes no"), ("10,000", "10000"), ("10,000-5", "100005"), ("3.5", "3.5"),
    ("3.", "3"), ("a.b", "ab"), ("2:50 pm", "2:50 pm"), ("girl's", "girl's"), ("dont", "don't"),
    ("shes", "shes"), ("lets", "lets"), ("couldntve", "couldntve"), ("couldnt've", "couldn't've"),
    ("what?!", "what"), ("(left)", "left"), ("a\nb", "b"), ("left/right", "left right"),
    ("A man", "man"), ("somebody'd", "somebodyd"), ("  ", "")])
def test_vqa_normal_form_by_hand(answer, normal):
    assert vqa_words(vqa_punctuation(answer.replace("\n", " ").strip())) == normal


def test_vqa_contractions_are_the_published_ones():
    """Ones that are, and forms that the published list leaves alone."""
    for wrong, right in {"aint": "ain't", "hed": "he'd", "twas": "'twas", "yall'll": "y'all'll",
                         "y'allll": "y'all'll", "ow's'at": "'ow's'at", "oclock": "o'clock"}.items():
        assert MENDED[wrong] == right
    for left_alone in ("lets", "shes", "id", "im", "ive", "ill", "well", "were", "shell", "wed"):
        assert left_alone not in MENDED
    assert len(MENDED) == 114  # of the published 120, 6 have a capital or mend nothing


def test_truths_are_mended_as_published():
    """Punctuation of the truths goes only where people disagree, articles and case never."""
    assert vqa_accuracy("t shirt", ["t-shirt"] * 9 + ["cap"]) == 1
    assert vqa_accuracy("t shirt", ["t-shirt"] * 10) == 0
    assert vqa_accuracy("shirt", ["the shirt"] * 9 + ["cap"]) == 0
    assert vqa_accuracy("Shirt.", ["shirt"] * 10) == 1


def test_vqa_refuses_data_with_one_answer():
    with pytest.raises(ValueError, match="file:1: one true answer; .*--metric exact"):
        measure("vqa", ["red"], [asked("red")])


# ---------------------------------------------------------------- choice

OPTIONS = {"A": "on the book.", "B": "beneath the cat.", "C": "red", "D": "dark red"}


@pytest.mark.parametrize(("answer", "letter"), [
    # What MMStar's own scorer takes for a letter: first, behind "(", "option ", "the answer is ".
    ("B", "B"), ("b", "B"), ("(B) beneath", "B"), ("(b)", "B"), ("option B", "B"),
    ("The answer is B", "B"), ("the answer is b", "B"), ("B. beneath the cat", "B"),
    ("B: beneath the cat", "B"), ("B\n", "B"),
    # More ways of saying it.
    ("**B**", "B"), ("B beneath the cat", "B"), ("Answer: (C)", "C"), ("I take D here", "D"),
    ("It is not A. The answer is C.", "C"), ("答案是B", "B"), ("选C。", "C"), ("应该选择 D", "D"),
    ("C。", "C"), ("dark red", "D"), ("It is red.", "C"), ("a red or a blue one", "C"),
    ("Beneath the cat", "B"),
    # No letter, or not one alone: wrong, and counted as not found.
    ("", None), ("A cat", None), ("A or B?", None), ("I do not know", None),
    ("The answer is a cat", None), ("E", None), ("Because", None), ("Dogs", None)])
def test_letters(answer, letter):
    assert chosen_letter(answer, OPTIONS) == letter


def test_choice_counts_right_letters_and_found_ones():
    questions = [asked("B", **OPTIONS)] * 4
    assert all_figures("choice", ["B", "(B)", "C", "who knows"], questions) == {
        "accuracy": 0.5, "letter_found": 0.75}
    assert chosen_letter("J", {}) == "J", "without known options any letter will do"
    with pytest.raises(ValueError, match="file:1: .*'a cat' names none.*--metric exact"):
        measure("choice", ["B"], [asked("a cat", **OPTIONS)])


# ---------------------------------------------------------------- yes or no


@pytest.mark.parametrize(("answer", "found"), [
    ("Yes", "yes"), ("Yes, there is a dog.", "yes"), ("yes", "yes"), ("No", "no"),
    ("There is not a dog in it", "no"), ("Yes. There is no cat", "yes"), ("no\n", "no"),
    ("nothing", None), ("NO", None), ("", None), ("有。", "yes"), ("没有。", "no"), ("不是", "no"),
    ("是的", "yes")])
def test_yes_and_no_as_pope_reads_them(answer, found):
    assert yes_or_no(answer) == found


def test_pope_by_hand():
    answers = ["Yes", "Yes", "No", "No", "Yes", "a dog"]  # who does not say no, has said yes
    truths = ["yes", "no", "no", "yes", "yes", "no"]
    told = all_figures("yesno", answers, [asked(truth) for truth in truths])
    # tp 2, fp 2, tn 1, fn 1
    assert told == pytest.approx({"accuracy": 3 / 6, "precision": 2 / 4, "recall": 2 / 3,
                                  "f1": 2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3),
                                  "yes_ratio": 4 / 6, "unclear": 1 / 6})
    nobody = all_figures("yesno", ["No"], [asked("no")])
    assert nobody["precision"] == nobody["recall"] == nobody["f1"] == 0 and nobody["accuracy"] == 1
    with pytest.raises(ValueError, match="file:1: .*'red' is neither yes nor no"):
        measure("yesno", ["yes"], [asked("red")])


# ---------------------------------------------------------------- captions


def test_words_of_english_and_chinese():
    assert words("A man's T-shirt, isn't it? 3.5 m!") == [
        "a", "man", "'s", "t-shirt", "is", "n't", "it", "3.5", "m"]
    assert words("一只猫, 2 dogs") == ["一", "只", "猫", "2", "dogs"]
    assert words("I cannot see black & white") == ["i", "can", "not", "see", "black", "&", "white"]
    assert words("It’s") == ["it", "'s"] and words("?!") == []


def test_cider_by_hand():
    """Two pictures. Every n-gram stands in the references of one, so it weighs log 2 each time,
    but for "a", which stands in both and weighs nothing."""
    captions = [["a", "cat"], ["dog"]]
    references = [[["a", "cat"], ["cat"]], [["a", "dog"]]]
    # Picture 1, first reference: all that weighs is equal: cosine 1 for one word (cat) and for
    # two (a cat); none is longer. Second: cosine 1 for one word, 0 for two; a pair less.
    first = 10 * ((1 + 1) / 4 + (1 + 0) / 4 * math.exp(-1 / 72)) / 2
    second = 10 * (1 / 4 * math.exp(-1 / 72))
    assert cider(captions, references) == pytest.approx([first, second], abs=1e-12)
    assert cider([["a"]], [[["a"]]]) == [0.0], "one picture alone: nothing is rare"


def test_bleu_by_hand():
    """One caption of 5 words against one of 6: 4 words, 3 pairs, 2 threes, 1 four are right."""
    told = all_figures("caption", ["a cat on the bed"], [asked("", "a cat on the red sofa")])
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 6 / 5)
    assert told["bleu4"] == pytest.approx(expected, abs=1e-12)


REFERENCES = [("A man riding a bike on a street.", "Someone rides a bicycle down the road",
               "a man on a bike"), ("Two dogs play on the grass.", "two dogs are playing"),
              ("一只猫在沙发上。", "沙发上有一只黑猫"), ("A red bus.",)]
CAPTIONS = ["a man riding a red bike on the street", "A dog on the grass", "一只黑猫在沙发上", ""]


def test_captions_equal_the_published_scorers():
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu
    theirs = pytest.importorskip("pycocoevalcap.cider.cider").Cider
    truth = {i: [" ".join(words(text)) for text in texts] for i, texts in enumerate(REFERENCES)}
    found = {i: [" ".join(words(text))] for i, text in enumerate(CAPTIONS)}
    rows = np.array(measure_captions(CAPTIONS, [asked("", *texts) for texts in REFERENCES]))
    mean, each = theirs().compute_score(truth, found)
    np.testing.assert_allclose(rows[:, 0], each, atol=1e-9)
    assert each[0] > 1 and each[3] == 0
    assert figures("caption", rows.mean(0))["cider"] == pytest.approx(mean, abs=1e-9)
    expected = bleu(4).compute_score(truth, found, verbose=0)[0][3]
    assert expected > 0.1
    assert figures("caption", rows.mean(0))["bleu4"] == pytest.approx(expected, abs=1e-6)


def test_bleu_equals_sacrebleu_over_the_whole_corpus():
    metrics = pytest.importorskip("sacrebleu.metrics")
    most = max(map(len, REFERENCES))
    streams = [[" ".join(words(texts[n])) if n < len(texts) else None for texts in REFERENCES]
               for n in range(most)]
    expected = metrics.BLEU(tokenize="none", smooth_method="none").corpus_score(
        [" ".join(words(text)) for text in CAPTIONS], streams).score / 100
    rows = np.array(measure_captions(CAPTIONS, [asked("", *texts) for texts in REFERENCES]))
    assert figures("caption", rows.mean(0))["bleu4"] == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------- chance


def test_intervals_cover_the_truth_as_often_as_they_say():
    """80 drawings of 100 questions that are right with chance 0.7: about 95 % hold 0.7."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(80):
        rows = (rng.random((100, 1)) < 0.7).astype(float)
        low, high = intervals("exact", rows, resamples=200)["exact"]
        assert low <= rows.mean() <= high
        held += low <= 0.7 <= high
    assert held >= 0.88 * 80  # of 76; 70 are 3 standard deviations below


def test_an_interval_is_the_same_each_time_and_as_wide_as_theory_says():
    rows = np.array([[1.0]] * 300 + [[0.0]] * 100)
    low, high = intervals("exact", rows)["exact"]
    assert (low, high) == intervals("exact", rows)["exact"]
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.75 * 0.25 / 400), rel=0.1)
    assert intervals("exact", np.ones((9, 1)))["exact"] == (1, 1)


def test_figures_that_are_no_means_have_intervals_too():
    questions = [asked("yes"), asked("no")] * 50
    rows = measure("yesno", ["Yes", "No", "Yes", "Yes"] * 25, questions)
    told, between = figures("yesno", rows.mean(0)), intervals("yesno", rows, resamples=200)
    assert told["f1"] == pytest.approx(0.8) and between.keys() == told.keys()
    for name, (low, high) in between.items():
        assert low <= told[name] <= high
        assert (high - low > 0.05) == (name not in ("recall", "unclear")), name


def test_a_fall_is_told_from_none():
    rng = np.random.default_rng(2)
    rows = (rng.random((200, 1)) < 0.8).astype(float)
    value, low, high = fall(rows, (rng.random((200, 1)) < 0.5).astype(float))
    assert 0 < low < value < high
    value, low, high = fall(rows, rng.permutation(rows))  # the same score, of other questions
    assert value == 0 and low < 0 < high
    assert fall(rows, rows) == (0, 0, 0)


# ---------------------------------------------------------------- several accepted answers


def test_any_accepted_answer_is_exact():
    questions = [asked("1/8/93", "1/8/93", "8 Jan 93")] * 4
    found = measure("exact", ["1/8/93", " 8 Jan 93\n", "8 jan 93", "1/8/93 8 Jan 93"], questions)
    assert found.tolist() == [[1], [1], [0], [0]]


@pytest.mark.parametrize("truths", [("1/8/93", "8 Jan 93"), ("a", "b", "c", "d", "e"),
                                    ("two", "2", "Two dogs.", "the dogs", "dog's")])
def test_fewer_than_ten_answers_are_no_poll(truths):
    """Each is right by VQA's normal form, not a third of it."""
    for truth in truths:
        assert measure("vqa", [truth], [asked(truths[0], *truths)]).tolist() == [[1]]
    assert measure("vqa", ["else"], [asked(truths[0], *truths)]).tolist() == [[0]]


@pytest.mark.parametrize(("answer", "truths", "score"), [
    ("Nokia", ["nokia"], 1), ("nokia\n", ["Nokia"], 1), ("new  York", ["New York"], 1),
    ("nokla", ["nokia"], 4 / 5), ("noki", ["nokia", "nokias"], 4 / 5),
    ("nokia", ["nokias", "noki"], 5 / 6), ("ab", ["abcd"], 0.5), ("abx", ["abcdefg"], 0),
    ("ab", ["abcde"], 0), ("xyz", ["nokia"], 0), ("", ["nokia"], 0), ("kitten", ["sitting"], 4 / 7),
    ("flaw", ["lawn"], 0.5), ("no", ["a long answer with no end"], 0),
    ("诺基亚", ["诺基业"], 2 / 3)])
def test_anls_by_hand(answer, truths, score):
    """1 - edits / length of the longer; at 0.5 it still counts, as in the published evaluation."""
    found = measure("anls", [answer], [asked(truths[0], *truths)])
    assert found.tolist() == [[pytest.approx(score, abs=1e-12)]]


def test_edit_distance_against_its_definition():
    def slow(one, other):
        if not one or not other:
            return len(one) + len(other)
        return min(slow(one[1:], other) + 1, slow(one, other[1:]) + 1,
                   slow(one[1:], other[1:]) + (one[0] != other[0]))

    rng = np.random.default_rng(0)
    for _ in range(100):
        one, other = ("".join(rng.choice(list("abc"), rng.integers(7))) for _ in range(2))
        assert edit_distance(one, other) == slow(one, other), (one, other)


@pytest.mark.parametrize(("answer", "truth", "right"), [
    ("104", "100", 1), ("95", "100", 1), ("105", "100", 1), ("105.1", "100", 0), ("94", "100", 0),
    ("-98", "-100", 1), ("98", "-100", 0), ("0.51", "50%", 1), ("50%", "0.5", 1), ("50", "50%", 0),
    ("2019", "2019", 1), ("Red", "red", 1), ("red.", "red", 0), ("0", "0", 1), ("0.01", "0", 0),
    ("100 km", "100", 0), ("1,000", "1000", 0), ("1,000", "1,000", 1), ("nan", "nan", 1),
    ("inf", "5", 0), ("", "5", 0), ("%", "%", 1), (" 7\n", "7", 1)])
def test_relaxed_accuracy_by_hand(answer, truth, right):
    assert measure("relaxed", [answer], [asked(truth)]).tolist() == [[right]]
    assert measure("relaxed", [answer], [asked("x", "no", truth)]).tolist() == [[right]]


def test_gqa_is_exact_but_for_capitals_and_the_last_period():
    found = measure("gqa", ["Red.", "red", "dark red", "a red"], [asked("red")] * 4)
    assert found.tolist() == [[1], [1], [0], [0]]


def test_every_metric_calls_the_truth_right():
    for metric, truth in (("exact", "red"), ("gqa", "red"), ("anls", "red"), ("relaxed", "7")):
        assert list(all_figures(metric, [truth], [asked(truth)]).values()) == [1]
