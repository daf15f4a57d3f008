"""Talk to a trained model, ask it one thing, or score it on a file.

    python eval.py                                            chat with the newest checkpoint
    python eval.py --image cat.jpg --prompt "Who is it?"      one answer on stdout, nothing else
    echo "Who is it?" | python eval.py --image cat.jpg        the same, for each line an answer
    python eval.py --image cat.jpg --prompt ... --attention looks.png   and where it looked
    python eval.py --data FILE --images DIR                   scores, as the data's authors count
    python eval.py --data emoji                               the same, on unseen emoji scenes
    python eval.py --model none --language DIR                chat with a language model alone

Flow: checkpoint directory -> load -> model, template, processor -> chat, one answer or scores.
"""

import argparse
import gc
import sys

from dataset.families import CHAT_FAMILIES
from evaluation.conversation import Conversation
from evaluation.loading import load
from evaluation.metrics import METRICS
from evaluation.terminal import chat, say
from model.pretrained.checkpoint import find_model
from training.device import is_out_of_memory
from training.writable import check_directory, check_picture


def read_flags(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", metavar="DIR", help="checkpoint or run (default: the newest in out/sft, else "
        "in out/pretrain); none: the language model of --language alone")
    add("--language", help="where the public language model lies, if not where it was in training")
    add("--vision", help="where the public vision tower lies, if not where it was in training")
    add("--image", nargs="+", default=[], metavar="PICTURE", help="pictures shown "
        "with --prompt, or with the first thing you say")
    add("--prompt", help="ask this once: only the answer goes to stdout")
    add("--attention", metavar="PNG", help="with --prompt: also draw where the model looked for "
        "each word of the answer, and what each image token is closest to among the words")
    add("--system", help='system turn; "": none (default: as in training)')
    add("--template", choices=CHAT_FAMILIES, help="with --model none: whose chat template "
        "(default: by the model's type); a checkpoint knows its own")
    add("--data", nargs="+", metavar="FILE", help="files of conversations to score, or emoji: "
        "unseen scenes; \"part-*.parquet\" is each such file")
    add("--images", help="directory that the file's picture names are relative to")
    add("--metric", choices=("auto", *METRICS), default="auto", help="with --data: how an answer "
        "is scored (%(default)s: as the authors of the data do; exact for conversations)")
    add("--suffix", help="with --data: said behind each question of a benchmark, which decides the "
        "form of the answer (default: the usual words for its metric; \"\": nothing)")
    add("--limit", type=int, help="score the first so many samples only")
    add("--batch_size", type=int, default=64, help="questions answered at once (%(default)s)")
    add("--report", metavar="DIR", help="with --data: write scores.json and answers.jsonl here, "
        "not to out/scores/MODEL-DATA-HASH; also score the model before each stage, and draw two "
        "PNG files. Scores of another model or data that lie there are moved to DIR/earlier_N")
    add("--max_new_tokens", type=int, default=256, help="longest answer (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    add("--top_k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest that reach this share")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: repeat less")
    add("--seed", type=int, default=0, help="of the draws")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 where the GPU or the processor "
        "is faster in it, else fp32; --stats tells which and why")
    add("--quantize", choices=("int8", "int4"), help="the language model's weights in so many "
        "bits: less memory, and on a CPU faster; extras/export can save them so")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    add("--stats", action="store_true", help="tell the speed after each answer, on stderr")
    flags = parser.parse_args(arguments)
    for name in ("max_new_tokens", "batch_size", "repetition_penalty"):
        if not getattr(flags, name) > 0:
            parser.error(f"--{name} {getattr(flags, name)}: expected a number above 0")
    if flags.attention is not None and not (flags.image and flags.prompt):
        parser.error("--attention needs --image and --prompt")
    if flags.template and flags.model != "none":
        parser.error("--template needs --model none: a checkpoint is asked as it was trained")
    for name in ("report", "suffix", "metric"):
        if getattr(flags, name) not in (None, "auto") and not flags.data:
            parser.error(f"--{name} needs --data")
    if flags.image and flags.data:
        parser.error("--image is for a chat; with --data the file names the pictures")
    return flags


def main(arguments=None) -> None:
    flags = read_flags(arguments)
    try:
        if flags.data:
            check_directory("--report", flags.report if flags.report is not None else "out/scores")
        if flags.attention is not None:
            check_picture("--attention", flags.attention)
        name = flags.model
        if flags.data and name != "none":  # a training may save a newer one while this one answers
            name = find_model(name)
        model, template, processor = load(flags, name)
        if flags.data:
            from evaluation.run import evaluate  # here: a chat needs no plotting library

            evaluate(flags, load, name, model, template, processor)
            return
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
        sampling = {name: getattr(flags, name) for name in names}
        conversation = Conversation(model, template, processor, sampling, flags.seed)
        for path in flags.image:
            conversation.show(path)
        if flags.prompt is None:
            chat(conversation, flags.stats)
        else:
            say(conversation, flags.prompt, flags.stats)
            if flags.attention:
                from extras.attention import save_attention  # here: a chat draws nothing

                save_attention(conversation, flags.attention)
    except (OSError, ValueError, KeyError) as error:  # each says what is wrong and what to do
        raise SystemExit(f"eval.py: {error}") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit(
            f"eval.py: out of memory: {str(error).strip().splitlines()[0]}\nWhat helps: a smaller "
            "--batch_size (with --data), fewer --max_new_tokens, --quantize int8, --dtype bf16, or "
            "--device cpu") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # what a shell expects of an interrupted program


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # Windows would choose a code page
        stream.reconfigure(encoding="utf-8", errors="replace")
    # What was imported stays until the end. Python would look through all of it once more then for
    # what may go, half a second for PyTorch.
    gc.freeze()
    main()
