"""Files of samples: JSON lines, or plain text with blank lines between samples. A mistake is told with its line."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from serve.errors import ConfigError


@dataclass(frozen=True)
class Line:
    """One sample of a file.

    Attributes:
        place: File and line, for messages.
        fields: The object that stands there.
    """

    place: str
    fields: dict[str, Any]

    def mistake(self, message: str) -> ConfigError:
        """Return an error about this sample."""
        return ConfigError(f"{self.place}: {message}")


def read_file(path: Path, name: str) -> list[Line]:
    """Read a file of samples; plain text is taken for objects with `text`.

    Args:
        path: Where it is.
        name: As the operator knows it, for messages.

    Raises:
        ConfigError: It cannot be read, is empty, or a line is no JSON object.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{name}: cannot be read as UTF-8 text: {exc}") from exc
    is_json = path.suffix in (".jsonl", ".json", ".ndjson") or content.lstrip()[:1] == "{"
    lines = list(_json_lines(content, name) if is_json else _paragraphs(content, name))
    if not lines:
        raise ConfigError(
            f"{name}: there is no sample in it; write one JSON object a line, or texts between blank lines"
        )
    return lines


def parse_lines(content: str, name: str) -> list[Line]:
    """Read JSON lines.

    Raises:
        ConfigError: A line is no JSON object.
    """
    return list(_json_lines(content, name))


def _json_lines(content: str, name: str) -> Iterator[Line]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            fields = msgspec.json.decode(line)
        except msgspec.DecodeError as exc:
            raise ConfigError(f'{place}: {exc}; each line has to be one JSON object, like {{"text": "..."}}') from None
        if not isinstance(fields, dict):
            raise ConfigError(f'{place}: {_short(line)} is no JSON object; write {{"text": "..."}}')
        yield Line(place, fields)


def _paragraphs(content: str, name: str) -> Iterator[Line]:
    collected: list[str] = []
    first = 1
    for number, line in enumerate([*content.splitlines(), ""], 1):
        if line.strip():
            if not collected:
                first = number
            collected.append(line)
        elif collected:
            yield Line(f"{name}, line {first}", {"text": "\n".join(collected)})
            collected = []


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
