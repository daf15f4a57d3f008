"""Claims: the server of extras/web.py opens and serves no file but the page's own, its example
pictures, and to each session what it uploaded itself: whatever a message or an address names, in
whatever shape, through every way in.

Only HTTP is spoken to the running server, word for word: a client library would upload the named
file by itself and hide the fault. What the protocol looks like, Visitor and WAYS alone know."""

import http.client
import io
import json
import os
import re
import secrets
import socket
import threading
import urllib.parse
from pathlib import Path

import pytest
from bad import watched
from PIL import Image

import train_pretrain
from tests.tiny import make_world

pytest.importorskip("gradio", reason="needs gradio: pip install -r requirements-dev.txt")

import extras.web as web  # noqa: E402, behind the question whether gradio is there

PATIENCE = 120  # seconds until something must have happened, on a busy machine
ELSEWHERE = "93.184.215.14"  # any address that is public; nobody is ever asked there
API = "/gradio_api"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(host and port, the directory of uploads, the calls that left this machine)."""
    directory, uploads = tmp_path_factory.mktemp("world"), tmp_path_factory.mktemp("uploads")
    train_pretrain.main([*make_world(directory), "--steps", "1", "--out", str(directory / "out")])
    called, connect = [], socket.socket.connect

    def local_only(self, place):
        if self.family != socket.AF_UNIX and place[0] not in ("127.0.0.1", "::1"):
            called.append(place)
            raise OSError(f"the test has no internet for {place}")
        return connect(self, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        running, listener, address = web.prepare(
            web.read_flags(["--out", str(directory / "out"), "--device", "cpu"]), str(uploads))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield urllib.parse.urlsplit(address).netloc, uploads, called
        running.should_exit = True
        thread.join(10)


class Visitor:
    """A browser as far as HTTP goes: it keeps its cookies, and `heard` all that it was told."""

    def __init__(self, server):
        self.place, self.heard, self.cookies = server[0], [], {}
        self.page = secrets.token_hex(8)  # what an open page calls itself
        self.config = json.loads(self.ask("GET", "/config")[1])
        self.model = next(c["props"]["value"] for c in self.config["components"]
                          if c["props"].get("elem_id") == "model")

    def ask(self, method: str, target: str, body=None, headers=()) -> tuple[int, bytes]:
        """body: bytes as they are, anything else as JSON -> (status, body of the answer)."""
        headers = dict(headers)
        if self.cookies:
            headers["Cookie"] = "; ".join(f"{n}={v}" for n, v in self.cookies.items())
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection(self.place, timeout=PATIENCE)
        try:
            connection.request(method, target, body, headers)
            answer = connection.getresponse()
            for cookie in answer.headers.get_all("set-cookie", ()):
                name, _, value = cookie.partition(";")[0].partition("=")
                self.cookies[name] = value
            try:
                content = answer.read()
            except http.client.IncompleteRead as cut:
                content = cut.partial
        finally:
            connection.close()
        self.heard.append(content)
        return answer.status, content

    def upload(self, content: bytes, name: str = "mine.png") -> str:
        """-> the path that a message names it by."""
        body = (b'--x\r\nContent-Disposition: form-data; name="files"; filename="' + name.encode()
                + b'"\r\nContent-Type: image/png\r\n\r\n' + content + b"\r\n--x--\r\n")
        status, told = self.ask("POST", f"{API}/upload", body,
                                {"Content-Type": "multipart/form-data; boundary=x"})
        assert status == 200, told
        return json.loads(told)[0]

    def file(self, path: str) -> tuple[int, bytes]:
        return self.ask("GET", f"{API}/file={urllib.parse.quote(path)}")

    def say(self, box, way: str = "queue") -> bool:
        """A message with this in the place of its words and pictures: was it answered?"""
        told = WAYS[way](self, "ask", [box, None, self.model, 0, 1.0, 4])
        answered = '"assistant"' in told
        self.fetch(told)
        return answered

    def look(self) -> str:
        """-> the path of the picture of where the last answer's words were looked for."""
        return re.search(r"file=([^\"]*)", WAYS["queue"](self, "look", [None]))[1]

    def fetch(self, told: str) -> None:
        """Everything that an answer points to."""
        for target in set(re.findall(rf"{API}/file=[^\"\\ ]+", told)):
            self.ask("GET", target)

    def number(self, name: str) -> int:
        return next(d["id"] for d in self.config["dependencies"] if d["api_name"] == name)


