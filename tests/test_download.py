"""Claims: a preset's files are told with their sizes, fetched and checked, after an
interruption only what is missing; without a hub the message names what to fetch, how big it is,
where to put it and which flag to use.

A small HTTP server on this machine answers as the hub does, so huggingface_hub itself is at work.
"""

import hashlib
import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from extras import download
from tests.tiny import ROOT, environment
from training.preset_table import Download
from training.presets import PRESETS

LARGE = bytes(range(256)) * 200  # 51,200 bytes
MODEL = {"config.json": b"{}", "model.safetensors": LARGE, "tokenizer.json": b'{"t": 1}',
         "pytorch_model.bin": LARGE, "README.md": b"words", "modeling.py": b"code"}
OLD_MODEL = {"config.json": b"{}", "pytorch_model.bin": LARGE, "flax_model.msgpack": LARGE,
             "preprocessor_config.json": b'{"size": 16}'}
DATA = {"chat.json": b"[]", "images.zip": LARGE[::-1], "metadata.json": b"{}"}
REPOSITORIES = {"models/toy/language": MODEL, "models/toy/vision": OLD_MODEL,
                "datasets/toy/data": DATA}
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """What a test may ask of it: cut a file short, spoil one, and which requests came."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.cut: set[str] = set()  # names of files whose sending breaks off half-way
        self.spoiled: set[str] = set()  # names of files that arrive with another first byte
        self.sent: list[tuple[str, str | None]] = []  # name of each file sent, and its Range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *anything) -> None:
        pass

    def do_HEAD(self) -> None:
        self.file(body=False)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/"):
            repository, *tree = re.split("/revision/|(?=/tree/)", path.removeprefix("/api/"))
            return self.tell(repository, as_tree=bool(tree) and tree[0].startswith("/tree/"))
        self.file(body=True)

    def tell(self, repository: str, as_tree: bool) -> None:
        files = REPOSITORIES.get(repository)
        if files is None:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        siblings = []
        for name, content in files.items():
            told = {"rfilename": name, "size": len(content), "blobId": "b" * 40}
            if len(content) > 1000:
                told["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(),
                               "size": len(content), "pointerSize": 134}
            siblings.append(told)
        if as_tree:
            siblings = [{"type": "file", "path": told["rfilename"], "size": told["size"], "oid":
                         "b" * 40, **({"lfs": {**told["lfs"], "oid": told["lfs"]["sha256"]}}
                                      if "lfs" in told else {})} for told in siblings]
            content = json.dumps(siblings).encode()
            return self.answer(200, {"Content-Type": "application/json"}, content)
        body = {"id": repository.split("/", 1)[1], "sha": COMMIT, "siblings": siblings,
                "tags": [], "private": False, "downloads": 0, "likes": 0}
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def file(self, body: bool) -> None:
        where, _, name = self.path.lstrip("/").partition(f"/resolve/{COMMIT}/")
        kind = where if where.startswith("datasets/") else f"models/{where}"
        content = REPOSITORIES.get(kind, {}).get(name)
        if content is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"}, b"")
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT,
                   "Accept-Ranges": "bytes"}
        if not body:
            return self.answer(200, headers, content, body=False)
        asked = self.headers.get("Range")
        self.server.sent.append((name, asked))
        if name in self.server.spoiled:
            content = bytes([content[0] ^ 1]) + content[1:]
        first = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        part = content[first:]
        if name in self.server.cut:
            self.answer(206 if first else 200, headers, part, send=len(part) // 2)
            self.close_connection = True
            return
        self.answer(206 if first else 200, headers, part)

    def answer(self, status: int, headers: dict, content: bytes, body: bool = True,
               send: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[:send])


@pytest.fixture(scope="module")
def running():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def hub(running, monkeypatch, tmp_path):
    """The server; a preset "toy" of its files; an empty cache; an empty working directory."""
    running.cut, running.spoiled, running.sent = set(), set(), []
    toy = replace(
        PRESETS["qwen2.5-siglip"], language_model="toy/language", vision_tower="toy/vision",
        downloads=(Download("toy/data", ("chat.json", "images.zip"), "dataset/toy", 0.05,
                            unpack="dataset/toy/images"),
                   Download("http://far.example/photos.zip", ("photos.zip",), "dataset/photos",
                            19.3)))
    monkeypatch.setitem(download.PRESETS, "toy", toy)
    monkeypatch.setattr(download, "download_size", lambda name: 988e6)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between huggingface_hub's attempts
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    monkeypatch.chdir(tmp_path)
    return running


def cached(repo: str, name: str) -> bytes | None:
    found = huggingface_hub.try_to_load_from_cache(
        repo, name, cache_dir=huggingface_hub.constants.HF_HUB_CACHE)
    return open(found, "rb").read() if isinstance(found, str) else None


@pytest.fixture(autouse=True)
def cache_of_the_test(monkeypatch):
    """try_to_load_from_cache has read its default before the test set another."""
    real = huggingface_hub.try_to_load_from_cache
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache",
        lambda *given, **named: real(*given, **{
            "cache_dir": huggingface_hub.constants.HF_HUB_CACHE, **named}))


def test_sizes_are_told_before_and_only_what_is_read_is_fetched(hub, capsys, tmp_path):
    download.main(["toy"])
    told = capsys.readouterr().out
    assert f"{hub.url}/toy/language -> the cache of the hub" in told
    assert "51.2 kB  model.safetensors" in told
    assert "to fetch: 51.2 kB of 51.2 kB" in told
    assert told.rindex("to fetch: ") < told.index("8 files are complete"), "before the first file"
    assert sorted(name for name, _ in hub.sent) == sorted([
        "config.json", "model.safetensors", "tokenizer.json",  # no .bin beside safetensors
        "config.json", "preprocessor_config.json", "pytorch_model.bin",  # but where there is none
        "chat.json", "images.zip"])
    assert cached("toy/language", "model.safetensors") == LARGE
    assert (tmp_path / "dataset/toy/images.zip").read_bytes() == LARGE[::-1]
    assert "8 files are complete" in told
    assert "unpack:  python -m zipfile -e dataset/toy/images.zip dataset/toy/images" in told
    assert "by hand: http://far.example/photos.zip (19.30 GB) -> dataset/photos/" in told


def test_a_second_call_fetches_nothing_and_says_so(hub, capsys):
    download.main(["toy"])
    hub.sent.clear()
    capsys.readouterr()
    download.main(["toy"])
    told = capsys.readouterr().out
    assert hub.sent == [] and told.count("(there)") == 8
    assert told.count("to fetch: 0 bytes of 51.2 kB") == 3


def test_one_part_alone(hub, capsys):
    download.main(["toy", "--part", "vision"])
    assert {name for name, _ in hub.sent} == {"config.json", "preprocessor_config.json",
                                              "pytorch_model.bin"}
    assert "by hand" not in capsys.readouterr().out


@pytest.mark.parametrize("part, name", [("language", "model.safetensors"),
                                        ("data", "images.zip")])
def test_after_an_interruption_only_what_is_missing_is_fetched(hub, tmp_path, part, name):
    hub.cut.add(name)
    with pytest.raises(SystemExit, match=hub.url):
        download.main(["toy", "--part", part])
    before = {sent for sent, _ in hub.sent} - {name}
    hub.cut.clear()
    hub.sent.clear()
    download.main(["toy", "--part", part])
    again = {sent for sent, _ in hub.sent}
    assert name in again and not again & before, "the files that were complete are not sent again"
    content = (cached("toy/language", name) if part == "language"
               else (tmp_path / "dataset/toy" / name).read_bytes())
    assert content == (MODEL | DATA)[name]


@pytest.mark.parametrize("part, name", [("language", "model.safetensors"),
                                        ("data", "images.zip")])
def test_a_wrong_hash_is_reported_with_both_and_mended_as_it_says(hub, capsys, part, name):
    hub.spoiled.add(name)
    right = (MODEL | DATA)[name]
    wrong = bytes([right[0] ^ 1]) + right[1:]
    with pytest.raises(SystemExit) as ended:
        download.main(["toy", "--part", part])
    message = str(ended.value)
    assert hashlib.sha256(right).hexdigest() in message
    assert f"sha256 {hashlib.sha256(wrong).hexdigest()}, the hub says" in message
    assert "Delete what is named here and run the same command again" in message
    place = message.splitlines()[1].split(": sha256")[0].strip()

    hub.spoiled.clear()
    with pytest.raises(SystemExit, match="damaged"):  # it does not pass the second time either
        download.main(["toy", "--part", part])
    download.Path(place).unlink()
    download.main(["toy", "--part", part])
    assert download.Path(place).read_bytes() == right


def test_without_a_hub_it_says_what_to_do(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(SystemExit) as ended:
        download.main(["toy"])
    message = str(ended.value)
    for expected in (
            "http://127.0.0.1:9: ConnectError", "HF_ENDPOINT=https://hf-mirror.com",
            "http://127.0.0.1:9/toy/language/tree/main (988.0 MB)",
            "--language_model DIR and --vision_tower DIR", "-> weights/language/",
            "preprocessor_config.json", "-> weights/vision/",
            "http://127.0.0.1:9/datasets/toy/data/tree/main (50.0 MB): chat.json, images.zip",
            "-> dataset/toy/", "--data FILE --image_folder DIR",
            "by hand: http://far.example/photos.zip (19.30 GB) -> dataset/photos/"):
        assert expected in message, (expected, message)


def test_what_the_hub_refuses_is_told(hub, monkeypatch):
    monkeypatch.setitem(download.PRESETS, "toy",
                        replace(download.PRESETS["toy"], language_model="toy/gone"))
    with pytest.raises(SystemExit, match="RepositoryNotFoundError"):
        download.main(["toy", "--part", "language"])
    moved = Download("toy/data", ("older.jsonl",), "dataset/toy", None)
    monkeypatch.setitem(download.PRESETS, "toy",
                        replace(download.PRESETS["toy"], downloads=(moved,)))
    with pytest.raises(SystemExit, match="toy/data holds no older.jsonl any more, but chat.json"):
        download.main(["toy", "--part", "data"])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_named_without_a_hub(name):
    """With HF_HUB_OFFLINE=1, as users set it; a preset without downloads ends in peace."""
    preset, parts = PRESETS[name], list(download.PARTS)
    message = download.by_yourself(preset, parts)
    if name == "emoji":
        assert download.sources_of(preset, parts) == ([], [])
        return
    for model in (preset.language_model, preset.vision_tower):
        assert f"/{model}/tree/main (" in message
    for recipe in (preset.pretrain, preset.sft):
        for file in [recipe.data] if isinstance(recipe.data, str) else recipe.data:
            fetched = [f"{part.to}/{one}" for part in preset.downloads for one in part.files]
            assert file in fetched, f"{file} is what the preset trains on; fetched: {fetched}"


def test_the_command_itself_ends_with_1_and_the_message():
    told = subprocess.run(
        [sys.executable, "-m", "extras.download", "minimind-3v", "--part", "data"], cwd=ROOT,
        env={**environment(), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert told.returncode == 1 and "Traceback" not in told.stderr
    assert "offline mode is enabled" in told.stderr
    assert "jingyaogong/minimind-v_dataset/tree/main (4.93 GB): sft_i2t.parquet" in told.stderr
