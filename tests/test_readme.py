"""What README and the guides say is there: files, commands, links; both languages agree."""

import re
import shlex
from pathlib import Path

import pytest

import eval as eval_script
import extras.export.__main__ as export_script
import extras.web as web_script
from benchmarks import easy_vqa, transfer
from training.presets import PRESETS, read_flags

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("README.md", "README_zh.md")
GUIDES = ("data_formats", "scaling", "long_runs", "benchmarks", "serving", "troubleshooting")
PAIRS = [LANGUAGES, *((f"docs/{guide}.md", f"docs/{guide}_zh.md") for guide in GUIDES)]
PAGES = [page for pair in PAIRS for page in pair]
STAGES = {"train_pretrain.py": "pretrain", "train_sft.py": "sft", "extras.memory": "sft"}
OTHER_SCRIPTS = {"eval.py": eval_script, "extras.export": export_script,
                 "extras.web": web_script, "benchmarks/easy_vqa.py": easy_vqa,
                 "benchmarks.transfer": transfer}
FOREIGN = ("pip", "venv", "pytest")  # modules that are not of this project
CORE = ("dataset/sample.py", "dataset/chat.py", "dataset/tokenizer.py", "dataset/images.py",
        "dataset/batching.py", "model/config.py", "model/vision.py", "model/projector.py",
        "model/vlm.py", "model/language.py", "model/loss.py", "model/lora.py",
        "train_pretrain.py", "train_sft.py", "model/generate.py", "eval.py")
