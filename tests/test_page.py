"""Claims: the page of extras/web.py answers about pictures, streams, remembers, forgets and stops,
in two languages; sessions do not mix; what is too large or broken is refused in a sentence;
nothing is fetched from anywhere else. In a real browser where there is one (Debian: chromium and
chromium-driver)."""

import io
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import train_pretrain
from tests.tiny import make_world

gradio = pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-dev.txt")

import extras.web as web  # noqa: E402, behind the question whether gradio is there
import training.inference as inference  # noqa: E402
from extras import page  # noqa: E402
from extras.page import TEXTS, text_for  # noqa: E402
from training.inference import Conversation  # noqa: E402

LOCAL = ("127.0.0.1", "localhost", "::1")
PATIENCE = 120  # seconds until something must have happened, on a busy machine


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    flags = make_world(directory)
    for name in ("one", "group/two"):
        train_pretrain.main([*flags, "--steps", "1", "--out", str(directory / "out" / name)])
    return directory


def flags_of(world, *more):
    return web.read_flags(["--out", str(world / "out"), "--device", "cpu", *more])


@pytest.fixture(scope="module")
def models(world):
    return page.Models(flags_of(world))


def echo(model, ids, pixels=None, stop_ids=(), **sampling):
    """In the place of generate: says slowly what the model was shown and told."""
    text = echo.tokenizer.decode([i for i in ids if i != model.config.image_token_id])
    asked = [turn.partition("<|im_end|>")[0].strip() for turn in
             text.split("<|im_start|>user\n")[1:]]
    said = f"{0 if pixels is None else len(pixels)} pictures; you said: {' / '.join(asked)}"
    said = said.replace("<|vision_start|><|vision_end|>\n", "")
    for number, token in enumerate(echo.tokenizer.encode(said)):  # of one letter each
        time.sleep(echo.pause)
        if number in echo.holds:
            echo.holds[number].wait(PATIENCE)
        yield token


echo.pause = 0.02  # seconds before each token
echo.holds = {}  # {number of a token: what it waits for}


@pytest.fixture(scope="module")
def server(world, models, tmp_path_factory):
    """(address, the calls that left this machine); the model only tells what it was told."""
    called, connect = [], socket.socket.connect

    def local_only(self, place):
        if self.family != socket.AF_UNIX and place[0] not in LOCAL:
            called.append(place)
            raise OSError(f"the test has no internet for {place}")
        return connect(self, place)

    with pytest.MonkeyPatch.context() as patch:  # undone as well where the server does not start
        echo.tokenizer = models.get(models.names()[0])[1].tokenizer
        patch.setattr(inference, "generate", echo)
        patch.setattr(socket.socket, "connect", local_only)
        running, listener, address = web.prepare(flags_of(world, "--max_upload", "0.5"),
                                                 str(tmp_path_factory.mktemp("uploads")))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield address, called
        running.should_exit = True
        thread.join(10)


@pytest.fixture
def warned(monkeypatch):
    told = []
    monkeypatch.setattr(page.gr, "Warning", lambda text, **_: told.append(text))
    return told


def respond(models, text="", files=(), talk=None, name=None, question="", tokens=6):
    """All that the page is told in one turn."""
    said = {"text": text, "files": [str(file) for file in files]}
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": tokens}
    return list(page.respond(models, said, talk, name or models.names()[0], sampling, question))


# ---------------------------------------------------------------- what happens, without a server


def test_the_answer_is_the_chats_own(world, models):
    """Piece by piece, two turns, against training/inference.py alone."""
    told = respond(models, "Which colour?", [world / "red.png"])
    shown, box, talk = told[-1]
    alone = Conversation(*models.get(models.names()[0]), {"max_new_tokens": 6})
    alone.show(world / "red.png")
    first = "".join(alone.reply("Which colour?"))
    assert [m["content"] for m in shown] == [{"path": str(world / "red.png")}, "Which colour?",
                                             first] and box is None
    assert all(first.startswith(turn[0][-1]["content"]) for turn in told)
    shown, _, again = respond(models, "And now?", talk=talk)[-1]
    assert again is talk and len(shown) == 5
    assert shown[-1]["content"] == "".join(alone.reply("And now?"))
    assert talk.conversation.messages == alone.messages


def test_a_picture_alone_is_asked_about_in_the_pages_language(world, models):
    request = SimpleNamespace(headers={"accept-language": "zh-CN,en;q=0.8"})
    shown, _, _ = respond(models, " ", [world / "red.png"],
                          question=text_for(request, "question"))[-1]
    assert shown[1]["content"] == "你看到了什么？"
    assert respond(models, " ") == [([], None, None)]


def test_another_model_begins_another_conversation(world, models):
    assert sorted(Path(name).name for name in models.names()) == ["one", "two"]
    first, second = models.names()
    _, _, talk = respond(models, "hello", name=first)[-1]
    shown, _, other = respond(models, "hello", talk=talk, name=second)[-1]
    assert other is not talk and other.model == second and len(shown) == 2
    assert models.get(first) is models.get(first), "loaded once"


