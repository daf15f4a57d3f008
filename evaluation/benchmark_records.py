"""The records of a benchmark -> its metric; and one record -> Question.

    all records of a file                        -> layout_of                -> how it is scored
    a dict, from JSON or Parquet, and its images -> question_of(metric, ...) -> Question

Data comes from strangers: every value may be of any type. What cannot be a question raises
BadSample with its place.
"""

import re
from collections import Counter

from dataset.chat import IMAGE, Message
from dataset.readers.bad_sample import BadSample, MissingImage, printable, shown
from dataset.readers.captions import PROMPTS, language_of
from dataset.readers.record_images import IMAGE_KEYS, ImageFolder, image_key, is_file, is_nothing
from dataset.readers.unread import refuse_mark, refuse_unread
from dataset.sample import TURNS
from evaluation.benchmark_options import (
    STYLES,
    AnswerStyle,
    option_keys,
    options_in,
    options_of,
    readings,
)
from evaluation.eval_samples import Question

YES_NO = ("yes", "no")
TALKS = {*TURNS, "texts", "prompt"}  # keys of a conversation, whatever else stands there
# Keys of the question and of what is right: one answer or several. The first pair that is there.
PAIRS = (("question", "answers"), ("question", "answer"), ("query", "label"), ("text", "label"))
ANSWERS = ("answer", "correct_choice_idx")  # of a multiple choice
# Columns that only DocVQA and InfoVQA have, GQA, ChartQA; what ChartQA's column "type" says.
ANLS = {"questionId", "ucsf_document_id", "image_local_name", "ocr_output_file"}
GQA, CHARTQA = {"fullAnswer", "semanticStr"}, {"imgname", "human_or_machine"}
CHARTQA_TYPES = {"human_test", "augmented_test"}
READ = {"question", "query", "hint", "caption", "label", "answers", *ANSWERS}
# Where images stand that have no key 'image': MMMU's image_1, image_2, ...; or the name of a
# file, maybe without its ending (GQA's imageId).
NUMBERED = re.compile(r"image_([1-9]\d?)")
NAMES = ("imgname", "image_local_name", "imageId", "image_id", "data_id")
OTHER_ANSWERS = re.compile(r"\w+_(?:answers|aliases)|aliases", re.IGNORECASE)
MARK = re.compile(r"<image[ _]?(\d{1,2})>")  # "<image 1>" in MMMU's questions and options


# ---------------------------------------------------------------- a file -> how it is scored


def layout_of(records) -> tuple[str | None, str]:
    """All records of a file -> its metric, and how a choice's answers name their options (STYLES).
    None: they are no benchmark. ValueError: they ask questions that cannot be scored."""
    keys, answers, kinds, polls = set(), set(), set(), set()
    optioned, lettered, style = False, [], AnswerStyle()
    for record in records:
        if not isinstance(record, dict):
            continue
        keys |= record.keys()
        if TALKS & record.keys() and not option_keys(record):  # BLINK has a prompt beside them
            return None, STYLES[0]
        said = next((record[key] for key in ANSWERS if record.get(key) is not None), None)
        several = record.get("answers")
        polls.add(len(several) if isinstance(several, list) else 0 if said is None else 1)
        kinds.add(str(record.get("type")))
        optioned |= bool(option_keys(record))
        try:
            options = options_of(record, "")
        except BadSample:  # reported when it is read, with its line
            continue
        style.add(said, options)
        lettered.append(bool(options))
        if isinstance(said, str):
            answers.add((bool(options), said.strip().lower()[:9]))
    free = {answer for with_options, answer in answers if not with_options}
    chosen = any(lettered) and all(re.fullmatch(r"\(?[a-j][.)]?", answer) for answer in free)
    metric = None
    pair = next((pair for pair in PAIRS if set(pair) <= keys), ())
    if "question" in keys and set(ANSWERS) & keys and (optioned or chosen):
        metric = "choice"
    elif "answers" in pair:
        metric = "anls" if ANLS & keys else "vqa" if polls - {0} == {10} else "exact"
    elif "answer" in pair:
        said = {answer for _, answer in answers}
        metric = ("gqa" if GQA & keys else "relaxed" if kinds <= CHARTQA_TYPES else
                  "yesno" if said and said <= {*YES_NO} else "exact")
    elif "query" in pair:
        metric = "relaxed" if CHARTQA & keys else None
    elif "text" in pair:
        metric = "yesno"
    elif "caption" in keys and "question" not in keys:
        metric = "caption"
    if metric is None and (pair or "question" in keys):
        raise ValueError(f"no benchmark that is known here has the keys "
                         f"{printable(', '.join(map(repr, sorted(keys))))}; expected 'question' "
                         "with 'answer', or with 'answers' (several are accepted), and options in "
                         "'options', 'choices' or 'A', 'B', ...")
    return metric, style.name() if metric == "choice" else STYLES[0]


