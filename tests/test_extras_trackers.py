"""Claims: each tracker gets the very numbers of metrics.jsonl and evaluations.jsonl; a package that
is not installed is told before anything is loaded."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest

import train_pretrain
from extras import trackers
from tests.test_held_out import evaluations
from tests.test_resume import Killed, die_in_step
from tests.tiny import make_world, metrics
from training.settings import TRACKERS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return [*make_world(tmp_path_factory.mktemp("world")), "--eval_samples", "6",
            "--eval_steps", "3"]


def expected(out) -> dict:
    """{(name of a curve, step): value}"""
    lines = [("train", line) for line in metrics(out)] + [("eval", x) for x in evaluations(out)]
    return {(f"{kind}/{name}", line["step"]): value for kind, line in lines
            for name, value in line.items() if name != "step"}


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_missing_package_is_told_before_anything_is_loaded(tracker, monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=f"--report_to {tracker}: .*pip install {tracker}"):
        train_pretrain.main(["--report_to", tracker, "--language_model", "nowhere", "--data",
                             "none.json",
                             "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    needed = Path("requirements-extra.txt")
    assert f"\n{tracker}>=" in (Path(trackers.__file__).parent.parent / needed).read_text()


class StandIn(types.ModuleType):
    """Of a service: remembers what it is given, and refuses what the real one refuses."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name)  # find_spec looks here
        self.told, self.open, self.step = {}, False, 0

    def init(self, *, project, name, config):
        assert not self.open and project == "vlm" and name == config["out"]
        assert config["learning_rate"] == 0.01
        self.open = True
        return self

    def log(self, data, step):
        assert self.open and step >= self.step, "steps must not go back"
        self.step = step
        assert all(isinstance(value, (int, float)) for value in data.values())
        self.told.update({(name, step): value for name, value in data.items()})

    def finish(self):
        self.open = False


@pytest.mark.parametrize("tracker", ["wandb", "swanlab", "trackio"])
def test_services_are_told_the_same_numbers(world, tmp_path, monkeypatch, tracker):
    module = StandIn(tracker)
    monkeypatch.setitem(sys.modules, tracker, module)
    train_pretrain.main([*world, "--report_to", tracker, "--out", str(tmp_path)])
    assert module.told == expected(tmp_path) and not module.open
    assert ("train/loss", 6) in module.told and ("eval/eval_loss", 6) in module.told


def test_tensorboard_files_hold_the_same_numbers(world, tmp_path, monkeypatch):
    """Also of a run that was killed after its last checkpoint, and resumed."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_step(patch, 5)
        train_pretrain.main([*world, "--report_to", "tensorboard", "--out", str(tmp_path)])
    train_pretrain.main(["--resume", "--out", str(tmp_path)])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    told = {(name, event.step): event.value for name in events.Tags()["scalars"]
            for event in events.Scalars(name)}
    # The files hold float32.
    assert told == {key: np.float32(value) for key, value in expected(tmp_path).items()}
