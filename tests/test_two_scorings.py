"""Claims: two scorings never mix. Each model and data has its own directory; one directory is
scored into by one process at a time, killed or not; nothing is written below a first line that
somebody else wrote; scores of another model or data in --report DIR are moved aside, and those of
the same, trained anew, are replaced and it is said."""

import errno
import io
import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from test_scoring import elsewhere as elsewhere  # fixtures
from test_scoring import world as world
from tiny import ROOT, environment

import eval as script
import evaluation.score as score
from evaluation import results_cache
from evaluation.results_cache import ResultsCache, locked
from evaluation.run import result_name
from training.writable import free_name


@pytest.fixture
def run(monkeypatch, capsys):
    """eval.py -> its stderr"""
    def run(*arguments) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        capsys.readouterr()
        script.main(["--max_new_tokens", "8", "--device", "cpu", *map(str, arguments)])
        return capsys.readouterr().err

    return run


@pytest.fixture
def during(monkeypatch):
    """during(n, what): what() is called when the n-th batch is to be answered. Each answer ends
    with a number that no other model has."""
    answer, asked, calls = score.Predictor.answer_batch, [], {}

    def counting(predictor, *rest):
        asked.append(None)
        calls.pop(len(asked), lambda: None)()
        found, skipped = answer(predictor, *rest)
        own = predictor.model.projector.fc1.weight.sum().item()
        return {i: f"{text} {own}" for i, text in found.items()}, skipped

    monkeypatch.setattr(score.Predictor, "answer_batch", counting)

    def during(number, what) -> None:
        asked.clear()
        calls[number] = what

    return during


class Killed(BaseException):
    """As sudden as a kill: nobody catches it."""


def kill():
    raise Killed


def files(directory) -> dict:
    """{name: bytes} of what a scoring leaves beside its cache"""
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file()}


def said(directory) -> list[str]:
    lines = (Path(directory) / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["answer"] for line in lines]


def scores_of(model: str, data: str = "data.jsonl") -> Path:
    found, = Path("out/scores").glob(f"{model}-{data}-*")
    return found


# ---------------------------------------------------------------- two models, one file


def test_two_models_on_one_file_do_not_mix(world, run, during):
    """B is killed while A answers, and started again when A has ended."""
    data = ["--data", world / "data.jsonl", "--batch_size", "4"]
    first, second = ["--model", world / "sft", *data], ["--model", world / "pretrain", *data]
    run(*first, "--report", "clean_a")
    run(*second, "--report", "clean_b")
    assert said("clean_a") != said("clean_b")

    def second_is_killed():
        during(3, kill)
        with pytest.raises(Killed):
            run(*second)

    during(2, second_is_killed)
    run(*first)
    a = scores_of("sft-step_000006")
    before = files(a)
    assert said(a) == said("clean_a")
    err = run(*second)
    b = scores_of("pretrain-step_000006")
    assert "8 answers are in" in err and said(b) == said("clean_b")
    assert files(a) == before and len(before) == 2


def test_an_older_checkpoint_of_the_run_is_another_model(world, run):
    for step in (3, 6):
        run("--model", world / "sft" / f"step_{step:06}", "--data", world / "data.jsonl",
            "--limit", "3")
    assert scores_of("sft-step_000003") != scores_of("sft-step_000006")


def test_answers_are_of_the_checkpoint_that_was_loaded(world, run, monkeypatch):
    """The training of --model goes on: while this one loads, a newer checkpoint is saved."""
    shutil.copytree(world / "sft", "sft")
    newer, load = Path("sft/step_000006"), script.load_model
    newer.rename("newer")

    def slow(*rest):
        found = load(*rest)
        if Path("newer").exists():
            Path("newer").rename(newer)
        return found

    monkeypatch.setattr(script, "load_model", slow)
    assert "model: sft/step_000003" in run("--model", "sft", "--data", world / "data.jsonl")
    header = (scores_of("sft-step_000003") / "cache" / "sft.jsonl").read_text().splitlines()[0]
    manifest = json.loads(Path("sft/step_000003/manifest.json").read_text())
    assert (json.loads(header)["key"]["model"]["model.safetensors"]
            == manifest["model.safetensors"]["sha256"])


# ---------------------------------------------------------------- the name


def name(*data, model="run/step_000006", language=None) -> str:
    return result_name(Namespace(data=list(map(str, data)), language_model=language), model)


