"""Claims: the core is short enough to be read in an afternoon, imports point down, and with the
extras deleted the three commands still train both stages and chat."""

import ast
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.tiny import ROOT, environment

# What a core file may have in lines. A new capability may raise the limits of support and extras,
# never these.
CORE = {
    "model/config.py": 120, "model/language.py": 200, "model/vision.py": 150,
    "model/projector.py": 65, "model/vlm.py": 120, "model/loss.py": 80, "model/lora.py": 90,
    "model/generate.py": 160, "dataset/sample.py": 170, "dataset/chat.py": 190,
    "dataset/tokenizer.py": 70, "dataset/images.py": 150, "dataset/batching.py": 170,
    "train_pretrain.py": 230, "train_sft.py": 110, "eval.py": 180}
CORE_LINES, SUPPORT_LINES, EXTRA_LINES = 2300, 2600, 5000
FILE_LINES, FUNCTION_LINES, PARAMETERS = 300, 60, 6

SCRIPTS = ("train_pretrain", "train_sft", "eval")
ROOMS = ("model", "dataset", "training", "evaluation", "extras", "benchmarks")
EXTRAS = ("evaluation", "extras", "benchmarks")
# What each room may import from the others, at any time; and what in a function alone.
IMPORTS = {"model": (), "dataset": (), "training": ("model", "dataset"),
           "scripts": ("training", "model", "dataset")}
LAZY = ("extras", "evaluation")
# The one place of a thing that must not be done twice: pattern -> how many files may have it, of
# core and support.
ONCE = {"-100": 1, "hashlib.sha256": 1}

# {what a test below is about: who is still mending it}; delete a line as soon as its law holds.
OPEN = {
    **dict.fromkeys(["support", "extras"], "is being shortened"),
}


def law(values, name=str):
    """Parameters of a test; those in OPEN are expected to fail."""
    return [pytest.param(value, id=name(value), marks=[
        pytest.mark.xfail(strict=True, reason=OPEN[name(value)])] if name(value) in OPEN else [])
        for value in values]


def files(*rooms: str) -> list[Path]:
    """Relative to the root."""
    found = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in found)


def lines(path) -> int:
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def support() -> list[Path]:
    return [path for path in files("model", "dataset", "training")
            if str(path) not in CORE and "emoji" not in path.parts]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("path", law(CORE, lambda path: f"lines of {path}"))
def test_a_core_file_keeps_to_its_lines(path):
    assert lines(path) <= CORE[path]


@pytest.mark.parametrize("room", law(["core", "support", "extras"]))
def test_a_room_keeps_to_its_lines(room):
    paths, limit = {"core": (CORE, CORE_LINES), "support": (support(), SUPPORT_LINES),
                    "extras": (files("evaluation", "extras"), EXTRA_LINES)}[room]
    total = sum(map(lines, paths))
    assert total <= limit, f"{room}: {total} lines"


@pytest.mark.parametrize("path", law(files(*ROOMS)))
def test_no_file_is_too_long(path):
    assert lines(path) <= FILE_LINES


@pytest.mark.parametrize("path", law(CORE, lambda path: f"functions of {path}"))
def test_a_core_function_fits_on_a_screen(path):
    for node in ast.walk(tree(Path(path))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{path}: {node.name} has {length} lines"
            a = node.args
            names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg)
                     if p is not None]
            names = [name for name in names if name not in ("self", "cls")]
            assert len(names) <= PARAMETERS, f"{path}: {node.name} takes {names}"


@pytest.mark.parametrize("what", law(["reading plan"]))
def test_the_reading_plan_tells_the_real_lines_and_minutes(what):
    """Eight lines a minute, in both languages."""
    expected = [(path, str(lines(path)), str(round(lines(path) / 8))) for path in CORE]
    for name in ("README.md", "README_zh.md"):
        rows = re.findall(r"^\| \[`([\w/.]+)`\]\([\w/.]+\) \| ([\d,]+) \| (\d+) \|",
                          (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert sorted(rows) == sorted(expected), name


# ---------------------------------------------------------------- imports


def modules() -> dict[str, Path]:
    """{dotted name: path} of everything but the tests."""
    paths = [*(Path(f"{name}.py") for name in SCRIPTS), *files(*ROOMS)]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return dict(zip(names, paths))


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """(module of the project, whether in a function) of each import statement."""
    known, found = modules(), []
    lazy = {id(node) for function in ast.walk(tree(path))
            if isinstance(function, (ast.FunctionDef, ast.Lambda)) for node in ast.walk(function)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in known
                     else node.module for alias in node.names]
        else:
            continue
        found += [(name, id(node) in lazy) for name in dict.fromkeys(names) if name in known]
    return found


def room_of(name: str) -> str:
    return "scripts" if name in SCRIPTS else name.split(".")[0]


@pytest.mark.parametrize("name", law(
    [name for name in modules() if room_of(name) in IMPORTS], lambda name: f"imports of {name}"))
def test_imports_point_down(name):
    room = room_of(name)
    for imported, lazy in imports(modules()[name]):
        other = room_of(imported)
        allowed = (room, *IMPORTS[room], *(LAZY if lazy else ()))
        assert other in allowed, f"{name} imports {imported}" + (" in a function" * lazy)


@pytest.mark.parametrize("what", law(["circles"]))
def test_no_module_comes_back_to_itself(what):
    """Imports in functions count: a circle through them is one as well."""
    graph = {name: {other for other, _ in imports(path) if other != name}
             for name, path in modules().items()}
    circles = []
    for start in graph:
        reached, ahead = {}, [(other, (start, other)) for other in graph[start]]
        while ahead:
            name, way = ahead.pop()
            if name not in reached:
                reached[name] = way
                ahead += [(other, (*way, other)) for other in graph[name]]
        if start in reached:
            circles.append(" -> ".join(reached[start]))
    assert not circles, "\n".join(circles)


@pytest.mark.parametrize("pattern", law(ONCE))
def test_one_way_of_doing_each_thing(pattern):
    paths = [*map(Path, CORE), *support()]
    found = [str(path) for path in paths
             if any(pattern in part for part in code_of(path))]
    assert len(found) <= ONCE[pattern], found


def code_of(path: Path) -> list[str]:
    """The statements' expressions, without comments and docstrings."""
    return [ast.unparse(node) for node in ast.walk(tree(path))
            if isinstance(node, (ast.UnaryOp, ast.Attribute))]


# ---------------------------------------------------------------- without extras


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """The project without extras/, evaluation/ and benchmarks/."""
    directory = tmp_path_factory.mktemp("bare") / "project"
    directory.mkdir()
    for name in ("model", "dataset", "training"):
        shutil.copytree(ROOT / name, directory / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    for script in SCRIPTS:
        shutil.copy(ROOT / f"{script}.py", directory)
    return directory


def command(directory: Path, *words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=directory, capture_output=True, text=True,
                          env={**environment(), "PYTHONPATH": str(directory)}, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("what", law(["without extras"]))
def test_three_commands_train_both_stages_and_chat_without_extras(bare, what):
    small = ["--steps", "2", "--batch_size", "2", "--num_workers", "0", "--save_steps", "2",
             "--eval_steps", "2", "--eval_samples", "2"]
    command(bare, "train_pretrain.py", *small)
    told = command(bare, "train_sft.py", *small, "--lora")
    assert "held-out loss" in told and (bare / "out/sft/step_000002/model.safetensors").is_file()
    assert command(bare, "eval.py", "--model", "out/sft", "--prompt", "Hello",
                   "--max_new_tokens", "4") != ""
