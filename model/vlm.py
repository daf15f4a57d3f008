"""The vision-language model: ids, labels (B,T) and pixels (N,3,H,W) in, the summed loss out.

    pixels (N,3,H,W) -> vision (N,P,Dv) -> projector (N,K,D) ─┐ in the order of the images
    ids (B,T) -> embedding table (B,T,D) ── splice: each placeholder takes the next image token
                                          └─> decoder (B,T,D) -> head where supervised -> loss

Follows LLaVA (Liu et al. 2023): to the decoder an image token is a token like any other.
"""

import torch
from torch import nn

from model.config import VLMConfig
from model.language import LanguageModel
from model.loss import chunked_cross_entropy
from model.projector import Projector
from model.vision import VisionTransformer


class VLM(nn.Module):
    """Three parts that each work alone, brought together."""

    def __init__(self, config: VLMConfig, language: LanguageModel, vision: VisionTransformer,
                 projector: Projector):
        super().__init__()
        self.config = config
        self.language = language
        self.vision = vision
        self.projector = projector
        self.loss_function = chunked_cross_entropy  # extras/fast has a faster one
        self.force_vision_forward = False  # see dummy_image_loss; set where weights are sharded

    def set_checkpointing(self, on: bool) -> None:
        """Trade time for memory: keep only each block's input for the backward pass."""
        self.language.checkpointing = self.vision.checkpointing = on

    def vision_features(self, pixels):
        """pixels (N,3,H,W) -> (N,P,Dv)"""
        trained = any(p.requires_grad for p in self.vision.parameters())
        # A frozen tower stores no activations for a backward pass: they would be most of memory.
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return self.vision(pixels)

    def encode_images(self, images):
        """images: pixels (N,3,H,W), or vision features (N,P,Dv) that were computed before
        -> image tokens (N,K,D)"""
        features = self.vision_features(images) if images.ndim == 4 else images
        return self.projector(features.to(self.projector.dtype))

    def embed(self, ids, images=None, order=None):
        """ids (B,T), images as encode_images takes them -> (B,T,D), image tokens spliced in.

        The placeholders are filled row by row from left to right. order (M,): the index of the
        image that each of their M runs shows, so that an image that occurs twice is encoded once;
        default: each image once, in turn. ValueError unless placeholders and image tokens agree
        in number: one too many would shift every later image.
        """
        placeholder = ids == self.config.image_token_id  # (B,T)
        # The placeholder's id may lie past the end of the table, so it is never looked up.
        embeds = self.language.embed(ids.masked_fill(placeholder, 0))  # (B,T,D)
        if images is None or len(images) == 0:
            tokens = embeds.new_zeros(0, 0, embeds.shape[-1])
            embeds = embeds + self.dummy_image_loss(ids.device)
        else:
            tokens = self.encode_images(images)  # (N,K,D)
            tokens = tokens if order is None else tokens[order]  # (M,K,D)
        M, K, _ = tokens.shape
        if (placeholders := int(placeholder.sum())) != M * K:
            raise ValueError(
                f"the ids hold {placeholders} image placeholders (id {self.config.image_token_id})"
                f", but {M} images of {K} tokens make {M * K}; each image needs its full run of "
                "placeholders, and each run its image")
        return embeds.masked_scatter(placeholder[:, :, None], tokens.to(embeds.dtype))

    def dummy_image_loss(self, device):
        """A zero that depends on vision tower and projector, added where a batch has no image.

        A batch of text alone uses no weight of a projector that is trained by itself: its loss
        would have no grad_fn, and backward() raises. And where the weights are sharded
        (force_vision_forward), each rank takes part in gathering them, whatever its batch holds.
        Here it encodes the smallest image.
        """
        trained = any(p.requires_grad for part in (self.vision, self.projector)
                      for p in part.parameters())
        if not self.force_vision_forward and not (trained and torch.is_grad_enabled()):
            return 0
        side = self.config.vision.patch_size * self.config.projector.pixel_shuffle  # K = 1
        return 0 * self.encode_images(torch.zeros(1, 3, side, side, device=device)).sum()

    def forward(self, ids, labels, images=None, order=None):
        """ids (B,T), labels (B,T), images and order as embed takes them -> (summed loss,
        supervised tokens).

        labels[b,t] is the token after ids[b,t] (shifted already), or negative where the loss skips
        it. The loss is a sum and no mean: the training loop divides it by the supervised tokens of
        the whole step, over micro-batches and ranks.
        """
        hidden = self.language.decode(self.embed(ids, images, order))  # (B,T,D)
        supervised = labels >= 0  # (B,T)
        # With 150,000 tokens the head is the most expensive layer; it runs only where supervised.
        loss = self.loss_function(self.language, hidden[supervised], labels[supervised])
        return loss, supervised.sum()


def build_model(config: VLMConfig, language: LanguageModel | None = None,
                vision: VisionTransformer | None = None, output_rms: float = 0.05) -> VLM:
    """The model of a config: new weights, or the towers that are given. output_rms: as Projector
    takes it. Under meta_device() it has shapes and takes no memory."""
    return VLM(config, language or LanguageModel(config.language),
               vision or VisionTransformer(config.vision), Projector(config.projector, output_rms))
