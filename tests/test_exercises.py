"""The exercises of the chapters: stubs fail their checks, solutions pass them, both are in the chapter."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "tests").glob("*/exercises_*.py"))


def script(name):
    """A module of docs/, which is no package; it may not change how the suite writes bytecode."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    writes = sys.dont_write_bytecode
    spec.loader.exec_module(module)
    sys.dont_write_bytecode = writes
    return module


bundle, live = script("bundle"), script("live")


def texts():
    """(file, name, stub, solution): the texts as the chapter shows them."""
    for path in FILES:
        parts = bundle.exercises(path.read_text())
        for name in (n for n in parts if not n.startswith("solve_")):
            slug = path.stem.removeprefix("exercises_")
            yield pytest.param(path, name, parts[name], parts.get(f"solve_{name}"), id=f"{slug}-{name}")


EVERY = pytest.mark.parametrize(("path", "name", "stub", "solution"), list(texts()))


@pytest.fixture
def check(capsys):
    """check(path, name, text) -> (solved, what the page shows), under the page's profile of Hypothesis."""
    before = settings.get_current_profile_name()

    def run(path, name, text):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        solved = live.run_exercise(json.dumps([module, name, text]))
        return solved, capsys.readouterr().out

    yield run
    settings.load_profile(before)


@EVERY
def test_exercises_wait_for_their_solution(path, name, stub, solution, check):
    """The stub is told what is missing; the solution passes, under the stub's name, with its imports."""
    solved, said = check(path, name, stub)
    assert not solved
    assert said.startswith("Not yet: ")
    assert len(said.splitlines()[0]) > 20
    imports = "".join(re.findall(r"^import .*\n", path.read_text(), re.MULTILINE))
    text = imports + solution.replace(f"def solve_{name}(", f"def {name}(")
    assert check(path, name, text) == (True, "Solved.\n")


@EVERY
def test_exercises_are_in_their_chapter(path, name, stub, solution):
    slug, part = path.stem.removeprefix("exercises_"), path.parent.name
    chapter = (ROOT / "docs" / part / f"{slug}.md").read_text()
    for section in (name, f"solve_{name}"):
        assert f'--8<-- "tests/{part}/{path.name}:{section}"' in chapter


def test_exercises_say_what_is_not_there(check):
    path = next(f for f in FILES if f.stem.endswith("_pitome"))
    assert check(path, "attend", "x = 1") == (False, "Not yet: the code defines no attend.\n")
    solved, said = check(path, "attend", "def attend(q, k, v, size):\n    return 1")
    assert not solved
    assert "Smallest counterexample" in said
    with pytest.raises(ZeroDivisionError):
        check(path, "attend", "def attend(q, k, v, size):\n    return 1 / 0")