def test_the_name_says_model_and_data(tmp_path):
    for file in ("a/data.jsonl", "a/data.json", "b/data.jsonl"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text("")
    found = name("a/data.jsonl")
    assert found.startswith("run-step_000006-data.jsonl-")
    assert name(tmp_path / "a" / "data.jsonl") == found, "the same file, however it is called"
    assert name("a/data.jsonl", model=tmp_path / "run" / "step_000006") == found
    assert name("a/data.jsonl", model="small").startswith("small-data.jsonl-")
    assert name("a/data.*") == name("a/data.json", "a/data.jsonl")
    assert "-data.json-and-more-" in name("a/data.*")
    assert name("emoji").startswith("run-step_000006-emoji-")
    assert name("emoji", model="none").startswith("language-emoji-")
    other = [name("a/data.json"), name("b/data.jsonl"), name("a/data.jsonl", "b/data.jsonl"),
             name("a/data.jsonl", "a/data.json"), name("a/*.json*"), name("emoji"),
             name("./emoji"), name("a/data.jsonl", model="other/run/step_000006"),
             name("a/data.jsonl", model="run/step_000003"), name("a/data.jsonl", model="run"),
             name("a/data.jsonl", model="none", language="a"),
             name("a/data.jsonl", model="none", language="b")]
    other.remove(name("a/*.json*"))  # the same two files as a/data.json and a/data.jsonl
    assert name("a/*.json*") == name("a/data.json", "a/data.jsonl")
    assert len({found, *other}) == 1 + len(other)


@pytest.mark.parametrize("data", ["x" * 250, "\u56fe" * 80, "\U00020000" * 60, "a b:c?.json", ".."])
def test_any_name_makes_a_directory(data, tmp_path):
    found = name(data, model=data)
    assert not set(found) & set(' :?*/\\<>|"')
    (tmp_path / "out" / found).mkdir(parents=True)
    assert found == name(data, model=data) != name(data + "2", model=data)


# ---------------------------------------------------------------- one process at a time


@pytest.mark.parametrize("where", [[], ["--report", "r"]])
def test_a_second_process_on_one_cache_is_refused(world, run, during, where):
    flags = ["--model", world / "sft", "--data", world / "data.jsonl", "--batch_size", "4"]
    again = flags if not where else ["--model", world / "pretrain", *flags[2:]]
    tried = []

    def start_another():
        with pytest.raises(SystemExit, match="is in use: another process .* Wait until") as error:
            run(*again, *where)
        tried.append(error.value.code)

    during(9, start_another)  # in a later condition than the first: the whole run is locked
    run(*flags, *where)
    assert len(tried) == 1
    run(*again, *where)  # the lock went with the run that held it


def test_a_lock_ends_with_its_process_also_a_killed_one(world, tmp_path):
    code = ("import sys, time; from evaluation.results_cache import locked\n"
            "with locked('r/cache'): print('locked', flush=True); time.sleep(600)")
    held = subprocess.Popen([sys.executable, "-c", code], env=environment(), text=True,
                            stdout=subprocess.PIPE)
    try:
        assert held.stdout.readline() == "locked\n"
        second = subprocess.run(
            [sys.executable, ROOT / "eval.py", "--model", world / "sft", "--data",
             world / "data.jsonl", "--report", "r"], env=environment(), text=True,
            capture_output=True, timeout=120)
        assert second.returncode == 1 and "Traceback" not in second.stderr
        assert second.stderr.splitlines()[-1].startswith(
            f"eval.py: {Path('r/cache')} is in use: another process is scoring there now.")
        assert not second.stdout and [path.name for path in Path("r").iterdir()] == ["cache"]
    finally:
        held.kill()
        held.wait()
        held.stdout.close()
    with locked("r/cache"):
        pass


def test_a_disk_without_locks_is_told(monkeypatch, tmp_path, capsys):
    def none_here(lock):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(results_cache.FileLock, "acquire", none_here)
    with locked(tmp_path):
        assert f"{tmp_path} cannot be locked" in capsys.readouterr().err


# ---------------------------------------------------------------- the file of the cache


@pytest.mark.parametrize("change", ["another", "empty", "gone"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_cache_that_was_replaced_takes_no_answers(tmp_path, change, resumed):
    file = tmp_path / "sft.jsonl"
    ours = ResultsCache(file, {"model": "a", "system": "\u4f60"})
    ours.add({0: "yes"}, {})
    if resumed:
        ours = ResultsCache(file, {"model": "a", "system": "\u4f60"})
    ours.add({1: "no"}, {2: "no image"})
    if change == "another":
        ResultsCache(file, {"model": "b"})
    elif change == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    before = file.read_bytes() if file.exists() else b""
    with pytest.raises(ValueError, match=f"{file} was replaced while .* same command again"):
        ours.add({3: "yes"}, {})
    assert file.read_bytes() == before and not ours.has(3)


def test_a_scoring_whose_cache_was_replaced_ends(world, run, during):
    during(2, lambda: Path("r/cache/sft.jsonl").write_text('{"key": {}}\n'))
    with pytest.raises(SystemExit, match="sft.jsonl was replaced"):
        run("--model", world / "pretrain", "--data", world / "data.jsonl", "--batch_size", "4",
            "--report", "r")


# ---------------------------------------------------------------- --report DIR


def test_scores_of_another_model_or_data_are_moved_aside(world, run, during):
    data = ["--data", world / "data.jsonl", "--report", "r"]
    run("--model", world / "sft", *data)
    first = files("r")
    assert set(first) == {"answers.jsonl", "contact_sheet.png", "loss.png", "scores.json"}
    during(1, kill)
    with pytest.raises(Killed):
        run("--model", world / "pretrain", *data)
    assert files("r") == {} and files("r/earlier_1") == first, "not lost when this one is killed"
    err = run("--model", world / "pretrain", *data)
    assert "moved" not in err  # done already
    second = files("r")
    assert second.keys() == first.keys() and second["scores.json"] != first["scores.json"]

    Path("elsewhere").mkdir()
    shutil.copy(world / "data.jsonl", "elsewhere")
    err = run("--model", world / "pretrain", "--data", "elsewhere/data.jsonl", "--image_folder",
              world,
              "--report", "r")
    assert (f"{Path('r/scores.json')} held scores of {world / 'pretrain' / 'step_000006'} on "
            f"{world / 'data.jsonl'}. They were moved to {Path('r/earlier_2')}.") in err
    assert files("r/earlier_2") == second and files("r/earlier_1") == first
    assert len(files("r")) == 4


def test_a_model_trained_anew_replaces_its_scores(world, run):
    shutil.copytree(world / "sft" / "step_000006", "sft/step_000006")
    for where in (["--report", "r"], []):
        flags = ["--model", "sft", "--data", world / "data.jsonl", *where]
        run(*flags)
        out = Path("r") if where else scores_of("sft-step_000006")
        before = json.loads((out / "scores.json").read_text())
        for again in ([*flags[:1], Path("sft/step_000006").resolve(), *flags[2:]], flags):
            err = run(*again)
            assert "replaced" not in err and "moved" not in err
        # The same place, another model: what stage one saved stands where stage two did.
        shutil.move("sft/step_000006", "old")
        shutil.copytree(world / "pretrain" / "step_000006", "sft/step_000006")
        err = run(*flags)
        assert (f"{out / 'scores.json'} holds scores of {Path('sft/step_000006')} on "
                f"{world / 'data.jsonl'} as they were before: model was {{") in err
        assert "They are replaced when this scoring has ended." in err
        after = json.loads((out / "scores.json").read_text())
        assert after["details"]["scored"]["key"] != before["details"]["scored"]["key"]
        assert after["details"]["scored"]["name"] == before["details"]["scored"]["name"]
        assert not list(out.glob("earlier_*"))
        shutil.rmtree("sft/step_000006")
        shutil.move("old", "sft/step_000006")


@pytest.mark.parametrize("text", ['{"sft": 0.5}', '{"sft": 0.', "", "[1]",
                                  '{"details": {"scored": {"name": 3, "key": 4}}}'])
def test_scores_that_do_not_say_whose_they_are_are_kept(world, run, text):
    Path("r").mkdir()
    Path("r/scores.json").write_text(text)
    err = run("--model", world / "pretrain", "--data", world / "data.jsonl", "--limit", "3",
              "--report", "r")
    assert "held scores of a model that it does not name" in err
    assert Path("r/earlier_1/scores.json").read_text() == text


def test_a_free_name_is_free_also_behind_a_gap(tmp_path):
    for number in (1, 2, 3):
        free_name(tmp_path, "earlier").mkdir()
        assert (tmp_path / f"earlier_{number}").is_dir()
    (tmp_path / "earlier_2").rmdir()
    assert not free_name(tmp_path, "earlier").exists()
