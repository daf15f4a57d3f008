"""Claims: cache, batch and padding change no token; sampling draws from what it says."""

from dataclasses import replace

import pytest
import torch
from conftest import needed, weights_dir

from dataset.chat import ChatTemplate, Message
from dataset.tokenizer import Tokenizer
from evaluation.batched_generation import generate_batch, shared_prefixes
from extras.fast import inference
from extras.fast.cuda_graph import CUDAGraphDecodeStep
from extras.fast.prefix_cache import PrefixCache
from model.config import LanguageConfig, ProjectorConfig, VisionConfig, VLMConfig
from model.generate import (
    GenerationConfig,
    KVCache,
    apply_repetition_penalty,
    generate,
    sample_token,
    sampling_probs,
)
from model.language import LanguageModel
from model.pretrained.load import load_language
from model.pretrained.public_config import write_config
from model.projector import Projector
from model.vision import VisionTransformer
from model.vlm import VLM

IMAGE = 90  # the placeholder's id


def tiny_language(**facts) -> LanguageConfig:
    values = dict(
        model_type="qwen2", vocab_size=97, hidden_size=32, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=True, qkv_bias=True,
        qk_norm=False, max_position_embeddings=600)
    return LanguageConfig(**{**values, **facts})


def scaled_up(model):
    """Random weights of the usual size repeat one token for ever; larger ones wander."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    return model.eval()


@pytest.fixture(scope="module")
def language():
    torch.manual_seed(0)
    return scaled_up(LanguageModel(tiny_language()))


@pytest.fixture(scope="module")
def vlm():
    torch.manual_seed(1)
    vision = VisionConfig(
        model_type="siglip_vision_model", hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, class_token=False, patch_bias=True,
        pre_norm=False, final_norm=True, layer_scale=False)
    config = VLMConfig(tiny_language(), vision, ProjectorConfig("mlp", 16, 32), IMAGE)
    projector = Projector(config.projector)
    return scaled_up(
        VLM(config, LanguageModel(config.language), VisionTransformer(vision), projector))


def greedy_without_cache(model, ids, pixels, count):
    """The whole row again for every token: slow, and nothing in it can go wrong."""
    ids, decoder = list(ids), getattr(model, "language", model)
    with torch.inference_mode():
        for _ in range(count):
            row = torch.tensor([ids])
            embeds = model.embed(row) if decoder is model else model.embed(row, pixels)
            ids.append(int(decoder.logits(decoder.decode(embeds)[0, -1]).argmax()))
    return ids[-count:]


def random_prompt(seed, length, images=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 90, (length,), generator=generator).tolist()
    pixels = torch.randn(images, 3, 16, 16, generator=generator) if images else None
    for _ in range(images):
        ids[2:2] = [IMAGE] * 4
    return ids, pixels


def test_cached_equals_uncached_for_text(language):
    ids, _ = random_prompt(0, 11)
    cached = list(generate(language, ids, max_new_tokens=40))
    assert cached == greedy_without_cache(language, ids, None, 40)
    assert len(set(cached)) > 5, "a model that repeats one token would prove nothing"


def test_cached_equals_uncached_with_pictures(vlm):
    for images in (1, 2):
        ids, pixels = random_prompt(images, 9, images)
        cached = list(generate(vlm, ids, pixels, max_new_tokens=30))
        assert cached == greedy_without_cache(vlm, ids, pixels, 30)
        other = list(generate(vlm, ids, pixels + 1, max_new_tokens=30))
        assert cached != other, "the picture must matter, or this test proves nothing"


def test_an_answer_asks_for_memory_once(language):
    ids, _ = random_prompt(3, 250)
    past = PrefixCache()
    stream = generate(language, ids, max_new_tokens=12, prefix_cache=past)
    cached = [next(stream)]
    place = past.cache.store.data_ptr()
    cached += stream
    assert past.cache.store.data_ptr() == place and past.cache.capacity == 262
    assert cached == greedy_without_cache(language, ids, None, 12)


def test_cache_holds_what_was_appended():
    cache, whole = KVCache(2, capacity=9), torch.randn(2, 1, 9, 3)
    for start, end in ((0, 3), (3, 4), (4, 9)):
        piece = whole[:, :, start:end]
        for layer in range(2):
            assert cache.length == start, "all layers of a step write at the same place"
            k, v = cache.append(layer, piece, piece + layer)
            assert torch.equal(k, whole[:, :, :end]) and torch.equal(v, whole[:, :, :end] + layer)
    assert cache.length == 9


def test_batch_equals_each_alone(vlm):
    cases = [random_prompt(10, 3), random_prompt(11, 17, 1), random_prompt(12, 8, 2),
             random_prompt(13, 30), random_prompt(14, 5, 1)]
    together = generate_batch(vlm, [c[0] for c in cases], [c[1] for c in cases], 24, stop_ids=[])
    for (ids, pixels), answer in zip(cases, together):
        assert answer == list(generate(vlm, ids, pixels, max_new_tokens=24))


def test_questions_about_one_picture_share_its_beginning(vlm, monkeypatch):
    """Three pictures, two questions without one, one with two pictures: each answer as alone, each
    picture encoded once, and the beginning of a prompt computed once for all that share it."""
    cases = []
    for seed, images, questions in ((40, 1, 4), (41, 2, 3), (42, 0, 2), (43, 1, 1)):
        begin, pixels = random_prompt(seed, 3 + seed % 4, images)
        begin = begin[:2 + 4 * images]  # up to the end of its pictures
        cases += [(begin + random_prompt(100 * seed + q, 3 + 2 * q)[0], pixels)
                  for q in range(questions)]
    cases = cases[::2] + cases[1::2]  # in no order
    alone = [list(generate(vlm, ids, pixels, max_new_tokens=12)) for ids, pixels in cases]
    seen, rows = [], []
    encode, decode = vlm.encode_images, vlm.language.decode
    monkeypatch.setattr(vlm, "encode_images", lambda pixels, *rest: seen.append(len(pixels))
                        or encode(pixels, *rest))
    monkeypatch.setattr(vlm.language, "decode", lambda embeds, *rest: rows.append(embeds.shape[:2])
                        or decode(embeds, *rest))
    assert generate_batch(vlm, *zip(*cases), 12, stop_ids=[]) == alone
    assert seen == [1 + 2 + 1], "each picture is encoded once"
    # Beginnings: three with pictures, two empty ones. Rests: as long as the longest of them.
    assert rows[:2] == [(5, 2 + 4 * 2), (10, 3 + 2 * 3)]


def test_other_words_before_the_picture_are_another_beginning(vlm):
    ids, pixels = random_prompt(50, 9, 1)
    other = [7] + ids
    both = [ids, other, ids + [3]]
    assert generate_batch(vlm, both, [pixels] * 3, 10, stop_ids=[]) == [
        list(generate(vlm, each, pixels, max_new_tokens=10)) for each in both]


def test_nothing_is_shared_where_the_row_would_be_too_long():
    """The longest beginning and the longest rest are of different prompts: together past the
    last position, though each prompt has room."""
    ids, pixels = random_prompt(60, 9, 1)
    long_begin, long_rest = [5] * 20 + ids, ids + [5] * 25
    cases = [long_begin, long_begin + [6], long_rest]
    cuts, _, _ = shared_prefixes(cases, [pixels] * 3, IMAGE, limit=57)
    assert cuts == [0, 0, 0]
    cuts, firsts, owner = shared_prefixes(cases, [pixels] * 3, IMAGE, limit=58)
    assert (cuts, firsts, owner) == ([26, 26, 6], [0, 2], [0, 0, 1])


def test_batch_of_a_language_model_alone(language):
    cases = [random_prompt(20, 4)[0], random_prompt(21, 9)[0]]
    together = generate_batch(language, cases, [None, None], 10, stop_ids=[])
    assert together == [list(generate(language, ids, max_new_tokens=10)) for ids in cases]


def test_padding_never_is_the_placeholder(vlm):
    """A picture's placeholder may be id 0, which would be the first choice for padding."""
    config = vlm.config
    zero = VLM(replace(config, image_token_id=0), vlm.language, vlm.vision, vlm.projector).eval()
    ids, pixels = random_prompt(30, 12, 1)
    ids = [0 if i == IMAGE else i or 5 for i in ids]
    answers = generate_batch(zero, [ids, [7, 8]], [pixels, None], 8, stop_ids=[])
    assert answers == [list(generate(zero, ids, pixels, max_new_tokens=8)),
                       list(generate(zero, [7, 8], max_new_tokens=8))]