def queue(visitor, name, data, **more):
    number = name if isinstance(name, int) else visitor.number(name)
    status, told = visitor.ask("POST", f"{API}/queue/join", {
        "fn_index": number, "session_hash": visitor.page, "data": data, **more})
    if status != 200:
        return told.decode()
    return visitor.ask("GET", f"{API}/queue/data?session_hash={visitor.page}")[1].decode()


def direct(road):
    """Without waiting in line: the first piece of the answer comes at once, and no other."""
    return lambda visitor, name, data: visitor.ask("POST", f"{API}/{road}/{name}", {
        "data": data, "session_hash": visitor.page})[1].decode()


def call(visitor, name, data, version=""):
    body = {"data": data, "session_hash": visitor.page}
    if version:  # without the state, and by name
        words = ("said", "name", "temperature", "top_p", "longest")
        body = dict(zip(words, [data[0], *data[2:]]))
    status, told = visitor.ask("POST", f"{API}/call{version}/{name}", body)
    if status != 200:
        return told.decode()
    event = json.loads(told)["event_id"]
    return visitor.ask("GET", f"{API}/call{version}/{name}/{event}")[1].decode()


WAYS = {"queue": queue, "run": direct("run"), "api": direct("api"), "call": call,
        "call/v2": lambda *what: call(*what, version="/v2")}


def picture(colour) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 24), colour).save(file, "PNG")
    return file.getvalue()


OWN, OTHERS, SECRET = map(picture, ("green", "blue", (201, 7, 133)))
META = {"meta": {"_type": "gradio.FileData"}}


def described(path, **more) -> dict:
    return {"path": path, **META, **more}


def box(*files) -> dict:
    return {"text": "What?", "files": list(files)}


@pytest.fixture(autouse=True)
def no_calls_yet(server):
    server[2].clear()


@pytest.fixture
def secret(tmp_path) -> str:
    """The path of an image of this machine that is no business of the page."""
    file = tmp_path / "private_scan.png"
    file.write_bytes(SECRET)
    return str(file)


class Guard:
    """What must not have happened within the block to a file, nor to its content."""

    def __init__(self, server, content: bytes, *paths: str):
        self.server, self.content, self.paths = server, content, paths
        self.visitors = []

    def __enter__(self):
        self.copies, self.watch = self.found(), watched()
        self.seen = self.watch.__enter__()
        return self

    def found(self) -> set:
        """Files below the directory of uploads that hold the content."""
        return {file for file in self.server[1].rglob("*")
                if file.is_file() and not file.is_symlink()
                and file.read_bytes() == self.content}

    def __exit__(self, *error):
        self.watch.__exit__(*error)
        opened = {os.path.realpath(os.fsdecode(path)) for event, path in self.seen
                  if event == "open" and isinstance(path, (str, bytes))}
        if error[0] is None:
            assert not opened & set(map(os.path.realpath, self.paths)), "it was opened"
            assert self.found() == self.copies, "it was copied to where files are served from"
            for visitor in self.visitors:
                assert not any(self.content in told for told in visitor.heard), "it was served"


# ---------------------------------------------------------------- what must go on working


@pytest.mark.parametrize("way", WAYS)
def test_an_upload_of_ones_own_is_seen_and_served(server, way):
    visitor = Visitor(server)
    path = visitor.upload(OWN)
    assert visitor.file(path) == (200, OWN)
    assert visitor.say(box(described(path, orig_name="mine.png", size=9, mime_type="image/png")),
                       way)
    assert visitor.heard[-1] == OWN, "the chat shows it"
    assert visitor.file(path) == (200, OWN)


