"""The picture in the documentation is that of the code."""

from tools.group_diagram import DOCUMENT, insert


def test_the_diagram_is_up_to_date() -> None:
    text = DOCUMENT.read_text()
    assert insert(text) == text, "run: python -m tools.group_diagram"