def test_stops_at_each_stop_id(language):
    ids, _ = random_prompt(0, 11)
    free = list(generate(language, ids, max_new_tokens=30))
    for stop in sorted(set(free))[:4]:
        expected = free[:free.index(stop)]
        assert list(generate(language, ids, max_new_tokens=30, stop_ids=[96, stop])) == expected
        assert generate_batch(language, [ids], [None], 30, [96, stop]) == [expected]


def test_rows_stop_one_by_one(language):
    prompts = [random_prompt(seed, 6 + seed)[0] for seed in range(4)]
    stops = [list(generate(language, prompts[0], max_new_tokens=6))[5]]
    together = generate_batch(language, prompts, [None] * 4, 20, stops)
    alone = [list(generate(language, p, max_new_tokens=20, stop_ids=stops)) for p in prompts]
    assert together == alone and len({len(answer) for answer in alone}) > 1


def test_rows_that_ended_are_left_behind(language):
    """16 prompts, most of which end early: the steps after that decode few rows."""
    prompts = [random_prompt(seed, 6 + seed % 5)[0] for seed in range(16)]
    alone = [list(generate(language, p, max_new_tokens=24)) for p in prompts]
    stops = [answer[3] for answer in alone[:12]]
    expected = [list(generate(language, p, max_new_tokens=24, stop_ids=stops)) for p in prompts]
    rows, decode = [], language.decode
    language.decode = lambda embeds, *rest: rows.append(len(embeds)) or decode(embeds, *rest)
    try:
        assert generate_batch(language, prompts, [None] * 16, 24, stops) == expected
    finally:
        del language.decode  # the class has its own still
    going = [sum(len(answer) >= step for answer in expected) for step in range(len(rows))]
    assert rows[0] == 16 and sorted(rows, reverse=True) == rows
    assert all(there < 4 / 3 * needed + 1 for there, needed in zip(rows, going)), (rows, going)
    assert rows[-1] < 16


