"""The vision-language model: ids, labels (B,T) and pixels (N,3,H,W) in, the summed loss out.

    pixels (N,3,H,W) -> vision (N,P,Dv) -> projector (N,K,D) ─┐ in the order of the pictures
    ids (B,T) -> embedding table (B,T,D) ── splice: each placeholder takes the next image token
                                          └─> decoder (B,T,D) -> head where supervised -> loss

Follows LLaVA (Liu et al. 2023): to the decoder an image token is a token like any other.
"""

import torch
from torch import nn

from model.config import VLMConfig
from model.language import LanguageModel
from model.lora import lora_parameters
from model.loss import chunked_cross_entropy
from model.projector import Projector
from model.vision import VisionTransformer


class VLM(nn.Module):
    """Three parts that each work alone; this class only brings them together."""

    def __init__(self, config: VLMConfig, language: LanguageModel, vision: VisionTransformer,
                 projector: Projector):
        super().__init__()
        self.config = config
        self.language = language
        self.vision = vision
        self.projector = projector
        self.loss_function = chunked_cross_entropy  # extras/fast has a faster one
        self.always_look = False  # see nothing(); set where the weights are spread over processes

    @classmethod
    def from_pretrained(cls, directory, dtype: torch.dtype = torch.float32) -> "VLM":
        """Load one of our own checkpoint directories, ready for chat."""
        from model.pretrained.checkpoint import (
            load_checkpoint,  # here, because checkpoint.py knows VLM
        )

        return load_checkpoint(directory, dtype)

    def set_checkpointing(self, on: bool) -> None:
        """Trade time for memory: keep only each block's input for the backward pass."""
        self.language.checkpointing = self.vision.checkpointing = on

    def look(self, pixels):
        """pixels (N,3,H,W) -> what the vision tower sees in each picture (N,P,Dv)."""
        trained = any(p.requires_grad for p in self.vision.parameters())
        # A frozen tower keeps nothing for a backward pass: that is most of stage one's memory.
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.vision(pixels)

    def encode_images(self, pixels=None, features=None):
        """pixels (N,3,H,W), features (F,P,Dv) of further pictures that the tower has seen before,
        one of them or both -> the language tokens of each picture (N+F,K,D)."""
        numbers = self.projector.fc1.weight.dtype
        seen = [] if pixels is None else [self.look(pixels).to(numbers)]
        seen += [] if features is None else [features.to(numbers)]
        return self.projector(torch.cat(seen) if len(seen) > 1 else seen[0])

    def embed(self, ids, pixels=None, order=None, features=None):
        """ids (B,T), pictures as encode_images takes them, or none -> embeddings (B,T,D), pictures
        in their places.

        Placeholders are filled row by row from left to right. order (M,): which picture each of
        their M runs shows, so that one that is shown twice is looked at once; default: each in
        its turn.
        """
        placeholder = ids == self.config.image_token_id  # (B,T)
        # The placeholder's id may lie past the end of the table, so it is never looked up.
        embeds = self.language.embed(ids.masked_fill(placeholder, 0))  # (B,T,D)
        wanted = int(placeholder.sum())
        if not sum(len(pictures) for pictures in (pixels, features) if pictures is not None):
            self.check_count(wanted, 0, 0)
            return embeds + self.nothing()
        images = self.encode_images(pixels, features)  # (N+F,K,D)
        if order is not None:
            images = images[order]  # (M,K,D)
        self.check_count(wanted, *images.shape[:2])
        return embeds.masked_scatter(placeholder[:, :, None], images.to(embeds.dtype))

    def check_count(self, wanted: int, N: int, K: int) -> None:
        """Surplus pictures or placeholders would shift every later picture: refuse them."""
        if wanted != N * K:
            raise ValueError(
                f"the ids hold {wanted} image placeholders (id {self.config.image_token_id}), but "
                f"{N} pictures of {K} tokens make {N * K}; each picture needs its full run of "
                "placeholders, and each run its picture"
            )

    def nothing(self):
        """A zero that has come the whole way of a picture, of the smallest picture there is.

        With several processes, each waits for the others' gradient of every parameter; and where
        each holds only a share of the weights, even of the frozen ones, for the others' shares
        too (always_look). One whose batch has no picture must go the same way, or all would wait
        for ever.
        """
        learns = any(p.requires_grad for part in (self.vision, self.projector)
                     for p in part.parameters())
        if not self.always_look and not (learns and torch.is_grad_enabled()):
            return 0
        side = self.vision.config.patch_size * self.projector.pixel_shuffle  # makes one token
        pixels = torch.zeros(1, 3, side, side, device=self.projector.fc1.weight.device)
        return 0 * self.encode_images(pixels).sum()

    def forward(self, ids, labels, pixels=None, order=None, features=None):
        """ids (B,T), labels (B,T), pictures as embed takes them -> (summed loss, supervised
        tokens).

        labels[b,t] is the token after ids[b,t], or -100 where nobody is asked: they are shifted
        already. The loss is a sum and no mean, so that the training loop can divide by the
        count of the whole step, over micro-batches and processes.
        """
        hidden = self.language.decode(self.embed(ids, pixels, order, features))  # (B,T,D)
        supervised = labels >= 0  # (B,T)
        # With 150,000 words the head is the dearest layer; it runs only where a label asks.
        loss = self.loss_function(self.language, hidden[supervised], labels[supervised])
        return loss, supervised.sum()


def set_trainable(vlm: VLM, projector: bool = True, vision: bool = False,
                  language: str = "none") -> None:
    """Choose what learns; everything else is frozen.

    language: "none", "all", "last:N" (its last N layers), "first:N", both joined by a plus sign
    ("first:1+last:1"), or "lora" (the adapters that add_lora put in before). Stage one is the
    default: the projector alone.
    """
    vlm.requires_grad_(False)
    vlm.projector.requires_grad_(projector)
    vlm.vision.requires_grad_(vision)
    if language == "all":
        vlm.language.requires_grad_(True)
    elif language == "lora":
        adapters = lora_parameters(vlm.language)
        if not adapters:
            raise ValueError("language='lora', but the language model has no adapters: "
                             "call add_lora(vlm.language, ...) first")
        for parameter in adapters:
            parameter.requires_grad_(True)
    elif language != "none":
        for layers in some_layers(vlm.language.layers, language):
            layers.requires_grad_(True)


def some_layers(layers: nn.ModuleList, wanted: str) -> list[nn.ModuleList]:
    """wanted: "last:N", "first:N", or several of these joined by a plus sign."""
    chosen = []
    for part in wanted.split("+"):
        end, _, number = part.partition(":")
        N = int(number) if number.isdecimal() else 0
        if end not in ("first", "last") or not 1 <= N <= len(layers):
            raise ValueError(f"language is 'none', 'all', 'lora', 'last:N', 'first:N' or "
                             f"'first:N+last:M' with numbers from 1 to {len(layers)}, "
                             f"got {wanted!r}")
        chosen.append(layers[:N] if end == "first" else layers[-N:])
    return chosen
