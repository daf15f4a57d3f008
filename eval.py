"""Talk to a trained model, ask it one thing, or score it on a file.

    python eval.py                                            chat with the newest checkpoint
    python eval.py --image cat.jpg --prompt "Who is it?"      one answer on stdout, nothing else
    python eval.py --image cat.jpg --prompt ... --attention looks.png   and where it looked
    python eval.py --data FILE --images DIR                   share of exact answers
    python eval.py --data emoji                               the same, on unseen emoji scenes
    python eval.py --model none --language DIR                chat with a language model alone

Flow: checkpoint directory -> load -> model, template, processor -> chat, one answer or scores.
"""

import argparse
import contextlib
import os
import shlex
import sys
from pathlib import Path

from dataset.chat import FAMILIES
from evaluation.conversation import Conversation
from evaluation.loading import load

HELP = """\
/image PATH [PATH ...]   show pictures with the next thing you say
/scene N                 show unseen scene number N of the emoji world, and save it to look at
/reset                   forget the conversation
/system TEXT             forget it, and begin with this system turn
/speed                   tokens per second of the last answer
/quit                    end (as Ctrl-D does); Ctrl-C stops an answer"""


def read_flags(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", metavar="DIR", help="checkpoint or run (default: the newest in out/sft, else "
        "in out/pretrain); none: the language model of --language alone")
    add("--language", help="where the public language model lies, if not where it was in training")
    add("--vision", help="where the public vision tower lies, if not where it was in training")
    add("--image", nargs="+", default=[], metavar="PICTURE", help="pictures shown with --prompt")
    add("--prompt", help="ask this once: only the answer goes to stdout")
    add("--attention", metavar="PNG", help="with --prompt: also draw where the model looked for "
        "each word of the answer, and what each image token is closest to among the words")
    add("--system", help='system turn; "": none (default: as in training)')
    add("--template", choices=FAMILIES, help="with --model none: whose chat template (default: by "
        "the model's type); a checkpoint knows its own")
    add("--data", nargs="+", metavar="FILE", help="files of conversations to score, or emoji: "
        "unseen scenes; \"part-*.parquet\" is each such file")
    add("--images", help="directory that the file's picture names are relative to")
    add("--limit", type=int, help="score the first so many samples only")
    add("--batch_size", type=int, default=64, help="questions answered at once (%(default)s)")
    add("--report", metavar="DIR", help="with --data: also score the model before each stage, and "
        "without or with a wrong picture; write scores.json, answers.jsonl and two PNG files here")
    add("--max_new_tokens", type=int, default=256, help="longest answer (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    add("--top_k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all")
    add("--top_p", type=float, default=1.0, help="draw from the likeliest that reach this share")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: repeat less")
    add("--seed", type=int, default=0, help="of the draws")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on CUDA, else fp32")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (%(default)s)")
    add("--stats", action="store_true", help="tell the speed after each answer, on stderr")
    flags = parser.parse_args(arguments)
    for name in ("max_new_tokens", "batch_size", "repetition_penalty"):
        if not getattr(flags, name) > 0:
            parser.error(f"--{name} {getattr(flags, name)}: expected a number above 0")
    if flags.image and flags.prompt is None:
        parser.error("--image needs --prompt; in the chat, /image shows a picture")
    if flags.attention and not (flags.image and flags.prompt):
        parser.error("--attention needs --image and --prompt")
    if flags.template and flags.model != "none":
        parser.error("--template needs --model none: a checkpoint is asked as it was trained")
    if flags.report and not flags.data:
        parser.error("--report needs --data")
    return flags


def chat(conversation: Conversation, stats: bool) -> None:
    """Lines from the terminal, or from a pipe: then only answers go to stdout."""
    person = sys.stdin.isatty()
    notes = sys.stdout if person else sys.stderr
    if person:
        print(f"{HELP}\n")
        with contextlib.suppress(ImportError):  # Windows has none, and edits lines by itself
            import readline  # noqa: F401, being there it gives input() the arrow keys
    while True:
        try:
            line = input("you: " if person else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not person:
                raise
            print("\n/quit ends the chat")
            continue
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                print(command(conversation, line), file=notes)
            elif line:
                for piece in conversation.reply(line):
                    print(piece.replace("\x1b", "\u241b"), end="", flush=True)
                print()
                if stats:
                    print(f"[{conversation.speed}]", file=sys.stderr)
        except (OSError, ValueError) as error:
            print(error, file=notes)
        except KeyboardInterrupt:
            if not person:
                raise
            print(" [stopped]")


def command(conversation: Conversation, line: str) -> str:
    """Carry out one /command -> what to tell."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/image" and rest:
        # A path with spaces needs no quotes when it is the only one.
        paths = [rest] if Path(rest).is_file() else shlex.split(rest, posix=os.name != "nt")
        for path in paths:
            conversation.show(path)
        return f"{len(conversation.waiting)} picture(s) go with the next thing you say"
    if name == "/scene" and rest.isdecimal():
        return show_scene(conversation, int(rest))
    if name == "/reset":
        conversation.reset()
        return "forgotten"
    if name == "/system" and rest:
        conversation.reset(rest)
        return "a new conversation with this system turn"
    return conversation.speed if name == "/speed" else HELP


def show_scene(conversation: Conversation, number: int) -> str:
    from dataset.emoji.world import TEST_START, picture, scene  # here: most chats do not need it

    image = picture(scene(TEST_START + number))
    path = Path("out") / f"scene_{number}.png"
    path.parent.mkdir(exist_ok=True)
    image.save(path)
    conversation.show(image)
    return f"scene {number}, never seen in training, is in {path}; now ask about it"


def main(arguments=None) -> None:
    flags = read_flags(arguments)
    try:
        model, template, processor = load(flags, flags.model)
        if flags.data:
            from evaluation.run import evaluate  # here: a chat needs no plotting library

            evaluate(flags, load, model, template, processor)
            return
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
        sampling = {name: getattr(flags, name) for name in names}
        conversation = Conversation(model, template, processor, sampling, flags.seed)
        if flags.prompt is None:
            chat(conversation, flags.stats)
        else:
            for path in flags.image:
                conversation.show(path)
            print("".join(conversation.reply(flags.prompt)))
            if flags.attention:
                from evaluation.looks import save_looks  # here: a chat draws nothing

                save_looks(conversation, flags.attention)
            if flags.stats:
                print(f"[{conversation.speed}]", file=sys.stderr)
    except (OSError, ValueError, KeyError) as error:  # each says what is wrong and what to do
        raise SystemExit(f"eval.py: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # what a shell expects of an interrupted program


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # Windows would choose a code page
        stream.reconfigure(encoding="utf-8", errors="replace")
    main()
