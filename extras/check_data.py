"""Check data before a long run: open every sample, images and all.

    python -m extras.check_data train.jsonl --image_folder photos --max_length 512
    python -m extras.check_data train.jsonl --image_folder photos --show 7

    files -> data[i] -> load_image, ChatTemplate -> Report -> the terminal

It reports rows that are broken, images that are missing or damaged, how long the conversations are
in tokens, and what --max_length would cut or refuse. The exit code is 1 when more than 1 % of the
samples cannot be used, the share at which training stops too; and when a file shows no image at
all, unless --text_only says that it is meant so. --show prints one sample as the model sees it,
supervised text between ⟦ and ⟧.
"""

import argparse
import sys
import time
from collections import Counter
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from dataset.chat import ChatTemplate
from dataset.families import DEFAULT_SYSTEM
from dataset.images import load_image
from dataset.readers.formats import BadSample, MissingImage, open_data
from dataset.readers.mixture import split_source
from dataset.readers.parquet import POOL
from dataset.readers.published_template import chat_facts
from dataset.tokenizer import COMPANIONS, Tokenizer
from model.pretrained.files import read_json
from model.pretrained.hub import public
from training.bundle import check_vocabulary

ALLOWED = 0.01  # share of unusable samples; more, and the data should be repaired first
LISTED = 12  # samples named for each kind of fault
CHUNK = 32  # samples that go to a worker at a time, neighbours, since files are read in order
EMOJI = Path(__file__).resolve().parent.parent / "dataset" / "emoji" / "language"
FAULTS = {"broken": "rows that cannot be read", "missing": "images that are not there",
          "damaged": "images that cannot be opened",
          "refused": "conversations that training refuses"}


class Report:
    """Of all samples of a file."""

    def __init__(self):
        self.counts, self.bad = Counter(), 0  # counts: as examine gives them
        self.lengths = []  # tokens of each readable conversation, before cuts
        self.reasons = {fault: [] for fault in FAULTS}  # the first few


def examine(data, template: ChatTemplate, max_length: int | None, i: int) -> tuple:
    """Do with one sample what training will do with it -> counts, and the reason of its fault.

    counts: of the sample, its images, tokens and supervised tokens, whether it is cut, its fault.
    """
    try:
        sample = data[i]
    except BadSample as bad:
        return {"missing" if isinstance(bad, MissingImage) else "broken": 1}, str(bad)
    # Where a row teaches one answer at a time, the last one makes the longest row.
    ids, mask = template.encode_conversation(template.training_prefix(sample.messages, -1))
    counts = {"images": len(sample.images), "tokens": len(ids), "supervised": sum(mask)}
    fault = "damaged"
    try:
        for image in sample.images:
            load_image(image)
        fault = "refused"
        kept, _ = template.truncate(ids, mask, max_length or len(ids))
    except (OSError, ValueError, MemoryError) as error:
        return {**counts, fault: 1}, str(BadSample(sample.where, str(error)))
    return {**counts, "cut": int(len(kept) < len(ids))}, None


def examine_all(data, template: ChatTemplate, max_length: int | None, indices) -> list[tuple]:
    return [examine(data, template, max_length, i) for i in indices]


def check(data, template: ChatTemplate, max_length: int | None, workers: int, name: str) -> Report:
    """Open every sample of a file, and say on stderr how far it is."""
    report, done, said = Report(), 0, time.monotonic()
    look = partial(examine_all, data, template, max_length)
    for found in DataLoader(range(len(data)), CHUNK, num_workers=workers, collate_fn=look):
        for counts, reason in found:
            report.counts.update(counts)
            report.lengths += [counts["tokens"]] if "tokens" in counts else []
            for fault in FAULTS.keys() & counts.keys():
                report.bad += 1
                report.reasons[fault] = [*report.reasons[fault], reason][:LISTED]
        done += len(found)
        if time.monotonic() > said + 10 or done == len(data):
            said = time.monotonic()
            print(f"{name}: {done:,} of {len(data):,} samples, {report.bad:,} unusable",
                  file=sys.stderr)
    return report