def test_a_second_turn_shows_the_same_picture_and_a_new_one(server):
    visitor = Visitor(server)
    first, second = visitor.upload(OWN), visitor.upload(OTHERS)
    assert visitor.say(box(described(first)))
    assert visitor.say(box(described(first), described(second)))


def test_examples_are_for_everyone(server):
    one, two = Visitor(server), Visitor(server)
    examples = sorted(set(re.findall(rf'{API}/file=([^"]+)"', json.dumps(one.config))))
    assert examples
    for path in examples:
        for visitor in (one, two):
            status, content = visitor.file(path)
            assert status == 200 and Image.open(io.BytesIO(content)).size > (1, 1)
            assert visitor.say(box(described(path)))


def test_the_page_is_there_for_a_visitor_without_a_cookie(server):
    visitor = Visitor(server)
    status, content = visitor.ask("GET", "/")
    assert status == 200
    scripts = re.findall(r'(?:src|href)="(\./assets/[^"]+)"', content.decode())
    assert scripts
    for target in [*(script[1:] for script in scripts), "/theme.css", f"{API}/info"]:
        visitor.cookies.clear()
        assert visitor.ask("GET", target)[0] == 200, target
    visitor.cookies.clear()
    assert visitor.say(box()), "words alone need no upload"


def test_the_picture_of_where_it_looked_is_for_its_session(server):
    one, two = Visitor(server), Visitor(server)
    assert one.say(box(described(one.upload(OWN))))
    looks = urllib.parse.unquote(one.look())
    status, content = one.file(looks)
    assert status == 200 and Image.open(io.BytesIO(content)).width > 200
    with Guard(server, content, looks) as guard:
        guard.visitors = [two]
        assert two.file(looks)[0] == 403
        assert not two.say(box(described(looks)))


# ---------------------------------------------------------------- paths of this machine


def link(to: str, folder: str) -> str:
    """-> the path of a new symbolic link in the folder."""
    path = os.path.join(folder, f"link_{secrets.token_hex(4)}{Path(to).suffix}")
    os.symlink(to, path)
    return path


def disguises(secret: str, own: str):
    """What a client may send in the box's place to be given the secret. own: of an upload."""
    folder = os.path.dirname(own)
    names = [secret, os.path.relpath(secret), os.path.join(folder, os.path.relpath(secret, folder)),
             f"{own}/../{os.path.relpath(secret, folder)}", f"/{secret}", f"/.{secret}",
             secret.replace("/", "/./"), f"{secret}/", f" {secret}", f"{secret}\0.png",
             urllib.parse.quote(secret, safe=""), f"file://{secret}", f"file:{secret}",
             f"{API}/file={secret}", f"file={secret}", f"~{secret}",
             link(secret, folder), os.path.join(link(os.path.dirname(secret), folder),
                                                Path(secret).name)]
    for name in names:
        yield box(described(name))
    plain = described(secret)
    yield box({"path": secret})
    yield box({"path": secret, "meta": {"_type": "other"}})
    yield box({"path": secret, "meta": None})
    yield box(described(secret, is_stream=True))
    yield box(described(secret, url=f"{API}/file={own}", orig_name="mine.png"))
    yield box(described(own), plain)
    yield box([plain], [[plain]])
    yield box({"file": plain}, {"image": plain, "alt_text": "x"})
    yield box({"path": plain, **META})
    yield {"text": plain, "files": []}
    yield {"text": "What?", "files": {"0": plain, "path": secret}}
    yield {"text": "What?", "files": [described(own)], "more": plain, "path": secret, **META}
    yield plain
    yield [plain]
    yield secret
    yield [{"role": "user", "content": [{"type": "file", "file": plain}]}]
    yield {"__type__": "update", "value": box(plain)}


@pytest.mark.parametrize("way", WAYS)
def test_no_path_of_the_machine_is_opened(server, secret, way):
    visitor = Visitor(server)
    own = visitor.upload(OWN)
    with Guard(server, SECRET, secret) as guard:
        guard.visitors = [visitor]
        for said in disguises(secret, own):
            assert not visitor.say(said, way), said
    assert visitor.say(box(described(visitor.upload(OWN))), way), "it still answers"


