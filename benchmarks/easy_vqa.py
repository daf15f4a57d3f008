"""easy-VQA: a public benchmark that fits a laptop, and a model of how to train on data of your own.

    pip install easy-vqa
    python benchmarks/easy_vqa.py                    train on its train split, score its test split
    python benchmarks/easy_vqa.py --hold_out 500     to try things: the test split is never opened,
                                                     500 pictures of the train split are scored

    questions.json, images/*.png -> minimind-v's JSON Lines and a folder of pictures
    -> benchmarks/easy_vqa_tower.py -> train_pretrain.py, train_sft.py -> eval.py -> OUT/result.json

4,000 pictures of 64 x 64 pixels to learn from and 1,000 to be asked about, each with one shape of
one colour: 38,575 and 9,673 questions, 13 answers (Victor Zhou, 2019). The scripts that train and
score are the ones that you would call, with the flags that are printed, and the towers are the
embedded ones of the emoji world. They have never seen a plain circle, nor read "triangle"; so the
eyes are trained first, by themselves, then the projector and the language model.

What takes thought with any data:

- A row for each question. Several in one conversation would share the cost of a picture, but the
  later ones could be answered from the earlier answers, without looking. For the same reason the
  score asks each question by itself.
- First eyes: the tower learns to tell shapes and colours by itself (easy_vqa_tower.py says why),
  and is frozen then, which makes a step of the others a third shorter. Then what is there, then all
  that can be asked of it. Three quarters of the questions want yes or no, and can be half answered
  without looking; a model that learned from all of them at once named every colour after 31,000
  rows, and called every shape a circle. So the tower and stage one are given the questions that
  name a colour or a shape, and stage two all of them.
- The projector is the only part that starts from noise, so it learns ten times as fast as
  the language model (--projector_learning_rate).
- 4,000 pictures are few, and 3,579 of them have a ground of their own: who knows the pale colour
  by heart needs no look at the shape. So each row has an image of its own, its shape drawn anew on
  the ground of another training picture, mirrored or not and at another place. That changes no
  answer. In size it stays as it is, for a small circle made smaller is no circle any more.

An answer counts when it is freely generated, greedily, and equal to the truth; no list of the 13
answers helps. Every flag that is not listed by --help goes to both training scripts, not to the
training of the tower.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# Small batches, for many steps: with 16 rows in each, one seed did not learn all colours in time.
COMMON = ["--preset", "emoji", "--train_language", "all", "--num_workers", "1", "--epochs", "1",
          "--batch_size", "8", "--learning_rate", "0.0003", "--projector_learning_rate", "0.003"]
EYES = ["--pixel_shuffle", "2"]  # four patches are a token: 16 of them, as in the emoji world
LOOKS = 3  # pictures for each question that the tower learns from


def package_data() -> Path:
    """Where the installed package easy-vqa keeps its two splits.

    Asked by the package's name and not imported: as a script, this very file is "easy_vqa" too.
    """
    try:
        return Path(distribution("easy-vqa").locate_file("easy_vqa/data"))
    except PackageNotFoundError:
        raise SystemExit("the package easy-vqa is not installed: pip install easy-vqa (3 MB), or "
                         "give --data DIR, a directory with train/ and test/") from None


def read_split(data: Path, split: str) -> dict[int, list[tuple[str, str]]]:
    """DIR/split/questions.json -> {number of a picture: [(question, answer), ...]}, by number."""
    file = data / split / "questions.json"
    if not file.is_file():
        raise SystemExit(f"there is no {file}; --data takes a directory with train/ and test/, "
                         "each of them with questions.json and images/")
    asked = {}
    for question, answer, number in json.loads(file.read_text(encoding="utf-8")):
        asked.setdefault(number, []).append((question, answer))
    return dict(sorted(asked.items()))


def as_row(picture: str, question: str, answer: str) -> dict:
    """A line of minimind-v's JSON Lines; kind is what eval.py counts its scores by."""
    return {"conversations": [{"role": "user", "content": f"<image>\n{question}"},
                              {"role": "assistant", "content": answer}],
            "image": picture, "kind": kind_of(question)}


