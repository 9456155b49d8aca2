"""What the documentation names exists."""

import ast
import re
import runpy
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PITFALLS = (TESTS.parent / "docs" / "pitfalls.md").read_text()


def functions_of(path: Path) -> set[str]:
    """The tests of a file."""
    tree = ast.parse(path.read_text())
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[:5] == "test_"}


def number(row):
    """p01 of a row that begins with P1."""
    return f"p{int(row.split('|')[1].strip()[1:]):02d}"


def test_every_pitfall_names_tests_that_exist():
    rows = [line for line in PITFALLS.splitlines() if re.match(r"\| P\d", line)]
    assert [row.split("|")[1].strip() for row in rows] == [f"P{n}" for n in range(1, 30)]
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert any(name.startswith(f"test_{number(row)}_") for _, name in named), row
        assert row.count("::") == len(named), row
        for path, name in named:
            assert name in functions_of(TESTS / path), f"{path}::{name}"


def test_every_test_of_a_pitfall_is_in_the_table():
    for name in functions_of(TESTS / "test_pitfalls.py"):
        number = int(name[6:8])
        [row] = [line for line in PITFALLS.splitlines() if line.startswith(f"| P{number} |")]
        assert f"`test_pitfalls.py::{name}`" in row


@pytest.mark.parametrize("page", ["concepts.md", "concepts.zh.md"])
def test_lines_that_are_pointed_at_hold_what_is_quoted(page):
    docs = TESTS.parent / "docs"
    pointers = re.findall(r"\[`([^`]+)`\]\((\S+?\.py)#L(\d+)\)", (docs / page).read_text())
    assert len(pointers) == 14
    for quoted, path, line in pointers:
        assert quoted in (docs / path).read_text().splitlines()[int(line) - 1], (quoted, line)


def test_links_between_pages_lead_somewhere():
    pages = [*TESTS.parent.glob("*.md"), *(TESTS.parent / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_tables_of_results_are_those_that_the_scripts_left():
    overview = runpy.run_path(str(TESTS.parent / "reproductions" / "overview.py"))
    lines = (TESTS.parent / "README.md").read_text().splitlines()
    for table in (overview["texts"](), overview["games"]()):
        first = lines.index(table[0])
        assert lines[first : first + len(table)] == table
        assert not lines[first + len(table)].startswith("|")