def test_what_cannot_be_done_is_a_sentence_and_the_words_stay(world, models, warned, tmp_path):
    bomb, text, cut = (tmp_path / name for name in ("bomb.png", "text.png", "cut.png"))
    Image.new("1", (20_000, 20_000)).save(bomb)
    text.write_text("<svg onload=alert(1)>")
    cut.write_bytes((world / "red.png").read_bytes()[:60])
    _, _, talk = respond(models, "hello")[-1]
    before = list(talk.turns)
    for said, files, words in (
            ("a", [bomb], "bomb.png"), ("a", [world / "red.png", text], "text.png"),
            ("a", [cut], "cut.png"), ("a <image> b", [], "0 images wait"),
            ("a " * 600, [], "shorten it"), ("a" * 5000, [], "at most 8 and 4,000"),
            ("a", [world / "red.png"] * 9, "9 images")):
        shown, box, same = respond(models, said, files, talk)[-1]
        assert shown == before and same is talk and box["text"] == said
        assert talk.conversation.waiting == [] or not files
        assert words in warned[-1] and "\n" not in warned[-1]
        assert str(tmp_path) not in warned[-1], "paths of the server are nobody's business"
    assert respond(models, "still there?", talk=talk)[-1][0][:2] == before
    respond(models, "hello", name="/etc")
    assert warned[-1].startswith("there is no model /etc")


def test_a_stopped_answer_is_shown_and_remembered_as_far_as_it_came(world, models, monkeypatch):
    monkeypatch.setattr(inference, "generate", echo)
    echo.tokenizer = models.get(models.names()[0])[1].tokenizer
    said = {"text": "hello", "files": []}
    stream = page.respond(models, said, None, models.names()[0],
                          {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 99}, "")
    for _ in range(2):
        shown, _, talk = next(stream)
    stream.close()
    assert talk.turns == shown and 0 < len(shown[-1]["content"]) < 20
    assert talk.conversation.messages[-1].content == shown[-1]["content"]


def test_where_it_looked(world, models, warned):
    assert page.attention_image(None, "no answer") is None and warned == ["no answer"]
    _, _, talk = respond(models, "hello")[-1]
    if talk.conversation.answer_ids:
        assert page.attention_image(talk, "") is None and "no image" in warned[-1]


def test_both_languages_say_everything():
    for english, chinese in TEXTS.values():
        assert english.isascii() and not chinese.isascii()
    for header, chinese in (("zh-CN,en;q=0.8", True), ("en-GB,zh", False), ("de", False),
                            ("", False)):
        request = SimpleNamespace(headers={"accept-language": header})
        assert text_for(request, "question") == TEXTS["question"][chinese]
    assert text_for(SimpleNamespace(headers={}), "question") == "What do you see?"


