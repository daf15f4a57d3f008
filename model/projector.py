"""The projector: vision features (N,P,Dv) in, image tokens (N,K,D) out, K = P / n^2.

The only new part. It learns to express what the vision tower computes in vectors that the language
model can read like token embeddings.
Papers: LLaVA 1.5 (Liu et al. 2023) for the two-layer form, InternVL (Chen et al. 2023) for the
pixel shuffle and the norm in front (minimind-3v has it too).
"""

from collections import OrderedDict
from math import isqrt

from torch import nn

from model.config import ProjectorConfig

# kind -> its layers, by name and in order, for features of this width; applied one after another
PROJECTORS = {
    "linear": lambda width, D: {"fc1": nn.Linear(width, D)},
    "mlp": lambda width, D: {"fc1": nn.Linear(width, D), "gelu": nn.GELU(), "fc2": nn.Linear(D, D)},
    "norm_mlp": lambda width, D: {"norm": nn.LayerNorm(width), **PROJECTORS["mlp"](width, D)},
}
GELU_RMS = 0.65  # root mean square of GELU(x), x drawn from N(0,1)


class Projector(nn.Sequential):
    """features (N,P,Dv) -> image tokens (N,K,D)"""

    def __init__(self, config: ProjectorConfig, output_rms: float = 0.05):
        if config.kind not in PROJECTORS:
            raise ValueError(f"there is no projector {config.kind!r}; there are "
                             f"{', '.join(PROJECTORS)}")
        width = config.vision_width * config.pixel_shuffle**2
        super().__init__(OrderedDict(PROJECTORS[config.kind](width, config.language_width)))
        self.config = config
        # Initialise so that image tokens have the same RMS as token embeddings (output_rms), for
        # features of RMS 1: larger ones would dominate the first steps.
        *inner, last = (layer for layer in self.modules() if isinstance(layer, nn.Linear))
        for layer in (*inner, last):
            gain = 1 if layer is not last else output_rms / (GELU_RMS if inner else 1)
            nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    def forward(self, features):
        return super().forward(pixel_unshuffle(features, self.config.pixel_shuffle))


def pixel_unshuffle(features, n: int):
    """Space-to-depth: each n x n square of patches side by side, (N,P,Dv) -> (N,P/n^2,n^2*Dv).

    The same values form fewer and wider tokens: the language model reads n^2 times fewer. Papers
    and flags call it pixel shuffle; it is the opposite of torch's PixelShuffle.
    """
    if n == 1:
        return features
    N, P, Dv = features.shape
    side = isqrt(P)
    if side * side != P or side % n:
        raise ValueError(f"pixel_shuffle {n}: {P} patches are no square grid with a side that is a "
                         f"multiple of {n}; choose another pixel_shuffle or image size")
    grid = features.view(N, side // n, n, side // n, n, Dv)  # row, row in square, column, ...
    return grid.transpose(2, 3).reshape(N, P // n**2, n * n * Dv)
