"""Train the embedded vision tower dataset/emoji/vision: a small SigLIP, on scenes and captions.

    python -m extras.emoji.train_vision     about an hour on one core; the result is in the repo

SigLIP (Zhai et al. 2023) asks of every picture and every text of a batch: do they belong together?
Here the answer is known: "A cat at the top left." is true of a scene or it is not, so every pair of
the batch teaches, not only the diagonal. Texts: the caption of each scene, and one statement for
each thing in it, half of them with its place; in English and Chinese. The text tower is thrown
away at the end, as everybody does who builds a vision-language model on SigLIP.

A curriculum (the hint of a first try: from scenes of four things alone, little was learned): one
large or small thing, then up to two, then all.
"""

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from dataset.emoji import texts
from dataset.emoji.world import PICTURE_SIZE, TEST_START, picture, scene
from dataset.images import ImageProcessor
from dataset.readers.preprocessor_config import HALF
from dataset.tokenizer import Tokenizer
from model.config import LanguageConfig, VisionConfig
from model.language import LanguageModel
from model.pretrained.save import save_vision
from model.vision import VisionTransformer

HERE = Path(__file__).resolve().parents[2] / "dataset" / "emoji"
PLACES = list(texts.PLACES)
COUNTS = ((0, 1), (0, 1, 2, 2), (0, 1, 2, 3, 4, 4))  # things in a scene, stage by stage


class AttentionPool(nn.Module):
    """SigLIP's head: one learned query looks at all patches. (N,P,Dv) -> (N,Dv).

    Saved with the tower under SigLIP's names; the vision-language model does not need it.
    """

    def __init__(self, width: int, heads: int, intermediate_size: int):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, intermediate_size),
                                  "fc2": nn.Linear(intermediate_size, width)})

    def forward(self, features):
        probe = self.probe.expand(len(features), -1, -1)
        seen = self.attention(probe, features, features, need_weights=False)[0]
        hidden = F.gelu(self.mlp["fc1"](self.layernorm(seen)), approximate="tanh")
        return (seen + self.mlp["fc2"](hidden))[:, 0]