# ---------------------------------------------------------------- a record -> Question


def with_images(record: dict, images_dir: ImageFolder, where: str) -> tuple[dict, list[int]]:
    """The record with its images under 'image' where a benchmark has them elsewhere, and the
    numbers by which its text calls them; []: 1, 2, ..."""
    if image_key(record) in IMAGE_KEYS[:3]:
        return record, []
    numbered = {int(match[1]): key for key in record
                if (match := NUMBERED.fullmatch(key)) and not is_nothing(record[key])}
    rest = {key: value for key, value in record.items() if key not in numbered.values()}
    if numbered:
        return {**rest, "image": [record[numbered[n]] for n in sorted(numbered)]}, sorted(numbered)
    for key in NAMES:
        for ending in ("", ".jpg", ".png"):
            if isinstance(record.get(key), str) and is_file(images_dir, record[key] + ending):
                del rest[key]
                return {**rest, "image": [record[key] + ending]}, []
    key = next((key for key in NAMES[:3] if isinstance(record.get(key), str)), None)
    if key and not image_key(record):
        raise MissingImage(where, f"{key!r} is {shown(record[key])}, and {images_dir.path} has no "
                                  "file of that name, nor with .jpg or .png behind it; is the "
                                  "image directory right?")
    return record, []


def question_of(metric: str, record: dict, images: dict, where: str, suffix: str,
                style: str = STYLES[0]) -> Question:
    """A record that is scored by metric -> its question. images: {number: image}. BadSample: it
    cannot be one, or a key that is not read seems to hold its image or its options."""
    options, keys = {}, [*READ, image_key(record), *["text"] * (metric == "yesno")]
    if metric == "choice":
        options, keys = options_of(record, where), [*keys, *option_keys(record)]
        text, truth, *more = read_choice(record, where, options, style)
    else:
        text, truth, *more = (read_caption if metric == "caption" else read_plain)(record, where)
    hint = record.get("hint")
    if isinstance(hint, str) and hint.strip() not in ("", "nan"):
        text = f"{hint.strip()}\n{text}"
    refuse_unread(record, keys, where, tuple(images.values()), text)
    if not images and (IMAGE in text or metric == "caption" or record.get("data_type") in (
            "image", "video")):  # the last is SEED-Bench's
        what = IMAGE if IMAGE in text else "a caption" if metric == "caption" else "a question"
        raise BadSample(where, f"{what} without an image; expected it under 'image'")
    refuse_mark(text, where, images)
    try:
        "".join([text, truth, *(more[0] if more else ())]).encode("utf-8")
    except UnicodeEncodeError as error:  # half a character, "\ud83d" in JSON
        raise BadSample(where, f"the question or its answer is no text: {error}") from error
    text, order = place(text, images, where)
    text += "\n" + suffix if suffix else ""
    kind = record.get("category") or record.get("answer_type")
    tags = {"kind": kind} if isinstance(kind, str) and kind.isprintable() else {}
    images = tuple(images[number] for number in order)
    return Question((Message("user", text),), images, truth, where, tags, *more)