def kind_of(question: str) -> str:
    words = question.split()
    return "yes or no" if words[0] != "what" else "colour" if "color" in words else "shape"


def write_training(asked: dict, source: Path, out: Path, seed: int) -> int:
    """Write train.jsonl, naming.jsonl and looks.jsonl into OUT; return the number of train.jsonl's.

    train.jsonl has a row for each question, naming.jsonl those of them that ask for a colour or a
    shape, once more, and looks.jsonl the same LOOKS times. Each row has an image of its own, drawn
    anew; only the first about a picture is as it is.
    """
    dice, rows = random.Random(seed), {"train": [], "naming": [], "looks": []}
    shapes = {number: find_shape(read_picture(source, number)) for number in asked}
    grounds = [ground for *_, ground in shapes.values()]
    for number, pairs in asked.items():
        named = [pair for pair in pairs if kind_of(pair[0]) != "yes or no"]
        files = ["train"] * len(pairs) + ["naming"] * len(named) + ["looks"] * len(named) * LOOKS
        *shape, _ = shapes[number]
        for place, (file, pair) in enumerate(zip(files, pairs + named * (1 + LOOKS), strict=True)):
            name = f"train_{number}_{place}.png"
            pixels = (draw_anew(*shape, dice.choice(grounds), dice) if place
                      else read_picture(source, number))
            Image.fromarray(pixels).save(out / "pictures" / name)
            rows[file].append(as_row(name, *pair))
    for name, found in rows.items():
        write_lines(out / f"{name}.jsonl", found)
    return len(rows["train"])


def write_scored(asked: dict, source: Path, split: str, out: Path) -> int:
    """Write OUT/scored.jsonl, a row for each question, and the pictures as they are."""
    rows = []
    for number, pairs in asked.items():
        name = f"{split}_{number}.png"
        Image.fromarray(read_picture(source, number)).save(out / "pictures" / name)
        rows += [as_row(name, *pair) for pair in pairs]
    write_lines(out / "scored.jsonl", rows)
    return len(rows)


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_picture(source: Path, number: int) -> np.ndarray:
    with Image.open(source / f"{number}.png") as image:
        return np.array(image.convert("RGB"))  # (H,W,3) uint8


def find_shape(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple, np.ndarray]:
    """(H,W,3) -> how much of each pixel the shape covers (H,W), 0 to 1; its colour; the box (top,
    bottom, left, right) of all that is not ground; and the ground's colour.

    The largest shape is a third of the picture's pixels, so the commonest colour is the ground's;
    the next is the shape's. At its rim a pixel lies between the two, and is part of both.
    """
    counts = sorted(Image.fromarray(pixels).getcolors(pixels.size), reverse=True)
    ground, colour = (np.array(colour, np.float32) for _, colour in counts[:2])
    way = colour - ground
    cover = ((pixels - ground) @ way / (way @ way)).clip(0, 1)  # (H,W)
    rows, columns = np.nonzero((pixels != ground).any(axis=-1))
    return cover, colour, (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1), ground


def draw_anew(cover: np.ndarray, colour, box: tuple, ground, dice) -> np.ndarray:
    """The same shape in the same colour on another ground, (H,W,3) uint8: where the dice say,
    mirrored or not; none of the shapes minds. One that touches the edge stays where it is, for part
    of it may lie outside."""
    (H, W), (top, bottom, left, right) = cover.shape, box
    if min(top, left, H - bottom, W - right) > 0:
        down, across = dice.randint(-top, H - bottom), dice.randint(-left, W - right)
        cover = np.roll(cover, (down, across), axis=(0, 1))  # nothing of it passes the edge
    if dice.random() < 0.5:
        cover = cover[:, ::-1]
    cover = cover[..., None]
    return (cover * colour + (1 - cover) * ground).round().astype(np.uint8)


