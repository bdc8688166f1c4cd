"""docs/trtllm-traps.md names tests that exist, and leaves no item of the fact sheet's sections 4, 5 and 7 out."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[4]
DOCUMENT = (REPOSITORY / "docs" / "trtllm-traps.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in DOCUMENT.splitlines()
    if line.startswith("| ") and not line.startswith("| item")
]


def existing_tests() -> set[str]:
    found: set[str] = set()
    for file in (REPOSITORY / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                found.add(node.name)
    return found


def test_every_test_that_is_named_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT))
    assert len(named) > 60
    assert sorted(named - existing_tests()) == []


def test_every_trap_has_a_test_or_a_reason() -> None:
    for item, trap, covered in ROWS:
        assert trap, item
        assert "test_" in covered or len(covered.split()) >= 5, (item, covered)


@pytest.mark.parametrize("number", range(1, 37))
def test_every_numbered_item_of_section_7_has_a_row(number: int) -> None:
    assert any(item.startswith("7.") and re.match(rf"{number}:", trap) for item, trap, _ in ROWS)


@pytest.mark.parametrize(
    "section", ["4.1", "4.2", "4.3", "4.3b", "4.4", "4.5", "4.6", *(f"5.{i}" for i in range(1, 9))]
)
def test_every_section_has_a_row(section: str) -> None:
    assert any(item == section for item, _, _ in ROWS)