def test_flags_and_a_missing_model_are_explained(world, tmp_path, capsys):
    assert web.read_flags([]).host == "127.0.0.1"
    with pytest.raises(SystemExit, match="no run with a checkpoint below"):
        web.main(["--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        web.read_flags(["--max_upload", "0"])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(
            SystemExit, match=f"cannot listen at 127.0.0.1, port {taken.getsockname()[1]}"):
        web.main(["--out", str(world / "out"), "--device", "cpu", "--port",
                  str(taken.getsockname()[1])])


# ---------------------------------------------------------------- through the server


def client(address):
    from gradio_client import Client

    return Client(address, verbose=False, analytics_enabled=False)


def ask(session, text, *files):
    from gradio_client import handle_file

    said = {"text": text, "files": [handle_file(str(file)) for file in files]}
    chat, _ = session.predict(said, *session.settings, api_name="/ask")
    return chat[-1]["content"][0]["text"]


@pytest.fixture
def sessions(server, models):
    opened = [client(server[0]) for _ in range(2)]
    for session in opened:
        session.settings = (models.names()[0], 0.0, 1.0, 256)
    return opened


def test_two_sessions_interleaved_never_mix(sessions, world):
    one, two = sessions
    assert ask(one, "alpha", world / "red.png") == "1 pictures; you said: alpha"
    assert ask(two, "beta") == "0 pictures; you said: beta"
    assert ask(one, "gamma") == "1 pictures; you said: alpha / gamma"
    assert ask(two, "delta", world / "blue.png") == "1 pictures; you said: beta / delta"
    one.predict(api_name="/reset")
    assert ask(one, "epsilon") == "0 pictures; you said: epsilon"
    assert ask(two, "zeta") == "1 pictures; you said: beta / delta / zeta"


def test_two_sessions_at_once_never_mix(sessions):
    told = {}

    def speak(number, session):
        told[number] = [ask(session, f"{number}{turn}") for turn in "ab"]

    threads = [threading.Thread(target=speak, args=pair) for pair in enumerate(sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert told == {n: [f"0 pictures; you said: {n}a", f"0 pictures; you said: {n}a / {n}b"]
                    for n in (0, 1)}


def test_large_uploads_and_other_names_are_refused(server, world):
    address, _ = server
    noise = io.BytesIO()
    Image.effect_noise((1200, 1200), 200).save(noise, "PNG")  # 1.4 MB
    small = (world / "red.png").read_bytes()
    for data, expected in ((small, 200), (noise.getvalue(), 413)):
        body = (b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n'
                b"Content-Type: image/png\r\n\r\n" + data + b"\r\n--x--\r\n")
        request = urllib.request.Request(
            f"{address}gradio_api/upload", body,
            {"Content-Type": "multipart/form-data; boundary=x"})
        assert status(request) == expected
    for host, expected in (("evil.example:7860", 400), ("localhost:78", 200), ("[::1]:1", 200),
                           ("", 400)):
        assert status(urllib.request.Request(address, headers={"Host": host})) == expected, host
    with urllib.request.urlopen(address) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self'") and "http" not in policy


def status(request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_it_listens_here_alone_and_calls_nobody(server):
    address, called = server
    assert address.startswith("http://127.0.0.1:") and called == []


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser",
                                                   "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "disable-dev-shm-usage", "window-size=1280,1000", "lang=en-US",
                 "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                 f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chrome.set_page_load_timeout(PATIENCE)
    yield chrome
    chrome.quit()


def until(found, what: str):
    """The first thing that found() gives within PATIENCE."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if value := found():
                return value
        except WebDriverException:  # gone or not there yet: the page draws itself anew
            pass
        time.sleep(0.05)
    raise AssertionError(f"not within {PATIENCE} s: {what}")


def test_in_a_real_browser(server, browser, world):
    import json

    address, called = server
    browser.get(address)

    def find(selector):
        return browser.find_element("css selector", selector)

    def last_answer() -> str:
        answers = browser.find_elements("css selector", "#chat .bot .message-content")
        return answers[-1].text.strip() if answers else ""

    def say(text: str, *pictures):
        for picture in pictures:
            before = len(browser.find_elements("css selector", "#box img"))
            find("#box input[type=file]").send_keys(str(picture))
            until(lambda before=before: len(browser.find_elements(
                "css selector", "#box img")) > before, "the picture waits in the box")
        find("#box textarea").send_keys(text + "\ue007")

    until(lambda: find("#box textarea").is_enabled(), "the page")
    full = "1 pictures; you said: Which colour is it, please?"
    echo.holds = {20: threading.Event(), 40: threading.Event()}
    say("Which colour is it, please?", world / "red.png")
    for length, go_on in echo.holds.items():  # what is shown may lag behind by a few letters
        until(lambda least=length - 20: len(last_answer()) > least, "it streams")
        assert full[:length].startswith(last_answer())
        go_on.set()
    until(lambda: last_answer() == full, "the first answer")
    assert browser.find_elements("css selector", "#chat .user img"), "the picture is in the chat"
    until(lambda: browser.execute_script(
        "return [...document.images].every(image => image.naturalWidth)"), "it can be seen")

    say("And now?")
    until(lambda: last_answer() == full + " / And now?", "the second turn remembers the first")
    find("#look").click()
    until(lambda: find("#looks img").is_displayed(), "where it looked")

    find("#reset").click()
    until(lambda: not browser.find_elements("css selector", "#chat .bot"), "an empty chat")
    echo.pause = 0.1
    say("hello " * 60)
    until(lambda: len(last_answer()) > 30, "some of a long answer")
    find("#stop").click()
    time.sleep(1)
    stopped = last_answer()
    echo.pause = 0.02
    assert stopped.startswith("0 pictures; you said: hello") and len(stopped) < 300
    say("again")
    until(lambda: last_answer().endswith("/ again"), "an answer after one that was stopped")

    find("#box input[type=file]").send_keys(str(broken(world)))
    until(lambda: browser.find_elements("css selector", "#box .thumbnail-item, #box img"), "it")
    say("and this?")
    until(lambda: "cannot read broken.png" in find("body").text, "a plain sentence")

    # The chat's own small button forgets as well, and does not only clear the view.
    browser.execute_script("arguments[0].click()", find("#chat button[aria-label=Clear]"))
    until(lambda: not find("#box textarea").get_attribute("value"), "an empty box, too")
    assert not browser.find_elements("css selector", "#chat .bot")
    say("last")
    until(lambda: last_answer() == "0 pictures; you said: last", "it was forgotten")

    agent = browser.execute_script("return navigator.userAgent")
    browser.execute_cdp_cmd("Network.setUserAgentOverride",
                            {"userAgent": agent, "acceptLanguage": "zh-CN"})
    browser.refresh()
    until(lambda: find("#stop").text == "停止" and find("#reset").text == "新对话", "Chinese")
    find("#look").click()
    until(lambda: TEXTS["no_answer"][1] in find("body").text, "a sentence in Chinese")

    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {event["params"]["request"]["url"] for event in events
             if event["method"] == "Network.requestWillBeSent"}
    assert len(asked) > 10
    # Chromium's own start page reads pieces of itself.
    own = (address, "data:", "blob:", "chrome:")
    assert [url for url in asked if not url.startswith(own)] == []
    refused = [entry["message"] for entry in browser.get_log("browser")
               if "Content Security Policy" in entry["message"]]
    assert refused == [], "the page did not even try"
    assert called == []


def broken(world) -> Path:
    file = world / "broken.png"
    file.write_bytes((world / "red.png").read_bytes()[:60])
    return file
