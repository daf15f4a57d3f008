"""What is faster than the plain core, computes the same, and is put in its place from outside."""

import torch


def prepare_for_inference(model, device: torch.device, dtype: torch.dtype = torch.float32,
                          bits: str | None = None) -> None:
    """Move a VLM or a LanguageModel to device, in place and for good: cast to dtype, or its
    language model quantized to bits ("int8", "int4"), and its layers fused.

    A processor without bf16 instructions stores weights in bf16 all the same, and computes in
    float32: of 64 rows of a prompt each product then takes a sixth of the time.
    """
    from extras.fast.fused import join  # here: model.language imports a file of this package
    from extras.fast.quantize import compute_in, is_quantized, quantize
    from model.generate import decoder_of
    from training.precision import choose_dtype

    decoder = decoder_of(model)
    native = device.type != "cpu" or choose_dtype("auto", device)[0] == "bf16"
    if dtype == torch.bfloat16 and not native:
        bits, dtype = bits or "bf16", torch.float32
    if bits and not (bits == "bf16" and is_quantized(decoder)):
        quantize(decoder, bits)
    compute_in(model, dtype)
    model.to(device)
    join(decoder)
