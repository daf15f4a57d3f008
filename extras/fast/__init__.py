"""What is faster than the plain core, computes the same, and is put in its place from outside.

    prepare_for_training(vlm)              layers.py, chunked_cross_entropy.py
    prepare_for_inference(model, device)   quantize.py, fused.py, gemv.py, inference.py,
                                           cuda_graph.py

A module is swapped by giving it another class (`module.__class__ = ...`): its weights and their
names stay what they are, for checkpoints, optimizers and whoever else refers to them. The caches
(prefix_cache.py, feature_cache.py) are opened by those who use them.
"""

import torch
from torch import nn

from extras.fast.chunked_cross_entropy import chunked_cross_entropy as fast_loss
from extras.fast.fused import fuse
from extras.fast.gemv import use_fastest_routine
from extras.fast.inference import InferenceLanguageModel
from extras.fast.layers import TRAINING
from extras.fast.quantize import is_quantized, quantize, set_compute_dtype
from model.generate import language_model_of
from model.language import LanguageModel
from training.precision import choose_dtype

INFERENCE = {LanguageModel: InferenceLanguageModel}


def swap_classes(module: nn.Module, classes: dict[type, type]) -> None:
    for part in module.modules():
        part.__class__ = classes.get(type(part), type(part))


def prepare_for_training(vlm) -> None:
    """In place; after adapters were added (add_lora), since these are swapped too."""
    swap_classes(vlm.language, TRAINING)
    vlm.loss_function = fast_loss


def prepare_for_inference(model, device: torch.device, dtype: torch.dtype = torch.float32,
                          bits: str | None = None) -> None:
    """Move a VLM or a LanguageModel to device, in place and for good: cast to dtype, or its
    language model quantized to bits ("int8", "int4"), and its layers fused.

    Adapters must be merged before (merge_lora). A processor without bf16 instructions stores
    weights in bf16 all the same, and computes in float32: of 64 rows of a prompt each product then
    takes a sixth of the time.
    """
    language_model = language_model_of(model)
    native = device.type != "cpu" or choose_dtype("auto", device)[0] == "bf16"
    if dtype == torch.bfloat16 and not native:
        bits, dtype = bits or "bf16", torch.float32
    if bits and not (bits == "bf16" and is_quantized(language_model)):
        quantize(language_model, bits)
    set_compute_dtype(model, dtype)
    model.to(device)
    fuse(language_model)
    swap_classes(language_model, INFERENCE)
    use_fastest_routine(language_model)