@pytest.mark.parametrize("way", WAYS)
def test_the_other_fields_of_an_upload_lead_nowhere(server, secret, way):
    """These may be answered, but then about the upload."""
    for more in ({"url": f"{API}/file={secret}"}, {"url": secret}, {"url": f"file://{secret}"},
                 {"url": f"http://{ELSEWHERE}/a.png"}, {"orig_name": secret}, {"is_stream": True},
                 {"orig_name": "../../../a.png"}, {"orig_name": {"path": secret, **META}},
                 {"meta": {"_type": "gradio.FileData", "path": secret}}, {"size": -1},
                 {"meta": "gradio.FileData"}, {"mime_type": "image/svg+xml"}, {"data": secret}):
        visitor = Visitor(server)
        own = visitor.upload(OWN)
        with Guard(server, SECRET, secret) as guard:
            guard.visitors = [visitor]
            visitor.say(box({**described(own), **more}), way)
        assert server[2] == [], f"it called {server[2]}"
        assert visitor.file(own) == (200, OWN)


@pytest.mark.parametrize("way", WAYS)
def test_no_address_is_fetched(server, way):
    visitor = Visitor(server)
    for url in (f"http://{ELSEWHERE}/a.png", f"https://{ELSEWHERE}/a.png", f"//{ELSEWHERE}/a.png",
                f"http://{server[0]}/config?a.png", f"HTTP://{ELSEWHERE}/a.png",
                f"ftp://{ELSEWHERE}/a.png", "data:image/png;base64,iVBORw0KGgo="):
        assert not visitor.say(box(described(url)), way)
        assert not visitor.say(box(described(url, url=url)), way)
    assert server[2] == [], f"it called {server[2]}"


def test_a_vector_drawing_of_the_machine_is_not_served_either(server, tmp_path):
    """Gradio treats their kind in its own manner."""
    content = b'<svg xmlns="http://www.w3.org/2000/svg"><text>private</text></svg>'
    file = tmp_path / "private.svg"
    file.write_bytes(content)
    visitor = Visitor(server)
    with Guard(server, content, str(file)) as guard:
        guard.visitors = [visitor]
        for way in WAYS:
            assert not visitor.say(box(described(str(file))), way)
        assert visitor.file(str(file))[0] == 403


def test_no_way_into_the_server_takes_a_path(server, secret):
    """In each place of each function that the page calls, the nameless ones as well."""
    visitor = Visitor(server)
    own = visitor.upload(OWN)
    plain = described(secret)
    with Guard(server, SECRET, secret) as guard:
        guard.visitors = [visitor]
        for function in visitor.config["dependencies"]:
            places = len(function["inputs"])
            for value in (plain, [plain], box(plain), {"value": plain}):
                for place in range(places):
                    data = [None] * place + [value] + [None] * (places - place - 1)
                    visitor.fetch(queue(visitor, function["id"], data))
                visitor.fetch(queue(visitor, function["id"], [None] * places, event_data=value))
            visitor.fetch(queue(visitor, function["id"], [plain] * places))
        for component in visitor.config["components"]:
            for name in ("preprocess", "postprocess", "read", "ls", "get"):
                visitor.ask("POST", f"{API}/component_server", {
                    "data": plain, "component_id": component["id"], "fn_name": name,
                    "session_hash": visitor.page})
        for road in ("stream/x", "cancel", "reset", "vibe-code", "no_such_road"):
            visitor.ask("POST", f"{API}/{road}", {"data": [box(plain)], "code": "", **plain})
    assert visitor.say(box(described(own))), "it still answers"


# ---------------------------------------------------------------- other sessions


