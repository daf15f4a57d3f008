"""Tiny data sets, each laid out as its authors publish it: names, keys, columns, directories.

    a function of a directory -> Published: the flags of each stage, and how many samples it has
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.tiny import COLOURS


@dataclass
class Published:
    pretrain: list[str]  # flags: --data, and --image_folder where the pictures lie elsewhere
    sft: list[str]
    samples: tuple[int, int]  # of each stage, in an epoch


def jpeg(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 18), COLOURS[colour]).save(file, "JPEG")
    return file.getvalue()


def save_pictures(directory: Path, name: str = "{}.jpg") -> list[str]:
    """One picture of each colour -> their names, in the order of COLOURS."""
    directory.mkdir(parents=True, exist_ok=True)
    names = [name.format(colour) for colour in COLOURS]
    for colour, each in zip(COLOURS, names):
        (directory / each).write_bytes(jpeg(colour))
    return names


def write_json(path: Path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------- minimind-v


def minimind_turns(colour: str, rounds: int = 1) -> list[dict]:
    turns = [{"role": "user", "content": "提供给定图像的简要描述。\n<image>"},
             {"role": "assistant", "content": f"一张{colour}的图片。"}]
    for _ in range(rounds - 1):
        turns += [{"role": "user", "content": "Are you sure?"},
                  {"role": "assistant", "content": f"Yes, it is {colour}."}]
    return turns


def minimind_jsonl(directory: Path) -> Published:
    """Until December 2025: *_data.jsonl beside the unpacked *_images; some samples are text."""
    flags = {}
    for stage, rounds in (("pretrain", 1), ("sft", 2)):
        names = save_pictures(directory / f"{stage}_images")
        lines = [{"conversations": minimind_turns(colour, rounds), "image": name}
                 for colour, name in zip(COLOURS, names)]
        if stage == "sft":
            lines.append({"conversations": [{"role": "user", "content": "你好"},
                                            {"role": "assistant", "content": "你好！"}]})
        file = directory / f"{stage}_data.jsonl"
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
                        encoding="utf-8")
        flags[stage] = ["--data", str(file), "--image_folder", str(directory / f"{stage}_images")]
    return Published(**flags, samples=(4, 5))


def minimind_parquet(directory: Path) -> Published:
    """Since then: conversations as JSON text, and the pictures' bytes beside them."""
    directory.mkdir(parents=True)
    flags = {}
    for stage, rounds in (("pretrain", 1), ("sft", 2)):
        texts = [json.dumps(minimind_turns(colour, rounds), ensure_ascii=False)
                 for colour in COLOURS]
        pictures = [jpeg(colour) for colour in COLOURS]
        if stage == "sft":  # as a list of one
            pictures = [[each] for each in pictures]
        file = directory / f"{stage}_i2t.parquet"
        pq.write_table(pa.table({"conversations": texts, "image_bytes": pictures}), file,
                       row_group_size=3)
        flags[stage] = ["--data", str(file)]
    return Published(**flags, samples=(4, 4))


# ---------------------------------------------------------------- COCO and AI Challenger


def coco_conversations(names: list[str], kind: str) -> list[dict]:
    """LLaVA's files about COCO: detail_23k, complex_reasoning_77k, llava_instruct_150k."""
    asked = {"detail": ("Can you describe the main features of this image?\n<image>",
                        "The image shows a plain surface."),
             "complex": ("<image>\nWhat might be the reason for this?", "Somebody painted it."),
             "vqa": ("<image>\nWhat colour is it?\nAnswer the question using a single word or "
                     "phrase.", "Red")}[kind]
    turns = [{"from": "human", "value": asked[0]}, {"from": "gpt", "value": asked[1]}]
    if kind == "vqa":
        turns += [{"from": "human", "value": "Is it bright?"}, {"from": "gpt", "value": "Yes"}]
    return [{"id": name.removesuffix(".jpg"), "image": name, "conversations": turns}
            for name in names]


def coco_and_challenger(directory: Path) -> Published:
    """Three files, each beside its own pictures, mixed in both stages."""
    coco = directory / "coco" / "train2017"
    names = save_pictures(coco, "000000{}.jpg")
    detail = write_json(coco / "detail_23k.json", coco_conversations(names, "detail"))
    complex_ = write_json(coco / "complex_reasoning_77k.json", coco_conversations(names, "complex"))
    challenger = directory / "ai_challenger" / "caption_train_images_20170902"
    captions = ["一个平面", "一面墙\n", "一种颜色", "没有人的画面", "一张图"]
    annotations = write_json(
        challenger / "caption_train_annotations_20170902.json",
        [{"url": "http://m4.biz.itc.cn/pic", "image_id": name, "caption": captions}
         for name in save_pictures(challenger, "{}8f0c.jpg")])
    flags = ["--data", detail, complex_, annotations]
    return Published(flags, flags, samples=(12, 12))


def captions_and_vqa(directory: Path) -> Published:
    """COCO's own annotation file, then questions with short answers; and a text without picture,
    as in LLaVA's mix of 665,000."""
    names = save_pictures(directory / "train2017", "000000{}.jpg")
    coco = write_json(directory / "annotations" / "captions_train2017.json", {
        "info": {"year": 2017}, "licenses": [],
        "images": [{"id": 9 + i, "file_name": name, "height": 18, "width": 20}
                   for i, name in enumerate(names)],
        "annotations": [{"image_id": 9 + i % 4, "id": i, "caption": f"A plain picture, {i}."}
                        for i in range(6)]})
    vqa = coco_conversations(names, "vqa")
    text = {"id": "t", "model": "", "conversations": [
        {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello!"}]}
    images = ["--image_folder", str(directory / "train2017")]
    return Published(["--data", coco, *images],
                     ["--data", write_json(directory / "vqa.json", [*vqa, text]), *images],
                     samples=(6, 5))


# ---------------------------------------------------------------- cc3m and llava-instruct-mix


def cc3m_and_instruct_mix(directory: Path) -> Published:
    """chat.json with its unpacked images; then Parquet in parts, named by a star."""
    names = save_pictures(directory / "cc3m" / "images", "GCC_train_{}.jpg")
    chat = [{"id": name.removesuffix(".jpg"), "image": name, "conversations": [
        {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
        {"from": "gpt", "value": "a plain surface"}]} for name in names]
    chat = write_json(directory / "cc3m" / "chat.json", chat)

    structs = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    (directory / "data").mkdir(parents=True)
    for part, colours in enumerate((["red", "green"], ["blue", "white"])):
        pq.write_table(pa.table({
            "images": pa.array([[{"bytes": jpeg(colour), "path": None}] for colour in colours],
                               structs),
            "prompt": pa.array([[{"role": "user", "content": "What is it?"},
                                 {"role": "assistant", "content": "A surface."},
                                 {"role": "user", "content": "Which colour?"}]] * 2, turns),
            "completion": pa.array([[{"role": "assistant", "content": colour}]
                                    for colour in colours], turns)}),
            directory / "data" / f"train-0000{part}-of-00002.parquet")
    return Published(["--data", chat, "--image_folder", str(directory / "cc3m" / "images")],
                     ["--data", str(directory / "data" / "train-*.parquet")], samples=(4, 4))
