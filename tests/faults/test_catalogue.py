"""docs/faults.md names tests that exist, for every row."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "faults.md"
NAMED = re.compile(r"`([\w/]+\.py)::([\w:]+)`")


def catalogue() -> dict[int, list[str]]:
    """Row → the cells after it: what must hold, tests, controls, result."""
    lines = [line for line in PAGE.read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {int(row): rest for row, *rest in cells}


def written_in(path: Path) -> set[str]:
    """The tests of a file, as ``name`` or ``Class::name``."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + f.name for f in inner if isinstance(f, ast.FunctionDef)}
    return {name for name in found if name.split("::")[-1].startswith("test_")}


def missing(text: str) -> list[str]:
    """The tests that a text names and that nobody wrote."""
    named = NAMED.findall(text)
    there = {file: ROOT / "tests" / file for file, _ in named}
    known = {file: written_in(path) if path.exists() else set() for file, path in there.items()}
    return [f"{file}::{name}" for file, name in named if name not in known[file]]


def test_every_row_has_a_line() -> None:
    assert set(catalogue()) >= {*range(1, 89)}


@pytest.mark.parametrize("row", sorted(catalogue()))
def test_a_row_names_tests_that_exist_and_a_control(row: int) -> None:
    must_hold, tests, control, result = catalogue()[row]
    assert must_hold and control and result
    assert NAMED.search(tests)
    assert missing(f"{tests} {control}") == []


def test_a_test_that_nobody_wrote_is_noticed() -> None:
    assert missing("`server/test_run.py::test_no_such_thing` `no/such_file.py::test_x`") == [
        "server/test_run.py::test_no_such_thing",
        "no/such_file.py::test_x",
    ]
