"""Asking every question, and counting: questions -> answers -> shares and a table.

    data -> read_questions -> [Question] -> answer_all -> [Answered] -> share, by_tag, table

Two control conditions tell seeing from guessing: the same questions without their picture, and
with the picture of another one.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dataset.chat import IMAGE, Message
from dataset.images import load_image
from dataset.readers.bad_sample import BadSample
from evaluation.batched_generation import generate_batch
from evaluation.eval_samples import Question, questions_of, read_questions
from evaluation.metrics import is_exact
from model.generate import language_model_of

__all__ = ["Answered", "Question", "answer_all", "by_tag", "questions_of", "read_questions",
           "share", "table", "with_wrong_picture", "without_picture"]
WINDOW = 16  # batches whose questions are sorted by length together, for less padding


@dataclass(frozen=True)
class Answered:
    question: Question
    answer: str
    score: float | None = None  # by the metric of the data; None: not scored yet, exact then

    @property
    def points(self) -> float:
        """0 to 1, for captions 0 to 10; see metrics.py."""
        return float(is_exact(self.answer, self.question.truth)) if self.score is None \
            else self.score

    @property
    def right(self) -> bool:
        return self.points >= 0.5


# ---------------------------------------------------------------- control conditions


def without_picture(questions: list[Question]) -> list[Question]:
    """The same words, no picture: what can be known from the question alone."""
    def blind(message: Message) -> Message:
        if not message.images:
            return message
        return Message(message.role, message.content.replace(IMAGE, "").strip("\n"))

    return [replace(q, messages=tuple(map(blind, q.messages)), images=())
            for q in questions if q.images]


def with_wrong_picture(questions: list[Question]) -> list[Question]:
    """Each question with the pictures of another one: the next, in a circle, with the same tags,
    another truth and other pictures. A question for which there is none is left out.
    """
    groups = {}  # of questions that may lend each other pictures, by their places
    for place, q in enumerate(questions):
        if q.images:
            key = len(q.images), tuple(sorted(q.tags.items()))
            groups.setdefault(key, []).append(place)
    lent = {}
    for places in groups.values():
        count = len(places)
        # For each member, how far it is to the next with another truth: from the back to the
        # front, twice around, so that long runs of one truth are walked once and not each time.
        far = [count] * count
        for k in reversed(range(2 * count)):
            here, after = questions[places[k % count]], questions[places[(k + 1) % count]]
            far[k % count] = 1 if here.truth != after.truth else far[(k + 1) % count] + 1
        for k, place in enumerate(places):
            question, step = questions[place], far[k]
            while step < count:
                other = questions[places[(k + step) % count]]
                if (other.truth != question.truth and other.where != question.where
                        and other.images != question.images):
                    lent[place] = replace(question, images=other.images)
                    break
                step += 1
    return [lent[place] for place in sorted(lent)]


# ---------------------------------------------------------------- answering


def answer_all(model, template, processor, questions: list[Question], batch_size: int = 64,
               max_new_tokens: int = 256, progress=lambda done, of: None, cut: bool = True,
               journal=None) -> tuple[list[Answered], list[BadSample]]:
    """Answer greedily, questions about one picture together, which is then looked at once, and
    prompts of like length; the order of the questions is kept.

    cut: stop a little behind the longest truth of a batch, because who says more is wrong anyway.
    journal: a Journal, whose answers are not asked for again; which questions stand together in
    a batch does not depend on it, so that an answer is the same whenever it is asked for.
    Also returned: the questions that cannot be asked, for a broken picture or for their length.
    """
    limit = language_model_of(model).config.max_position_embeddings
    prompts, bad = {}, []
    for i, question in enumerate(questions):
        ids = template.prompt(question.messages)
        if len(ids) < limit:
            prompts[i] = ids
        else:
            bad.append(BadSample(question.where, f"the prompt has {len(ids)} tokens, the model "
                                                 f"takes fewer than {limit}"))
    answers, skipped, done = {}, {}, 0
    for window in windows(list(prompts), WINDOW * batch_size):
        pictures = None
        order = in_groups(window, prompts, questions)
        for batch in windows(order, batch_size):
            if journal and all(map(journal.has, batch)):
                found = {i: journal.known[i] for i in batch if i in journal.known}
                faults = {i: journal.skipped[i] for i in batch if i in journal.skipped}
            else:
                # In the order of the file, which may hold them: once through, front to back.
                if pictures is None:
                    shown = {named(questions[i].images): questions[i].images for i in window}
                    pictures = {name: fetch(images) for name, images in shown.items()}
                found, faults = answer_batch(
                    model, template, processor, {i: prompts[i] for i in batch},
                    {i: pictures[named(questions[i].images)] for i in batch},
                    longest_truth(template, [questions[i] for i in batch], max_new_tokens)
                    if cut else max_new_tokens)
                if journal:
                    journal.add(found, faults)
            answers.update(found)
            skipped.update(faults)
            done += len(batch)
            progress(done, len(prompts))
    bad += [BadSample(questions[i].where, skipped[i]) for i in sorted(skipped)]
    return [Answered(questions[i], answers[i]) for i in sorted(answers)], bad


def named(images: tuple) -> tuple:
    """The same for the same pictures: a path and bytes are what they say, others are themselves."""
    return tuple(each if isinstance(each, (str, Path, bytes)) else id(each) for each in images)


def in_groups(window: list[int], prompts: dict, questions: list[Question]) -> list[int]:
    """Questions about the same pictures behind each other, and groups by their longest prompt."""
    group = {i: named(questions[i].images) or i for i in window}
    longest, first = {}, {}
    for i in window:
        longest[group[i]] = max(longest.get(group[i], 0), len(prompts[i]))
        first.setdefault(group[i], i)
    return sorted(window, key=lambda i: (longest[group[i]], first[group[i]], i))


def windows(items: list, size: int) -> list[list]:
    return [items[start:start + size] for start in range(0, len(items), size)]


def fetch(images: tuple) -> tuple:
    """Pictures that wait to be read or drawn are; an error is kept, for when one is needed."""
    def one(image):
        try:
            return image() if callable(image) else image
        except (OSError, ValueError, BadSample) as error:
            return error

    return tuple(map(one, images))


def longest_truth(template, questions: list[Question], max_new_tokens: int) -> int:
    """Tokens, with a little room to show how somebody goes wrong."""
    longest = max(len(template.tokenizer.encode(truth)) for q in questions for truth in q.truths)
    return min(longest + 8, max_new_tokens)


def answer_batch(model, template, processor, prompts: dict, pictures: dict,
                 max_new_tokens: int) -> tuple[dict[int, str], dict[int, str]]:
    """prompts {number: ids}, pictures {number: them} -> {number: answer}, and {number: why it
    could not be asked}. Several numbers may have the very same pictures: then these are read once.
    """
    read, pixels, skipped = {}, {}, {}
    for i in prompts:
        shown = id(pictures[i])
        try:
            if shown not in read:
                read[shown] = read_pixels(pictures[i], processor)
            pixels[i] = read[shown]
        except (OSError, ValueError, BadSample) as error:  # damaged, or too long and thin
            skipped[i] = str(error)
    if not pixels:
        return {}, skipped
    found = generate_batch(model, [prompts[i] for i in pixels], list(pixels.values()),
                           max_new_tokens, template.stop_ids)
    return {i: template.tokenizer.decode(ids) for i, ids in zip(pixels, found)}, skipped


def read_pixels(images, processor):
    """Pictures -> (N,3,H,W), or None when there are none. An error among them is raised."""
    for image in images:
        if isinstance(image, Exception):
            raise image
    return torch.stack([processor(load_image(image, processor.draft)) for image in images]
                       ) if images else None


# ---------------------------------------------------------------- counting


def share(answered: list[Answered]) -> float:
    """The mean score: the share of right answers, where each is right or wrong."""
    return sum(a.points for a in answered) / len(answered) if answered else 0.0


def by_tag(answered: list[Answered], tag: str) -> dict[str, float]:
    """{value of the tag: share}, in the order of first appearance."""
    groups = {}
    for a in answered:
        if tag in a.question.tags:
            groups.setdefault(a.question.tags[tag], []).append(a)
    return {value: share(group) for value, group in groups.items()}


def table(answered: list[Answered], unit: str = "%") -> str:
    """Shares by kind of question (rows) and by language (columns), times 100; tags that nobody has
    are left out, so without any tag it is one line."""
    languages = list(by_tag(answered, "language"))
    kinds = list(by_tag(answered, "kind"))

    def cells(rows: list[Answered]) -> str:
        columns = [[a for a in rows if a.question.tags.get("language") == language]
                   for language in languages]
        shares = [f"{f'{100 * share(c):.1f}{unit}' if c else '-':>9}" for c in [*columns, rows]]
        return "".join(shares) + f"{len(rows):11,}"

    width = max(map(len, [*kinds, "question"])) + 1
    lines = [f"{'question':{width}}" + "".join(f"{name:>9}" for name in [*languages, "all"])
             + f"{'questions':>11}"]
    for kind in kinds:
        group = [a for a in answered if a.question.tags.get("kind") == kind]
        lines.append(f"{kind:{width}}" + cells(group))
    lines.append(f"{'all':{width}}" + cells(answered))
    return "\n".join(lines)