@pytest.mark.parametrize("way", WAYS)
def test_another_sessions_upload_is_refused(server, way):
    one, two = Visitor(server), Visitor(server)
    fresh, used = one.upload(OTHERS), one.upload(OTHERS)
    assert one.say(box(described(used)))
    own = two.upload(OWN)
    with Guard(server, OTHERS, fresh, used) as guard:
        guard.visitors = [two]
        for path in (fresh, used):
            crooked = os.path.join(os.path.dirname(own), os.path.relpath(path, Path(own).parent))
            for name in (path, crooked):
                assert not two.say(box(described(name)), way)
                assert not two.say(box(described(own), described(name)), way)
                assert two.file(name)[0] == 403
    with Guard(server, OTHERS, fresh, used) as guard:
        guard.visitors = [two]
        two.page = one.page  # even under the name of the other's open page
        assert not two.say(box(described(used)), way)
        two.cookies.clear()  # or under no name at all
        assert not two.say(box(described(fresh)), way)
        two.cookies.clear()
        assert two.file(used)[0] == 403
    assert one.say(box(described(used))) and one.file(fresh) == (200, OTHERS)


def test_the_same_picture_uploaded_twice_is_two_files(server):
    """Who has the content has no right to the other's file, and takes none away."""
    one, two = Visitor(server), Visitor(server)
    first, second = one.upload(OWN), two.upload(OWN)
    assert first != second
    assert one.say(box(described(first))) and two.say(box(described(second)))
    assert not two.say(box(described(first))) and two.file(first)[0] == 403


def test_an_upload_belongs_to_the_open_page_that_first_named_it(server):
    """Two open pages of one browser share its cookie, and are two sessions."""
    visitor = Visitor(server)
    path = visitor.upload(OWN)
    assert visitor.say(box(described(path)))
    visitor.page = secrets.token_hex(8)
    assert not visitor.say(box(described(path)))
    assert visitor.say(box(described(visitor.upload(OWN))))


def test_what_names_a_session_is_kept_from_scripts_and_other_sites(server):
    visitor = Visitor(server)
    assert visitor.cookies and all(len(value) >= 32 for value in visitor.cookies.values())
    before = dict(visitor.cookies)
    path = visitor.upload(OWN)
    assert visitor.cookies == before, "it stays"
    told = b"".join(visitor.heard).decode("latin-1") + path
    assert not any(value in told for value in before.values()), "no page and no path tells it"
    connection = http.client.HTTPConnection(server[0], timeout=PATIENCE)
    name, value = next(iter(before.items()))
    for sent in ("", f"{name}=", f"{name}=guessed", f"x{name}={value}", f"{name}={value}x"):
        connection.request("GET", "/config", headers={"Cookie": sent} if sent else {})
        answer = connection.getresponse()
        answer.read()
        cookie = answer.headers["set-cookie"]
        assert "httponly" in cookie.lower() and "samesite=lax" in cookie.lower()
    connection.close()


# ---------------------------------------------------------------- addresses of files


def test_no_address_serves_a_file_of_the_machine(server, secret, tmp_path, monkeypatch):
    visitor = Visitor(server)
    own = visitor.upload(OWN)
    folder = os.path.dirname(own)
    linked = link(secret, folder)
    # What another program of this kind left in the working directory.
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / ".gradio" / "cached_examples" / "cached.png"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(SECRET)
    crooked = os.path.join(folder, os.path.relpath(secret, folder))
    with Guard(server, SECRET, secret, str(cached)) as guard:
        guard.visitors = [visitor]
        for path in (secret, "private_scan.png", f"/{secret}", crooked, linked, f"file://{secret}",
                     str(cached), ".gradio/cached_examples/cached.png",
                     f"{own}/../{Path(linked).name}", f"{secret}\0", f"{secret}\n", f"\n{secret}",
                     ""):
            for quoted in (urllib.parse.quote(path), urllib.parse.quote(path, safe=""),
                           urllib.parse.quote(path).replace(".", "%2e"),
                           urllib.parse.quote(urllib.parse.quote(path))):
                for start in ("file=", "file/", "file%3D", "file%2F", "file", "proxy=file://",
                              "stream/", "custom_component/"):
                    for method in ("GET", "HEAD"):
                        status, _ = visitor.ask(method, f"{API}/{start}{quoted}")
                        assert status >= 400, (method, start, quoted)
                for start in (f"/{API}/file=", f"/x{API}/file=", f"/.{API}/file=", "/file=",
                              "/assets/", "/static/", "/svelte/", f"{API.upper()}/file=",
                              f"{API}/../gradio_api/file=", f"{API}//file="):
                    visitor.ask("GET", start + quoted)
        for path in ("extras/web.py", "README.md", "/etc/passwd", "/proc/self/environ",
                     str(server[1]), folder):
            assert visitor.file(path)[0] == 403, path
            assert visitor.file(os.path.abspath(path))[0] == 403, path
    assert visitor.file(own) == (200, OWN)


