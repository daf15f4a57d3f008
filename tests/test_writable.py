"""Claims: a place that cannot be written to is told in one sentence before anything is loaded, by
every command that writes; one that can is left as it was."""

import subprocess
import sys
import tempfile

import huggingface_hub
import pytest

import eval as evaluating
import extras.export.__main__ as export
import extras.web as web
import train_pretrain
import train_sft
from extras import download
from tests.test_download import cache_of_the_test, hub, running  # noqa: F401
from tests.tiny import ROOT, environment
from training.writable import check_directory, check_image

PLACES = {  # what stands for DIR, what is said
    "": "expected a directory.*found no name",
    "file": "expected a directory.*found a file",
    "file/below": r"cannot be written \(tried at .*file: is not a directory\)",
    "file/far/below": r"cannot be written \(tried at .*file: is not a directory\)",
    "broken_link": "expected a directory.*found a file",
    "broken_link/below": "is not a directory",
    "/proc/x": "cannot be written.*tried at /proc: ",
    "n" * 300: "cannot be written.*name too long",
    "null\0byte": "cannot be written.*null byte",
    "locked/new": "cannot be written.*locked: Permission denied",
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A file, a link to nowhere, a directory without rights (which root would not notice)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "broken_link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "locked").mkdir()
    plain = tempfile.TemporaryFile

    def refused(*arguments, dir=None, **named):
        if str(dir).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(dir))
        return plain(*arguments, dir=dir, **named)

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    yield tmp_path
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == [
        "broken_link", "file", "locked"]
    assert (tmp_path / "file").read_text() == "kept" and not list((tmp_path / "locked").iterdir())


@pytest.fixture
def nothing_loaded(monkeypatch):
    def loaded(*_):
        raise AssertionError("too early")

    for place in ("training.resume.find_start", "train_pretrain.open_data",
                  "train_pretrain.load_or_build", "extras.export.__main__.find_model",
                  "eval.load_model", "extras.web.prepare", "evaluation.run.find_model"):
        monkeypatch.setattr(place, loaded)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("script, flag, more", [
    (train_pretrain, "--out", []), (train_sft, "--out", []), (train_sft, "--out", ["--resume"]),
    (export, "--out", ["--model", "run"]), (evaluating, "--report", ["--data", "emoji"])])
def test_a_directory_that_cannot_be_is_told_first(nothing_loaded, script, flag, more, place):
    with pytest.raises(SystemExit, match=f"{flag} .*{PLACES[place]}") as told:
        script.main([*more, flag, place])
    assert "\n" not in str(told.value)


def test_scores_without_report_have_a_place_too(nothing_loaded, here):
    (here / "out").symlink_to("file")
    with pytest.raises(SystemExit, match=r"--report out/scores: .*out: is not a directory"):
        evaluating.main(["--data", "emoji"])
    (here / "out").unlink()


@pytest.mark.parametrize("place, words", [
    ("", "ends in ''"), ("locked", "found a directory"),
    ("file/looks.png", "is not a directory"), ("/proc/looks.png", "tried at /proc: "),
    ("locked/looks.png", "Permission denied"), ("n" * 300 + ".png", "name too long"),
    ("looks.xyz", r"ends in '\.xyz'; give a name that ends in \.png"), ("looks", "ends in ''"),
    ("looks.psd", r"ends in '\.psd'")])
def test_a_picture_that_cannot_be_is_told_first(nothing_loaded, place, words):
    with pytest.raises(SystemExit, match=f"--attention .*{words}"):
        evaluating.main(["--image", "a.png", "--prompt", "Who?", "--attention", place])


def test_the_page_has_a_place_for_uploads_or_says_so(nothing_loaded, monkeypatch, here):
    monkeypatch.setattr(tempfile, "tempdir", str(here / "file"))
    with pytest.raises(SystemExit, match=r"extras.web: .*\(TMPDIR\) .*found a file"):
        web.main([])


@pytest.mark.parametrize("part", ["data", "language"])
def test_a_download_that_could_not_be_kept_is_not_begun(hub, monkeypatch, here, part):  # noqa: F811
    if part == "data":
        (here / "dataset").symlink_to("file")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "file" / "cache"))
    told = "the data's directory dataset/toy" if part == "data" else r"hub \(HF_HOME\)"
    with pytest.raises(SystemExit, match=f"{told}.*is not a directory") as reason:
        download.main(["toy", "--part", part])
    assert "\n" not in str(reason.value) and hub.sent == []
    if part == "data":
        (here / "dataset").unlink()


def test_what_can_be_written_is_left_as_it_was(here):
    for place in (".", "new", "new/below/it", here / "new"):
        check_directory("--out", place)
    for place in ("new.png", "new.JPG", "new/below.webp"):
        check_image("--attention", place)


def test_the_command_itself_ends_with_1_and_a_sentence(here):
    done = subprocess.run([sys.executable, ROOT / "train_pretrain.py", "--out", "file/run"],
                          env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(
        "cannot start: --out file/run: cannot be")
