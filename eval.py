"""Talk to a trained model, ask it one thing, or score it on a file.

    python eval.py                                            chat with the newest checkpoint
    python eval.py --image cat.jpg --prompt "Who is it?"      one answer on stdout, nothing else
    echo "Who is it?" | python eval.py --image cat.jpg        the same, an answer for each line
    python eval.py --image cat.jpg --prompt ... --attention looks.png   and where it looked
    python eval.py --data FILE --image_folder DIR             scores, as the data's authors count
    python eval.py --data emoji                               the same, on unseen emoji scenes
    python eval.py --model none --language_model DIR          chat with a language model alone

Flow: checkpoint directory -> model, template, processor -> a conversation -> text.
"""

import argparse
import gc
import sys

from dataset.families import CHAT_FAMILIES
from model.pretrained.checkpoint import find_model
from training.inference import Conversation, add_model_flags, exit_on_error, load_model
from training.terminal import HELP, command, prepare_editing, printable, read_turn
from training.writable import check_directory, check_image


def main(arguments=None) -> None:
    flags = read_flags(arguments)
    with exit_on_error("eval.py"):
        # 0. What cannot be written is refused now, not after an hour's work.
        if flags.data:
            check_directory("--report", "out/scores" if flags.report is None else flags.report)
        if flags.attention is not None:
            check_image("--attention", flags.attention)

        # 1. Load the weights, the chat template and the image processor: all lie in the checkpoint.
        name = flags.model
        if flags.data and name != "none":  # a training may save a newer one while this one answers
            name = find_model(name)
        model, template, processor = load_model(flags, name)

        # 2. Score a file of questions.
        if flags.data:
            from evaluation.run import evaluate

            evaluate(flags, name, model, template, processor)
            return

        # 3. Begin a conversation. Images go with the first thing that is said.
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
        sampling = {name: getattr(flags, name) for name in names}
        conversation = Conversation(model, template, processor, sampling, flags.seed)
        for path in flags.image:
            conversation.show(path)

        # 4. Chat, or answer once; after that, draw where the model looked.
        if flags.prompt is None:
            chat(conversation, flags.stats)
            return
        say(conversation, flags.prompt, flags.stats)
        if flags.attention:
            from extras.attention import save_attention

            save_attention(conversation, flags.attention)


def chat(conversation: Conversation, stats: bool) -> None:
    """Lines of stdin -> turns and commands -> answers on stdout, each as it is made.

    A person gets the commands' notes on stdout. In a pipe only answers go there, notes to stderr.
    """
    person = sys.stdin.isatty()
    notes = sys.stdout if person else sys.stderr
    if person:
        print(f"{HELP}\n")
        prepare_editing()
    while True:
        try:
            text = read_turn("you: " if person else "", "...: " if person else "")
            if text == "/quit":
                return
            if text.startswith("/"):
                print(command(conversation, text), file=notes)
            elif text:
                say(conversation, text, stats)
        except EOFError:
            return
        except (OSError, ValueError) as error:  # a mistake does not end the chat
            print(printable(str(error)), file=notes)
        except KeyboardInterrupt:  # nor does Ctrl-C: the answer so far is remembered
            if not person:
                raise
            print(" [stopped] /quit ends the chat")


def say(conversation: Conversation, text: str, stats: bool) -> None:
    """Ask, and print the answer as it comes."""
    for piece in conversation.reply(text):
        print(printable(piece), end="", flush=True)
    print()
    if stats:
        print(f"[{conversation.speed}]", file=sys.stderr)


def read_flags(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", metavar="DIR", help="checkpoint or run (default: the newest in out/sft, else "
        "in out/pretrain); none: the language model of --language_model alone")
    add_model_flags(parser)
    add("--image", nargs="+", default=[], metavar="FILE", help="images shown with --prompt, or "
        "with the first thing you say")
    add("--prompt", help="ask this once: only the answer goes to stdout")
    add("--attention", metavar="PNG", help="with --prompt: also draw where the model looked for "
        "each word of the answer, and what each image token is closest to among the words")
    add("--system", help='system turn; "": none (default: as in training)')
    add("--template", choices=CHAT_FAMILIES, help="with --model none: whose chat template "
        "(default: by the model's type); a checkpoint knows its own")
    add("--data", nargs="+", metavar="FILE", help="files of conversations to score, or emoji: "
        "unseen scenes; \"part-*.parquet\" is each such file")
    add("--image_folder", help="directory that the file's image names are relative to")
    add("--follow_links", action="store_true", help="links in it are yours, and may lead out of it")
    add("--metric", default="auto", help="with --data: how an answer is scored, one of those in "
        "evaluation/metrics.py (default: as the data's authors do; exact for conversations)")
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
    add("--stats", action="store_true", help="print the dtype, and the speed of each answer, to "
        "stderr")
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
        parser.error("--image is for a chat; with --data the file names the images")
    return flags


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # Windows would choose a code page
        stream.reconfigure(encoding="utf-8", errors="replace")
    gc.freeze()  # skip the final garbage collection: half a second at exit
    main()