class Rerun(CUDAGraphDecodeStep):
    """A recorded step without a GPU: what would be played again is run again. It begins with the
    memory that nobody has written yet as bad as it can be."""

    def prepare(self):
        self.cache.store[..., self.cache.length:, :] = float("nan")
        super().prepare()

    def record(self):
        self.graph = self

    def replay(self):
        self.logits = self.run()


def test_a_recorded_step_is_the_step(language, vlm, monkeypatch):
    """Alone, after a past, and in a batch of unequal rows that end one after the other."""
    cases = [random_prompt(10, 3), random_prompt(11, 17, 1), random_prompt(12, 8, 2),
             random_prompt(13, 30), random_prompt(14, 5, 1), random_prompt(15, 6)]

    def answers():
        alone = [list(generate(vlm, *case, max_new_tokens=24)) for case in cases]
        past, (ids, _) = PrefixCache(), random_prompt(0, 9)
        first = list(generate(language, ids, max_new_tokens=6, prefix_cache=past))
        second = list(generate(language, ids + first + [5], max_new_tokens=9, prefix_cache=past))
        stops = [answer[3 + 4 * i] for i, answer in enumerate(alone[:5])]
        together = generate_batch(vlm, *zip(*cases), 24, stop_ids=stops)
        return alone, first, second, together

    plain, made = answers(), []
    assert len(set(map(len, plain[-1]))) > 3

    def recorded(decoder, cache, real=None):
        made.append(Rerun(decoder, cache, real))
        return made[-1]

    monkeypatch.setattr(inference, "can_record", lambda model: True)
    monkeypatch.setattr(inference, "CUDAGraphDecodeStep", recorded)
    monkeypatch.setattr(language, "__class__", inference.InferenceLanguageModel)
    monkeypatch.setattr(vlm.language, "__class__", inference.InferenceLanguageModel)
    assert answers() == plain
    assert made and all(step.graph for step in made), "each was played again"


def test_yields_while_it_generates_and_stops_when_left(language):
    stream = generate(language, [1, 2, 3], max_new_tokens=10**9)
    assert next(stream) == greedy_without_cache(language, [1, 2, 3], None, 1)[0]
    stream.close()


def test_ends_at_the_last_trained_position():
    torch.manual_seed(2)
    model = scaled_up(LanguageModel(tiny_language(max_position_embeddings=20)))
    assert len(list(generate(model, list(range(15)), max_new_tokens=50))) == 5
    for length in (0, 20):
        with pytest.raises(ValueError, match=f"the prompt has {length} tokens"):
            list(generate(model, list(range(length))))


def test_a_language_model_takes_no_pictures(language):
    with pytest.raises(ValueError, match="no images"):
        list(generate(language, [1], torch.zeros(1, 3, 16, 16)))


def test_penalty_by_hand():
    logits = torch.tensor([2.0, -2.0, 1.0, 0.0])
    # Token 0 occurs twice and is punished once; 1 is negative; 9 lies past the vocabulary.
    found = apply_repetition_penalty(logits, [0, 0, 1, 9], 1.25)
    assert torch.allclose(found, torch.tensor([1.6, -2.5, 1.0, 0.0]))
    assert torch.equal(logits, torch.tensor([2.0, -2.0, 1.0, 0.0])), "the input stays as it was"
    assert sample_token(torch.tensor([1.1, 1.0]), [0],
                        GenerationConfig(repetition_penalty=1.2)) == 1


