"""Claims: in a real pseudo-terminal lines are edited, completed and remembered, turns may have
several lines; nothing steers the terminal and nothing is written
that was not asked for; what /save writes is read back as the same sample."""

import contextlib
import os
import select
import subprocess
import sys
import time

import pytest
from PIL import Image
from tiny import ROOT, environment, make_world

import eval as script
import train_pretrain
from dataset.chat import Message
from dataset.images import load_image
from dataset.readers.formats import open_data
from model.pretrained.checkpoint import find_model
from training import terminal
from training.inference import Conversation


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    train_pretrain.main([*make_world(directory), "--out", str(directory / "pretrain")])
    return directory


@pytest.fixture(scope="module")
def parts(world):
    flags = script.read_flags(["--model", str(world / "pretrain"), "--device", "cpu"])
    return script.load_model(flags, flags.model)


@pytest.fixture
def conversation(parts):
    return Conversation(*parts, {"max_new_tokens": 6})


def say(conversation, text) -> str:
    return "".join(conversation.reply(text))


# ---------------------------------------------------------------- turns


def turns_of(monkeypatch, *lines) -> list[str]:
    """What read_turn makes of these lines, until there is none."""
    waiting, asked = list(lines), []

    def typed(prompt):
        asked.append(prompt)
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    monkeypatch.setattr("builtins.input", typed)
    found = []
    with contextlib.suppress(EOFError):
        while True:
            found.append(terminal.read_turn("you: ", "...: "))
    return found


def test_a_turn_may_have_several_lines(monkeypatch):
    assert turns_of(monkeypatch, " one ", "two") == ["one", "two"]
    assert turns_of(monkeypatch, "a\\", "  b \\", "c", "d") == ["a\n  b \nc", "d"]
    assert turns_of(monkeypatch, '"""a', "", ' b\\"""', "c") == ['a\n\n b\\', "c"]
    assert turns_of(monkeypatch, '"""', "a", '"""') == ["a"]
    assert turns_of(monkeypatch, '"""', "only begun") == ["only begun"]
    assert turns_of(monkeypatch, "ends in the middle\\") == ["ends in the middle"]
    assert turns_of(monkeypatch, "/image C:\\pics\\", "x") == ["/image C:\\pics\\", "x"]


def test_nothing_steers_the_terminal():
    wicked = "a\x1b[2J\x07\r\x08\x7f\x9b31m\u202eb\n\t**c** \u4e2d\U0001f431"
    assert terminal.printable(wicked) == (
        "a\u241b[2J\u2407\u240d\u2408\u2421\ufffd31m\ufffdb\n\t**c** \u4e2d\U0001f431")


# ---------------------------------------------------------------- completion


def test_commands_and_paths_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat.png", "car two.png", "dog.png"):
        (tmp_path / name).touch()
    (tmp_path / "cats").mkdir()
    assert terminal.completions("/s") == ["/scene ", "/system ", "/save ", "/speed "]
    assert terminal.completions("/image ca") == ["car\\ two.png ", "cat.png ", "cats/"]
    assert terminal.completions("/image dog.png car\\ t") == ["car\\ two.png "]
    assert terminal.completions("/save cats") == ["cats/"]
    assert terminal.completions(f"/image {tmp_path}/do") == [f"{tmp_path}/dog.png "]
    for nothing in ("", "what is ca", "/scene ca", "hello", "/image none"):
        assert terminal.completions(nothing) == []
    monkeypatch.setenv("HOME", str(tmp_path))
    assert terminal.completions("/image ~/do") == [f"{tmp_path}/dog.png "]
    for word in ("cat.png", "car\\ two.png", "'car two.png'", "car two.png", "~/cat.png"):
        assert os.path.isfile(terminal.split_paths(word)[0]), word


# ---------------------------------------------------------------- saving