def summary(report: Report, samples: int, max_length: int | None) -> str:
    """A Report as lines for the terminal."""
    counts = report.counts
    lines = [f"  samples   {samples:,}, {report.bad:,} unusable",
             f"  images    {counts['images']:,}"]
    if report.lengths:
        lengths = np.sort(report.lengths)
        median, high = (lengths[int(share * (len(lengths) - 1))] for share in (0.5, 0.95))
        lines += [f"  tokens    {lengths.sum():,}, {counts['supervised'] / lengths.sum():.0%} of "
                  "them supervised",
                  f"  a sample  shortest {lengths[0]:,}, median {median:,}, 95 % up to {high:,}, "
                  f"longest {lengths[-1]:,} tokens"]
    if max_length:
        lines.append(f"  cut       {counts['cut']:,} lose their end at --max_length {max_length}, "
                     f"{counts['refused']:,} are refused")
    for fault, reasons in report.reasons.items():
        if reasons:
            lines += [f"  {counts[fault]:,} {FAULTS[fault]}", *(f"    {each}" for each in reasons)]
        if counts[fault] > LISTED:
            lines.append(f"    ... and {counts[fault] - LISTED:,} more")
    return "\n".join(lines)


def problem(report: Report, samples: int, text_only: bool) -> str | None:
    """Why the file is not ready; None: it is."""
    if not samples:
        return "the file holds no samples"
    if report.bad > ALLOWED * samples:
        return (f"{report.bad / samples:.1%} unusable, more than {ALLOWED:.0%}"
                + ("; most images are missing, is --image_folder right?"
                   if report.counts["missing"] > samples / 2 else ""))
    if not report.counts["images"] and not text_only:
        return ("no sample shows an image, so the vision tower would learn nothing; they are read "
                "from 'image', 'images' or 'image_bytes'. If it is meant to be text alone, say "
                "--text_only")
    return None


def slowness(data) -> str:
    """A warning for Parquet files whose rows cannot be shuffled as a whole."""
    if getattr(data, "largest_group", 0) <= POOL:
        return ""
    return (f"\n  poorly shuffled: it has row groups of up to {data.largest_group >> 20:,} MB, "
            "each read front to back.\n  Small groups: python -m dataset.readers.parquet "
            f"{data.file} {data.file.with_suffix('.small.parquet')}")


def show(data, number: int, template: ChatTemplate, max_length: int | None) -> str:
    """Sample `number`, counted from 1 -> its images and its text as the model sees them."""
    if not 1 <= number <= len(data):
        raise SystemExit(f"--show {number}: the file has the samples 1 to {len(data)}")
    sample = data[number - 1]
    ids, mask = template.encode_conversation(template.training_prefix(sample.messages, -1))
    lines = [f"sample {number} of {len(data)}   {sample.where}"]
    for n, image in enumerate(sample.images, 1):
        origin = f"{len(image):,} bytes in the data file" if isinstance(image, bytes) else image
        try:
            size = "{} x {}".format(*load_image(image).size)
        except OSError as error:
            size = f"DAMAGED: {error}"
        lines.append(f"image {n}   {origin}   {size}")
    lines.append(f"{len(ids)} tokens, of them {sum(mask)} supervised, between ⟦ and ⟧")
    text = marked(template, ids, mask)
    try:
        kept = len(template.truncate(ids, mask, max_length or len(ids))[0])
        if kept < len(ids):
            lines.append(f"cut after token {kept}, at ✂")
            cut = marked(template, ids[kept:], [False] * (len(ids) - kept))
            text = f"{marked(template, ids[:kept], mask[:kept])}✂{cut}"
    except ValueError as error:
        lines.append(f"refused: {error}")
    return "\n".join([*lines, "", text.rstrip("\n"), ""])


def marked(template: ChatTemplate, ids: list, mask: list) -> str:
    text = ""
    for (image, supervised), run in groupby(
            zip(ids, mask), lambda pair: (pair[0] == template.image_token_id, bool(pair[1]))):
        run = [token for token, _ in run]
        part = f"<image x{len(run)}>" if image else template.tokenizer.decode(run)
        part = part.replace("\x1b", "\u241b")  # data must not steer the terminal
        text += f"⟦{part}⟧" if supervised else part
    return text


def tokenizer_directory(language: str) -> Path:
    """A directory as it is, or what of a name on the hub this needs."""
    directory = Path(language)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download  # here: a local directory needs no hub

        try:
            directory = Path(snapshot_download(language, allow_patterns=[
                "tokenizer.json", "qwen.tiktoken", "vocab.json", "merges.txt", "config.json",
                *COMPANIONS]))
        except Exception as error:  # offline, unknown, refused: the way out is the same
            raise FileNotFoundError(
                f"--language_model {language} is no directory, and fetching it from the hub failed "
                f"({str(error).splitlines()[0]}); give a directory with tokenizer.json"
            ) from error
    return directory


def vocabulary_problem(template: ChatTemplate, directory: Path) -> str | None:
    """What training says before its first step of ids past the embedding table."""
    config = public(directory) / "config.json"
    rows = read_json(config).get("vocab_size") if config.is_file() else None
    try:
        if rows is not None:
            check_vocabulary(template, rows)
    except ValueError as error:
        return str(error)
    return None


def make_template(language: str, family: str | None, image_tokens: int) -> ChatTemplate:
    """Of the tokenizer in a directory, or published under a name on the hub."""
    directory = tokenizer_directory(language)
    tokenizer, system = Tokenizer.from_directory(public(directory)), DEFAULT_SYSTEM.get(family)
    if family is None:
        config = directory / "config.json"
        model_type = read_json(config).get("model_type") if config.is_file() else "qwen2"
        family, system = chat_facts(tokenizer, model_type)
    return ChatTemplate(tokenizer, image_tokens, system, family=family)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m extras.check_data",
                                     description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="data files; a weight, FILE:2, is passed over")
    add("--image_folder", help="what image names start from (default: the file's own)")
    add("--follow_links", action="store_true", help="links in it may lead out of it")
    add("--language_model", default=str(EMOJI), metavar="DIR_OR_NAME",
        help="whose tokenizer counts the tokens (default: the embedded one)")
    add("--template", metavar="FAMILY", help="chat template (default: the language model's own)")
    add("--image_tokens", type=int, default=16, metavar="K", help="tokens that an image takes: 16 "
        "emoji, 64 minimind-3v, 196 qwen2.5-siglip, 256 qwen7b-clip (default: %(default)s)")
    add("--max_length", type=int, metavar="N", help="say what this limit would cut or refuse")
    add("--text_only", action="store_true", help="the files are meant to hold no image")
    add("--num_workers", type=int, default=0, help="processes that open samples")
    add("--show", type=int, metavar="N", help="only print sample N of each file, from 1")
    flags = parser.parse_args(arguments)
    good = True
    try:
        directory = tokenizer_directory(flags.language_model)
        template = make_template(str(directory), flags.template, flags.image_tokens)
        mismatch = vocabulary_problem(template, directory)
        for source in flags.files:
            data = open_data(split_source(source)[0], flags.image_folder,
                             flags.follow_links)
            if flags.show is not None:
                print(show(data, flags.show, template, flags.max_length))
                continue
            report = check(data, template, flags.max_length, flags.num_workers, Path(source).name)
            reason = mismatch or problem(report, len(data), flags.text_only)
            print(f"{source}\n{summary(report, len(data), flags.max_length)}{slowness(data)}")
            print(f"  NOT READY: {reason}\n" if reason else "  ready\n")
            good = good and reason is None
    except (OSError, ValueError, BadSample) as error:  # each says what is wrong and what to do
        print(error, file=sys.stderr)
        return 1
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