class TextTower(nn.Module):
    """A two-layer decoder; the state at a text's last token stands for the text."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.decoder = LanguageModel(LanguageConfig(
            model_type="llama", vocab_size=vocab_size, hidden_size=128, intermediate_size=256,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=32,
            rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=True, qkv_bias=False,
            qk_norm=False, max_position_embeddings=64))
        self.out = nn.Linear(128, width)

    def forward(self, rows: list[list[int]]):
        ids = pad_sequence(list(map(torch.tensor, rows)), batch_first=True)  # (S,T)
        last = torch.tensor([len(row) - 1 for row in rows])
        hidden = self.decoder.decode(self.decoder.embed(ids))  # (S,T,128)
        return self.out(hidden[torch.arange(len(rows)), last])  # (S,Dv)


def statements(scenes, rng) -> tuple[list[str], torch.Tensor]:
    """S texts about B scenes and their truth (B,S)."""
    has = np.zeros((len(scenes), len(texts.THINGS), len(PLACES) + 1), dtype=bool)  # last: anywhere
    for row, what in enumerate(scenes):
        for placed in what.things:
            has[row, placed.thing, [PLACES.index(placed.place), -1]] = True
    facts = {(p.thing, rng.choice((PLACES.index(p.place), len(PLACES))))
             for what in scenes for p in what.things}
    said, truth = [], []
    for thing, place in sorted(facts):
        language = rng.choice(("en", "zh"))
        one = texts.THINGS[thing].one(language)
        if place < len(PLACES):
            english, chinese = texts.PLACES[PLACES[place]][:2]
            one = f"{one} {english}" if language == "en" else f"{chinese}有{one}"
        said.append(texts.finish([one], language))
        truth.append(has[:, thing, place])
    orders = [tuple(p.thing for p in what.things) for what in scenes]
    for order in sorted(set(orders)):
        language = rng.choice(("en", "zh"))
        said.append(texts.finish([texts.THINGS[t].one(language) for t in order], language))
        truth.append(np.array([other == order for other in orders]))
    return said, torch.from_numpy(np.stack(truth, axis=1))


def sigmoid_loss(images, said, truth, scale, bias):
    """images (B,Dv), said (S,Dv), truth (B,S) -> the mean over pictures of the summed loss."""
    logits = F.normalize(images, dim=-1) @ F.normalize(said, dim=-1).T * scale.exp() + bias
    return F.binary_cross_entropy_with_logits(
        logits, truth.float(), reduction="sum") / len(images), logits


def draw(batch_size: int, stage: int, rng):
    """Scenes and their pixels (B,3,96,96), normalised as SigLIP's processor does."""
    scenes = [scene(rng.randrange(TEST_START), rng.choice(COUNTS[stage]))
              for _ in range(batch_size)]
    pixels = torch.from_numpy(np.stack([np.asarray(picture(what)) for what in scenes]))
    return scenes, (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m extras.emoji.train_vision", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch_size", type=int, default=96)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--tokenizer", type=Path, default=HERE / "language")
    parser.add_argument("--out", type=Path, default=HERE / "vision")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = Tokenizer.from_directory(args.tokenizer)
    config = VisionConfig(
        model_type="siglip_vision_model", hidden_size=192, intermediate_size=768,
        num_hidden_layers=6, num_attention_heads=6, image_size=PICTURE_SIZE, patch_size=24,
        hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, class_token=False, patch_bias=True,
        pre_norm=False, final_norm=True, layer_scale=False)
    vision = VisionTransformer(config)
    pool = AttentionPool(192, 6, 768)
    text_tower = TextTower(tokenizer.vocab_size, 192)
    nn.init.normal_(text_tower.decoder.embed_tokens.weight, std=0.02)
    scale, bias = nn.Parameter(torch.tensor(math.log(10.0))), nn.Parameter(torch.tensor(-10.0))
    everything = [*vision.parameters(), *pool.parameters(), *text_tower.parameters(), scale, bias]
    print(f"{sum(p.numel() for p in vision.parameters()) / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(everything, betas=(0.9, 0.98), weight_decay=0.05)
    processor = ImageProcessor("SiglipImageProcessor", (PICTURE_SIZE, PICTURE_SIZE), None,
                               Image.Resampling.BICUBIC, 1 / 255, HALF, HALF)
    processor.save(args.out)
    log, start = (args.out / "training_log.jsonl").open("w"), time.time()
    for step in range(args.steps):
        rate = args.learning_rate * min(1, (step + 1) / 300)
        rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * step / args.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        done = step / args.steps
        scenes, pixels = draw(args.batch_size, 0 if done < 0.15 else 1 if done < 0.35 else 2, rng)
        said, truth = statements(scenes, rng)
        with torch.autocast("cpu", torch.bfloat16):
            images = pool(vision(pixels))
            words = text_tower([tokenizer.encode(text) for text in said])
        loss, logits = sigmoid_loss(images.float(), words.float(), truth, scale, bias)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(everything, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == args.steps - 1:
            found = (logits > 0)[truth].float().mean().item()  # true statements recognised
            line = {"step": step, "loss": round(loss.item(), 4), "found": round(found, 3),
                    "seconds": int(time.time() - start)}
            print(line, flush=True)
            print(json.dumps(line), file=log, flush=True)
        if step % 1000 == 999 or step == args.steps - 1:
            # bf16 halves the file, and rounds the weights to what training computed with.
            head = copy.deepcopy(pool).to(torch.bfloat16).state_dict()
            save_vision(copy.deepcopy(vision).to(torch.bfloat16), args.out,
                        {f"head.{name}": tensor for name, tensor in head.items()})


if __name__ == "__main__":
    main()
