"""A checkpoint -> a model that is ready to answer, and a conversation with it.

    --model DIR, or the newest run -> load_model -> model, template, processor
    text, images -> Conversation.reply -> template.encode_prompt -> generate -> TextStreamer -> text

A conversation remembers every turn and image, and renders all of them anew for each answer: the
prompt is exactly what training would have made of the same messages. As far as the new prompt
begins like the last one, its keys and values are still in the cache and are not computed again.
"""

import sys
import time
from contextlib import contextmanager

import torch

from dataset.chat import IMAGE, ChatTemplate, Message
from dataset.families import DEFAULT_SYSTEM
from dataset.images import ImageProcessor
from dataset.readers.published_template import chat_facts
from dataset.tokenizer import Tokenizer
from model.generate import TextStreamer, generate
from model.lora import merge_lora
from model.pretrained.checkpoint import find_model, read_config
from model.pretrained.hub import resolve
from model.pretrained.load import load_checkpoint, load_language
from training.bundle import check_vocabulary
from training.device import HAS_EXTRAS, choose_device, is_out_of_memory, prepare_device
from training.precision import choose_dtype


def add_model_flags(parser) -> None:
    """How a model is loaded, whichever program asks."""
    add = parser.add_argument
    add("--language_model", help="where the public language model lies, if not where it was in "
        "training")
    add("--vision_tower", help="where the public vision tower lies, if not where it was in "
        "training")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 where the GPU or the processor "
        "is faster in it, else fp32; eval.py --stats tells which and why")
    add("--quantize", choices=("int8", "int4"), help="the language model's weights in so many "
        "bits: less memory, and on a CPU faster; extras/export can save them so")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")


def load_model(flags, name: str | None) -> tuple:
    """A checkpoint or run (None: the newest) -> (model, template, processor). Name "none": the
    language model of --language_model alone, whose processor is None. flags: eval.py's."""
    device = choose_device(flags.device)
    prepare_device(device)
    dtype, why = inference_dtype(device, flags.dtype)
    if getattr(flags, "stats", False):
        print(f"dtype: {str(dtype).removeprefix('torch.')} ({why})", file=sys.stderr)
    # Weights are quantized once, from float32, after the adapters are merged.
    load_dtype = torch.float32 if flags.quantize else dtype
    if name == "none":
        directory = resolve(flags.language_model or "dataset/emoji/language")
        model, processor = load_language(directory, load_dtype).eval(), None
        tokenizer = Tokenizer.from_directory(directory)
        family, system = ((flags.template, DEFAULT_SYSTEM[flags.template]) if flags.template
                          else chat_facts(tokenizer, model.config.model_type))
        facts = (0, system, None, family)
    else:
        directory = find_model(name)
        model = load_checkpoint(directory, load_dtype, flags.language_model, flags.vision_tower)
        merge_lora(model.language)  # adapters would cost two more products in every layer
        processor, config = ImageProcessor.from_directory(directory), read_config(directory)
        facts = (config["image_tokens"], config["system"], config.get("image_token"),
                 config["template"])
        print(f"model: {directory}", file=sys.stderr)
        # What it was trained in counts, not what its base was published with.
        tokenizer = Tokenizer(Tokenizer.from_directory(directory).backend)
    template = ChatTemplate(tokenizer, *facts)
    check_vocabulary(template, getattr(model, "language", model).config.vocab_size)
    if flags.system is not None:
        template.default_system = flags.system or None
    prepare_model(model, device, dtype, flags.quantize)
    return model, template, processor


def inference_dtype(device: torch.device, name: str | None) -> tuple[torch.dtype, str]:
    """name: fp32, bf16, or None for what suits the device -> the dtype, and why. Never fp16: in it
    some public models grow past 65,504. ValueError where the device computes wrongly."""
    chosen, why = choose_dtype(name or "auto", device)
    dtype = torch.bfloat16 if chosen == "bf16" else torch.float32
    if device.type == "mps" and dtype != torch.float32:
        raise ValueError("--device mps computes wrongly in bfloat16: its causal attention lets "
                         "tokens see later ones (pytorch issue 195910). Use --dtype fp32, or "
                         "--device cpu")
    return dtype, why


