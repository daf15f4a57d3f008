"""A training step of ours beside transformers + peft: seconds, tokens a second, peak memory.

    python -m benchmarks.train                             all works, as --dtype auto would
    python -m benchmarks.train --works lora --numbers bf16
    python -m benchmarks.train --times 16                  on a GPU, which wants larger batches

    projector    SmolLM2-135M + SigLIP-B/16, the projector alone       4 rows x 256 tokens
    language     the same, everything but vision                       4 x 256
    lora         Qwen2.5-0.5B + SigLIP-B/16, LoRA 8 on q, k, v, o      2 x 256
    mix          the same on rows of 20 to 300 tokens of text and a picture: ours beside their like
                 in length, theirs as they come, padded to the longest

Random weights in the published shapes, the same on both sides, as are the rows; the first losses,
printed, agree. In each row 196 tokens are a picture, and the answer, 32 tokens, is supervised. Each
side is a process of its own, so each peak is its own; the rounds are made in turns, and ratios are
of medians. "cached" is ours with --feature_cache, from the second epoch on. "of peak": the share
of the seconds that the step's matrix products would take if they ran as fast as one large product.
"""

import argparse
from dataclasses import replace
from statistics import median

import torch

from benchmarks.common import machine
from benchmarks.sides import QWEN, SIGLIP, SMOLLM2, Work, race
from training.precision import choose_dtype

ANSWER = 32
WORKS = {
    "projector": Work(SMOLLM2, SIGLIP, "projector", ((256,) * 4,), ANSWER),
    "language": Work(SMOLLM2, SIGLIP, "all", ((256,) * 4,), ANSWER),
    "lora": Work(QWEN, SIGLIP, "lora", ((256,) * 2,), ANSWER),
}
HEAD = ("| work | numbers | side | first loss | seconds | range | useful tokens/s | of peak | "
        "peak MB | times as fast | memory |\n" + "| --- " * 11 + "|")


def length_mix(rows: int, batch_size: int) -> tuple[Work, Work]:
    """The same rows twice: sorted by length, as dataset/batching.py does in its windows, and as
    they come."""
    random = torch.Generator().manual_seed(0)
    lengths = (196 + torch.randint(20, 301, (rows,), generator=random)).tolist()

    def batches(of):
        return tuple(tuple(of[i:i + batch_size]) for i in range(0, rows, batch_size))

    return tuple(Work(QWEN, SIGLIP, "lora", batches(order), ANSWER)
                 for order in (sorted(lengths), lengths))


def rows_of(name: str, numbers: str, by_side: dict[str, dict], works: dict[str, Work]) -> list[str]:
    """Markdown rows of one work; ratios to "theirs". Seconds or busy seconds: --clock."""
    theirs, lines, rate = by_side["theirs"], [], max(one["rate"] for one in by_side.values())
    for side, one in by_side.items():
        useful = sum(map(sum, works[side].batches))
        seconds, peak = one["clock"], one["peak"]
        lines.append(
            f"| {name} | {numbers} | {side} | {one['loss']:.4f} | {median(seconds):.2f} | "
            f"{min(seconds):.2f} to {max(seconds):.2f} | {useful / median(seconds):.0f} | "
            f"{one['flops'] / median(seconds) / rate:.0%} | "
            f"{peak / 1e6:.0f} | {median(theirs['clock']) / median(seconds):.2f} | "
            f"{peak / theirs['peak']:.2f} |")
    return lines


def measure(name: str, numbers: str, flags) -> list[str]:
    if name == "mix":
        sorted_rows, as_they_come = length_mix(flags.mix_rows * flags.times, 4 * flags.times)
        works = {"theirs": as_they_come, "ours": sorted_rows, "cached": sorted_rows}
    else:
        work = replace(WORKS[name], batches=tuple(rows * flags.times
                                                  for rows in WORKS[name].batches))
        works = dict.fromkeys(("theirs", "ours", "cached"), work)
    found = race([*works.items()], numbers, 1 if name == "mix" else flags.rounds, flags.threads)
    by_side = dict(zip(works, found))
    for one in by_side.values():
        one["clock"] = one[flags.clock]
    return rows_of(name, numbers, by_side, works)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--works", nargs="+", choices=[*WORKS, "mix"], default=[*WORKS, "mix"])
    add("--numbers", nargs="+", choices=("fp32", "bf16"), default=None,
        help="default: what --dtype auto chooses")
    add("--rounds", type=int, default=3, help="counted rounds (default: %(default)s)")
    add("--times", type=int, default=1, help="as many times the rows of each batch")
    add("--mix_rows", type=int, default=16, help="rows of the length mix (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--clock", choices=("seconds", "busy"), default="seconds", help="busy: time that the "
        "process computed, for a machine that others use; with --threads 1 (default: seconds)")
    flags = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{machine(flags.threads, 'transformers', 'peft')}; {flags.clock} time\n\n{HEAD}",
          flush=True)
    for numbers in flags.numbers or [choose_dtype("auto", device)[0]]:
        for name in flags.works:
            print("\n".join(measure(name, numbers, flags)), flush=True)


if __name__ == "__main__":
    main()
