"""The vision transformer: normalised pixels (N,3,H,W) in, patch features (N,P,Dv) out; or one
vector for the whole image, (N,1,Dv).

An image is cut into squares of patch_size pixels; each becomes a token, and a stack of pre-norm
encoder layers lets every patch look at every other. One file for SigLIP, CLIP and DINOv2: they
differ only in the facts of VisionConfig. Shapes: see model/language.py.

Papers: ViT (Dosovitskiy et al. 2020), CLIP (Radford et al. 2021), SigLIP (Zhai et al. 2023),
DINOv2 (Oquab et al. 2023).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.config import VisionConfig


def quick_gelu(x):
    """The sigmoid approximation of GELU with which the first CLIP models were trained."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"gelu": F.gelu, "gelu_pytorch_tanh": gelu_tanh, "quick_gelu": quick_gelu}


class Attention(nn.Module):
    """Every patch looks at every patch: no mask."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        N, T, width = x.shape  # T tokens: the patches, with a class token one more

        def heads(t):
            return t.view(N, T, self.num_heads, -1).transpose(1, 2)  # (N,heads,T,hd)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).reshape(N, T, width))


class EncoderLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)
        self.activation = ACTIVATIONS[config.hidden_act]
        if config.layer_scale:
            self.layer_scale1 = nn.Parameter(torch.ones(width))
            self.layer_scale2 = nn.Parameter(torch.ones(width))
        self.layer_scale = config.layer_scale

    def forward(self, x):
        attn_out = self.self_attn(self.layer_norm1(x))
        x = x + (attn_out * self.layer_scale1 if self.layer_scale else attn_out)
        mlp_out = self.fc2(self.activation(self.fc1(self.layer_norm2(x))))
        return x + (mlp_out * self.layer_scale2 if self.layer_scale else mlp_out)


class VisionTransformer(nn.Module):
    """pixels (N,3,H,W) -> features (N,P,Dv) of the layer that config.feature_layer names.

    (N,1,Dv) where config.features asks for one vector: "pooled", the mean of all patches, or
    "class", the class token. After the last layer the latter is what transformers calls
    pooler_output: it passes the final norm, also in CLIP, whose patches do not.
    checkpointing: as in language.py; it saves memory only when the tower is trained.
    """

    checkpointing = False

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=config.patch_bias)
        self.position_embedding = nn.Parameter(
            nn.init.normal_(torch.empty(config.patches + config.class_token, width), std=0.02))
        if config.class_token:
            self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(width), std=0.02))
        if config.pre_norm:
            self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        # Layers after the feature layer never run, so they are not built.
        depth = config.num_hidden_layers + config.feature_layer + 1
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(depth))
        self.final_norm = config.final_norm and config.feature_layer == -1
        if self.final_norm:
            self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def positions(self, rows: int, columns: int):
        """The position table (1,P,Dv), interpolated when the image is not of the trained size.

        The class token's own position, the table's first row, is left out.
        """
        table = self.position_embedding[int(self.config.class_token):]  # (side*side, Dv)
        side = self.config.image_size // self.config.patch_size
        if (rows, columns) != (side, side):
            grid = table.view(1, side, side, -1).permute(0, 3, 1, 2).float()
            grid = F.interpolate(grid, (rows, columns), mode="bicubic", align_corners=False)
            table = grid.permute(0, 2, 3, 1).reshape(rows * columns, -1).to(table.dtype)
        return table[None]

    def forward(self, pixels):
        patch = self.config.patch_size
        if pixels.ndim != 4 or pixels.shape[1] != 3 or min(pixels.shape[-2:]) < patch:
            raise ValueError(f"pixels must be (N,3,H,W) with H and W at least patch_size {patch}, "
                             f"got {tuple(pixels.shape)}")
        # A remainder at the right and lower edge is ignored: SigLIP so400m was published with 384
        # pixels and patches of 14, which makes 27 x 27 of them.
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))  # (N,Dv,rows,cols)
        rows, columns = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2) + self.positions(rows, columns)  # (N,P,Dv)
        if self.config.class_token:
            first = self.class_embedding + self.position_embedding[0]
            x = torch.cat([first.expand(len(x), 1, -1), x], dim=1)  # (N,1+P,Dv)
        if self.config.pre_norm:
            x = self.pre_layernorm(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        if self.final_norm:  # CLIP: where the class token is asked for, see public_config.py
            x = self.post_layernorm(x)
        if self.config.features == "class":
            return x[:, :1]  # (N,1,Dv)
        x = x[:, int(self.config.class_token):]  # (N,P,Dv)
        return x.mean(dim=1, keepdim=True) if self.config.features == "pooled" else x
