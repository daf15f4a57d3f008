"""Claim: the preflight counts and names what training would stumble over, and nothing else."""

import json
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from conftest import ROOT, needed, shared_dir
from PIL import Image
from safetensors.torch import load_file, save_file

import eval
import train_sft
from dataset.batching import Batches
from dataset.chat import ChatTemplate
from dataset.images import ImageProcessor
from dataset.readers.formats import open_data
from dataset.tokenizer import Tokenizer
from extras import check_data as check
from tests.tiny import make_world

K = 4
PROCESSOR = ImageProcessor("SiglipImageProcessor", (8, 8), None, 3, 1 / 255, (0.5,) * 3, (0.5,) * 3)


def row(question="Who?", answer=" cat", image=None):
    turns = [{"role": "user", "content": question}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return {"conversations": turns, **({"image": image} if image else {})}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (12, 9), "red").save(tmp_path / "a.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:1500])
    return tmp_path


@pytest.fixture
def run(folder, tiny_tokenizer_dir, capsys):
    """run(records, flags...) -> exit code, what was printed, what went to stderr."""
    def call(records, *flags, others=()):
        lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
        (folder / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
        code = check.main([str(folder / "d.jsonl"), *map(str, others), "--language_model",
                           str(tiny_tokenizer_dir), "--image_tokens", str(K), *map(str, flags)])
        return code, *capsys.readouterr()
    return call


def template_of(directory):
    return ChatTemplate(Tokenizer.from_directory(directory), K)


BROKEN = [row(image="a.png"), '{"conversations": [', row(image="gone.png"), row(image="cut.png"),
          row(answer=None), row(question="long " * 60), row(answer=" cat" * 60), row()]


def test_each_fault_is_counted_and_named_with_its_line(run, folder):
    code, out, _ = run(BROKEN, "--max_length", 60)
    assert code == 1
    out = re.sub(" +", " ", out)
    for line in ("samples 8, 5 unusable", "1 rows that cannot be read",
                 "1 images that are not there", "1 images that cannot be opened",
                 "2 conversations that training refuses",
                 "cut 1 lose their end at --max_length 60, 2 are refused",
                 f"{folder / 'd.jsonl'}:2: not JSON", f":3: no image {folder / 'gone.png'}",
                 f":4: cannot read {folder / 'cut.png'}", ":5: no supervised token",
                 ":6: no supervised token within max_length 60",
                 "NOT READY: 62.5% unusable, more than 1%"):
        assert line in out, f"{line!r} is missing in\n{out}"
    code, out, _ = run([row(image="a.png"), row()])
    assert code == 0 and "2, 0 unusable" in out and out.rstrip().endswith("ready")
    assert "cut" not in out  # no limit was given


def test_it_refuses_what_training_refuses(run, folder, tiny_tokenizer_dir):
    """The pair: the preflight, and the batches that training is fed with."""
    run(BROKEN)
    data, template = open_data(folder / "d.jsonl"), template_of(tiny_tokenizer_dir)
    report = check.check(data, template, 60, workers=0, name="d")
    batches = Batches(data, template, PROCESSOR, 2, 60, seed=0)
    refused = sorted(str(bad) for _, bads in batches.epoch(0) for bad in bads)
    assert refused == sorted(place for places in report.reasons.values() for place in places)
    lengths = sorted(length for batch, _ in batches.epoch(0) for length in batch.lengths)
    good = [len(template.encode_conversation(data[i].messages)[0]) for i in (0, 6, 7)]
    assert lengths == sorted(min(length, 60) for length in good) and report.counts["cut"] == 1


def test_lengths_are_those_of_the_template(run, folder, tiny_tokenizer_dir):
    records = [row(answer=" cat" * n, image="a.png") for n in range(1, 41)]
    _, out, _ = run(records)
    template = ChatTemplate(Tokenizer.from_directory(tiny_tokenizer_dir), K,
                            "You are a helpful assistant.")  # without config.json: Qwen2's line
    rows = [template.encode_conversation(sample.messages)
            for sample in open_data(folder / "d.jsonl")]
    lengths = sorted(len(ids) for ids, _ in rows)
    share = sum(sum(mask) for _, mask in rows) / sum(lengths)
    assert f"tokens    {sum(lengths):,}, {share:.0%} of them supervised" in out
    assert (f"shortest {lengths[0]}, median {lengths[19]}, 95 % up to {lengths[37]}, longest "
            f"{lengths[-1]} tokens") in out


def test_more_than_one_percent_fails(run):
    good, bad = [row()] * 99, '{"oops'
    assert run([*good, bad], "--text_only")[0] == 0
    code, out, _ = run([*good, bad], "--text_only")
    assert "100, 1 unusable" in out and out.endswith("  ready\n\n")
    assert run([*good, bad, bad], "--text_only")[0] == 1
    code, out, _ = run(["", " "])
    assert code == 1


def test_the_first_dozen_is_listed_and_the_rest_counted(run):
    _, out, _ = run([row(image=f"gone{i}.png") for i in range(30)])
    assert out.count("no image") == 12 and "... and 18 more" in out
    assert "gone11.png" in out and "gone12.png" not in out
    assert "most images are missing, is --image_folder right?" in out


def test_workers_change_nothing(run):
    records = [row(answer=" cat" * (i % 9 + 1), image="a.png") for i in range(70)] + BROKEN
    assert run(records, "--num_workers", 2)[:2] == run(records)[:2]


def test_progress_is_shown_and_files_are_told_apart(run, folder):
    (folder / "two.jsonl").write_text(json.dumps(row(image="gone.png")))
    code, out, err = run([row()] * 3, "--text_only", others=[folder / "two.jsonl"])
    assert code == 1 and "d.jsonl: 3 of 3 samples, 0 unusable\n" in err
    assert "two.jsonl: 1 of 1 samples, 1 unusable\n" in err
    assert out.index("d.jsonl") < out.index("ready") < out.index("two.jsonl") < out.index("NOT")
    weighted = [f"{folder / 'd.jsonl'}:3"]  # as it was given to --data
    assert run([row()], "--text_only", others=weighted)[0] == 0


def test_parquet_in_giant_groups_is_told_to_be_poorly_shuffled(folder, tiny_tokenizer_dir, capsys,
                                                               monkeypatch):
    path = folder / "d.parquet"
    pq.write_table(pa.table({"conversations": [json.dumps(row()["conversations"])] * 9}), path)
    flags = [str(path), "--language_model", str(tiny_tokenizer_dir), "--text_only"]
    assert check.main(flags) == 0 and "shuffled" not in capsys.readouterr().out
    monkeypatch.setattr(check, "POOL", 10)
    assert check.main(flags) == 0
    assert f"python -m dataset.readers.parquet {path} {folder / 'd.small.parquet'}" in (
        capsys.readouterr().out)


def test_no_file_without_a_picture_is_ready_unless_it_is_meant_so(run, folder):
    code, out, _ = run([row()] * 3)
    assert code == 1 and "NOT READY: no sample shows an image" in out and "--text_only" in out
    assert "image_bytes" in out and not out.rstrip().endswith("ready")
    code, out, _ = run([row()] * 3, "--text_only")
    assert code == 0 and out.rstrip().endswith("ready")
    for flags in ((), ("--text_only",)):  # a mixed file needs no flag, and minds none
        assert run([row(), row(image="a.png")], *flags)[0] == 0
    (folder / "two.jsonl").write_text(json.dumps(row(image="a.png")))
    code, out, _ = run([row()], others=[folder / "two.jsonl"])  # file by file
    assert code == 1 and out.index("NOT READY") < out.index("two.jsonl") < out.rindex("ready")
    unread = [{**row(), "picture": "a.png"}, {"photo": "a.png", "caption": "A cat."}]
    code, out, _ = run(unread, "--text_only")
    assert code == 1 and "d.jsonl:1: 'picture'" in out and "d.jsonl:2: 'photo'" in out
    assert "NOT READY: 100.0% unusable" in out


def test_show_marks_what_is_learned(run, folder):
    turns = {"conversations": [
        {"role": "user", "content": "<image>\nWho?"},
        {"role": "assistant", "content": "猫 \x1b[1m"},
        {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}],
        "image": "a.png"}
    code, out, err = run([row(), turns], "--show", 2)
    assert code == 0 and "samples" not in err  # it does not go through the data
    assert f"image 1   {folder / 'a.png'}   12 x 9" in out
    assert "⟦猫 ␛[1m<|im_end|>⟧" in out and "⟦Yes<|im_end|>⟧" in out and out.count("⟦") == 3
    assert "<|vision_start|><image x4><|vision_end|>" in out
    assert "\x1b" not in out


def test_show_tells_cuts_damages_and_numbers_that_are_not_there(run):
    out = run(BROKEN, "--show", 7, "--max_length", 60)[1]
    assert "cut after token 60" in out
    before, after = out.split("at ✂")[1].split("✂")
    assert before.endswith("⟧") and "⟦" not in after and " cat" in after
    assert "DAMAGED" in run(BROKEN, "--show", 4)[1]
    assert "refused: no supervised token within" in run(
        BROKEN, "--show", 6, "--max_length", 60)[1]
    code, _, err = run(BROKEN, "--show", 2)
    assert code == 1 and "d.jsonl:2: not JSON" in err
    for number in (0, 9):
        with pytest.raises(SystemExit, match=f"--show {number}: the file has the samples 1 to 8"):
            run(BROKEN, "--show", number)


def test_tokenizer_by_name_and_template_by_family(run, tiny_tokenizer_dir, monkeypatch, capsys):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns:
                        asked.append((name, allow_patterns)) or str(tiny_tokenizer_dir))
    assert run([row()], "--language_model", "owner/model", "--template", "llama", "--show",
               1)[0] == 0
    assert asked[0][0] == "owner/model" and not any("safetensors" in p for p in asked[0][1])
    assert "helpful assistant" not in run([row()], "--template", "llama", "--show", 1)[1]
    assert "helpful assistant" in run([row()], "--show", 1)[1]

    def offline(name, allow_patterns):
        raise OSError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    code, _, err = run([row()], "--language_model", "owner/model")
    assert code == 1 and "(no network); give a directory with tokenizer.json" in err
    assert check.main(["nowhere.jsonl"]) == 1
    assert "no data file nowhere.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize("late, special, words", [
    (["<loc1>"], False, "262 tokens, the embedding table 261 rows: there is none for '<loc1>'. T"),
    (["<loc1>"], True, "262 tokens, the embedding table 261 rows: there is none for '<loc1>'. T"),
    ([f"<loc{i}>" for i in range(1000)], False, "1,261 tokens, .* '<loc3>' and more. Take the to"),
    (["<loc1>", "<|image_pad|>"], False, "263 tokens, .* none for '<loc1>', '<|image_pad|>'. Take"),
    (["<loc1>", "<|image_pad|>"], True, "263 tokens, .* none for '<loc1>'. Take"),
    (["<|image_pad|>"], True, None)])
