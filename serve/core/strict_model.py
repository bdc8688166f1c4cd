"""StrictModel: the base of every configuration model; and its mistakes, told so that an operator can act."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class StrictModel(BaseModel):
    """Frozen; an unknown key is an error, so that a misspelt setting never passes silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def describe_mistakes(exc: ValidationError, source: str) -> str:
    """Return each mistake with its key, reason and value, one a line; `source` is the file or section they are in."""
    lines = []
    errors = exc.errors(include_url=False)
    for error in errors:
        if any(_is_inside(other["loc"], error["loc"]) for other in errors):
            continue  # a list "too short" because what stands in it is wrong
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"])
        # What is said of a whole section names what is wrong in it: all of it again would hide that.
        is_section = error["type"] == "value_error" and isinstance(error["input"], dict)
        is_clear = is_section or error["type"] in ("missing", "extra_forbidden")
        value = "" if is_clear else f" (got {_shorten(error['input'])})"
        reason = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            reason = "there is no such setting; check the spelling, or remove it"
        lines.append(f"{source}{key}: {reason}{value}")
    return "\n".join(lines)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_inside(inner: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer
