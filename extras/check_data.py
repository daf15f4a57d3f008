"""Look at data before hours are spent on it: open every sample, picture and all.

    python -m extras.check_data train.jsonl --images pictures --max_length 512
    python -m extras.check_data train.jsonl --images pictures --show 7

    files -> data[i] -> load_image, ChatTemplate.render -> Finding -> Report -> the terminal

It reports rows that are broken, pictures that are missing or damaged, how long the conversations
are in tokens, and what --max_length would cut or refuse. The exit code is 1 when more than 1 % of
the samples cannot be used, the share at which training stops too; and when a file shows no picture
at all, unless --text_only says that it is meant so: every preset has a vision tower, which would
learn nothing from it. --show prints one sample as the model will see it, the text that it learns to
say in green.
"""

import argparse
import json
import os
import sys
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.chat import DEFAULT_SYSTEM, ChatTemplate
from dataset.images import load_image
from dataset.readers.formats import BadSample, MissingPicture, open_data
from dataset.readers.mixture import split_source
from dataset.readers.parquet import SLOW
from dataset.tokenizer import COMPANIONS, Tokenizer

ALLOWED = 0.01  # share of unusable samples; more, and the data should be repaired first
LISTED = 12  # places named for each kind of fault
CHUNK = 32  # samples that go to a worker at a time, neighbours, since files are read in order
EMOJI = Path(__file__).resolve().parent.parent / "dataset" / "emoji" / "language"
FAULTS = {
    "broken": "rows that cannot be read",
    "missing": "pictures that are not there",
    "damaged": "pictures that cannot be opened",
    "refused": "conversations that training refuses",
}
GREEN, END = "\x1b[32m", "\x1b[0m"  # what ChatTemplate.show puts around supervised text
BARS = " ▁▂▃▄▅▆▇█"


@dataclass
class Finding:
    """What opening one sample told."""

    fault: str | None = None  # a key of FAULTS
    text: str = ""  # file:line and the reason
    length: int | None = None  # tokens, before a cut; None: there is no readable conversation
    supervised: int = 0  # of them
    pictures: int = 0
    cut: bool = False


@dataclass
class Report:
    samples: int = 0
    pictures: int = 0
    supervised: int = 0
    cut: int = 0
    lengths: array = field(default_factory=lambda: array("l"))
    counts: dict = field(default_factory=lambda: dict.fromkeys(FAULTS, 0))
    places: dict = field(default_factory=lambda: {fault: [] for fault in FAULTS})

    @property
    def bad(self) -> int:
        return sum(self.counts.values())

    @property
    def ok(self) -> bool:
        return self.samples > 0 and self.bad <= ALLOWED * self.samples

    def add(self, finding: Finding) -> None:
        self.samples += 1
        self.pictures += finding.pictures
        self.supervised += finding.supervised
        self.cut += finding.cut
        if finding.length is not None:
            self.lengths.append(finding.length)
        if finding.fault:
            self.counts[finding.fault] += 1
            if len(self.places[finding.fault]) < LISTED:
                self.places[finding.fault].append(finding.text)


