"""One question for a model, and its true answer: a sample -> questions, for scoring.

    Sample (any training format) -> questions_of -> [Question]     here
    a benchmark's published file -> open_benchmark -> [Question]   benchmarks.py

Every assistant turn of a sample is one question, asked with the true text of the turns before it:
a wrong first answer does not spoil the second.
"""

from dataclasses import dataclass, field

from dataset.readers.bad_sample import BadSample


@dataclass(frozen=True)
class Question:
    messages: tuple  # up to the user's turn that is to be answered
    images: tuple  # the images that these messages show, see Sample
    truth: str
    where: str  # "file:line"
    tags: dict = field(default_factory=dict)  # e.g. {"kind": "count", "language": "en"}
    references: tuple[str, ...] = ()  # all true answers, where several are accepted
    options: dict = field(default_factory=dict)  # {"A": "a cat", ...} of a multiple choice

    @property
    def truths(self) -> tuple[str, ...]:
        return self.references or (self.truth,)


def questions_of(sample) -> list[Question]:
    """One for each assistant turn that has something before it."""
    questions = []
    for i, message in enumerate(sample.messages):
        if message.role == "assistant" and i > 0:
            history = sample.messages[:i]
            images = sample.images[:sum(m.images for m in history)]
            questions.append(Question(history, images, message.content, sample.where, sample.tags))
    return questions


def read_questions(data, limit: int | None = None) -> tuple[list[Question], list[BadSample]]:
    """The questions of the first `limit` entries, and what could not be read.

    data: len() and [i] -> a Sample, or a Question as benchmarks.py makes them.
    """
    questions, bad = [], []
    for i in range(min(len(data), limit or len(data))):
        try:
            entry = data[i]
            questions += [entry] if isinstance(entry, Question) else questions_of(entry)
        except BadSample as error:
            bad.append(error)
    return questions, bad
