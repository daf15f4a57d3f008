"""easy-VQA: a public benchmark that fits a laptop, and a model of how to train on data of your own.

    pip install easy-vqa
    python benchmarks/easy_vqa.py                    train on its train split, score its test split
    python benchmarks/easy_vqa.py --hold_out 500     to try things: the test split is never opened,
                                                     500 pictures of the train split are scored

    questions.json, images/*.png -> minimind-v's JSON Lines and a folder of pictures
                                 -> train_sft.py -> a checkpoint -> eval.py -> OUT/result.json

4,000 pictures of 64 x 64 pixels to learn from and 1,000 to be asked about, each with one shape of
one colour: 38,575 and 9,673 questions, 13 answers (Victor Zhou, 2019). Nothing here is made for it:
the two scripts that train and score are the ones that you would call, with the flags that are
printed, and the towers are the embedded ones of the emoji world. They have never seen a plain
circle, nor read "triangle"; so all three parts are trained.

What takes thought with any data:

- Questions about one picture stand in one conversation, so that it is looked at once for several.
  But only some of them: later questions can be answered from earlier answers, without looking.
- The score asks each question by itself, for the same reason: no answer has been told before it.
- 4,000 pictures are few. Each comes several times, as it is and with its shape mirrored or at
  another place, which changes no answer: the questions never ask where. Training pictures only.

An answer counts when it is freely generated, greedily, and is the truth to the letter; no list of
the 13 answers helps. Every flag that is not listed by --help goes to train_sft.py.
"""

import argparse
import importlib.util
import json
import os
import random
import shlex
import subprocess
import sys
import time
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ["--preset", "emoji", "--model", "none", "--train_vision", "--train_language", "all",
          "--epochs", "2", "--batch_size", "32", "--learning_rate", "0.001", "--workers", "1"]
COPIES = 8  # of a training picture: itself and seven with the shape elsewhere
TOGETHER = 4  # questions in a training conversation


def package_data() -> Path:
    """Where the installed package easy-vqa keeps its two splits."""
    found = importlib.util.find_spec("easy_vqa")
    if found is None:
        raise SystemExit("the package easy-vqa is not installed: pip install easy-vqa (3 MB), or "
                         "give --data DIR, a directory with train/ and test/")
    return Path(found.origin).parent / "data"


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


def as_row(picture: str, pairs: list[tuple[str, str]]) -> dict:
    """A picture and its (question, answer) pairs -> a line of minimind-v's JSON Lines."""
    turns = []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    turns[0]["content"] = "<image>\n" + turns[0]["content"]
    return {"conversations": turns, "image": picture}


def kind_of(question: str) -> str:
    """What eval.py counts its scores by."""
    words = question.split()
    return "yes or no" if words[0] != "what" else "colour" if "color" in words else "shape"


def write_training(asked: dict, source: Path, out: Path, copies: int, seed: int) -> int:
    """Write OUT/train.jsonl and its pictures; return the number of rows.

    Over the copies of a picture each of its questions comes equally often, give or take one.
    """
    dice, rows = random.Random(seed), []
    for number, pairs in asked.items():
        pixels = read_picture(source, number)
        shape = find_shape(pixels)
        deck = cycle(dice.sample(pairs, len(pairs)))
        for copy in range(copies):
            name = f"train_{number}_{copy}.png"
            Image.fromarray(elsewhere(pixels, *shape, dice) if copy else pixels).save(
                out / "pictures" / name)
            hand = list(islice(deck, min(TOGETHER, len(pairs))))
            rows.append(as_row(name, dice.sample(hand, len(hand))))
    write_lines(out / "train.jsonl", rows)
    return len(rows)


def write_scored(asked: dict, source: Path, split: str, out: Path) -> int:
    """Write OUT/scored.jsonl, a row for each question, and the pictures as they are."""
    rows = []
    for number, pairs in asked.items():
        name = f"{split}_{number}.png"
        Image.fromarray(read_picture(source, number)).save(out / "pictures" / name)
        rows += [{**as_row(name, [pair]), "kind": kind_of(pair[0])} for pair in pairs]
    write_lines(out / "scored.jsonl", rows)
    return len(rows)


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_picture(source: Path, number: int) -> np.ndarray:
    with Image.open(source / f"{number}.png") as image:
        return np.array(image.convert("RGB"))  # (H,W,3) uint8