def test_what_is_saved_is_read_back_as_the_same_sample(world, conversation, tmp_path):
    conversation.show(world / "red.png")
    say(conversation, "Which \U0001f431 colour?\nSay it.")
    conversation.show(Image.new("RGB", (30, 20), "blue"))
    conversation.show(world / "green.png")
    say(conversation, "And <image> against <image>?")
    conversation.show(world / "white.png")  # waits, and was not talked about yet
    for turn in range(len(conversation.messages)):  # an untrained model may have said nothing
        if conversation.messages[turn].role == "assistant":
            conversation.messages[turn] = Message("assistant", f"answer {turn} <image>")
    told = terminal.command(conversation, f"/save {tmp_path / 'new' / 'talk.json'}")
    assert "4 turns and 3 images" in told
    sample, = open_data(tmp_path / "new" / "talk.json")
    assert list(sample.messages) == conversation.messages == conversation.transcript()
    template, processor = conversation.template, conversation.processor
    assert template.encode_conversation(sample.messages) == template.encode_conversation(
        conversation.messages)
    for image, pixels in zip(sample.images, conversation.pixels, strict=True):
        assert processor(load_image(image)).equal(pixels)
    with pytest.raises(ValueError, match="talk.json is there already"):
        terminal.command(conversation, f"/save {tmp_path / 'new' / 'talk.json'}")
    with pytest.raises(ValueError, match="ends with .json"):
        terminal.command(conversation, f"/save {tmp_path / 'talk.txt'}")


def test_the_system_turn_is_saved_wherever_it_came_from(parts, conversation, tmp_path):
    say(conversation, "hi")
    conversation.messages[-1] = Message("assistant", "ho")
    conversation.template.default_system = "Be kind."
    try:
        terminal.command(conversation, f"/save {tmp_path / 'a.json'}")
        sample, = open_data(tmp_path / "a.json")
        assert sample.messages[0] == Message("system", "Be kind.")
        prompt = conversation.template.encode_prompt(conversation.messages)
    finally:
        conversation.template.default_system = None
    assert conversation.template.encode_prompt(sample.messages) == prompt
    conversation.reset("Another.")
    with pytest.raises(ValueError, match="nothing was answered yet"):
        terminal.command(conversation, f"/save {tmp_path / 'b.json'}")
    say(conversation, "hi")
    conversation.messages[-1] = Message("assistant", "ho")
    assert conversation.transcript()[0] == Message("system", "Another.")
    conversation.messages += [Message("user", "and"), Message("assistant", "")]
    assert conversation.transcript()[-1] == Message("assistant", "ho"), "it was stopped at once"


# ---------------------------------------------------------------- commands


def test_image_command_takes_several_and_names_with_spaces(world, conversation):
    spaced = world / "a red one.png"
    Image.new("RGB", (9, 9)).save(spaced)
    terminal.command(conversation, f"/image {world / 'red.png'} {world / 'blue.png'}")
    told = terminal.command(conversation, f"/image {spaced}")
    assert len(conversation.waiting) == 3 and told.startswith("3 image")
    with pytest.raises(OSError, match="no_such.png"):
        terminal.command(conversation, "/image no_such.png")
    assert len(conversation.waiting) == len(conversation.sources) == 3


def test_commands(conversation):
    assert "forgotten" in terminal.command(conversation, "/reset")
    terminal.command(conversation, "/system Speak Chinese.")
    assert conversation.messages == [Message("system", "Speak Chinese.")]
    assert "nothing was said" in terminal.command(conversation, "/speed")
    say(conversation, "hi")
    assert "prompt tokens" in terminal.command(conversation, "/speed")
    for unknown in ("/help", "/nonsense", "/image", "/scene x", "/system", "/save"):
        assert terminal.command(conversation, unknown) == terminal.HELP
    for name in terminal.COMMANDS:
        assert name == "/help" or name in terminal.HELP