def prepare_model(model, device: torch.device, dtype: torch.dtype, bits: str | None) -> None:
    """Move the model to the device, with its layers as fast as they can be."""
    if HAS_EXTRAS:
        from extras.fast import prepare_for_inference

        prepare_for_inference(model, device, dtype, bits)
    elif bits:
        raise ValueError(f"--quantize {bits} needs extras/fast, which is missing")
    else:
        model.to(device, dtype)


class Conversation:
    """model: a VLM, or a LanguageModel alone with processor None. sampling: generate's settings
    by name (max_new_tokens, temperature, ...)."""

    def __init__(self, model, template, processor, sampling: dict, seed: int = 0):
        self.model, self.template, self.processor = model, template, processor
        self.sampling = {**sampling, "generator": torch.Generator().manual_seed(seed)}
        self.speed = "nothing was said yet"
        self.prefix_cache = None  # each prompt is computed anew
        if HAS_EXTRAS:
            from extras.fast.prefix_cache import PrefixCache

            # Outlives a reset: the next prompt may begin with the same system turn and image.
            self.prefix_cache = PrefixCache()
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Forget everything. system: the first turn from now on; None: the template's own."""
        self.messages = [] if system is None else [Message("system", system)]
        self.pixels = []  # each (3,H,W), in the order of the messages' placeholders
        self.waiting = []  # pixels that go with the next message
        self.sources = []  # of all of these, what `show` was given
        self.prompt_ids, self.answer_ids = [], []  # of the last answer, as far as it has come

    def show(self, image) -> None:
        """A path or a PIL image goes with the next message. OSError: it cannot be read."""
        if self.processor is None:
            raise ValueError("a language model alone sees no images")
        self.waiting.append(self.processor.read(image))
        self.sources.append(image)

    def transcript(self) -> list[Message]:
        """Every turn that was answered, and the system turn that stands before them."""
        turns = list(self.messages)
        if turns and turns[-1].role == "assistant" and not turns[-1].content.strip():
            turns = turns[:-2]  # stopped before the first token
        if not any(turn.role == "assistant" for turn in turns):
            return []
        system = self.template.default_system
        if system is not None and turns[0].role != "system":
            turns.insert(0, Message("system", system))
        return turns

    def reply(self, text: str):
        """Yield the answer's text as it comes. Whenever the caller stops, the answer so far is
        remembered; an error (ValueError) leaves the conversation as it was."""
        placeholders = text.count(IMAGE)
        if placeholders == 0:
            text = f"{IMAGE}\n" * len(self.waiting) + text
        elif placeholders != len(self.waiting):
            raise ValueError(f"you wrote {IMAGE} {placeholders} times, which stands for an image, "
                             f"but {len(self.waiting)} images wait; without it they come first")
        messages = [*self.messages, Message("user", text)]
        pixels = [*self.pixels, *self.waiting]
        ids = self.template.encode_prompt(messages)
        stream, answer, times = TextStreamer(self.template.tokenizer), "", [time.perf_counter()]
        self.prompt_ids, self.answer_ids = ids, stream.ids

        def pieces():
            for token in generate(self.model, ids, torch.stack(pixels) if pixels else None,
                                  prefix_cache=self.prefix_cache, stop_ids=self.template.stop_ids,
                                  **self.sampling):
                times.append(time.perf_counter())
                self.speed = format_speed(len(ids), times)
                yield stream.add(token)
            yield stream.end()

        for piece in pieces():
            answer += piece
            self.messages = [*messages, Message("assistant", answer)]
            self.pixels, self.waiting = pixels, []
            yield piece


def format_speed(prompt_tokens: int, times: list[float]) -> str:
    """times: in seconds, of the request and of each new token."""
    text = (f"{prompt_tokens} prompt tokens in {times[1] - times[0]:.2f} s, "
            f"{len(times) - 1} tokens answered")
    if len(times) > 2:
        text += f", {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s"
    return text


@contextmanager
def exit_on_error(script: str):
    """Errors that say what is wrong and what to do end the program without a traceback."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{script}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit(
            f"{script}: out of memory: {str(error).strip().splitlines()[0]}\nWhat helps: a "
            "smaller --batch_size (with --data), fewer --max_new_tokens, --quantize int8, --dtype "
            "bf16, or --device cpu") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # what a shell expects of an interrupted program
