"""What the model answers while it learns: a few held-out questions, asked again and again.

    held-out samples -> the first --eval_answers that show a picture -> OUT/held_out/1.jpg ...
    every --eval_every steps: their first questions -> greedy answers -> a line of answers.jsonl

A loss says that something gets better; the answers say what: first the form, then the words, then
what is in the picture. report.py lays them out beside the pictures.

Rank 0 asks alone, the others wait for it at the next sum. Answering draws no random number and
changes no weight. Nothing that goes wrong here ends a training: the reason is told and written
down in the place of the answers.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.chat import IMAGE
from dataset.images import load_image
from dataset.readers.formats import BadSample
from evaluation.batched_generation import generate_batch
from training.precision import autocast

MOST_NEW = 64  # tokens of an answer; a model that has not learned to stop would go on
SIDE = 224  # pixels of a small picture's longer side


@dataclass(frozen=True)
class Asked:
    """One question, ready to be asked."""

    where: str
    question: str
    truth: str
    picture: str  # file of the small picture, relative to OUT
    ids: list
    pixels: torch.Tensor  # (N,3,H,W)


class Answers:
    """Asks on rank 0 when told to; chooses the questions when asked for the first time."""

    def __init__(self, data, template, processor, settings):
        """data: the held-out samples. Asks nothing when --eval_answers is 0, nor under fsdp: there
        every rank would have to go through each token with rank 0."""
        self.data, self.template, self.processor = data, template, processor
        self.out = Path(settings.out)
        self.number = 0 if settings.parallel == "fsdp" else settings.eval_answers
        self.asked = None  # not chosen yet

    def ask(self, model, settings, ranks) -> dict | None:
        """-> what stands in a line of answers.jsonl but the step; None: nothing is asked."""
        if not self.number or not ranks.main:
            return None
        try:
            if self.asked is None:
                self.asked = self.choose(model.language.config.max_position_embeddings)
            told = self.answer(model, settings, ranks) if self.asked else []
        except Exception as error:  # no memory, no disk: the training has them, and goes on
            return {"problem": f"{type(error).__name__}: {error}".strip(), "answers": []}
        return {"answers": [{"where": asked.where, "picture": asked.picture,
                             "question": asked.question, "truth": asked.truth, "answer": answer}
                            for asked, answer in zip(self.asked, told)]}

    def choose(self, longest: int) -> list[Asked]:
        """The first usable ones, always the same; their small pictures are written."""
        chosen = []
        for i in range(len(self.data)):
            if len(chosen) == self.number:
                break
            try:
                asked = self.prepare(self.data[i], len(chosen) + 1)
            except (BadSample, OSError, ValueError):  # told and counted by the loss beside it
                continue
            if asked and len(asked.ids) + MOST_NEW <= longest:
                chosen.append(asked)
        return chosen

    def prepare(self, sample, number: int) -> Asked | None:
        first = next((place for place, m in enumerate(sample.messages)
                      if m.role == "assistant" and place), None)
        if first is None:
            return None
        messages = sample.messages[:first]
        shown = sum(message.images for message in messages)
        if not shown:
            return None
        images = [load_image(image, self.processor.draft) for image in sample.images[:shown]]
        pixels = torch.stack([self.processor(image) for image in images])
        small = images[-1].copy()
        small.thumbnail((SIDE, SIDE))
        picture = f"held_out/{number}.jpg"
        (self.out / "held_out").mkdir(parents=True, exist_ok=True)
        small.save(self.out / picture, quality=85)
        return Asked(sample.where, messages[-1].content.replace(IMAGE, "").strip(),
                     sample.messages[first].content, picture, self.template.prompt(messages),
                     pixels)

    def answer(self, model, settings, ranks) -> list[str]:
        model.eval()
        try:
            with autocast(settings.dtype, ranks.device):
                found = generate_batch(model, [asked.ids for asked in self.asked],
                                       [asked.pixels for asked in self.asked], MOST_NEW,
                                       self.template.stop_ids)
        finally:
            model.train()
        return [self.template.tokenizer.decode(ids) for ids in found]
