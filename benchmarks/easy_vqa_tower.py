"""The eyes of easy_vqa.py: the emoji world's vision tower learns to tell plain shapes and colours.

    a picture, a question of some kind -> the mean of the patches -> one linear layer
                                       -> which of its kind's answers -> OUT, a public tower

A tower is trained before the model that reads it; SigLIP's saw pictures with texts, this one saw
emoji. What its patches say already, the projector and the language model learn to read in a
hundred steps; what they do not say comes slowly through a language model that cannot read yet.
The linear layer is thrown away, and the tower is frozen: the model has to answer in words.

The pictures become PIXELS wide, so that a patch is 8 of their own pixels and not 16, and less of an
outline hides inside of one patch. The position grid stretches, as for any tower.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from dataset.images import ImageProcessor
from model.pretrained.load import load_vision
from model.pretrained.save import save_vision
from training.optim import set_learning_rate
from training.schedules import cosine

ROOT = Path(__file__).resolve().parent.parent
TOWER = ROOT / "dataset/emoji/vision"
PIXELS = 192  # of a side; the tower was trained with 96
BATCH_SIZE, LEARNING_RATE, WARMUP = 16, 3e-4, 0.1


def read_rows(file: Path) -> list[tuple[str, str, str]]:
    """minimind-v's JSON Lines with "kind" -> [(picture, kind, answer), ...]"""
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [(row["image"], row["kind"], row["conversations"][1]["content"]) for row in rows]


def write_processor(directory: Path) -> None:
    """The emoji tower's image processor, for pictures of PIXELS."""
    facts = json.loads((TOWER / "preprocessor_config.json").read_text(encoding="utf-8"))
    facts["size"] = {"height": PIXELS, "width": PIXELS}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "preprocessor_config.json").write_text(json.dumps(facts, indent=2),
                                                        encoding="utf-8")


def train(rows: list[tuple[str, str, str]], images: Path, out: Path, seed: int) -> float:
    """Train on each row once and write OUT; return the accuracy over the last tenth."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_processor(out)
    processor = ImageProcessor.from_directory(out)
    tower = load_vision(str(TOWER)).requires_grad_(True).to(device)
    answers = sorted({(kind, answer) for _, kind, answer in rows})  # A of them
    head = nn.Linear(tower.config.hidden_size, len(answers)).to(device)
    trained = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW([{"params": trained, "peak": LEARNING_RATE}], weight_decay=0.01)

    rows = random.Random(seed).sample(rows, len(rows))
    steps, correct = -(-len(rows) // BATCH_SIZE), []
    for step in (bar := tqdm(range(steps), mininterval=5)):
        batch = rows[step * BATCH_SIZE:(step + 1) * BATCH_SIZE]
        pixels = torch.stack([processor(Image.open(images / name)) for name, _, _ in batch])
        truth = torch.tensor([answers.index(row[1:]) for row in batch], device=device)  # (N,)
        others = torch.tensor([[kind != of for of, _ in answers] for _, kind, _ in batch],
                              device=device)  # (N,A) True: an answer to another kind of question
        logits = head(tower(pixels.to(device)).mean(1)).masked_fill(others, -torch.inf)  # (N,A)
        loss = F.cross_entropy(logits, truth)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        set_learning_rate(optimizer, cosine(step + 1, steps, WARMUP))
        optimizer.step()
        optimizer.zero_grad()
        correct += (logits.argmax(-1) == truth).tolist()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    save_vision(tower.cpu(), out)
    last = correct[-max(1, len(correct) // 10):]
    return sum(last) / len(last)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.easy_vqa_tower", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="JSON Lines with a kind for each row")
    add("--image_folder", type=Path, required=True, help="directory of the pictures")
    add("--out", type=Path, required=True, help="the tower is written here")
    add("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    share = train(read_rows(flags.data), flags.image_folder, flags.out, flags.seed)
    print(f"of the last tenth, each seen for the first time, {share:.1%} were right; "
          f"the tower: {flags.out}")


if __name__ == "__main__":
    main()
