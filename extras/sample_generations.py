"""What the model answers while it learns: a few held-out questions, the same ones every time.

    held-out samples -> the first --eval_answers that show an image -> OUT/held_out/1.jpg ...
    every --eval_steps steps: their first questions -> greedy answers -> a line of answers.jsonl

A loss says that something gets better; the answers say what: first the form, then the words, then
what is in the image. report.py lays them out beside the images.

Rank 0 generates alone, the others wait for it at the next sum. Generating draws no random number
and changes no weight. Nothing that fails here ends a training: the reason stands in the place of
the answers.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.chat import IMAGE
from dataset.images import load_image
from dataset.readers.formats import BadSample
from evaluation.batched_generation import generate_batch
from training.precision import autocast

MAX_NEW_TOKENS = 64  # a model that has not learned to stop would go on
SIDE = 224  # pixels of a small image's longer side


@dataclass(frozen=True)
class Question:
    """A prompt, ready to be answered."""

    where: str
    text: str
    truth: str
    image: str  # file of the small image, relative to OUT
    ids: list
    pixels: torch.Tensor  # (N,3,H,W)


class Answers:
    """The questions, chosen at the first measurement, and what the model answers to them."""

    def __init__(self, data, template, processor, settings):
        """data: the held-out samples. Without --eval_answers nothing is generated, nor under fsdp:
        there every rank would have to go through each token with rank 0."""
        self.data, self.template, self.processor = data, template, processor
        self.out = Path(settings.out)
        self.number = 0 if settings.parallel == "fsdp" else settings.eval_answers
        self.questions = None  # not chosen yet

    def ask(self, model, settings, ranks) -> dict | None:
        """-> a line of answers.jsonl without its step; None: there are no questions."""
        if not self.number or not ranks.main:
            return None
        try:
            if self.questions is None:
                self.questions = self.choose(model.language.config.max_position_embeddings)
            texts = self.generate(model, settings, ranks) if self.questions else []
        except Exception as error:  # no memory, no disk: the training has them, and goes on
            return {"problem": f"{type(error).__name__}: {error}".strip(), "answers": []}
        return {"answers": [{"where": question.where, "image": question.image, "question":
                             question.text, "truth": question.truth, "answer": text}
                            for question, text in zip(self.questions, texts)]}

    def choose(self, context: int) -> list[Question]:
        """The first usable ones, always the same; their small images are written."""
        chosen = []
        for i in range(len(self.data)):
            if len(chosen) == self.number:
                break
            try:
                question = self.prepare(self.data[i], len(chosen) + 1)
            except (BadSample, OSError, ValueError):  # reported and counted by the loss beside it
                continue
            if question and len(question.ids) + MAX_NEW_TOKENS <= context:
                chosen.append(question)
        return chosen

    def prepare(self, sample, number: int) -> Question | None:
        """The sample's first question; None: it shows no image."""
        roles = [message.role for message in sample.messages]
        if "assistant" not in roles[1:]:
            return None
        first = roles.index("assistant", 1)
        messages = sample.messages[:first]
        count = sum(message.images for message in messages)
        if not count:
            return None
        images = [load_image(image, self.processor.draft) for image in sample.images[:count]]
        pixels = torch.stack([self.processor(image) for image in images])
        small = images[-1].copy()
        small.thumbnail((SIDE, SIDE))
        file = f"held_out/{number}.jpg"
        (self.out / "held_out").mkdir(parents=True, exist_ok=True)
        small.save(self.out / file, quality=85)
        return Question(sample.where, messages[-1].content.replace(IMAGE, "").strip(),
                        sample.messages[first].content, file, self.template.encode_prompt(messages),
                        pixels)

    def generate(self, model, settings, ranks) -> list[str]:
        model.eval()
        try:
            with autocast(settings.dtype, ranks.device):
                rows = generate_batch(model, [question.ids for question in self.questions],
                                      [question.pixels for question in self.questions],
                                      MAX_NEW_TOKENS, self.template.stop_ids)
        finally:
            model.train()
        return [self.template.tokenizer.decode(ids) for ids in rows]