def test_scene_shows_and_saves_an_unseen_scene(conversation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = terminal.command(conversation, "/scene 3")
    assert "scene_3.png" in told and (tmp_path / "out" / "scene_3.png").is_file()
    assert len(conversation.waiting) == 1


# ---------------------------------------------------------------- a real terminal


needs_pty = pytest.mark.skipif(os.name == "nt", reason="Windows has no module pty")
# Its terminal becomes the one that Ctrl-C comes from, and Ctrl-C is heeded again (a shell script
# that starts the tests with "&" makes them ignore it, and all that they start); then it becomes
# the command.
TAKE_TERMINAL = ("import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
                 "signal.signal(signal.SIGINT, signal.SIG_DFL); "
                 "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")


class Screen:
    """eval.py in a pseudo-terminal of 160 x 40: type, and wait for what it writes."""

    def __init__(self, arguments, home, **environ):
        import fcntl
        import pty
        import struct
        import termios

        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
        plain = {key: value for key, value in environment().items()
                 if key not in ("NO_COLOR", "COLORTERM")}
        command = [sys.executable, "-c", TAKE_TERMINAL, str(ROOT / "eval.py"), "--device", "cpu",
                   "--max_new_tokens", "4", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=home, start_new_session=True,
            env={**plain, "HOME": str(home), "TERM": "xterm-256color", **environ})
        os.close(slave)
        self.text = ""

    def until(self, sign: str, seconds: float = 300, again: str = "") -> str:
        """Read on until a sign has come -> all text since the last call, up to it. Whenever nothing
        has come for ten seconds, the keys `again` are typed."""
        end = time.monotonic() + seconds
        while sign not in self.text:
            assert time.monotonic() < end, f"waited for {sign!r}, saw {self.text!r}"
            if select.select([self.master], [], [], 10)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode("utf-8", "replace")
                except OSError:  # Linux says so when the other side has closed
                    raise AssertionError(f"it ended before {sign!r}: {self.text!r}") from None
            elif again:
                self.type(again)
        seen, self.text = self.text.split(sign, 1)[0], self.text.split(sign, 1)[1]
        return seen

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def ends(self) -> int:
        with contextlib.suppress(OSError):
            while os.read(self.master, 65536):
                pass
        return self.process.wait(timeout=60)


@needs_pty
def test_a_whole_chat_in_a_terminal(world, tmp_path):
    pytest.importorskip("readline")
    checkpoint = find_model(str(world / "pretrain"))
    screen = Screen(["--model", checkpoint], tmp_path)
    screen.until("you: ")
    screen.type(f"/im\t{world}/re\t\n")  # both are completed
    seen = screen.until("1 image(s) go with")
    assert f"/image {world}/red.png" in seen
    screen.until("you: ")
    screen.type("What \\\ncolour?\n")
    screen.until("...: ")
    screen.until("you: ")
    screen.type("\x1b[A\x1b[A\x1b[A\x1b[D\x1b[D\n")  # three up: the command; the cursor moves
    assert "2 image(s)" not in screen.until("1 image(s) go with")
    screen.until("you: ")
    screen.type("half a wo")
    screen.until("half a wo")
    screen.type("\x03")
    # Python listens only while it waits for a key: a Ctrl-C between its look for signals and that
    # wait is lost (CPython, readline_until_enter_or_signal), and a person presses it again.
    screen.until("/quit ends the chat", again="\x03")
    screen.until("you: ")
    screen.type("\x04")
    assert screen.ends() == 0
    assert list(tmp_path.iterdir()) == [], "no history is written"


@needs_pty
def test_a_terminal_gets_no_colour_and_no_picture(world, tmp_path):
    checkpoint = find_model(str(world / "pretrain"))
    screen = Screen(["--model", checkpoint, "--image", world / "red.png"], tmp_path)
    seen = screen.until("you: ")
    screen.type("/quit\n")
    assert screen.ends() == 0
    assert "/save FILE.json" in seen and "\x1b[38" not in seen and "\u2580" not in seen


def test_a_terminal_that_is_gone_ends_the_chat(conversation, monkeypatch):
    """Asked again, it would fail again, for ever."""
    def gone(prompt):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.input", gone)
    with pytest.raises(SystemExit, match="cannot read from the terminal .*Input/output error"):
        script.chat(conversation, stats=False)
