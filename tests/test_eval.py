"""Claims: the chat remembers, streams and survives mistakes; one question puts one answer on stdout
and nothing else. (Commands and terminals: test_terminal.py; scores: test_scoring.py.)"""

import io
import sys

import pytest
import torch
from PIL import Image
from tiny import make_runs

import eval as script
from dataset.chat import Message
from training.inference import Conversation, format_speed

SAMPLING = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("world"))


@pytest.fixture
def conversation(world):
    flags = script.read_flags(["--model", str(world / "sft"), "--device", "cpu"])
    return Conversation(*script.load_model(flags, flags.model), SAMPLING)


def say(conversation, text) -> str:
    return "".join(conversation.reply(text))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def expected(world, text, *pictures, model="sft") -> str:
    """What eval.py must print for one thing said."""
    name = model if model == "none" else str(world / model)
    flags = script.read_flags(["--device", "cpu", "--language_model", str(world / "language")])
    talk = Conversation(*script.load_model(flags, name), {"max_new_tokens": 8})
    for picture in pictures:
        talk.show(world / picture)
    return say(talk, text) + "\n"


def run(monkeypatch, capsys, lines, *arguments, person=False):
    """eval.py with these lines on its stdin -> (stdout, stderr)"""
    text = "".join(line + "\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", Terminal(text) if person else io.StringIO(text))
    capsys.readouterr()
    script.main(["--max_new_tokens", "8", "--device", "cpu", *map(str, arguments)])
    return capsys.readouterr()


# ---------------------------------------------------------------- conversation


def test_memory_holds_every_turn_and_picture(world, conversation):
    conversation.show(world / "red.png")
    first = say(conversation, "Which colour?")
    second = say(conversation, "And now?")
    conversation.show(world / "blue.png")
    conversation.show(Image.new("RGB", (9, 9)))
    say(conversation, "Before <image> after <image>?")
    assert [m.content for m in conversation.messages[:4]] == [
        "<image>\nWhich colour?", first, "And now?", second]
    assert conversation.messages[4].content == "Before <image> after <image>?"
    assert len(conversation.pixels) == 3 and conversation.waiting == []


def test_the_prompt_is_what_training_would_have_made(world, conversation):
    conversation.show(world / "red.png")
    answer = say(conversation, "Which colour?")
    seen = []
    template = conversation.template
    render = template.encode_prompt
    conversation.template.encode_prompt = lambda messages: seen.append(render(messages)) or seen[-1]
    say(conversation, "Sure?")
    said = [Message("user", "<image>\nWhich colour?"), Message("assistant", answer),
            Message("user", "Sure?"), Message("assistant", "")]
    whole, _ = template.encode_conversation(said)
    assert whole[:len(seen[0])] == seen[0]


def test_reset_and_system(conversation):
    say(conversation, "hi")
    conversation.reset()
    assert conversation.messages == [] and conversation.pixels == []
    conversation.reset("Be kind.")
    say(conversation, "hi")
    assert conversation.messages[0] == Message("system", "Be kind.")


def test_a_stopped_answer_is_remembered_as_far_as_it_came(conversation):
    torch.manual_seed(0)
    for parameter in conversation.model.parameters():  # so that it talks and does not stop
        parameter.data.normal_(std=0.3)
    whole = list(conversation.reply("hello"))
    conversation.reset()
    stream = conversation.reply("hello")
    told = next(stream) + next(stream)
    stream.close()
    assert conversation.messages == [Message("user", "hello"), Message("assistant", told)]
    assert "".join(whole).startswith(told)


@pytest.mark.parametrize("text", ["word " * 200, "two <image> <image>"])
def test_an_error_leaves_the_conversation_as_it_was(world, conversation, text):
    say(conversation, "hi")
    conversation.show(world / "red.png")
    before = list(conversation.messages)
    with pytest.raises(ValueError):
        say(conversation, text)
    assert conversation.messages == before and len(conversation.waiting) == 1


def test_speed_by_hand():
    assert format_speed(7, [1.0, 1.5, 1.75, 2.0]) == (
        "7 prompt tokens in 0.50 s, 3 tokens answered, 4.0 tokens/s")
    assert format_speed(7, [1.0, 1.5]) == "7 prompt tokens in 0.50 s, 1 tokens answered"


# ---------------------------------------------------------------- the whole script


def test_a_pipe_gets_answers_and_nothing_else(world, monkeypatch, capsys):
    lines = ["/image " + str(world / "red.png"), "Which colour?", "", "/nonsense", "/reset",
             "Hello", "/quit", "never read"]
    out, err = run(monkeypatch, capsys, lines, "--model", world / "sft")
    assert out == expected(world, "Which colour?", "red.png") + expected(world, "Hello")
    assert "1 image" in err and "/image PATH" in err and "forgotten" in err