def place(text: str, images: dict, where: str) -> tuple[str, list[int]]:
    """The images in the places of their marks ("<image 1>", or as many "<image>"), the others in
    front -> the text, and the images' numbers as it shows them."""
    order, count = [], text.count(IMAGE)
    if count > len(images):
        raise BadSample(where, f"{count} {IMAGE} markers for {len(images)} images; each needs one")
    if count == len(images) and not MARK.search(text):
        return text, list(images)
    text = text.replace(IMAGE, "").strip()

    def mark(match) -> str:
        number = int(match[1])
        if number not in images:
            raise BadSample(where, f"the text has {match[0]}, and the record has the images "
                                   f"{list(images)}; expected one for each mark")
        if number in order:  # an image is shown once
            return f"image {number}"
        order.append(number)
        return IMAGE

    text = MARK.sub(mark, text)
    front = [number for number in images if number not in order]
    return f"{IMAGE}\n" * len(front) + text, front + order


# ---------------------------------------------------------------- record -> text, truth, ...


def text_of(record: dict, key: str, where: str) -> str:
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        raise BadSample(where, f"{key!r} is {shown(text)}; expected a text")
    return text.strip()


def read_plain(record: dict, where: str) -> tuple:
    """{"question": ..., "answer": ...} or another pair of PAIRS. Several answers are all accepted:
    [{"answer": "yes", ...}, ...] or ["yes", ...]; shown as the truth: the commonest."""
    pairs = [pair for pair in PAIRS if set(pair) <= record.keys()] or [PAIRS[1]]
    key, name = next((pair for pair in pairs if record.get(pair[1]) is not None), pairs[0])
    question, answers = text_of(record, key, where), record.get(name)
    for other, value in record.items():
        if OTHER_ANSWERS.fullmatch(other) and isinstance(value, list) and not is_nothing(value):
            raise BadSample(where, f"{other!r} ({shown(value)}) is not read, and seems to hold "
                                   "accepted answers; expected all of them in 'answers'")
    if name != "answers" and not isinstance(answers, list):
        return question, text_of(record, name, where)
    if isinstance(answers, list):
        answers = [a.get("answer") if isinstance(a, dict) else a for a in answers]
    if not is_texts(answers):
        raise BadSample(where, f"{name!r} is {shown(record[name])}; expected a list of texts, or "
                               "of objects with an 'answer'")
    return question, Counter(answers).most_common(1)[0][0], tuple(answers)


def read_caption(record: dict, where: str) -> tuple:
    captions = record.get("caption")
    captions = [captions] if isinstance(captions, str) else captions
    if not is_texts(captions) or not all(map(str.strip, captions)):
        raise BadSample(where, f"'caption' is {shown(captions)}; expected a text or several")
    captions = tuple(map(str.strip, captions))
    return PROMPTS[language_of(captions[0])][0], captions[0], captions


def read_choice(record: dict, where: str, options: dict, style: str) -> tuple:
    """The options stand behind the question if they are not in it."""
    text = text_of(record, "question", where)
    keys = option_keys(record)
    if not options:
        raise BadSample(where, "the question has no options"
                               + f" in {', '.join(map(repr, keys))}" * bool(keys)
                               + ", unlike others of the file; expected them in 'options', "
                               "'choices', 'A', 'B', ... or in the question; score open questions "
                               "in a file of their own")
    if keys and options_in(text) != options:
        text += "".join(f"\n{letter}. {option}" for letter, option in options.items())
    answer = next((record[key] for key in ANSWERS if record.get(key) is not None), None)
    letter = readings(answer, options).get(style)
    if letter is None:
        raise BadSample(where, f"the answer is {shown(answer)}; expected, as in the rest of the "
                               f"file, the {style} of one of the options {', '.join(options)}")
    return text, letter, (), options


def is_texts(values) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) for v in values)