def find_shape(pixels: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """(H,W,3) -> the colour of the ground, and the box (top, bottom, left, right) of all else.

    The largest shape is a third of the picture's pixels, so the commonest colour is the ground's.
    """
    _, ground = max(Image.fromarray(pixels).getcolors(pixels.size))  # (count, colour)
    ground = np.array(ground, np.uint8)
    rows, columns = np.nonzero((pixels != ground).any(axis=-1))
    if len(rows) == 0:
        return ground, (0, *pixels.shape[:1], 0, *pixels.shape[1:2])
    return ground, (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)


def elsewhere(pixels: np.ndarray, ground: np.ndarray, box: tuple, dice) -> np.ndarray:
    """(H,W,3) -> the same shape at a place that the dice choose, or where it was when it touches
    the edge: part of it may lie outside. Mirrored, or not: none of the shapes minds."""
    (H, W, _), (top, bottom, left, right) = pixels.shape, box
    if min(top, left, H - bottom, W - right) > 0:
        y, x = dice.randint(0, H - (bottom - top)), dice.randint(0, W - (right - left))
        moved = np.broadcast_to(ground, pixels.shape).copy()
        moved[y:y + bottom - top, x:x + right - left] = pixels[top:bottom, left:right]
        pixels = moved
    return pixels[:, ::-1].copy() if dice.random() < 0.5 else pixels


def run(command: list[str]) -> None:
    """Print a command of the project, and carry it out."""
    print("\n$ python " + shlex.join(command), flush=True)
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise SystemExit(f"{command[0]} did not come to its end; it said above why")


def clock() -> tuple[float, float]:
    """Seconds on the wall; and of all cores, by this process and by those that it has started."""
    return time.monotonic(), sum(os.times()[:4])


def read_flags(arguments=None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="directory with train/ and test/ (default: "
        "that of the installed package)")
    add("--out", type=Path, default=Path("out/easy_vqa"), help="(default: %(default)s)")
    add("--seed", type=int, default=0, help="of the moved shapes, of the order of training and of "
        "the new projector (default: %(default)s)")
    add("--hold_out", type=int, default=0, metavar="N", help="score the last N pictures of the "
        "train split, and train on the others")
    add("--copies", type=int, default=COPIES, help="of each training picture, all but the first "
        "with the shape elsewhere (default: %(default)s)")
    flags, others = parser.parse_known_args(arguments)
    if flags.copies < 1:
        parser.error(f"--copies {flags.copies}: expected at least 1")
    return flags, others


def prepare(data: Path, out: Path, hold_out: int, copies: int, seed: int) -> dict:
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
            "training_pictures": len(asked), "training_questions": sum(map(len, asked.values())),
            "training_rows": write_training(asked, data / "train" / "images", out, copies, seed)}


def main(arguments=None) -> None:
    flags, others = read_flags(arguments)
    out, began = flags.out.resolve(), clock()
    facts = prepare(flags.data or package_data(), out, flags.hold_out, flags.copies, flags.seed)
    print(" ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    pictures = ["--images", str(out / "pictures")]
    run(["train_sft.py", *RECIPE, "--data", str(out / "train.jsonl"), *pictures,
         "--out", str(out / "run"), "--seed", str(flags.seed), *others])
    if not (out / "run" / "summary.json").is_file():  # stopped by a signal, it ends well too
        raise SystemExit("training did not come to its end, so there is nothing to score yet; the "
                         "same command with --resume goes on")
    trained = clock()
    run(["eval.py", "--model", str(out / "run"), "--data", str(out / "scored.jsonl"), *pictures,
         "--report", str(out)])
    ended = clock()

    lines = (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    right = sum(json.loads(line)["right"] for line in lines)
    if len(lines) != facts["questions"]:
        raise SystemExit(f"{facts['questions']:,} questions were to be asked and {len(lines):,} "
                         "were answered: that is no score. Above it is said what was wrong.")
    result = {"score": right / len(lines), "right": right, **facts, "copies": flags.copies,
              "seed": flags.seed, "flags": others,
              "minutes": round((ended[0] - began[0]) / 60, 1),
              "minutes_of_scoring": round((ended[0] - trained[0]) / 60, 1),
              "cpu_seconds": round(ended[1] - began[1])}
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\n{right:,} of {len(lines):,} questions of the {facts['split']} split answered "
          f"exactly: {result['score']:.2%}, seed {flags.seed}, {result['minutes']} minutes, "
          f"{result['cpu_seconds']:,} CPU seconds")


if __name__ == "__main__":
    main()
