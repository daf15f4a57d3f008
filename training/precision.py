"""Which numbers the matrix products use: bf16 where the hardware has it, else float32.

bf16 halves the memory of activations and doubles the speed, on hardware that multiplies it. Other
hardware takes it too, and converts to float32 and back for every product: four times *slower* than
float32 on a processor with AVX-512 but without its bf16 instructions.
"""

import torch


def choose_dtype(wanted: str, device: torch.device) -> tuple[str, str]:
    """wanted: "auto", "bf16" or "fp32" -> what is used, and why, in a few words."""
    if wanted != "auto":
        return wanted, "as asked"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        name = "this processor"
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if native:
        return "bf16", f"{name} multiplies it natively"
    return "fp32", f"{name} has no bf16 instructions"
