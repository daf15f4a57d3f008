"""What README says is there: its files exist, its commands parse, both languages agree."""

import re
import shlex
from pathlib import Path

import pytest

import eval as eval_script
import extras.export.__main__ as export_script
import extras.web as web_script
from benchmarks import easy_vqa
from training.presets import PRESETS, read_flags

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("README.md", "README_zh.md")
OTHER_SCRIPTS = {"eval.py": eval_script, "extras.export": export_script,
                 "extras.web": web_script, "benchmarks/easy_vqa.py": easy_vqa}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(name: str) -> list[str]:
    """Every line of a bash block, as it is typed."""
    blocks = re.findall(r"```bash\n(.*?)```", text(name), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_file_that_it_names_is_there(name):
    named = set(re.findall(r"(?<![\w/.])((?:[\w.-]+/)*[\w-]+\.(?:py|md|txt|toml|tsv))\b",
                           text(name)))
    named = {path for path in named if not path.startswith("out/")}
    assert len(named) > 15
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing, missing


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_command_is_understood(name):
    seen = set()
    for line in commands(name):
        words = shlex.split(line.replace(".venv/bin/", ""))
        script = next((word for word in words if word.endswith(".py") or word in OTHER_SCRIPTS),
                      None)
        if script is None:
            continue
        arguments = words[words.index(script) + 1:]
        if script in OTHER_SCRIPTS:
            OTHER_SCRIPTS[script].read_flags(arguments)
        else:
            stage = {"train_pretrain.py": "pretrain", "train_sft.py": "sft"}[script]
            read_flags("", stage, arguments)
        seen.add(script)
    assert seen == {"train_pretrain.py", "train_sft.py", *OTHER_SCRIPTS}


def test_the_demo_of_the_makefile_is_the_one_that_readme_spells_out():
    recipe = re.search(r"\ndemo:.*?\n\n", text("Makefile"), re.DOTALL)[0]
    recipe = recipe.replace("$(BIN)", ".venv/bin").replace("$(OUT)", "out/demo")
    typed = [line.strip() for line in recipe.splitlines() if ".py" in line]
    assert len(typed) == 3
    for line in typed:
        assert line in commands("README.md"), line


def test_the_ci_runs_the_test_command_of_readme():
    ci = text(".ci/run")
    assert "-r requirements.txt -r requirements-dev.txt" in ci and "-m pytest" in ci
    assert "-r requirements.txt -r requirements-dev.txt" in text("README.md")
    assert ".venv/bin/python -m pytest" in text("README.md")


def test_both_languages_say_the_same():
    ours, theirs = (text(name) for name in LANGUAGES)
    assert commands("README.md") == commands("README_zh.md")
    for pattern in (r"\d+(?:[.,]\d+)*", r"`[^`\n]+`"):  # every figure; every name in code style
        english, chinese = (sorted(re.findall(pattern, t)) for t in (ours, theirs))
        assert english == chinese, set(english) ^ set(chinese)


def test_the_stage_table_tells_the_presets_numbers():
    rows = [line for line in text("README.md").splitlines() if line.startswith("| emoji default")]
    for recipe, cell in zip((PRESETS["emoji"].pretrain, PRESETS["emoji"].sft),
                            rows[0].split("|")[2:]):
        assert f"{recipe.steps} steps" in cell and f"batch {recipe.batch_size}" in cell
        assert f"{recipe.learning_rate:g}" in cell
