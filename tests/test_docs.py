"""What the documentation names exists."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PITFALLS = (TESTS.parent / "docs" / "pitfalls.md").read_text()


def functions_of(path: Path) -> set[str]:
    """The tests of a file."""
    tree = ast.parse(path.read_text())
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[:5] == "test_"}


def test_every_pitfall_names_tests_that_exist():
    rows = [line for line in PITFALLS.splitlines() if re.match(r"\| P\d", line)]
    assert [row.split("|")[1].strip() for row in rows] == [f"P{n}" for n in range(1, 30)]
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, row
        assert row.count("::") == len(named), row
        for path, name in named:
            assert name in functions_of(TESTS / path), f"{path}::{name}"


def test_every_test_of_a_pitfall_is_in_the_table():
    for name in functions_of(TESTS / "test_pitfalls.py"):
        number = int(name[6:8])
        [row] = [line for line in PITFALLS.splitlines() if line.startswith(f"| P{number} |")]
        assert f"`test_pitfalls.py::{name}`" in row
