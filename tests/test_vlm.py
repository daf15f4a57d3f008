"""Claim: pictures land in their places, in order, none lost; the loss is the hand-computed sum."""


import pytest
import torch
from families import assert_close, tiny_vlm

from model.lora import add_lora
from training.optim import set_requires_grad

IMAGE, K = 60, 9


@pytest.fixture
def vlm():
    return tiny_vlm(IMAGE)


def pictures(N, seed=3):
    return torch.randn(N, 3, 48, 48, generator=torch.Generator().manual_seed(seed))


def row(*parts):
    """Token ids; "image" stands for one picture's placeholders."""
    ids = []
    for part in parts:
        ids += [IMAGE] * K if part == "image" else [part]
    return ids


def batch(*rows):
    longest = max(map(len, rows))
    return torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows])


def gradients(vlm):
    return {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}


@torch.no_grad()
def test_one_row_with_two_pictures_in_order(vlm):
    pixels = pictures(2)
    ids = batch(row(5, "image", 6, 7, "image", 8))
    first, second = vlm.encode_images(pixels)  # each (K,D)
    words = vlm.language.embed(torch.tensor([5, 6, 7, 8]))
    by_hand = torch.cat([words[:1], first, words[1:3], second, words[3:]])[None]
    assert torch.equal(vlm.embed(ids, pixels), by_hand)
    assert not torch.equal(vlm.embed(ids, pixels.flip(0)), by_hand), "the order counts"
    assert (first - second).abs().max() > 1e-4


@torch.no_grad()
def test_rows_with_no_one_and_two_pictures_in_one_batch(vlm):
    pixels = pictures(3)
    rows = [row(5, "image", 6), row(7, 8, 9), row("image", 4, "image")]
    embeds = vlm.embed(batch(*rows), pixels)
    alone = [vlm.embed(batch(rows[0]), pixels[:1]), vlm.embed(batch(rows[1])),
             vlm.embed(batch(rows[2]), pixels[1:])]
    for number, expected in enumerate(alone):
        assert_close(embeds[number, :len(rows[number])], expected[0], 1e-6, f"row {number}")


@pytest.mark.parametrize("ids, N, numbers", [
    (row(5, "image", 6), 2, ("9", "18")),  # a surplus picture
    (row(5, "image", 6, "image"), 1, ("18", "9")),  # a picture too few
    (row(5, 6), 1, ("0", "9")),  # nobody asked for it
    (row(5, "image"), 0, ("9", "0")),  # pixels with N == 0
    (row(5, "image"), None, ("9", "0")),  # no pixels at all
    (row(5, "image")[:-1], 1, ("8", "9")),  # a run that was cut
])
def test_a_wrong_count_raises_with_both_numbers(vlm, ids, N, numbers):
    pixels = None if N is None else pictures(N)
    with pytest.raises(ValueError, match=rf"hold {numbers[0]} .*make {numbers[1]}\b"):
        vlm.embed(torch.tensor([ids]), pixels)


@pytest.mark.parametrize("image_token_id", [61, 10**6])
@torch.no_grad()
def test_an_image_token_past_the_vocabulary_is_never_looked_up(image_token_id):
    inside, past = tiny_vlm(IMAGE), tiny_vlm(image_token_id)
    ids = batch(row(5, "image", 6))
    other = ids.masked_fill(ids == IMAGE, image_token_id)
    assert torch.equal(past.embed(other, pictures(1)), inside.embed(ids, pictures(1)))


def test_the_pictures_gradient_is_that_of_a_concatenation(vlm):
    set_requires_grad(vlm)
    pixels, ids = pictures(2), batch(row(5, "image", 6, "image"))
    weight = torch.randn(1, ids.shape[1], 36)
    (vlm.embed(ids, pixels) * weight).sum().backward()
    spliced = gradients(vlm)
    vlm.zero_grad()
    images, words = vlm.encode_images(pixels), vlm.language.embed(torch.tensor([5, 6]))
    (torch.cat([words[:1], images[0], words[1:], images[1]]) * weight[0]).sum().backward()
    assert spliced.keys() == gradients(vlm).keys() and len(spliced) == 4
    for name, gradient in gradients(vlm).items():
        assert_close(spliced[name], gradient, 1e-5, name)