def test_no_address_makes_the_server_fetch_another(server):
    visitor = Visitor(server)
    for url in (f"http://{ELSEWHERE}/a.png", f"https://{ELSEWHERE}/a.png", f"//{ELSEWHERE}/a.png"):
        for start in ("file=", "file/", "proxy="):
            for target in (url, urllib.parse.quote(url, safe="")):
                assert visitor.ask("GET", f"{API}/{start}{target}")[0] >= 400
    assert server[2] == [], f"it called {server[2]}"


# ---------------------------------------------------------------- uploads and odd messages


@pytest.mark.parametrize("name", [
    "../../../../tmp/evil.png", "..", "/etc/evil.png", "C:\\\\evil.png", "", ".png", "100% #1?.png",
    "a" * 300 + ".png", "图片 é.png", "&lt;b&gt;.png", "a.png/", "%2e%2e%2fevil.png"])
def test_an_upload_of_any_name_lies_in_its_place_and_is_served(server, name):
    visitor = Visitor(server)
    path = visitor.upload(OWN, name)
    assert os.path.realpath(path) == path and Path(path).read_bytes() == OWN
    assert path.startswith(os.path.realpath(server[1]) + os.sep)
    assert visitor.file(path) == (200, OWN)
    if path.endswith(".png"):
        assert visitor.say(box(described(path))) and visitor.heard[-1] == OWN


def test_what_is_no_message_is_refused_in_a_sentence(server, secret):
    visitor = Visitor(server)
    join = f"{API}/queue/join"
    message = json.dumps({"fn_index": visitor.number("ask"), "session_hash": visitor.page,
                          "data": [box(described(secret)), None, visitor.model, 0, 1, 4]})
    hidden = "{" + f'"data": 1, {message[1:]}'
    cases = [(b"", {}), (b"\xff", {}), (b"{", {}), (b"[" * 100_000, {}), (b"[]", {}), (b"7", {}),
             (b"{}" + message.encode(), {}), (hidden.encode(), {}),
             (message.encode("utf-16"), {}), (message.encode(), {"Content-Type": "text/plain"}),
             (message.encode(), {"Content-Type": "multipart/form-data; boundary=x"}),
             (message.encode() + b" " * 2_000_000, {}),
             (b"2\r\n{}\r\n0\r\n\r\n", {"Transfer-Encoding": "chunked"})]  # of no told length
    with Guard(server, SECRET, secret) as guard:
        guard.visitors = [visitor]
        for body, headers in cases:
            status, told = visitor.ask("POST", join, body, {
                "Content-Type": "application/json", **headers})
            assert 400 <= status < 500 and json.loads(told)["detail"], (body[:60], status, told)
        for body, headers in ((b"x", {}), (b"{}", {"Content-Type": "application/json"}),
                              (b"x", {"Content-Type": "multipart/form-data"}),
                              (b"x", {"Content-Type": "multipart/form-data; boundary=x"})):
            status, _ = visitor.ask("POST", f"{API}/upload", body, headers)
            assert 400 <= status < 500
    assert visitor.say(box(described(visitor.upload(OWN)))), "it still answers"


def test_an_upload_that_is_gone_is_refused_in_a_sentence(server):
    """They are deleted after an hour."""
    visitor = Visitor(server)
    path = visitor.upload(OWN)
    os.remove(path)
    assert not visitor.say(box(described(path)))
    assert b"upload it" in b"".join(visitor.heard)
    assert visitor.file(path)[0] == 403
