"""The projector: patch features (N,P,Dv) in, language tokens (N,K,D) out, K = P / n^2.

It is the only part that is new: the two towers were trained by others and have never met. It
learns to say what the vision tower saw in vectors that the language model can read like words.

Follows LLaVA 1.5 (Liu et al. 2023) for the two-layer form, InternVL (Chen et al. 2023) for the
pixel shuffle and the norm in front (minimind-3v has it too).
"""

from math import isqrt

from torch import nn


def pixel_shuffle(features, n: int):
    """Lay each n x n square of neighbouring patches side by side: (N,P,Dv) -> (N,P/n^2,n^2*Dv).

    Nothing is thrown away, the same numbers only stand in fewer and wider tokens: the language
    model, which pays for each token, reads n^2 times fewer of them.
    """
    N, P, Dv = features.shape
    side = isqrt(P)
    if side * side != P or side % n:
        raise ValueError(
            f"pixel_shuffle {n} needs a square grid of patches whose side is a multiple of {n}; "
            f"got {P} patches" + (f", {side} x {side}" if side * side == P else "")
            + "; choose another pixel_shuffle or another size of the pictures"
        )
    grid = features.view(N, side // n, n, side // n, n, Dv)  # row, row in square, column, ...
    return grid.transpose(2, 3).reshape(N, P // n**2, n * n * Dv)


class Projector(nn.Module):
    """features (N,P,Dv) -> (N,K,D).

    kind: "linear", "mlp" (linear, gelu, linear) or "norm_mlp" (LayerNorm, linear, gelu, linear),
    whose norm brings towers that speak louder or softer to one loudness first. output_rms: the
    size of the numbers that a new projector makes of features of size 1; give it the size of the
    numbers in the language model's embedding table.
    """

    def __init__(self, kind: str, vision_width: int, language_width: int, pixel_shuffle: int = 1,
                 output_rms: float = 0.05):
        super().__init__()
        if kind not in ("linear", "mlp", "norm_mlp"):
            raise ValueError(f"the projector is 'linear', 'mlp' or 'norm_mlp', got {kind!r}")
        if pixel_shuffle < 1:
            raise ValueError(f"pixel_shuffle must be 1 (off) or more, got {pixel_shuffle}")
        self.pixel_shuffle = pixel_shuffle
        width = vision_width * pixel_shuffle**2
        self.norm = nn.LayerNorm(width) if kind == "norm_mlp" else None
        self.fc1 = nn.Linear(width, language_width)
        self.fc2 = nn.Linear(language_width, language_width) if kind != "linear" else None
        # Begin as loud as words: louder pictures would drown the words beside them in the first
        # steps, fainter ones would have to grow first. GELU leaves 0.65 of a size of 1.
        inner, last = (self.fc1, self.fc2) if self.fc2 is not None else (None, self.fc1)
        if inner is not None:
            nn.init.normal_(inner.weight, std=width**-0.5)
            nn.init.zeros_(inner.bias)
        size = 1 if inner is None else 0.65
        nn.init.normal_(last.weight, std=output_rms / size * last.in_features**-0.5)
        nn.init.zeros_(last.bias)

    def forward(self, features):
        x = features
        if self.pixel_shuffle > 1:
            x = pixel_shuffle(x, self.pixel_shuffle)
        if self.norm is not None:
            x = self.norm(x)
        x = self.fc1(x)
        return x if self.fc2 is None else self.fc2(nn.functional.gelu(x))
