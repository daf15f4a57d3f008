"""Talk to a trained model, ask it one thing, or score it on a file.

    python eval.py                                            chat with the newest checkpoint
    python eval.py --image cat.jpg --prompt "Who is it?"      one answer on stdout, nothing else
    echo "Who is it?" | python eval.py --image cat.jpg        the same, for each line an answer
    python eval.py --data FILE --images DIR                   scores, as the data's authors count
    python eval.py --data emoji                               the same, on unseen emoji scenes
    python eval.py --model none --language DIR                chat with a language model alone

Flow: checkpoint directory -> load -> model, template, processor -> chat, one answer or scores.
"""

import argparse
import sys

import torch

from dataset.chat import DEFAULT_SYSTEM, FAMILIES, ChatTemplate
from dataset.images import ImageProcessor
from dataset.tokenizer import Tokenizer
from evaluation.conversation import Conversation
from evaluation.metrics import METRICS
from evaluation.terminal import chat, say
from model.checkpoint import base_directory, find_base, find_model, load_checkpoint, read_config
from model.generate import decoder_of
from model.language import LanguageModel
from model.lora import merge_lora
from model.quantize import compute_in, is_quantized, quantize
from training.precision import NUMBERS, choose_dtype


def read_flags(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", metavar="DIR", help="checkpoint or run (default: the newest in out/sft, else "
        "in out/pretrain); none: the language model of --language alone")
    add("--language", help="where the public language model lies, if not where it was in training")
    add("--vision", help="where the public vision tower lies, if not where it was in training")
    add("--image", nargs="+", default=[], metavar="PICTURE", help="pictures shown "
        "with --prompt, or with the first thing you say")
    add("--prompt", help="ask this once: only the answer goes to stdout")
    add("--system", help='system turn; "": none (default: as in training)')
    add("--template", choices=FAMILIES, help="with --model none: whose chat template (default: by "
        "the model's type); a checkpoint knows its own")
    add("--data", nargs="+", metavar="FILE", help="files of conversations to score, or emoji: "
        "unseen scenes; \"part-*.parquet\" is each such file")
    add("--images", help="directory that the file's picture names are relative to")
    add("--metric", choices=("auto", *METRICS), default="auto", help="with --data: how an answer "
        "is scored (%(default)s: as the authors of the data do; exact for conversations)")
    add("--suffix", help="with --data: said behind each question of a benchmark, which decides the "
        "form of the answer (default: the usual words for its metric; \"\": nothing)")
    add("--limit", type=int, help="score the first so many samples only")
    add("--batch_size", type=int, default=64, help="questions answered at once (%(default)s)")
    add("--report", metavar="DIR", help="with --data: write scores.json and answers.jsonl here, "
        "not to out/scores/DATA; also score the model before each stage, and draw two PNG files")
    add("--max_new_tokens", type=int, default=256, help="longest answer (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    add("--top_k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest that reach this share")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: repeat less")
    add("--seed", type=int, default=0, help="of the draws")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on CUDA, else fp32")
    add("--quantize", choices=("int8", "int4"), help="the language model's weights in so many "
        "bits: less memory, and on a CPU faster; export.py can save them so")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    add("--stats", action="store_true", help="tell the speed after each answer, on stderr")
    flags = parser.parse_args(arguments)
    for name in ("max_new_tokens", "batch_size", "repetition_penalty"):
        if not getattr(flags, name) > 0:
            parser.error(f"--{name} {getattr(flags, name)}: expected a number above 0")
    if flags.template and flags.model != "none":
        parser.error("--template needs --model none: a checkpoint is asked as it was trained")
    for name in ("report", "suffix", "metric"):
        if getattr(flags, name) not in (None, "auto") and not flags.data:
            parser.error(f"--{name} needs --data")
    if flags.image and flags.data:
        parser.error("--image is for a chat; with --data the file names the pictures")
    return flags


def load(flags, name: str | None):
    """A checkpoint -> (model, template, processor); with name "none": without eyes, so None."""
    device = flags.device
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    fp32 = flags.dtype == "fp32" or (flags.dtype is None and not device.startswith("cuda"))
    dtype = torch.float32 if fp32 else torch.bfloat16
    if name == "none":
        directory = find_base(flags.language or "dataset/emoji/language")
        model = LanguageModel.from_pretrained(str(directory), dtype).eval()
        tokenizer = Tokenizer.from_directory(base_directory(directory))
        family = flags.template or model.config.model_type
        template = ChatTemplate(tokenizer, image_tokens=0,
                                default_system=DEFAULT_SYSTEM[family], family=family)
        processor = None
    else:
        directory = find_model(name)
        config = read_config(directory)
        model = load_checkpoint(directory, dtype, flags.language, flags.vision)
        merge_lora(model.language)  # adapters would cost two more products in every layer
        template = ChatTemplate(Tokenizer.from_directory(directory), config["image_tokens"],
                                config["system"], config.get("image_token"),
                                config.get("template", "qwen2"))  # the first ones had no other
        processor = ImageProcessor.from_directory(directory)
        print(f"model: {directory}", file=sys.stderr)
    if flags.system is not None:
        template.default_system = flags.system or None
    lighten(model, flags.quantize, dtype, device)
    return model.to(device), template, processor


def lighten(model, bits: str | None, dtype: torch.dtype, device: str) -> None:
    """Fewer bytes to read for each word of an answer, in the numbers that this machine counts in.

    A processor without bf16 instructions reads bf16 weights all the same, and computes in float32:
    of 64 rows of a prompt each product then takes a sixth of the time.
    """
    if device == "cpu" and dtype == torch.bfloat16:
        bits, dtype = bits or "bf16", NUMBERS[choose_dtype("auto", torch.device(device))[0]]
    language = decoder_of(model)
    if bits and not (bits == "bf16" and is_quantized(language)):
        quantize(language, bits)
    compute_in(model, dtype)


def main(arguments=None) -> None:
    flags = read_flags(arguments)
    try:
        model, template, processor = load(flags, flags.model)
        if flags.data:
            from evaluation.run import evaluate  # here: a chat needs no plotting library

            evaluate(flags, load, model, template, processor)
            return
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
        sampling = {name: getattr(flags, name) for name in names}
        conversation = Conversation(model, template, processor, sampling, flags.seed)
        for path in flags.image:
            conversation.show(path)
        if flags.prompt is None:
            chat(conversation, flags.stats)
        else:
            say(conversation, flags.prompt, flags.stats)
    except (OSError, ValueError, KeyError) as error:  # each says what is wrong and what to do
        raise SystemExit(f"eval.py: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # what a shell expects of an interrupted program


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # Windows would choose a code page
        stream.reconfigure(encoding="utf-8", errors="replace")
    main()
