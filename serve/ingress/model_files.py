"""ModelFiles: what the gateway needs to know of a model, from the files of its directory in Hugging Face's layout.

Read with `tokenizers` and `json` only: a gateway has neither torch nor transformers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from serve.errors import ConfigError

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
_NO_CONTEXT = 10**9  # transformers writes 1e30 as model_max_length for "unknown"
_SPECIAL_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ModelFiles:
    """What was read.

    Attributes:
        path: The directory.
        tokenizer: Of tokenizer.json.
        special_tokens: `bos_token`, `eos_token`, … as far as the model has them.
        add_bos: Whether BOS comes before a plain prompt; None: as the tokenizer's post-processor does.
        chat_template: Jinja source; None if the model has none.
        chat_template_origin: Where it was found.
        eos_token_ids: Tokens that end an answer, ascending.
        context_tokens: Prompt and output together, at most; None if no file says so.
        vocab_size: Token ids are below this.
    """

    path: Path
    tokenizer: Tokenizer
    special_tokens: Mapping[str, str]
    add_bos: bool | None
    chat_template: str | None
    chat_template_origin: str
    eos_token_ids: tuple[int, ...]
    context_tokens: int | None
    vocab_size: int


def read_model_files(path: Path) -> ModelFiles:
    """Read the directory of a model; takes up to a second for a large vocabulary.

    Raises:
        ConfigError: A file is missing or broken; names it, and the remedy.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no directory: a model needs one that holds at least tokenizer.json.")
    tokenizer = _read_tokenizer(path / "tokenizer.json")
    tokenizer_config = _read_json(path / "tokenizer_config.json")
    config = _read_json(path / "config.json")
    special_tokens = _special_tokens(_read_json(path / "special_tokens_map.json") | tokenizer_config)
    template, origin = _chat_template(path, tokenizer_config)
    add_bos = tokenizer_config.get("add_bos_token")
    return ModelFiles(
        path=path,
        tokenizer=tokenizer,
        special_tokens=special_tokens,
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        chat_template=template,
        chat_template_origin=origin,
        eos_token_ids=_eos_token_ids(path, config, tokenizer, special_tokens.get("eos_token")),
        context_tokens=_context_tokens(path, config, tokenizer_config),
        vocab_size=max(*_positive_ints(config, ("vocab_size",)), tokenizer.get_vocab_size(), 0),
    )


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist. The gateway reads tokenizers in the fast format only: save it with "
            "transformers' `AutoTokenizer.from_pretrained(...).save_pretrained(...)` and put tokenizer.json there."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises bare Exception
        raise ConfigError(f"{path} is no tokenizer that `tokenizers` can read: {exc}") from exc
    # A prompt is never cut or padded silently, whatever the file says.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; empty if there is no such file."""
    try:
        value = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, msgspec.DecodeError) as exc:
        raise ConfigError(f"{path} cannot be read as JSON: {exc}. Restore it from the model's source.") from exc
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object. Restore it from the model's source.")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for key in _SPECIAL_TOKEN_KEYS:
        match config.get(key):
            case str(token) | {"content": str(token)}:
                tokens[key] = token
            case _:
                pass
    return tokens


def _chat_template(path: Path, tokenizer_config: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the template and its origin. A file of its own wins, as in transformers."""
    for name in ("chat_template.jinja", "chat_template.json"):
        file = path / name
        if not file.is_file():
            continue
        if name.endswith(".json"):
            return _named_template(_read_json(file).get("chat_template"), file), str(file)
        try:
            return file.read_text(encoding="utf-8"), str(file)
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{file} cannot be read as UTF-8 text: {exc}") from exc
    origin = path / "tokenizer_config.json"
    return _named_template(tokenizer_config.get("chat_template"), origin), f"{origin}, key chat_template"


def _named_template(value: Any, origin: Path) -> str | None:
    match value:
        case None | str():
            return value
        case list():
            named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
            default = named.get("default")
            if isinstance(default, str):
                return default
    raise ConfigError(f"{origin}: chat_template is neither a text nor a list that names one 'default'.")


def _eos_token_ids(
    path: Path, config: Mapping[str, Any], tokenizer: Tokenizer, eos_token: str | None
) -> tuple[int, ...]:
    generation = _read_json(path / "generation_config.json")
    found: set[int] = set()
    for origin in (generation, config, _text_config(config)):
        match origin.get("eos_token_id"):
            case bool() | None:
                continue
            case int(single):
                found = {single}
            case [*ids] if ids and all(isinstance(token_id, int) for token_id in ids):
                found = set(ids)
            case value:
                raise ConfigError(f"{path}: eos_token_id is {value!r}, and should be an integer or a list of them.")
        break
    if eos_token is not None and (token_id := tokenizer.token_to_id(eos_token)) is not None:
        found.add(token_id)
    return tuple(sorted(found))


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Models that also see or hear keep the numbers of their language model one level down."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else {}


def _positive_ints(config: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[int]:
    for source in (config, _text_config(config)):
        for key in keys:
            value = source.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                yield value


def _context_tokens(path: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> int | None:
    declared = next(_positive_ints(config, _CONTEXT_KEYS), None)
    if declared is not None:
        return declared
    limit = tokenizer_config.get("model_max_length")
    return int(limit) if isinstance(limit, int | float) and 0 < limit < _NO_CONTEXT else None
