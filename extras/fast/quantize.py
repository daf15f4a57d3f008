"""Quantized weights: a language model in, the same model with smaller matrices in their place.

Every new token of an answer reads all weights once and multiplies each of them once, so a chat
waits for the memory and not for the arithmetic: half the bytes, nearly twice the tokens.

    bf16   16 bits  w                      as most models are published: nothing is lost
    int8    8 bits  q * scale              one scale for each row of a matrix (output channel)
    int4    4 bits  q * scale + offset     one scale and one offset for each GROUP weights of a row

Activations stay in bf16 or more. For a prompt's many rows, which share one reading of the weights,
the matrix is dequantized first, and the product is the usual one. The embedding table (also the
head, where they are tied) takes int8 at least: each token has one row in it, and a wrong token
costs more than a slow one.

Paper: LLM.int8() (Dettmers et al. 2022), of which this is the weight-only half; the groups are
those of GPTQ (Frantar et al. 2023), rounded to the nearest without its search.
"""

import torch
import torch.nn.functional as F
from torch import nn

from extras.fast.gemv import linear
from extras.fast.inference import InferenceLanguageModel
from model.language import LanguageModel
from model.lora import LoRALinear, linear_names

BITS = ("bf16", "int8", "int4")
GROUP = 32  # weights that share a scale in int4: 5 bits a weight in all
FEW_ROWS = 16  # up to here torch's kernels for quantized weights beat dequantizing the matrix


class QuantizedLinear(nn.Module):
    """Replaces an nn.Linear or an nn.Embedding: ids look rows up, hidden states are multiplied; a
    tied head is the same table used in both ways.

    weight (out,in) bfloat16 or int8, or uint8 (out,in/2) with two int4 in a byte, the lower four
    bits first. scale: (out,) for int8; (out,in/GROUP) for int4, as is offset. bias (out,) or None.
    """

    def __init__(self, weight, scale=None, offset=None, bias=None):
        super().__init__()
        for name, tensor in dict(weight=weight, scale=scale, offset=offset, bias=bias).items():
            fixed = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            self.register_parameter(name, fixed)
        self.int4_kernel = None  # int4 in the layout of torch's kernel, made at first need

    def forward(self, x):
        """ids (...) -> rows (...,in); or hidden states (...,in) -> (...,out)"""
        if not x.is_floating_point():
            rows = self.weight[x]
            return rows if self.scale is None else rows * self.scale[x][..., None].float()
        flat = x.reshape(-1, x.shape[-1])  # (M,in)
        out = (gemv if can_use_gemv(self, flat) else dequantized_matmul)(self, flat)  # (M,out)
        out = out.view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def dequantized_matmul(layer: QuantizedLinear, x):
    """x (M,in) -> (M,out) on any device: dequantize the matrix for this one product."""
    if layer.offset is not None:
        scale, offset = layer.scale.to(x.dtype), layer.offset.to(x.dtype)
        return F.linear(x, dequantize_int4(layer.weight, scale, offset))
    out = F.linear(x, layer.weight.to(x.dtype))
    # A row's scale is a factor of what the row gives: cheaper there than on the row itself.
    return out if layer.scale is None else out * layer.scale.to(x.dtype)


def can_use_gemv(layer: QuantizedLinear, x) -> bool:
    """Whether gemv can compute it, and sooner: torch's kernels need whole blocks of a matrix."""
    if layer.weight.device.type != "cpu":
        return False
    if layer.scale is None:
        return len(x) == 1
    return len(x) <= FEW_ROWS and len(layer.weight) % 16 == 0 and x.shape[1] % 32 == 0


def gemv(layer: QuantizedLinear, x):
    """x (M,in), few rows -> (M,out) on a CPU: the weights go into the product as they are stored.

    The kernels take x in bf16, and add up in float32. bf16 weights go through whichever of torch's
    routines reads them fastest here (gemv.py).
    """
    narrow, ops = x.to(torch.bfloat16).contiguous(), torch.ops.aten
    if layer.scale is None:
        out = linear(narrow, layer.weight)
    elif layer.offset is None:
        out = ops._weight_int8pack_mm(narrow, layer.weight, layer.scale.to(torch.bfloat16))
    else:
        # The order in which the kernel reads differs from processor to processor, so no file has
        # it, and the plain form stays beside it for prompts.
        layer.int4_kernel = layer.int4_kernel or (
            ops._convert_weight_to_int4pack_for_cpu(unpack_int4(layer.weight).to(torch.int32), 1),
            torch.stack([layer.scale.t(), layer.offset.t()], dim=-1).to(torch.bfloat16))
        packed, scale_and_offset = layer.int4_kernel
        out = ops._weight_int4pack_mm_for_cpu(narrow, packed, GROUP, scale_and_offset)
    return out.to(x.dtype)


