"""What a chat in a terminal needs beside the chat itself (eval.py): turns, commands, completion.

    stdin -> read_turn -> "/..." -> command -> a message for the user
                       -> text, the next turn of the conversation

The history lives as long as the chat: what is asked about an image may be private, so no file of
it is ever written. /save writes the conversation, where the user says.
"""

import glob
import json
import os
import re
import shlex
from pathlib import Path

from dataset.images import load_image

HELP = """\
/image PATH [PATH ...]   show images with the next thing you say
/scene N                 show unseen scene number N of the emoji world, and save it to look at
/reset                   forget the conversation
/system TEXT             forget it, and begin with this system turn
/save FILE.json          write the conversation and its images, as training reads them
/speed                   tokens per second of the last answer
/quit                    end (as Ctrl-D does); Ctrl-C stops an answer
A line that ends with \\ goes on in the next one; so does all between two lines of \"\"\"."""
COMMANDS = (*re.findall("^/[a-z]+", HELP, re.MULTILINE), "/help")
QUOTES = '"""'
# What could steer a terminal, shown as a symbol: C0 and DEL by their pictures; C1 and the
# characters that change the direction of writing by the replacement character.
CONTROLS = {**{c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"}, 127: 0x2421,
            **dict.fromkeys([*range(0x80, 0xa0), *range(0x202a, 0x202f), *range(0x2066, 0x206a)],
                            0xfffd)}
WINDOWS = os.name == "nt"  # where \ parts the names in a path, and shields no space


def printable(text: str) -> str:
    """A model's text as it comes, Markdown and all, but unable to steer the terminal."""
    return text.translate(CONTROLS)


# ---------------------------------------------------------------- reading


def read_turn(prompt: str, continuation: str) -> str:
    """One turn, of one line or of several, see HELP; a command is one line always, since a path on
    Windows may end with \\. EOFError: there is none any more."""
    try:
        line = input(prompt).strip()
    except OSError as error:  # the terminal is gone: asking again would never end
        raise SystemExit(f"cannot read from the terminal or the pipe: {error}") from error
    lines = [line.removeprefix(QUOTES)]
    try:
        if line.startswith(QUOTES):
            while not lines[-1].rstrip().endswith(QUOTES):
                lines.append(input(continuation))
            return "\n".join(lines).rstrip().removesuffix(QUOTES).strip()
        while lines[-1].endswith("\\") and not line.startswith("/"):
            lines[-1] = lines[-1][:-1]
            lines.append(input(continuation).rstrip())
    except EOFError:  # it ended in the middle: what there is counts
        pass
    return "\n".join(lines).strip()


def prepare_editing() -> None:
    """Arrow keys, a history within this chat, and completion with the tab key."""
    try:
        import readline
    except ImportError:  # Windows has none, and edits lines by itself
        return

    matches = []

    def complete(text: str, number: int) -> str | None:
        if number == 0:
            line = readline.get_line_buffer()[:readline.get_endidx()]
            start = len(line) - len(last_word(line))
            # readline replaces what follows its own idea of a word's start.
            matches[:] = [word[readline.get_begidx() - start:] for word in completions(line)]
        return matches[number] if number < len(matches) else None

    readline.set_auto_history(True)
    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete)
    libedit = "libedit" in (readline.__doc__ or "")  # macOS
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def last_word(line: str) -> str:
    r"""What is being typed; a space behind a \ belongs to it."""
    return re.search(r"(?:\\.|[^\s\\])*\\?$", line)[0]


def completions(line: str) -> list[str]:
    """What the last word of a line may become: a command, or a path behind /image and /save."""
    word = last_word(line)
    if word == line:
        return [name + " " for name in COMMANDS if name.startswith(word)] if word else []
    if line.split()[0] not in ("/image", "/save"):
        return []
    start = os.path.expanduser(word if WINDOWS else re.sub(r"\\(.)", r"\1", word))
    paths = [path + (os.sep if os.path.isdir(path) else " ")
             for path in sorted(glob.glob(glob.escape(start) + "*"))]
    return paths if WINDOWS else [re.sub(r"([\s\\'\"])(?!$)", r"\\\1", path) for path in paths]


def split_paths(text: str) -> list[str]:
    """A path with spaces needs no quotes when it is the only one and there."""
    paths = [text] if Path(text).is_file() else shlex.split(text, posix=not WINDOWS)
    return [os.path.expanduser(path) for path in paths]


# ---------------------------------------------------------------- commands


def command(conversation, line: str) -> str:
    """Carry out one /command -> what the user is told."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/image" and rest:
        for path in split_paths(rest):
            conversation.show(path)
        return f"{len(conversation.waiting)} image(s) go with the next thing you say"
    if name == "/scene" and rest.isdecimal():
        return show_scene(conversation, int(rest))
    if name == "/reset":
        conversation.reset()
        return "forgotten"
    if name == "/system" and rest:
        conversation.reset(rest)
        return "a new conversation with this system turn"
    if name == "/save" and rest:
        return save(conversation, Path(split_paths(rest)[0]))
    return conversation.speed if name == "/speed" else HELP


def show_scene(conversation, number: int) -> str:
    from dataset.emoji.world import TEST_START, picture, scene  # here: most chats do not need it

    path = Path("out") / f"scene_{number}.png"
    path.parent.mkdir(exist_ok=True)
    picture(scene(TEST_START + number)).save(path)
    conversation.show(path)
    return f"scene {number}, never seen in training, is in {path}; now ask about it"


def save(conversation, file: Path) -> str:
    """FILE.json with one sample, as the readers of dataset/ take it, and FILE_1.png, ... beside it:
    names in data cannot leave their folder, so the images are copied."""
    turns = conversation.transcript()
    if not turns:
        raise ValueError("nothing was answered yet, so there is nothing to save")
    if file.suffix != ".json":
        raise ValueError(f"/save {file}: expected a name that ends with .json")
    sources = conversation.sources[:sum(turn.images for turn in turns)]
    copies = {file.with_name(f"{file.stem}_{number}.png"): load_image(source)
              for number, source in enumerate(sources, start=1)}
    for path in (file, *copies):
        if path.exists():
            raise ValueError(f"{path} is there already, and is not overwritten; give another name")
    sample = {"conversations": [{"role": turn.role, "content": turn.content} for turn in turns]}
    if copies:
        sample["image"] = [path.name for path in copies]
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, image in copies.items():
        image.save(path)
    file.write_text(json.dumps([sample], ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return f"{len(turns)} turns and {len(copies)} images are in {file}"
