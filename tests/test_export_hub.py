"""Claims: --push shows every file and sends nothing; with --yes each file arrives as it is; the
card tells what run.json knows and no path of this machine."""

import base64
import hashlib
import http.server
import json
import threading

import huggingface_hub
import pytest

import extras.export.__main__ as export
from extras.export.hub import files_to_push, model_card
from model.pretrained.checkpoint import find_model
from tests.test_export import trained


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_tokenizer_dir):
    directory = tmp_path_factory.mktemp("secret_place")
    run = trained(directory, tiny_tokenizer_dir, "Qwen2", "Siglip", 48, ["--lora"])
    (directory / "scores.json").write_text(json.dumps(
        {"After stage two": 0.8546, "by_kind": {"what": 1.0}}))
    return run


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's HTTP API as an upload needs: large files by LFS, small ones inline."""

    def answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self):
        content = self.body()
        self.server.stored[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self):
        server, body = self.server, self.body()
        server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            server.created.append(json.loads(body))
            self.answer({"url": f"{server.address}/me/mine", "name": "me/mine", "id": "1"})
        elif self.path == "/api/validate-yaml":  # the model card's head
            server.cards.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self.answer({"files": [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.answer({"transfer": "basic", "objects": [
                {**about, "actions": {"upload": {"href": f"{server.address}/put/{about['oid']}"}}}
                for about in json.loads(body)["objects"]]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                elif item["key"] == "lfsFile":
                    server.files[item["value"]["path"]] = server.stored[item["value"]["oid"]]
            self.answer({"commitUrl": f"{server.address}/me/mine/commit/1", "commitOid": "1",
                         "pullRequestUrl": None, "success": True})
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self):
        self.answer({"error": self.path}, 404)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.created, server.files, server.stored, server.tokens = [], {}, {}, set()
    server.cards = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_nothing_is_sent_before_yes_and_everything_after(run, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    # Read from the environment once, when the library was imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    flags = ["--model", run, "--out", str(tmp_path / "out"), "--push", "me/mine"]
    export.main(flags)
    shown = capsys.readouterr().out
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "loss.png", "model.safetensors", "config.json", "tokenizer.json",
            "chat_template.jinja", "preprocessor_config.json"} <= files.keys()
    for name, path in files.items():
        assert f"{path.stat().st_size:,}  {name}\n" in shown
    assert "nothing was sent" in shown and not hub.created and not hub.files

    export.main([*flags, "--yes"])
    assert hub.files == {name: path.read_bytes() for name, path in files.items()}
    assert {*hub.cards} == {files["README.md"].read_text()}
    assert [about["name"] for about in hub.created] == ["mine"]
    assert hub.tokens == {"Bearer hf_nobody"}
    assert f"uploaded: {hub.address}/me/mine/commit/1" in capsys.readouterr().out


def test_the_card_tells_what_is_known(run, tmp_path):
    card = model_card(find_model(run), "transformers", "me/mine")
    for text in ("pipeline_tag: image-text-to-text", "preset `qwen2.5-siglip`", "# mine",
                 "| language | language | not known here", "2 optimizer steps of 2 samples",
                 "LoRA of rank 16", "`data.jsonl` (6 samples)", "| After stage two | 85.5% |",
                 "](loss.png)",
                 'from_pretrained("me/mine"'):
        assert text in card, text
    assert "secret_place" not in card and "base_model" not in card, "both towers are local"


def test_the_card_names_public_bases_and_their_licences(run, tmp_path):
    checkpoint = find_model(run)
    copy = tmp_path / "step_000002"
    copy.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    config["bases"]["language"]["name"] = "Qwen/Qwen2.5-0.5B"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "run.json").write_bytes((checkpoint / "run.json").read_bytes())
    card = model_card(copy, "peft", "me/mine")
    assert "base_model:\n- Qwen/Qwen2.5-0.5B\n" in card and "library_name: peft" in card
    assert "| language | Qwen/Qwen2.5-0.5B | apache-2.0 |" in card and "## Scores" not in card
    assert "loss.png" not in card, "this one has left its run"
    assert 'AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B")' in card


def test_only_safetensors_are_published(run, tmp_path):
    export.main(["--model", run, "--to", "merged", "--out", str(tmp_path / "out")])
    checkpoint = find_model(str(tmp_path / "out"))
    names = [path.name for path in files_to_push(checkpoint)]
    assert "model.safetensors" in names and "training_state.pt" not in names
    (checkpoint / "old.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match="old.bin is no file to publish"):
        export.main(["--model", run, "--to", "merged", "--out", str(tmp_path / "out"), "--push",
                     "me/mine"])


def test_yes_alone_is_explained(capsys):
    with pytest.raises(SystemExit):
        export.main(["--yes"])
    assert "--yes needs --push" in capsys.readouterr().err
