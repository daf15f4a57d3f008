"""What the model answers while it learns: a few held-out questions, the same ones every time.

    held-out samples -> the first --eval_answers that show an image -> OUT/held_out/1.jpg ...
    every --eval_steps steps: their first questions -> greedy answers -> a line of answers.jsonl

A loss says that something gets better; the answers say what: first the form, then the words, then
what is in the image. report.py lays them out beside the images.

Rank 0 generates alone, the others wait for it at the next sum. Generating draws no random number
and changes no weight. Nothing that fails here ends a training: the reason stands in the place of
the answers.
"""

from dataclasses import replace
from pathlib import Path

from dataset.chat import IMAGE
from dataset.images import load_image
from dataset.readers.bad_sample import BadSample
from evaluation.eval_samples import Question, questions_of
from evaluation.score import Predictor
from training.precision import autocast

MAX_NEW_TOKENS = 64  # a model that has not learned to stop would go on
SIDE = 224  # pixels of a small image's longer side


class Answers:
    """The questions, chosen at the first measurement, and what the model answers to them."""

    def __init__(self, data, template, processor, settings):
        """data: the held-out samples."""
        self.data, self.template, self.processor = data, template, processor
        self.out, self.number = Path(settings.out), settings.eval_answers
        self.questions = None  # not chosen yet

    def ask(self, model, settings, distributed) -> dict | None:
        """-> a line of answers.jsonl without its step; None but on rank 0, and under fsdp: there
        every rank would have to go through each token with rank 0."""
        if not distributed.main or settings.parallel == "fsdp":
            return None
        predictor = Predictor(model.eval(), self.template, self.processor,
                              max_new_tokens=MAX_NEW_TOKENS, stop_after_truth=False)
        try:
            if self.questions is None:
                self.questions = self.choose()
            with autocast(settings.dtype, distributed.device):
                predictions, _ = predictor.predict(self.questions)
        except Exception as error:  # no memory, no disk: the training has them, and goes on
            return {"problem": f"{type(error).__name__}: {error}".strip(), "answers": []}
        finally:
            model.train()
        return {"answers": [
            {"where": p.question.where, "image": p.question.tags["image"],
             "question": p.question.messages[-1].content.replace(IMAGE, "").strip(),
             "truth": p.question.truth, "answer": p.answer} for p in predictions]}

    def choose(self) -> list[Question]:
        """The first ones whose image can be read, always the same; a small one is written, and its
        file, relative to OUT, is a tag of the question."""
        chosen = []
        (self.out / "held_out").mkdir(parents=True, exist_ok=True)
        for i in range(len(self.data)):
            if len(chosen) == self.number:
                break
            try:
                for question in questions_of(self.data[i])[:1]:
                    if question.images:
                        small = load_image(question.images[-1], self.processor.draft).copy()
                        small.thumbnail((SIDE, SIDE))
                        file = f"held_out/{len(chosen) + 1}.jpg"
                        small.save(self.out / file, quality=85)
                        chosen.append(replace(question, tags={"image": file}))
            except (BadSample, OSError, ValueError):  # reported and counted by the loss beside it
                continue
        return chosen
