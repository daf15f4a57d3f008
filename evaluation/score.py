"""Asking every question, in batches, and the two controls that tell seeing from guessing.

    [Question] -> Predictor.predict -> [Prediction]        summary.py counts them

The controls are the same questions without their image, and with the image of another one.
"""

import sys
import time
from collections import Counter
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from dataset.chat import IMAGE
from dataset.readers.bad_sample import BadSample
from evaluation.batched_generation import generate_batch
from evaluation.eval_samples import Question
from evaluation.metrics import is_exact
from model.generate import language_model_of, room_left
from training.validation import ShuffledImages

WINDOW = 16  # batches whose questions are sorted by length together, for less padding


@dataclass(frozen=True)
class Prediction:
    question: Question
    answer: str
    row: tuple = ()  # as metrics.py measures it; (): not measured yet, exact then

    @property
    def points(self) -> float:
        """0 to 1, for captions 0 to 10."""
        return self.row[0] if self.row else float(is_exact(self.answer, self.question))

    @property
    def correct(self) -> bool:
        return self.points >= 0.5


def without_images(questions: list[Question]) -> list[Question]:
    """The same text, no image: what can be known from the question alone."""
    return [replace(q, images=(), messages=tuple(
        replace(m, content=m.content.replace(IMAGE, "").strip("\n")) if m.images else m
        for m in q.messages)) for q in questions if q.images]


def with_shuffled_images(questions: list[Question]) -> list[Question]:
    """Each question with the images of another one: the next, in a circle, with the same tags,
    another truth and other images. A question for which there is none is left out. The circle has
    the questions of each truth at equal distances, so that the next one is never far.
    """
    groups = {}  # indices of questions that may lend each other images
    for i, q in enumerate(questions):
        if q.images:
            groups.setdefault((len(q.images), *sorted(q.tags.items())), []).append(i)
    shuffled = {}
    for members in groups.values():
        totals, ranks, place = Counter(questions[i].truth for i in members), Counter(), {}
        if len(totals) == 1:  # none can lend: do not compare each with all others
            continue
        for i in members:
            truth = questions[i].truth
            ranks[truth] += 1
            place[i] = ranks[truth] / totals[truth], i
        members.sort(key=place.get)
        data = ShuffledImages([questions[i] for i in members], lambda q, other:
                              q.truth != other.truth and q.where != other.where)
        for n, i in enumerate(members):
            with suppress(BadSample):  # all others show the same image
                shuffled[i] = data[n]
    return [shuffled[i] for i in sorted(shuffled)]


@dataclass(frozen=True)
class Predictor:
    """Answers questions greedily. template, processor: as load_model gives them.

    stop_after_truth: stop a little behind the longest truth of a batch, because a longer answer is
    wrong whatever follows.
    """

    model: torch.nn.Module
    template: object
    processor: object
    batch_size: int = 64
    max_new_tokens: int = 256
    stop_after_truth: bool = True

    def predict(self, questions: list[Question], cache=None,
                title: str = "") -> tuple[list[Prediction], list[BadSample]]:
        """-> predictions in the order of the questions, and the questions that cannot be asked.

        Questions about one image stand together in a batch, and prompts of like length. cache: a
        ResultsCache, whose questions are not asked again; the batches do not depend on it, so an
        answer is the same whenever it is asked for. title: of a line of progress on stderr.
        """
        prompts, errors = self.encode(questions)
        answers, done, start = {}, 0, time.monotonic()
        for window in chunks(list(prompts), WINDOW * self.batch_size):
            for batch in chunks(by_image(window, prompts, questions), self.batch_size):
                if cache and all(map(cache.has, batch)):
                    new = {i: cache.answers[i] for i in batch if i in cache.answers}
                    faults = {i: cache.errors[i] for i in batch if i in cache.errors}
                else:
                    new, faults = self.answer_batch(
                        {i: prompts[i] for i in batch}, {i: questions[i].images for i in batch},
                        self.longest_answer([questions[i] for i in batch]))
                    if cache:
                        cache.add(new, faults)
                answers |= new
                errors |= faults
                done += len(batch)
                if title and (done == len(prompts) or sys.stderr.isatty()):
                    seconds = time.monotonic() - start
                    left = seconds / done * (len(prompts) - done)
                    print(f"\r{title}: {done:,}/{len(prompts):,} in {seconds:.0f} s, {left:.0f} s "
                          "left   ", end="" if left else "\n", file=sys.stderr, flush=True)
        return ([Prediction(questions[i], answers[i]) for i in sorted(answers)],
                [BadSample(questions[i].where, errors[i]) for i in sorted(errors)])

    def encode(self, questions: list[Question]) -> tuple[dict[int, list[int]], dict[int, str]]:
        """-> {index: prompt ids}, and {index: why it is too long for the model}."""
        prompts, errors = {}, {}
        for i, question in enumerate(questions):
            ids = self.template.encode_prompt(question.messages)
            try:
                room_left(language_model_of(self.model), len(ids))
                prompts[i] = ids
            except ValueError as error:
                errors[i] = str(error)
        return prompts, errors

    def longest_answer(self, questions: list[Question]) -> int:
        """Tokens: those of the longest truth, and a few more to show how an answer goes wrong."""
        if not self.stop_after_truth:
            return self.max_new_tokens
        longest = max(len(self.template.tokenizer.encode(truth))
                      for q in questions for truth in q.truths)
        return min(longest + 8, self.max_new_tokens)

    def answer_batch(self, prompts: dict[int, list[int]], images: dict[int, tuple],
                     max_new_tokens: int) -> tuple[dict[int, str], dict[int, str]]:
        """-> {index: answer}, and {index: why it could not be asked}. Questions with the same
        images share one tensor of pixels: they are read once, and encoded once."""
        loaded, pixels, errors = {}, {}, {}
        for i in sorted(prompts):  # in the order of the file, which may hold the images
            key = image_key(images[i])
            try:
                if key not in loaded:
                    read = [self.processor.read(image) for image in images[i]]
                    loaded[key] = torch.stack(read) if read else None  # (N,3,H,W)
                pixels[i] = loaded[key]
            except (OSError, ValueError) as error:  # damaged, or too long and thin
                errors[i] = str(error)
        asked = [i for i in prompts if i in pixels]
        if not asked:
            return {}, errors
        rows = generate_batch(self.model, [prompts[i] for i in asked], [pixels[i] for i in asked],
                              max_new_tokens, self.template.stop_ids)
        return {i: self.template.tokenizer.decode(ids) for i, ids in zip(asked, rows)}, errors


def image_key(images: tuple) -> tuple:
    """Equal for the same images: paths and bytes by what they are, others by identity."""
    return tuple(each if isinstance(each, Hashable) else id(each) for each in images)


def by_image(window: list[int], prompts: dict, questions: list[Question]) -> list[int]:
    """Questions about the same images one after the other, and groups by their longest prompt."""
    groups = {}
    for i in window:
        groups.setdefault(image_key(questions[i].images) or i, []).append(i)
    groups = sorted(groups.values(), key=lambda group: max(len(prompts[i]) for i in group))
    return [i for group in groups for i in group]


def chunks(items: list, size: int) -> list[list]:
    return [items[start:start + size] for start in range(0, len(items), size)]
