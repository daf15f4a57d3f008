"""One record of a benchmark -> Question, each kind of record by one function.

    a dict, from JSON or Parquet, and its images -> question_of(metric, ...) -> Question

Data comes from strangers: every value may be of any type. What cannot be a question raises
BadSample with its place.
"""

import re
from collections import Counter

from dataset.chat import IMAGE, Message
from dataset.sample import (
    CHINESE,
    PROMPTS,
    TURNS,
    BadSample,
    picture_key,
    refuse_mark,
    refuse_unread,
    shown,
    texts_in,
)
from evaluation.eval_samples import Question

LETTERS = "ABCDEFGHIJ"
# "Options: A: on the book., B: beneath the cat." -> where each option begins
OPTION = re.compile(r"(?:(?<=[\s,;])|^)\(?([A-J])[:.)]\s")
YES_NO = ("yes", "no")
# What is read of a record beside its image, by metric; a choice's options: see question_of.
READ = {"vqa": ("question", "answers"), "caption": ("caption",),
        "choice": ("question", "answer", "hint"), "yesno": ("question", "answer", "text", "label"),
        "exact": ("question", "answer")}
SHOWN = ("question", "text", "hint", "choices", *LETTERS)  # those of them that the model reads


def metric_of(record: dict) -> str | None:
    """By the keys of a record, and where these leave it open by what stands there."""
    if {*TURNS, "texts", "prompt"} & record.keys():  # a conversation, whatever else stands there
        return None
    if {"text", "label"} <= record.keys():
        return "yesno"
    if "caption" in record:
        return "caption"
    if "question" not in record:
        return None
    if "answers" in record:
        return "vqa"
    if "choices" in record or {"A", "B"} <= record.keys():
        return "choice"
    if "answer" not in record:
        return None
    if len(options_in(str(record["question"]))) > 1:
        return "choice"
    return "yesno" if str(record["answer"]).strip().lower() in YES_NO else "exact"


def question_of(metric: str, record: dict, images: tuple, where: str, tags: dict,
                suffix: str) -> Question:
    """A record that is scored by metric -> its question. BadSample: it cannot be one, or a key that
    is not read seems to hold its image or its options."""
    keys = [*READ[metric], picture_key(record)]
    if metric == "choice":
        keys += ["choices"] if isinstance(record.get("choices"), list) else LETTERS
    text = "\n".join(text for key in keys if key in SHOWN for text in texts_in(record.get(key)))
    refuse_unread(record, keys, where, images, text)
    if IMAGE in text and not images:
        raise BadSample(where, f"the question has {IMAGE}, and there is no image; expected it "
                               "under 'image'")
    refuse_mark(text, where, images)
    make = {"caption": caption_question, "choice": choice_question,
            "vqa": vqa_question}.get(metric, plain_question)
    return make(record, images, where, tags, suffix)


def tags_of(record: dict) -> dict[str, str]:
    kind = record.get("category") or record.get("answer_type")
    return {"kind": kind} if isinstance(kind, str) and kind.isprintable() else {}


def ask(question: str, images: tuple, suffix: str) -> tuple[Message]:
    text = f"{IMAGE}\n" * len(images) + question.strip() + ("\n" + suffix if suffix else "")
    return (Message("user", text),)


def text_of(record: dict, key: str, where: str) -> str:
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        raise BadSample(where, f"{key!r} is {shown(text)}; expected a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half a character, "\ud83d" in JSON
        raise BadSample(where, f"{key!r} is no text: {error}") from error
    return text.replace(IMAGE, "").strip()  # the image is put in front of the question


def plain_question(record, images, where, tags, suffix) -> Question:
    """{"question": ..., "answer": ...}, or as POPE says it {"text": ..., "label": ...}."""
    question, truth = ("text", "label") if "label" in record else ("question", "answer")
    return Question(ask(text_of(record, question, where), images, suffix), images,
                    text_of(record, truth, where), where, tags)


def vqa_question(record, images, where, tags, suffix) -> Question:
    """answers: [{"answer": "yes", ...}, ...] or ["yes", ...]; shown as the truth: the commonest."""
    answers = record.get("answers")
    if isinstance(answers, list):
        answers = [a.get("answer") if isinstance(a, dict) else a for a in answers]
    if not isinstance(answers, list) or not answers or not all(
            isinstance(answer, str) for answer in answers):
        raise BadSample(where, f"'answers' is {shown(record.get('answers'))}; expected a list of "
                               "texts, or of objects with an 'answer'")
    return Question(ask(text_of(record, "question", where), images, suffix), images,
                    Counter(answers).most_common(1)[0][0], where, tags, tuple(answers))


def caption_question(record, images, where, tags, suffix) -> Question:
    captions = record.get("caption")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions or not all(
            isinstance(text, str) and text.strip() for text in captions):
        raise BadSample(where, f"'caption' is {shown(captions)}; expected a text or several")
    if not images:
        raise BadSample(where, "a caption without an image")
    captions = tuple(text.strip() for text in captions)
    prompt = PROMPTS["zh" if CHINESE.search(captions[0]) else "en"][0]
    return Question(ask(prompt, images, suffix), images, captions[0], where, tags, captions)


def choice_question(record, images, where, tags, suffix) -> Question:
    """The options stand in the question (MMStar), in columns A, B, ... (MMBench) or in a list,
    and the answer is then a number counted from 0 (ScienceQA). A hint comes before the question.
    """
    question, answer = text_of(record, "question", where), record.get("answer")
    if isinstance(record.get("choices"), list):
        options = dict(zip(LETTERS, record["choices"]))
        if isinstance(answer, int) and 0 <= answer < len(options):
            answer = LETTERS[answer]
    else:
        options = {letter: record[letter] for letter in LETTERS
                   if isinstance(record.get(letter), str) and record[letter] not in ("", "nan")}
    if options:
        if not all(isinstance(text, str) for text in options.values()):
            raise BadSample(where, f"the options are {shown(options)}; expected texts")
        question += "".join(f"\n{letter}. {text}" for letter, text in options.items())
    else:
        options = options_in(question)
    answer = answer.strip().upper() if isinstance(answer, str) else answer
    if answer not in options:
        raise BadSample(where, f"the answer is {shown(answer)}; expected one of the options "
                               f"{', '.join(options) or '(none was found in the question)'}")
    hint = record.get("hint")
    if isinstance(hint, str) and hint.strip() not in ("", "nan"):
        question = f"{hint.strip()}\n{question}"
    return Question(ask(question, images, suffix), images, answer, where, tags, options=options)


def options_in(question: str) -> dict[str, str]:
    """"... Options: A: red, B: blue" -> {"A": "red", "B": "blue"}; {} without any. The letters
    have to come in their order, or else they are words of the question."""
    start = question.rfind("Options:")
    text = question[start + len("Options:"):] if start >= 0 else question
    marks = []
    for mark in OPTION.finditer(text):
        if mark[1] == LETTERS[len(marks)]:
            marks.append(mark)
        if len(marks) == len(LETTERS):
            break
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    options = {mark[1]: text[mark.end():end].strip().rstrip(",;").strip()
               for mark, end in zip(marks, ends)}
    return options if len(options) > 1 else {}
