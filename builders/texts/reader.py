"""read_texts: the samples that a model is calibrated with, or judged by."""

import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from builders.settings.quantize import TextsSettings
from builders.texts.encoder import Encoded, PromptEncoder, read_messages
from builders.texts.json_lines import Line, parse_lines, read_file
from builders.texts.package import Purpose, package_file
from serve.errors import ConfigError, RequestError

logger = logging.getLogger(__name__)

_KEYS = ("text", "prompt", "messages")
_CHARS_PER_TOKEN = 64  # more than any tokenizer's mean: the rest of a whole book is not encoded only to be cut off
_MIN_TOKENS = 2  # one token predicts nothing


@dataclass(frozen=True)
class TextSample:
    """One text.

    Attributes:
        text: Of the sample, as it was encoded; chat messages as the template renders them.
        tokens: Its token ids, at most `max_tokens`, at least two.
        prompt_tokens: So many of them are the beginning that a continuation is generated from: of a passage one half,
            of a prompt all, of a conversation all that comes before its last answer.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """The beginning."""
        return self.tokens[: self.prompt_tokens]


def read_texts(
    settings: TextsSettings,
    user_files: Mapping[str, Path],
    encoder: PromptEncoder,
    purpose: Purpose,
) -> tuple[TextSample, ...]:
    """Draw samples, and encode them. The same settings, files and tokenizer give the same samples in the same order.

    Args:
        settings: Which file, how many, how long.
        user_files: Of the step: where the file is on this node.
        encoder: Of the model.
        purpose: The package has texts of its own for each, so that no model is judged by what it was calibrated with.

    Raises:
        ConfigError: The file cannot be read, or a line is no sample; names file and line.
    """
    lines = (
        _package_lines(purpose) if settings.file is None else read_file(_path(settings.file, user_files), settings.file)
    )
    drawn = random.Random(settings.seed).sample(lines, min(settings.samples, len(lines)))
    source = settings.file or "the package's own texts"
    if len(drawn) < settings.samples:
        logger.warning("%s has %d samples; %d were asked for.", source, len(drawn), settings.samples)
    encoded = [_encode(line, encoder, settings, is_own=settings.file is None) for line in drawn]
    samples = tuple(sample for sample in encoded if len(sample.tokens) >= _MIN_TOKENS)
    if not samples:
        raise ConfigError(f"{source}: no sample has {_MIN_TOKENS} tokens or more; use longer texts")
    return samples


def _path(name: str, user_files: Mapping[str, Path]) -> Path:
    path = user_files.get(name, Path(name))
    if not path.is_file():
        raise ConfigError(f"{name}: there is no such file; give its path, relative to the build file")
    return path


def _package_lines(purpose: Purpose) -> list[Line]:
    return parse_lines(package_file(purpose).decode(), f"{purpose}.jsonl")


def _encode(line: Line, encoder: PromptEncoder, settings: TextsSettings, *, is_own: bool) -> TextSample:
    given = [key for key in _KEYS if key in line.fields]
    if len(given) != 1:
        found = " and ".join(given) if given else f"none of them, but {', '.join(line.fields) or 'nothing'}"
        raise line.mistake(f"give exactly one of text, prompt and messages (got {found})")
    (key,) = given
    if key == "messages":
        encoded = _conversation(line, encoder, is_own=is_own)
    else:
        encoded = encoder.encode(_text(line, key)[: settings.max_tokens * _CHARS_PER_TOKEN])
    tokens = encoded.tokens[: settings.max_tokens]
    prompt_tokens = len(tokens) // 2 if key == "text" else min(encoded.prompt_tokens, len(tokens))
    return TextSample(encoded.text, tokens, max(1, prompt_tokens))


def _text(line: Line, key: str) -> str:
    text = line.fields[key]
    if not isinstance(text, str) or not text.strip():
        raise line.mistake(f"{key}: {text!r} is no text; write a string that is not empty")
    return text


def _conversation(line: Line, encoder: PromptEncoder, *, is_own: bool) -> Encoded:
    try:
        messages = read_messages(line.fields["messages"])
        if is_own and not encoder.has_chat_template:  # these have to do for every model
            return encoder.encode("\n\n".join(str(message.content) for message in messages))
        return encoder.encode_messages(messages)
    except (ValueError, RequestError) as exc:
        raise line.mistake(f"{exc}") from None
