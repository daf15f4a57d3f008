"""One conversation with a model: what you say and show -> the answer's text, piece by piece.

    text, pictures -> Conversation.reply -> template.prompt -> generate -> TextStreamer -> text

It remembers every turn and picture, and renders all of them anew for each answer: the prompt is
exactly what training would have made of the same words. As far as the new prompt begins like the
last one, pictures with it, the decoder's work is still there (PrefixCache) and is not done again.
"""

import time

import torch

from dataset.chat import IMAGE, Message
from dataset.images import load_image
from model.generate import TextStreamer, generate


class Conversation:
    """model: a VLM, or a LanguageModel alone with processor None. sampling: generate's settings
    by name (max_new_tokens, temperature, ...)."""

    def __init__(self, model, template, processor, sampling: dict, seed: int = 0):
        self.model, self.template, self.processor = model, template, processor
        self.sampling = {**sampling, "generator": torch.Generator().manual_seed(seed)}
        self.speed = "nothing was said yet"
        # Outlives a reset: the next prompt may begin with the same system turn and picture.
        self.prefix_cache = new_prefix_cache()
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Forget everything. system: the first turn from now on; None: the template's own."""
        self.messages = [] if system is None else [Message("system", system)]
        self.pixels = []  # each (3,H,W), in the order of the messages' markers
        self.waiting = []  # pictures that go with the next thing you say
        self.sources = []  # of all of these, what `show` was given
        self.asked, self.answered = [], []  # ids of the last prompt, and of its answer so far

    def show(self, image) -> None:
        """A path or a PIL image goes with the next thing you say. OSError: it cannot be read."""
        if self.processor is None:
            raise ValueError("a language model alone sees no pictures")
        self.waiting.append(self.processor(load_image(image, self.processor.draft)))
        self.sources.append(image)

    def transcript(self) -> list[Message]:
        """Every turn that was answered, and the system turn that stands before them."""
        turns = list(self.messages)
        if turns and turns[-1].role == "assistant" and not turns[-1].content.strip():
            turns = turns[:-2]  # stopped before the first word
        if not any(turn.role == "assistant" for turn in turns):
            return []
        system = self.template.default_system
        if system is not None and turns[0].role != "system":
            turns.insert(0, Message("system", system))
        return turns

    def reply(self, text: str):
        """Yield the answer's text as it comes. Whenever you stop listening, what was said until
        then is remembered; an error (ValueError) leaves the conversation as it was."""
        markers = text.count(IMAGE)
        if markers == 0:
            text = f"{IMAGE}\n" * len(self.waiting) + text
        elif markers != len(self.waiting):
            raise ValueError(f"you wrote {IMAGE} {markers} times, which stands for a picture, but "
                             f"{len(self.waiting)} pictures wait; without it they come first")
        messages = [*self.messages, Message("user", text)]
        pixels = [*self.pixels, *self.waiting]
        ids = self.template.prompt(messages)
        tokens = generate(self.model, ids, torch.stack(pixels) if pixels else None,
                          prefix_cache=self.prefix_cache, stop_ids=self.template.stop_ids,
                          **self.sampling)

        def remember(answer: str) -> None:
            self.messages = [*messages, Message("assistant", answer)]
            self.pixels, self.waiting = pixels, []

        stream, answer, clock = TextStreamer(self.template.tokenizer), "", [time.perf_counter()]
        self.asked, self.answered = ids, stream.ids
        for token in tokens:
            clock.append(time.perf_counter())
            self.speed = speed(len(ids), clock)
            piece = stream.add(token)
            answer += piece
            remember(answer)
            yield piece
        piece = stream.end()
        remember(answer + piece)
        yield piece


def new_prefix_cache():
    try:
        from extras.fast.prefix_cache import PrefixCache
    except ModuleNotFoundError:  # without extras/ each prompt is computed anew
        return None
    return PrefixCache()


def speed(prompt: int, clock: list[float]) -> str:
    """clock: when the answer was asked for, and when each of its tokens came."""
    told = (f"{prompt} prompt tokens in {clock[1] - clock[0]:.2f} s, "
            f"{len(clock) - 1} tokens answered")
    if len(clock) > 2:
        told += f", {(len(clock) - 2) / (clock[-1] - clock[1]):.1f} tokens/s"
    return told
