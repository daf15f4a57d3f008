"""A name -> what answers: a model on its device, its chat template and its image processor.

    --model DIR, or the newest run -> load -> (model, template, processor)
"""

import sys

import torch

from dataset.chat import DEFAULT_SYSTEM, ChatTemplate
from dataset.images import ImageProcessor
from dataset.tokenizer import Tokenizer
from extras.fast.fused import join
from extras.fast.quantize import compute_in, is_quantized, quantize
from model.generate import decoder_of
from model.lora import merge_lora
from model.pretrained.checkpoint import find_model, read_config
from model.pretrained.hub import resolve
from model.pretrained.load import load_checkpoint, load_language
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
        directory = resolve(flags.language or "dataset/emoji/language")
        model = load_language(str(directory), loaded).eval()
        tokenizer = Tokenizer.from_directory(directory)
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
                                config["system"], config.get("image_token"), config["template"])
        processor = ImageProcessor.from_directory(directory)
        print(f"model: {directory}", file=sys.stderr)
    if flags.system is not None:
        template.default_system = flags.system or None
    lighten(model, flags.quantize, dtype, device)
    model.to(device)
    join(decoder_of(model))
    return model, template, processor


def chat_dtype(device: torch.device, wanted: str | None) -> tuple[torch.dtype, str]:
    """wanted: fp32, bf16, or None for what suits the device -> the dtype, and why.

    bf16 where the hardware multiplies it: half the bytes to read for each token. Never fp16: in it
    some public models grow past 65,504.
    """
    if wanted:
        return NUMBERS[wanted], "as asked"
    dtype, why = choose_dtype("auto", device)
    return (NUMBERS[dtype], why) if dtype == "bf16" else (torch.float32, why)


def lighten(model, bits: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Cast or quantize the weights for inference.

    A processor without bf16 instructions reads bf16 weights all the same, and computes in float32:
    of 64 rows of a prompt each product then takes a sixth of the time.
    """
    native = device.type != "cpu" or choose_dtype("auto", device)[0] == "bf16"
    if dtype == torch.bfloat16 and not native:
        bits, dtype = bits or "bf16", torch.float32
    language = decoder_of(model)
    if bits and not (bits == "bf16" and is_quantized(language)):
        quantize(language, bits)
    compute_in(model, dtype)