PLAN_ROW = re.compile(r"^\| \[`([\w/.]+)`\]\(([\w/.]+)\) \| ([\d,]+) \| (\d+) \| .+ \|$",
                      re.MULTILINE)


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(name: str) -> list[str]:
    """Every line of a bash block, as it is typed."""
    blocks = re.findall(r"```bash\n(.*?)```", text(name), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def prose(name: str) -> str:
    """The page without its code blocks."""
    return re.sub(r"```.*?```", "", text(name), flags=re.DOTALL)


def headings(name: str) -> list[tuple[int, str]]:
    """-> (level, text) of each heading."""
    found = re.findall(r"^(#+) (.+)$", prose(name), re.MULTILINE)
    return [(len(marks), title) for marks, title in found]


def anchor(title: str) -> str:
    """The link target that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def tables(name: str) -> list[list[int]]:
    """-> the number of cells in each row of each table."""
    found, last = [], -2
    for number, line in enumerate(prose(name).splitlines()):
        if line.startswith("|"):
            if number != last + 1:
                found.append([])
            found[-1].append(len(re.split(r"(?<!\\)\|", line)) - 2)
            last = number
    return found


def module_file(module: str) -> Path | None:
    """"extras.web" -> its file; of a package the one that `python -m` runs. None: no such file."""
    path = ROOT / module.replace(".", "/")
    candidates = (path.with_suffix(".py"), path / "__main__.py")
    return next((file for file in candidates if file.is_file()), None)


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_it_names_is_there(name):
    named = set(re.findall(r"(?<![\w/.])((?:[\w.-]+/)*[\w-]+\.(?:py|md|txt|toml|tsv))\b",
                           text(name)))
    named = {path for path in named if not path.startswith("out/")}
    assert len(named) > (15 if name in LANGUAGES else 2)
    here = (ROOT / name).parent
    missing = [path for path in named if not ((ROOT / path).exists() or (here / path).exists())]
    assert not missing, missing


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(name))
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, target = link.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), link
        if target:
            page = path.resolve().relative_to(ROOT).as_posix()
            assert target in [anchor(title) for _, title in headings(page)], link


@pytest.mark.parametrize("language", (0, 1))
def test_every_command_is_understood(language):
    seen = set()
    for line in (line for pair in PAIRS for line in commands(pair[language])):
        words = shlex.split(line.replace(".venv/bin/", ""))
        if words[:2] == ["python", "-m"] and words[2] in FOREIGN:
            continue
        script = words[2] if words[:2] == ["python", "-m"] else next(
            (word for word in words if word.endswith(".py")), None)
        if script is None:
            continue
        arguments = words[words.index(script) + 1:]
        if script in OTHER_SCRIPTS:
            OTHER_SCRIPTS[script].read_flags(arguments)
        elif script in STAGES:
            if script == "extras.memory":
                assert arguments.pop(0) in PRESETS
            read_flags("", STAGES[script], arguments)
        else:
            file = ROOT / script if script.endswith(".py") else module_file(script)
            assert file and file.is_file(), line
            source = file.read_text(encoding="utf-8")
            for flag in (word for word in arguments if word.startswith("--")):
                assert f'"{flag}"' in source, line
        seen.add(script)
    assert seen >= {"train_pretrain.py", "train_sft.py", *OTHER_SCRIPTS, "extras.memory",
                    "extras.report", "extras.check_data", "extras.download", "extras.preset_list"}


@pytest.mark.parametrize("name", PAGES)
def test_every_module_that_it_runs_is_there(name):
    modules = set(re.findall(r"python3? -m ([\w.]+)", text(name))) - set(FOREIGN)
    assert all(module_file(module) for module in modules), modules


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


@pytest.mark.parametrize("english,chinese", PAIRS)
def test_both_languages_say_the_same(english, chinese):
    assert commands(english) == commands(chinese)
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    assert tables(english) == tables(chinese)
    assert re.findall(r"```python.*?```", text(english), re.DOTALL) == re.findall(
        r"```python.*?```", text(chinese), re.DOTALL)
    for pattern in (r"\d+(?:[.,]\d+)*", r"`[^`\n]+`"):  # every figure; every name in code style
        ours, theirs = (sorted(re.findall(pattern, text(t))) for t in (english, chinese))
        for name in GUIDES:  # a page links to the guides of its own language
            theirs = [t.replace(f"{name}_zh", name) for t in theirs]
        assert ours == theirs, set(ours) ^ set(theirs)


@pytest.mark.parametrize("english,chinese", PAIRS)
def test_the_two_languages_link_to_each_other(english, chinese):
    assert f"]({Path(chinese).name})" in text(english)
    assert f"]({Path(english).name})" in text(chinese)


@pytest.mark.parametrize("name", PAGES)
def test_lines_of_prose_are_at_most_100_characters_wide(name):
    long = [line for line in prose(name).splitlines()
            if len(line) > 100 and not line.startswith("|")]
    assert not long, long


@pytest.mark.parametrize("name", LANGUAGES)
def test_readme_is_short_and_leads_to_every_guide(name):
    assert len(text(name).splitlines()) <= 200
    pages = [pair[LANGUAGES.index(name)] for pair in PAIRS[1:]]
    assert [page for page in pages if f"]({page})" not in text(name)] == []


@pytest.mark.parametrize("name", LANGUAGES)
def test_the_reading_plan_has_the_core_files_in_the_order_of_the_data(name):
    rows = PLAN_ROW.findall(text(name))
    assert [file for file, *_ in rows] == [link for _, link, *_ in rows] == list(CORE)
    other = PLAN_ROW.findall(text(LANGUAGES[1 - LANGUAGES.index(name)]))
    assert rows == other  # the same lines and minutes


@pytest.mark.parametrize("name", LANGUAGES)
def test_readme_names_every_letter_of_a_shape(name):
    for letter in ("B", "T", "N", "P", "K", "D", "Dv", "H", "Hkv", "hd", "V"):
        assert re.search(rf"`{letter}`\s", text(name)), letter


@pytest.mark.parametrize("name", LANGUAGES)
def test_readme_names_every_preset(name):
    assert [preset for preset in PRESETS if f"`{preset}`" not in text(name)] == []


def test_the_stage_table_tells_the_presets_numbers():
    rows = [line for line in text("README.md").splitlines() if line.startswith("| emoji default")]
    for recipe, cell in zip((PRESETS["emoji"].pretrain, PRESETS["emoji"].sft),
                            rows[0].split("|")[2:]):
        assert f"{recipe.steps} steps" in cell and f"batch {recipe.batch_size}" in cell
        assert f"{recipe.learning_rate:g}" in cell
