"""One record of a benchmark -> Question, each kind of record by one function.

    a dict, from JSON or Parquet, and its images -> question_of(metric, ...) -> Question

Data comes from strangers: every value may be of any type. What cannot be a question raises
BadSample with its place.
"""

import re
from collections import Counter

from dataset.chat import IMAGE, Message
from dataset.readers.bad_sample import BadSample, shown
from dataset.readers.record_images import image_key
from dataset.readers.unread import refuse_mark, refuse_unread, texts_in
from dataset.sample import CHINESE, PROMPTS, TURNS
from evaluation.eval_samples import Question

LETTERS = "ABCDEFGHIJ"
# "Options: A: on the book., B: beneath the cat." -> where each option begins
OPTION = re.compile(r"(?:(?<=[\s,;])|^)\(?([A-J])[:.)]\s")
YES_NO = ("yes", "no")
# The keys of a record -> its metric; the first that fits. "exact": see metric_of.
KEYS = ((("text", "label"), "yesno"), (("caption",), "caption"), (("question", "answers"), "vqa"),
        (("question", "choices"), "choice"), (("question", "A", "B"), "choice"),
        (("question", "answer"), "exact"))
# What is read of a record beside its image, by metric; a choice's options: see question_of.
READ = {"vqa": ("question", "answers"), "caption": ("caption",),
        "choice": ("question", "answer", "hint"), "yesno": ("question", "answer", "text", "label"),
        "exact": ("question", "answer")}
SHOWN = ("question", "text", "hint", "choices", *LETTERS)  # those of them that the model reads


def metric_of(record) -> str | None:
    """By the keys of a record, and where these leave it open by what stands there."""
    if not isinstance(record, dict) or {*TURNS, "texts", "prompt"} & record.keys():
        return None  # a conversation, whatever else stands there
    metric = next((name for keys, name in KEYS if set(keys) <= record.keys()), None)
    if metric != "exact":
        return metric
    if options_in(str(record["question"])):
        return "choice"
    return "yesno" if str(record["answer"]).strip().lower() in YES_NO else "exact"


def question_of(metric: str, record: dict, images: tuple, where: str, suffix: str) -> Question:
    """A record that is scored by metric -> its question. BadSample: it cannot be one, or a key that
    is not read seems to hold its image or its options."""
    keys = [*READ[metric], image_key(record)]
    if metric == "choice":
        keys += ["choices"] if isinstance(record.get("choices"), list) else LETTERS
    text = "\n".join(text for key in keys if key in SHOWN for text in texts_in(record.get(key)))
    refuse_unread(record, keys, where, images, text)
    if not images and (IMAGE in text or metric == "caption"):
        raise BadSample(where, f"{IMAGE if IMAGE in text else 'a caption'} without an image; "
                               "expected it under 'image'")
    refuse_mark(text, where, images)
    read = {"caption": read_caption, "choice": read_choice, "vqa": read_vqa}.get(metric, read_plain)
    text, truth, *more = read(record, where)
    text = f"{IMAGE}\n" * len(images) + text + ("\n" + suffix if suffix else "")
    kind = record.get("category") or record.get("answer_type")
    tags = {"kind": kind} if isinstance(kind, str) and kind.isprintable() else {}
    return Question((Message("user", text),), images, truth, where, tags, *more)


# ---------------------------------------------------------------- record -> text, truth, ...


def text_of(record: dict, key: str, where: str) -> str:
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        raise BadSample(where, f"{key!r} is {shown(text)}; expected a text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half a character, "\ud83d" in JSON
        raise BadSample(where, f"{key!r} is no text: {error}") from error
    return text.replace(IMAGE, "").strip()  # the image is put in front of the question


def read_plain(record: dict, where: str) -> tuple:
    """{"question": ..., "answer": ...}, or as POPE says it {"text": ..., "label": ...}."""
    keys = ("text", "label") if "label" in record else ("question", "answer")
    return tuple(text_of(record, key, where) for key in keys)


def read_vqa(record: dict, where: str) -> tuple:
    """answers: [{"answer": "yes", ...}, ...] or ["yes", ...]; shown as the truth: the commonest."""
    answers = record.get("answers")
    if isinstance(answers, list):
        answers = [a.get("answer") if isinstance(a, dict) else a for a in answers]
    if not is_texts(answers):
        raise BadSample(where, f"'answers' is {shown(record.get('answers'))}; expected a list of "
                               "texts, or of objects with an 'answer'")
    question = text_of(record, "question", where)
    return question, Counter(answers).most_common(1)[0][0], tuple(answers)


def read_caption(record: dict, where: str) -> tuple:
    captions = record.get("caption")
    captions = [captions] if isinstance(captions, str) else captions
    if not is_texts(captions) or not all(map(str.strip, captions)):
        raise BadSample(where, f"'caption' is {shown(captions)}; expected a text or several")
    captions = tuple(map(str.strip, captions))
    return PROMPTS["zh" if CHINESE.search(captions[0]) else "en"][0], captions[0], captions


def read_choice(record: dict, where: str) -> tuple:
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
    if options and not is_texts(list(options.values())):
        raise BadSample(where, f"the options are {shown(options)}; expected texts")
    text = question + "".join(f"\n{letter}. {option}" for letter, option in options.items())
    options = options or options_in(question)
    answer = answer.strip().upper() if isinstance(answer, str) else answer
    if answer not in options:
        raise BadSample(where, f"the answer is {shown(answer)}; expected one of the options "
                               f"{', '.join(options) or '(none was found in the question)'}")
    hint = record.get("hint")
    if isinstance(hint, str) and hint.strip() not in ("", "nan"):
        text = f"{hint.strip()}\n{text}"
    return text, answer, (), options


def is_texts(values) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) for v in values)


def options_in(question: str) -> dict[str, str]:
    """"... Options: A: red, B: blue" -> {"A": "red", "B": "blue"}; {} without any. The letters
    have to come in their order, or else they are words of the question."""
    start = question.rfind("Options:")
    text = question[start + len("Options:"):] if start >= 0 else question
    marks = []
    for mark in OPTION.finditer(text):
        if mark[1] == LETTERS[len(marks):len(marks) + 1]:
            marks.append(mark)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    options = {mark[1]: text[mark.end():end].strip().rstrip(",;").strip()
               for mark, end in zip(marks, ends)}
    return options if len(options) > 1 else {}
