"""What published files call their tensors: names in a file on the left, ours on the right.

    a table -> read from left to right to load (load.py), right to left to save (save.py)

A line names one tensor, or a layer, and then stands for its weight and its bias.
families.py says which family has which table.
"""

LANGUAGE = {  # Llama, Qwen2, Qwen3
    "model.embed_tokens": "embed_tokens",
    "model.layers.{}.input_layernorm": "layers.{}.input_layernorm",
    "model.layers.{}.self_attn.q_proj": "layers.{}.self_attn.q_proj",
    "model.layers.{}.self_attn.k_proj": "layers.{}.self_attn.k_proj",
    "model.layers.{}.self_attn.v_proj": "layers.{}.self_attn.v_proj",
    "model.layers.{}.self_attn.o_proj": "layers.{}.self_attn.o_proj",
    "model.layers.{}.self_attn.q_norm": "layers.{}.self_attn.q_norm",  # Qwen3
    "model.layers.{}.self_attn.k_norm": "layers.{}.self_attn.k_norm",  # Qwen3
    "model.layers.{}.post_attention_layernorm": "layers.{}.post_attention_layernorm",
    "model.layers.{}.mlp.gate_proj": "layers.{}.mlp.gate_proj",
    "model.layers.{}.mlp.up_proj": "layers.{}.mlp.up_proj",
    "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down_proj",
    "model.norm": "norm",
    "lm_head": "lm_head",
}
SIGLIP_AND_CLIP = {
    "vision_model.embeddings.class_embedding": "class_embedding",  # CLIP
    "vision_model.embeddings.patch_embedding": "patch_embedding",
    "vision_model.embeddings.position_embedding.weight": "position_embedding",
    "vision_model.pre_layrnorm": "pre_layernorm",  # CLIP; published with this spelling
    "vision_model.encoder.layers.{}.layer_norm1": "layers.{}.layer_norm1",
    "vision_model.encoder.layers.{}.self_attn.q_proj": "layers.{}.self_attn.q_proj",
    "vision_model.encoder.layers.{}.self_attn.k_proj": "layers.{}.self_attn.k_proj",
    "vision_model.encoder.layers.{}.self_attn.v_proj": "layers.{}.self_attn.v_proj",
    "vision_model.encoder.layers.{}.self_attn.out_proj": "layers.{}.self_attn.out_proj",
    "vision_model.encoder.layers.{}.layer_norm2": "layers.{}.layer_norm2",
    "vision_model.encoder.layers.{}.mlp.fc1": "layers.{}.fc1",
    "vision_model.encoder.layers.{}.mlp.fc2": "layers.{}.fc2",
    "vision_model.post_layernorm": "post_layernorm",  # SigLIP; of CLIP for its class token
}
DINOV2 = {
    "embeddings.cls_token": "class_embedding",
    "embeddings.patch_embeddings.projection": "patch_embedding",
    "embeddings.position_embeddings": "position_embedding",
    "encoder.layer.{}.norm1": "layers.{}.layer_norm1",
    "encoder.layer.{}.attention.attention.query": "layers.{}.self_attn.q_proj",
    "encoder.layer.{}.attention.attention.key": "layers.{}.self_attn.k_proj",
    "encoder.layer.{}.attention.attention.value": "layers.{}.self_attn.v_proj",
    "encoder.layer.{}.attention.output.dense": "layers.{}.self_attn.out_proj",
    "encoder.layer.{}.layer_scale1.lambda1": "layers.{}.layer_scale1",
    "encoder.layer.{}.norm2": "layers.{}.layer_norm2",
    "encoder.layer.{}.mlp.fc1": "layers.{}.fc1",
    "encoder.layer.{}.mlp.fc2": "layers.{}.fc2",
    "encoder.layer.{}.layer_scale2.lambda1": "layers.{}.layer_scale2",
    "layernorm": "post_layernorm",
}
