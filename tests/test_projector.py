"""Claim: the projector loses no number, and pixel shuffle lays neighbours side by side."""

import pytest
import torch
from families import assert_close

from model.config import ProjectorConfig
from model.projector import PROJECTORS, Projector, pixel_unshuffle


@pytest.mark.parametrize("kind", PROJECTORS)
@pytest.mark.parametrize("n, K", [(1, 36), (2, 9), (3, 4), (6, 1)])
def test_shapes(kind, n, K):
    assert Projector(ProjectorConfig(kind, 5, 7, n))(torch.randn(2, 36, 5)).shape == (2, K, 7)


def test_linear_and_mlp_are_what_they_say():
    features = torch.randn(2, 9, 5)
    linear, mlp = (Projector(ProjectorConfig(kind, 5, 7)) for kind in ("linear", "mlp"))
    expected = features @ linear.fc1.weight.T + linear.fc1.bias
    assert_close(linear(features), expected, 1e-6, "linear")
    hidden = torch.nn.functional.gelu(features @ mlp.fc1.weight.T + mlp.fc1.bias)
    assert_close(mlp(features), hidden @ mlp.fc2.weight.T + mlp.fc2.bias, 1e-6, "mlp")


@torch.no_grad()
def test_norm_mlp_is_layer_norm_linear_gelu_linear():
    projector = Projector(ProjectorConfig("norm_mlp", 5, 7, pixel_shuffle=2))
    for p in projector.parameters():
        torch.nn.init.normal_(p)
    assert {name.split(".")[0] for name in projector.state_dict()} == {"norm", "fc1", "fc2"}
    features = torch.randn(2, 16, 5) * 3 + 1
    x = pixel_unshuffle(features, 2)  # (2,4,20): the norm sees the four patches together
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    x = x * projector.norm.weight + projector.norm.bias
    hidden = torch.nn.functional.gelu(x @ projector.fc1.weight.T + projector.fc1.bias)
    expected = hidden @ projector.fc2.weight.T + projector.fc2.bias
    assert_close(projector(features), expected, 1e-4, "norm_mlp")


def test_a_norm_in_front_makes_loudness_not_matter():
    features, projector = torch.randn(2, 9, 5), Projector(ProjectorConfig("norm_mlp", 5, 7))
    assert_close(projector(100 * features), projector(features), 1e-3, "100 times as loud")


def test_kinds_hold_only_their_own_layers():
    """A checkpoint of one kind must not load as another."""
    linear, mlp, norm_mlp = (set(Projector(ProjectorConfig(kind, 5, 7)).state_dict())
                             for kind in ("linear", "mlp", "norm_mlp"))
    assert linear < mlp < norm_mlp


def test_each_token_is_one_square_of_neighbours():
    # The feature of a patch is its number on a 4 x 4 grid:   0  1 |  2  3
    #                                                         4  5 |  6  7
    #                                                        ------+------
    #                                                         8  9 | 10 11
    #                                                        12 13 | 14 15
    features = torch.arange(16).view(1, 16, 1)
    assert pixel_unshuffle(features, 2)[0].tolist() == [
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_pixel_shuffle_keeps_each_patch_whole():
    features = torch.randn(2, 36, 5)
    squares = pixel_unshuffle(features, 3)  # (2, 4, 45)
    patch = features[1, 6 * 4 + 2]  # row 4, column 2: square 2 (lower left), row 1, column 2 in it
    place = 3 * 1 + 2
    assert torch.equal(squares[1, 2, 5 * place:5 * place + 5], patch)


@pytest.mark.parametrize("P, n", [(9, 2), (12, 2), (16, 3)])
def test_a_grid_that_does_not_divide_is_refused(P, n):
    with pytest.raises(ValueError, match=f"{n}.*{P} patches"):
        Projector(ProjectorConfig("mlp", 5, 7, n))(torch.randn(1, P, 5))


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="resampler"):
        Projector(ProjectorConfig("resampler", 5, 7))
    with pytest.raises(ValueError, match="pixel_shuffle"):
        Projector(ProjectorConfig("mlp", 5, 7, 0))


@pytest.mark.parametrize("kind, width, n", [("linear", 768, 1), ("mlp", 384, 2), ("mlp", 192, 1),
                                            ("norm_mlp", 768, 1)])
def test_pictures_begin_no_louder_than_words(kind, width, n):
    """Features of a final norm are about 1 in size, embeddings of words a few hundredths."""
    torch.manual_seed(0)
    tokens = Projector(ProjectorConfig(kind, width, 576, n))(torch.randn(1, 16, width))
    assert 0.01 < tokens.std() < 1


@pytest.mark.parametrize("kind", PROJECTORS)
@pytest.mark.parametrize("output_rms", [0.02, 0.3])
def test_a_new_projector_is_as_loud_as_it_is_told_to_be(kind, output_rms):
    torch.manual_seed(0)
    tokens = Projector(ProjectorConfig(kind, 192, 256), output_rms)(torch.randn(8, 16, 192))
    assert 0.8 < tokens.square().mean().sqrt() / output_rms < 1.25