def test_ids_past_the_table_are_said_before_the_first_step(tmp_path, capsys, late, special, words):
    """All but the placeholder's, which is never looked up."""
    flags = make_world(tmp_path, count=4)
    file = tmp_path / "language" / "tokenizer.json"
    public = json.loads(file.read_text(encoding="utf-8"))
    public["added_tokens"].remove(next(
        token for token in public["added_tokens"] if token["content"] == "<|image_pad|>"))
    config = tmp_path / "language" / "config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps({**facts, "vocab_size": facts["vocab_size"] - 1}))
    weights = tmp_path / "language" / "model.safetensors"
    tensors = load_file(weights)
    name = "model.embed_tokens.weight"
    save_file({**tensors, name: tensors[name][:-1].clone()}, weights, metadata={"format": "pt"})
    backend = tokenizers.Tokenizer.from_str(json.dumps(public))
    (backend.add_special_tokens if special else backend.add_tokens)(late)
    backend.save(str(file))
    data = str(tmp_path / "data.jsonl")
    told = check.main([data, "--language_model", str(tmp_path / "language")])
    out = capsys.readouterr().out
    chat = ["--model", "none", "--language_model", str(tmp_path / "language"), "--prompt", "<loc1>",
            "--max_new_tokens", "1", "--device", "cpu"]
    if words is None:
        assert told == 0 and "ready" in out
        eval.main(chat)
        return
    assert told == 1 and re.search(f"NOT READY: the tokenizer has {words}", out)
    with pytest.raises(SystemExit, match=f"cannot build the model: the tokenizer has {words}"):
        train_sft.main([*flags, "--model", "none", "--lora", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=f"the tokenizer has {words}"):
        eval.main(chat)


def test_the_command_itself_on_its_default_tokenizer(folder):
    (folder / "d.jsonl").write_text(json.dumps(row("图片里有什么？", "一只猫", "a.png")), "utf-8")
    done = subprocess.run([sys.executable, "-m", "extras.check_data", folder / "d.jsonl",
                           "--image_folder", folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1, 0 unusable" in done.stdout, done.stderr


def test_real_files_are_ready():
    coco = needed(shared_dir(), "data/coco128")
    names = ("ai_challenger.json", "llava_instruct_mix.parquet")
    code = check.main([*(str(coco / name) for name in names), "--image_folder",
                       str(coco / "images")])
    assert code == 0
