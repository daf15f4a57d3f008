"""Claims: the attention that is drawn is the model's own, to 1e-5 of transformers' eager attention
and of what the layer computes with it; the logit lens behind the last layer is the prediction."""

import pytest
import torch
import transformers

from extras.attention import attention_maps, attention_weights, each_layer
from model.language import rope_cos_sin
from model.pretrained.load import load_language
from tests.families import tiny_vlm

FACTS = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def pair(request, tmp_path_factory):
    """A public model with random weights, large enough that it looks here more than there, and
    ours with the same ones. Qwen3 norms its queries and keys."""
    directory = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    name = request.param.capitalize()
    config = getattr(transformers, f"{name}Config")(**FACTS, head_dim=8,
                                                    attn_implementation="eager")
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    theirs.save_pretrained(directory)
    return theirs, load_language(str(directory)).eval()


def test_weights_are_those_of_the_public_model(pair):
    theirs, ours = pair
    ids = torch.randint(0, 64, (1, 40))
    with torch.no_grad():
        expected = theirs(ids, output_attentions=True).attentions
    found = [weights for weights, _ in each_layer(ours, ours.embed(ids))]
    assert len(found) == len(expected) == 3
    for ours_of_layer, theirs_of_layer in zip(found, expected):
        difference = float((ours_of_layer - theirs_of_layer).abs().max())
        assert difference < 1e-5, difference
        assert ours_of_layer.shape == (1, 4, 40, 40)
        assert torch.allclose(ours_of_layer.sum(-1), torch.ones(1, 4, 40), atol=1e-5)
        assert float(ours_of_layer.triu(1).abs().max()) == 0, "nobody looks ahead"
    assert float(found[0].std()) > 0.03, "and it is no even look at everything"


@torch.no_grad()
def test_weights_times_values_are_what_the_layer_computes(pair):
    _, ours = pair
    ids = torch.randint(0, 64, (2, 12))
    x = ours.embed(ids)
    attention = ours.layers[0].self_attn
    rope = rope_cos_sin(torch.arange(12).expand(2, 12), 8, ours.config.rope_theta)
    v = attention.v_proj(x).view(2, 12, 2, 8).transpose(1, 2).repeat_interleave(2, dim=1)
    mixed = attention_weights(attention, x, rope) @ v  # (B,H,T,hd)
    found = attention.o_proj(mixed.transpose(1, 2).reshape(2, 12, 32))
    expected = attention(x, rope, None, None, 0)
    assert float((found - expected).abs().max()) < 1e-5


def test_the_stream_behind_the_last_layer_predicts_the_next_token(pair):
    _, ours = pair
    ids = torch.randint(0, 64, (1, 10))
    *_, (_, stream) = each_layer(ours, ours.embed(ids))
    assert torch.equal(ours.logits(ours.norm(stream)), ours(ids))


def test_the_maps_are_the_rows_that_chose_the_answer():
    """By hand, from every layer's weights of the whole row."""
    torch.manual_seed(0)
    K, image = 9, 60
    model = tiny_vlm(image).eval()
    pixels = torch.randn(2, 3, 48, 48)
    ids = [1, *[image] * K, 2, *[image] * K, 3, 4, 5, 6]  # 5 and 6 are the answer
    weights, lens = attention_maps(model, ids, pixels, answer=2)
    embeds = model.embed(torch.tensor([ids]), pixels)
    layers = list(each_layer(model.language, embeds))  # all rows; two of them chose the answer
    by_hand = torch.stack([w[0].mean(0) for w, _ in layers]).mean(0)  # (T,T)
    T = len(ids)
    assert torch.allclose(weights, by_hand[T - 3:T - 1], atol=1e-6)
    assert torch.allclose(weights.sum(-1), torch.ones(2), atol=1e-5)
    assert float(weights[0, T - 2:].sum()) == 0, "the first word was chosen before it was there"
    logits = model.language.logits(model.language.decode(embeds))[0]
    places = [i for i, token in enumerate(ids) if token == image]
    assert len(lens) == len(layers) and lens[-1].tolist() == logits[places].argmax(-1).tolist()