@torch.no_grad()
def test_the_answer_depends_on_the_picture(vlm):
    ids = batch(row(5, "image", 6, 7))
    logits = [vlm.language.logits(vlm.language.decode(vlm.embed(ids, pictures(1, seed))))
              for seed in (3, 4)]
    assert torch.equal(logits[0][:, 0], logits[1][:, 0]), "what stands before it does not"
    assert (logits[0] - logits[1])[:, -1].abs().max() > 1e-4


def test_loss_equals_a_cross_entropy_computed_by_hand(vlm):
    pixels = pictures(1)
    ids = batch(row(5, "image", 6, 7, 8), row(9, 10, 11))
    labels = torch.full_like(ids, -100)
    labels[0, -3:] = torch.tensor([7, 8, 2])  # the token after 6 is 7, after 7 is 8, then the end
    labels[1, 0] = 10
    loss, count = vlm(ids, labels, pixels)
    logits = vlm.language.logits(vlm.language.decode(vlm.embed(ids, pixels))).double()
    by_hand = 0.0
    for b, t in [(0, -3), (0, -2), (0, -1), (1, 0)]:
        scores = logits[b, t]
        by_hand -= (scores[labels[b, t]] - torch.log(torch.exp(scores).sum())).item()
    assert count == 4 and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_hand, abs=2e-4)


def test_labels_are_not_shifted_again(vlm):
    """labels[t] is asked of ids[t]: a model that repeats ids[t] itself would be asked for it."""
    ids = torch.tensor([[5, 6, 7]])
    labels = torch.tensor([[-100, 7, -100]])
    loss, _ = vlm(ids, labels)
    logits = vlm.language(ids)[0, 1]
    assert loss.item() == pytest.approx(-logits.log_softmax(0)[7].item(), abs=1e-5)


@pytest.mark.parametrize("answers", [(4, 100), (1, 30)])
def test_one_batch_equals_its_rows_one_by_one(vlm, answers):
    """The sum makes it so; a mean in the model would weigh the short answer's tokens more."""
    pixels = pictures(2)
    rows = [row(5, "image", 6) + [7] * n for n in answers]
    ids = batch(*rows)
    labels = torch.full_like(ids, -100)
    for number, n in enumerate(answers):
        labels[number, len(rows[number]) - n:len(rows[number])] = 7
    set_requires_grad(vlm, language="all", vision=True)
    loss, count = vlm(ids, labels, pixels)
    (loss / count).backward()
    together = gradients(vlm)
    vlm.zero_grad()
    total = 0.0
    for number, tokens in enumerate(rows):
        T = slice(0, len(tokens))
        part, _ = vlm(ids[number:number + 1, T], labels[number:number + 1, T],
                      pixels[number:number + 1])
        (part / sum(answers)).backward()
        total += part.item()
    assert count == sum(answers) and total == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in gradients(vlm).items():
        assert_close(gradient, together[name], 1e-6 * max(1, together[name].abs().max()), name)


def test_the_head_runs_on_supervised_positions_only():
    vlm = tiny_vlm(IMAGE, tied=False)
    seen = []
    vlm.language.lm_head.register_forward_hook(lambda _, x, out: seen.append(out.shape))
    ids = batch(row(5, "image", 6, 7))
    labels = torch.full_like(ids, -100)
    labels[0, -2:] = 9
    vlm(ids, labels, pictures(1))
    assert seen == [(2, 61)]


def test_no_supervised_token_gives_zero_and_no_nan(vlm):
    set_requires_grad(vlm, language="all", vision=True)
    ids = batch(row(5, "image", 6))
    loss, count = vlm(ids, torch.full_like(ids, -100), pictures(1))
    loss.backward()
    assert loss == 0 and count == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(vlm).values())


@pytest.mark.parametrize("pixels", [None, torch.zeros(0, 3, 48, 48)])
def test_a_batch_without_pictures_still_brings_the_projectors_gradient(vlm, pixels):
    """Other processes may have pictures and would wait for it."""
    set_requires_grad(vlm, vision=True)
    ids = batch(row(5, 6, 7))
    loss, _ = vlm(ids, ids, pixels)
    loss.backward()
    parts = {**dict(vlm.projector.named_parameters()), **dict(vlm.vision.named_parameters())}
    for name, p in parts.items():
        assert p.grad is not None and not p.grad.any(), name
    with torch.no_grad():
        assert torch.equal(vlm.embed(ids, pixels), vlm.language.embed(ids))