class Examined:
    """Chunk number c of a data set -> a Finding for each of its samples; what a worker holds."""

    def __init__(self, data, template: ChatTemplate, max_length: int | None):
        self.data, self.template, self.max_length = data, template, max_length

    def __len__(self) -> int:
        return -(-len(self.data) // CHUNK)

    def __getitem__(self, c: int) -> list[Finding]:
        return [examine(self.data, i, self.template, self.max_length)
                for i in range(c * CHUNK, min((c + 1) * CHUNK, len(self.data)))]


def examine(data, i: int, template: ChatTemplate, max_length: int | None) -> Finding:
    """Do with one sample what training will do, and tell what went wrong."""
    try:
        sample = data[i]
    except MissingPicture as bad:
        return Finding("missing", str(bad))
    except BadSample as bad:
        return Finding("broken", str(bad))
    ids, mask = template.render(longest_row(sample, template))
    found = Finding(length=len(ids), supervised=sum(mask), pictures=len(sample.images))
    for image in sample.images:
        try:
            load_image(image)
        except (OSError, ValueError, MemoryError) as error:
            found.fault, found.text = "damaged", str(BadSample(sample.where, str(error)))
            return found
    try:
        kept, _ = template.fit(ids, mask, max_length or len(ids))
        found.cut = len(kept) < len(ids)
    except ValueError as error:
        found.fault, found.text = "refused", f"{sample.where}: {error}"
    return found


def longest_row(sample, template: ChatTemplate) -> list:
    """All that is said up to the last answer; where a row teaches one answer, other epochs train
    on shorter ones."""
    return template.lesson(sample.messages, -1)


def check(data, template: ChatTemplate, max_length: int | None, workers: int, name: str) -> Report:
    """Open every sample of a file, with a progress bar on stderr."""
    report = Report()
    chunks = DataLoader(Examined(data, template, max_length), batch_size=None, num_workers=workers,
                        collate_fn=as_it_is)
    with tqdm(total=len(data), desc=name, unit=" samples", dynamic_ncols=True) as bar:
        for findings in chunks:
            for finding in findings:
                report.add(finding)
            bar.update(len(findings))
            bar.set_postfix(bad=report.bad)
    return report


def as_it_is(findings):
    return findings  # the DataLoader only carries


def tell(report: Report, source: str, template: ChatTemplate, max_length: int | None) -> str:
    """A Report as lines for the terminal."""
    lines = [source, "", fact("samples", f"{report.samples:,}",
                          "all usable" if not report.bad else f"{report.bad:,} unusable")]
    lines.append(fact("pictures", f"{report.pictures:,}", "opened"
                      if not report.counts["damaged"] else
                      f"{report.counts['damaged']:,} samples have a damaged one"))
    if report.lengths:
        lengths = np.sort(np.array(report.lengths))
        middle, high = (lengths[int(share * (len(lengths) - 1))] for share in (0.5, 0.95))
        lines += [fact("tokens", f"{lengths.sum():,}",
                       f"{report.supervised / lengths.sum():.0%} of them supervised, "
                       f"{template.image_tokens} for each picture"),
                  fact("a sample", f"{middle:,}", f"in the middle; shortest {lengths[0]:,}, "
                       f"95 % up to {high:,}, longest {lengths[-1]:,}"),
                  "", " " * 8 + histogram(lengths), ""]
    if max_length:
        lines.append(fact("cut", f"{report.cut:,}",
                          f"lose their end at --max_length {max_length}, "
                          f"{report.counts['refused']:,} are refused"))
    for fault, what in FAULTS.items():
        if report.counts[fault]:
            lines += ["", f"  {report.counts[fault]:,} {what}"]
            lines += [f"    {place}" for place in report.places[fault]]
            more = report.counts[fault] - len(report.places[fault])
            lines += [f"    ... and {more:,} more"] if more else []
    return "\n".join(lines)


def fact(name: str, number: str, what: str) -> str:
    return f"  {name:<9} {number:>11}  {what}"


def histogram(lengths: np.ndarray, columns: int = 40) -> str:
    """Sorted lengths -> "12 ▁▂▅█▇▃▂▁▁ 310": how many samples are that long, one bar a column."""
    low, high = int(lengths[0]), int(lengths[-1])
    limit = min(high, 2 * int(lengths[int(0.95 * (len(lengths) - 1))]))
    limit = max(limit, low)  # a few giants go into the last column, or they would squeeze the rest
    width = -(-(limit - low + 1) // columns)  # whole tokens: else columns would count unlike many
    edges = np.arange(low, limit + width + 1, width)
    counts, _ = np.histogram(np.minimum(lengths, limit), bins=edges)
    # Rounded up, so that a column with a single sample among thousands is still seen.
    heights = -(-counts * (len(BARS) - 1) // counts.max())
    end = f"{limit:,} and more" if limit < high else f"{high:,}"
    return f"{low:,} " + "".join(BARS[height] for height in heights) + " " + end


def show(data, number: int, template: ChatTemplate, max_length: int | None, colour: bool) -> str:
    """Sample `number`, counted from 1 -> its pictures and its text as the model will see them."""
    if not 1 <= number <= len(data):
        raise SystemExit(f"--show {number}: the file has the samples 1 to {len(data)}")
    sample = data[number - 1]
    ids, mask = template.render(longest_row(sample, template))
    lines = [f"sample {number} of {len(data)}   {sample.where}"]
    for n, image in enumerate(sample.images, 1):
        lines.append(f"picture {n}   {describe(image)}")
    lines.append(f"tokens      {len(ids)}, of them {sum(mask)} supervised")
    try:
        kept, _ = template.fit(ids, mask, max_length or len(ids))
        if len(kept) < len(ids):
            lines.append(f"cut         after token {len(kept)}, marked ✂ below")
            rest = ids[len(kept):]  # nothing of it is learned
            text = (template.show(kept, mask[:len(kept)]) + "✂"
                    + template.show(rest, [False] * len(rest)))
        else:
            text = template.show(ids, mask)
    except ValueError as error:
        lines.append(f"refused     {error}")
        text = template.show(ids, mask)
    if not colour:  # a file or a pipe: brackets say what green would have said
        text = text.replace(GREEN, "⟦").replace(END, "⟧")
    marked = f"{GREEN}green{END}" if colour else "in ⟦ ⟧"
    return "\n".join([*lines, f"learned     what is {marked}", "", text.rstrip("\n"), ""])


def describe(image) -> str:
    """Where a picture is, and how large; or why it cannot be opened."""
    place = f"{len(image):,} bytes in the data file" if isinstance(image, bytes) else str(image)
    try:
        width, height = load_image(image).size
    except OSError as error:
        return f"{place}   DAMAGED: {error}"
    return f"{place}   {width} x {height}"


def make_template(language: str, family: str | None, image_tokens: int) -> ChatTemplate:
    """Of the tokenizer in a directory, or published under a name on the hub."""
    directory = Path(language)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download  # here: a local directory needs no hub

        try:
            directory = Path(snapshot_download(language, allow_patterns=[
                "tokenizer.json", "qwen.tiktoken", "config.json", *COMPANIONS]))
        except Exception as error:  # offline, unknown, refused: the way out is the same
            raise FileNotFoundError(
                f"--language {language} is no directory, and fetching it from the hub failed "
                f"({str(error).splitlines()[0]}); give a directory with tokenizer.json"
            ) from error
    if family is None:
        config = directory / "config.json"
        family = json.loads(config.read_text(encoding="utf-8")).get("model_type") if (
            config.is_file()) else "qwen2"
    system = DEFAULT_SYSTEM.get(family)
    return ChatTemplate(Tokenizer.from_directory(directory), image_tokens, system, family=family)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m extras.check_data",
                                     description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="data files; a weight, FILE:2, is passed over")
    add("--images", metavar="DIR", help="what picture names start from (default: the file's own)")
    add("--language", default=str(EMOJI), metavar="DIR_OR_NAME",
        help="whose tokenizer counts the tokens (default: the embedded one)")
    add("--template", metavar="FAMILY", help="chat template (default: the language model's own)")
    add("--image_tokens", type=int, default=16, metavar="K",
        help="tokens a picture takes: 16 emoji, 64 minimind-3v, 196 qwen2.5-siglip, 256 "
        "qwen7b-clip (default: %(default)s)")
    add("--max_length", type=int, metavar="N", help="tell what this limit would cut or refuse")
    add("--text_only", action="store_true", help="the files are meant to hold no picture")
    add("--workers", type=int, default=0, help="processes that open samples")
    add("--show", type=int, metavar="N", help="only print sample N of each file, from 1")
    flags = parser.parse_args(arguments)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    good = True
    try:
        template = make_template(flags.language, flags.template, flags.image_tokens)
        for source in flags.files:
            data = open_data(split_source(source)[0], flags.images)
            if flags.show is not None:
                print(show(data, flags.show, template, flags.max_length, colour))
                continue
            report = check(data, template, flags.max_length, flags.workers, Path(source).name)
            print(tell(report, source, template, flags.max_length) + slowness(data))
            print(verdict(report, flags.text_only), end="\n\n")
            good = good and report.ok and (report.pictures > 0 or flags.text_only)
    except (OSError, ValueError, BadSample) as error:  # each says what is wrong and what to do
        print(error, file=sys.stderr)
        return 1
    return 0 if good else 1


def slowness(data) -> str:
    """A warning for Parquet files whose rows cannot be read one by one in any order."""
    if getattr(data, "largest_group", 0) <= SLOW:
        return ""
    return (f"\n\n  slow: its rows come in groups of up to {data.largest_group >> 20:,} MB, and "
            "shuffled training passes\n  through one again and again. Small groups: python -m "
            f"dataset.readers.parquet {data.file} {data.file.with_suffix('.small.parquet')}")


def verdict(report: Report, text_only: bool) -> str:
    if not report.samples:
        return "\n  NOT READY: the file holds no samples"
    if report.ok and not report.pictures and not text_only:
        return ("\n  NOT READY: no sample shows a picture, so the vision tower would learn nothing;"
                "\n  they are read from 'image', 'images' or 'image_bytes'. If it is meant to be "
                "text alone,\n  say --text_only")
    if report.ok:
        return "\n  ready" + (f": the {report.bad:,} unusable are skipped" if report.bad else "")
    words = f"\n  NOT READY: {report.bad / report.samples:.1%} unusable, more than {ALLOWED:.0%}"
    if report.counts["missing"] > report.samples / 2:
        words += "; most pictures are missing, is --images right?"
    return words


if __name__ == "__main__":
    raise SystemExit(main())