# ---------------------------------------------------------------- rounding


def to_int8(weight):
    """(out,in) -> int8 (out,in), and scale (out,) in bf16: w is about q * scale.

    127 steps to each side, so the error of a weight is at most 1/254 of the largest of its row. The
    scale is rounded to bf16 first (upwards, for the largest weight's sake) and the weights are
    divided by that: so its own rounding costs nothing.
    """
    weight = weight.float()
    scale = (weight.abs().amax(1) / 127 * (1 + 2**-8)).clamp(min=1e-30).to(torch.bfloat16)
    return (weight / scale.float()[:, None]).round().to(torch.int8), scale


def to_int4(weight):
    """(out,in) -> uint8 (out,in/2), scale and offset (out,in/GROUP) in bf16.

    The 16 values 0..15 span from the least to the largest weight of a group; 8 stands for offset
    itself, as in torch's kernel.
    """
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // GROUP, GROUP)
    least, largest = groups.amin(-1), groups.amax(-1)
    scale = ((largest - least) / 15).clamp(min=1e-30).to(torch.bfloat16)
    offset = (least + 8 * scale.float()).to(torch.bfloat16)
    q = ((groups - offset.float()[..., None]) / scale.float()[..., None]).round() + 8
    q = q.clamp(0, 15).to(torch.uint8).view(rows, columns // 2, 2)
    return q[..., 0] | q[..., 1] << 4, scale, offset


def unpack_int4(packed):
    """uint8 (out,in/2), two values in a byte -> uint8 (out,in), 0 to 15"""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def dequantize_int4(packed, scale, offset):
    """-> (out,in) in the dtype of scale"""
    q = unpack_int4(packed).view(*scale.shape, GROUP).to(scale.dtype)
    return ((q - 8) * scale[..., None] + offset[..., None]).flatten(1)


def quantize_linear(weight, bias, bits: str) -> QuantizedLinear:
    """bits: one of BITS. int4 needs rows of whole groups; others become int8."""
    if bits == "bf16":
        return QuantizedLinear(weight.to(torch.bfloat16), bias=bias)
    if bits == "int4" and weight.shape[1] % GROUP == 0:
        return QuantizedLinear(*to_int4(weight), bias=bias)
    return QuantizedLinear(*to_int8(weight), bias=bias)


@torch.no_grad()
def quantize(model: LanguageModel, bits: str) -> None:
    """Quantize every matrix of a LanguageModel to `bits`, one of BITS, in place and for good.

    On the meta device it makes empty tensors for weights that a file holds. Norms and biases stay
    as they are: one weight in a thousand, through which everything passes.
    """
    if bits not in BITS:
        raise ValueError(f"weights in {bits!r}; expected one of {', '.join(BITS)}")
    if adapted := linear_names(model, LoRALinear):
        raise ValueError(f"{adapted[0]} has an adapter: merge_lora first, else W and its adapter "
                         "would be rounded apart")
    if is_quantized(model):
        raise ValueError("the weights are quantized already; rounding twice loses twice")
    table = "bf16" if bits == "bf16" else "int8"
    for name in linear_names(model):
        layer = model.get_submodule(name)
        model.set_submodule(name, quantize_linear(layer.weight, layer.bias,
                                                  table if name == "lm_head" else bits))
    model.embed_tokens = quantize_linear(model.embed_tokens.weight, None, table)
    model.__class__ = InferenceLanguageModel  # which knows that a tied head is quantized


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Activations are in dtype from now on; quantized matrices stay as they are."""
    for part in model.modules():
        if not isinstance(part, QuantizedLinear):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(part, QuantizedLinear) for part in model.modules())
