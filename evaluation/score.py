"""How many answers are exactly right: samples -> questions -> answers -> shares and a table.

    data -> read_questions -> [Question] -> answer_all -> [Answered] -> share, by_tag, table

Every assistant turn of a sample is one question, asked with the true words of the turns before
it: a wrong first answer does not spoil the second. Right means the same text, but for white space
at its two ends.

Two control conditions tell seeing from guessing: the same questions without their picture, and
with the picture of another sample.
"""

from dataclasses import dataclass, field, replace

import torch

from dataset.chat import IMAGE, Message
from dataset.formats import BadSample
from dataset.images import load_image
from model.generate import decoder_of, generate_batch


@dataclass(frozen=True)
class Question:
    messages: tuple  # up to the user's turn that is to be answered
    images: tuple  # the pictures that these messages show
    truth: str
    where: str
    tags: dict = field(default_factory=dict)  # e.g. {"kind": "count", "language": "en"}


@dataclass(frozen=True)
class Answered:
    question: Question
    answer: str

    @property
    def right(self) -> bool:
        return self.answer.strip() == self.question.truth.strip()


def questions_of(sample) -> list[Question]:
    """One for each assistant turn that has something before it."""
    found = []
    for i, message in enumerate(sample.messages):
        if message.role == "assistant" and i > 0:
            history = sample.messages[:i]
            shown = sample.images[:sum(m.images for m in history)]
            found.append(Question(history, shown, message.content, sample.where, sample.tags))
    return found


def read_questions(data, limit: int | None = None) -> tuple[list[Question], list[BadSample]]:
    """The questions of the first `limit` samples, and what could not be read."""
    questions, bad = [], []
    for i in range(min(len(data), limit or len(data))):
        try:
            questions += questions_of(data[i])
        except BadSample as error:
            bad.append(error)
    return questions, bad


def without_picture(questions: list[Question]) -> list[Question]:
    """The same words, no picture: what can be known from the question alone."""
    def blind(message: Message) -> Message:
        if not message.images:
            return message
        return Message(message.role, message.content.replace(IMAGE, "").strip("\n"))

    return [replace(q, messages=tuple(map(blind, q.messages)), images=())
            for q in questions if q.images]


def with_wrong_picture(questions: list[Question]) -> list[Question]:
    """Each question with the pictures of another one: the next, in a circle, with the same tags
    and another truth. A question for which there is none is left out.
    """
    asked = [q for q in questions if q.images]
    wrong = []
    for i, question in enumerate(asked):
        other = next((q for q in asked[i + 1:] + asked[:i]
                      if q.tags == question.tags and len(q.images) == len(question.images)
                      and q.truth != question.truth and q.where != question.where), None)
        if other:
            wrong.append(replace(question, images=other.images))
    return wrong


def answer_all(model, template, processor, questions: list[Question], batch_size: int = 64,
               max_new_tokens: int = 256, progress=lambda done, of: None
               ) -> tuple[list[Answered], list[BadSample]]:
    """Answer greedily, prompts of like length together; the order of the questions is kept.

    Also returned: the questions that cannot be asked, for a broken picture or for their length.
    """
    limit = decoder_of(model).config.max_position_embeddings
    prompts, bad = {}, []
    for i, question in enumerate(questions):
        ids = template.prompt(question.messages)
        if len(ids) < limit:
            prompts[i] = ids
        else:
            bad.append(BadSample(question.where, f"the prompt has {len(ids)} tokens, the model "
                                                 f"takes fewer than {limit}"))
    order = sorted(prompts, key=lambda i: len(prompts[i]))  # less padding, so less work
    answers = {}
    for start in range(0, len(order), batch_size):
        batch, pixels = [], []
        for i in order[start:start + batch_size]:
            try:
                pixels.append(read_pixels(questions[i].images, processor))
                batch.append(i)
            except (OSError, ValueError) as error:  # damaged, or too long and thin to be resized
                bad.append(BadSample(questions[i].where, str(error)))
        if batch:
            # Who says more than the longest truth is wrong anyway; a little room shows how.
            room = max(len(template.tokenizer.encode(questions[i].truth)) for i in batch) + 8
            found = generate_batch(model, [prompts[i] for i in batch], pixels,
                                   min(room, max_new_tokens), template.stop_ids)
            for i, ids in zip(batch, found):
                answers[i] = template.tokenizer.decode(ids)
        progress(min(start + batch_size, len(order)), len(order))
    return [Answered(questions[i], answers[i]) for i in sorted(answers)], bad


def read_pixels(images, processor):
    """Pictures -> (N,3,H,W), or None when there are none."""
    return torch.stack([processor(load_image(image, processor.draft)) for image in images]
                       ) if images else None


def share(answered: list[Answered]) -> float:
    """The share of exact answers, 0 to 1."""
    return sum(a.right for a in answered) / len(answered) if answered else 0.0


def by_tag(answered: list[Answered], tag: str) -> dict[str, float]:
    """{value of the tag: share}, in the order of first appearance."""
    groups = {}
    for a in answered:
        if tag in a.question.tags:
            groups.setdefault(a.question.tags[tag], []).append(a)
    return {value: share(group) for value, group in groups.items()}


def table(answered: list[Answered]) -> str:
    """Shares by kind of question (rows) and by language (columns); tags that nobody has are left
    out, so without any tag it is one line."""
    languages = list(by_tag(answered, "language"))
    kinds = list(by_tag(answered, "kind"))

    def cells(rows: list[Answered]) -> str:
        columns = [[a for a in rows if a.question.tags.get("language") == language]
                   for language in languages]
        shares = [f"{share(c):9.1%}" if c else f"{'-':>9}" for c in [*columns, rows]]
        return "".join(shares) + f"{len(rows):11,}"

    width = max(map(len, [*kinds, "question"])) + 1
    lines = [f"{'question':{width}}" + "".join(f"{name:>9}" for name in [*languages, "all"])
             + f"{'questions':>11}"]
    for kind in kinds:
        group = [a for a in answered if a.question.tags.get("kind") == kind]
        lines.append(f"{kind:{width}}" + cells(group))
    lines.append(f"{'all':{width}}" + cells(answered))
    return "\n".join(lines)