def test_distribution_by_hand():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()

    def expect(found, wanted):
        assert torch.allclose(found, torch.tensor(wanted).float(), atol=1e-6), found

    expect(sampling_probs(logits, 1.0, 0, 1.0), [0.1, 0.4, 0.2, 0.3])
    expect(sampling_probs(logits, 0.5, 0, 1.0), [1 / 30, 16 / 30, 4 / 30, 9 / 30])  # squared
    expect(sampling_probs(logits, 1.0, 2, 1.0), [0, 4 / 7, 0, 3 / 7])
    expect(sampling_probs(logits, 1.0, 0, 0.65), [0, 4 / 7, 0, 3 / 7])
    expect(sampling_probs(logits, 1.0, 0, 0.75), [0, 4 / 9, 2 / 9, 3 / 9])
    expect(sampling_probs(logits, 1.0, 0, 0.0), [0, 1, 0, 0])  # never nothing at all
    # 0.65 of what top_k left: 4/7 = 0.57 is not enough, so both stay.
    expect(sampling_probs(logits, 1.0, 2, 0.65), [0, 4 / 7, 0, 3 / 7])
    expect(sampling_probs(logits, 1.0, 2, 0.55), [0, 1, 0, 0])


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    generator = torch.Generator().manual_seed(0)
    config = GenerationConfig(temperature=1.0, top_k=3, generator=generator)
    draws = [sample_token(logits, [], config) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(draws), minlength=4) / 4000
    gap = (shares - torch.tensor([0, 4 / 9, 2 / 9, 3 / 9])).abs().max()
    assert gap < 0.03, f"largest difference {gap:.3f}"


def test_a_seed_draws_the_same_answer_again(language):
    def answer(seed):
        generator = torch.Generator().manual_seed(seed)
        return list(generate(language, [1, 2, 3], max_new_tokens=20, temperature=1.0,
                             generator=generator))

    assert answer(0) == answer(0) != answer(1)


def test_sampling_equals_transformers_warpers():
    import transformers  # a test requirement: its absence is a failure
    logits = torch.randn(50, generator=torch.Generator().manual_seed(4)) * 3
    seen = [3, 7, 7, 11]
    expected = logits[None].clone()
    for process in (transformers.RepetitionPenaltyLogitsProcessor(1.3),
                    transformers.TemperatureLogitsWarper(0.7),
                    transformers.TopKLogitsWarper(12), transformers.TopPLogitsWarper(0.8)):
        expected = process(torch.tensor([seen]), expected)
    found = sampling_probs(apply_repetition_penalty(logits, seen, 1.3), 0.7, 12, 0.8)
    gap = (found - expected.softmax(-1)[0]).abs().max()
    assert gap < 1e-6, f"largest difference {gap:.2e}"


def test_equals_transformers_on_a_tiny_qwen2(language):
    import transformers  # a test requirement: its absence is a failure
    public = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**{**write_config(language.config), "bos_token_id": None,
                                    "eos_token_id": None, "pad_token_id": 0})).eval()
    ours = {("model." + name): tensor for name, tensor in language.state_dict().items()}
    missing, unexpected = public.load_state_dict(ours, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied to the embedding
    public.tie_weights()
    for seed, penalty in ((0, 1.0), (1, 1.0), (2, 1.3)):
        ids, _ = random_prompt(seed, 10 + seed)
        theirs = public.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=48,
                                 repetition_penalty=penalty)[0, len(ids):].tolist()
        assert theirs == list(generate(language, ids, max_new_tokens=48,
                                       repetition_penalty=penalty))


PROMPTS = ("What is the capital of France?", "Write a short poem about the sea.",
           "Explain why the sky is blue.", "Name three animals that can fly.",
           "Give me a recipe for pancakes.")


def test_greedy_chat_on_real_smollm2_equals_transformers():
    import transformers  # a test requirement: its absence is a failure
    directory = needed(weights_dir(), "smollm2")
    template = ChatTemplate(Tokenizer.from_directory(directory), image_tokens=1)
    ours = load_language(str(directory)).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs.eval()
    for prompt in PROMPTS:
        ids = template.encode_prompt([Message("user", prompt)])
        # Neither side stops: all 64 ids are compared.
        expected = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64,
                                   min_new_tokens=64, eos_token_id=None, pad_token_id=0)
        found = list(generate(ours, ids, max_new_tokens=64))
        assert found == expected[0, len(ids):].tolist(), prompt
