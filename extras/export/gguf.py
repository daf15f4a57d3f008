"""Our VLM -> GGUF, the files of llama.cpp: the language model with its tokenizer, and the tower.

    language  -> OUT/language.gguf   (f16, bf16, q8_0)
    vision + projector -> OUT/mmproj.gguf, in the form that llama.cpp has for LLaVA

q8_0 stores 32 values of a row as 8-bit integers and one 16-bit scale: a value is off by about
1/254 of the largest of its 32 at most. Norms and biases stay float32: they are few, and everything
passes through them.
"""

from pathlib import Path

import gguf
import numpy as np
import torch

from extras.export.transformers import llava_language, refuse, stretched
from model.pretrained.families import name_by_table
from model.vlm import VLM

LANGUAGE = {  # ours -> theirs
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "layers.{}.input_layernorm": "blk.{}.attn_norm", "layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "layers.{}.self_attn.k_proj": "blk.{}.attn_k", "layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
    "layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
    "layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "layers.{}.mlp.gate_proj": "blk.{}.ffn_gate", "layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "layers.{}.mlp.down_proj": "blk.{}.ffn_down"}
VISION = {
    "patch_embedding": "v.patch_embd", "position_embedding": "v.position_embd.weight",
    "class_embedding": "v.class_embd", "pre_layernorm": "v.pre_ln", "post_layernorm": "v.post_ln",
    "layers.{}.layer_norm1": "v.blk.{}.ln1", "layers.{}.layer_norm2": "v.blk.{}.ln2",
    "layers.{}.self_attn.q_proj": "v.blk.{}.attn_q",
    "layers.{}.self_attn.k_proj": "v.blk.{}.attn_k",
    "layers.{}.self_attn.v_proj": "v.blk.{}.attn_v",
    "layers.{}.self_attn.out_proj": "v.blk.{}.attn_out",
    "layers.{}.fc1": "v.blk.{}.ffn_up", "layers.{}.fc2": "v.blk.{}.ffn_down"}
PROJECTOR = {"fc1": "mm.0", "fc2": "mm.2"}  # 1 is the GELU between them
TYPES = {"fp32": (gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
         "bf16": (gguf.LlamaFileType.MOSTLY_BF16, gguf.GGMLQuantizationType.BF16),
         "f16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
         "q8_0": (gguf.LlamaFileType.MOSTLY_Q8_0, gguf.GGMLQuantizationType.Q8_0)}


def write_language(vlm: VLM, tokenizer: dict, rows: int, dtype: str, path: Path) -> None:
    """tokenizer: gguf_tokenizer's. rows: tokens that the table must have. LoRA must be merged."""
    model = llava_language(vlm.language, rows)
    config, kind = model.config, TYPES[dtype][0]
    if config.rope_scaling is not None:
        raise ValueError(f"rope_type {config.rope_scaling['rope_type']!r}: its frequencies are not "
                         "written into a GGUF here; use --to transformers")
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    spare = [f"[PAD{number}]" for number in range(len(tokenizer["tokens"]), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")  # byte-level byte-pair encoding
    writer.add_tokenizer_pre(tokenizer["pieces"])
    writer.add_token_list(tokenizer["tokens"] + spare)
    writer.add_token_types(tokenizer["types"] + [gguf.TokenType.UNUSED] * len(spare))
    writer.add_token_merges(tokenizer["merges"])
    writer.add_eos_token_id(tokenizer["end"])
    writer.add_pad_token_id(tokenizer["padding"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer["template"])
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    if config.model_type == "llama":  # llama.cpp turns the pairs of Llama's own first code
        for name in state:
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                state[name] = interleaved(state[name], config.head_dim)
    add_tensors(writer, state, LANGUAGE, dtype)
    finish(writer)


def interleaved(weight, head_dim: int):
    """The inverse of minimind.half_split: rows of q or k (heads*hd,D) in the order of pairs."""
    rows, width = weight.shape
    halves = weight.view(rows // head_dim, 2, head_dim // 2, width)
    return halves.transpose(1, 2).reshape(rows, width)


def write_mmproj(vlm: VLM, processor, path: Path) -> None:
    """The vision tower and the projector. ValueError: llama.cpp has no such form, and why."""
    check_exportable(vlm, processor)
    config = vlm.vision.config
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(processor.size[0])
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_projection_dim(vlm.language.config.hidden_size)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    # Else it would leave out the last block, as LLaVA-1.5 does.
    writer.add_vision_block_count(len(vlm.vision.layers))
    writer.add_array("clip.vision.feature_layer", [len(vlm.vision.layers)])
    writer.add_vision_image_mean(list(processor.mean))
    writer.add_vision_image_std(list(processor.std))
    writer.add_vision_use_gelu(config.hidden_act == "gelu_pytorch_tanh")  # else: quick_gelu
    state = {**vlm.vision.state_dict(), "position_embedding": stretched(vlm.vision, processor.size)}
    add_tensors(writer, state, VISION, "f16")
    add_tensors(writer, vlm.projector.state_dict(), PROJECTOR, "f16")
    finish(writer)


def check_exportable(vlm: VLM, processor) -> None:
    vision, projector = vlm.vision.config, vlm.config.projector
    kind, shuffle = projector.kind, projector.pixel_shuffle
    refuse(vlm, {
        f"a {vision.model_type} tower: it has CLIP's and SigLIP's":
            vision.model_type not in ("clip_vision_model", "siglip_vision_model"),
        f"hidden_act {vision.hidden_act}: it has quick_gelu and gelu_pytorch_tanh":
            vision.hidden_act not in ("quick_gelu", "gelu_pytorch_tanh"),
        f"--projector {kind}: it has LLaVA's, linear, gelu, linear": kind != "mlp",
        f"--pixel_shuffle {shuffle}: its LLaVA projector takes one patch at a time": shuffle > 1,
        f"--vision_feature_select {vision.features}: it takes all patches":
            vision.features != "patches",
        "images that are not square": processor.size[0] != processor.size[1],
    }, PROJECTOR, "llama.cpp has no form for this model",
        "It takes CLIP's and SigLIP's towers and the projector mlp: fc1, fc2")


def add_tensors(writer, state: dict[str, torch.Tensor], names: dict, dtype: str) -> None:
    for name, tensor in state.items():
        array = tensor.detach().float().cpu().numpy()
        kind = TYPES[dtype][1]
        if array.ndim == 1 or name == "position_embedding":
            kind = gguf.GGMLQuantizationType.F32
        elif kind == gguf.GGMLQuantizationType.Q8_0 and array.shape[-1] % 32:
            kind = gguf.GGMLQuantizationType.F16  # a row that is not made of whole blocks
        # The package fits two kinds into NumPy's own types; the others become raw bytes.
        array = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(gguf_name(name, names), array, raw_dtype=kind)


def gguf_name(ours: str, names: dict) -> str:
    theirs = name_by_table(ours, names)
    if theirs is None:
        raise ValueError(f"llama.cpp has no name for the tensor {ours}; it has one for "
                         + ", ".join(names))
    return theirs


def finish(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