@torch.no_grad()
def test_padding_on_the_right_changes_no_loss(vlm):
    ids = batch(row(5, "image", 6, 7))
    labels = torch.full_like(ids, -100)
    labels[0, -1] = 8
    longer = torch.nn.functional.pad(ids, (0, 7))
    more = torch.nn.functional.pad(labels, (0, 7), value=-100)
    assert_close(vlm(longer, more, pictures(1))[0], vlm(ids, labels, pictures(1))[0], 1e-5)


@pytest.mark.parametrize("pixel_shuffle, tokens", [(1, 9), (3, 1)])
@torch.no_grad()
def test_a_picture_takes_a_token_for_each_square_of_patches(pixel_shuffle, tokens):
    vlm = tiny_vlm(IMAGE, pixel_shuffle)
    assert vlm.encode_images(pictures(2)).shape == (2, tokens, 36)


@torch.no_grad()
def test_pictures_of_another_size_than_the_trained_grid(vlm):
    """DINOv2 has positions for 518 pixels and is published with pictures of 224."""
    assert vlm.encode_images(torch.randn(1, 3, 64, 64)).shape[1] == (64 // 16) ** 2
    with pytest.raises(ValueError, match="hold 16 .*make 9"):
        vlm.embed(torch.tensor([[IMAGE] * 16]), pictures(1))


def learning(vlm):
    return {name for name, p in vlm.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings, prefixes", [
    ({}, ["projector."]),
    ({"projector": False, "vision": True}, ["vision."]),
    ({"language": "all"}, ["projector.", "language."]),
    ({"language": "last:1"}, ["projector.", "language.layers.2."]),
    ({"language": "last:3", "projector": False}, ["language.layers."]),
])
def test_what_learns_is_what_was_chosen(vlm, settings, prefixes):
    set_requires_grad(vlm, language="all", vision=True)  # what was chosen before must not linger
    set_requires_grad(vlm, **settings)
    chosen = {name for name, _ in vlm.named_parameters() if name.startswith(tuple(prefixes))}
    assert learning(vlm) == chosen
    ids = batch(row(5, "image", 6))
    vlm(ids, ids.masked_fill(ids == IMAGE, -100), pictures(1))[0].backward()
    assert gradients(vlm).keys() == chosen


def test_lora_learns_alone_beside_the_projector(vlm):
    with pytest.raises(ValueError, match="add_lora"):
        set_requires_grad(vlm, language="lora")
    add_lora(vlm.language, ["q_proj", "v_proj"], rank=2, alpha=4)
    set_requires_grad(vlm, language="lora")
    assert all("lora_" in name or name.startswith("projector.") for name in learning(vlm))
    assert len(learning(vlm)) == 3 * 2 * 2 + 4


@pytest.mark.parametrize("language", ["some", "last", "last:", "last:0", "last:4", "last:-1"])
def test_unknown_choices_are_refused(vlm, language):
    with pytest.raises(ValueError, match="last:N"):
        set_requires_grad(vlm, language=language)


def test_a_frozen_tower_keeps_nothing_for_the_backward_pass(vlm):
    kept = []
    vlm.vision.register_forward_hook(lambda _, x, out: kept.append(out.requires_grad))
    set_requires_grad(vlm)
    vlm.encode_images(pictures(1))
    set_requires_grad(vlm, vision=True)
    vlm.encode_images(pictures(1))
    assert kept == [False, True]


@pytest.mark.parametrize("mode", ["bfloat16 weights", "bfloat16 language", "autocast"])
def test_bfloat16(vlm, mode):
    set_requires_grad(vlm)
    ids = batch(row(5, "image", 6, 7))
    labels = ids.masked_fill(ids == IMAGE, -100)
    full, _ = vlm(ids, labels, pictures(1))
    if mode == "bfloat16 weights":
        vlm.to(torch.bfloat16)
    if mode == "bfloat16 language":  # the towers frozen in bf16, the projector in float32
        vlm.language.to(torch.bfloat16)
        vlm.vision.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        loss, _ = vlm(ids, labels, pictures(1))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(full.item(), rel=0.1)
    assert vlm.projector.fc1.weight.grad.abs().max() > 0