def test_pictures_of_the_flag_go_with_the_first_line_of_a_pipe(world, monkeypatch, capsys):
    """echo "Which colour?" | python eval.py --image red.png"""
    out, err = run(monkeypatch, capsys, ["Which colour?"], "--model", world / "sft",
                   "--image", world / "red.png")
    assert out == expected(world, "Which colour?", "red.png") and "\x1b[" not in out + err
    lines = ["Which \\", "colour?", '"""Which ', 'colour?"""']
    out, _ = run(monkeypatch, capsys, [*lines[:2], "/reset", *lines[2:]], "--model", world / "sft")
    assert out == 2 * expected(world, "Which \ncolour?")
    with pytest.raises(SystemExit, match="no_such.png"):
        run(monkeypatch, capsys, ["?"], "--model", world / "sft", "--image", "no_such.png")


def test_mistakes_do_not_end_the_chat(world, monkeypatch, capsys):
    lines = ["/image no_such.png", "word " * 200, "/speed", "Hello"]
    out, err = run(monkeypatch, capsys, lines, "--model", world / "sft", "--stats")
    assert "no_such.png" in err and "tokens" in err
    assert out == expected(world, "Hello") and "prompt tokens in" in err


def test_control_c_stops_the_answer_and_not_the_chat(world, monkeypatch, capsys):
    def interrupted(self, text):
        yield "as far "
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "reply", interrupted)
    out, _ = run(monkeypatch, capsys, ["one", "two", "/quit"], "--model", world / "sft",
                 person=True)
    assert out.count("as far  [stopped]") == 2


def test_one_question_one_answer(world, monkeypatch, capsys):
    arguments = ["--model", world / "sft", "--prompt", "Which colour?", "--temperature", "0",
                 "--dtype", "fp32", "--stats"]
    out, err = run(monkeypatch, capsys, [], *arguments, "--image", world / "red.png")
    assert out == expected(world, "Which colour?", "red.png")
    assert "model:" in err and "tokens answered" in err
    two = run(monkeypatch, capsys, [], *arguments, "--image", world / "red.png",
              world / "blue.png").out
    assert two == expected(world, "Which colour?", "red.png", "blue.png")


def test_bf16_and_sampling_run(world, monkeypatch, capsys):
    run(monkeypatch, capsys, [], "--model", world / "sft", "--prompt", "Hello", "--dtype", "bf16",
        "--temperature", "0.8", "--top_k", "5", "--top_p", "0.9", "--repetition_penalty", "1.1")


def test_without_the_fast_extras_the_answers_are_the_same(world, monkeypatch, capsys):
    expected = run(monkeypatch, capsys, ["Which colour?"], "--model", world / "sft", "--dtype",
                   "fp32", "--image", world / "red.png").out
    monkeypatch.setattr("training.inference.HAS_EXTRAS", False)
    out, _ = run(monkeypatch, capsys, ["Which colour?"], "--model", world / "sft", "--dtype",
                 "fp32", "--image", world / "red.png")
    assert out == expected and len(out) > 1
    with pytest.raises(SystemExit, match="--quantize int8 needs extras/fast"):
        run(monkeypatch, capsys, ["Hello"], "--model", world / "sft", "--quantize", "int8")


def test_a_metric_that_is_none_is_refused(world, tmp_path):
    with pytest.raises(SystemExit, match="--metric f1: expected auto, exact, vqa, choice"):
        script.main(["--model", str(world / "sft"), "--data", str(world / "data.jsonl"),
                     "--metric", "f1", "--report", str(tmp_path)])


def test_a_language_model_alone_chats(world, monkeypatch, capsys):
    out, err = run(monkeypatch, capsys, ["Hello", "/image " + str(world / "red.png")],
                   "--model", "none", "--language_model", world / "language")
    assert out == expected(world, "Hello", model="none") and "sees no images" in err


def test_newest_checkpoint_and_what_to_do_without_one(world, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="torchrun train_pretrain.py"):
        script.main(["--prompt", "hi"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pretrain").symlink_to(world / "pretrain")
    assert "out/pretrain" in run(monkeypatch, capsys, [], "--prompt", "hi").err
    (tmp_path / "out" / "sft").symlink_to(world / "sft")
    assert "out/sft/step_000006" in run(monkeypatch, capsys, [], "--prompt", "hi").err


@pytest.mark.parametrize("wrong", [["--report", "x"], ["--suffix", "x"], ["--metric", "f1"],
                                   ["--metric", "vqa"], ["--image", "a", "--data", "b"],
                                   ["--max_new_tokens", "0"], ["--dtype", "fp64"]])
def test_flags_that_make_no_sense(wrong, capsys):
    with pytest.raises(SystemExit):
        script.read_flags(wrong)