def run(command: list[str]) -> None:
    """Print a command of the project, and carry it out."""
    print("\n$ python " + shlex.join(command), flush=True)
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        name = " ".join(command[:2] if command[0] == "-m" else command[:1])
        raise SystemExit(f"{name} did not come to its end; it said above why")


def train(out: Path, command: list[str]) -> None:
    run([*command, "--out", str(out)])
    if not (out / "summary.json").is_file():  # stopped by a signal, it ends well too
        raise SystemExit("training did not come to its end, so there is nothing to score yet; the "
                         "same command with --resume goes on")


def clock() -> tuple[float, float]:
    """Seconds on the wall; and of all cores, by this process and by those that it has started."""
    return time.monotonic(), sum(os.times()[:4])


def read_flags(arguments=None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="directory with train/ and test/ (default: "
        "that of the installed package)")
    add("--out", type=Path, default=Path("out/easy_vqa"), help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of the shapes drawn anew, of the order of training "
        "and of the new projector (default: %(default)s)")
    add("--hold_out", type=int, default=0, metavar="N", help="score the last N pictures of the "
        "train split, and train on the others")
    return parser.parse_known_args(arguments)


def prepare(data: Path, out: Path, hold_out: int, seed: int) -> dict:
    """Write all that train_sft.py and eval.py read; return what was found, for result.json.

    With hold_out the split "test" is not opened, and what is scored is not trained on.
    """
    asked, split = read_split(data, "train"), "train" if hold_out else "test"
    if hold_out:
        numbers = list(asked)
        if not 0 < hold_out < len(numbers):
            raise SystemExit(f"--hold_out {hold_out}: expected 1 to {len(numbers) - 1}, for there "
                             f"are {len(numbers)} training pictures")
        scored = {number: asked.pop(number) for number in numbers[-hold_out:]}
    else:
        scored = read_split(data, "test")
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    (out / "result.json").unlink(missing_ok=True)  # of an earlier run, should this one fail
    return {"split": split, "pictures": len(scored),
            "questions": write_scored(scored, data / split / "images", split, out),
            "training_pictures": len(asked),
            "training_questions": write_training(asked, data / "train" / "images", out, seed)}


def main(arguments=None) -> None:
    flags, others = read_flags(arguments)
    out, began = flags.out.resolve(), clock()
    facts = prepare(flags.data or package_data(), out, flags.hold_out, flags.seed)
    print(" ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    pictures = ["--image_folder", str(out / "pictures")]
    common = [*COMMON, *pictures, "--seed", str(flags.seed), *others]
    naming = ["--data", str(out / "naming.jsonl")]
    run(["-m", "benchmarks.easy_vqa_tower", "--data", str(out / "looks.jsonl"), *pictures,
         "--out", str(out / "vision"), "--seed", str(flags.seed)])
    train(out / "naming", ["train_pretrain.py", *EYES, "--vision_tower", str(out / "vision"),
                           *naming, *common])
    train(out / "run", ["train_sft.py", "--data", str(out / "train.jsonl"),
                        "--model", str(out / "naming"), *common])
    trained = clock()
    run(["eval.py", "--model", str(out / "run"), "--data", str(out / "scored.jsonl"), *pictures,
         "--report", str(out)])
    ended = clock()

    lines = (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    right = sum(json.loads(line)["right"] for line in lines)
    if len(lines) != facts["questions"]:
        raise SystemExit(f"{facts['questions']:,} questions were to be asked and {len(lines):,} "
                         "were answered: that is no score. Above it is said what was wrong.")
    result = {"score": right / len(lines), "right": right, **facts, "seed": flags.seed,
              "flags": others,
              "minutes": round((ended[0] - began[0]) / 60, 1),
              "minutes_of_scoring": round((ended[0] - trained[0]) / 60, 1),
              "cpu_seconds": round(ended[1] - began[1])}
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\n{right:,} of {len(lines):,} questions of the {facts['split']} split answered "
          f"exactly: {result['score']:.2%}, seed {flags.seed}, {result['minutes']} minutes, "
          f"{result['cpu_seconds']:,} CPU seconds")


if __name__ == "__main__":
    main()
