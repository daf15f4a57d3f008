"""A name -> what answers: a model on its device, its chat template and its image processor.

    --model DIR, or the newest run -> load -> (model, template, processor)
"""

import sys

import torch

from dataset.chat import ChatTemplate
from dataset.families import DEFAULT_SYSTEM
from dataset.images import ImageProcessor
from dataset.tokenizer import Tokenizer
from model.language import LanguageModel
from model.lora import merge_lora
from model.pretrained.checkpoint import (
    base_directory,
    find_base,
    find_model,
    load_checkpoint,
    read_config,
)
from training.device import check_dtype, choose_device, prepare_device
from training.precision import NUMBERS, choose_dtype


def load(flags, name: str | None):
    """A checkpoint -> (model, template, processor); with name "none": without eyes, so None.

    flags: device, dtype, quantize, language, vision, template and system, as eval.py reads them.
    """
    device = choose_device(flags.device)
    prepare_device(device)
    dtype, why = chat_dtype(device, flags.dtype)
    check_dtype(device, dtype)
    # What is rounded to few bits is rounded once, after the adapters were merged.
    loaded = torch.float32 if flags.quantize else dtype
    if getattr(flags, "stats", False):
        print(f"dtype: {str(dtype).removeprefix('torch.')} ({why})", file=sys.stderr)
    if name == "none":
        directory = find_base(flags.language or "dataset/emoji/language")
        model = LanguageModel.from_pretrained(str(directory), loaded).eval()
        tokenizer = Tokenizer.from_directory(base_directory(directory))
        family = flags.template or model.config.model_type
        template = ChatTemplate(tokenizer, image_tokens=0,
                                default_system=DEFAULT_SYSTEM[family], family=family)
        processor = None
    else:
        directory = find_model(name)
        config = read_config(directory)
        model = load_checkpoint(directory, loaded, flags.language, flags.vision)
        merge_lora(model.language)  # adapters would cost two more products in every layer
        template = ChatTemplate(Tokenizer.from_directory(directory), config["image_tokens"],
                                config["system"], config.get("image_token"),
                                config.get("template", "qwen2"))  # the first ones had no other
        processor = ImageProcessor.from_directory(directory)
        print(f"model: {directory}", file=sys.stderr)
    if flags.system is not None:
        template.default_system = flags.system or None
    make_ready(model, device, dtype, flags.quantize)
    return model, template, processor


def chat_dtype(device: torch.device, wanted: str | None) -> tuple[torch.dtype, str]:
    """wanted: fp32, bf16, or None for what suits the device -> the dtype, and why.

    bf16 where the hardware is faster in it, with half the bytes to read for each token. Never fp16:
    in it some public models grow past 65,504.
    """
    if wanted:
        return NUMBERS[wanted], "as asked"
    dtype, why = choose_dtype("auto", device)
    return (NUMBERS[dtype], why) if dtype == "bf16" else (torch.float32, why)


def make_ready(model, device: torch.device, dtype: torch.dtype, bits: str | None) -> None:
    """Move the model to device, with its layers as fast as they can be."""
    try:
        from extras.fast import prepare_for_inference
    except ModuleNotFoundError as error:  # without extras/ everything else works, slower
        if bits:
            raise ValueError(f"--quantize {bits} needs extras/fast, which is missing") from error
        model.to(device, dtype)
        return
    prepare_for_inference(model, device, dtype, bits)
